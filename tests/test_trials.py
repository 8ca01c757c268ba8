"""Declared trials of stage 1: resumed, a line each, judged on validation alone; the script that
runs them."""
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from erc_moe.corpora import load_corpus
from erc_moe.experiments import recipes
from erc_moe.experiments.recipes import (
    OF_CORPUS, TRIALS, Trial, TrialLedger, core_minutes, planned, run_trials)

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    adaptation="full", frozen_layers=-1, cache="float16", width=8, epochs=3, batch_size=8, lr=1e-3)
FEW = (Trial("single", {}, "minilm"), Trial("one layer more", dict(frozen_layers=-2), "minilm"))


@pytest.fixture
def corpus():
    sample = load_corpus("sample")
    return replace(
        sample, splits={s: cs[:n] for (s, cs), n in zip(sample.splits.items(), (2, 1, 1))})


def run(corpus, tmp_path, monkeypatch, told=None, **options):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path/"cache"))
    return run_trials(
        corpus, trials=FEW, base=SMALL, results=tmp_path/"results", work=tmp_path/"work",
        device="cpu", tell=(told if told is not None else []).append, **options)


def test_a_stopped_trial_carries_on_and_each_has_one_line(corpus, tmp_path, monkeypatch):
    from erc_moe.training import loop, tuning
    monkeypatch.setattr(
        recipes, "tune", lambda *a, **k: tuning.tune(*a, checkpoint_seconds=0, **k))
    epochs, scored = [], loop.score
    def stopping(model, data):
        epochs.append(1)
        if len(epochs) == 3: raise KeyboardInterrupt    # in the last epoch of the first trial
        return scored(model, data)
    monkeypatch.setattr(loop, "score", stopping)
    with pytest.raises(KeyboardInterrupt): run(corpus, tmp_path, monkeypatch)
    path = tmp_path/"results"/"sample.jsonl"
    assert not path.exists(), "half a trial is no record"
    told = []
    ledger = run(corpus, tmp_path, monkeypatch, told)
    assert len(epochs) == 3 + 1 + 3, "one epoch was left of the first, three are of the second"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and [r["trial"] for r in ledger.read().values()] == [
        "single", "one layer more"]
    # what is on record is not run again, and the lines stay
    told.clear()
    run(corpus, tmp_path, monkeypatch, told)
    assert not told and path.read_text().splitlines() == lines and len(epochs) == 7


def test_test_labels_do_not_reach_a_record(corpus, tmp_path, monkeypatch):
    "The same record whatever the test split's labels are: only validation judges."
    def turned(c): return replace(c, utterances=[
        replace(u, label=corpus.labels[(corpus.labels.index(u.label) + 1) % 7])
        for u in c.utterances])
    other = replace(
        corpus, splits=corpus.splits | dict(test=[turned(c) for c in corpus.splits["test"]]))
    said = [
        run(c, tmp_path/name, monkeypatch).read().values()
        for name, c in (("a", corpus), ("b", other))]
    for one, two in zip(*said):
        assert one["validation"] == two["validation"] and len(one["validation"]) == 3
        assert "test" not in one and "test_selected" not in one
        assert not {"test", "figures", "summary"} & {*one["config"]}
        assert one["split_hash"] != two["split_hash"] and one["key"] != two["key"]


def test_the_best_is_the_highest_on_validation(tmp_path):
    ledger = TrialLedger(tmp_path/"x.jsonl")
    assert ledger.best is None
    for key, validation in (("a", [.5, .6]), ("b", [.7, .1]), ("c", [.2, .7])):
        ledger.add(dict(key=key, trial=key, seed=0, validation=validation, seconds=60.))
    assert ledger.best["key"] == "b" and ledger.table()["trial"][0] == "b"


def test_the_plan_and_its_costs():
    plan = planned()
    assert len({(c, t.name) for c, t in plan}) == len(plan)
    assert {t.name for _, t in plan} == {t.name for t in TRIALS}
    assert {(c, t.name) for c, t in plan if t.corpora} == {
        (c, t.name) for t in TRIALS for c in t.corpora}
    assert plan[0] == ("meld", TRIALS[0])
    cost = lambda **changes: core_minutes(
        "mpnet", dict(frozen_layers=-4, epochs=3) | changes, 1000, 100)
    assert cost(frozen_layers=-2) < cost() < cost(context=2) < cost(context=4)
    assert cost(context=8, reading="conversation") < cost() < cost(epochs=4) < cost(frozen_layers=0)
    assert core_minutes("minilm", dict(frozen_layers=-4, epochs=3), 1000, 100) < cost()
    assert cost(adaptation="lora") < cost()


def test_the_script_lists_runs_and_tells_the_best(tmp_path, monkeypatch, capsys):
    table = tmp_path/"talk.csv"
    rows = ["conversation,speaker,text,label,split"]
    for split in ("train", "validation", "test"):
        for i, (text, label) in enumerate((("well done", "joy"), ("go away", "anger"))*2):
            rows.append(f"{split},{'AB'[i % 2]},{text} {i},{label},{split}")
    table.write_text("\n".join(rows))
    monkeypatch.setattr(recipes, "TRIALS", FEW)
    monkeypatch.setattr(recipes, "BASE", SMALL | dict(epochs=1))
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path/"cache"))
    def call(*more):
        monkeypatch.setattr(sys, "argv", [
            "trials.py", str(table), "--results", str(tmp_path/"results"), "--work",
            str(tmp_path/"work"), "--device", "cpu", *more])
        runpy.run_path(str(ROOT/"tools"/"trials.py"), run_name="__main__")
        return capsys.readouterr().out
    before = call("--list")
    assert "single" in before and "core minutes" in before
    assert not (tmp_path/"results").exists(), "a list runs nothing"
    after = call("--only", "single")
    assert "talk: the best so far is single" in after
    [record] = map(json.loads, (tmp_path/"results"/"talk.jsonl").read_text().splitlines())
    score = f"{100*max(record['validation']):.1f}"
    assert score in call("--list") and score not in before
    with pytest.raises(SystemExit): call("--only", "nothing of the kind")
