"Losses: invariances that hold for any batch, and agreement with independent implementations."
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from erc_moe.losses import LossParts, consistency_loss, contrastive_loss, focal_loss
from erc_moe.losses.contrastive import BLOCK_ROWS, _blocks

settings.register_profile("losses", deadline=None, max_examples=40)
settings.load_profile("losses")
seeds, reductions = st.integers(0, 2**31), st.sampled_from(["sum", "mean"])


def draw(seed, most=14, classes=5, width=4):
    """A random flat batch: logits, labels (some -1), two views, and the conversation of each
    utterance."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most, (int(torch.randint(1, 5, (), generator=g)),), generator=g)
    conversation = torch.arange(len(lengths)).repeat_interleave(lengths)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    M = len(conversation)
    return (
        normal(3, M, classes) * 3, torch.randint(-1, classes, (M,), generator=g),
        normal(2, M, width), conversation, g)


def every_loss(logits, labels, views, conversation, reduction="sum", present=None):
    return torch.stack([
        focal_loss(logits[0], labels, 3., reduction),
        contrastive_loss(*views, labels, conversation, .5, reduction, present),
        consistency_loss(logits[0], list(logits[1:]), labels >= 0, "directed", reduction),
        consistency_loss(logits[0], list(logits[1:]), labels >= 0, "symmetric", reduction)])


@given(seeds, reductions)
def test_order_of_utterances_does_not_matter(seed, reduction):
    logits, labels, views, conversation, g = draw(seed)
    order = torch.randperm(len(labels), generator=g)
    torch.testing.assert_close(
        every_loss(
            logits[:, order], labels[order], views[:, order], conversation[order], reduction),
        every_loss(logits, labels, views, conversation, reduction))


@given(seeds, reductions)
def test_names_of_classes_do_not_matter(seed, reduction):
    logits, labels, views, conversation, g = draw(seed)
    new_name = torch.randperm(5, generator=g)  # old class -> new class
    renamed = torch.where(labels >= 0, new_name[labels.clamp_min(0)], -1)
    torch.testing.assert_close(
        every_loss(logits[..., new_name.argsort()], renamed, views, conversation, reduction),
        every_loss(logits, labels, views, conversation, reduction))


@given(seeds)
def test_batches_add_up(seed):
    logits, labels, views, conversation, _ = draw(seed)
    alone = sum(every_loss(logits[:, c], labels[c], views[:, c], conversation[c] * 0)
                for c in (conversation == i for i in range(int(conversation.max()) + 1)))
    torch.testing.assert_close(every_loss(logits, labels, views, conversation), alone)


@given(seeds, reductions)
def test_unlabelled_utterances_change_nothing_and_learn_nothing(seed, reduction):
    logits, labels, views, conversation, _ = draw(seed)
    logits.requires_grad_(), views.requires_grad_()
    known = labels >= 0
    whole = every_loss(logits, labels, views, conversation, reduction)
    torch.testing.assert_close(
        whole,
        every_loss(
            logits[:, known], labels[known], views[:, known], conversation[known], reduction))
    whole.sum().backward()
    assert whole.isfinite().all() and (whole >= -1e-9).all()
    assert (logits.grad[:, ~known] == 0).all() and (views.grad[:, ~known] == 0).all()
    assert logits.grad.isfinite().all() and views.grad.isfinite().all()


@given(seeds)
def test_mean_is_the_sum_over_what_was_scored(seed):
    batch = draw(seed)[:4]
    # the contrastive loss has two anchors per utterance
    scored = (batch[1] >= 0).sum() * torch.tensor([1, 2, 1, 1])
    torch.testing.assert_close(every_loss(*batch, "mean") * scored, every_loss(*batch, "sum"))


@given(seeds, st.floats(0, 6))
def test_focal_loss_never_exceeds_cross_entropy_and_falls_with_gamma(seed, gamma):
    logits, labels, *_ = draw(seed)
    entropy = F.cross_entropy(logits[0], labels, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(focal_loss(logits[0], labels, 0), entropy)
    assert (
        focal_loss(logits[0], labels, gamma + 0.5)
        <= focal_loss(logits[0], labels, gamma)
        <= entropy + 1e-9)


@given(seeds)
def test_focal_gradient_is_the_closed_form(seed):
    logits, labels, *_ = draw(seed)
    x = logits[0].requires_grad_()
    focal_loss(x, labels, 3.).backward()
    p = x.detach().softmax(-1)                                                       # (M, C)
    y = F.one_hot(labels.clamp_min(0), 5).double()
    q = (p * y).sum(-1, keepdim=True)  # (M, 1) probability of the true class
    slope = (1 - q)**2 * (3 * q * q.log() - (1 - q))  # (M, 1) dFL/dq times q
    torch.testing.assert_close(x.grad, slope * (y - p) * (labels >= 0)[:, None])


def supervised_contrastive(features, labels, temperature):
    """Khosla et al., 2020, in the form of its authors' implementation: (n, views, D) features,
    mean over anchors."""
    z = torch.cat(features.unbind(1))
    mask = torch.eq(labels[:, None], labels[None]).double().repeat(2, 2)
    logits = z @ z.T / temperature
    logits = logits - logits.max(1, keepdim=True)[0].detach()
    off = 1 - torch.eye(len(z), dtype=torch.float64)
    mask = mask * off
    log_prob = logits - (logits.exp() * off).sum(1, keepdim=True).log()
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


@given(seeds, st.sampled_from([.05, .5, 1.]))
def test_contrastive_loss_is_supervised_contrastive_learning(seed, temperature):
    _, labels, views, *_ = draw(seed)
    labels = labels.clamp_min(0)
    torch.testing.assert_close(
        contrastive_loss(*views, labels, labels * 0, temperature, "mean"),
        supervised_contrastive(F.normalize(views, dim=-1).transpose(0, 1), labels, temperature))


@given(seeds)
def test_contrastive_loss_sees_directions_only(seed):
    _, labels, views, conversation, g = draw(seed)
    scale = torch.rand(*views.shape[:2], 1, generator=g, dtype=torch.float64) * 9 + .1
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0]
    loss = contrastive_loss(*views, labels, conversation)
    torch.testing.assert_close(contrastive_loss(*(views * scale), labels, conversation), loss)
    torch.testing.assert_close(contrastive_loss(*(views @ rotation), labels, conversation), loss)
    torch.testing.assert_close(contrastive_loss(*views.flip(0), labels, conversation), loss)


@given(seeds)
def test_unobserved_views_take_no_part(seed):
    _, labels, views, conversation, g = draw(seed)
    present = torch.rand(len(labels), 2, generator=g) < .6
    placeholder = torch.where(present.T[..., None], views, 7.).requires_grad_()
    loss = contrastive_loss(*placeholder, labels, conversation, present=present)
    loss.backward()
    torch.testing.assert_close(
        loss, contrastive_loss(*views, labels, conversation, present=present))
    assert (placeholder.grad[~present.T] == 0).all() and placeholder.grad.isfinite().all()
    nobody = torch.zeros_like(present)
    assert contrastive_loss(*views, labels, conversation, reduction="mean", present=nobody) == 0


@given(st.lists(st.integers(1, 900), max_size=40).map(sorted))
def test_blocks_keep_every_conversation_and_stay_small(sizes):
    runs = _blocks(sizes)
    assert [size for run in runs for size in run] == sizes
    assert all(len(run) <= 1 or len(run) * run[-1] <= BLOCK_ROWS for run in runs)


def test_contrastive_loss_does_not_depend_on_the_blocks(monkeypatch):
    _, labels, views, conversation, _ = draw(3, most=40)
    views.requires_grad_()
    found = []
    for rows, pairs in ((1, 2**22), (16, 2**22), (10_000, 2**22), (1, 1), (64, 100), (10_000, 999)):
        monkeypatch.setattr("erc_moe.losses.contrastive.BLOCK_ROWS", rows)
        monkeypatch.setattr("erc_moe.losses.contrastive.MOST_PAIRS", pairs)
        loss = contrastive_loss(*views, labels, conversation)
        found.append((loss, *torch.autograd.grad(loss, views)))
    for other in found[1:]: torch.testing.assert_close(other, found[0])


def test_contrastive_memory_grows_with_the_turns_not_with_their_pairs():
    "5000 turns have 100 million pairs: 400 MB for each matrix that is kept, and 2 GB in all."
    code = """
import resource, torch
from erc_moe.losses import contrastive_loss
views = torch.randn(2, 5000, 8, requires_grad=True)
labels, one = torch.randint(0, 7, (5000,)), torch.zeros(5000, dtype=torch.long)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
contrastive_loss(*views, labels, one).backward()
print(peak() - before)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(said.stdout) < 1000    # MB


@given(seeds)
def test_consistency_is_kl_divergence(seed):
    logits, *_ = draw(seed)
    fused, speech, text = (torch.distributions.Categorical(logits=x) for x in logits)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(
        consistency_loss(logits[0], [logits[1], logits[2]]),
        (kl(fused, speech) + kl(fused, text)).sum())
    pairs = ((fused, speech), (fused, text), (speech, text))
    torch.testing.assert_close(
        consistency_loss(logits[0], [logits[1], logits[2]], form="symmetric"),
        sum(kl(p, q) + kl(q, p) for p, q in pairs).sum() / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype):
    logits = (
        (torch.tensor([[1, -1, 0], [-1, 1, 0], [0, 0, 0]]) * 1e4).to(dtype).expand(3, 3, 3).clone())
    logits[1] = logits[1].flip(-1)
    logits.requires_grad_()
    views = (
        torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        .mul(1e3)
        .to(dtype)
        .requires_grad_())
    losses = every_loss(logits, torch.tensor([0, 0, 2]), views, torch.zeros(3, dtype=torch.long))
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert (
        focal_loss(logits[0], torch.tensor([0, 0, 2])).dtype
        == consistency_loss(logits[0], [logits[1]]).dtype
        == torch.float32)
    assert logits.grad.isfinite().all() and views.grad.isfinite().all()


def test_autocast_computes_the_losses_in_float32():
    logits, labels, views, conversation, _ = draw(5)
    logits, views = logits.float(), views.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = every_loss(logits, labels, views, conversation)
    torch.testing.assert_close(inside, every_loss(logits, labels, views, conversation))


def test_loss_parts_add_up():
    parts = LossParts({"a": torch.tensor(1., requires_grad=True), "b": torch.tensor(2.5)})
    assert (
        parts.to_dict() == {"a": 1.0, "b": 2.5, "total": 3.5}
        and math.isclose(parts.total.item(), 3.5)
        and parts.total.requires_grad)
