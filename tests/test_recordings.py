"""Any sound, any transcript: the same turns, and each cut the clip that it was joined from."""
import json
import os
import tracemalloc

import av
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.signal import correlate

import erc_moe.recordings.sound as sound_module
from erc_moe.conversations import Clip, DataError
from erc_moe.corpora import load_corpus
from erc_moe.corpora.own import load_own
from erc_moe.features import OpenSmile
from erc_moe.recordings import (Turn, join_scene, load_recording, read_sound, read_transcript,
                                sound_key, sound_length)
from recording_files import RATE, WRITERS, read_back, write_sound

quick = settings(max_examples=25, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


# Sound files

FILES = {"talk.wav": None, "talk.flac": None, "talk.aiff": None, "talk.mp3": "libmp3lame",
         "talk.m4a": "aac", "talk.mp4": "aac", "talk.mkv": "aac", "talk.mov": "aac"}


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    "A scene's first six utterances as one recording in every format; its turns; the clips alone."
    folder = tmp_path_factory.mktemp("talk")
    scene = load_corpus("sample").splits["test"][0]
    scene = type(scene)(scene.id, scene.utterances[:6])
    turns = join_scene(scene, folder/"talk.wav")
    whole, rate = soundfile.read(folder/"talk.wav", dtype="float32")
    assert rate == RATE
    for name, codec in FILES.items():
        video = name[-3:] in ("mp4", "mkv", "mov")
        if codec: write_sound(folder/name, whole, codec=codec, video=video)
        else: soundfile.write(folder/name, whole, RATE, "PCM_16")
    return folder, turns, [soundfile.read(u.audio, dtype="float32")[0] for u in scene.utterances]


def same_sound(cut, alone, most):
    "Equal length, best match at a shift of 0, and a relative error of at most `most`."
    assert len(cut) == len(alone)
    shift = int(correlate(cut, alone, "full", "fft").argmax()) - (len(alone) - 1)
    assert shift == 0, f"the cut is {shift} samples off"
    error = float(np.sqrt(((cut - alone)**2).sum()/(alone**2).sum()))
    assert error <= most, f"relative error {error:.3f}"


@pytest.mark.parametrize("name", FILES)
def test_each_cut_equals_its_own_clip(talk, name):
    folder, turns, alone = talk
    for turn, own in zip(turns, alone):
        cut, rate = read_sound(Clip(folder/name, turn.start, turn.end))
        assert rate == RATE
        same_sound(cut, own, 0.25 if FILES[name] else 2e-3)       # 16 bits; the codec's error
        if not FILES[name]: assert np.abs(cut - own).max() <= 2**-15 + 1e-7


@pytest.mark.parametrize("name", FILES)
def test_a_cut_off_by_a_second_is_caught(talk, name):
    folder, turns, alone = talk
    for turn, own in list(zip(turns, alone))[:-1]:
        with pytest.raises(AssertionError):
            same_sound(read_sound(Clip(folder/name, turn.start + 1, turn.end + 1))[0], own, 0.25)


def test_the_lossless_formats_are_the_same_to_the_bit(talk):
    folder, turns, _ = talk
    for turn in turns:
        cuts = [read_sound(Clip(folder/f"talk.{kind}", turn.start, turn.end))[0]
                for kind in ("wav", "flac", "aiff")]
        assert (cuts[0] == cuts[1]).all() and (cuts[0] == cuts[2]).all()


@quick
@given(st.sampled_from(list(FILES)), st.floats(0, 10), st.floats(0.1, 3),
       st.sampled_from([None, 8000, 22050]))
def test_any_stretch_is_a_slice_of_the_whole(talk, name, start, lasts, rate):
    path = talk[0]/name
    whole, _ = read_sound(path)
    cut, found = read_sound(Clip(path, start, start + lasts), rate)
    want = whole[round(start*RATE):round((start + lasts)*RATE)]
    want = sound_module.resample(want, RATE, rate or RATE)
    assert found == (rate or RATE) and len(cut) == len(want)
    assert np.abs(cut - want).max() < 1e-4
    assert sound_length(Clip(path, start, start + lasts)) == pytest.approx(len(cut)/found, abs=1e-3)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
@pytest.mark.parametrize("kind", ["m4a", "mp4"])
def test_priming_is_dropped_at_every_rate(tmp_path, rate, kind):
    x = 0.2*np.sin(np.cumsum(np.linspace(0.02, 0.3, 2*rate)))                         # a chirp
    write_sound(tmp_path/f"a.{kind}", x, rate, video=kind == "mp4")
    y, found = read_sound(tmp_path/f"a.{kind}")
    assert found == rate and abs(len(y) - len(x)) <= 0.001*rate + 1
    n = min(len(x), len(y))
    same_sound(y[:n], x[:n].astype(np.float32), 0.1)


def test_sound_that_begins_after_the_picture_keeps_its_place(tmp_path):
    x = 0.2*np.random.default_rng(0).normal(size=3*RATE)
    x = np.convolve(x, np.hanning(64)/20, "same")
    write_sound(tmp_path/"a.mp4", x, video=True, late=RATE//2)
    y, _ = read_sound(Clip(tmp_path/"a.mp4", 0.5, 3.0))
    same_sound(y, x[:round(2.5*RATE)].astype(np.float32), 0.2)
    assert np.abs(read_sound(Clip(tmp_path/"a.mp4", 0, 0.45))[0]).max() < 1e-3


def test_a_pause_of_the_recorder_is_silence_of_its_length(tmp_path):
    x = np.convolve(0.2*np.random.default_rng(0).normal(size=4*RATE), np.hanning(64)/20, "same")
    at, lost = 1024*(2*RATE//1024), 3*RATE
    write_sound(tmp_path/"a.mkv", x, video=True, gap=(at, lost))
    y, _ = read_sound(Clip(tmp_path/"a.mkv", (at + lost)/RATE + 0.1, (at + lost)/RATE + 1))
    i = at + round(0.1*RATE)
    shift = int(correlate(y, x[i:i + len(y)], "full", "fft").argmax()) - (len(y) - 1)
    assert abs(shift) <= RATE//1000                          # Matroska's stamps are milliseconds


def test_many_cuts_decode_once(talk, monkeypatch, tmp_path):
    (tmp_path/"own.m4a").write_bytes((talk[0]/"talk.m4a").read_bytes())
    calls, real = [], sound_module.any_blocks
    monkeypatch.setattr(sound_module, "any_blocks", lambda *a: calls.append(a) or real(*a))
    for turn in talk[1]: read_sound(Clip(tmp_path/"own.m4a", turn.start, turn.end))
    assert len(calls) == 1
    write_sound(tmp_path/"own.m4a", np.zeros(RATE*20))                # another file, same name
    assert np.abs(read_sound(Clip(tmp_path/"own.m4a", 1, 2))[0]).max() == 0 and len(calls) == 2


def test_decoded_sound_is_given_up_oldest_first(talk, monkeypatch, tmp_path):
    for n in range(3): (tmp_path/f"{n}.m4a").write_bytes((talk[0]/"talk.m4a").read_bytes())
    one = len(read_sound(talk[0]/"talk.m4a")[0])*2
    monkeypatch.setattr(sound_module, "KEEP", 2*one + 1000)
    monkeypatch.setattr(sound_module, "_decoded", kept := {})
    for n in range(3): read_sound(Clip(tmp_path/f"{n}.m4a", 1, 2))
    assert len(kept) == 2 and {key[0].name for key in kept} == {"1.m4a", "2.m4a"}


@pytest.mark.parametrize("kind", ["wav", "flac", "m4a"])
def test_a_cut_takes_little_memory(tmp_path, kind):
    path, x = tmp_path/f"long.{kind}", 0.1*np.random.default_rng(0).normal(size=(600*RATE, 2))
    if kind == "m4a": write_sound(path, x)
    else: soundfile.write(path, x, RATE)
    read_sound(Clip(path, 1, 2))                                              # imports, decoding
    tracemalloc.start()
    read_sound(Clip(path, 500, 502))
    if kind == "m4a":
        sound_module._decoded.clear()
        read_sound(Clip(path, 500, 502))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8e6, f"{most/1e6:.0f} MB"                                   # the whole is 77 MB


# One channel

@quick
@given(st.integers(1, 8), st.sampled_from(["wav", "flac"]), st.data())
def test_mono_is_the_mean_or_the_channel_chosen(tmp_path_factory, channels, kind, data):
    x = 0.1*np.random.default_rng(channels).normal(size=(4000, channels))
    path = tmp_path_factory.mktemp("mono")/f"a.{kind}"
    soundfile.write(path, x, RATE, "PCM_24")
    k = data.draw(st.integers(0, channels - 1))
    assert np.abs(read_sound(path)[0] - x.mean(1)).max() < 1e-6
    assert np.abs(read_sound(Clip(path, channel=k))[0] - x[:, k]).max() < 1e-6
    with pytest.raises(DataError, match=f"it has no channel {channels}"):
        read_sound(Clip(path, channel=channels))


@pytest.mark.parametrize("kind", ["m4a", "wav"])
def test_channels_of_compressed_sound_are_kept_apart(tmp_path, kind):
    t = np.arange(2*RATE)/RATE
    x = np.zeros((2*RATE, 8))
    x[:, 0], x[:, 1] = 0.3*np.sin(2*np.pi*300*t), 0.3*np.sin(2*np.pi*500*t)
    path = tmp_path/f"film.{kind}"
    if kind == "m4a": write_sound(path, x)
    else: soundfile.write(path, x, RATE)
    tone = lambda y: round(float(np.abs(np.fft.rfft(y)).argmax())*RATE/len(y))
    left, right = (read_sound(Clip(path, 0.5, 1.5, channel=c))[0] for c in (0, 1))
    assert (tone(left), tone(right)) == (300, 500)
    assert np.abs(read_sound(Clip(path, 0.5, 1.5))[0]).max() == pytest.approx(0.6/8, rel=0.1)


@pytest.mark.parametrize("kind", ["wav", "m4a", "mp3"])
def test_channels_that_cancel_are_an_error(tmp_path, kind):
    x = 0.3*np.sin(np.arange(2*RATE)*0.1)
    x, path = np.stack([x, -x], 1), tmp_path/f"a.{kind}"
    if kind == "wav": soundfile.write(path, x, RATE)
    else: write_sound(path, x, codec={"m4a": "aac", "mp3": "libmp3lame"}[kind])
    for source in (path, Clip(path, 0.5, 1.5)):
        with pytest.raises(DataError, match="utterance 'u7': its channels cancel.*--channel 0"):
            read_sound(source, utterance="u7")
    assert np.abs(read_sound(Clip(path, channel=1))[0]).max() > 0.2


# Bad sound

def claim(path, data): path.write_bytes(data); return path


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    "Name -> (a file that cannot be used, what is said)."
    folder = tmp_path_factory.mktemp("bad")
    x = 0.1*np.random.default_rng(0).normal(size=RATE)
    soundfile.write(folder/"a.flac", x, RATE), soundfile.write(folder/"a.wav", x, RATE)
    soundfile.write(folder/"slow.wav", x, 1), write_sound(folder/"a.m4a", np.tile(x, 20))
    write_sound(folder/"a.ts", np.tile(x, 20))
    flac, wav, m4a = ((folder/n).read_bytes() for n in ("a.flac", "a.wav", "a.m4a"))
    with av.open(str(folder/"mute.mp4"), "w") as out:
        track = out.add_stream("mpeg4", rate=25)
        track.width = track.height = 32
        track.pix_fmt = "yuv420p"
        out.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        out.mux(track.encode(None))
    soundfile.write(folder/"nan.wav", np.full(RATE, np.nan), RATE, "FLOAT")
    soundfile.write(folder/"short.wav", x[:800], RATE)
    (folder/"folder.wav").mkdir()
    return {
        "no file": (folder/"none.wav", "does not exist"),
        "a folder": (folder/"folder.wav", "is a folder"),
        "empty": (claim(folder/"empty.wav", b""), "is empty"),
        "1 Hz": (folder/"slow.wav", "claims 1 samples per second"),
        "years": (claim(folder/"y.flac", flac[:21] + bytes([flac[21] | 7]) + b"\xff"*4 + flac[26:]),
                  "hours of sound"),
        "claims more": (claim(folder/"more.wav", wav[:20000]), "cut short"),
        "half a flac": (claim(folder/"half.flac", flac[:len(flac)//2]), "cut short|cannot be read"),
        "half an m4a": (claim(folder/"half.m4a", m4a[:len(m4a)//2]), "cannot be read|cut short"),
        "words": (claim(folder/"words.wav", b"hello "*1000), "cannot be read"),
        "a playlist": (claim(folder/"list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:20\n#EXTINF:20,\n"
                             b"a.ts\n#EXT-X-ENDLIST\n"), "cannot be read"),
        "a list of files": (claim(folder/"l.m4a", b"ffconcat version 1.0\nfile a.flac\n"),
                            "cannot be read"),
        "pictures only": (folder/"mute.mp4", "holds no sound, only pictures"),
        "not a number": (folder/"nan.wav", "NaN"),
        "50 ms": (folder/"short.wav", "[45]0 ms long")}


@pytest.mark.parametrize("name", ["no file", "a folder", "empty", "1 Hz", "years", "claims more",
                                  "half a flac", "half an m4a", "words", "a playlist",
                                  "a list of files", "pictures only", "not a number", "50 ms"])
def test_bad_sound_is_one_line_with_file_and_utterance(bad, name):
    path, words = bad[name]
    for source in (path, Clip(path, 0, 0.04 if name == "50 ms" else 0.7)):
        tracemalloc.start()
        with pytest.raises(DataError, match=f"utterance 'u7': .*({words})") as told:
            read_sound(source, utterance="u7")
        assert tracemalloc.get_traced_memory()[1] < 5e7
        tracemalloc.stop()
        assert path.name in str(told.value) and "\n" not in str(told.value)


def test_a_missing_pyav_is_named_with_its_command(talk, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'erc_moe\[recordings\]'"):
        read_sound(talk[0]/"talk.m4a")
    read_sound(talk[0]/"talk.mp3")


def test_a_flac_without_a_length_is_read(tmp_path):
    x = np.round(1000*np.random.default_rng(0).normal(size=RATE))/32768
    soundfile.write(tmp_path/"a.flac", x, RATE)
    data = bytearray((tmp_path/"a.flac").read_bytes())
    data[21:26] = bytes([data[21] & 0xf0]) + bytes(4)                          # as a pipe leaves it
    (tmp_path/"a.flac").write_bytes(data)
    assert (read_sound(tmp_path/"a.flac")[0] == x.astype(np.float32)).all()
    cut = read_sound(Clip(tmp_path/"a.flac", 0.25, 0.75))[0]
    assert (cut == x[4000:12000].astype(np.float32)).all()


@pytest.mark.parametrize("start, end, words", [
    (-1, 2, "negative"), (2, 1, "not after"), (1, 1, "not after"),
    (float("nan"), None, "no finite"),
    (0, float("inf"), "no finite"), (1e9, None, "end beyond"), (1, 1e9, "end beyond")])
def test_impossible_times_are_told(talk, start, end, words):
    with pytest.raises(DataError, match=f"{words}.*talk.flac"):
        read_sound(Clip(talk[0]/"talk.flac", start, end))


def test_telephone_sound_is_read(tmp_path):
    x = 0.3*np.sin(np.arange(8000)*0.2)
    soundfile.write(tmp_path/"call.wav", x, 8000, "ULAW")
    y, rate = read_sound(tmp_path/"call.wav", RATE)
    assert rate == RATE and len(y) == RATE and np.abs(y[::2][100:-100] - x[100:-100]).max() < 0.02


def test_the_key_follows_the_content(talk, tmp_path):
    wav = talk[0]/"talk.wav"
    (tmp_path/"copy.wav").write_bytes(wav.read_bytes())
    sources = [wav, Clip(wav, 0, 1), Clip(wav, 0, 2), Clip(wav, 0, 1, 0), Clip(wav, channel=0)]
    assert len({sound_key(s) for s in sources}) == len(sources)
    assert sound_key(wav) == sound_key(tmp_path/"copy.wav") == sound_key(Clip(wav))
    assert sound_key(Clip(wav, 0, 1)) == sound_key(Clip(tmp_path/"copy.wav", 0.0, 1.0))
    (tmp_path/"copy.wav").write_bytes(wav.read_bytes()[:-2] + b"\x01\x00")
    assert sound_key(wav) != sound_key(tmp_path/"copy.wav")


# Transcripts: each writer makes a file, and every reader gives the same turns

def assert_turns(read, turns, apart=2e-3):
    assert [(t.speaker, t.text) for t in read] == [(t.speaker, t.text) for t in turns]
    for a, b in zip(read, turns):
        assert (a.start, a.end) == pytest.approx((b.start, b.end), abs=apart)


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_turns_from_every_transcript(talk, tmp_path, name):
    WRITERS[name](tmp_path/name, talk[1])
    assert_turns(read_back(tmp_path, name), talk[1])


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("sound", ["talk.wav", "talk.m4a", "talk.mp4", "talk.mp3"])
def test_a_recording_is_its_clips_through_every_pair(talk, tmp_path, name, sound):
    folder, turns, alone = talk
    WRITERS[name](tmp_path/name, turns)
    corpus = load_recording(folder/sound, read_back(tmp_path, name))
    conversation, = corpus.conversations
    assert corpus.faults == []
    assert [u.text for u in conversation.utterances] == [t.text for t in turns]
    for u, own in zip(conversation.utterances, alone):
        cut = read_sound(u.audio)[0]
        assert abs(len(cut) - len(own)) <= 0.0015*RATE             # transcripts hold milliseconds
        shift = int(correlate(cut, own, "full", "fft").argmax()) - (len(own) - 1)
        assert abs(shift) <= 0.001*RATE


word = st.text("abcdefgäöüßéñçжщ語", min_size=1, max_size=8)
said = st.lists(word, min_size=1, max_size=6).map(lambda w: " ".join(w) + ".")


@quick
@given(st.sampled_from(list(WRITERS)),
       st.lists(st.tuples(st.sampled_from(["Ann", "Ben", "Çelik"]), said, st.integers(0, 3000),
                          st.integers(100, 90_000)), min_size=1, max_size=8))
def test_random_turns_survive_every_format(tmp_path_factory, name, drawn):
    turns, at = [], 0
    for speaker, text, pause, lasts in drawn:                            # ms
        turns.append(Turn(speaker, text, (at + pause)/1000, (at + pause + lasts)/1000))
        at += pause + lasts
    folder = tmp_path_factory.mktemp("turns")
    WRITERS[name](folder/name, turns)
    assert_turns(read_back(folder, name), turns, 0.006 if name == "a.ass" else 2e-3)


@pytest.mark.parametrize("head", ["speaker,text,start,end", "SPEAKER;Text;START;END",
                                  "Name\tSentence\tonset\toffset", "user,message,start_ms,end_ms"])
def test_columns_in_any_case_and_with_any_mark(tmp_path, head):
    mark = next(m for m in ",;\t" if m in head)
    times = ("1500", "2500") if "_ms" in head else ("1.5", "0:00:02.500")
    row = mark.join(("Ann", '"Oh, no; no"', *times))
    (tmp_path/"t.csv").write_text(f"{head}\n{row}\n")
    assert read_transcript(tmp_path/"t.csv") == [Turn("Ann", "Oh, no; no", 1.5, 2.5)]


def test_messengers_and_recognisers(tmp_path):
    kinds = dict(
        discord=dict(messages=[dict(type="Default", author=dict(name="ann1", nickname="Ann"),
                                    content="Hi", timestamp="2026-01-02T10:00:00")]),
        telegram=dict(name="x", messages=[dict(type="service", text="joined"), {
            "type": "message", "date": "2026-01-02T10:00:00", "from": "Ann",
            "text": ["H", dict(text="i")]}]),
        slack=[dict(type="message", user="Ann", text="Hi", ts="1700000000.1")])
    for name, content in kinds.items():
        (tmp_path/f"{name}.json").write_text(json.dumps(content))
        assert read_transcript(tmp_path/f"{name}.json") == [Turn("Ann", "Hi")], name
    cpp = dict(transcription=[dict(offsets={"from": 1000, "to": 2500}, text=" Hi",
                                   timestamps={"from": "00:00:01,000", "to": "00:00:02,500"})])
    (tmp_path/"cpp.json").write_text(json.dumps(cpp))
    assert read_transcript(tmp_path/"cpp.json") == [Turn("speaker", "Hi", 1.0, 2.5)]


SUBTITLE = "1\n00:00:01,000 --> 00:00:02,000\n{}\n"


@pytest.mark.parametrize("name, content, words", [
    ("a.srt", b"", "no subtitle"), ("a.vtt", b"WEBVTT\n", "no subtitle"),
    ("a.srt", SUBTITLE.format("").encode(), "no turn with words"),
    ("a.srt", b"1\n00:00:03,000 --> 00:00:02,000\nhello\n",
     "turn 1: its end, 2 s, is not after its start, 3 s"),
    ("a.srt", b"1\n00:00:x3,000 --> 00:00:02,000\nhello\n", "subtitle"),
    ("a.csv", b"speaker,text,start\nAnn,Hi,soon\n", "turn 1: its start 'soon' is no time"),
    ("a.csv", b"speaker,text,start,end\nAnn,Hi,-1,2\n", "no time"),
    ("a.csv", b"speaker,text,start,end\nAnn,Hi,nan,2\n", "an end and no start"),
    ("a.csv", b"speaker,text\nAnn,Hi, you\n", "line 2 has 3 fields under 2 columns"),
    ("a.csv", b"speaker,words spoken\nAnn,Hi\n", "no column of words"),
    ("a.csv", b"", "is empty"), ("a.csv", b"speaker,text\n", "no turn|no column"),
    ("a.jsonl", b'{"text": "Hi"\n', "line 1 is no JSON"), ("a.jsonl", b"[1]\n", "is no object"),
    ("a.json", b"{", "is no JSON"), ("a.json", b"["*100_000, "is no JSON"),
    ("a.json", b"3", "no list of turns"),
    ("a.json", b'{"segments": [{"start": "x", "end": 2, "text": "Hi"}]}',
     "turn 1: its start 'x' is no time"),
    ("a.json", b'{"segments": [{"text": "\\ud800", "start": 0, "end": 1}]}', "half a character"),
    ("a.json", b'[{"text": "a", "start": ' + b"9"*5000 + b"}]", "is no JSON"),
    ("a.json", b'{"segments": [{"start": NaN, "end": 2, "text": "Hi"}]}', "no finite number"),
    ("a.txt", b"hello there\nNAME: x", "names no speaker"), ("a.txt", b"", "no turn with words"),
    ("a.TextGrid", b"File type", "no readable TextGrid"),
    ("a.eaf", b"<ANNOTATION", "no readable ELAN"),
    ("a.rttm", b"SPEAKER a 1 0 1 <NA> <NA> x", "holds no words"),
    ("a.docx", b"PK", "no transcript that can be read")])
def test_bad_transcripts_are_one_line_with_the_file(tmp_path, name, content, words):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(DataError, match=words) as told: read_transcript(tmp_path/name)
    assert name in str(told.value) and "\n" not in str(told.value)


def test_what_may_be_wrong_is_told(tmp_path):
    (tmp_path/"a.srt").write_text(
        SUBTITLE.format("ANN: Hi") + "\n2\n00:00:01,500 --> 00:00:03,000\nBEN: Oh\n\n"
        "3\n00:00:04,000 --> 00:00:05,000\n\n4\n00:00:06,000 --> 00:00:07,000\nYes.\n")
    told = []
    turns = read_transcript(tmp_path/"a.srt", told=told)
    assert [t.speaker for t in turns] == ["ANN", "BEN", "BEN"]
    assert [s.split(": ")[1].split(";")[0] for s in told] == [
        "1 turns without words are left out.", "1 turns begin before the one before has ended",
        "1 turns name no speaker"]


@pytest.mark.parametrize("encoding, guess", [("utf-8-sig", False), ("utf-16", False),
                                             ("cp1252", True)])
def test_encodings(tmp_path, encoding, guess):
    chat = [Turn("Zoë", "J'ai été reçue à l'école, c'est décidé, je commence déjà en août !"),
            Turn("José", "Où ça ? Félicitations, tu l'as bien mérité après toutes ces années."),
            Turn("Zoë", "À côté de chez toi, près de la forêt ; on se verra très souvent.")]
    lines = "".join(f"{t.speaker}: {t.text}\n" for t in chat)
    (tmp_path/"a.txt").write_bytes(lines.encode(encoding))
    told = []
    assert read_transcript(tmp_path/"a.txt", told=told) == chat
    assert bool(told) == guess


# Recordings

def test_one_speaker_per_channel(talk, tmp_path):
    folder, turns, alone = talk
    whole, _ = read_sound(folder/"talk.wav")
    names = list(dict.fromkeys(t.speaker for t in turns))
    call = np.zeros((len(whole), len(names)), np.float32)
    for t in turns:
        at = slice(round(t.start*RATE), round(t.end*RATE))
        call[at, names.index(t.speaker)] = whole[at]
    soundfile.write(tmp_path/"call.wav", call, RATE, "PCM_16")
    channels = {n: i for i, n in enumerate(names)}
    corpus = load_recording(tmp_path/"call.wav", turns, channels=channels)
    for u, own in zip(corpus.conversations[0].utterances, alone):
        same_sound(read_sound(u.audio)[0], own, 2e-3)
    swapped = {n: (i + 1) % len(names) for i, n in enumerate(names)}
    with pytest.raises(DataError, match="silent wherever somebody speaks"):
        load_recording(tmp_path/"call.wav", turns, channels=swapped)


def test_a_transcript_longer_than_the_sound_is_told(talk):
    folder, turns, _ = talk
    for shift, first in ((5, "talk_3"), (100, "talk_0")):
        late = [Turn(t.speaker, t.text, t.start + shift, t.end + shift) for t in turns]
        with pytest.raises(DataError, match=f"utterance '{first}'.*sound talk.m4a is 15.43 s long"):
            load_recording(folder/"talk.m4a", late)


def test_a_recording_that_is_silent_wherever_somebody_speaks_is_refused(talk, tmp_path):
    soundfile.write(tmp_path/"mute.wav", np.zeros(16*RATE), RATE)
    with pytest.raises(DataError, match="mute.wav is silent wherever somebody speaks.*--channel"):
        load_recording(tmp_path/"mute.wav", talk[1])


@pytest.mark.parametrize("beyond, told", [(0.01, False), (0.1, True)])
def test_what_rounding_adds_to_the_end_is_not_worth_a_word(talk, beyond, told):
    folder, turns, _ = talk
    last = turns[-1]
    longer = [*turns[:-1], Turn(last.speaker, last.text, last.start, last.end + beyond)]
    faults = load_recording(folder/"talk.wav", longer).faults
    assert any("ending beyond the sound" in f for f in faults) == told


def test_words_alone_need_no_sound(tmp_path):
    (tmp_path/"chat.txt").write_text("Ann: I got the job!\nBen: No way!\n")
    conversation, = load_recording(None, tmp_path/"chat.txt").conversations
    assert conversation.id == "chat" and all(u.audio is None for u in conversation.utterances)


# Tables

HEAD = "conversation,order,speaker,text,audio,start,end"


def write_rows(folder, turns, audio):
    rows = [f'c,{i},{t.speaker},"{t.text}",{audio},{t.start},{t.end}' for i, t in enumerate(turns)]
    (folder/"t.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    return folder/"t.csv"


@pytest.mark.parametrize("name", ["talk.wav", "talk.m4a", "talk.mp4"])
def test_rows_that_share_a_recording_hear_their_stretch(talk, tmp_path, name):
    (tmp_path/name).write_bytes((talk[0]/name).read_bytes())
    corpus = load_own(write_rows(tmp_path, talk[1], name))
    for u, own in zip(corpus.conversations[0].utterances, talk[2]):
        same_sound(read_sound(u.audio)[0], own, 0.25 if name != "talk.wav" else 2e-3)
    told = f"utterances cut out of a longer recording by start and end: {len(talk[1])}."
    assert told in corpus.faults


def test_rows_that_share_a_recording_need_times(talk, tmp_path):
    (tmp_path/"talk.wav").write_bytes((talk[0]/"talk.wav").read_bytes())
    path = write_rows(tmp_path, talk[1], "talk.wav")
    lines = path.read_text().splitlines()
    lines[1:] = [line.rsplit(",", 1)[0] + "," for line in lines[1:]]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="utterance 'c_0': its sound talk.wav serves 6 utterances"):
        load_own(path)


def test_a_sound_too_short_for_its_rows_is_told(tmp_path):
    soundfile.write(tmp_path/"blip.wav", np.ones(2000, np.float32)/9, 8000)              # 0.25 s
    for rows, refused in ((2, True), (3, False)):
        (tmp_path/"t.csv").write_text("text,speaker,conversation,audio,label,split\n" + "".join(
            f"a {i},A,c,blip.wav,joy,train\n" for i in range(rows)))
        if refused:
            with pytest.raises(DataError, match="serves 2 utterances"): load_own(tmp_path/"t.csv")
        else: assert any("hears all of it" in f for f in load_own(tmp_path/"t.csv").faults)


def test_a_video_is_heard_where_there_is_no_sound_file(talk, tmp_path):
    (tmp_path/"clip.mp4").write_bytes((talk[0]/"talk.mp4").read_bytes())
    (tmp_path/"t.csv").write_text("conversation,speaker,text,video\nc,A,Hi,clip.mp4\nc,B,Oh,\n")
    first, second = load_own(tmp_path/"t.csv").conversations[0].utterances
    assert first.audio == first.video == tmp_path/"clip.mp4" and second.audio is None
    whole = read_sound(talk[0]/"talk.wav")[0]
    same_sound(read_sound(first.audio)[0][:len(whole)], whole, 0.25)


def test_measures_follow_the_stretch_and_its_key(talk):
    folder, turns, alone = talk
    smile, clips = OpenSmile("egemaps"), [Clip(folder/"talk.flac", t.start, t.end) for t in turns]
    rows = smile.rows(clips)
    for row, own in zip(rows, alone):
        assert np.allclose(row, smile.measure(np.round(own*32768)/32768), rtol=1e-2, atol=1e-2)
    assert len({smile.content_key(c) for c in clips}) == len(clips)


def test_a_broken_mp3_is_one_line(tmp_path, capfd):
    sound = 0.3*np.sin(np.arange(48000)*0.1)
    soundfile.write(tmp_path/"whole.mp3", sound, 16000, format="MP3")
    whole = (tmp_path/"whole.mp3").read_bytes()
    rubbish = np.random.default_rng(0).bytes(3000)
    for data in (whole[:len(whole)//2], b"\xff\xfb\x90\x00" + rubbish,
                 whole[:300] + rubbish + whole[3300:]):
        (tmp_path/"broken.mp3").write_bytes(data)
        try: read_sound(tmp_path/"broken.mp3")
        except DataError: pass
    assert capfd.readouterr().err == ""
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_silence_in_a_recording_is_told_once(tmp_path):
    from erc_moe import load
    sound = 0.3*np.random.default_rng(0).normal(size=48000).clip(-1, 1)
    sound[16000:32000] = 0
    sound[32000:] = 1
    soundfile.write(tmp_path/"talk.wav", sound, 16000)
    turns = [Turn("A", "Hello.", 0., 1.), Turn("B", "Yes.", 1., 2.), Turn("A", "No.", 2., 3.)]
    told = load("meld").predict(load_recording(tmp_path/"talk.wav", turns), missing="absent").told
    for fault, id in (("silent", "talk_1"), ("clipped", "talk_2")):
        assert [t for t in told if fault in t and id in t and "sounds that" in t] == [
            f"speech sounds that are {fault}: 1 ({id})."]
