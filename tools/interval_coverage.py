"""How often intervals hold a known difference, and how often a difference is found: made-up
systems on made-up conversations, in results/interval-coverage.json (about ten minutes on one core).

    python tools/interval_coverage.py

A world has conversations that are easy or hard, utterances that are hard for every system, systems
that suit some conversations better, and seeds that differ in skill. Test sets are drawn from it,
both systems are trained anew, and every kind of interval says where the difference lies. The truth
is that of 4000 conversations and of seeds at the middle of 24 equal shares of their distribution.
"""
import argparse

import numpy as np
from scipy.special import ndtri

from erc_moe.evaluation import conversation_counts, paired_difference, weighted_f1
from erc_moe.evaluation.statistics import _by_seed
from erc_moe.files import write_json
from erc_moe.training.results import provenance

CLASSES = np.array([.4, .3, .2, .1])
WORLDS = {  # name -> conversations and utterances of the test set that it resembles
    "IEMOCAP": (31, 52), "MELD": (280, 9), "MOSI": (31, 22)}
SPREADS = (0., .02, .05, .1)    # of the seeds' skill, a standard deviation of the latent one


def trained(
    rng, conversations: int, utterances: int, seeds: np.ndarray, gap: float, noise=.3, shared=.7,
) -> np.ndarray:    # int64 (2, S, B, C, C): system, seed, conversation, truth, prediction
    "Two systems, of which the first is better by `gap`; seeds: (2, S), their skill."
    lengths = rng.integers(utterances // 2, utterances + utterances // 2 + 1, conversations)
    owner = np.arange(conversations).repeat(lengths)                                  # (M,)
    mood = rng.dirichlet(8 * CLASSES, conversations).cumsum(1)                        # (B, C)
    labels = (rng.random(len(owner))[:, None] > mood[owner]).sum(1).clip(0, 3)
    easy = shared**.5 * rng.normal(size=len(owner)) + .5 * rng.normal(size=conversations)[owner]
    counts = []
    for system, better in zip(seeds, (gap, 0)):
        suits = easy + better + .45 + noise * rng.normal(size=conversations)[owner]
        for skill in system:
            right = suits + skill + (1 - shared)**.5 * rng.normal(size=len(owner)) > 0
            wrong = (labels + 1 + rng.choice(3, len(owner), p=[.6, .3, .1])) % 4
            said = np.where(right, labels, wrong)
            counts.append(conversation_counts(labels, said, owner, 4))
    return np.stack(counts).reshape(2, seeds.shape[1], conversations, 4, 4)


def truth(utterances: int, spread: float, gap: float) -> tuple[float, float]:
    "The true difference and the true spread of a seed's difference, both in weighted F1."
    seeds = spread * np.stack([ndtri((np.arange(24) + .5) / 24)] * 2)
    counts = trained(np.random.default_rng(1), 4000, utterances, seeds, gap)
    scores = weighted_f1(counts.sum(2))                                               # (2, S)
    return float(np.subtract(*scores.mean(1))), float(scores.var(1).sum()**.5 * (spread > 0))


def naive(counts: np.ndarray, seed: int, resamples: int) -> list[float]:
    "Seeds and conversations drawn with replacement, both, and nothing else."
    S = counts.shape[1]
    gaps = np.subtract(*(_by_seed(c, weighted_f1, resamples, seed) for c in counts))  # (R, S)
    drawn = np.random.default_rng(seed).integers(S, size=gaps.shape)
    return np.quantile(np.take_along_axis(gaps, drawn, 1).mean(1), [.025, .975]).tolist()


def measured(rng, size, spread, count, gap, splits, resamples=1000) -> dict:
    "Coverage of the three kinds of interval, the share of differences found, the mean half-width."
    true, seed_spread = truth(size[1], spread, gap)
    held, found, half = dict(conversations=0, naive=0, two_level=0), 0, 0.
    for split in range(splits):
        counts = trained(rng, *size, spread * rng.normal(size=(2, count)), gap)
        d = paired_difference(*counts, resamples=resamples, seed=split)
        ends = dict(
            conversations=(d.conversations.low, d.conversations.high),
            naive=naive(counts, split, resamples), two_level=(d.low, d.high))
        for kind, (low, high) in ends.items(): held[kind] += low <= true <= high
        found += d.low > 0 or d.high < 0
        half += (d.high - d.low) / 2
    return dict(
        seeds=count, seed_spread=round(seed_spread, 5), difference=round(true, 5),
        coverage={k: round(v / splits, 4) for k, v in held.items()},
        found=round(found / splits, 4), half_width=round(half / splits, 5))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=1000, help="test sets of each world")
    parser.add_argument("--out", default="results/interval-coverage.json")
    args, worlds = parser.parse_args(), {}
    for number, (name, size) in enumerate(WORLDS.items()):
        rng = np.random.default_rng(number)
        of = worlds[name] = dict(conversations=size[0], utterances=size[1], points=[], power=[])
        for count in (3, 5):
            for spread in SPREADS:
                of["points"].append(measured(rng, size, spread, count, .05, args.splits))
                print(name, of["points"][-1], flush=True)
        for gap in (0., .03, .06, .1, .15, .2, .3):
            of["power"].append(measured(rng, size, SPREADS[1], 5, gap, args.splits // 2))
            print(name, of["power"][-1], flush=True)
    write_json(
        args.out,
        dict(
            worlds=worlds, splits=args.splits,
            command=f"python tools/interval_coverage.py --splits {args.splits}",
            **provenance("cpu")))


if __name__ == "__main__": main()
