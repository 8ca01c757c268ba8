"""What a user brings in files of their own: a corpus, a model, experiments; through training, the
ledger and its workers, without a change of the package."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from erc_moe.cli import main
from erc_moe.conversations import DataError
from erc_moe.corpora import load_corpus
from erc_moe.corpora.registry import OWN_CORPORA, register_corpus
from erc_moe.experiments.ledger import Ledger
from erc_moe.experiments.run import _own_corpora
from erc_moe.training import train

READER = '''
from erc_moe.corpora import Corpus, FeatureTable, load_corpus, register_corpus
import numpy as np
def read(data=None, many: int = 4):
    sample = load_corpus("sample")
    splits = {s: cs[:many] for s, cs in sample.splits.items()}
    ids = [u.id for cs in splits.values() for c in cs for u in c.utterances]
    letters = np.array([[len(i), ord(i[-1])] for i in ids], np.float32)
    return Corpus("few", sample.labels, splits, arrays={"letters": FeatureTable("letters", ids, letters)})
few = register_corpus("few", read, features={"text": "letters"})
'''
EXPERIMENT = '''
from erc_moe.experiments import Experiment, Row, declare, reproduce
declare(Experiment("mine/one", "Does it run?", "", ("{corpus}",), seeds=2, rows=(
    Row("context-free", "context_free", changes=dict(epochs=1, hidden=4)),)))
if __name__ == "__main__":
    from erc_moe.experiments import EXPERIMENTS
    reproduce([EXPERIMENTS["mine/one"]], results="{folder}/results", work="{folder}/work",
              workers=2, device="cpu")
'''


@pytest.fixture
def reader(tmp_path):
    (tmp_path/"my_corpus.py").write_text(READER)
    yield f"{tmp_path}/my_corpus.py:few"
    OWN_CORPORA.clear()


def test_a_corpus_of_ones_own_brings_its_features(reader, tmp_path):
    run = train(
        "context_free", reader, seeds=1, out=tmp_path/"run", changes=dict(epochs=1, hidden=4),
        device="cpu", progress=False)
    assert run.summary["corpus"] == "few" and run.summary["features"]["widths"] == {"text": 2}
    assert load_corpus("few", many=2).split_hash != load_corpus(reader).split_hash
    with pytest.raises(DataError, match="no features were asked for"):
        register_corpus("bare", OWN_CORPORA["few"].reader)
        train("context_free", "bare", seeds=1, device="cpu", progress=False)


def test_workers_know_it_even_from_standard_input(reader, tmp_path):
    program = EXPERIMENT.format(corpus=reader, folder=tmp_path)
    root = Path(__file__).resolve().parent.parent
    told = subprocess.run(
        [sys.executable, "-"], input=program, text=True, capture_output=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-1000:]
    found = [*Ledger(tmp_path/"results")]
    assert {r["cell"]["seed"] for r in found} == {0, 1}
    assert (tmp_path/"results/corpora/my_corpus.py-few.json").is_file()


def test_a_reader_from_a_prompt_is_told(monkeypatch):
    def read(): ...
    read.__module__ = "__main__"
    register_corpus("typed", read)
    with pytest.raises(DataError, match="the reader of typed was defined at a prompt.*FILE.py"):
        _own_corpora({"typed", "sample"})
    OWN_CORPORA.clear()


def test_runs_are_compared_and_a_table_of_ones_own_is_split(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--corpus", reader, "--seeds", "2", "--set", "epochs=1", "--device", "cpu"]
    for name, hidden in (("narrow", 2), ("wide", 16)):
        assert main([
            "train", "--model", "context_free", *quick, "--set", f"hidden={hidden}",
            "--out", name]) == 0
    assert main(["compare", "narrow", "wide", "--picture", "seen.svg"]) == 0
    said = capsys.readouterr().out
    assert "wide" in said.splitlines()[-2] and Path("seen.svg").read_bytes()[:5] == b"<?xml"
    assert main(["compare", "narrow"]) == 1 and main(["compare", "narrow", "gone"]) == 1
    assert "holds no summary.json" in capsys.readouterr().err
    Path("mine.yaml").write_text(f"""
name: mine/parts
corpora: ["{reader}"]
seeds: 2
rows:
- {{name: small, model: context_free, changes: {{epochs: 1, hidden: 2}}}}
- {{name: large, model: context_free, changes: {{epochs: 1, hidden: 8}}}}
""")
    part = ["reproduce", "mine.yaml", "--workers", "1", "--device", "cpu"]
    assert main([*part, "--row", "small", "--seed", "1"]) == 0
    found, = Ledger("results/reproduce")
    assert found["cell"]["seed"] == 1 and found["cell"]["changes"]["hidden"] == 2
    capsys.readouterr()
    assert main([*part, "--row", "tiny"]) == 1
    assert "there is no row tiny to train. There are small, large." in capsys.readouterr().err
