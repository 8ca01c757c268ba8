"""The eight measures of a recording are those of the corpora, whatever file holds it and however
many cores measure it."""
import csv
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.corpora import Corpus, FeatureTable, load_corpus
from erc_moe.corpora.core import PROSODY8
from erc_moe.features.pipeline import FeaturePipeline
from erc_moe.features.prosody import Prosody8, praat, prosody8, sixteen_bit, syllable_nuclei
from erc_moe.recordings import read_sound

RATE = 16000
AUDIO = {u.audio.stem: u.audio for c in load_corpus("sample").conversations for u in c.utterances}
with open(Path(__file__).with_name("prosody8_sample.csv"), newline="") as f:
    MEASURED = {row["clip"]: np.array([float(row[m] or "nan") for m in PROSODY8])
                for row in csv.DictReader(f)}


def tone(hz, seconds, loud=.3):
    return loud*np.sin(2*np.pi*hz*np.arange(round(seconds*RATE))/RATE)


def vowel(hz, seconds):
    return sum(tone(hz*k, seconds, .1/k) for k in range(1, 9))


def test_the_sample_corpus_is_measured_as_an_independent_script_measured_it():
    "52 clips, measured through files by a script that shares no code with the package."
    assert len(MEASURED) == 52
    for clip, expected in MEASURED.items():
        got = prosody8(*soundfile.read(AUDIO[clip]))
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=clip)


def test_the_kind_of_file_does_not_matter(tmp_path):
    samples = read_sound(AUDIO["aquarium_10"], RATE)[0]
    held = sixteen_bit(samples)
    rows = []
    kinds = {"a.wav": "PCM_16", "b.wav": "PCM_24", "c.wav": "FLOAT", "d.flac": "PCM_16",
             "e.flac": "PCM_24"}
    for name, subtype in kinds.items():
        soundfile.write(tmp_path/name, held, RATE, subtype)
        rows.append(prosody8(read_sound(tmp_path/name, RATE)[0], RATE))
    for row in rows: assert np.array_equal(row, prosody8(samples, RATE))


@settings(max_examples=20, deadline=None)
@given(st.floats(90, 400), st.floats(.4, 1.5), st.floats(0, 20))
def test_a_steady_voice_of_any_pitch(hz, seconds, snr):
    "Pitch, level and clearness of a voice that is made to have them."
    voice = vowel(hz, seconds)
    noise = np.random.default_rng(0).normal(0, voice.std()*10**(-(10 + snr)/20), len(voice))
    got = dict(zip(PROSODY8, prosody8(voice + noise, RATE)))
    assert abs(got["avg_pitch"]/hz - 1) < .02
    assert abs(got["mean_hnr"] - (10 + snr)) < 3    # Praat's own error: 2.4 at 154 Hz
    loud = 10*np.log10((voice + noise).var()/4e-10)
    assert abs(got["avg_intensity"] - loud) < .5


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 20), st.floats(2.5, 6), st.floats(100, 300))
def test_hills_are_counted(hills, per_second, hz):
    "A voice that swells n times has n - 1 syllables: the last has no next one."
    seconds = hills/per_second
    swell = np.sin(np.pi*per_second*np.arange(round(seconds*RATE))/RATE)**2 + .02
    nuclei, speaking = syllable_nuclei(praat().Sound(vowel(hz, seconds)*swell, RATE))
    assert len(nuclei) == hills - 1 and abs(speaking - seconds) < .01
    np.testing.assert_allclose(nuclei, (np.arange(hills - 1) + .5)/per_second, atol=.02)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4000), st.sampled_from(["noise", "zeros", "step", "tone", "full", "click"]),
       st.sampled_from([8000, 16000, 44100]))
def test_any_sound_has_eight_numbers_and_no_word_is_printed(n, kind, rate):
    x = dict(noise=np.random.default_rng(n).normal(0, .1, n), zeros=np.zeros(n),
             step=np.full(n, .5), tone=tone(200, 1)[:n], full=np.sign(tone(200, 1))[:n],
             click=np.eye(1, n)[0])[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = prosody8(x, rate)
    assert row.shape == (8,) and row.dtype == np.float64 and row[0] == n/rate
    assert not np.isinf(row).any()


def test_many_clips_by_all_cores_are_each_clip_alone(tmp_path):
    extractor, clips = Prosody8(workers=2), [tmp_path/f"{i}.wav" for i in range(40)]
    for i, clip in enumerate(clips): soundfile.write(clip, vowel(100 + 5*i, .2), RATE)
    soundfile.write(tmp_path/"still.wav", np.zeros(RATE), RATE)
    (tmp_path/"words.wav").write_text("no sound")
    clips[3], clips[20] = tmp_path/"still.wav", tmp_path/"words.wav"
    clips[39] = tmp_path/"gone.wav"
    clips += clips[4:30]
    rows = extractor.rows(clips)
    assert "silent" in rows[3] and "cannot be read" in rows[20] and "does not exist" in rows[39]
    for i in {*range(66)} - {3, 20, 39, 56}:
        np.testing.assert_array_equal(rows[i], extractor.row(clips[i]))
    assert extractor.rows([]) == []


def test_a_pitch_that_is_not_there_has_no_spread():
    "The corpora write 0 and their readers set it undefined; a measured row is as a read one."
    row = Prosody8().row(AUDIO["the_letter_05"])
    assert MEASURED["the_letter_05"][4] == 0
    assert np.isnan(row).tolist() == [False]*3 + [True]*3 + [False]*2


def test_without_praat_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "parselmouth", None)
    for ask in (praat, lambda: prosody8(tone(220, 1), RATE), lambda: Prosody8().extractor,
                lambda: Prosody8().rows([AUDIO["aquarium_10"]])):
        with pytest.raises(DataError, match=r"pip install 'erc_moe\[praat\]'"): ask()


# In the pipeline

@pytest.fixture
def corpus(tmp_path):
    "Four conversations of voices whose pitch and length differ."
    rng = np.random.default_rng(0)

    def conversation(name):
        said = []
        for i in range(4):
            path, x = tmp_path/f"{name}_{i}.wav", vowel(rng.uniform(100, 300), rng.uniform(.3, .6))
            soundfile.write(path, x*rng.uniform(.2, 1), RATE)
            said.append(Utterance(f"{name}_{i}", "AB"[i % 2], "yes", "joy", path))
        return Conversation(name, said)
    splits = {"train": "ab", "validation": "c", "test": "d"}
    return Corpus("voices", ["joy"], {s: [conversation(n) for n in ns] for s, ns in splits.items()})


def with_array(corpus, *lost):
    "The corpus as MELD comes: with the array, less the rows `lost`."
    clips = {u.id: u.audio for c in corpus.conversations for u in c.utterances if u.id not in lost}
    rows = np.array([Prosody8().row(p) for p in clips.values()])
    return replace(corpus, arrays={"prosody8": FeatureTable("prosody8", list(clips), rows)})


def speech(conversations):
    return np.concatenate([c.features["speech"] for c in conversations])


@pytest.mark.parametrize("scope", ["", "@corpus", "@conversation"])
def test_a_model_that_was_trained_with_the_array_hears_a_stranger(corpus, tmp_path, scope):
    trained = FeaturePipeline({"speech": "prosody8" + scope}).fit(with_array(corpus), False)
    trained.save(tmp_path/"run")
    loaded = FeaturePipeline.load(tmp_path/"run")
    heard = loaded.apply(corpus.splits["test"], cache=tmp_path/"cache")
    given = loaded.apply(corpus.splits["test"], with_array(corpus).arrays, cache=False)
    np.testing.assert_array_equal(speech(heard), speech(given))
    assert np.abs(speech(heard)).max() > .1 and heard[0].present["speech"].all()


def test_a_model_that_was_trained_on_sound_takes_the_array(corpus, tmp_path):
    trained = FeaturePipeline({"speech": "prosody8"}).fit(corpus, tmp_path/"cache")
    given = trained.apply(corpus.splits["test"], with_array(corpus).arrays, cache=False)
    heard = trained.apply(corpus.splits["test"], cache=tmp_path/"cache")
    np.testing.assert_array_equal(speech(heard), speech(given))


def test_what_the_array_has_no_row_for_is_not_measured(corpus):
    "MELD's broken clips are left out of its array on purpose."
    trained = FeaturePipeline({"speech": "prosody8@corpus"}).fit(with_array(corpus, "d_1"), False)
    test = trained.apply(with_array(corpus, "d_1"), cache=False).splits["test"]
    assert test[0].present["speech"].tolist() == [True, False, True, True]


def test_text_alone_needs_no_praat(corpus, monkeypatch):
    trained = FeaturePipeline({"speech": "prosody8"}).fit(with_array(corpus), False)
    monkeypatch.setitem(sys.modules, "parselmouth", None)
    chat = [replace(c, utterances=tuple(replace(u, audio=None) for u in c.utterances))
            for c in corpus.splits["test"]]
    assert not trained.apply(chat, cache=False)[0].present["speech"].any()
    assert "without sound: all" in trained.told[0]
    with pytest.raises(DataError, match=r"pip install 'erc_moe\[praat\]'"):
        trained.apply(corpus.splits["test"], cache=False)


def test_other_arrays_are_still_asked_for(corpus):
    corpus = with_array(corpus)
    corpus.arrays["mine"] = replace(corpus.arrays["prosody8"], name="mine")
    trained = FeaturePipeline({"speech": "mine"}).fit(corpus, False)
    with pytest.raises(DataError, match="'mine'.* not given"):
        trained.apply(corpus.splits["test"], {}, False)
