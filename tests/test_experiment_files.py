"""Experiments that files outside the package declare: trained, kept, printed and judged by the same
command as the papers'."""
import json

import pytest

from erc_moe.cli import main
from erc_moe.experiments import Ledger
from erc_moe.experiments.declare import EXPERIMENTS, FEATURES
from erc_moe.experiments.files import find_experiments

AS_PYTHON = """
from erc_moe.experiments import Experiment, Row, declare
from erc_moe.experiments.declare import FEATURES
FEATURES["said"] = {"sample": {"text": "minilm", "speech": "egemaps"}}
quick = dict(epochs=2, hidden=8)
declare(Experiment(
    "mine/words", "Do words suffice?", "our own", ("sample",), reference="all", seeds=2,
    rows=(
        Row("all", "late_fusion", "said", changes=quick),
        Row("words", "late_fusion", "said", ("text",), changes=quick)),
    claims=(dict(says="the voice adds to the words", better="all", worse="words"),)))
"""
AS_YAML = """
name: mine/words
title: Do words suffice?
source: our own
corpora: [sample]
seeds: 2
reference: all
features: {said: {sample: {text: minilm, speech: egemaps}}}
rows:
- {name: all, model: late_fusion, features: said, changes: {epochs: 2, hidden: 8}}
- name: words
  model: late_fusion
  features: said
  modalities: [text]
  changes: {epochs: 2, hidden: 8}
claims:
- {says: the voice adds to the words, better: all, worse: words}
"""


@pytest.fixture(autouse=True)
def forgotten():
    yield
    EXPERIMENTS.pop("mine/words", None)
    FEATURES.pop("said", None)


def typed(tmp_path, name, *more):
    return main([
        "reproduce", str(tmp_path/name), *more, "--results", str(tmp_path/"records"), "--workers",
        "1", "--device", "cpu"])


def test_python_and_yaml_declare_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"mine.py").write_text(AS_PYTHON)
    (tmp_path/"mine.yaml").write_text(AS_YAML)
    assert typed(tmp_path, "mine.py") == 0
    said = capsys.readouterr().out
    assert "mine/words: Do words suffice? (our own)" in said and "4 to do" in said
    kept = {json.dumps(r["cell"], sort_keys=True): r["key"] for r in Ledger(tmp_path/"records")}
    assert len(kept) == 4
    assert typed(tmp_path, "mine.py", "claims") == 0
    judged = capsys.readouterr().out
    assert "the voice adds to the words" in judged and "MiSTER-E" not in judged
    forgotten = EXPERIMENTS.pop("mine/words"), FEATURES.pop("said")
    assert all(forgotten)
    assert typed(tmp_path, "mine.yaml") == 0
    assert "4 on record, 0 to do" in capsys.readouterr().out
    assert typed(tmp_path, "mine.yaml", "claims") == 0
    assert capsys.readouterr().out == judged


@pytest.mark.parametrize("old, new, said", [
    ('better="all"', 'better="both"', "mine/words claims"),
    ('says="the voice adds to the words", ', "", "A claim has says, better and worse"),
    ("declare(Exp", "print(Exp", "declares no experiment"),
    ("quick = dict(epochs=2, hidden=8)", "quick = dict(", "cannot be run (SyntaxError")])
def test_a_wrong_declaration_is_one_line(tmp_path, capsys, old, new, said):
    assert AS_PYTHON.count(old) == 1
    (tmp_path/"wrong.py").write_text(AS_PYTHON.replace(old, new))
    assert typed(tmp_path, "wrong.py") == 1
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_claims_of_a_paper_alone(capsys):
    assert main(["reproduce", "sure/table3", "claims"]) in (0, 1)    # 1: nothing is on record yet
    said = capsys.readouterr()
    assert "iterative reasoning helps" in said.out or "nothing is on record" in said.err
    assert "modularity" not in said.out


def test_names_that_are_taken(tmp_path, capsys, monkeypatch):
    """A file may declare its experiment again and again, but no other's, and none of the
    library's."""
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("mine.yaml", AS_YAML), ("other.yaml", AS_YAML), ("other.py", AS_PYTHON),
        ("taken.yaml", AS_YAML.replace("mine/words", "mister_e/table2")),
        ("twice.yaml", "\n".join(["- " + "\n  ".join(AS_YAML.strip().splitlines())]*2)),
    ): (tmp_path/name).write_text(text)
    before = EXPERIMENTS["mister_e/table2"]
    for _ in range(2): assert find_experiments("mine.yaml")[0].name == "mine/words"
    for name in ("other.yaml", "other.py"):
        assert typed(tmp_path, name) == 1
        assert "declares mine/words, which is an experiment already" in capsys.readouterr().err
    assert typed(tmp_path, "taken.yaml") == 1 and EXPERIMENTS["mister_e/table2"] is before
    EXPERIMENTS.pop("mine/words")
    assert typed(tmp_path, "twice.yaml") == 1
    assert "declares mine/words twice" in capsys.readouterr().err


def test_one_broken_model_keeps_no_other_row_from_its_turn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"broken.py").write_text(
        "from erc_moe.baselines import ContextFree\n"
        "class Broken(ContextFree):\n"
        "    def forward(self, batch): return super().forward(batch).logits\n"
        "class Raises(ContextFree):\n"
        "    def forward(self, batch): return 1/0\n")
    (tmp_path/"mine.yaml").write_text(AS_YAML.partition("rows:")[0].replace(
        "reference: all", "").replace("seeds: 2", "seeds: 1") + "rows:\n" + "".join(
        f"- {{name: {name}, model: {model}, features: said, changes: {{epochs: 1}}}}\n"
        for name, model in (("a", "broken.py:Broken"), ("b", "broken.py:Raises"),
                            ("c", "context_free"))))
    assert typed(tmp_path, "mine.yaml") == 1
    said = capsys.readouterr()
    assert "the model broken.py:Broken is not what is expected (AttributeError" in said.out
    assert "broken.py, line 5: ZeroDivisionError: division by zero. Correct it" in said.out
    assert "context_free sample" in said.out and "fault of erc_moe" not in said.out + said.err
    record, = Ledger(tmp_path/"records")
    assert record["cell"]["model"] == "context_free"
    assert typed(tmp_path, "mine.yaml", "numbers") == 0
    assert "no numbers of a paper are declared there" in capsys.readouterr().out


def test_nothing_to_train_is_no_success(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"mine.yaml").write_text(AS_YAML.replace("minilm", "features/none"))
    assert typed(tmp_path, "mine.yaml", "--row", "words") == 1
    assert "nothing of it can be trained: left out for want of" in capsys.readouterr().err
