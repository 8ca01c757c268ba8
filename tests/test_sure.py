"What SURE promises for every batch, whatever its shape."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.conversations import Conversation, DataError, Utterance, collate
from erc_moe.mister_e import MisterE, MisterEConfig
from erc_moe.ragged import Layout
from erc_moe.recurrence import lstm
from erc_moe.sure import Sure, SureConfig
from erc_moe.sure.experts import GaussianExperts
from erc_moe.sure.model import MODALITIES
from erc_moe.sure.reasoning import IterativeReasoning, reason
from erc_moe.sure.transformer import TransformerGate, positions

LABELS, WIDTHS = ["neutral", "joy", "anger"], {"text": 4, "speech": 5, "visual": 3}
SMALL = dict(width=8, heads=2)
SUBSETS = [[m for i, m in enumerate(MODALITIES) if bits >> i & 1] for bits in range(1, 8)]
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
seeds = st.integers(0, 2**16)


def conversations(lengths, seed, observed=.8):
    rng, out = np.random.default_rng(seed), []
    for b, n in enumerate(lengths):
        labels = rng.choice([*LABELS, None], n)
        c = Conversation(f"c{b}", [Utterance(f"c{b}_{i}", f"s{rng.integers(4)}", "", labels[i]) for i in range(n)])
        for m, width in WIDTHS.items(): c = c.with_features(m, rng.normal(size=(n, width)), rng.random(n) < observed)
        out.append(c)
    return out


def small_model(seed=0, modalities=MODALITIES, **changes):
    torch.manual_seed(seed)
    model = Sure(SureConfig({m: WIDTHS[m] for m in modalities}, 3, labels=LABELS, **SMALL | changes)).double().eval()
    nn.init.normal_(model.transformer.speaker)
    return model


@pytest.fixture(scope="module", params=["whole", "learned", "no moe", "no reasoning"])
def model(request):
    return small_model(**{"whole": {}, "learned": dict(routing="learned"), "no moe": dict(moe=False), "no reasoning": dict(reasoning=False)}[request.param])


def longer(batch, by):
    "The same batch with `by` more columns of padding, filled with numbers that must not be read."
    more = copy.copy(batch)
    wide = lambda x, value: torch.cat([x, torch.full_like(x[:, :1], value).repeat_interleave(by, 1)], 1)
    more.features = {m: wide(x, 7.) for m, x in batch.features.items()}
    more.present = {m: wide(x, True) for m, x in batch.present.items()}
    more.mask, more.labels, more.speakers = wide(batch.mask, False), wide(batch.labels, -1), wide(batch.speakers, 1)
    return more


@settings(max_examples=20, deadline=None)
@given(lengths=lengths, seed=seeds, data=st.data())
def test_company_order_and_padding_change_nothing(model, lengths, seed, data):
    convs = conversations(lengths, seed)
    together = model(collate(convs, LABELS))
    order = data.draw(st.permutations(range(len(convs))))[:data.draw(st.integers(1, len(convs)))]
    again = model(longer(collate([convs[b] for b in order], LABELS), data.draw(st.integers(0, 3))))
    told = lambda out: [out.logits, *out.routing.values(), *out.uncertainty.values()]
    for row, b in enumerate(order):
        n = len(convs[b])
        for x, y in zip(told(again), told(together)):
            torch.testing.assert_close(x[row, :n], y[b, :n], atol=1e-10, rtol=0)
            assert not x[row, n:].any()
        for x, y in zip(again.attention.values(), together.attention.values()):
            torch.testing.assert_close(x[:, row, :n, :n], y[:, b, :n, :n], atol=1e-10, rtol=0)
            assert not x[:, row, n:].any() and not x[:, row, :, n:].any()


@settings(max_examples=20, deadline=None)
@given(lengths=lengths, seed=seeds)
def test_an_absent_modality_is_missing(model, lengths, seed):
    batch = collate(conversations(lengths, seed, observed=.5), LABELS)
    noisy = copy.copy(batch)
    noisy.features = {m: torch.where(batch.present[m][..., None], x, 1e6) for m, x in batch.features.items()}
    out, told = model(batch), model(noisy)
    assert torch.equal(out.logits, told.logits)
    assert torch.equal(model.loss(out, batch).total, model.loss(told, noisy).total)
    for m in out.routing:
        assert not out.routing[m][~batch.present[m]].any()
        assert ((out.routing[m] > 0).sum(-1) == 3*batch.present[m]).all()
        assert (out.routing[m].sum(-1) < 1 + 1e-9).all()

    blind, without = copy.copy(batch), copy.copy(batch)
    blind.present = {**batch.present, "visual": torch.zeros_like(batch.mask)}
    without.features = {m: x for m, x in batch.features.items() if m != "visual"}
    assert torch.equal(model(blind).logits, model(without).logits)
    assert model.loss(model(without), without).total.isfinite()


@settings(max_examples=20, deadline=None)
@given(lengths=lengths, seed=seeds, data=st.data())
def test_an_utterance_without_anything_tells_the_others_nothing(model, lengths, seed, data):
    batch = collate(conversations(lengths, seed), LABELS)
    b = data.draw(st.integers(0, len(lengths) - 1)); i = data.draw(st.integers(0, lengths[b] - 1))
    for present in batch.present.values(): present[b, i] = False
    other = copy.copy(batch)
    other.features = {m: x.clone() for m, x in batch.features.items()}
    for x in other.features.values(): x[b, i] = 1e3
    other.speakers = batch.speakers.clone(); other.speakers[b, i] += 1
    told, again = model(batch).logits, model(other).logits
    assert told.isfinite().all()
    elsewhere = batch.mask.clone(); elsewhere[b, i] = False
    assert torch.equal(told[elsewhere], again[elsewhere])
    if batch.speakers[b, i] < 2: assert not torch.equal(told[b, i], again[b, i])


def test_absent_features_get_no_gradient(model):
    batch = collate(conversations([5, 3], 1, observed=.5), LABELS)
    batch.features = {m: x.double().requires_grad_() for m, x in batch.features.items()}
    model.loss(model(batch), batch).total.backward()
    for m, x in batch.features.items():
        assert not x.grad[~batch.present[m]].any()
        assert (x.grad[batch.present[m]].abs().sum(-1) > 0).all()


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, seed=seeds, networks=st.integers(1, 3))
def test_lstm_is_nn_lstm_on_every_conversation_alone(lengths, seed, networks):
    torch.manual_seed(seed)
    layout = Layout(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    nets = [nn.LSTM(3, 4).double() for _ in range(networks)]
    xs = [torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True) for _ in nets]
    wanted, towards = [*xs, *(p for n in nets for p in n.parameters())], torch.randn(networks, sum(lengths), 4, dtype=torch.float64)
    ours = torch.stack(lstm(nets, xs, layout))
    theirs = torch.stack([torch.cat([n(c)[0] for c in x.split(lengths)]) for n, x in zip(nets, xs)])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad((y*towards).sum(), wanted) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, seed=seeds, share=st.sampled_from([.3, .7, 1.]))
def test_modalities_reason_together_as_they_do_alone(lengths, seed, share):
    torch.manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    nets = [IterativeReasoning(4).double() for _ in range(3)]
    layouts = [Layout(mask & (torch.rand(mask.shape) < share)) for _ in nets]
    xs = [torch.randn(len(l.index), 4, dtype=torch.float64) for l in layouts]
    for net, x, layout, cue, attended in zip(nets, xs, layouts, *reason(nets, xs, layouts)):
        (alone,), (maps,) = reason([net], [x], [layout])
        torch.testing.assert_close(cue, alone, atol=1e-12, rtol=0)
        torch.testing.assert_close(attended, maps, atol=1e-12, rtol=0)


def test_two_trainings_of_one_seed_end_with_the_same_bits():
    def trained():
        torch.manual_seed(3)
        model = Sure(SureConfig(WIDTHS, 3, **SMALL, input_dropout=.2)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for seed in range(3):
            batch = collate(conversations([4, 7, 2], seed), LABELS)
            optimizer.zero_grad(); model.loss(model(batch), batch).total.backward(); optimizer.step()
        return model.state_dict()
    a, b = trained(), trained()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_without_labels_leaves_the_terms_of_the_experts(model):
    batch = collate(conversations([3, 2], 0), LABELS)
    batch.labels = torch.full_like(batch.labels, -1)
    loss = model.loss(model(batch), batch)
    assert list(loss.parts) == ["classification", *(("divergence", "balance") if model.config.moe else ())]
    assert loss.parts["classification"].item() == 0 and loss.total.isfinite()
    loss.total.backward()


def test_every_parameter_learns(model):
    model.zero_grad()
    batch = collate(conversations([6, 5, 4], 2), LABELS)
    model.loss(model(batch), batch).total.backward()
    for name, p in model.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_training_samples_and_evaluation_does_not():
    model, batch = small_model(dropout=0.), collate(conversations([6, 3], 4), LABELS)
    assert torch.equal(model(batch).logits, model(batch).logits)
    model.train()
    assert not torch.equal(model(batch).logits, model(batch).logits)


def test_class_weights_are_cross_entropy_s():
    model, batch = small_model(class_weights=[.5, 1., 3.]), collate(conversations([6, 5, 4], 2), LABELS)
    out, labels = model(batch), batch.labels[batch.mask]
    theirs = nn.functional.cross_entropy(out.logits[batch.mask], labels, torch.tensor([.5, 1., 3.]).double(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(model.loss(out, batch).parts["classification"], theirs/(labels >= 0).sum())


def test_extreme_features_stay_finite():
    net = GaussianExperts(4).train()
    z, routed = net(1e4*torch.randn(50, 4))
    (z.mean() + routed.divergence.mean() + routed.balance).backward()
    assert z.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())


def test_bfloat16_stays_near():
    model, batch = small_model().float(), collate(conversations([6, 3, 8], 4), LABELS)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(batch)
        loss = model.loss(near, batch).total
    assert (near.logits - exact.logits).abs().max() < .2
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("modalities", SUBSETS, ids="+".join)
def test_any_subset_of_modalities(modalities, tmp_path):
    model, batch = small_model(modalities=modalities), collate(conversations([4, 2], 0), LABELS)
    S, out = len(modalities), model(batch)
    assert len(model.transformer.out_weight) == S*S and model.head.in_features == 8*S
    assert list(out.routing) == modalities and out.logits.isfinite().all()
    alone = copy.copy(batch)
    alone.features = {m: batch.features[m] for m in modalities}
    assert torch.equal(model(alone).logits, out.logits)
    model.float().save_pretrained(tmp_path)
    assert torch.equal(Sure.from_pretrained(tmp_path, labels=LABELS)(batch).logits, model(batch).logits)


@pytest.mark.parametrize("problem, settings", [
    ("no modality 'taste'", dict(widths={"taste": 3})), ("no modality was given", dict(widths={})), ("cannot choose 5 of 4", dict(chosen=5)),
    ("cannot choose 0 of 4", dict(chosen=0)), ("routing 'lucky'", dict(routing="lucky")), ("3 heads cannot share a width of 8", dict(heads=3)),
    ("0 steps", dict(steps=0)), ("2 class weights for 3 classes", dict(class_weights=[1., 1.]))])
def test_settings_that_cannot_be(problem, settings):
    with pytest.raises(DataError, match=problem): SureConfig(**dict(widths=WIDTHS, classes=3, **SMALL) | settings)


def test_checkpoints_of_others_are_refused(tmp_path):
    MisterE(MisterEConfig({"text": 4}, 3, hidden=4, layers=1)).save_pretrained(tmp_path/"other")
    with pytest.raises(DataError, match="a mister_e checkpoint"): Sure.from_pretrained(tmp_path/"other")
    small_model().float().save_pretrained(tmp_path/"own")
    with pytest.raises(DataError, match="a sure checkpoint"): MisterE.from_pretrained(tmp_path/"own")
    with pytest.raises(DataError, match="trained for the labels neutral, joy, anger"): Sure.from_pretrained(tmp_path/"own", labels=["joy"])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_intra_modal_encoder_is_pytorch_s(heads):
    torch.manual_seed(heads)
    gate = TransformerGate(1, 8, heads).double().eval()
    theirs = nn.TransformerEncoderLayer(8, heads, 8, dropout=0., batch_first=True).double().eval()
    state = {"self_attn.in_proj_weight": gate.qkv_weight[0].T, "self_attn.in_proj_bias": gate.qkv_bias[0, 0]}
    for name, ours in (("self_attn.out_proj", "out"), ("linear1", "inner"), ("linear2", "outer")):
        state |= {f"{name}.weight": getattr(gate, f"{ours}_weight")[0].T, f"{name}.bias": getattr(gate, f"{ours}_bias")[0, 0]}
    for i in range(2): state |= {f"norm{i + 1}.weight": gate.norm_weight[i, 0, 0], f"norm{i + 1}.bias": gate.norm_bias[i, 0, 0]}
    theirs.load_state_dict(state)
    nn.init.zeros_(gate.gate_weight); nn.init.zeros_(gate.fuse_bias)
    gate.fuse_weight.data = 2*torch.eye(8, dtype=torch.float64)[None]              # sigmoid(0) = 1/2, twice
    layout, x = Layout(torch.tensor([[True]*5, [True]*2 + [False]*3])), torch.randn(1, 7, 8, dtype=torch.float64)
    placed = layout.padded(x[0] + positions(layout.position, 8))
    expected = layout.flat(theirs(placed, src_key_padding_mask=~layout.mask))
    ours = gate(x, layout.mask[None], torch.zeros(7, dtype=torch.int64), layout)[0]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_every_encoder_asks_in_one_modality_and_is_answered_by_another():
    torch.manual_seed(0)
    gate, layout = TransformerGate(3, 8, 2).double(), Layout(torch.tensor([[True]*5, [True]*2 + [False]*3]))
    seen, x = layout.mask & (torch.rand(3, 2, 5) < .8), torch.randn(3, 7, 8, dtype=torch.float64)
    seen[:, :, 0] = True
    heard = gate.attend(x, seen, layout)
    for m in range(3):
        for n in range(3):
            theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
            weight, bias = gate.qkv_weight.view(3, 8, 3, 3, 8), gate.qkv_bias.view(3, 3, 3, 8)
            theirs.in_proj_weight.data = torch.cat([weight[m, :, 0, n].T, weight[n, :, 1, m].T, weight[n, :, 2, m].T]).data
            theirs.in_proj_bias.data = torch.cat([bias[m, 0, n], bias[n, 1, m], bias[n, 2, m]]).data
            nn.init.eye_(theirs.out_proj.weight)
            q, kv = layout.padded(x[m]), layout.padded(x[n])
            expected = layout.flat(theirs(q, kv, kv, key_padding_mask=~seen[n])[0])
            torch.testing.assert_close(heard[3*m + n], expected, atol=1e-12, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree():
    model, batch = small_model().float(), collate(conversations([9, 4, 1, 6], 5), LABELS)
    here, there = model(batch), copy.deepcopy(model).cuda()(batch.to("cuda"))
    torch.testing.assert_close(there.logits.cpu(), here.logits, atol=1e-4, rtol=1e-4)
