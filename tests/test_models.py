"""What every registered model promises, by the library's own contract (`erc_moe.testing`). A model
is tested here by being registered; here too stands what only models of this library promise."""
import copy
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erc_moe.conversations import DataError, collate
from erc_moe.models import MODELS as REGISTERED
from erc_moe.testing import Case, check_model, random_conversations
from erc_moe.testing.model import INVARIANTS, LABELS, SEVERAL, WIDTHS
from erc_moe.training.batches import ConversationTensors
from erc_moe.training.loop import update_average

# smaller than the preset "cpu", where it helps
SMALL = dict(
    mister_e=dict(hidden=4, layers=2, fusion_width=6, fusion_layers=2, attention_width=4, heads=2),
    sure=dict(width=8, heads=2), sdt=dict(width=8, heads=2),
    hcam=dict(hidden=4, heads=2), multiemo=dict(width=8, heads=2), mmgat_emo=dict(width=6),
    telme=dict(width=8, heads=2),
    mmgcn=dict(width=6, hidden=5, layers=3),
    cfn_esa=dict(width=8, heads=2, layers=2, shift_width=6),
    cogmen=dict(width=8, heads=2, graph_heads=2, past=2, future=3), df_erc=dict(width=8),
    broad_mamba=dict(width=6, inner=5, states=3, broad=4))
SMALL |= dict(mm_dfn=SMALL["mmgcn"], joyful=SMALL["cogmen"])
SMALL |= {name: SMALL["mister_e"] for name in ("mister_e_monolithic", "mister_e_features")}
# beside the model itself
VARIANTS = dict(mister_e=[dict(gate="mlp", gate_temperature=2., consistency="symmetric"),
                          dict(causal=True),
                          dict(fusion="released", contrast="batch",
                               consistency_reduction="conversations")],
                sure=[dict(routing="learned"), dict(moe=False), dict(reasoning=False),
                      dict(causal=True)],
                bc_lstm=[dict(causal=True)],
                hcam=[dict(staged=False), dict(causal=True)],
                mmgat_emo=[dict(discourse="none"), dict(causal=True)],
                telme=[dict(staged=False), dict(causal=True)],
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
    if not getattr(config, "causal", False): return seen
    return seen & known.flip(1).cummax(1).values.flip(1)


# (B, N) each: which observed features get a gradient; `before_a_label` where nothing is said
TAUGHT = dict(context_free=lambda seen, known, config: seen & known, late_fusion=own_context,
              hcam=lambda seen, known, config: (
                  own_context(seen, known, config) if config.staged else seen),
              cogmen=before_a_label, joyful=before_a_label, broad_mamba=own_context)
# of these some more get one: those that a chain of edges joins to a label
AT_LEAST = dict(mmgcn=own_context, mm_dfn=own_context, cfn_esa=own_context,
                telme=lambda seen, known, config: seen & known)
# their experts are told, and no gate weighs them
NO_GATE = {"sdt", "late_fusion", "hcam", "df_erc", "broad_mamba", "telme"}
# models that other tests register are theirs
MODELS = {n: e for n, e in REGISTERED.items() if e.model.__module__.startswith("erc_moe.")}
CASES = [(name, changes) for name in MODELS for changes in ({}, *VARIANTS.get(name, []))]
# (model, invariant) that does not hold, by intention: stage 2 is no way for stage 3's gradient
EXCEPT = {("hcam", "finite_differences"), ("telme", "finite_differences")}
seeds = st.integers(0, 2**16)
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)   # of a batch's conversations


def case_of(name, changes={}):
    return Case(MODELS[name], SMALL.get(name, {}) | changes)


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]),
)
def case(request): return case_of(*request.param)


@pytest.mark.parametrize("invariant", [n for n in INVARIANTS if n in SEVERAL])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_invariant_of_any_batch(case, invariant, seed): INVARIANTS[invariant](case, seed)


@pytest.mark.parametrize("invariant", [n for n in INVARIANTS if n not in SEVERAL])
def test_invariant(case, invariant):
    if (case.entry.name, invariant) in EXCEPT and getattr(case.model.config, "staged", True):
        with pytest.raises(AssertionError): INVARIANTS[invariant](case, 1)
    else: INVARIANTS[invariant](case, 1)


def test_the_contract_names_what_is_broken(monkeypatch):
    model = MODELS["context_free"].model
    monkeypatch.setattr(model, "drop", lambda self, x, p: x + float(len(x)))
    with pytest.raises(AssertionError) as told: check_model(model, dict(hidden=4), seeds=2)
    assert "ContextFree breaks" in str(told.value) and "- company: logits of a" in str(told.value)


def test_every_model_of_context_has_a_causal_form():
    has = {n for n, e in MODELS.items() if "causal" in {f.name for f in fields(e.config)}}
    assert {*MODELS} - has == {"context_free"}


class NoWaiting(TorchDispatchMode):
    """Refuses what would make a GPU's queue run empty. The device "meta" has shapes and no numbers:
    whoever asks it for one (`item`, `nonzero`, `tolist`, a mask as an index) fails by itself."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        kinds = lambda of: {
            x.device.type for x in tree_leaves(of) if isinstance(x, torch.Tensor) and x.ndim}
        assert len(kinds((args, kwargs))) < 2, f"{func} reads from two devices"
        assert kinds((args, kwargs)) >= kinds(out) or kwargs.get("non_blocking") or (
            "cpu" not in kinds((args, kwargs))), f"{func} waits for its copy"
        return out


def one_step(case, device):
    weights = "class_weights" in {f.name for f in fields(case.entry.config)}
    model = case.make(**({"class_weights": [1., 2., 3.]} if weights else {})).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.9))
    data = ConversationTensors(random_conversations([5, 3, 8, 1]), LABELS, case.widths, device)
    def step():
        batch = data.batch(torch.tensor([0, 2, 1, 3]))
        model.loss(model(batch), batch).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step(); optimizer.zero_grad()
        update_average(average, model)
    return step


def test_a_training_step_never_waits_for_a_gpu(case, monkeypatch):
    # both know no "meta"
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    step = one_step(case, "meta")
    with NoWaiting(): step(); step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_training_step_never_waits_for_this_gpu(case):
    step = one_step(case, "cuda")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try: step()
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["mister_e", "sure", "bc_lstm", "sdt", "late_fusion"])
def test_the_usual_form_reads_the_future(name):
    batch, model = collate(random_conversations([6], 1, 1.), LABELS), case_of(name).make().eval()
    before = model(batch).logits[0, 2].clone()
    for x in batch.features.values(): x[0, 3:] += 3
    assert not torch.allclose(model(batch).logits[0, 2], before)


def test_gates_mix_what_experts_say(case):
    batch = case.batch(3, observed=.5)
    out = case.model(batch)
    assert (out.gate is None) == (not out.experts or case.entry.name in NO_GATE)
    if out.gate is None: return
    mixed = torch.einsum("bne,ebnc->bnc", out.gate, torch.stack([*out.experts.values()]))
    torch.testing.assert_close(mixed, out.logits, atol=1e-10, rtol=0)


def test_every_observed_feature_teaches(case):
    batch, model = collate(random_conversations([5, 3], 1, .5), LABELS), case.model
    batch.features = {m: x.double().requires_grad_() for m, x in batch.features.items()}
    model.loss(model(batch), batch).total.backward()
    for m in model.config.widths:
        grad, known = batch.features[m].grad, (batch.present[m], batch.labels >= 0, model.config)
        may = TAUGHT.get(model.config.model, before_a_label)(*known)
        must = AT_LEAST.get(model.config.model, lambda *_: may)(*known)
        assert not grad[~may].any()
        assert (grad[must].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_one_modality_alone_has_no_experts(name, tmp_path):
    for m in (case := case_of(name)).widths:
        model = case.make({m: WIDTHS[m]}).eval()
        batch = collate(random_conversations([4, 2]), LABELS)
        out = model(batch)
        assert out.gate is None and out.experts == {}
        model.save_pretrained(tmp_path/m)
        assert torch.equal(MODELS[name].load(tmp_path/m)(batch).logits, out.logits)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_other_models_are_refused(name, tmp_path):
    case_of(name).make().save_pretrained(tmp_path)
    for other in {"mister_e", "sure"} - {name}:
        with pytest.raises(DataError, match=f"a {name} checkpoint"): MODELS[other].load(tmp_path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [
    dict(input_dropout=1.), dict(widths={"text": 0}), dict(classes=0), dict(input_dropout=-.1),
    dict(heads=0), dict(hidden=-1), dict(width=0), dict(temperature=float("nan")),
], ids=str)
def test_what_cannot_be_is_refused_by_name(name, changes):
    config = vars(MODELS[name].model_config("cpu", "own", {"text": 4}, LABELS))
    field, = changes
    if field not in config: pytest.skip("it has no such field")
    with pytest.raises(DataError) as told: MODELS[name].config(**config | changes)
    assert ("'text'" if field == "widths" else field) in str(told.value)


@pytest.mark.parametrize("name", ["mister_e", "sure", "sdt"])
def test_heads_that_do_not_divide_are_refused_by_name(name):
    with pytest.raises(DataError, match="It must be a multiple of heads, which is 7"):
        MODELS[name].model_config("cpu", "own", {"text": 4}, LABELS, heads=7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree(case):
    model = copy.deepcopy(case.model).float()
    batch = collate(random_conversations([9, 4, 1, 6], 5), LABELS)
    here, there = model(batch), copy.deepcopy(model).cuda()(batch.to("cuda"))
    torch.testing.assert_close(there.logits.cpu(), here.logits, atol=1e-4, rtol=1e-4)
