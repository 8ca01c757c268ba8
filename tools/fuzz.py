"""Feed damaged files to every reader: `python tools/fuzz.py [--seconds 60] [target ...]`.

Each round takes a right file, damages it (bytes changed, cut, doubled, replaced by what has broken
readers before) and reads it. A `DataError` of one line is right; any other exception, a file that
takes over ten seconds, or memory beyond the limit is a finding, whose input is kept in `--keep`.
Resident memory after a fifth of a target's time and at its end tells growth.
"""
import argparse
import io
import json
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from safetensors.numpy import save

import erc_moe
from erc_moe.conversations import Clip, DataError
from erc_moe.corpora import load_corpus
from erc_moe.corpora.core import read_features
from erc_moe.corpora.labels import read_label_map, ready_to_train
from erc_moe.corpora.own import load_own
from erc_moe.features import Extractor, FeatureStore, import_features, read_pickle
from erc_moe.files import read_json
from erc_moe.predict import Predictor
from erc_moe.recordings import read_sound, read_transcript, sound_length
from erc_moe.training.predictions import read_csv

TABLE = "conversation,order,speaker,text,label,split\n" + "".join(
    f'c{i // 4},{i % 4},{"AB"[i % 2]},"Well, it’s {i}",{"joy" if i % 3 else "anger"},'
    f'{("train", "dev", "Test")[i // 4 % 3]}\n' for i in range(24))
NAMES = TABLE.splitlines()[0].split(",")
ROWS = [dict(zip(NAMES, (f"c{i // 2}", i, "A", "Hé", "joy", "train"))) for i in range(4)]
MELD = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n" + (
    'Hm.,Ann,joy,0,0,1,1,"00:00:01,000","00:00:02,500"\n')
EMORY = "Utterance,Speaker,Emotion,Scene_ID,Utterance_ID,Season,Episode,Start_Time,End_Time\n" + (
    "Hm.,['Uma Ray'],Joyful,1,2,1,3,00:00:03.795,00:00:05.004\n")
CONTENT = {
    "a": [np.arange(3, dtype=np.float32), np.array(["x", None], object), 2**70], 3: ("b", {1})}
NASTY = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\r", b"\n", b"\xe2\x80\xa8", b"NaN", b"Infinity",
    b"1e999", b"9"*5000, b"1000000000", b"-1", b"["*5000,
    b'{"a":'*2000, b"\\ud800", b"null", b"true",
    b",", b";", b"\t", b"\x92", b"\xff"*8, b"\x7f"*4, b"(t"*500, b"r\xff\xff\xff\x0f", b"\x96"]


def npy(values):
    with tempfile.SpooledTemporaryFile() as f:
        np.save(f, values)
        f.seek(0)
        return f.read()


def official(name, file, text):
    def read(path):
        folder = path.parent/name
        folder.mkdir(exist_ok=True)
        for split in ("train", "dev", "test"):
            (folder/file.format(split)).write_text(text.replace("1,3,", f"{len(split)},3,"))
        (folder/file.format("train")).write_bytes(path.read_bytes())
        load_corpus(name, path.parent)
    return read


def imported(path):
    corpus = load_corpus("sample")
    import_features(path, corpus, tempfile.mkdtemp(dir=path.parent))


def sample_file():
    corpus = load_corpus("sample")
    per = lambda one: {c.id: [one(u) for u in c.utterances] for c in corpus.conversations}
    return pickle.dumps({
        "videoIDs": per(lambda u: u.id), "videoLabels": per(lambda u: corpus.labels.index(u.label)),
        "videoText": per(lambda u: np.ones(2, np.float32))}, 2)


def trained(path): ready_to_train(load_own(path))


# Sound and transcripts

@cache
def sound(kind, codec=None):
    tone = (np.sin(np.arange(4000)/9)*9000).astype(np.int16)
    out = io.BytesIO()
    if not codec:
        soundfile.write(out, tone, 8000, format=kind)
        return out.getvalue()
    import av
    with av.open(out, "w", format=kind) as file:
        track = file.add_stream(codec, rate=8000, layout="mono")
        size = track.frame_size or 1024
        for at in range(0, len(tone) - size, size):
            frame = av.AudioFrame.from_ndarray(tone[None, at:at + size], "s16", "mono")
            frame.sample_rate, frame.pts = 8000, at
            file.mux(track.encode(frame))
        file.mux(track.encode(None))
    return out.getvalue()


def hear(path):
    read_sound(path)
    sound_length(path)
    read_sound(Clip(path, 0.1, 0.4, 0))


SUBTITLES = {
    "srt": "1\n00:00:01,000 --> 00:00:02,500\nANN: Hé.\n\n2\n00:00:03,000 --> 00:00:04,000\nNo!\n",
    "vtt": "WEBVTT\n\n00:01.000 --> 00:02.500\n<v Ann>Hé.</v>\n\n00:03.000 --> 00:04.000\nNo!\n",
    "ass": "[Script Info]\nScriptType: v4.00+\n\n[Events]\nFormat: Layer, Start, End, Style, Name, "
           "MarginL, MarginR, MarginV, Effect, Text\n"
           "Dialogue: 0,0:00:01.00,0:00:02.50,Default,Ann,0,0,0,,Hé.\n",
    "TextGrid": 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n4\n<exists>\n1\n'
                '"IntervalTier"\n"Ann"\n0\n4\n2\n0\n1\n""\n1\n4\n"Hé."\n',
    "eaf": '<?xml version="1.0" encoding="UTF-8"?>\n<ANNOTATION_DOCUMENT AUTHOR="" DATE="" '
           'FORMAT="2.8" VERSION="2.8" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
           'xsi:noNamespaceSchemaLocation="http://www.mpi.nl/tools/elan/EAFv2.8.xsd">'
           '<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds"/><TIME_ORDER>'
           '<TIME_SLOT TIME_SLOT_ID="t1" TIME_VALUE="1000"/>'
           '<TIME_SLOT TIME_SLOT_ID="t2" TIME_VALUE="2000"/></TIME_ORDER>'
           '<TIER LINGUISTIC_TYPE_REF="d" TIER_ID="Ann"><ANNOTATION><ALIGNABLE_ANNOTATION '
           'ANNOTATION_ID="a1" TIME_SLOT_REF1="t1" TIME_SLOT_REF2="t2"><ANNOTATION_VALUE>Hé.'
           '</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER><LINGUISTIC_TYPE '
           'LINGUISTIC_TYPE_ID="d" TIME_ALIGNABLE="true"/></ANNOTATION_DOCUMENT>'}
RTTM = "SPEAKER r 1 1.0 1.5 <NA> <NA> ann <NA> <NA>\nSPEAKER r 1 3.0 1.0 <NA> <NA> bob <NA> <NA>\n"
WORDS = json.dumps({"segments": [{
    "start": 1.0, "end": 2.5, "text": "Hé you.", "speaker": "A",
    "words": [{"word": "Hé", "start": 1.0, "end": 1.2}, {"word": "you.", "end": 2.5}]}]})
MESSAGES = json.dumps({"messages": [
    {"type": "message", "from": "Ann", "text": ["Hé ", {"type": "bold", "text": "you"}],
     "date": "2020-01-01"},
    {"author": {"name": "Bob"}, "content": "No.", "timestamp": "2020-01-01T10:00"}]})
CHAT = "Ann: Hé.\nBob: No!\nand no\n"
WHATSAPP = "[01.02.20, 10:11:12] Ann: Hé.\n[01.02.20, 10:11:13] Bob: <Media omitted>\nmore\n"
TIMED = "speaker;start;end;text\nAnn;0:01;2,5;Hé\nBob;3;4;No\n"


def diarised(path):
    (path.parent/"w.json").write_text(WORDS)
    read_transcript(path.parent/"w.json", path)


def by_speaker(path):
    (path.parent/"s.rttm").write_text(RTTM)
    read_transcript(path, path.parent/"s.rttm")


# Folders that the library writes, and strangers send

def beside(write, name, read):
    "Right contents of one file of a folder, and what reads the folder with that file damaged."
    @cache
    def folder():
        place = Path(tempfile.mkdtemp())
        write(place)
        return place
    def reading(path):
        (folder()/name).write_bytes(path.read_bytes())
        read(folder())
    return [lambda: (folder()/name).read_bytes()], reading


def write_store(place):
    store = FeatureStore(place, Extractor("fuzz", "1", 2))
    store.add(list("abc"), np.ones((3, 2), np.float32), {"d": "no sound"}, {"a": "text:1"})


def read_store(place):
    store = FeatureStore(place)
    store.lookup([*store.ids, *store.absent])


def write_model(place): erc_moe.load("meld").save(place)


def read_model(place): Predictor.open(place)


def read_settings(path): read_json(path, "Write it again.", ("seeds",))


PREDICTED = "conversation,utterance,speaker,text,predicted,confidence,p_joy\na,b,c,'=1,joy,.5,.5\n"
IEMOCAP = "utterance_id,dialogue_id,position,session,speaker,start,end,text,emotion_full,emotion," \
          "valence,arousal,dominance\n" + "".join(
    f"Ses0{s}F_{i},Ses0{s}F,{i},{s},F,{i}.5,{i}.9,Hm,neu,neutral,2.5,2,3\n"
    for s in range(1, 6) for i in range(2))
MOSI = "utterance_id,video_id,clip,text,score,split,bclstm_split\n" + "".join(
    f"v{i}_1,v{i},1,WELL,{i - 1}.5,{s},train\n" for i, s in enumerate(("train", "val", "test")))


def table_of(corpus):
    def read(path):
        (path.parent/corpus).mkdir(exist_ok=True)
        (path.parent/corpus/"utterances.csv").write_bytes(path.read_bytes())
        load_corpus(corpus, path.parent)
    return read


# target -> (file name, right contents or what makes them, what reads it)
TARGETS = {
    "csv": ("t.csv", [TABLE.encode(e) for e in ("utf-8", "utf-16", "cp1252")], trained),
    "tsv": ("t.TSV", [TABLE.replace(",", "\t").encode()], lambda p: load_own(p, splits=False)),
    "jsonl": (
        "t.jsonl", ["\n".join(map(json.dumps, ROWS)).encode()], lambda p: load_own(p, ["joy"])),
    "json": ("t.json", [json.dumps(ROWS).encode()], lambda p: load_own(p, splits=False)),
    "labels": ("map.json", [b'{"Joy": "joy", "other": null}'], read_label_map),
    "pickle": ("f.pkl", [pickle.dumps(CONTENT, p) for p in range(6)], read_pickle),
    "npy": ("f.npy", [npy(np.ones((3, 2), t)) for t in ("f4", "i2", "?")],
            lambda p: read_features(p, list("abc"), "f")),
    "safetensors": (
        "f.safetensors", [save({i: np.ones(2, np.float32) for i in "abc"}),
                          save({"m": np.ones((3, 2), np.float32)})],
        lambda p: read_features(p, list("abc"), "f")),
    "meld": ("m.bin", [MELD.encode()], official("meld", "{}_sent_emo.csv", MELD)),
    "emorynlp": ("e.bin", [EMORY.encode()], official("emorynlp", "emorynlp_{}_final.csv", EMORY)),
    "iemocap": ("i.bin", [IEMOCAP.encode()], table_of("iemocap")),
    "mosi": ("o.bin", [MOSI.encode()], table_of("mosi")),
    "import": ("i.pkl", [sample_file], imported),
    **{kind.lower(): (f"s.{kind}", [lambda k=kind: sound(k)], hear)
       for kind in ("WAV", "FLAC", "OGG", "AIFF", "MP3", "W64")},
    **{kind: (f"s.{kind}", [lambda k=kind, c=codec: sound(k, c)], hear)
       for kind, codec in (("mp4", "aac"), ("matroska", "aac"), ("adts", "aac"))},
    **{kind.lower(): (f"t.{kind}", [text.encode()], read_transcript)
       for kind, text in SUBTITLES.items()},
    "rttm": ("s.rttm", [RTTM.encode()], diarised),
    "words": ("w.json", [WORDS.encode()], by_speaker),
    "messages": ("m.json", [WORDS.encode(), MESSAGES.encode()], read_transcript),
    "chat": ("c.txt", [CHAT.encode(), WHATSAPP.encode()], read_transcript),
    "timed": ("t.csv", [TIMED.encode()], read_transcript),
    "predictions": ("p.csv", [PREDICTED.encode()], read_csv),
    "settings": ("s.json", [b'{"seeds": [0], "a": {"b": 1}}'], read_settings),
    "manifest": ("m.json", *beside(write_store, "manifest.json", read_store)),
    "model": ("c.json", *beside(write_model, "config.json", read_model)),
    "pipeline": ("p.json", *beside(write_model, "features/pipeline.json", read_model)),
    "weights": ("w.safetensors", *beside(
        write_model, "features/scaling.safetensors", read_model))}


def damage(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data): data[at] = rng.randrange(256)
        elif kind == 1: data[at:at] = rng.choice(NASTY)
        elif kind == 2: data[at:min(end, at + 8)] = rng.choice(NASTY)
        elif kind == 3: del data[at:min(end, at + 20)]
        elif kind == 4: data[at:at] = data[at:min(end, at + 60)]
        elif rng.random() < 0.2: del data[end:]
        else: del data[at:at + 1]
    return bytes(data)


class Hang(BaseException): "A reader that does not come back."


def hang(*_): raise Hang


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages*resource.getpagesize()/2**20


def fuzz(name, seconds, rng, keep):
    "Rounds, refusals, findings as {what: file}, and megabytes early and at the end."
    file, seeds, read = TARGETS[name]
    seeds = [s() if callable(s) else s for s in seeds]
    found, rounds, refused, early = {}, 0, 0, None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/file
        while time.monotonic() < began + seconds:
            if early is None and time.monotonic() > began + seconds/5: early = resident()
            data, start = damage(rng.choice(seeds), rng), time.process_time()
            path.write_bytes(data)
            rounds, what = rounds + 1, None
            signal.setitimer(signal.ITIMER_VIRTUAL, 30)
            try: read(path)
            except DataError as e:
                refused += 1
                if "\n" in str(e).strip() or len(str(e)) > 1500: what = f"an error of {len(str(e))}"
            except Exception as e: what = f"{type(e).__name__}: {str(e)[:120]}"
            except Hang: what = "it hangs"
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if time.process_time() - start > 10: what = "over ten seconds"
            if what and what not in found:
                keep.mkdir(parents=True, exist_ok=True)
                found[what] = keep/f"{name}-{len(found)}-{file}"
                found[what].write_bytes(data)
    return rounds, refused, found, early or resident(), resident()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seconds", type=float, default=60, help="per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gigabytes", type=float, default=8, help="memory that may be asked for")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (int(args.gigabytes*2**30),)*2)
    signal.signal(signal.SIGVTALRM, hang)
    bad = 0
    for name in args.targets or TARGETS:
        rounds, refused, found, early, late = fuzz(
            name, args.seconds, random.Random(args.seed), args.keep)
        print(f"{name}: {rounds} files, {refused} refused, {len(found)} findings; "
              f"{early:.0f} MB, then {late:.0f} MB", flush=True)
        for what, kept in found.items(): print(f"  {what} ({kept})", flush=True)
        bad += len(found)
    return bad > 0


if __name__ == "__main__": sys.exit(main())
