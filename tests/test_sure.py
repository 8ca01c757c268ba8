"What SURE promises beyond what every model does (test_models.py)."
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.conversations import MODALITIES, DataError, collate
from erc_moe.ragged import Layout
from erc_moe.sure import Sure, SureConfig
from erc_moe.sure.experts import GaussianExperts
from erc_moe.sure.reasoning import IterativeReasoning, reason
from erc_moe.sure.transformer import TransformerGate, positions
from erc_moe.testing.model import LABELS, WIDTHS, random_conversations
from test_models import lengths, seeds

SMALL = dict(width=8, heads=2)
SUBSETS = [[m for i, m in enumerate(MODALITIES) if bits >> i & 1] for bits in range(1, 8)]


def small_model(seed=0, modalities=MODALITIES, **changes):
    torch.manual_seed(seed)
    model = (
        Sure(SureConfig({m: WIDTHS[m] for m in modalities}, 3, labels=LABELS, **SMALL | changes))
        .double()
        .eval())
    nn.init.normal_(model.transformer.speaker)
    return model


@pytest.fixture(scope="module", params=["whole", "learned", "no moe", "no reasoning"])
def model(request):
    return small_model(
        **{
            "whole": {}, "learned": dict(routing="learned"), "no moe": dict(moe=False),
            "no reasoning": dict(reasoning=False)}[request.param])


def longer(batch, by):
    "The same batch with `by` more columns of padding, filled with numbers that must not be read."
    more = copy.copy(batch)
    wide = lambda x, value: torch.cat(
        [x, torch.full_like(x[:, :1], value).repeat_interleave(by, 1)], 1)
    more.features = {m: wide(x, 7.) for m, x in batch.features.items()}
    more.present = {m: wide(x, True) for m, x in batch.present.items()}
    more.mask, more.labels, more.speakers = (
        wide(batch.mask, False), wide(batch.labels, -1), wide(batch.speakers, 1))
    return more


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, seed=seeds, by=st.integers(0, 3))
def test_attention_stays_in_its_conversation(model, lengths, seed, by):
    convs = random_conversations(lengths, seed)
    together, again = model(collate(convs, LABELS)), model(longer(collate(convs[::-1], LABELS), by))
    for x, y in zip(again.attention.values(), together.attention.values(), strict=True):
        for row, c in enumerate(convs[::-1]):
            n = len(c)
            torch.testing.assert_close(
                x[:, row, :n, :n], y[:, len(convs) - 1 - row, :n, :n], atol=1e-10, rtol=0)
            assert not x[:, row, n:].any() and not x[:, row, :, n:].any()


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, seed=seeds)
def test_three_experts_are_chosen_where_a_modality_was_observed(model, lengths, seed):
    batch = collate(random_conversations(lengths, seed, observed=.5), LABELS)
    for m, weights in model(batch).routing.items():
        assert torch.equal((weights > 0).sum(-1), 3*batch.present[m])
        assert (weights.sum(-1) < 1 + 1e-9).all()


@settings(max_examples=20, deadline=None)
@given(lengths=lengths, seed=seeds, data=st.data())
def test_an_utterance_without_anything_tells_the_others_nothing(model, lengths, seed, data):
    batch = collate(random_conversations(lengths, seed), LABELS)
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


def test_a_batch_without_labels_leaves_the_terms_of_the_experts(model):
    batch = collate(random_conversations([3, 2], 0), LABELS)
    batch.labels = torch.full_like(batch.labels, -1)
    loss = model.loss(model(batch), batch)
    assert list(loss.parts) == [
        "classification",
        *(("divergence", "balance") if model.config.moe else ())]
    assert loss.parts["classification"].item() == 0 and loss.total.isfinite()
    loss.total.backward()


def test_training_samples_and_evaluation_does_not():
    model, batch = small_model(dropout=0.), collate(random_conversations([6, 3], 4), LABELS)
    assert torch.equal(model(batch).logits, model(batch).logits)
    model.train()
    assert not torch.equal(model(batch).logits, model(batch).logits)


def test_class_weights_are_cross_entropy_s():
    model, batch = (
        small_model(class_weights=[0.5, 1.0, 3.0]),
        collate(random_conversations([6, 5, 4], 2), LABELS))
    out, labels = model(batch), batch.labels[batch.mask]
    theirs = nn.functional.cross_entropy(
        out.logits[batch.mask], labels, torch.tensor([0.5, 1.0, 3.0]).double(), ignore_index=-1,
        reduction="sum")
    torch.testing.assert_close(
        model.loss(out, batch).parts["classification"], theirs / (labels >= 0).sum())


def test_extreme_features_stay_finite():
    net = GaussianExperts(4).train()
    z, routed = net(1e4*torch.randn(50, 4))
    (z.mean() + routed.divergence.mean() + routed.balance).backward()
    assert z.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("modalities", SUBSETS, ids="+".join)
def test_any_subset_of_modalities(modalities, tmp_path):
    model = small_model(modalities=modalities)
    batch = collate(random_conversations([4, 2], 0), LABELS)
    S, out = len(modalities), model(batch)
    assert len(model.transformer.out_weight) == S*S and model.head.in_features == 8*S
    assert list(out.routing) == modalities and out.logits.isfinite().all()
    alone = copy.copy(batch)
    alone.features = {m: batch.features[m] for m in modalities}
    assert torch.equal(model(alone).logits, out.logits)
    model.float().save_pretrained(tmp_path)
    assert torch.equal(
        Sure.from_pretrained(tmp_path, labels=LABELS)(batch).logits, model(batch).logits)


@pytest.mark.parametrize(
    "problem, settings",
    [
        ("no modality 'taste'", dict(widths={"taste": 3})),
        ("no modality was given", dict(widths={})),
        ("cannot choose 5 of 4", dict(chosen=5)),
        ("chosen is 0", dict(chosen=0)),
        ("routing is 'lucky'", dict(routing="lucky")),
        ("width is 8. It must be a multiple of heads, which is 3", dict(heads=3)),
        ("steps is 0", dict(steps=0)),
        ("2 class weights for 3 classes", dict(class_weights=[1.0, 1.0])),
    ],
)
def test_settings_that_cannot_be(problem, settings):
    with pytest.raises(DataError, match=problem):
        SureConfig(**dict(widths=WIDTHS, classes=3, **SMALL) | settings)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_intra_modal_encoder_is_pytorch_s(heads):
    torch.manual_seed(heads)
    gate = TransformerGate(1, 8, heads).double().eval()
    theirs = nn.TransformerEncoderLayer(8, heads, 8, dropout=0., batch_first=True).double().eval()
    state = {
        "self_attn.in_proj_weight": gate.qkv_weight[0].T,
        "self_attn.in_proj_bias": gate.qkv_bias[0, 0]}
    for name, ours in (("self_attn.out_proj", "out"), ("linear1", "inner"), ("linear2", "outer")):
        state |= {
            f"{name}.weight": getattr(gate, f"{ours}_weight")[0].T,
            f"{name}.bias": getattr(gate, f"{ours}_bias")[0, 0]}
    for i in range(2):
        state |= {
            f"norm{i + 1}.weight": gate.norm_weight[i, 0, 0],
            f"norm{i + 1}.bias": gate.norm_bias[i, 0, 0]}
    theirs.load_state_dict(state)
    nn.init.zeros_(gate.gate_weight); nn.init.zeros_(gate.fuse_bias)
    gate.fuse_weight.data = 2*torch.eye(8, dtype=torch.float64)[None]  # sigmoid(0) = 1/2, twice
    layout, x = (
        Layout(torch.tensor([[True] * 5, [True] * 2 + [False] * 3])),
        torch.randn(1, 7, 8, dtype=torch.float64))
    placed = layout.padded(x[0] + positions(layout.position, 8))
    expected = layout.flat(theirs(placed, src_key_padding_mask=~layout.mask))
    ours = gate(x, layout.mask[None], torch.zeros(7, dtype=torch.int64), layout)[0]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_every_encoder_asks_in_one_modality_and_is_answered_by_another():
    torch.manual_seed(0)
    gate, layout = (
        TransformerGate(3, 8, 2).double(),
        Layout(torch.tensor([[True] * 5, [True] * 2 + [False] * 3])))
    seen, x = layout.mask & (torch.rand(3, 2, 5) < .8), torch.randn(3, 7, 8, dtype=torch.float64)
    seen[:, :, 0] = True
    heard = gate.attend(x, seen, layout)
    for m in range(3):
        for n in range(3):
            theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
            weight, bias = gate.qkv_weight.view(3, 8, 3, 3, 8), gate.qkv_bias.view(3, 3, 3, 8)
            theirs.in_proj_weight.data = torch.cat(
                [weight[m, :, 0, n].T, weight[n, :, 1, m].T, weight[n, :, 2, m].T]
            ).data
            theirs.in_proj_bias.data = torch.cat([bias[m, 0, n], bias[n, 1, m], bias[n, 2, m]]).data
            nn.init.eye_(theirs.out_proj.weight)
            q, kv = layout.padded(x[m]), layout.padded(x[n])
            expected = layout.flat(theirs(q, kv, kv, key_padding_mask=~seen[n])[0])
            torch.testing.assert_close(heard[3*m + n], expected, atol=1e-12, rtol=0)
