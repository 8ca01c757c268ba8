"""Train the small MiSTER-E on the sample corpus in float32 and in bfloat16, with the same seeds:
what a training costs in processor time, and what it scores.

    python benchmarks/precision.py --save results/benchmark-precision.json

The two take turns, seed by seed, in one process and one thread; scores are weighted F1 on test at
the epoch that validation chose.
"""
import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from erc_moe.corpora import load_corpus
from erc_moe.features import FeaturePipeline
from erc_moe.files import write_json
from erc_moe.models import MODELS
from erc_moe.precision import autocast, native_bf16
from erc_moe.training.loop import ConversationTensors, TrainingConfig, fit, score
from erc_moe.training.results import provenance

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus("sample")
    corpus = FeaturePipeline({"text": "minilm", "speech": "prosody8"}).fit(
        corpus, progress=False).apply(corpus)
    entry = MODELS["mister_e"]
    widths = {m: x.shape[1] for m, x in corpus.splits["train"][0].features.items()}
    told = {p: dict(seconds=[], weighted_f1=[]) for p in ("fp32", "bf16")}
    for seed in range(args.seeds):
        for precision, kept in told.items():
            torch.manual_seed(seed)
            model = entry.model(entry.model_config("cpu", "sample", widths, corpus.labels))
            changes = entry.training_changes("cpu", "sample")
            config = TrainingConfig(**changes | dict(epochs=args.epochs, precision=precision))
            begin = time.process_time()
            fit(model, corpus, config, seed, device="cpu", progress=False)
            kept["seconds"].append(round(time.process_time() - begin, 2))
            test = ConversationTensors(corpus.splits["test"], corpus.labels, widths)
            with autocast(precision, "cpu"): f1 = score(model, test).weighted_f1(test.truth)
            kept["weighted_f1"].append(round(f1["mixture"], 4))
            print(f"seed {seed}, {precision}: {kept['seconds'][-1]} s, {f1['mixture']:.1%}")
    ratio = statistics.median(
        b/a for a, b in zip(told["fp32"]["seconds"], told["bf16"]["seconds"]))
    means = {p: statistics.mean(kept["weighted_f1"]) for p, kept in told.items()}
    spread = statistics.stdev(told["fp32"]["weighted_f1"])
    print(f"bf16 takes {ratio:.2f} times the processor time of fp32; native: {native_bf16('cpu')}")
    print(f"weighted F1 {means['fp32']:.1%} and {means['bf16']:.1%}; seeds' spread {spread:.1%}")
    if args.save:
        write_json(args.save, dict(
            native_bf16=native_bf16("cpu"), seconds_bf16_to_fp32=round(ratio, 2), figures=told,
            epochs=args.epochs, spread_fp32=round(spread, 4),
            load=[round(x, 1) for x in os.getloadavg()],
            command="python benchmarks/precision.py", **provenance("cpu")))
