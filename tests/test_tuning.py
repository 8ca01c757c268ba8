"""Stage 1 as a user meets it: tuned and embedded by two processes, killed in the middle, carried
on; with a tiny random encoder."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast)

from erc_moe.cli import main
from erc_moe.conversations import DataError
from erc_moe.corpora import FeatureTable, load_corpus
from erc_moe.features import FeatureStore
from erc_moe.training import train
from erc_moe.training.tuning import TunedRun, align, embed, tune

WORDS = "good bad fine awful lovely it is was the day a".split()


def write_talk(folder):
    "A table of 48 short utterances of two people, in talk.csv."
    rng = np.random.default_rng(0)
    pd.DataFrame([
        dict(conversation=f"{split}{i//8}", speaker="AB"[i % 2], split=split,
             text=" ".join(rng.choice(WORDS, 5)), label=["joy", "anger"][i % 2])
        for split, n in (("train", 32), ("validation", 8), ("test", 8)) for i in range(n)
    ]).to_csv(folder/"talk.csv", index=False)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    "A folder with a tiny random BERT and a tokenizer of a dozen words."
    folder = tmp_path_factory.mktemp("encoders")/"tiny"
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32),
        add_pooling_layer=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A corpus of one's own in which single words tell the label; one utterance has no words,
    one no label."""
    rng, rows = np.random.default_rng(0), []
    for split, n in (("train", 10), ("validation", 4), ("test", 4)):
        for i in range(n):
            for j in range(rng.integers(3, 8)):
                label = ["joy", "anger"][int(rng.integers(2))]
                told = rng.choice(
                    ["good", "lovely", "fine"] if label == "joy" else ["bad", "awful"])
                rows.append(
                    dict(
                        conversation=f"{split}{i}", speaker="AB"[j % 2],
                        text=" ".join([*rng.choice(WORDS[5:], 3), told]), label=label, split=split))
    rows[1]["text"], rows[2]["label"] = "", ""
    path = tmp_path_factory.mktemp("own")/"talk.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


SMALL = [
    "--preset", "cpu", "--set", "width=8", "--set", "frozen_layers=0", "--set", "epochs=12",
    "--set", "batch_size=8", "--set", "lr=3e-3", "--device", "cpu"]


def tuning(encoder, table, out, *more):
    return [
        "tune", "--encoder", str(encoder), "--corpus", str(table), "--seeds", "1", "--folds", "2",
        *SMALL,
        "--out", str(out), *more]


def launched(count, call, tmp_path, before=""):
    "The command that runs `call` in so many processes."
    script = tmp_path/"script.py"
    script.write_text(f"{before}import sys; from erc_moe.cli import main; sys.exit({call})")
    if count == 1: return [sys.executable, str(script)]
    return [    # accelerate launch --cpu starts one, whatever number it is asked for
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(count), str(script)]


def processes(count, call, tmp_path, before="", rc=0, env={}):
    command = launched(count, call, tmp_path, before)
    done = subprocess.run(
        command, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env, timeout=400)
    assert done.returncode == rc, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tuned(encoder, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    processes(1, f"main({tuning(encoder, table, folder/'run')!r})", folder)
    return TunedRun(folder/"run")


def test_it_learns_and_writes_its_card(tuned):
    assert tuned.summary["test"]["weighted_f1"]["mean"] > 0.7, "single words tell the label"
    assert (
        tuned.summary["trained"] < tuned.summary["parameters"]
        or tuned.summary["config"]["model"]["adaptation"] == "full")
    for place in (tuned.folder, tuned.folder/"seed-0"/"model"):
        assert "## Limits" in (place/"README.md").read_text()
    assert str(tuned.folder.parent.parent) not in (
        tuned.folder / "summary.json"
    ).read_text().replace(tuned.summary["command"], "").replace(
        json.dumps(tuned.summary["command"])[1:-1], "")


def test_sures_text_features_are_the_last_state_of_cls(encoder, table, tmp_path):
    "Tuned whole, no layer between: what transformers itself gives with the tuned weights."
    run = tune(
        "text", str(encoder), table, preset="sure", seeds=1, out=tmp_path/"run", device="cpu",
        progress=False, changes=dict(epochs=2, lr=1e-3))
    assert run.summary["trained"] == run.summary["parameters"], "all of it is tuned, without LoRA"
    store = embed(run, load_corpus(table), tmp_path/"store", device="cpu")
    before, tuned = (BertModel.from_pretrained(encoder, add_pooling_layer=False) for _ in range(2))
    state = load_file(run.encoder_folder()/"encoder.safetensors")
    assert {n.partition(".")[0] for n in state} == {"base", "classify"}, "one layer per emotion"
    tuned.load_state_dict(
        {n.removeprefix("base."): x for n, x in state.items() if n.startswith("base.")})
    words = AutoTokenizer.from_pretrained(encoder)
    u = next(u for c in load_corpus(table).splits["test"] for u in c.utterances if u.text)
    with torch.no_grad():
        cls = [m.eval()(**words(u.text, return_tensors="pt")).last_hidden_state[0, 0].numpy()
               for m in (before, tuned)]
    row = store.lookup([u.id])[0][0]
    assert row.shape == (32,) and np.allclose(row, cls[1], atol=1e-5)
    assert not np.allclose(cls[0], cls[1], atol=1e-3), "the tuning has moved it"


def test_two_processes_tune_and_embed(encoder, table, tmp_path):
    embedding = [
        "embed", str(tmp_path/"run"), "--corpus", str(table), "--out", str(tmp_path/"store"),
        "--device", "cpu"]
    out = processes(
        2,
        f"main({tuning(encoder, table, tmp_path / 'run')!r}) or "
        f"main({embedding!r})",
        tmp_path)
    assert out.count("text encoder on talk") == 1, "one process reports"
    corpus, store = load_corpus(table), FeatureStore(tmp_path/"store")
    ids = [u.id for c in corpus.conversations for u in c.utterances]
    rows = [i for s in store.shards for i in s["ids"]]
    assert len(rows) == len(set(rows)) == len(ids) - 1 and not store.missing(ids), (
        "none lost, none doubled")
    assert list(store.absent.values()) == ["nothing to be read"]
    alone = embed(TunedRun(tmp_path/"run"), corpus, tmp_path/"alone", device="cpu")
    there = [i for i in ids if i not in store.absent]
    np.testing.assert_allclose(store.lookup(there)[0], alone.lookup(there)[0], atol=1e-5)


def test_two_processes_and_shards_give_what_one_process_gives(encoder, tmp_path):
    """Two batches of one process are a batch of each of two: whole models and LoRA in shards gather
    into the same checkpoint, to 1e-5; in shards by --shard, or by accelerate's FSDP settings."""
    from safetensors.torch import load_file
    plain = shutil.copytree(encoder, tmp_path/"plain")
    config = json.loads((plain/"config.json").read_text())
    (plain/"config.json").write_text(json.dumps(
        config | dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.)))
    write_talk(tmp_path)
    saved = {}
    # as accelerate launch --config_file sets them
    fsdp = dict(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_OFFLOAD_PARAMS="false")
    for name, count, changes, more, env in (
        ("one", 1, ["accumulate=2"], [], {}), ("two", 2, [], [], {}),
        ("shards", 2, [], ["--shard"], {}), ("fsdp", 2, [], [], fsdp)
    ):
        sets = [x for s in (
            "adaptation=lora", "frozen_layers=0", "dropout=0", "lora_dropout=0", "width=8",
            "batch_size=4", "buckets=false", "epochs=3", "lr=1e-3", *changes) for x in ("--set", s)]
        call = [
            "tune", "--encoder", str(plain), "--corpus", str(tmp_path/"talk.csv"), "--seeds", "1",
            *sets, "--device", "cpu", "--out", str(tmp_path/name), *more]
        processes(count, f"main({call!r})", tmp_path, env=env)
        run = TunedRun(tmp_path/name)
        saved[name] = run.summary["test"]["weighted_f1"]["mean"], load_file(
            run.encoder_folder()/"encoder.safetensors"), run.log()
    f1, one, log = saved.pop("one")
    assert any(".lora_B." in n and x.abs().max() > 1e-4 for n, x in one.items()), "it was tuned"
    for name, (score, weights, its_log) in saved.items():
        assert weights.keys() == one.keys() and score == pytest.approx(f1)
        for n, x in one.items(): torch.testing.assert_close(weights[n], x, atol=1e-5, rtol=0)
        for a, b in zip(log, its_log):
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


def test_what_cannot_lie_in_shards_is_told(encoder, table, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is one. .*accelerate launch"):
        tune("text", str(encoder), str(table), shard=True, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="cache is float16.*--set cache=none"):
        tune("text", str(encoder), str(table), shard=True, changes=dict(cache="float16"))
    with pytest.raises(DataError, match="packs into bfloat16.*--set dtype=bfloat16"):
        tune(
            "text", str(encoder), str(table), shard=True,
            changes=dict(four_bit=True, adaptation="lora"))
    for setting, value, fix in (
        ("OFFLOAD_PARAMS", "true", "Set fsdp_offload_params: false"),
        ("ACTIVATION_CHECKPOINTING", "true", "add --set recompute=true"),
        ("RESHARD_AFTER_FORWARD", "SHARD_GRAD_OP", "Set fsdp_reshard_after_forward: true"),
    ):
        with monkeypatch.context() as m, pytest.raises(DataError, match=fix):
            m.setenv("ACCELERATE_USE_FSDP", "true"); m.setenv(f"FSDP_{setting}", value)
            tune("text", str(encoder), str(table))
    # they ask for shards as --shard does
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(DataError, match="cache is float16.*--set cache=none"):
        tune("text", str(encoder), str(table), changes=dict(cache="float16"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(DataError, match="shares of its own.*Leave out --shard"):
        tune("text", str(encoder), str(table), shard=True)
    with pytest.raises(DataError, match="GPUs alone.*Leave out --device cpu"):
        tune("text", str(encoder), str(table), device="cpu")


@pytest.fixture(scope="module")
def llama(encoder, tmp_path_factory):
    "A tiny random LLaMA with the same tokenizer, and a table whose utterances are all of a length."
    folder = tmp_path_factory.mktemp("llama")
    words = AutoTokenizer.from_pretrained(encoder)
    words.save_pretrained(folder/"llama")
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32)).save_pretrained(folder/"llama")
    write_talk(folder)
    return folder


# accelerate takes DeepSpeed to GPUs alone: only that it takes gloo on a CPU is said here, DeepSpeed
# itself is what it is
ON_CPU = """from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *a, **k: ("gloo", DistributedType.NO)
"""


def with_lora(llama, out, *sets):
    sets = [x for s in (
        "adaptation=lora", "frozen_layers=0", "dropout=0", "lora_dropout=0", "width=8",
        "pooling=attentive", "recompute=true", "batch_size=4", "buckets=false", "lr=1e-3", *sets)
        for x in ("--set", s)]
    return [
        "tune", "--encoder", str(llama/"llama"), "--corpus", str(llama/"talk.csv"), *sets, "--out",
        str(out), "--checkpoint-seconds", "0"]


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_four_bits_in_shards(llama, tmp_path):
    saved = []
    for count, accumulate, more in ((1, 2, []), (2, 1, ["--shard"])):
        call = with_lora(
            llama, tmp_path/str(count), f"accumulate={accumulate}", "epochs=2", "four_bit=true",
            "dtype=bfloat16", "recompute=false", "pooling=mean")
        processes(
            count, f"main({[*call, '--seeds', '1', '--device', 'cpu', *more]!r})", tmp_path)
        encoder = TunedRun(tmp_path/str(count)).encoder_folder()
        saved.append(load_file(encoder/"encoder.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    for n, x in saved[0].items(): torch.testing.assert_close(saved[1][n], x, atol=2e-3, rtol=0)


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    call = with_lora(llama, folder/"run", "accumulate=4", "epochs=3")
    processes(1, f"main({[*call, '--seeds', '2', '--device', 'cpu']!r})", folder)
    return TunedRun(folder/"run")


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_what_one_process_gives(llama, alone, tmp_path, stage, monkeypatch):
    """ZeRO in two processes, two batches of each a step: the same checkpoint to a twentieth of a
    step (a gradient near 0 has no more in common), for each seed."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    call = with_lora(llama, tmp_path/"run", "accumulate=2", "epochs=3") + ["--seeds", "2"]
    processes(2, f"main({call!r})", tmp_path, ON_CPU)
    run = TunedRun(tmp_path/"run")
    for name in ("parameters", "trained"): assert run.summary[name] == alone.summary[name]
    for seed in (0, 1):
        one, shared = (
            load_file(r.encoder_folder(seed)/"encoder.safetensors") for r in (alone, run))
        assert one.keys() == shared.keys()
        assert any(".lora_B." in n and x.abs().max() > 1e-4 for n, x in one.items()), "tuned"
        for n, x in one.items():
            if n == "pool.score.2.bias": continue    # softmax takes it away: its gradient is noise
            torch.testing.assert_close(shared[n], x, atol=5e-5, rtol=0)
        for a, b in zip(alone.log(seed), run.log(seed)):
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
            assert a["validation"] == pytest.approx(b["validation"])


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_stopped_deepspeed_carries_on(llama, tmp_path, stage, monkeypatch):
    "To the weights of a training that was not stopped; and without DeepSpeed."
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    stop = ON_CPU + """import os
import erc_moe.training.loop as loop
class Bar(loop.tqdm):
    def update(self): self.n += 1; self.n < 4 or os._exit(1)
loop.tqdm = Bar
"""
    runs = {name: with_lora(llama, tmp_path/name, "epochs=6") + ["--seeds", "1"]
            for name in ("whole", "stopped")}
    processes(2, f"main({runs['whole']!r})", tmp_path, ON_CPU)
    assert processes(2, f"main({runs['stopped']!r})", tmp_path, stop, rc=1) is not None
    checkpoint = tmp_path/"stopped/seed-0/checkpoint.pt"
    assert len(torch.load(checkpoint, weights_only=True)["log"]) == 3
    shutil.copytree(tmp_path/"stopped", tmp_path/"other")
    processes(2, f"main({runs['stopped']!r})", tmp_path, ON_CPU)
    states = [load_file(TunedRun(tmp_path/n).encoder_folder()/"encoder.safetensors")
              for n in ("whole", "stopped")]
    for n, x in states[0].items(): torch.testing.assert_close(states[1][n], x, atol=1e-6, rtol=0)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    call = with_lora(llama, tmp_path/"other", "epochs=6") + ["--seeds", "1", "--device", "cpu"]
    processes(1, f"main({call!r})", tmp_path)
    assert [e["epoch"] for e in TunedRun(tmp_path/"other").log()] == [*range(1, 7)]


@pytest.mark.parametrize(
    "before, after, shard", [(1, 1, []), (2, 1, []), (1, 2, []), (2, 1, ["--shard"])])
def test_a_killed_tuning_carries_on(encoder, table, tmp_path, before, after, shard):
    "With as many processes as there are then; what lay in shards carries on whole."
    args = tuning(encoder, table, tmp_path/"run", "--set", "epochs=8", "--checkpoint-seconds", "0")
    begun = args + shard
    process = subprocess.Popen(
        launched(before, f"main({begun!r})", tmp_path), stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    log, deadline = tmp_path/"run"/"seed-0"/"log.jsonl", time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = log.read_text().splitlines()[0]
    processes(after, f"main({args!r})", tmp_path)
    assert log.read_text().splitlines()[0] == first and TunedRun(tmp_path/"run").summary["epochs"]


def test_the_store_trains_a_conversation_model(tuned, table, tmp_path):
    embed(tuned, load_corpus(table), tmp_path/"store", device="cpu")
    run = train(
        "mister_e", str(table), text=str(tmp_path / "store"), seeds=1, out=tmp_path / "run",
        changes=dict(epochs=20, hidden=8, lr=2e-2), device="cpu", progress=False)
    assert run.summary["test"]["weighted_f1"]["mean"] > 0.7


CONVERSATION_FITTED = {
    "single": dict(), "windows": dict(context=2, context_after=1),
    "conversation": dict(context=2, context_after=1, reading="conversation")}


@pytest.mark.parametrize("reading", CONVERSATION_FITTED)
def test_training_labels_do_not_reach_their_own_embedding(encoder, table, tmp_path, reading):
    """With the labels of one conversation exchanged its embeddings lie to each other as before
    (up to the rotation): its fold's encoder never sees them, whichever turns it reads."""
    corpus = load_corpus(table)
    run = lambda c, out: tune(
        "text", str(encoder), c, seeds=1, folds=2, out=tmp_path / out, device="cpu", progress=False,
        changes=dict(width=8, frozen_layers=0, epochs=1, batch_size=8, lr=3e-3)
        | CONVERSATION_FITTED[reading])
    target = corpus.splits["train"][0]
    flipped = corpus.map(lambda c: (
        c
        if c.id != target.id
        else replace(
            c,
            utterances=[
                replace(u, label={"joy": "anger", "anger": "joy", None: None}[u.label])
                for u in c.utterances])))
    stores = [
        embed(run(c, f"run{i}"), c, tmp_path / f"store{i}", device="cpu")
        for i, c in enumerate((corpus, flipped))]
    def distances(store, c):
        rows = store.lookup([u.id for u in c.utterances if u.text])[0]
        return np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    np.testing.assert_allclose(
        distances(stores[0], target), distances(stores[1], target), atol=1e-4)
    held = corpus.splits["test"][0]
    assert np.abs(distances(stores[0], held) - distances(stores[1], held)).max() > 1e-3, (
        "the encoder tuned on all of train sees them")


def test_several_corpora_ratings_and_a_start(encoder, table, tmp_path):
    """Another corpus whose labels have other names teaches the words; its run is a start, but not
    of folds of a corpus whose labels it has seen."""
    corpus = load_corpus(table)
    ids = [u.id for c in corpus.conversations for u in c.utterances]
    value = {"joy": 5., "anger": 1., None: np.nan}
    rated = replace(corpus, annotations={"ratings": FeatureTable("ratings", ids, np.array([
        [value[l], 3. + value[l]/5] for c in corpus.conversations for l in c.labels]))})
    other = load_corpus(table, label_map={"joy": "glad", "anger": "cross"})
    other = replace(other, name="other")
    small = dict(width=8, frozen_layers=0, epochs=6, batch_size=8, lr=3e-3)
    run = tune(
        "text", str(encoder), rated, seeds=1, out=tmp_path/"several", device="cpu", progress=False,
        also=[other], changes=small | dict(rating_weight=.5, contrast=.1))
    assert {*run.log()[0]["losses"]} == {"focal", "contrast", "ratings"}
    losses = [e["losses"]["ratings"] for e in run.log()]
    assert losses[-1] < 0.8*losses[0]
    assert run.summary["also"] == {"other": other.split_hash}
    tuned_there = run.encoder()
    assert tuned_there.classify[-1].out_features == 4 and tuned_there.rate.out_features == 2
    data = tuned_there.dataset(corpus.splits["test"], corpus.labels)
    assert tuned_there(data.batch(torch.arange(3))).logits.shape == (3, 2)

    again = dict(device="cpu", progress=False, start=run.folder)
    followed = tune(
        "text", str(encoder), corpus, seeds=1, out=tmp_path/"then", **again,
        changes=small | dict(epochs=1, lr=0.))
    kept = dict(run.encoder().named_parameters())
    for name, p in followed.encoder().named_parameters():
        if p.requires_grad: assert torch.equal(p, kept[name][:len(p)]), name
    for name in ("talk", "other"):
        with pytest.raises(DataError, match=f"has learnt from .* of {name} that are held out"):
            tune("text", str(encoder), replace(corpus, name=name), folds=2, **again)
    with pytest.raises(DataError, match="tuned with other settings .*--set adaptation"):
        tune("text", str(encoder), corpus, seeds=1, changes=small | dict(width=4), **again)


def test_what_was_learnt_is_not_held_out_elsewhere(encoder, table, tmp_path):
    """Rotated, a split's test is what the encoder has learnt: neither a start, nor embeddings, nor
    a training on embeddings that were made before. A scene of another corpus' is found too."""
    rng = np.random.default_rng(0)
    say = lambda u: replace(u, text=" ".join(rng.choice(WORDS, 8)))
    corpus = load_corpus(table).map(
        lambda c: replace(c, utterances=[say(u) for u in c.utterances]))
    small = dict(width=8, frozen_layers=0, epochs=1, batch_size=8)
    same = dict(device="cpu", progress=False, seeds=1, changes=small)
    run = tune("text", str(encoder), corpus, out=tmp_path/"run", **same)
    assert {*run.learnt["talk"]} == {c.id for c in corpus.splits["train"]}
    store = embed(run, corpus, tmp_path/"store", device="cpu")
    rotated = replace(corpus, splits=dict(zip(corpus.splits, [*corpus.splits.values()][::-1])))
    told = "has learnt from 10 of the 14 conversations of talk that are held out"
    for use in (
        lambda: tune("text", str(encoder), rotated, start=run.folder, **same),
        lambda: embed(run, rotated, tmp_path/"again", device="cpu"),
        lambda: train("context_free", rotated, text=str(store.path), seeds=1, device="cpu"),
    ):
        with pytest.raises(DataError, match=told): use()
    train("context_free", corpus, text=str(store.path), seeds=1, device="cpu", changes=dict(
        epochs=1), progress=False)

    other = replace(corpus, name="other")    # the same scenes by another name
    with pytest.raises(DataError, match="of other that are held out"):
        tune("text", str(encoder), replace(rotated, name="other"), start=run.folder, **same)
    beside = tune("text", str(encoder), rotated, also=[other], out=tmp_path/"beside", **same)
    left = len(corpus.splits["train"]) - len(beside.learnt["other"])
    assert left > 5, "those of two utterances and more"
    assert any(f"{left} training conversations are scenes" in f for f in beside.summary["faults"])


def test_a_past_only_model_refuses_features_that_read_ahead(tmp_path):
    past = dict(changes=["causal=true", "epochs=1"], seeds=1, device="cpu", progress=False)
    with pytest.raises(DataError, match="Take it as it is: --speech egemaps@corpus"):
        train("mister_e", "sample", text="minilm", speech="egemaps", **past)


def test_two_batches_of_four_are_one_of_eight(encoder, table, tmp_path, monkeypatch):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path/"cache"))    # kept states: without dropout
    corpus = load_corpus(table)
    first = [c for c in corpus.splits["train"] if all(u.label and u.text for u in c.utterances)][0]
    long = replace(first, utterances=[
        replace(u, id=f"{u.id}-{i}") for i in range(8) for u in first.utterances[:2]])
    corpus = replace(corpus, splits=corpus.splits | {"train": [long]})
    weights = []
    for size, accumulate in ((8, 1), (4, 2)):
        changes = dict(
            width=8, adaptation="frozen", frozen_layers=0, epochs=2, batch_size=size, dropout=0.,
            accumulate=accumulate, buckets=False, lr=1e-2, warmup=0., cache="float32")
        run = tune(
            "text", str(encoder), corpus, seeds=1, out=tmp_path/f"{size}", changes=changes,
            device="cpu", progress=False)
        weights.append({n: p for n, p in run.encoder().named_parameters() if p.requires_grad})
    for name, p in weights[0].items():
        torch.testing.assert_close(p, weights[1][name], atol=1e-5, rtol=1e-4)


def test_the_mean_of_the_folds_embeds_what_is_not_in_train(tuned, table, tmp_path):
    corpus, held = load_corpus(table), load_corpus(table).splits["test"][0]
    whole, mean = (
        embed(tuned, corpus, tmp_path / others, others=others, device="cpu")
        for others in ("whole", "mean"))
    rows = lambda store, c: store.lookup([u.id for u in c.utterances if u.text])[0]
    by = lambda k, cs: (e := tuned.encoder(fold=k)).embed(e.dataset(cs, corpus.labels))
    anchor = by(None, corpus.splits["validation"])
    expected = np.mean(
        [align(by(k, corpus.splits["validation"]), anchor)(by(k, [held])) for k in (0, 1)], axis=0)
    np.testing.assert_allclose(rows(mean, held), expected, atol=1e-4)
    np.testing.assert_allclose(rows(whole, held), by(None, [held]), atol=1e-5)
    train = corpus.splits["train"][3]
    np.testing.assert_allclose(rows(mean, train), rows(whole, train), atol=1e-5)


def test_train_is_embedded_by_its_folds_or_by_the_encoder_tuned_on_all(tuned, table, tmp_path):
    corpus = load_corpus(table)
    folds, whole = (
        embed(tuned, corpus, tmp_path/f"{train}", train=train, device="cpu")
        for train in (None, "whole"))
    encoder = tuned.encoder()
    for split in ("train", "test"):
        for c in corpus.splits[split]:
            ids = [u.id for u in c.utterances if u.text]
            alone = encoder.embed(encoder.dataset([c], corpus.labels))
            alone = alone[[bool(u.text) for u in c.utterances]]
            np.testing.assert_allclose(whole.lookup(ids)[0], alone, atol=1e-5)
            assert (np.abs(folds.lookup(ids)[0] - alone).max() > 1e-3) == (split == "train"), c.id
    # the one store is not taken for the other
    with pytest.raises(DataError, match="is stale"):
        embed(tuned, corpus, tmp_path/"None", train="whole", device="cpu")


def test_an_embedding_that_was_stopped_carries_on(tuned, table, tmp_path):
    corpus = load_corpus(table)
    whole = embed(tuned, corpus, tmp_path/"whole", device="cpu")
    stopped, kept = (
        FeatureStore(tmp_path / "stopped", whole.extractor),
        [u.id for u in corpus.splits["train"][3].utterances])
    stopped.add(kept, whole.lookup(kept)[0] + 1)
    again = embed(tuned, corpus, tmp_path/"stopped", device="cpu")
    assert again.shards[0] == stopped.shards[0] and not again.missing(whole.ids)
    np.testing.assert_array_equal(again.lookup(kept)[0], whole.lookup(kept)[0] + 1)


def test_part_of_the_corpus_is_not_embedded_with_folds(tuned, table, tmp_path):
    part = load_corpus(table)
    part = replace(part, splits=part.splits | {"train": part.splits["train"][:3]})
    with pytest.raises(DataError, match="is not the corpus that the encoders were cross-fitted on"):
        embed(tuned, part, tmp_path/"store")


def test_conversations_of_ones_own_are_embedded_and_predicted(tuned, table, tmp_path, capsys):
    embed(tuned, load_corpus(table), tmp_path/"store", device="cpu")
    assert (
        main(
            [
                "train", "--corpus", str(table), "--text", str(tmp_path / "store"), "--seeds",
                "1", "--set",
                "epochs=20", "--set", "hidden=8", "--set", "lr=2e-2", "--device", "cpu", "--out",
                str(tmp_path / "run")])
        == 0)
    (tmp_path / "lunch.csv").write_text(
        "conversation,speaker,text\nlunch,Ana,it was lovely\nlunch,Ben,the day was awful\n")
    predict = ["predict", str(tmp_path/"lunch.csv"), "--model", str(tmp_path/"run")]
    assert main(predict) == 1
    assert "erc_moe embed" in capsys.readouterr().err
    assert (
        main(
            [
                "embed", str(tuned.folder), "--corpus", str(tmp_path / "lunch.csv"), "--out",
                str(tmp_path / "lunch"), "--device", "cpu"])
        == 0)
    assert (
        main(
            [*predict, "--text", str(tmp_path / "lunch"), "--out", str(tmp_path / "said.csv")])
        == 0)
    assert pd.read_csv(tmp_path/"said.csv").predicted.tolist() == ["joy", "anger"]
    other = FeatureStore(
        tmp_path / "other",
        replace(tuned_extractor := FeatureStore(tmp_path / "lunch").extractor, revision="another"))
    other.add(["lunch_0", "lunch_1"], np.zeros((2, tuned_extractor.width)))
    assert main([*predict, "--text", str(tmp_path/"other")]) == 1
    assert "is not what the model was trained with" in capsys.readouterr().err


@pytest.mark.mpnet
def test_the_real_mpnet_is_tuned_on_kept_states(table, tmp_path, monkeypatch):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path/"cache"))
    changes = dict(
        frozen_layers=-1, cache="float16", width=16, epochs=3, batch_size=8, lr=1e-3, context=1)
    run = tune(
        "text", "mpnet", str(table), seeds=1, out=tmp_path/"run", changes=changes, device="cpu",
        progress=False)
    losses = [e["losses"]["focal"] for e in run.log()]
    assert losses[-1] < 0.8*losses[0] and run.summary["encoder"] == "mpnet"
    assert run.summary["trained"] < 0.1*run.summary["parameters"]
