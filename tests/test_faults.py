"""A process that is killed, or a disk that is full, at any write of a run's life: the same call
carries on to the same bits. Every write of the library appears through one function, which fails
here on purpose."""
import errno
import json
import os
import random
import signal
import sys
import time
import traceback

import numpy as np
import pytest
import torch
from test_training import make_corpus, run_tiny
from test_tuning import encoder, table  # noqa: F401 (fixtures)

from erc_moe import files
from erc_moe.conversations import DataError
from erc_moe.corpora import load_corpus
from erc_moe.features import Extractor, FeatureStore, extract

FAULTS = ("killed before", "killed after", "disk full")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(work, at=0, fault=None, seconds=None):
    """`work` in a process of its own, which ends or finds its disk full at its write number `at`,
    or is killed after some seconds; its exit status and how many writes it made."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        status, count, appear = 0, 0, files._appear
        def faulty(partial, path):
            nonlocal count
            count += 1
            if fault == "killed before" and count == at: os._exit(9)
            if fault == "disk full" and count >= at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            appear(partial, path)
            if fault == "killed after" and count == at: os._exit(9)
        files._appear = faulty
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_num_threads(1)
        try: work()
        except BaseException as e:
            status = 28 if getattr(e, "errno", None) == errno.ENOSPC else 1
            count = traceback.format_exc() if status == 1 else count
        os.write(write, str(count).encode()[-4000:])
        os._exit(status)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    said = os.fdopen(read, "rb").read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def check_every_write(work, result, folder, step=1):
    "`work(place)` fails at its writes 1, 1 + step, ... in every way, and then is called again."
    status, writes = in_child(lambda: work(folder/"whole"))
    assert status == 0, writes
    whole, tried = result(folder/"whole"), 0
    for at in range(1, int(writes) + 1, step):
        for fault in FAULTS:
            place = folder/f"{at}-{fault.replace(' ', '-')}"
            status, said = in_child(lambda: work(place), at, fault)
            assert status == (28 if fault == "disk full" else 9), (at, fault, said)
            status, said = in_child(lambda: work(place))
            assert status == 0, (at, fault, said)
            assert result(place) == whole, (at, fault)
            tried += 1
    assert tried >= 3
    return tried


def run_bits(folder):
    "What must not depend on how often a run was stopped."
    kept = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.suffix in (".safetensors", ".csv") or p.name in ("folds.json", "pipeline.json")}
    summary = json.loads((folder/"summary.json").read_text())
    assert not [p for p in folder.rglob("*.partial")]
    return kept, summary["test"], summary["validation"], summary["seeds"]


def store_bits(folder):
    store = FeatureStore(folder)
    values, present = store.lookup(sorted({*store.ids, *store.absent}))
    return sorted(store.ids), store.absent, values.tobytes(), present.tobytes(), store.made_from


@pytest.fixture(scope="module")
def corpus(): return make_corpus()


def train_tiny(corpus, place):
    run_tiny(
        corpus, place, seeds=2, changes=dict(epochs=3, ema=.9), checkpoint_seconds=0,
        cache=place.parent/"cache")


def measure(texts): return np.array([[len(t), t.count("e")] for t in texts], np.float32)


def extract_sample(place):
    turns = [u for c in load_corpus("sample").splits["test"][:4] for u in c.utterances]
    items, content = {u.id: u.text for u in turns}, {u.id: f"text:{len(u.text)}" for u in turns}
    extract(
        FeatureStore(place, Extractor("length", "1", 2)), items, measure, rows=10, content=content)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_survives_every_write(corpus, tmp_path, step):
    check_every_write(lambda place: train_tiny(corpus, place), run_bits, tmp_path, step)


def test_an_extraction_survives_every_write(tmp_path):
    check_every_write(extract_sample, store_bits, tmp_path)


@pytest.mark.slow
def test_a_tuning_and_its_embedding_survive_every_write(encoder, table, tmp_path):  # noqa: F811
    from erc_moe.training.tuning import TunedRun, embed, tune
    corpus = load_corpus(table)
    def work(place):
        tune("text", str(encoder), corpus, seeds=1, folds=2, out=place, device="cpu",
             checkpoint_seconds=0, progress=False,
             changes=dict(width=8, frozen_layers=0, epochs=1, batch_size=8))
    check_every_write(work, run_bits, tmp_path/"tune", 3)
    run = TunedRun(tmp_path/"tune"/"whole")
    check_every_write(
        lambda place: embed(run, corpus, place, device="cpu", chunk=6), store_bits,
        tmp_path/"embed")


@pytest.mark.slow
def test_a_reproduction_survives_every_write(tmp_path):
    from erc_moe.experiments import reproduce
    from test_experiments import TABLE, scores
    def work(place):
        return reproduce([TABLE], results=place/"records", workers=1, seeds=1, device="cpu",
                         work=place/"work", tell=lambda line: None)
    def result(place):
        from erc_moe.experiments import Ledger
        found = Ledger(place/"records")
        return {c.identity: found.find(c)["strict"] for c, _ in TABLE.cells(seeds=1)}
    check_every_write(work, result, tmp_path, 3)


def test_a_kill_at_once_locks_no_folder(corpus, tmp_path):
    "Also what an earlier version left: a folder that holds nothing but features."
    (tmp_path/"run"/"features").mkdir(parents=True)
    train_tiny(corpus, tmp_path/"run")
    assert run_bits(tmp_path/"run")[3] == [0, 1]


@pytest.mark.slow
def test_two_hundred_random_kills(corpus, tmp_path):
    status, said = in_child(lambda: train_tiny(corpus, tmp_path/"whole"))
    assert status == 0, said
    whole, kills, rng = run_bits(tmp_path/"whole"), 0, random.Random(0)
    while kills < 200:
        place = tmp_path/f"run-{kills}"
        for _ in range(8):
            status, said = in_child(
                lambda: train_tiny(corpus, place), seconds=rng.uniform(0, 1.5))
            assert status in (0, -signal.SIGKILL), said
            kills += status != 0
        status, said = in_child(lambda: train_tiny(corpus, place))
        assert status == 0, said
        assert run_bits(place) == whole
    print(f"{kills} kills")


def test_two_processes_in_one_folder_lose_no_seed(corpus, tmp_path):
    place = tmp_path/"run"
    train_seeds = lambda seeds: run_tiny(
        corpus, place, seeds=seeds, changes=dict(epochs=2), cache=tmp_path/"cache")
    pids = []
    for seeds in ([0, 1, 2], [2, 3]):
        if not (pid := os.fork()):
            sys.stdout = sys.stderr = open(os.devnull, "w")
            torch.set_num_threads(1)
            try: train_seeds(seeds)
            except BaseException: os._exit(1)
            os._exit(0)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0, 0]
    assert train_seeds([0]).seeds == [0, 1, 2, 3]


@pytest.mark.parametrize("name,fix", [
    ("summary.json", "Repeat the command"), ("seed-0/result.json", "Delete it"),
    ("seed-0/log.jsonl", "Delete .*result.json"),
    ("seed-0/predictions.csv", "Delete .*result.json"),
    ("seed-0/model/config.json", "Delete .*result.json"),
    ("settings.json", "Choose another folder"),
    ("features/pipeline.json", "Repeat the command"),
    ("features/scaling.safetensors", "Repeat the command")])
def test_a_damaged_file_is_named_with_what_to_do(corpus, tmp_path, name, fix):
    from erc_moe.training import Run
    from erc_moe.training.folder import read_result
    place = tmp_path/"run"
    train_tiny(corpus, place)
    path = place/name
    path.write_bytes(b"{\xff")
    def use():
        if name == "settings.json": return train_tiny(corpus, place)
        run = Run(place)
        read_result(place/"seed-0")
        return run.log(0), run.predictions(0), run.model(0), run.pipeline
    with pytest.raises(DataError, match=f"{path.name} .*{fix}"): use()
    if "Repeat" in fix:
        train_tiny(corpus, place)
        use()


def test_a_damaged_checkpoint_costs_its_seed_alone(corpus, tmp_path):
    place = tmp_path/"run"
    assert in_child(lambda: train_tiny(corpus, place), 9, "killed before")[0] == 9
    checkpoint = place/"seed-0"/"checkpoint.pt"
    assert checkpoint.exists()
    for harm in (lambda data: data[:100], lambda data: b"", lambda data: b"PK" + data[2:50]):
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(harm(whole))
        with pytest.raises(DataError, match="checkpoint.pt is damaged.*Delete it"):
            train_tiny(corpus, place)
        checkpoint.write_bytes(whole)
    checkpoint.unlink()
    train_tiny(corpus, place)
