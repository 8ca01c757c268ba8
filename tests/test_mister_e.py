"What MiSTER-E promises for every batch, whatever its shape."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.conversations import Conversation, Utterance, collate
from erc_moe.mister_e import MisterE, MisterEConfig
from erc_moe.ragged import Layout, dropout
from erc_moe.recurrence import bigru

LABELS, WIDTHS = ["neutral", "joy", "anger"], {"speech": 5, "text": 4}
SMALL = dict(hidden=4, layers=2, fusion_width=6, fusion_layers=2, attention_width=4, heads=2)
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
seeds = st.integers(0, 2**16)


def conversations(lengths, seed, observed=.8):
    rng, out = np.random.default_rng(seed), []
    for b, n in enumerate(lengths):
        labels = rng.choice([*LABELS, None], n)
        c = Conversation(f"c{b}", [Utterance(f"c{b}_{i}", f"s{rng.integers(3)}", "", labels[i]) for i in range(n)])
        for m, width in WIDTHS.items(): c = c.with_features(m, rng.normal(size=(n, width)), rng.random(n) < observed)
        out.append(c)
    return out


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return MisterE(MisterEConfig(WIDTHS, 3, labels=LABELS, **SMALL | changes)).double().eval()


@pytest.fixture(scope="module", params=["paper", "released"])
def model(request):
    return small_model(**{} if request.param == "paper" else dict(gate="mlp", gate_temperature=2., consistency="symmetric", reduction="mean"))


def longer(batch, by):
    "The same batch with `by` more columns of padding, filled with numbers that must not be read."
    more = copy.copy(batch)
    wide = lambda x, value: torch.cat([x, torch.full_like(x[:, :1], value).repeat_interleave(by, 1)], 1)
    more.features = {m: wide(x, 7.) for m, x in batch.features.items()}
    more.present = {m: wide(x, True) for m, x in batch.present.items()}
    more.mask, more.labels, more.speakers = wide(batch.mask, False), wide(batch.labels, -1), wide(batch.speakers, 0)
    return more


@settings(max_examples=25, deadline=None)
@given(lengths=lengths, seed=seeds, data=st.data())
def test_company_order_and_padding_change_nothing(model, lengths, seed, data):
    convs = conversations(lengths, seed)
    together = model(collate(convs, LABELS))
    order = data.draw(st.permutations(range(len(convs))))[:data.draw(st.integers(1, len(convs)))]
    batch = longer(collate([convs[b] for b in order], LABELS), data.draw(st.integers(0, 3)))
    again = model(batch)
    for row, b in enumerate(order):
        n = len(convs[b])
        for x, y in zip((again.logits, again.gate, *again.experts.values()), (together.logits, together.gate, *together.experts.values())):
            torch.testing.assert_close(x[row, :n], y[b, :n], atol=1e-10, rtol=0)
            assert not x[row, n:].any()


@settings(max_examples=25, deadline=None)
@given(lengths=lengths, seed=seeds)
def test_an_absent_modality_is_missing(model, lengths, seed):
    convs = conversations(lengths, seed, observed=.5)
    batch = collate(convs, LABELS)
    noisy = copy.copy(batch)
    noisy.features = {m: torch.where(batch.present[m][..., None], x, 1e6) for m, x in batch.features.items()}
    out, told = model(batch), model(noisy)
    assert torch.equal(out.logits, told.logits)
    assert torch.equal(model.loss(out, batch).total, model.loss(told, noisy).total)
    for e, m in enumerate(WIDTHS): assert not out.gate[..., e][~batch.present[m]].any()
    assert (out.gate[..., 2][batch.mask] > 0).all()
    torch.testing.assert_close(out.gate.sum(-1), batch.mask.double(), atol=1e-12, rtol=0)

    deaf, without = copy.copy(batch), collate(convs, LABELS, ["text"])
    deaf.present = {**batch.present, "speech": torch.zeros_like(batch.mask)}
    assert torch.equal(model(deaf).logits, model(without).logits)
    assert model.loss(model(without), without).total.isfinite()


def test_absent_embeddings_get_no_gradient(model):
    batch = collate(conversations([5, 3], 1, observed=.5), LABELS)
    batch.features = {m: x.double().requires_grad_() for m, x in batch.features.items()}
    model.loss(model(batch), batch).total.backward()
    for m, x in batch.features.items():
        assert not x.grad[~batch.present[m]].any()
        assert (x.grad[batch.present[m]].abs().sum(-1) > 0).all()


@settings(max_examples=10, deadline=None)
@given(lengths=lengths, seed=seeds)
def test_speakers_are_not_looked_at(model, lengths, seed):
    batch = collate(conversations(lengths, seed), LABELS)
    other = copy.copy(batch)
    other.speakers = torch.randint(0, 9, batch.speakers.shape)
    assert torch.equal(model(batch).logits, model(other).logits)


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, seed=seeds, layers=st.integers(1, 3), networks=st.integers(1, 3))
def test_bigru_is_nn_gru_on_every_conversation_alone(lengths, seed, layers, networks):
    torch.manual_seed(seed)
    layout = Layout(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    grus = [nn.GRU(3, 4, layers, bidirectional=True).double() for _ in range(networks)]
    xs = [torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True) for _ in grus]
    wanted, towards = [*xs, *(p for g in grus for p in g.parameters())], torch.randn(networks, sum(lengths), 8, dtype=torch.float64)
    ours = torch.stack(bigru(grus, xs, layout))
    theirs = torch.stack([torch.cat([g(c)[0] for c in x.split(lengths)]) for g, x in zip(grus, xs)])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad((y*towards).sum(), wanted) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_layers_of_the_gru_have_dropout_between_them_in_training_only():
    torch.manual_seed(0)
    layout, x = Layout(torch.ones(2, 6, dtype=torch.bool)), torch.randn(12, 3)
    gru = nn.GRU(3, 4, 2, bidirectional=True, dropout=.5).train()
    assert not torch.equal(bigru([gru], [x], layout)[0], bigru([gru], [x], layout)[0])
    assert torch.equal(bigru([gru.eval()], [x], layout)[0], bigru([gru], [x], layout)[0])


def test_dropout_repeats_with_the_seed_and_scales_the_gradient():
    x = torch.randn(50, 7, requires_grad=True)
    masks = []
    for _ in range(2):
        torch.manual_seed(5)
        masks.append(dropout(x, .3, True))
    assert torch.equal(*masks)
    masks[0].sum().backward()
    torch.testing.assert_close(x.grad*x, masks[0])


def test_two_trainings_of_one_seed_end_with_the_same_bits():
    def trained():
        torch.manual_seed(3)
        model = MisterE(MisterEConfig(WIDTHS, 3, **SMALL, input_dropout=.2)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for seed in range(3):
            batch = collate(conversations([4, 7, 2], seed), LABELS)
            optimizer.zero_grad(); model.loss(model(batch), batch).total.backward(); optimizer.step()
        return model.state_dict()
    a, b = trained(), trained()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_without_labels_costs_nothing(model):
    batch = collate(conversations([3, 2], 0), LABELS)
    batch.labels = torch.full_like(batch.labels, -1)
    loss = model.loss(model(batch), batch)
    assert list(loss.parts) == ["speech", "text", "multimodal", "mixture", "contrastive", "consistency"]
    assert loss.total.item() == 0
    loss.total.backward()


def test_every_parameter_learns(model):
    model.zero_grad()
    batch = collate(conversations([6, 5, 4], 2), LABELS)
    model.loss(model(batch), batch).total.backward()
    for name, p in model.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_bfloat16_stays_near():
    model, batch = small_model().float(), collate(conversations([6, 3, 8], 4), LABELS)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(batch)
        loss = model.loss(near, batch).total
    assert (near.logits - exact.logits).abs().max() < .1
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("modality", ["speech", "text"])
def test_one_modality_alone(modality, tmp_path):
    torch.manual_seed(0)
    model = MisterE(MisterEConfig({modality: WIDTHS[modality]}, 3, hidden=4, layers=1)).eval()
    batch = collate(conversations([4, 2], 0), LABELS)
    out = model(batch)
    assert out.gate is None and out.experts == {} and list(model.loss(out, batch).parts) == [modality]
    model.save_pretrained(tmp_path)
    assert torch.equal(MisterE.from_pretrained(tmp_path)(batch).logits, out.logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cudnn_and_the_time_loop_agree():
    model, batch = small_model().float(), collate(conversations([9, 4, 1, 6], 5), LABELS)
    here = model(batch)
    there = copy.deepcopy(model).cuda()(batch.to("cuda"))
    torch.testing.assert_close(there.logits.cpu(), here.logits, atol=1e-4, rtol=1e-4)
