"""A process that is killed, or a disk that is full, at any write of a run's life: the same call
carries on to the same bits. Every write of the library appears through one function, which fails
here on purpose."""
import errno
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from functools import cache

import numpy as np
import pytest
import torch
from tqdm import tqdm
from test_download import CONTENT, FILE, server  # noqa: F401 (a fixture)
from test_importers import entries_of, laid_out, layout, small_corpus, write
from test_training import make_corpus, run_tiny
from test_tuning import encoder, table  # noqa: F401 (fixtures)

from erc_moe import files
from erc_moe.code_hashes import code_hash
from erc_moe.conversations import DataError
from erc_moe.corpora import load_corpus
from erc_moe.corpora.download import fetch
from erc_moe.features import Extractor, FeatureStore, extract, import_features
from erc_moe.models import find_model

FAULTS = ("killed before", "killed after", "disk full")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def begin(work, at=0, fault=None):
    """`work` in a process of its own, which ends or finds its disk full at its write number `at`;
    for `end`."""
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
        # tqdm's is one for all forks: who is killed while he holds it stops the others
        tqdm.set_lock(threading.RLock())
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_num_threads(1)
        try: work()
        except BaseException as e:
            status = 28 if getattr(e, "errno", None) == errno.ENOSPC else 1
            count = traceback.format_exc() if status == 1 else count
        os.write(write, str(count).encode()[-4000:])
        os._exit(status)
    os.close(write)
    return pid, read


def end(pid, read):
    "The exit status, and how many writes were made, or the traceback."
    said = os.fdopen(read, "rb").read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def in_child(work, at=0, fault=None): return end(*begin(work, at, fault))


def killed_after(seconds, work):
    pid, read = begin(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return end(pid, read)


# What is stopped, and what must come out of it whole

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


def import_bits(folder):
    record = (folder/"import.json").read_bytes()
    assert not [*folder.glob("*.partial")]
    return record, {m: store_bits(folder/m) for m in json.loads(record)["widths"]}


@pytest.fixture(scope="module")
def corpus():
    for model in ("tiny", "mister_e"):      # hashed once for all
        code_hash(find_model(model).model.__module__)
    return make_corpus()


def train_tiny(corpus, place, seeds=2):
    run_tiny(
        corpus, place, seeds=seeds, changes=dict(epochs=3, ema=.9), checkpoint_seconds=0,
        cache=place.parent/"cache")


def measure(texts): return np.array([[len(t), t.count("e")] for t in texts], np.float32)


def extract_sample(place):
    turns = [u for c in load_corpus("sample").splits["test"][:4] for u in c.utterances]
    items, content = {u.id: u.text for u in turns}, {u.id: f"text:{len(u.text)}" for u in turns}
    extract(
        FeatureStore(place, Extractor("length", "1", 2)), items, measure, rows=10, content=content)


@pytest.fixture(scope="module")
def lives(corpus, encoder, table, tmp_path_factory):  # noqa: F811
    "Command -> (its work in a folder, what must come out)."
    from erc_moe.experiments import Ledger, reproduce
    from erc_moe.training.tuning import TunedRun, embed, tune
    from test_experiments import TABLE
    own, base = load_corpus(table), tmp_path_factory.mktemp("lives")

    def tune_tiny(place):
        tune("text", str(encoder), own, seeds=1, folds=2, out=place, device="cpu",
             checkpoint_seconds=0, progress=False,
             changes=dict(width=8, frozen_layers=0, epochs=1, batch_size=8))

    @cache
    def tuned():
        status, said = in_child(lambda: tune_tiny(base/"tuned"))
        assert status == 0, said
        return TunedRun(base/"tuned")

    def embed_tiny(place): embed(tuned(), own, place, device="cpu", chunk=6)

    def reproduce_tiny(place):
        reproduce([TABLE], results=place/"records", workers=1, seeds=1, device="cpu",
                  work=place/"work", tell=lambda line: None)

    def scores(place):
        found = Ledger(place/"records")
        return {c.identity: found.find(c)["strict"] for c, _ in TABLE.cells(seeds=1)}

    features = small_corpus("iemocap")
    pickled = write(base/"f.pkl", laid_out(entries_of(features), layout("sdt-iemocap")))
    def of(name):
        if name == "embed": tuned()
        return dict(
            train=(lambda place: train_tiny(corpus, place), run_bits),
            tune=(tune_tiny, run_bits), embed=(embed_tiny, store_bits),
            extract=(extract_sample, store_bits), reproduce=(reproduce_tiny, scores),
            **{"import": (lambda place: import_features(pickled, features, place), import_bits)}
        )[name]
    return of


def run_whole(work, result, folder):
    "What comes out of an undisturbed run, its writes, and its seconds."
    for place in ("first", "whole"):     # the first fills caches, so that all others write alike
        began = time.monotonic()
        status, writes = in_child(lambda: work(folder/place))
        assert status == 0, writes
    return result(folder/"whole"), int(writes), time.monotonic() - began


SLOW = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name,step", [
    ("train", 7), ("extract", 1), ("import", 1), SLOW("train", 1), SLOW("tune", 1),
    SLOW("embed", 1), SLOW("reproduce", 1)])
def test_every_write(lives, tmp_path, name, step):
    "The work fails at its writes 1, 1 + step, ... in every way, and then is called again."
    work, result = lives(name)
    whole, writes, _ = run_whole(work, result, tmp_path)
    tried = 0
    for at in range(1, writes + 1, step):
        for fault in FAULTS:
            place = tmp_path/f"{at}-{fault.replace(' ', '-')}"
            status, said = in_child(lambda: work(place), at, fault)
            assert status == (28 if fault == "disk full" else 9), (at, fault, said)
            status, said = in_child(lambda: work(place))
            assert status == 0, (at, fault, said)
            assert result(place) == whole, (at, fault)
            tried += 1
    assert tried >= 3
    print(f"{name}: {tried} faults at {writes} writes")


@pytest.mark.parametrize("name,kills", [
    ("extract", 5), SLOW("train", 200), SLOW("tune", 40), SLOW("embed", 40), SLOW("extract", 40),
    SLOW("reproduce", 40), SLOW("import", 40)])
def test_random_kills(lives, tmp_path, name, kills):
    work, result = lives(name)
    whole, _, seconds = run_whole(work, result, tmp_path)
    done, runs, rng = 0, 0, random.Random(0)
    while done < kills:
        place, runs = tmp_path/f"run-{runs}", runs + 1
        for _ in range(8):
            status, said = killed_after(rng.uniform(0, seconds), lambda: work(place))
            assert status in (0, -signal.SIGKILL), said
            done += status != 0
        status, said = in_child(lambda: work(place))
        assert status == 0, said
        assert result(place) == whole
    print(f"{name}: {done} kills in {runs} runs")


def test_a_kill_at_once_locks_no_folder(corpus, tmp_path):
    "Also what an earlier version left: a folder that holds nothing but features."
    (tmp_path/"run"/"features").mkdir(parents=True)
    train_tiny(corpus, tmp_path/"run")
    assert run_bits(tmp_path/"run")[3] == [0, 1]


def at_once(*works):
    "All of them in processes of their own, at the same time."
    for status, said in [end(*started) for started in [begin(work) for work in works]]:
        assert status == 0, said


@pytest.mark.parametrize("name,tries", [
    ("embed", 1), ("import", 1), SLOW("embed", 20), SLOW("import", 20), SLOW("extract", 20),
    SLOW("tune", 20), SLOW("reproduce", 20)])
def test_two_processes_in_one_folder(lives, tmp_path, name, tries):
    work, result = lives(name)
    whole, _, _ = run_whole(work, result, tmp_path)
    for i in range(tries):
        place = tmp_path/f"both-{i}"
        at_once(*[lambda: work(place)]*2)
        assert result(place) == whole


@pytest.mark.parametrize("tries", [1, SLOW(20)])
def test_two_processes_in_one_run_lose_no_seed(corpus, tmp_path, tries):
    train_tiny(corpus, tmp_path/"whole", [0, 1, 2, 3])
    for i in range(tries):
        place = tmp_path/f"run-{i}"
        at_once(*(lambda s=s: train_tiny(corpus, place, s) for s in ([0, 1, 2], [2, 3])))
        assert run_bits(place) == run_bits(tmp_path/"whole")


@pytest.mark.parametrize("tries", [1, SLOW(20)])
def test_two_processes_download_one_file(server, tmp_path, tries):  # noqa: F811
    for i in range(tries):
        server.limit = 100_000 if i % 2 else None         # breaks off: the next call goes on
        def download():
            for _ in range(4):
                try: return fetch(FILE, tmp_path/f"{i}", server.address)
                except DataError: pass
            raise AssertionError("it never came")
        at_once(download, download)
        assert (tmp_path/f"{i}"/"rows.bin").read_bytes() == CONTENT
        assert [p.name for p in (tmp_path/f"{i}").iterdir()] == ["rows.bin"]


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


def test_a_strangers_seeds_name_no_folder_outside(corpus, tmp_path):
    from erc_moe.training import Run
    train_tiny(corpus, tmp_path/"run")
    summary = json.loads((tmp_path/"run"/"summary.json").read_text())
    for seeds in (["../../x"], [-1], [True], [1.5]):
        (tmp_path/"run"/"summary.json").write_text(json.dumps(summary | {"seeds": seeds}))
        with pytest.raises(DataError, match="names the seed"): Run(tmp_path/"run")
