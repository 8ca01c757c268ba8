"""How trainings of the `cpu` preset share the cores: one after the other with all threads, or side
by side with one thread each.

    python benchmarks/reproduce.py --data corpora      # some minutes

Both forms train the same cells (MiSTER-E and SURE on IEMOCAP, frozen features, two seeds each) for
a few epochs, in turns; data is loaded before the
clock starts. Prints seconds per training and the ratio. `erc_moe reproduce` trains side by side.
"""
import argparse
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from erc_moe.experiments.declare import Row
from erc_moe.experiments.run import prepared, train_cell
from erc_moe.files import write_json
from erc_moe.training.results import provenance


def begin(threads: int): torch.set_num_threads(threads)


def load(cell, data): prepared(cell, data); time.sleep(1)    # every worker gets one


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=os.environ.get("ERC_MOE_DATA"), help="the folder of the corpora")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", help="write the figures to this JSON file")
    args = parser.parse_args()
    cores = os.cpu_count()
    cells = [
        Row("", model, "frozen", changes=dict(epochs=args.epochs)).cell("iemocap", seed=seed)
        for model in ("mister_e", "sure")
        for seed in range(cores)]
    forms = {
        "one after the other": ProcessPoolExecutor(1, get_context("spawn"), begin, (cores,)),
        "side by side": ProcessPoolExecutor(cores, get_context("spawn"), begin, (1,))}
    took = {name: [] for name in forms}
    for pool in forms.values(): list(pool.map(load, cells, [args.data]*len(cells)))
    for _ in range(args.rounds):
        for name, pool in forms.items():
            began = time.perf_counter()
            list(pool.map(train_cell, cells, [False]*len(cells), [args.data]*len(cells)))
            took[name].append((time.perf_counter() - began)/len(cells))
    seconds = {name: statistics.median(t) for name, t in took.items()}
    ratio = seconds["one after the other"]/seconds["side by side"]
    for name, s in seconds.items(): print(f"{name}: {s:.2f} s a training of {args.epochs} epochs")
    print(f"side by side is {ratio:.2f} times as fast on {cores} cores")
    if args.save:
        write_json(
            args.save,
            dict(
                seconds=seconds,
                ratio=ratio,
                cores=cores,
                epochs=args.epochs,
                command=f"python benchmarks/reproduce.py --epochs {args.epochs} --rounds "
                f"{args.rounds}",
                **provenance("cpu")))
