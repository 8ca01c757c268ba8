"""A recording of three minutes and two voices: whatever format its sound and its transcript come
in, the model in the box says the same of it as of the clips that it was joined from."""
from pathlib import Path

import numpy as np
import pytest
import soundfile

from erc_moe import load
from erc_moe.conversations import Conversation, Utterance
from erc_moe.corpora import load_corpus
from erc_moe.features.prosody import Prosody8
from erc_moe.recordings import Turn, load_recording, read_sound
from recording_files import RATE, WRITERS, write_sound

SOUNDS = {"talk.wav": None, "talk.flac": None, "talk.mp3": "libmp3lame", "talk.m4a": "aac",
          "talk.mp4": "aac"}
TRANSCRIPTS = {"a.srt", "a.vtt", "a.TextGrid", "a.eaf", "x.json", "words.json"}
LOSSY = 0.015       # probabilities through AAC or MP3 may differ by so much on average


@pytest.fixture(scope="module")
def model():
    "The model in the box; sound that was measured once is not measured again."
    known, measure = {}, Prosody8.measure
    def once(self, samples):
        key = samples.tobytes()
        if key not in known: known[key] = measure(self, samples)
        return known[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prosody8, "measure", once)
        yield load("meld")


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A folder with the recording and its transcripts in every format, the turns, and the
    conversation of single clips. Every turn begins and ends at a whole millisecond."""
    folder, rng = tmp_path_factory.mktemp("formats"), np.random.default_rng(0)
    scene = next(c for c in load_corpus("sample").splits["test"] if c.id == "late_bus")
    turns, clips, parts, at, ms = [], [], [], 0, RATE//1000                        # samples
    for i, u in enumerate(scene.utterances*4):
        samples, rate = read_sound(u.audio)
        assert rate == RATE
        samples = 32767*samples[:len(samples)//ms*ms]*rng.uniform(0.4, 1)
        samples = samples.round().astype(np.int16)
        silence = np.zeros(rng.integers(1100, 1700)*ms, np.int16)
        start = at + len(silence)
        at = start + len(samples)
        parts += [silence, samples]
        turns.append(Turn(u.speaker, u.text, start/RATE, at/RATE))
        soundfile.write(folder/f"{i}.wav", samples, RATE, "PCM_16")
        clips.append(Utterance(f"{i:02d}", u.speaker, u.text, audio=folder/f"{i}.wav"))
    whole = np.concatenate([*parts, np.zeros(2*RATE, np.int16)])
    assert len({t.speaker for t in turns}) == 2 and 170 < len(whole)/RATE < 200
    for name, codec in SOUNDS.items():
        video = name.endswith("mp4")
        if codec: write_sound(folder/name, whole/32768, codec=codec, video=video)
        else: soundfile.write(folder/name, whole, RATE, "PCM_16")
    for name in TRANSCRIPTS: WRITERS[name](folder/name, turns)
    return folder, turns, Conversation("clips", clips)


@pytest.fixture(scope="module")
def alone(model, talk): return model.predict(talk[2])


def heard(model, folder: Path, sound: str, transcript):
    "What the model says of a recording."
    speakers = folder/"words.rttm" if transcript == "words.json" else None
    if isinstance(transcript, str): transcript = folder/transcript
    return model.predict(load_recording(folder/sound, transcript, speakers))


def agree(one, other, most=0.0):
    """The same words from the same people, with the same probabilities, experts and gate: none of
    them differs by more than `most` on average."""
    turns = [[(u.speaker, u.text) for u in p.conversations[0].utterances] for p in (one, other)]
    assert turns[0] == turns[1] and one.predicted == other.predicted
    parts = [[p.probabilities, p.gate, *p.experts.values()] for p in (one, other)]
    apart = max(float(np.abs(a - b).mean()) for a, b in zip(*parts))
    assert apart <= most, f"{apart:.3f} apart"


@pytest.mark.parametrize("transcript", sorted(TRANSCRIPTS))
def test_every_transcript_gives_what_the_clips_give(model, talk, alone, transcript):
    said = heard(model, talk[0], "talk.wav", transcript)
    assert said.told == []
    agree(said, alone)


@pytest.mark.parametrize("sound", SOUNDS)
def test_every_sound_gives_what_the_clips_give(model, talk, alone, sound):
    said = heard(model, talk[0], sound, "a.srt")
    assert said.told == []
    agree(said, alone, LOSSY if SOUNDS[sound] else 0.0)


@pytest.mark.parametrize("sound", ["talk.wav", "talk.mp3"])
def test_a_cut_off_by_a_second_is_caught(model, talk, alone, sound):
    late = [Turn(t.speaker, t.text, t.start + 1, t.end + 1) for t in talk[1]]
    with pytest.raises(AssertionError):
        agree(heard(model, talk[0], sound, late), alone, LOSSY)
