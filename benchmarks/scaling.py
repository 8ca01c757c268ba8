"""What long conversations and large corpora cost: CPU time per real utterance and peak memory, of
predicting and of a training step.

    python benchmarks/scaling.py --short        # up to 10 000 turns and 100 000 utterances
    python benchmarks/scaling.py                # all, in hours: a quiet machine

Features are random, and lie on a disk (in --folder; a million utterances take 2 GB). Every point
runs in a process of its own and enters the file when it is done, so the same command carries on
where it was stopped. "held" is memory that the corpus takes before anything is computed: words,
labels, places. Memory is the process' own: pages of mapped files do not count, since the system
takes them back when it needs room. Where --memory does not suffice, the point says so.

A point's time is divided by that of a fixed matrix product in the same process ("relative"), so
that points of different hours can be compared.
"""
import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from erc_moe.files import read_json, write_json

MODELS = "mister_e", "sure", "sdt", "bc_lstm"
LENGTHS = 10, 100, 1000, 10_000, 50_000           # turns of every conversation
CORPORA = 1000, 10_000, 100_000, 1_000_000        # utterances, in conversations of 5 to 20
WIDTHS, LABELS = {"text": 384, "speech": 88}, [f"emotion {i}" for i in range(7)]
BATCH = 1000                                      # utterances of a step, or one conversation


class OwnMemory:
    "The process' own resident memory: now, and the most since `begin`."
    def __init__(self):
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024*int(status.split("RssAnon:")[1].split()[0])

    def begin(self): self.most = self.now()

    def peak(self) -> int: return max(self.most, self.now())

    def _watch(self):
        while True: self.most = max(self.most, self.now()); time.sleep(0.01)


def conversations(lengths: list[int], folder: str) -> list:
    "Conversations of random features that lie in `folder`."
    import numpy as np
    from erc_moe.conversations import Conversation, Utterance
    from erc_moe.features.store import blank_rows
    rng, total = np.random.default_rng(0), sum(lengths)
    features = {m: blank_rows(total, width, folder) for m, width in WIDTHS.items()}
    for rows in features.values():
        for i in range(0, total, 4096):
            rows[i:i + 4096] = rng.standard_normal(rows[i:i + 4096].shape, np.float32)
    made, begin = [], 0
    for c, n in enumerate(lengths):
        conv = Conversation(str(c), [
            Utterance(f"{c}_{i}", "AB"[i % 2], "", LABELS[rng.integers(7)]) for i in range(n)])
        for m, rows in features.items(): conv = conv.with_features(m, rows[begin:begin + n])
        made.append(conv)
        begin += n
    return made


def timed(step, batches: list, lengths: torch.Tensor, seconds: float) -> list[float]:
    "CPU seconds per utterance of steps, nine, or what `seconds` suffice for."
    told = []
    for index in itertools.islice(itertools.cycle(batches), 10):
        begin = time.process_time()
        step(index)
        told.append((time.process_time() - begin)/int(lengths[index].sum()))
        seconds -= time.process_time() - begin
        if seconds < 0: break
    return told[1:] or told          # the first one warms up


def point(kind: str, model: str, size: int, seconds: float, folder: str) -> dict:
    "What one model costs at one size."
    import numpy as np
    from common import training
    from erc_moe.models import find_model
    from erc_moe.training.batches import ConversationTensors, epoch_batches, scoring_batches
    torch.manual_seed(0)
    memory, product = OwnMemory(), torch.randn(1024, 1024)
    used = time.process_time()
    for _ in range(20): product @ product
    reference = (time.process_time() - used)/20
    if kind == "turns": lengths = [size]*max(3, 3*BATCH//size)
    else:
        lengths = np.random.default_rng(1).integers(5, 21, size//5).tolist()
        while sum(lengths) > size: lengths.pop()
    before = memory.now()
    data = ConversationTensors(conversations(lengths, folder), LABELS, WIDTHS)
    held = memory.now() - before
    entry = find_model(model)
    form = training(entry.model(entry.model_config("cpu", "iemocap", WIDTHS, LABELS)))
    told = dict(utterances=sum(lengths), conversations=len(lengths), held_bytes=held,
                features_bytes=4*sum(lengths)*sum(WIDTHS.values()), reference_seconds=reference)

    def predict(index):
        with torch.inference_mode(): form.model(data.batch(index))
    shuffle = torch.Generator().manual_seed(0)
    scored = scoring_batches(data.lengths)
    scored = [scored[i] for i in torch.randperm(len(scored), generator=shuffle)]
    for what, step, batches in (
            ("predict", predict, scored),
            ("train", lambda index: form.step(data.batch(index)),
             epoch_batches(data.lengths, 1, 0, utterances=BATCH))):
        form.model.train(what == "train")
        memory.begin()
        try: times = timed(step, batches, data.lengths, seconds)
        except (MemoryError, RuntimeError) as e:
            if "alloc" not in str(e): raise
            told[what] = dict(fits=False)
            continue
        cpu = statistics.median(times)
        told[what] = dict(
            fits=True, steps=len(times), cpu_seconds_per_utterance=cpu, relative=cpu/reference,
            peak_bytes=memory.peak())
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="leave out the largest sizes")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--seconds", type=float, default=60., help="of CPU time for the steps of a point")
    parser.add_argument(
        "--memory", type=float, default=8., help="gigabytes that a point may take of its own")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where features lie")
    parser.add_argument("--save", type=Path, default=Path("results/benchmark-scaling.json"))
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        kind, model, size = args.point
        most = int(args.memory*2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        sys.exit(print(json.dumps(point(kind, model, int(size), args.seconds, args.folder))))
    record = read_json(args.save, "Delete it.") if args.save.exists() else dict(points={})
    for model in args.models:
        for kind, sizes in (("turns", LENGTHS), ("utterances", CORPORA)):
            for size in sizes[:-1] if args.short else sizes:
                name, points = f"{model}, {size} {kind}", record["points"]
                if name in points: continue
                done = subprocess.run(
                    [sys.executable, *sys.argv, "--point", kind, model, str(size)],
                    check=True, stdout=subprocess.PIPE, text=True)
                points[name] = told = dict(
                    model=model, kind=kind, size=size, memory_limit=args.memory,
                    seconds=args.seconds, load=[round(x, 1) for x in os.getloadavg()],
                    **json.loads(done.stdout))
                write_json(args.save, dict(
                    command=f"python {' '.join(sys.argv)}", threads=torch.get_num_threads(),
                    torch=torch.__version__, batch=BATCH, widths=WIDTHS, points=points))
                print(name, *(
                    f"{what}: {1e3*t['cpu_seconds_per_utterance']:.3f} ms of CPU an utterance, "
                    f"{t['peak_bytes']/2**30:.2f} GB" if t["fits"]
                    else f"{what}: more than {args.memory:g} GB"
                    for what in ("predict", "train") for t in [told[what]]), sep="; ", flush=True)
