"""Peak memory of predicting long conversations, beside what one N x N matrix of them would take.

    python benchmarks/memory.py [--save results/benchmark-memory.json]

One conversation of 50 000 turns alone, and 64 of which one has 10 000 and the others 10. Every
case runs in a process of its own; words and voice are random, the models untrained.
"""
import argparse
import json
import resource
import subprocess
import sys

import numpy as np

CASES = {"one of 50 000": [50_000], "64, one of 10 000": [10_000] + [10]*63}
WIDTHS, LABELS = {"text": 384, "speech": 88}, [f"emotion {i}" for i in range(7)]


def predict(model: str, case: str):
    """Peak resident gigabytes before the model is asked and after, and seconds of CPU."""
    from erc_moe.conversations import Conversation, Utterance
    from erc_moe.models import find_model
    from erc_moe.training.batches import ConversationTensors
    from erc_moe.training.loop import score
    rng, conversations = np.random.default_rng(0), []
    for c, turns in enumerate(CASES[case]):
        conv = Conversation(str(c), [Utterance(f"{c}_{i}", "AB"[i % 2], "") for i in range(turns)])
        for m, width in WIDTHS.items():
            rows = rng.standard_normal((turns, width), np.float32)
            conv = conv.with_features(m, rows, np.ones(turns, bool))
        conversations.append(conv)
    entry = find_model(model)
    net = entry.model(entry.model_config("cpu", "", WIDTHS, LABELS))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    data, before = ConversationTensors(conversations, LABELS, WIDTHS), peak()
    logits = score(net, data).logits
    assert logits.shape == (sum(CASES[case]), len(LABELS)) and logits.isfinite().all()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(dict(before=before, peak=peak(), seconds=used.ru_utime + used.ru_stime)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", help="write the figures to this JSON file")
    args = parser.parse_args()
    if args.one: sys.exit(predict(*args.one))
    figures = {}
    for case, lengths in CASES.items():
        matrix = 4*max(lengths)**2/2**30
        for model in ("mister_e", "sure"):
            told = subprocess.run(
                [sys.executable, __file__, "--one", model, case], check=True, capture_output=True)
            f = figures[f"{model}, {case}"] = json.loads(told.stdout) | dict(matrix=matrix)
            f["ratio"] = matrix/f["peak"]
            print(f"{model}, {case}: {f['peak']:.2f} GB at most ({f['before']:.2f} GB before the "
                  f"model); one N x N matrix takes {matrix:.2f} GB, {f['ratio']:.1f} times that; "
                  f"{f['seconds']:.0f} s of CPU", flush=True)
    if args.save:
        from erc_moe.files import write_json
        from erc_moe.training.results import provenance
        write_json(args.save, dict(
            figures=figures, command="python benchmarks/memory.py", **provenance("cpu")))
