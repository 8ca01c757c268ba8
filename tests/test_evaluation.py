"""Metrics against scikit-learn and torchmetrics, the bootstrap against a loop, the pictures on
unusual input."""
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report, f1_score
from torchmetrics.functional.classification import (
    multiclass_calibration_error, multiclass_confusion_matrix)

from erc_moe import evaluation as ev
from erc_moe.conversations import EMOTION_COLORS, Conversation, DataError, Utterance

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("evaluation", deadline=None, max_examples=30)
settings.load_profile("evaluation")
seeds = st.integers(0, 2**31)


def draw(seed, classes=5):
    rng = np.random.default_rng(seed)
    owner = np.arange(int(rng.integers(1, 12))).repeat(rng.integers(1, 9))
    labels = rng.integers(-1, classes, len(owner))
    labels[0] = 0
    return 2 * rng.normal(size=(len(owner), classes)), labels, owner, rng


@given(seeds)
def test_metrics_are_those_of_scikit_learn_and_torchmetrics(seed):
    logits, labels, *_ = draw(seed)
    names, scored = list("abcde"), labels >= 0
    metrics = ev.evaluate_logits(torch.tensor(logits), torch.tensor(labels), names)
    report = classification_report(
        labels[scored], logits[scored].argmax(1), labels=range(5), target_names=names,
        output_dict=True, zero_division=0)
    assert metrics.per_class_f1 == pytest.approx({n: report[n]["f1-score"] for n in names})
    assert metrics.support == {n: report[n]["support"] for n in names}
    assert metrics.weighted_f1 == pytest.approx(report["weighted avg"]["f1-score"])
    occurs = [
        n for i, n in enumerate(names) if i in labels[scored] or i in logits[scored].argmax(1)]
    assert metrics.macro_f1 == pytest.approx(np.mean([report[n]["f1-score"] for n in occurs]))
    truth, p = torch.tensor(labels[scored]), torch.tensor(logits[scored]).softmax(-1)
    assert metrics.confusion == multiclass_confusion_matrix(p, truth, 5).tolist()
    bins = ev.calibration_bins(logits, labels)
    filled = bins.count > 0
    assert (bins.edges[:-1][filled] < bins.confidence[filled]).all() and (
        bins.confidence[filled] <= bins.edges[1:][filled]
    ).all()
    assert metrics.ece == pytest.approx(
        multiclass_calibration_error(p, truth, 5, n_bins=15, norm="l1").item(), abs=1e-5)


@given(seeds)
def test_metrics_ignore_order_shift_and_unlabelled_context(seed):
    logits, labels, _, rng = draw(seed)
    metrics = ev.evaluate_logits(logits, labels, list("abcde"))
    order = rng.permutation(len(labels))
    again = ev.evaluate_logits(
        np.concatenate([logits[order] + 3, rng.normal(size=(4, 5))]),
        [*labels[order], -1, -1, -1, -1], list("abcde"))
    assert again.confusion == metrics.confusion and again.ece == pytest.approx(metrics.ece)


def test_errors_of_evaluation():
    with pytest.raises(DataError, match="no utterance is labelled"):
        ev.evaluate_logits(np.zeros((2, 3)), [-1, -1], list("abc"))
    with pytest.raises(DataError, match="do not fit 2 classes"):
        ev.evaluate_logits(np.zeros((2, 3)), [0, 1], list("ab"))
    with pytest.raises(DataError, match="do not fit 3 classes"):
        ev.evaluate_logits(np.zeros((2, 3)), [0, 3], list("abc"))


@given(seeds)
def test_scores_from_counts_are_scores_of_utterances(seed):
    logits, labels, owner, _ = draw(seed)
    predicted, scored = logits.argmax(1), labels >= 0
    counts = ev.conversation_counts(labels, predicted, owner, 5)
    assert counts.sum() == scored.sum()
    assert ev.weighted_f1(counts.sum(0)) == pytest.approx(
        f1_score(labels[scored], predicted[scored], average="weighted"))
    assert ev.accuracy(counts.sum(0)) == pytest.approx((labels == predicted)[scored].mean())


@given(seeds)
def test_bootstrap_is_the_loop_over_the_same_draws(seed):
    logits, labels, owner, _ = draw(seed)
    labels, predicted, B = labels.clip(0), logits.argmax(1), owner.max() + 1
    ours = ev.resampled_scores(
        ev.conversation_counts(labels, predicted, owner, 5), resamples=20, seed=seed)
    for score, picked in zip(ours, np.random.default_rng(seed).integers(B, size=(20, B))):
        rows = np.concatenate([np.flatnonzero(owner == b) for b in picked])
        assert score == pytest.approx(f1_score(labels[rows], predicted[rows], average="weighted"))


@given(seeds)
def test_intervals_of_seeds_and_of_differences(seed):
    rng = np.random.default_rng(seed)
    labels, owner = rng.integers(4, size=120), np.arange(12).repeat(10)
    runs = np.stack([
        ev.conversation_counts(
            labels, np.where(rng.random(120) < 0.6, labels, rng.integers(4, size=120)), owner, 4)
        for _ in range(3)])
    several = ev.bootstrap_interval(runs, resamples=200, seed=1)
    assert several.score == pytest.approx(np.mean([ev.weighted_f1(r.sum(0)) for r in runs]))
    np.testing.assert_allclose(
        ev.resampled_scores(runs, resamples=50),
        np.mean([ev.resampled_scores(r, resamples=50) for r in runs], 0))
    assert [several.low, several.high] == pytest.approx(
        np.quantile(ev.resampled_scores(runs, resamples=200, seed=1), [0.025, 0.975]))
    assert (
        several.low <= several.high
        and ev.bootstrap_interval(runs, resamples=200, seed=1) == several)
    wider = ev.bootstrap_interval(runs, resamples=200, level=.99, seed=1)
    assert wider.low <= several.low and several.high <= wider.high
    difference = ev.paired_difference(runs[:2], runs[1:], resamples=200)
    by_seed = np.subtract(*(ev.weighted_f1(r.sum(1)) for r in (runs[:2], runs[1:])))
    assert difference.difference == pytest.approx(by_seed.mean()) and difference.seeds == 2
    gaps = ev.resampled_scores(runs[:2], resamples=200) - ev.resampled_scores(
        runs[1:], resamples=200)
    alone = difference.conversations
    assert [alone.low, alone.high] == pytest.approx(np.quantile(gaps, [.025, .975]))
    assert alone.score == difference.difference
    assert (
        0 < difference.p_value <= 1
        and ev.paired_difference(runs[0], runs[0], resamples=50).p_value == 1)


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not():
    """Whole seeds shifted apart: the interval over conversations alone knows nothing of it."""
    rng = np.random.default_rng(0)
    labels, owner = rng.integers(4, size=900), np.arange(30).repeat(30)
    run = lambda skill: ev.conversation_counts(
        labels, np.where(rng.random(900) < skill, labels, (labels + 1) % 4), owner, 4)
    base = np.stack([run(.5)] * 5)
    alike = np.stack([run(.6)] * 5)
    apart = np.stack([run(skill) for skill in (.4, .5, .6, .7, .8)])
    width = lambda i: i.high - i.low
    equal, unequal = (ev.paired_difference(x, base, resamples=4000) for x in (alike, apart))
    assert width(unequal) > 2.5 * width(unequal.conversations)
    assert 1 < width(equal) / width(equal.conversations) < 1.15    # Student's t of 30, no more
    # 5 seeds a standard deviation of .158 apart: t(4) times .158 / sqrt(5), and a little more
    assert .35 < width(unequal) < .6
    assert unequal.detectable == pytest.approx(width(unequal) / 2 * (1 + .8416 / 1.96), rel=1e-3)


@pytest.mark.parametrize("spread", [0, .05])
def test_the_two_level_interval_holds_a_known_difference(spread):
    """Coverage on few test sets; tools/interval_coverage.py counts it on many."""
    sys.path.insert(0, str(ROOT / "tools"))
    import interval_coverage
    size, rng = (31, 22), np.random.default_rng(0)
    at = interval_coverage.measured(rng, size, spread, 5, .05, splits=120, resamples=400)
    assert .9 <= at["coverage"]["two_level"] <= .99
    assert at["coverage"]["conversations"] <= at["coverage"]["two_level"]


def test_holm_is_the_step_down_by_hand():
    rng = np.random.default_rng(0)
    for n in (1, 5, 30):
        p = rng.random(n)**3
        expected, worst = {}, 0.
        for rank, i in enumerate(np.argsort(p)):
            worst = max(worst, min(1, p[i] * (n - rank)))
            expected[i] = worst
        assert ev.holm(p) == pytest.approx([expected[i] for i in range(n)])
        assert (ev.holm(p) >= p).all()


def test_a_difference_refuses_other_utterances_and_other_seeds():
    counts = ev.conversation_counts([0, 1, 1], [0, 1, 0], [0, 0, 1], 2)
    for other in (
        counts[:1], counts[::-1], ev.conversation_counts([0, 1, 0], [0, 1, 0], [0, 0, 1], 2)):
        with pytest.raises(DataError, match="same conversations"):
            ev.paired_difference(counts, other)
    with pytest.raises(DataError, match="2 seeds and the other 1"):
        ev.paired_difference(np.stack([counts] * 2), counts)


def test_p_values_are_uniform_where_there_is_no_difference():
    rng, p_values = np.random.default_rng(0), []
    for s in range(200):
        labels, owner = rng.integers(3, size=400), np.arange(40).repeat(10)
        system = lambda: ev.conversation_counts(
            labels, np.where(rng.random(400) < 0.6, labels, rng.integers(3, size=400)), owner, 3)
        p_values.append(ev.paired_difference(system(), system(), resamples=200, seed=s).p_value)
    assert (
        0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.12
        and 0.38 < np.mean(np.array(p_values) < 0.5) < 0.62)


@pytest.fixture
def plots(monkeypatch):
    """The plot functions, with a backend that needs no screen; no figure is left open and no
    warning is given."""
    matplotlib.use("Agg")
    from erc_moe import plots
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield plots
        for number in plots.plt.get_fignums(): plots.plt.figure(number).canvas.draw()
    plots.plt.close("all")


def test_every_plot_draws_into_the_axes_that_it_is_given(plots):
    log = [
        dict(
            epoch=e, losses=dict(text=2.0 / e, contrastive=9.0 / e),
            validation=dict(mixture=0.1 * e, text=0.05 * e))
        for e in (1, 2, 3)]
    talk = Conversation(
        "talk",
        [Utterance(f"talk_{i}", "AB"[i % 2], "", [None, "joy", "anger"][i % 3]) for i in range(35)])
    some = np.random.default_rng(0).random((35, 2))
    calls = [
        lambda **ax: plots.plot_confusion([[2, 1], [0, 0]], ["joy", "anger"], **ax),
        lambda **ax: plots.plot_class_f1({"mixture": {"joy": 0.5, "anger": 0.0}}, 0.4, **ax),
        lambda **ax: plots.plot_class_f1({"text": {"joy": 0.5}, "speech": {"joy": 0.2}}, **ax),
        lambda **ax: plots.plot_gate(some / some.sum(1, keepdims=True), ["text", "speech"], **ax),
        lambda **ax: plots.plot_gate([[0.5, 0.5]], ["text", "unheard of"], **ax),
        lambda **ax: plots.plot_losses(log, **ax),
        lambda **ax: plots.plot_scores(log, **ax),
        lambda **ax: plots.plot_conversation(
            talk, ["joy", "anger"], dict(text=some, speech=some, mixture=some), some, **ax),
        lambda **ax: plots.plot_reliability(ev.calibration_bins(some, [0] * 35), **ax)]
    for call in calls:
        ax = plots.plt.subplots(figsize=(9, 4))[1]
        assert call(ax=ax) is ax and (ax.patches or ax.lines or ax.collections)
        assert call() is not ax


def test_palettes_hold_colours(plots):
    from matplotlib.colors import is_color_like
    assert all(map(
        is_color_like,
        [
            *plots.MODALITY_COLORS.values(),
            *EMOTION_COLORS.values(),
            plots.expert_color("unheard of")]))
    assert len(set(plots.MODALITY_COLORS.values())) == len(plots.MODALITY_COLORS) and {
        "text", "speech", "visual"} <= set(plots.MODALITY_COLORS)
