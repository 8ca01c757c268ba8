"""The protocols refit and released against loops of their own: what is trained on, what chooses the
epoch, and what is never looked at. And the paper's split of CMU-MOSI."""
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy

from erc_moe.conversations import Conversation, Utterance, collate
from erc_moe.corpora.core import Corpus
from erc_moe.corpora import load_corpus
from erc_moe.experiments import Cell, reproduce
from erc_moe.experiments.declare import Experiment, Row
from erc_moe.experiments.run import REFIT_FOLDS
from erc_moe.experiments.tables import results, table
from erc_moe.models import find_model
from erc_moe.training import train
from erc_moe.training.loop import epoch_batches, epoch_seed, fit
from erc_moe.training.refit import folded, refit_epochs
from erc_moe.training.runs import configure

LABELS = ["neutral", "joy", "anger"]
EPOCHS, LR, BATCH = 10, 0.06, 4


@pytest.fixture(scope="module")
def corpus():
    "Conversations of very different lengths, with a weak cue of the emotion."
    rng, splits = np.random.default_rng(0), {}
    means = rng.normal(size=(3, 5))
    for split, n in (("train", 9), ("validation", 4), ("test", 6)):
        splits[split] = []
        for i in range(n):
            told = rng.integers(3, size=int(rng.integers(2, 12)))
            turns = [
                Utterance(f"{split}{i}_{j}", "AB"[j % 2], "", None if j == 1 else LABELS[y])
                for j, y in enumerate(told)]
            x = means[told] + 1.5*rng.normal(size=(len(told), 5))
            splits[split].append(
                Conversation(f"{split}{i}", turns).with_features("text", x.astype(np.float32)))
    return Corpus("talk", LABELS, splits)


@pytest.fixture(scope="module")
def setup(corpus):
    changes = dict(
        epochs=EPOCHS, lr=LR, batch_size=BATCH, schedule="constant", warmup=0., ema=0.,
        max_norm=0., weight_decay=0., optimizer="adam")
    config, training = configure("context_free", corpus, {"text": 5}, "cpu", changes)
    config = replace(config, **{k: 0. for k in vars(config) if "dropout" in k})
    return lambda: find_model("context_free").model(config), training


def of(conversations):
    "Features and classes, utterance by utterance."
    x = torch.from_numpy(np.concatenate([c.features["text"] for c in conversations]))
    y = torch.tensor([LABELS.index(l) if l else -1 for c in conversations for l in c.labels])
    return x, y


def said(model, x):
    "Logits of single utterances: a model without context needs no conversation."
    talk = Conversation("c", [Utterance(str(i), "A", "", None) for i in range(len(x))])
    return model(collate([talk.with_features("text", x.numpy())], LABELS)).logits[0]


def by_hand(build, learned, judged=(), epochs=EPOCHS):
    """A loop of its own, in which an epoch's batches are the library's: the states after every
    epoch, and the weighted F1 of `judged` there, by scikit-learn."""
    torch.manual_seed(epoch_seed(0, 0))
    model, states, scores = build(), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    lengths = torch.tensor([len(c) for c in learned])
    for epoch in range(1, epochs + 1):
        for index in epoch_batches(lengths, BATCH, epoch_seed(0, epoch)):
            x, y = of([learned[i] for i in index])
            optimizer.zero_grad()
            cross_entropy(said(model.train(), x)[y >= 0], y[y >= 0]).backward()
            optimizer.step()
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        if judged:
            x, y = of(judged)
            with torch.no_grad(): best = said(model.eval(), x).argmax(-1)
            scores.append(f1_score(y[y >= 0], best[y >= 0], average="weighted"))
    return states, scores


def same(model, state, tolerance=1e-5):
    return all(torch.allclose(x, state[k], atol=tolerance) for k, x in model.state_dict().items())


QUIET = dict(device="cpu", progress=False)


def test_refit_chooses_by_the_folds_and_trains_on_all_of_both_splits(corpus, setup):
    build, training = setup
    chosen, mean = refit_epochs(build, corpus, training, folds=3, **QUIET)
    pool = corpus.splits["train"] + corpus.splits["validation"]
    curves, weights, held = [], [], []
    for part in folded(corpus, 3, seed=0):
        out = part.splits["validation"]
        kept = [c for c in pool if c.id not in {c.id for c in out}]
        assert [c.id for c in part.splits["train"]] == [c.id for c in kept]
        curves.append(by_hand(build, kept, out)[1])
        weights.append(sum(l is not None for c in out for l in c.labels))
        held += [c.id for c in out]
    assert sorted(held) == sorted(c.id for c in pool), "every conversation is held out once"
    assert len({*weights}) > 1, "folds of unequal size, or their weights would not show"
    expected = (np.array(curves).T*weights).sum(1)/sum(weights)
    assert np.allclose(mean, expected, atol=1e-6)
    assert chosen == expected.argmax() + 1

    torch.manual_seed(epoch_seed(0, 0))
    model = build()
    fit(model, corpus, training, protocol="refit", until=chosen, **QUIET)
    states, _ = by_hand(build, pool, epochs=chosen)
    alone, _ = by_hand(build, corpus.splits["train"])
    assert same(model, states[-1]) and not same(model, alone[-1])


def test_refit_never_reads_test(corpus, setup):
    build, training = setup
    garbled = replace(corpus, splits=corpus.splits | dict(test=[
        replace(c, utterances=[replace(u, label="anger") for u in c.utterances]).with_features(
            "text", np.full((len(c), 5), 9., np.float32))
        for c in corpus.splits["test"]]))
    made = []
    for of_test in (corpus, garbled):
        chosen, mean = refit_epochs(build, of_test, training, folds=3, **QUIET)
        torch.manual_seed(epoch_seed(0, 0))
        model = build()
        fitted = fit(model, of_test, training, protocol="refit", until=chosen, **QUIET)
        made.append((chosen, mean, fitted.log[-1]["losses"]))
        assert not {"validation", "test"} & fitted.log[-1].keys()
    assert made[0] == made[1]


def test_refit_that_was_stopped_carries_on(corpus, setup, tmp_path):
    build, training = setup
    whole = refit_epochs(build, corpus, training, folds=2, **QUIET)
    first = folded(corpus, 2, 0)[0]
    (tmp_path/"fold-0").mkdir()
    torch.manual_seed(epoch_seed(0, 0))
    fit(build(), first, replace(training, epochs=3), 0, tmp_path/"fold-0",
        checkpoint_seconds=0, **QUIET)    # three epochs of the first fold were done
    assert refit_epochs(
        build, corpus, training, 0, tmp_path, 2, checkpoint_seconds=0, **QUIET) == whole


def test_released_trains_on_both_splits_and_is_chosen_on_test(corpus, setup):
    build, training = setup
    torch.manual_seed(epoch_seed(0, 0))
    model = build()
    fitted = fit(model, corpus, training, protocol="released", **QUIET)
    pool = corpus.splits["train"] + corpus.splits["validation"]
    states, scores = by_hand(build, pool, corpus.splits["test"])
    assert np.allclose([e["test"]["mixture"] for e in fitted.log], scores, atol=1e-6)
    best = int(np.argmax(scores))
    assert fitted.best["test"].epoch == best + 1 and [*fitted.best] == ["test"]
    assert same(model, states[best]) and best + 1 < EPOCHS, "or the last would do as well"
    _, alone = by_hand(build, corpus.splits["train"], corpus.splits["test"])
    assert not np.allclose(scores, alone, atol=1e-3), "validation has been learnt from"


def test_what_a_run_says_of_itself(corpus):
    small = dict(epochs=3, batch_size=4)
    talk = corpus.map(lambda c: replace(c, features={}, present={}, utterances=[
        replace(u, text=u.label or "well") for u in c.utterances]))
    for protocol, words in (
        ("released", ("test-selected", "trained on train and validation")),
        ("refit", ("cross-validation over train and validation",)),
    ):
        run = train(
            "context_free", talk, text="minilm", protocol=protocol, seeds=1, changes=small,
            **QUIET)
        assert all(w in run.summary["selection"] for w in words)
        assert ("test-selected" in run.summary["selection"]) == (protocol == "released")


ROWS = tuple(
    Row(name, "context_free", "frozen", ("text",), dict(epochs=4), protocol=protocol)
    for name, protocol in (("strict", ""), ("refit", "refit"), ("released", "released")))


def test_records_of_the_protocols(tmp_path):
    "No score is shown that a protocol has not earned."
    e = Experiment("example/protocols", "", "a test", ("sample",), ROWS, seeds=1)
    ledger = reproduce([e], results=tmp_path, workers=1, device="cpu", tell=lambda line: None)
    strict, refit, released = (ledger.find(c) for c, _ in e.cells())
    assert {"strict", "test_selected"} <= strict.keys()
    assert "strict" in refit and "test_selected" not in refit and "test" not in refit["curve"]
    assert "test_selected" in released and "strict" not in released
    assert len(refit["curve"]["folds"]) == 4 and REFIT_FOLDS == 3
    assert refit["strict"]["epoch"] == np.argmax(refit["curve"]["folds"]) + 1
    assert math.isclose(
        refit["strict"]["validation"], max(refit["curve"]["folds"]), abs_tol=1e-4)
    assert "validation" not in released["test_selected"], "it was trained on"
    assert len({r["key"] for r in (strict, refit, released)}) == 3
    shown = table(e, ledger)["sample"]
    assert shown["strict"].map(bool).tolist() == [True, True, False]
    assert shown["test-selected"].map(bool).tolist() == [True, False, True]
    assert shown["gain"].map(bool).tolist() == [True, False, False]
    assert [*results(e, ledger)] == [(r.name, "sample") for r in ROWS]


@pytest.fixture
def mosi(tmp_path):
    "93 videos with two segments each, as utterances.csv has them; the last 31 are test."
    (tmp_path/"mosi").mkdir()
    rng, rows = np.random.default_rng(0), []
    for v in range(93):
        of_video = "test" if v >= 62 else "val" if v < 10 else "train"
        for clip in (1, 2):
            score = float(rng.uniform(-3, 3))
            rows.append(dict(
                utterance_id=f"v{v:02}_{clip}", video_id=f"v{v:02}", clip=clip, text="so",
                score=score, split=of_video, bclstm_split="test" if v >= 62 else "train"))
    pd.DataFrame(rows).to_csv(tmp_path/"mosi"/"utterances.csv", index=False)
    np.save(tmp_path/"mosi"/"audio73.npy", rng.normal(size=(186, 73)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("corpus, preset, videos", [
    ("mosi", "paper", (49, 13, 31)), ("mosi", "cpu", (52, 10, 31)),
    ("mosi@official", "paper", (52, 10, 31))])
def test_the_paper_divides_mosi_as_the_paper_says(mosi, capfd, corpus, preset, videos):
    run = train(
        "context_free", corpus, mosi, speech="audio73", preset=preset, seeds=1,
        changes=dict(epochs=1, hidden=4) if preset == "cpu" else dict(epochs=1), **QUIET)
    split = "paper" if videos[0] == 49 else "official"
    assert run.summary["split_hash"] == load_corpus("mosi", mosi, split=split).split_hash
    assert tuple(map(len, load_corpus("mosi", mosi, split=split).splits.values())) == videos
    told = [line for line in capfd.readouterr().err.splitlines() if "mosi@paper" in line]
    assert len(told) == (split == "paper"), "said once, where it is another than its name says"
    cell = Row("", "context_free", "frozen").cell(corpus, preset)
    assert cell is None or cell == Cell(
        "context_free", "mosi@paper" if split == "paper" else corpus, cell.features, {}, preset)
