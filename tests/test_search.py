"""The search over a model's settings: on validation alone, on record, resumable, for any model."""
import json
import sys
from pathlib import Path

import pytest

from erc_moe.cli import main
from erc_moe.experiments import Ledger
from erc_moe.experiments import search as searching
from erc_moe.experiments.search import SPACE, search

MODEL = """
from dataclasses import dataclass
from torch import nn
from erc_moe.base import ConversationModel, ModelConfig, ModelOutput
from erc_moe.ragged import Layout

@dataclass
class SayConfig(ModelConfig):
    hidden: int = 8
    model: str = "say"

class Say(ConversationModel):
    "One hidden layer for each utterance."
    config_class = SayConfig
    def __init__(self, config):
        super().__init__(config)
        c = self.config
        self.net = nn.Sequential(
            nn.Linear(c.widths["text"], c.hidden), nn.ReLU(), nn.Linear(c.hidden, c.classes))
    def forward(self, batch):
        layout = Layout(batch.mask)
        return ModelOutput(layout.padded(self.net(self.observed(batch, layout)[1][0])))
"""


def small(folder, trials, **options):
    return search(
        "context_free", "sample", {"text": "minilm"}, trials, folder/"search",
        changes=["epochs=1", "hidden=8"], results=folder/"records", device="cpu",
        tell=lambda line: None, **options)


def test_a_search_that_was_killed_is_as_long_as_one_that_was_not(tmp_path, monkeypatch):
    calls, train = [], searching.run_trial
    def killed(*args):
        calls.append(args[0])
        if len(calls) == 3: raise KeyboardInterrupt
        return train(*args)
    monkeypatch.setattr(searching, "run_trial", killed)
    with pytest.raises(KeyboardInterrupt): small(tmp_path, 4)
    assert len([*Ledger(tmp_path/"records")]) == 2
    found = small(tmp_path, 4)
    assert len(found) == len([*Ledger(tmp_path/"records")]) == 4 and len(calls) == 5
    assert calls[2] == calls[3]    # what was cut off is tried again, with the same settings
    assert len(small(tmp_path, 4)) == 4 and len(calls) == 5


def test_no_trial_knows_the_test_split(tmp_path):
    found = small(tmp_path, 3)
    for r in Ledger(tmp_path/"records"):
        assert not {"strict", "test_selected"} & r.keys() and "predicted" not in json.dumps(r)
        assert max(r["curve"]) == pytest.approx(r["validation"], abs=1e-4)
    assert {*SPACE} <= {*found} and found.validation.is_monotonic_decreasing
    assert all(SPACE["lr"][0] <= lr <= SPACE["lr"][1] for lr in found.lr)


def test_a_model_of_ones_own_is_searched_and_trained_with_the_best(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("say.py").write_text(MODEL)
    assert main(
        "tune-search --model say.py:Say --corpus sample --text minilm --trials 2 --set epochs=1 "
        "--device cpu --out found".split()) == 0
    assert "trial 1: lr " in capsys.readouterr().out
    assert (tmp_path/"results/search/cpu/say.py-Say-sample.jsonl").exists()
    assert main(
        "train --config found/config.yaml --seeds 1 --device cpu --out run".split()) == 0
    best = max(Ledger("results/search"), key=lambda r: r["validation"])
    said = json.loads(Path("run/settings.json").read_text())["config"]
    assert said["training"] == best["config"]["training"]
    assert said["model"]["hidden"] == best["config"]["model"]["hidden"]


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(
        f"tune-search --model sdt --corpus sample --text minilm --trials 2 --out {tmp_path}/s"
        .split()) == 1
    assert capsys.readouterr().err.strip() == (
        "erc_moe tune-search: the package optuna is not installed. Install it: pip install "
        "'erc_moe[search]'")
