"""What every registered model promises for every batch, whatever its shape. A model is tested
here by being registered."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.conversations import Conversation, DataError, Utterance, collate
from erc_moe.models import MODELS as REGISTERED

LABELS, WIDTHS = ["neutral", "joy", "anger"], {"text": 4, "speech": 5, "visual": 3}
# smaller than the preset "cpu", where it helps
SMALL = dict(
    mister_e=dict(hidden=4, layers=2, fusion_width=6, fusion_layers=2, attention_width=4, heads=2),
    sure=dict(width=8, heads=2), sdt=dict(width=8, heads=2),
    hcam=dict(hidden=4, heads=2), multiemo=dict(width=8, heads=2),
    mmgcn=dict(width=6, hidden=5, layers=3),
    cfn_esa=dict(width=8, heads=2, layers=2, shift_width=6),
    cogmen=dict(width=8, heads=2, graph_heads=2, past=2, future=3), df_erc=dict(width=8),
    broad_mamba=dict(width=6, inner=5, states=3, broad=4))
SMALL |= dict(mm_dfn=SMALL["mmgcn"], joyful=SMALL["cogmen"])
SMALL |= {name: SMALL["mister_e"] for name in ("mister_e_monolithic", "mister_e_features")}
# beside the model itself
VARIANTS = dict(mister_e=[dict(gate="mlp", gate_temperature=2., consistency="symmetric")],
                sure=[dict(routing="learned"), dict(moe=False), dict(reasoning=False)],
                hcam=[dict(staged=False), dict(causal=True)],
                multiemo=[dict(bidirectional=False, text_context=False), dict(causal=True)],
                mmgcn=[dict(causal=True)],
                cfn_esa=[dict(causal=True), dict(shift_weight=0.)], cogmen=[dict(causal=True)],
                df_erc=[dict(causal=True)], broad_mamba=[dict(causal=True)])


def own_context(seen, known, config):
    "A modality's own classifier teaches its own context: before a label only, where it is causal."
    heard = seen & known
    return seen & (
        heard.flip(1).cummax(1).values.flip(1) if getattr(config, "causal", False)
        else heard.any(1, keepdim=True))


def before_a_label(seen, known, config):
    "Every modality teaches every other; before a label only, where the model is causal."
    if not config.causal: return seen
    return seen & known.flip(1).cummax(1).values.flip(1)


# (B, N) each: which observed features get a gradient; in a model with context and a joint loss all
TAUGHT = dict(context_free=lambda seen, known, config: seen & known, late_fusion=own_context,
              hcam=lambda seen, known, config: (
                  own_context(seen, known, config) if config.staged else seen),
              cogmen=before_a_label, joyful=before_a_label, broad_mamba=own_context)
# of these some more get one: those that a chain of edges joins to a label
AT_LEAST = dict(mmgcn=own_context, mm_dfn=own_context, cfn_esa=own_context)
# their experts are told, and no gate weighs them
NO_GATE = {"sdt", "late_fusion", "hcam", "df_erc", "broad_mamba"}
# models that other tests register are theirs
MODELS = {n: e for n, e in REGISTERED.items() if e.model.__module__.startswith("erc_moe.")}
CASES = [(name, changes) for name in MODELS for changes in ({}, *VARIANTS.get(name, []))]
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
seeds = st.integers(0, 2**16)
several = settings(max_examples=15, deadline=None)
each_model = pytest.mark.parametrize("name", MODELS)


def modalities(name):
    "Those that the model takes; it must refuse the others."
    def takes(m):
        try: MODELS[name].model_config("cpu", "sample", {m: 3}, LABELS)
        except ValueError: return False
        return True
    return [m for m in WIDTHS if takes(m)]


def config(name, widths=None, **changes):
    return MODELS[name].model_config(
        "cpu", "sample", widths or {m: WIDTHS[m] for m in modalities(name)}, LABELS,
        **SMALL.get(name, {}) | changes)


def make(name, **changes):
    "A small model in which no parameter is zero: what begins at zero must not hide a mistake."
    torch.manual_seed(0)
    model = MODELS[name].model(config(name, **changes))
    for p in model.parameters():
        if not p.any(): nn.init.normal_(p, std=.1)
    return model.double().eval()


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]),
)
def model(request):
    name, changes = request.param
    return make(name, **changes)


def conversations(lengths, seed, observed=.8):
    rng, out = np.random.default_rng(seed), []
    for b, n in enumerate(lengths):
        labels = rng.choice([*LABELS, None], n)
        c = Conversation(
            f"c{b}",
            [Utterance(f"c{b}_{i}", f"s{rng.integers(4)}", "", labels[i]) for i in range(n)])
        for m, width in WIDTHS.items():
            c = c.with_features(m, rng.normal(size=(n, width)), rng.random(n) < observed)
        out.append(c)
    return out


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


def per_utterance(output):
    """What an output has for every utterance, (B, N, ...) each: the contract's, and what models
    call by these names beside it."""
    told = [
        getattr(output, name, None)
        for name in ("logits", "experts", "gate", "routing", "uncertainty")]
    return [
        x
        for value in told
        if value is not None
        for x in (value.values() if isinstance(value, dict) else [value])]


@several
@given(lengths=lengths, seed=seeds, data=st.data())
def test_company_order_and_padding_change_nothing(model, lengths, seed, data):
    convs = conversations(lengths, seed)
    batch = collate(convs, LABELS)
    together = model(batch)
    order = data.draw(st.permutations(range(len(convs))))[:data.draw(st.integers(1, len(convs)))]
    other = longer(collate([convs[b] for b in order], LABELS), data.draw(st.integers(0, 3)))
    again = model(other)
    for x, y in zip(per_utterance(again), per_utterance(together), strict=True):
        assert not x[~other.mask].any()
        for row, b in enumerate(order):
            torch.testing.assert_close(
                x[row, : len(convs[b])], y[b, : len(convs[b])], atol=1e-10, rtol=0)


@several
@given(lengths=lengths, seed=seeds)
def test_an_absent_modality_is_missing(model, lengths, seed):
    batch = collate(conversations(lengths, seed, observed=.5), LABELS)
    noisy = copy.copy(batch)
    noisy.features = {
        m: torch.where(batch.present[m][..., None], x, 1e6) for m, x in batch.features.items()}
    out, told = model(batch), model(noisy)
    for x, y in zip(per_utterance(out), per_utterance(told)): assert torch.equal(x, y)
    assert torch.equal(model.loss(out, batch).total, model.loss(told, noisy).total)
    for m in model.config.widths:
        absent, without = copy.copy(batch), copy.copy(batch)
        absent.present = {**batch.present, m: torch.zeros_like(batch.mask)}
        without.features = {n: x for n, x in batch.features.items() if n != m}
        told = model(without)
        assert torch.equal(model(absent).logits, told.logits)
        assert model.loss(told, without).total.isfinite()


@several
@given(lengths=lengths, seed=seeds)
def test_gate_weights_sum_to_one(model, lengths, seed):
    batch = collate(conversations(lengths, seed, observed=.5), LABELS)
    out = model(batch)
    assert (out.gate is None) == (not out.experts or model.config.model in NO_GATE)
    if out.gate is None: return
    assert (out.gate >= 0).all()
    torch.testing.assert_close(out.gate.sum(-1), batch.mask.double(), atol=1e-12, rtol=0)
    mixed = torch.einsum("bne,ebnc->bnc", out.gate, torch.stack([*out.experts.values()]))
    torch.testing.assert_close(mixed, out.logits, atol=1e-10, rtol=0)


def test_absent_features_get_no_gradient(model):
    batch = collate(conversations([5, 3], 1, observed=.5), LABELS)
    batch.features = {m: x.double().requires_grad_() for m, x in batch.features.items()}
    model.loss(model(batch), batch).total.backward()
    for m in model.config.widths:
        grad, case = batch.features[m].grad, (batch.present[m], batch.labels >= 0, model.config)
        may = TAUGHT.get(model.config.model, lambda seen, *_: seen)(*case)
        must = AT_LEAST.get(model.config.model, lambda *_: may)(*case)
        assert not grad[~may].any()
        assert (grad[must].abs().sum(-1) > 0).all()


def test_every_parameter_learns(model):
    model.zero_grad()
    batch = collate(conversations([6, 5, 4], 2), LABELS)
    model.loss(model(batch), batch).total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_batch_without_labels_teaches_no_label(model):
    batch = collate(conversations([3, 2], 0), LABELS)
    batch.labels = torch.full_like(batch.labels, -1)
    model.zero_grad()
    out = model(batch)
    out.logits.retain_grad()
    model.loss(out, batch).total.backward()
    assert out.logits.grad is None or not out.logits.grad.any()


@pytest.mark.parametrize("name, changes", CASES)
def test_one_batch_is_learned_by_heart(name, changes):
    torch.manual_seed(1)
    pupil = (
        MODELS[name]
        .model(MODELS[name].model_config(
            "cpu", "sample", {m: WIDTHS[m] for m in modalities(name)}, LABELS, **changes))
        .eval())
    batch = collate(conversations([4, 7, 1, 5], 3), LABELS)
    optimizer = torch.optim.Adam(pupil.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad(); pupil.loss(pupil(batch), batch).total.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.); optimizer.step()
    known = batch.labels >= 0
    assert torch.equal(pupil(batch).logits.argmax(-1)[known], batch.labels[known])


def test_saved_and_loaded_it_says_the_same_bits(model, tmp_path):
    model, batch = copy.deepcopy(model).float(), collate(conversations([4, 2], 0), LABELS)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, labels=LABELS)
    assert again.config == model.config and not again.training
    assert torch.equal(again(batch).logits, model(batch).logits)
    with pytest.raises(DataError, match="trained for the labels neutral, joy, anger"):
        type(model).from_pretrained(tmp_path, labels=["joy"])


@each_model
def test_checkpoints_of_other_models_are_refused(name, tmp_path):
    make(name).float().save_pretrained(tmp_path)
    for other in {"mister_e", "sure"} - {name}:
        with pytest.raises(DataError, match=f"a {name} checkpoint"): MODELS[other].load(tmp_path)


@each_model
def test_two_trainings_of_one_seed_end_with_the_same_bits(name):
    def trained():
        torch.manual_seed(3)
        model = MODELS[name].model(config(name)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for seed in range(3):
            batch = collate(conversations([4, 7, 2], seed), LABELS)
            optimizer.zero_grad()
            model.loss(model(batch), batch).total.backward(); optimizer.step()
        return model.state_dict()
    a, b = trained(), trained()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bfloat16_stays_near(model):
    model, batch = copy.deepcopy(model).float(), collate(conversations([6, 3, 8], 4), LABELS)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(batch)
        loss = model.loss(near, batch).total
    assert (near.logits - exact.logits).abs().max() < .2
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name, modality", [(name, m) for name in MODELS for m in modalities(name)])
def test_one_modality_alone(name, modality, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name].model(config(name, {modality: WIDTHS[modality]})).eval()
    batch = collate(conversations([4, 2], 0), LABELS)
    out = model(batch)
    assert out.gate is None and out.experts == {} and out.logits.shape == (2, 4, 3)
    assert torch.equal(
        model(collate(conversations([4, 2], 0), LABELS, [modality])).logits, out.logits)
    assert model.loss(out, batch).total.isfinite()
    model.save_pretrained(tmp_path)
    assert torch.equal(MODELS[name].load(tmp_path)(batch).logits, out.logits)


@pytest.mark.parametrize(
    "name, preset, corpus",
    [
        (e.name, p, c)
        for e in MODELS.values()
        for p in e.training
        for c in ("iemocap", "meld", "mosi", "emorynlp", "own")
    ],
)
def test_every_preset_can_be_built(name, preset, corpus):
    with torch.device("meta"):
        MODELS[name].model(
            MODELS[name].model_config(preset, corpus, dict.fromkeys(modalities(name), 9), LABELS))
    assert MODELS[name].training_changes(preset, corpus).keys() <= {
        "epochs", "batch_size", "lr", "schedule", "warmup", "ema", "weight_decay", "class_weights"}


@each_model
def test_features_of_another_width_are_refused(name):
    model, batch = make(name), collate(conversations([3], 0), LABELS)
    m = next(iter(model.config.widths))
    batch.features = {**batch.features, m: batch.features[m][..., :-1]}
    with pytest.raises(
        DataError,
        match=f"'{m}' features are {WIDTHS[m] - 1} wide, the model was made for {WIDTHS[m]}",
    ):
        model(batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree(model):
    model, batch = copy.deepcopy(model).float(), collate(conversations([9, 4, 1, 6], 5), LABELS)
    here, there = model(batch), copy.deepcopy(model).cuda()(batch.to("cuda"))
    torch.testing.assert_close(there.logits.cpu(), here.logits, atol=1e-4, rtol=1e-4)
