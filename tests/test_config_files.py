"""A training as a file: what a run writes repeats it, what is typed counts before the file, and a
fault is told with its line; and the trackers of a training."""
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from erc_moe.cli import main
from erc_moe.conversations import DataError
from erc_moe.training import Run, train
from test_training import make_corpus

FIELDS = """corpus: sample
text: minilm
model: context_free
seeds: [3]
set:
  epochs: 2
  hidden: 8
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder/"run.yaml").write_text(FIELDS)
    typed = ["train", "--config", str(folder/"run.yaml"), "--set", "epochs=3", "--device", "cpu"]
    assert main([*typed, "--out", str(folder/"first")]) == 0
    return folder


def test_what_is_typed_counts_before_the_file_and_the_file_before_defaults(first):
    said = json.loads((first/"first/settings.json").read_text())
    assert said["config"]["training"]["epochs"] == 3 and said["config"]["model"]["hidden"] == 8
    assert said["model"] == "context_free" and said["protocol"] == "strict"
    assert Run(first/"first").seeds == [3]


def test_a_runs_own_file_repeats_it(first):
    again = ["train", "--config", str(first/"first/config.yaml"), "--device", "cpu"]
    assert main([*again, "--out", str(first/"again")]) == 0
    one, two = (first/name for name in ("first", "again"))
    for file in ("settings.json", "config.yaml", "seed-3/predictions.csv"):
        assert (one/file).read_bytes() == (two/file).read_bytes(), file
    log = lambda at: [json.loads(l) | dict(seconds=0) for l in open(at/"seed-3/log.jsonl")]
    assert log(one) == log(two)


def test_a_default_that_is_typed_counts_before_the_file(first, capsys):
    (first/"paper.yaml").write_text(FIELDS + "preset: no_such\n")
    typed = ["train", "--config", str(first/"paper.yaml"), "--out", str(first/"p")]
    assert main(typed) == 1
    assert "no preset 'no_such'" in capsys.readouterr().err
    assert main([*typed, "--preset", "cpu", "--set", "epochs=1", "--device", "cpu"]) == 0


@pytest.mark.parametrize("old, new, line, said", [
    ("text:", "texts:", 2, "texts: there is no such option"),
    ("[3]", "[3, 3]", 4, "seeds: a seed stands twice"),
    ("epochs: 2", "epochs: many", 6, "epochs: epochs is 'many'"),
    ("epochs: 2", "epochs: 0", 6, "epochs: epochs is 0"),
    ("hidden: 8", "hiden: 8", 7, "hiden: cannot set"),
    ("hidden: 8", "epochs: 8", 7, "epochs stands there twice"),
    ("seeds: [3]", "seeds: [3", 5, "is no YAML")])
def test_a_fault_is_one_line_that_names_field_and_line(first, capsys, old, new, line, said):
    (first/"bad.yaml").write_text(FIELDS.replace(old, new))
    assert main(["train", "--config", str(first/"bad.yaml"), "--out", str(first/"bad")]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and f"bad.yaml, line {line}" in told
    assert not (first/"bad").exists()


def test_what_is_nowhere_is_asked_for(first, capsys):
    (first/"few.yaml").write_text("text: minilm\n")
    assert main(["train", "--config", str(first/"few.yaml")]) == 2
    assert "arguments are required: --corpus, --out" in capsys.readouterr().err


def test_python_writes_the_file_too_unless_the_corpus_has_no_name(tmp_path):
    changes, options = dict(epochs=1, hidden=8), dict(seeds=1, progress=False, device="cpu")
    train(
        "context_free", "sample", text="minilm", changes=changes, out=tmp_path/"named", **options)
    assert yaml.safe_load((tmp_path/"named/config.yaml").read_text())["set"] == changes
    train(
        "context_free", make_corpus(), text="words", changes=changes, out=tmp_path/"made",
        **options)
    assert not (tmp_path/"made/config.yaml").exists()


def follow(tmp_path, **options):
    return train(
        "context_free", make_corpus(), text="words", out=tmp_path/"run", seeds=[1],
        changes=dict(epochs=3, hidden=8), progress=False, device="cpu", **options)


def test_tensorboard_holds_every_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = follow(tmp_path, log_with="tensorboard")
    events = EventAccumulator(str(run.folder/"seed-1/tensorboard")).Reload()
    loss, = run.log()[0]["losses"]
    for name, value in (
        ("lr", lambda e: e["lr"]), ("validation/mixture", lambda e: e["validation"]["mixture"]),
        (f"losses/{loss}", lambda e: e["losses"][loss])
    ):
        told = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in told] == [1, 2, 3]
        assert [v for _, v in told] == pytest.approx([value(e) for e in run.log()], rel=1e-6)


WANDB = """
import json, os
def init(project, name, dir):
    told = lambda *of: open(os.environ["TOLD"], "a").write(json.dumps(of) + "\\n")
    told("init", project, name)
    run = type("Run", (), {})()
    run.log = lambda values, step=None, **_: told("log", step, sorted(values))
    run.finish = lambda: told("finish")
    run.config = config
    return run
class config:
    update = staticmethod(lambda values, **_: None)
"""


def test_wandb_is_told_the_same(tmp_path):
    "A package that only pretends: accelerate looks for it when it is imported."
    (tmp_path/"wandb.py").write_text(WANDB)
    (tmp_path/"wandb-0.1.dist-info").mkdir()
    (tmp_path/"wandb-0.1.dist-info/METADATA").write_text("Name: wandb\nVersion: 0.1\n")
    told = tmp_path/"told"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run(
        [
            sys.executable, "-m", "erc_moe", "train", "--corpus", "sample", "--text", "minilm",
            "--model", "context_free", "--set", "epochs=2", "--set", "hidden=8", "--seeds", "1",
            "--device", "cpu", "--log-with", "wandb", "--out", str(tmp_path/"mine")],
        env=os.environ | {"PYTHONPATH": path, "TOLD": str(told)}, check=True, capture_output=True)
    begun, *logged, ended = [json.loads(line) for line in told.read_text().splitlines()]
    assert begun == ["init", "erc_moe", "mine/seed-0"] and ended == ["finish"]
    assert [step for _, step, _ in logged] == [1, 2]
    names = logged[0][2]
    assert {"lr", "validation/mixture"} <= {*names} and any("losses/" in n for n in names)


def test_a_tracker_changes_no_number(tmp_path):
    plain, followed = follow(tmp_path/"a"), follow(tmp_path/"b", log_with="tensorboard")
    one, two = (run.model().state_dict() for run in (plain, followed))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_missing_tracker_is_named_before_anything_is_read(tmp_path, capsys):
    typed = ["train", "--corpus", "sample", "--text", "minilm", "--log-with", "wandb"]
    assert main([*typed, "--out", str(tmp_path/"run")]) == 1
    assert capsys.readouterr().err == (
        "erc_moe train: the package wandb is not installed. Install it: pip install wandb\n")
    assert not (tmp_path/"run").exists()
    with pytest.raises(DataError, match="tensorboard, wandb"): follow(tmp_path, log_with="mlflow")
