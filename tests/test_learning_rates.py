"""One search for every system, and rates that are what its records say."""
import sys
from pathlib import Path

import pytest

from erc_moe.experiments import EXPERIMENTS, Ledger
from erc_moe.experiments.papers import RATES
from erc_moe.experiments.rates import best_rates, rate_table
from erc_moe.models import MODELS, find_model, learning_rates

ROOT = Path(__file__).resolve().parent.parent
SEARCH = EXPERIMENTS["choices/learning_rate"]


def searched(folder, model, corpus, score, experiment=SEARCH, skip=(), **more):
    ledger = Ledger(folder)
    for cell, _ in experiment.cells():
        rate = cell.changes["lr"]
        if (cell.model, cell.corpus) != (model, corpus) or rate in skip: continue
        found = score(rate, cell.seed)
        ledger.add(
            dict(cell=cell.to_dict(), key="", code="a", feature_hash="b", split_hash="c") | more
            | (dict(diverged="why") if found is None else dict(strict=dict(validation=found))))
    return ledger


def test_every_system_has_the_same_search():
    budget = {}
    for cell, _ in SEARCH.cells():
        assert cell.changes.keys() == {"lr"} and not cell.protocol
        budget.setdefault(cell.model, set()).add(
            (cell.changes["lr"], cell.corpus, cell.seed, cell.preset))
    assert {*budget} == {row.model for row in EXPERIMENTS["leaderboard/strict"].rows}
    assert {frozenset(of) for of in budget.values()} == {frozenset(
        (rate, c, 0, "cpu") for rate in RATES for c in ("iemocap", "meld", "mosi"))}
    board = {(c.model, c.corpus): c.features for c, _ in EXPERIMENTS["leaderboard/strict"].cells()}
    assert all(board[c.model, c.corpus] == c.features for c, _ in SEARCH.cells())


def test_the_presets_have_the_rates_of_the_table():
    rates = learning_rates()
    for name, entry in MODELS.items():
        if not entry.model.__module__.startswith("erc_moe."): continue    # another test's
        of = rates.get(name, rates["mister_e"])    # its variants have no search of their own
        for corpus in ("iemocap", "meld", "mosi", "emorynlp", "sample", "mine"):
            changes = entry.training_changes("cpu", corpus)
            assert changes["lr"] == of.get(corpus, of["meld"]), (name, corpus)
    assert {r for of in rates.values() for r in of.values()} <= {*RATES}


def test_the_table_is_what_complete_searches_say():
    best, rates = best_rates(Ledger(ROOT/"results"/"reproduce")), learning_rates()
    print(f"{len(best)} of {3*len(rates)} searches are complete")
    for (model, corpus), (rate, second) in best.items():
        assert (rates[model][corpus], learning_rates("second")[model][corpus]) == (rate, second)


@pytest.mark.parametrize("where", [0, 3, -1])
def test_the_best_on_validation_is_chosen(tmp_path, where):
    score = lambda rate, seed: .5 - .01*abs(RATES.index(rate) - RATES.index(RATES[where]))
    ledger = searched(tmp_path, "hcam", "meld", score)
    near = {0: 1, 3: 2, -1: -2}[where]    # of two as good the lower
    assert best_rates(ledger) == {("hcam", "meld"): (RATES[where], RATES[near])}
    line = rate_table(ledger).set_index(["model", "corpus"]).loc[("hcam", "meld")]
    assert [*map(float, line)] == [RATES[where], RATES[near]]


def test_a_search_that_is_not_complete_is_not_judged(tmp_path):
    flat = lambda rate, seed: .5
    before = rate_table(Ledger(tmp_path/"none"))
    part = searched(tmp_path/"part", "hcam", "meld", flat, skip=RATES[-1:])
    assert best_rates(part) == {} and rate_table(part).equals(before)
    searched(tmp_path/"mixed", "hcam", "meld", flat)
    mixed = searched(tmp_path/"mixed", "hcam", "meld", flat, skip=RATES[1:], code="older")
    assert best_rates(mixed) == {} and rate_table(mixed).equals(before)


@pytest.mark.parametrize("lost", [RATES[-2:], RATES[:1], RATES[1:]])
def test_a_rate_that_diverges_was_searched_and_never_wins(tmp_path, lost):
    ledger = searched(tmp_path, "sure", "mosi", lambda rate, seed: None if rate in lost else rate)
    pair = best_rates(ledger)["sure", "mosi"]
    kept = [r for r in RATES if r not in lost]
    assert pair[0] == kept[-1] and (pair[1] == kept[-2] if kept[1:] else pair[1] in lost)
    of = searched(tmp_path, "hcam", "mosi", lambda rate, seed: None)
    assert ("hcam", "mosi") not in best_rates(of)    # nothing learns: there is no best rate


@pytest.mark.parametrize("corpus, name", [("iemocap", ""), ("meld", "_meld")])
def test_finals_decide_between_the_two_that_the_search_found(tmp_path, corpus, name):
    final = EXPERIMENTS[f"choices/learning_rate_finals{name}"]
    first, second = (learning_rates(x)["bc_lstm"][corpus] for x in ("rate", "second"))
    search = lambda rate, seed: {first: .8, second: .7}.get(rate, .1)
    finals = lambda rate, seed: search(rate, seed) if seed == 0 else {first: .6, second: .7}[rate]
    of = "bc_lstm", corpus
    ledger = searched(tmp_path, *of, search)
    assert best_rates(ledger) == {of: (first, second)}
    ledger = searched(tmp_path, *of, finals, final)
    assert best_rates(ledger) == {of: (second, first)}
    # one seed in five that diverges is enough to lose
    lost = lambda rate, seed: None if (rate, seed) == (second, 3) else finals(rate, seed)
    ledger = searched(tmp_path, *of, lost, final)
    assert best_rates(ledger) == {of: (first, second)}
    # of two others than the search's best: the search decides
    other = next(rate for rate in RATES if rate not in (first, second))
    better = lambda rate, seed: .9 if rate == other else finals(rate, 0)
    ledger = searched(tmp_path, *of, better, skip=(first, second))
    assert best_rates(ledger) == {of: (other, first)}


def test_the_command_writes_the_table_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT/"tools"), *sys.path])
    from learning_rates import main
    searched(tmp_path/"records", "hcam", "meld", lambda rate, seed: rate)
    argv = ["--results", str(tmp_path/"records"), "--out", str(tmp_path/"rates.csv")]
    (tmp_path/"rates.csv").write_bytes((ROOT/"erc_moe"/"learning_rates.csv").read_bytes())
    assert main(argv) == 1 and "commit it" in (said := capsys.readouterr().out)
    assert f"At an edge of the grid: hcam on meld ({RATES[-1]:g})." in said
    assert f"hcam,meld,{RATES[-1]:g},{RATES[-2]:g}\n" in (tmp_path/"rates.csv").read_text()
    was, now = (
        p.read_text().splitlines()
        for p in (ROOT/"erc_moe"/"learning_rates.csv", tmp_path/"rates.csv"))
    assert sum(a != b for a, b in zip(was, now, strict=True)) == 1
    assert main(argv) == 0 and "as it was" in capsys.readouterr().out


def test_a_model_of_ones_own_takes_the_shared_rate(tmp_path):
    (tmp_path/"m.py").write_text(
        "from dataclasses import dataclass\nfrom torch import nn\n@dataclass\nclass C:\n"
        "    widths: dict\n    classes: int\n    @classmethod\n"
        "    def cpu(cls, corpus, widths, classes, **changes): return cls(widths, classes)\n"
        "class M(nn.Module): config_class = C\n")
    entry = find_model(f"{tmp_path}/m.py:M")
    MODELS.pop(next(m for m in MODELS if m.endswith("m.py:M")))
    assert entry.training_changes("cpu", "iemocap")["lr"] == 1e-3
