"Features that do not fit into memory: from a disk they are the same, and none of them is kept."
import subprocess
import sys

import numpy as np
import pytest
import torch

from erc_moe.conversations import Conversation, Utterance
from erc_moe.corpora.core import Corpus
from erc_moe.features.store import Extractor, FeatureStore, blank_rows
from erc_moe.predict import Predictor
from erc_moe.training import train

LABELS = ["neutral", "joy"]


def said(name, turns):
    return Conversation(name, [
        Utterance(f"{name}_{i}", "AB"[i % 2], f"{name} {i}", LABELS[i % 2]) for i in range(turns)])


def make_corpus(train=8, turns=6):
    return Corpus("made", LABELS, {
        s: [said(f"{s}{k}", turns + k % 3) for k in range(n)]
        for s, n in dict(train=train, validation=2, test=2).items()})


def make_store(folder, corpus, width, shard=10**9):
    rng, store = np.random.default_rng(0), FeatureStore(folder, Extractor("made", "1", width))
    ids = [u.id for c in corpus.conversations for u in c.utterances]
    for i in range(0, len(ids), shard):
        rows = rng.standard_normal((len(ids[i:i + shard]), width), np.float32)
        store.add(ids[i:i + shard], rows)
    return str(folder)


def trained(corpus, store, mapped, **changes):
    return train("bc_lstm", corpus, text=store, seeds=1, progress=False, device="cpu",
                 mapped=mapped, changes=dict(epochs=2) | changes)


@pytest.mark.parametrize("changes", [{}, dict(batch_utterances=20, buckets=True)])
def test_on_a_disk_a_training_is_the_same_to_the_bit(tmp_path, changes):
    corpus = make_corpus()
    store = make_store(tmp_path/"store", corpus, 9, shard=17)
    (tmp_path/"room").mkdir()
    runs = [trained(corpus, store, mapped, **changes) for mapped in (None, tmp_path/"room")]
    here, there = (run.model().state_dict() for run in runs)
    assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)
    assert runs[0].predictions().equals(runs[1].predictions())
    assert runs[0].summary["feature_hash"] == runs[1].summary["feature_hash"]
    assert not [*(tmp_path/"room").iterdir()]        # and nothing is left there


def test_predictions_in_parts_are_those_of_the_whole(tmp_path):
    corpus = make_corpus()
    predictor = Predictor.of_run(trained(corpus, make_store(tmp_path/"store", corpus, 9), None))
    whole, read = predictor.predict(corpus), []

    def one_by_one():
        for c in corpus.conversations: read.append(c.id); yield c
    parts = predictor.predict_parts(one_by_one(), utterances=20)
    first = next(parts)
    assert len(first) <= 20 and len(read) < len(corpus.conversations)     # no further than needed
    parts = [first, *parts]
    assert [c.id for p in parts for c in p.conversations] == read
    assert len(parts) > 3 and all(len(p) <= 20 for p in parts)
    together = np.concatenate([p.probabilities for p in parts])
    assert np.allclose(together, whole.probabilities, atol=1e-6)
    longest = predictor.predict_parts([corpus.splits["train"][2]], utterances=3)
    assert [len(p) for p in longest] == [8]         # one is never cut


def test_a_disk_without_room_says_so_before_the_training(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"): blank_rows(3, 2, tmp_path)


IN_LITTLE_MEMORY = """
import resource, sys
sys.path.insert(0, "tests")
from test_larger_than_memory import Predictor, make_corpus, trained
store, mapped, room = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
corpus = make_corpus(train=900, turns=20)
trained(make_corpus(), store, None, epochs=1)       # what is loaded when it is needed first
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])*1024
resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
run = trained(corpus, store, mapped, epochs=1, batch_size=32, hidden=8)
for part in Predictor.of_run(run).predict_parts(corpus.conversations, utterances=1000):
    assert len(part)
print("trained")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process' own memory")
def test_a_corpus_is_trained_on_and_predicted_in_less_memory_than_its_features_take(tmp_path):
    corpus, width = make_corpus(train=900, turns=20), 2500
    features = sum(map(len, corpus.conversations))*width*4
    room = features*2//3
    store = make_store(tmp_path/"store", corpus, width, shard=1024)
    def tell(mapped):
        return subprocess.run(
            [sys.executable, "-c", IN_LITTLE_MEMORY, store, str(mapped), str(room)],
            capture_output=True, text=True)
    there = tell(tmp_path/"room")
    assert there.stdout.endswith("trained\n"), there.stderr
    here = tell("")
    assert here.returncode and "alloc" in here.stderr        # in memory there is no room for them
