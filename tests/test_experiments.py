"""Experiments: what is on record is not repeated, what was stopped carries on, and every number
can be computed again from predictions."""
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from erc_moe.cli import main
from erc_moe.conversations import DataError
from erc_moe.corpora import load_corpus
from erc_moe.evaluation import accuracy
from erc_moe.experiments import (
    EXPERIMENTS, FEATURES, Cell, Experiment, Ledger, Row, find_experiments, reproduce)
from erc_moe.experiments.claims import CLAIMS
from erc_moe.experiments.declare import made_by, teachers_of
from erc_moe.features import Extractor, FeatureStore
from erc_moe.code_hashes import code_hash
from erc_moe.experiments.ensembles import BITS
from erc_moe.experiments.ledger import as_characters, from_characters, from_text
from erc_moe.experiments.run import is_current, train_cell
from erc_moe.experiments.tables import claims_of, difference, results, statuses, table
from erc_moe.models import MODELS
from erc_moe.training.runs import configure

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(epochs=2, hidden=8)
TABLE = Experiment(
    "example/table",
    "a table",
    "a test",
    ("sample",),
    reference="with",
    seeds=2,
    rows=(
        Row(
            "with", features="frozen", modalities=("text",), changes=QUICK, paper=dict(sample=50.0)
        ),
        Row(
            "without", features="frozen", modalities=("text",), changes=QUICK | dict(gamma=0.0),
            paper=dict(sample=40.0)),
        Row("elsewhere", features="llama+salmonn", paper=dict(sample=60.0)),
        Row("cited", None, paper=dict(sample=70.0))))


def scores(ledger, experiment=TABLE):
    return {
        c.identity: {k: ledger.find(c)[k] for k in ("key", "strict", "test_selected", "curve")}
        for c, _ in experiment.cells()}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return reproduce(
        [TABLE], results=tmp_path_factory.mktemp("records"), workers=1, device="cpu",
        tell=lambda line: None)


def test_several_at_a_time_give_what_one_at_a_time_gives(ledger, tmp_path):
    assert scores(
        reproduce([TABLE], results=tmp_path, workers=2, device="cpu", tell=lambda line: None)
    ) == scores(ledger)


def test_a_deleted_file_is_made_again_with_the_same_scores(ledger, tmp_path):
    again = reproduce([TABLE], results=tmp_path, workers=1, device="cpu", tell=lambda line: None)
    again.path(TABLE.cells()[0][0]).unlink()
    lines = []
    again = reproduce([TABLE], results=tmp_path, workers=1, device="cpu", tell=lines.append)
    assert lines[0] == "4 trainings: 0 on record, 4 to do" and scores(again) == scores(ledger)


def test_a_lost_line_is_the_only_one_made_again(ledger, tmp_path):
    (tmp_path/"cpu").mkdir()
    path = ledger.path(TABLE.cells()[0][0])
    lines = path.read_text().splitlines()
    (tmp_path/"cpu"/path.name).write_text("\n".join(lines[1:]) + "\n")
    said = []
    reproduce([TABLE], results=tmp_path, workers=1, device="cpu", tell=said.append)
    assert said[0] == "4 trainings: 3 on record, 1 to do"


def test_a_killed_reproduction_carries_on(ledger, tmp_path):
    program = (
        "from erc_moe.experiments import *\nfrom erc_moe.experiments import "
        "declare\nimport sys\nsys.path.insert(0, %r)\nfrom test_experiments import "
        "TABLE\n"
        "if __name__ == '__main__': reproduce([TABLE], results='records', workers=1, "
        "device='cpu')\n"
    ) % str(ROOT / "tests")
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = tmp_path/"records"/"cpu"/"mister_e-sample.jsonl"
    while not path.exists() and process.poll() is None: time.sleep(.05)
    process.kill(); process.wait()
    kept = path.read_text().splitlines()
    assert 0 < len(kept) < 4 and all(json.loads(line)["key"] for line in kept)
    said = []
    again = reproduce(
        [TABLE], results=tmp_path / "records", workers=1, device="cpu", tell=said.append)
    assert said[0] == f"4 trainings: {len(kept)} on record, {4 - len(kept)} to do" and scores(
        again
    ) == scores(ledger)


def test_both_protocols_are_of_one_trajectory(ledger):
    for cell, _ in TABLE.cells():
        r = ledger.find(cell)
        validation, test = r["curve"]["validation"], r["curve"]["test"]
        assert r["strict"]["epoch"] == 1 + int(np.argmax(validation)) and r["test_selected"][
            "epoch"
        ] == 1 + int(np.argmax(test))
        for p in ("strict", "test_selected"):
            assert r[p]["test"] == pytest.approx(test[r[p]["epoch"] - 1], abs=1e-4)
            assert r[p]["validation"] == pytest.approx(validation[r[p]["epoch"] - 1], abs=1e-4)


def test_a_strict_training_is_the_strict_column(ledger, tmp_path):
    "The test split that the paper protocol looks at changes nothing in the training."
    from erc_moe.training import train
    cell = TABLE.cells()[0][0]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = train(
        cell.model, cell.corpus, **cell.features, changes=cell.changes, seeds=[cell.seed],
        protocol="strict", device="cpu", progress=False, out=tmp_path / "run")
    torch.set_num_threads(before)
    strict = ledger.find(cell)["strict"]
    assert run.summary["test"]["weighted_f1"]["mean"] == pytest.approx(strict["test"], abs=1e-6)
    labels = load_corpus("sample").labels
    assert [labels[i] for i in from_characters(strict["predicted"])] == run.predictions(
        cell.seed
    ).predicted.tolist()


def test_a_record_of_other_code_settings_or_features_is_stale(ledger, monkeypatch):
    cell = TABLE.cells()[0][0]
    record = ledger.find(cell)
    assert is_current(cell, record)
    assert not is_current(replace(cell, changes=cell.changes | dict(lr=.5)), record)
    assert not is_current(replace(cell, seed=1), record)
    assert not is_current(replace(cell, features={"speech": "egemaps"}), record)
    from erc_moe.experiments import run
    monkeypatch.setattr(run, "code_hash", lambda *modules: "of tomorrow")
    assert not is_current(cell, record)


def test_scores_are_those_of_the_predictions(ledger):
    truth = from_characters("".join(ledger.truth("sample")["test"].values()))
    known = truth >= 0
    for (name, corpus), r in results(TABLE, ledger).items():
        for protocol in ("strict", "test_selected"):
            said = [from_characters(x[protocol]["predicted"])[known] for x in r.records]
            assert r.score(protocol)["per_seed"] == pytest.approx(
                [f1_score(truth[known], s, average="weighted") for s in said])
            assert r.score(protocol, accuracy)["per_seed"] == pytest.approx(
                [accuracy_score(truth[known], s) for s in said])
    found = results(TABLE, ledger)
    assert difference(
        found["with", "sample"], found["without", "sample"]
    ).difference == pytest.approx(
        found["with", "sample"].score()["mean"] - found["without", "sample"].score()["mean"])


def test_the_table_has_every_row_and_the_papers_numbers(ledger):
    t = table(TABLE, ledger)["sample"]
    assert t.index.tolist() == ["with", "without", "elsewhere", "cited"] and t[
        "paper"
    ].tolist() == ["50.0", "40.0", "60.0", "70.0"]
    assert (
        t["seeds"].tolist() == [2, 2, "", ""]
        and t.loc["with", "less with"] == ""
        and t.loc["without", "less with"])
    assert "strict" not in table(TABLE, ledger, by_validation=True)["sample"]
    s = statuses(TABLE, ledger).set_index("row").status
    assert (
        s["elsewhere"] == "needs weights or data not at hand"
        and s["cited"] == "cited by the paper"
        and s["with"] in ("not reproduced", "reproduced within one standard deviation"))


def test_what_is_not_at_hand_is_told_and_left_out(tmp_path):
    said = []
    far = Experiment("example/far", "", "", ("meld",), (Row("far", features="llama+salmonn"),))
    with pytest.raises(DataError, match="nothing of it can be trained: left out for want of"):
        reproduce([far], results=tmp_path, stores=tmp_path, tell=said.append)
    assert any("meld-llama" in line and "Llama-3.1-8B" in line for line in said) and not list(
        tmp_path.rglob("*.jsonl"))


def test_a_corpus_that_is_not_at_hand_keeps_no_other_from_its_turn(tmp_path):
    said, elsewhere = (
        [], Experiment("example/elsewhere", "", "", ("meld",), (Row("here", features="frozen"),)))
    with pytest.raises(DataError):
        reproduce([elsewhere], data=tmp_path, results=tmp_path/"records", tell=said.append)
    again = reproduce(
        [elsewhere, TABLE], data=tmp_path, results=tmp_path / "records", workers=1, device="cpu",
        tell=said.append, seeds=1)
    assert any(line.startswith("left out, on meld") for line in said) and all(
        again.find(c) for c, _ in TABLE.cells(seeds=1))


def test_where_a_store_lies_is_no_part_of_a_training(tmp_path, monkeypatch):
    corpus = load_corpus("sample")
    rng = np.random.default_rng(0)
    items = {
        u.id: rng.normal(size=8).astype("float32")
        for cs in corpus.splits.values()
        for c in cs
        for u in c.utterances}
    monkeypatch.setitem(FEATURES, "tuned", {"sample": {"text": "features/sample-tuned"}})
    tuned = Experiment(
        "example/tuned", "", "", ("sample",), (Row("tuned", features="tuned", changes=QUICK),),
        seeds=1)
    for place in ("here", "there"):
        FeatureStore(tmp_path / place / "sample-tuned", Extractor("made up", "1", 8)).add(
            [*items], np.stack([*items.values()]))
    said = []
    for stores in (tmp_path/"here", f"{tmp_path}/there/"):
        ledger = reproduce(
            [tuned], stores=stores, results=tmp_path / "records", workers=1, device="cpu",
            tell=said.append)
    assert said[-1] == "1 trainings: 1 on record, 0 to do"
    assert str(tmp_path) not in ledger.path(tuned.cells()[0][0]).read_text()


def test_one_training_under_two_names_is_trained_once(ledger, tmp_path):
    cells = [replace(TABLE.rows[0], changes=QUICK | more) for more in ({}, dict(gamma=3.0))]
    said = []
    both = reproduce(
        [
            Experiment(
                "example/twins", "", "", ("sample",),
                tuple(replace(r, name=str(i)) for i, r in enumerate(cells)), seeds=1)],
        results=tmp_path,
        workers=1,
        device="cpu",
        tell=said.append)
    records = [both.find(r.cell("sample")) for r in cells]
    assert (
        records[0]["key"] == records[1]["key"]
        and records[0]["strict"] == records[1]["strict"]
        and sum("strict" in line for line in said) == 1)


BROKEN = """
from erc_moe.baselines.context_free import ContextFree
class Broken(ContextFree):
    def forward(self, batch): raise ValueError("there is no room")
"""


def test_a_training_that_fails_keeps_no_other_from_its_turn(ledger, tmp_path):
    (tmp_path/"broken.py").write_text(BROKEN)
    name, said = f"{tmp_path}/broken.py:Broken", []
    broken = replace(TABLE, rows=(
        Row("broken", name, features="frozen", modalities=("text",)), *TABLE.rows[:2]))
    with pytest.raises(
        DataError, match="2 of 6 trainings failed, the first .*broken.py:Broken sample.*no room"
    ):
        reproduce([broken], results=tmp_path, workers=2, device="cpu", tell=said.append)
    MODELS.pop(next(m for m in MODELS if m.endswith("broken.py:Broken")))
    assert (
        scores(Ledger(tmp_path)) == scores(ledger)
        and sum(line.startswith("failed, ") for line in said) == 2)


def test_a_training_that_diverges_goes_on_record_as_that(ledger, tmp_path):
    changes, said = QUICK | dict(lr=1000., weight_decay=1000., epochs=9), []
    wild = replace(
        TABLE, rows=(replace(TABLE.rows[0], name="wild", changes=changes), *TABLE.rows[:2]))
    reproduce([wild], results=tmp_path, workers=2, device="cpu", tell=said.append)
    assert sum("lr=1000.0" in line and "diverged, the loss is" in line for line in said) == 2
    kept = Ledger(tmp_path)
    assert scores(kept) == scores(ledger) and len([*kept]) == 4    # no table sees the two
    cell = wild.rows[0].cell("sample")
    assert "no longer finite at epoch" in kept.find(cell, diverged=True)["diverged"]
    assert [*results(wild, kept)] == [("with", "sample"), ("without", "sample")]
    reproduce([wild], results=tmp_path, workers=1, device="cpu", tell=said.append)
    assert said[-1] == "6 trainings: 6 on record (2 diverged), 0 to do"


def test_a_table_that_needs_less_leaves_the_detail(tmp_path, monkeypatch):
    detailed = replace(
        TABLE, name="example/detailed", rows=(replace(TABLE.rows[0], detail=True),), reference="")
    monkeypatch.setitem(EXPERIMENTS, detailed.name, detailed)
    plain = replace(TABLE, rows=TABLE.rows[:1], seeds=1)
    kept = reproduce([plain], results=tmp_path, workers=1, device="cpu", tell=lambda line: None)
    assert kept.find(plain.cells()[0][0], detail=True)


def test_seeds_of_other_code_have_no_mean(ledger, tmp_path):
    mixed = Ledger(tmp_path)
    mixed.set_truth(load_corpus("sample"))
    for i, (cell, _) in enumerate(replace(TABLE, rows=TABLE.rows[:1]).cells()):
        mixed.add(ledger.find(cell) | (dict(code="older") if i else {}))
    with pytest.raises(DataError, match="not all trained with the same code.*--seeds 2"):
        results(TABLE, mixed)
    # a table that declares one seed is not stopped by a further one of older code
    one = results(replace(TABLE, rows=TABLE.rows[:1], seeds=1), mixed)
    assert [r.seeds for r in one.values()] == [[0]]
    assert len(results(replace(TABLE, seeds=1), ledger)[TABLE.rows[0].name, "sample"].seeds) == 2
    # and further ones alone are held to each other
    late, record = Ledger(tmp_path/"late"), ledger.find(cell)
    late.set_truth(load_corpus("sample"))
    for seed, code in ((2, "older"), (3, "newer")):
        late.add(record | dict(code=code, cell=record["cell"] | dict(seed=seed)))
    with pytest.raises(DataError, match="not all trained with the same code"):
        results(TABLE, late)


def test_a_detailed_record_is_of_the_strict_model(tmp_path):
    "Experts and probabilities are those of the epoch that validation chose, not of test's."
    from erc_moe.training.loop import dataset, epoch_seed, fit, score
    from erc_moe.experiments.run import keyed, prepared
    from erc_moe.models import find_model
    longer = replace(TABLE.rows[0], changes=QUICK | dict(epochs=8, lr=5e-3), detail=True)
    for seed in range(6):
        cell = longer.cell("sample", seed=seed)
        record = train_cell(cell, detail=True, device="cpu")
        if record["strict"]["epoch"] != record["test_selected"]["epoch"]: break
    else: pytest.fail("both protocols chose the same epoch with every seed")
    corpus, widths, feature_hash = prepared(cell)
    config, training, _ = keyed(cell, corpus, widths, feature_hash)
    torch.manual_seed(epoch_seed(seed, 0))
    model = find_model(cell.model).model(config)
    fit(model, corpus, training, seed, protocol="strict", device="cpu", progress=False)
    data = {s: dataset(model, corpus.splits[s], corpus.labels) for s in ("train", "test")}
    said = {s: score(model, d) for s, d in data.items()}
    for expert, logits in said["test"].experts.items():
        assert record["experts"][expert] == as_characters(logits.argmax(-1).tolist())
    for split, bits in BITS.items():
        kept = from_text(record["probabilities"][split], len(corpus.labels), bits)
        np.testing.assert_allclose(kept, said[split].logits.softmax(-1), rtol=.07, atol=1e-5)


STUDENTS = Experiment(
    "example/students", "", "", ("sample",), seeds=2, reference="one",
    rows=(
        replace(TABLE.rows[0], name="one"),
        replace(TABLE.rows[0], name="together", ensemble=True, detail=True),
        replace(TABLE.rows[0], name="student", teachers=2, changes=QUICK | dict(
            distillation=.5, distillation_temperature=2.))))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    return reproduce(
        [STUDENTS], results=folder, work=folder/"work", workers=2, device="cpu",
        tell=lambda line: None)


def test_an_ensemble_is_the_mean_of_its_members(students):
    found = results(STUDENTS, students)
    members, together = found["one", "sample"].records, found["together", "sample"]
    mean = sum(from_text(r["probabilities"]["test"], 7, 16) for r in members)/2
    assert from_characters(together.records[0]["strict"]["predicted"]).tolist() == (
        mean.argmax(-1).tolist())
    truth = from_characters("".join(students.truth("sample")["test"].values()))
    f1 = f1_score(truth[truth >= 0], mean.argmax(-1)[truth >= 0], average="weighted")
    assert together.score()["mean"] == pytest.approx(f1) and together.score()["std"] is None
    d = difference(together, found["one", "sample"])
    assert d.seeds == 2 and d.difference == pytest.approx(
        f1 - found["one", "sample"].score()["mean"])
    assert difference(together, together).difference == 0
    shown = table(STUDENTS, students)["sample"]
    assert shown.loc["together", "seeds"] == "1 (of 2)" and not shown.loc["together", "gain"]


def test_a_student_is_stale_with_its_teachers_and_waits_for_them(students, tmp_path):
    of = {row.name: cell for cell, row in STUDENTS.cells() if cell.seed == 0}
    record = students.find(of["student"])
    assert record["config"]["training"]["distillation"] == .5 and is_current(of["student"], record)
    other = replace(of["student"], changes=of["student"].changes | dict(gamma=1.))
    assert not is_current(other, record)
    # alone it asks for its teachers, and trains them where they are missing
    said = []
    alone = replace(STUDENTS, rows=STUDENTS.rows[2:], seeds=1, reference="")
    again = reproduce(
        [alone], results=tmp_path, work=tmp_path/"work", workers=1, device="cpu", tell=said.append)
    assert said[0] == "3 trainings: 0 on record, 3 to do"
    assert again.find(of["student"])["strict"] == record["strict"], "the same, whoever trains it"
    with pytest.raises(DataError, match="distillation is 0.5, and there is no teacher"):
        train_cell(of["student"], device="cpu")
    # one whose teacher diverged is told so, and not to wait for it
    for teacher in teachers_of(of["student"])[:1]:
        lost = {k: v for k, v in again.find(teacher).items() if k in ("cell", "key")}
        again.add(lost | dict(diverged="the loss is no longer finite at epoch 3"))
    again.path(of["student"]).write_text("".join(
        line for line in again.path(of["student"]).open() if '"teachers"' not in line))
    with pytest.raises(DataError, match="its teacher, .* diverged: .*with a lower lr"):
        reproduce(
            [alone], results=tmp_path, work=tmp_path/"work", workers=1, device="cpu",
            tell=said.append)


def test_a_student_learns_what_its_teacher_says():
    "Without labels' share it follows the teacher, also where the teacher is wrong."
    from erc_moe.experiments.run import keyed, prepared
    from erc_moe.models import find_model
    from erc_moe.training.loop import dataset, fit, score
    cell = replace(TABLE.rows[0], changes=dict(
        hidden=16, epochs=40, lr=1e-2, distillation=1., distillation_temperature=1.)).cell("sample")
    corpus, widths, feature_hash = prepared(cell)
    config, training, _ = keyed(cell, corpus, widths, feature_hash)
    torch.manual_seed(0)
    model = find_model(cell.model).model(config)
    data = dataset(model, corpus.splits["train"], corpus.labels)
    wrong = (torch.as_tensor(data.truth) + 1) % 7    # of what has no label: class 0
    teacher = torch.full((len(wrong), 7), .01).scatter_(1, wrong[:, None], .94)
    fit(
        model, corpus, training, protocol="refit", until=40, device="cpu", progress=False,
        teacher=torch.cat([teacher, torch.full(
            (sum(map(len, corpus.splits["validation"])), 7), 1/7)]))
    assert (score(model, data).logits.argmax(-1) == wrong).float().mean() > .9
    with pytest.raises(DataError, match="the teacher speaks of 3 utterances"):
        fit(model, corpus, training, device="cpu", progress=False, teacher=teacher[:3])
    with pytest.raises(DataError, match="distillation is 0, and there is a teacher"):
        fit(model, corpus, replace(training, distillation=0.), device="cpu", teacher=teacher)


def _add(folder, seeds, together=None):
    if together: together.wait(120)
    for seed in seeds:
        Ledger(folder).add(
            dict(cell=dict(model="nobody", corpus="sample", features={}, seed=seed), key=str(seed)))


def test_several_processes_may_add_to_one_ledger(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)  # neither begins before the other is there
    writers = [
        spawn.Process(target=_add, args=(tmp_path, range(i, 120, 2), together)) for i in range(2)]
    for w in writers: w.start()
    for w in writers: w.join()
    assert sorted(r["cell"]["seed"] for r in Ledger(tmp_path)) == list(range(120))


def test_a_line_that_is_no_record_is_named(tmp_path, capsys):
    _add(tmp_path, [0])
    path = tmp_path/"cpu"/"nobody-sample.jsonl"
    path.write_text(path.read_text() + "<<<<<<< HEAD\n")
    with pytest.raises(DataError, match="nobody-sample.jsonl, line 2 is not a record"):
        [*Ledger(tmp_path)]


@pytest.mark.parametrize("classes", [[], [0], [-1, 0, 9, 10, 35], list(range(-1, 36))])
def test_characters_come_back(classes):
    assert from_characters(as_characters(classes)).tolist() == classes and len(
        as_characters(classes)
    ) == len(classes)


def test_a_word_more_leaves_the_code_hash_and_an_operator_less_does_not(tmp_path, monkeypatch):
    import erc_moe
    (tmp_path / "a.py").write_text(
        '"Doc."\nfrom .b import g\ndef f(x):\n    "Doc."\n    return g(x) + 1\n')
    (tmp_path/"b.py").write_text("def g(x): return x\n")
    monkeypatch.setattr(erc_moe, "__file__", str(tmp_path/"__init__.py"))
    def now(): return code_hash("erc_moe.a")
    first = now()
    (tmp_path / "a.py").write_text(
        '"Another."\nfrom .b import g\n\ndef f(x):\n    # what it does\n    return g(x)   + 1\n'
    )
    assert now() == first
    (tmp_path/"b.py").write_text("def g(x): return -x\n")
    assert now() != first


def test_the_command_prints_what_is_on_record(capsys):
    records = str(ROOT/"results"/"reproduce")
    for name, word in (
        ("list", "mister_e/table2"), ("claims", "modularity"),
        ("numbers", "needs weights or data not at hand")):
        assert (
            main(["reproduce", name, "--results", records, "--show"]) == 0
            and word in capsys.readouterr().out)
    assert main(["reproduce", "mister_e/section4.5", "--results", records, "--show"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("iemocap", "meld", "monolithic", "strict", "test-selected", "67.8")
    )
    assert main(["reproduce", "choices/features", "--results", records, "--show"]) == 0
    assert "validation" in (out := capsys.readouterr().out) and "paper" not in out
    assert (
        main(["reproduce", "table2"]) == 1
        and "mister_e, sure, choices, protocols, " in capsys.readouterr().err)


def test_the_command_says_what_it_cannot_show(tmp_path, capsys):
    for argv in (["claims"], ["numbers"], ["mister_e/table2", "--show"]):
        assert main(["reproduce", *argv, "--results", str(tmp_path)]) == 1
        assert "nothing is on record" in capsys.readouterr().err
    for option in ("--seeds", "--workers"):
        assert main(["reproduce", "mister_e/table2", option, "0"]) == 2
        assert "not a whole number from 1 to" in capsys.readouterr().err


def test_the_command_that_makes_a_store_is_one_that_its_parser_takes():
    stores = {
        s
        for of in FEATURES.values()
        for sources in of.values()
        for source in sources.values()
        for s in source.split("+")
        if s.startswith("features/")}
    assert len(stores) > 20
    for store in stores:
        for command in made_by(store).split(" && "):
            program, *argv = shlex.split(command)
            if program == "make": continue
            # known options and values come before the help
            assert program == "erc_moe" and main([*argv, "--help"]) == 0
            assert {"--corpus", "--out"} <= {*argv}


def test_wrong_names_are_refused_with_the_right_ones():
    with pytest.raises(DataError, match="mister_e/table2"): find_experiments("table2")
    with pytest.raises(DataError, match="no model"):
        train_cell(Cell("nobody", "sample", {"text": "minilm"}), device="cpu")
    with pytest.raises(DataError, match="an option 'gama'"):
        train_cell(Cell("mister_e", "sample", {"text": "minilm"}, dict(gama=1)), device="cpu")


def test_every_claim_is_about_rows_that_are_run():
    prompted = set()    # a language model of seven billion parameters, by a command of its own
    for c in CLAIMS:
        for side in (c.better, c.worse):
            row = find_experiments(side.experiment)[0].row(side.row)
            if row.command: prompted.add(row.name)
            else: assert row.model in MODELS
    assert prompted == {"InstructERC", "InstructERC, LLaMA-3.1-8B"}
    assert len({(c.says, c.corpora) for c in CLAIMS}) == len(CLAIMS)


@cache
def sample_called(name):
    return replace(load_corpus("sample"), name=name, official=True)


def trained(cell):
    "All that a cell's training depends on, but the seed."
    config, training = configure(
        cell.model, sample_called(cell.corpus.partition("@")[0]), {m: 4 for m in cell.features},
        cell.preset, cell.changes)
    return json.dumps([
        asdict(config), asdict(training), cell.features, cell.protocol, cell.past, cell.teachers,
        cell.corpus], sort_keys=True)


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_no_claim_compares_a_training_with_itself(preset):
    made = [c for e in EXPERIMENTS.values() for c in claims_of(e)]
    for c in CLAIMS + made:
        sides = [
            (find_experiments(s.experiment)[0].row(s.row), s.expert) for s in (c.better, c.worse)]
        for corpus in c.corpora:
            better, worse = (
                (row.command or trained(row.cell(corpus, preset)), row.ensemble, expert)
                for row, expert in sides)
            assert better != worse, (c.says, corpus)


def test_what_the_preset_has_is_no_row_of_its_own(tmp_path):
    "Under the preset paper, lambda is 2 on IEMOCAP and 1 on MELD, which are rows as well."
    ledger, e = Ledger(tmp_path), EXPERIMENTS["mister_e/figure8b"]
    again = {("lambda 2", "iemocap"), ("lambda 1", "meld")}
    cells = {
        (row.name, corpus): row.cell(corpus, "paper") for row in e.rows for corpus in e.corpora}
    assert {k for k, cell in cells.items() if k[0] != "the preset" and trained(cell) == trained(
        cells["the preset", k[1]])} == again
    for cell in cells.values():
        ledger.add(dict(
            cell=cell.to_dict(), key=trained(cell), code="", feature_hash="", split_hash=""))
    assert results(e, ledger, "paper").keys() == cells.keys() - again
    assert max(r.at for r in e.rows if r.at is not None) > 2


def test_systems_of_the_papers_tables_are_run_beside_their_cited_numbers():
    from erc_moe.experiments.papers import SYSTEMS
    models = {r.model: r.name for r in SYSTEMS}
    run = {
        "mister_e/table2": {"hcam", "df_erc", "telme", "cfn_esa", "multiemo", "mmgat_emo",
                            "broad_mamba"},
        "mister_e/table3": {"hcam", "multiemo", "mmgat_emo"},
        "sure/table2": {"mmgcn", "mm_dfn", "joyful", "df_erc"}}
    cited = {
        "mister_e/table2": {"SMIN", "DER-GCN", "ELR-GNN"}, "mister_e/table3": set(),
        "sure/table2": {"MMPCGN", "MERC-GCN", "DialogueTRM", "MM-NodeFormer"}}
    for name, expected in run.items():
        e = EXPERIMENTS[name]
        rows = [r for r in e.rows if r.model in models]
        assert {r.model for r in rows} == expected
        assert {r.name for r in e.rows if r.model is None} == cited[name]
        for row in rows:
            assert {"iemocap", "meld"} <= row.paper.keys() <= {*e.corpora}
            assert row.name.partition(",")[0].lower() in models[row.model].lower()
            assert all(row.cell(c, seed=4) for c in e.corpora) and e.seeds == 5
            twins = [r for r in e.rows if r.name == row.name]
            assert len(twins) == 1
        assert e.row(e.reference).paper, "the paper's differences are drawn from it"
    features = {
        (r.model, r.features) for r in EXPERIMENTS["mister_e/table3"].rows if r.model in models}
    assert features == {(m, f) for m in run["mister_e/table3"] for f in ("frozen", "stage1")}
    spreads = {r.name: r.spread for r in EXPERIMENTS["mister_e/table2"].rows if r.spread}
    assert spreads["MultiEmo"] == dict(iemocap=2.0, meld=.5, mosi=.3) and "MMGAT-EMO" in spreads


def test_refit_stands_beside_strict_where_the_features_are_the_same():
    "The encoders of MELD and MOSI were tuned on the labels that a fold would hold out: no refit."
    refit = {c for c, r in EXPERIMENTS["protocols/table2"].cells() if r.protocol == "refit"}
    for name, corpora in (("mister_e/table2", {"iemocap"}), ("sure/table2", {"iemocap"})):
        shared = refit & {replace(c, protocol="refit") for c, _ in EXPERIMENTS[name].cells()}
        assert {(c.model, c.corpus) for c in shared} == {
            (m, c) for m in ("context_free", "sdt", "sure", "mister_e") for c in corpora
            if name == "sure/table2" or m != "sure"}
        assert {c.seed for c in shared} == {*range(5)}


def test_a_command_of_a_row_is_one_that_its_parser_takes():
    commands = {r.command for e in EXPERIMENTS.values() for r in e.rows if r.command}
    assert len(commands) == 2
    for command in commands:
        program, *argv = shlex.split(command)
        assert program == "erc_moe" and main([*argv, "--help"]) == 0


RECORDS = sorted((ROOT/"results"/"reproduce").glob("*/*.jsonl"))
assert RECORDS

@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_committed_records_are_whole(path):
    """Every line has what a result must have, its scores are those of its predictions, and none
    carries a machine's path."""
    ledger = Ledger(ROOT/"results"/"reproduce")
    for line in path.read_text().splitlines():
        assert str(ROOT) not in line and "/tmp" not in line
        r = json.loads(line)
        for key in (
            "cell", "key", "split_hash", "feature_hash", "code", "curve", "config", "versions",
            "device", "code_revision", "seconds"):
            assert r.get(key), (path.name, key)
        scored = {"refit": ("strict",), "released": ("test_selected",)}.get(
            r["cell"].get("protocol"), ("strict", "test_selected"))
        assert {"strict", "test_selected"} & r.keys() == {*scored}, path.name
        truth = ledger.truth(r["cell"]["corpus"])
        assert truth["split_hash"] == r["split_hash"] and not r["code_revision"].endswith("+")
        y = from_characters("".join(truth["test"].values()))
        for protocol in scored:
            assert f1_score(
                y[y >= 0], from_characters(r[protocol]["predicted"])[y >= 0], average="weighted"
            ) == pytest.approx(r[protocol]["test"], abs=1e-5)
        assert ledger.find(Cell(**r["cell"])) == r


def test_committed_records_are_of_declared_rows():
    declared = {c.identity for e in EXPERIMENTS.values() for c, _ in e.cells()} | {
        c.identity for e in EXPERIMENTS.values() for c, _ in e.cells("paper")}
    # a rate that was among the best two before the search was made again
    search = EXPERIMENTS["choices/learning_rate"]
    declared |= {c.identity for c, _ in search.cells(seeds=EXPERIMENTS[
        "choices/learning_rate_finals"].seeds)}
    stray = [
        line[:120]
        for p in RECORDS
        for line in p.read_text().splitlines()
        if Cell(**json.loads(line)["cell"]).identity not in declared]
    assert not stray, "a row that is no longer declared has records"


def test_no_two_models_of_the_library_share_a_training():
    "A training's key knows code and configuration, not the class: no two models have both alike."
    from erc_moe.experiments import code_of
    from erc_moe.models import MODELS
    known = {}
    for name, entry in MODELS.items():
        if entry.model.__module__.partition(".")[0] != "erc_moe": continue
        for corpus in ("iemocap", "meld"):
            widths = {"text": 8, "speech": 4}
            config = entry.model_config("cpu", corpus, widths, ["a", "b"])
            of = code_of(name), json.dumps(asdict(config), sort_keys=True), corpus
            assert of not in known, f"{name} and {known[of]} on {corpus}"
            known[of] = name
