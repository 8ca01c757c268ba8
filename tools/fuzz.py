"""Feed damaged files to every reader: `python tools/fuzz.py [--seconds 60] [target ...]`.

Each round takes a right file, damages it (bytes changed, cut, doubled, replaced by what has broken
readers before) and reads it. A `DataError` of one line is right; any other exception, a file that
takes over ten seconds, or memory beyond the limit is a finding, whose input is kept in `--keep`.
"""
import argparse
import json
import pickle
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from erc_moe.conversations import DataError
from erc_moe.corpora import load_corpus
from erc_moe.corpora.core import read_features
from erc_moe.corpora.labels import read_label_map, ready_to_train
from erc_moe.corpora.own import load_own
from erc_moe.features import import_features, read_pickle

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


# target -> (file name, right contents, what reads it)
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
    "import": ("i.pkl", [], imported)}


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


def fuzz(name, seconds, rng, keep):
    "Rounds, and findings as (what, file)."
    file, seeds, read = TARGETS[name]
    seeds = seeds or [sample_file()]
    found, rounds, refused, until = {}, 0, 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/file
        while time.monotonic() < until:
            data, began = damage(rng.choice(seeds), rng), time.process_time()
            path.write_bytes(data)
            rounds, what = rounds + 1, None
            try: read(path)
            except DataError as e:
                refused += 1
                if "\n" in str(e).strip() or len(str(e)) > 20_000:
                    what = f"an error of {len(str(e))}"
            except Exception as e: what = f"{type(e).__name__}: {str(e)[:120]}"
            if time.process_time() - began > 10: what = "over ten seconds"
            if what and what not in found:
                keep.mkdir(parents=True, exist_ok=True)
                found[what] = keep/f"{name}-{len(found)}-{file}"
                found[what].write_bytes(data)
    return rounds, refused, found


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
    bad = 0
    for name in args.targets or TARGETS:
        rounds, refused, found = fuzz(name, args.seconds, random.Random(args.seed), args.keep)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
        print(f"{name}: {rounds} files, {refused} refused, {len(found)} findings; "
              f"peak {peak:.2f} GB", flush=True)
        for what, kept in found.items(): print(f"  {what} ({kept})", flush=True)
        bad += len(found)
    return bad > 0


if __name__ == "__main__": sys.exit(main())
