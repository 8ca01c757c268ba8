"""The sample corpus: what ships is complete, sound and split as promised, and its speech comes
from its script."""
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from erc_moe.corpora import load_corpus
from erc_moe.corpora.sample import SAMPLE_LABELS, load_sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpus(): return load_sample()


@pytest.fixture(scope="module")
def utterances(corpus): return [u for c in corpus.conversations for u in c.utterances]


@pytest.fixture(scope="module")
def script():
    "tools/render_sample.py as a module."
    spec = importlib.util.spec_from_file_location(
        "render_sample", ROOT / "tools" / "render_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_size_and_labels(corpus, utterances):
    assert (len(corpus.conversations), len(utterances)) == (72, 930)
    assert (
        corpus.labels
        == SAMPLE_LABELS
        == ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"])
    for convs in corpus.splits.values():
        assert {label for c in convs for label in c.labels} == set(SAMPLE_LABELS)
    assert all(u.text == u.text.strip() != "" for u in utterances)
    assert corpus.faults == []


def test_the_split_is_fixed(corpus):
    """A change here changes every score on this corpus: results/baselines-sample.json must be
    made again with it."""
    assert corpus.split_hash == "5044fb804e3421e70dff0cda5d410db9c9bd2d9266f0cc2d54775233f9b711d0"
    assert load_corpus("sample").split_hash == corpus.split_hash


def test_people_stay_in_one_split(corpus):
    people = {
        s: {u.speaker for c in convs for u in c.utterances} for s, convs in corpus.splits.items()}
    assert (
        not people["train"] & people["test"]
        and not people["train"] & people["validation"]
        and not people["validation"] & people["test"])


def test_every_clip_is_sound(utterances):
    for u in utterances:
        samples, rate = sf.read(u.audio)
        assert (rate, samples.ndim) == (16000, 1), u.id
        assert 0.3 < len(samples) / rate < 12, u.id
        assert np.isfinite(samples).all() and 0.05 < np.abs(samples).max(), u.id
        assert samples.std() > 0.005, u.id


def test_clips_and_utterances_are_one_to_one(utterances):
    folder = utterances[0].audio.parent
    assert {f.name for f in folder.iterdir()} == {f"{u.id}.opus" for u in utterances}
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8e6


def test_prosody_depends_on_the_utterance_alone(script):
    assert (script.prosody("scene_03", "joy") == script.prosody("scene_03", "joy")).all()
    assert (script.prosody("scene_03", "joy") != script.prosody("scene_04", "joy")).any()
    assert all(len(shift) == len(script.JITTER) for shift in script.EMOTIONS.values()) and set(
        script.EMOTIONS
    ) == set(SAMPLE_LABELS)


def test_prosody_of_the_emotions_overlaps(script, utterances):
    # each (930, 9)
    drawn = {
        label: np.stack([script.prosody(u.id, label) for u in utterances])
        for label in SAMPLE_LABELS}
    pitch = {label: values[:, 0] for label, values in drawn.items()}
    assert pitch["surprise"].mean() > pitch["neutral"].mean() + 1.5 > pitch["sadness"].mean() + 2.5
    assert 0.05 < (pitch["surprise"] < pitch["neutral"].mean()).mean() < 0.4


def test_casting_names_people_of_the_corpus(script, utterances):
    assert script.LOW_SPEAKERS < {u.speaker for u in utterances}


needs_espeak = pytest.mark.skipif(
    not shutil.which("espeak-ng"),
    reason="espeak-ng is not installed: the speech cannot be rendered again")


@needs_espeak
@pytest.mark.parametrize("utterance", ["late_bus_08", "old_piano_08"])
def test_rendering_again_gives_the_same_samples(script, utterance):
    row = next(r for r in script.rows() if r["utterance"] == utterance)
    ask = lambda: script.render(
        *(row[k] for k in ("conversation", "utterance", "speaker", "text", "label")))
    once = ask()                                                 # before compression
    assert np.array_equal(once, ask())
    if (
        script.ESPEAK_VERSION
        not in subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip(f"the shipped clips were made with espeak-ng {script.ESPEAK_VERSION}")
    shipped, _ = sf.read(script.SAMPLE / row["audio"])
    assert len(shipped) == len(once) and np.corrcoef(shipped, once)[0, 1] > 0.97


@needs_espeak
def test_the_emotion_is_in_the_voice(script):
    row = next(r for r in script.rows() if r["utterance"] == "old_piano_08")
    loudness = {
        label: script.render(
            row["conversation"], row["utterance"], row["speaker"], row["text"], label
        ).std()
        for label in ("anger", "sadness")}
    assert loudness["anger"] > 2 * loudness["sadness"]
