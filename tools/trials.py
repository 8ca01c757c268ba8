"""Run the declared trials of stage 1 that are not on record, those first that are most likely to
pay per hour: `python tools/trials.py --data corpora`, or `... meld` for one corpus.

Each is judged on validation and becomes a line of results/stage1/CORPUS.jsonl; a trial that is
stopped carries on from its checkpoint in runs/stage1. It may be stopped at any time: the best of
those on record is told. `--list` prints order, core minutes and what is on record. `make trials`
calls this.
"""
import argparse
from pathlib import Path

import pandas as pd

from erc_moe.corpora import load_corpus
from erc_moe.errors import DataError
from erc_moe.experiments.recipes import (
    BASE, OF_CORPUS, TRIALS, TrialLedger, core_minutes, planned, run_trials, trial_key)


def listed(plan, corpora, results, data) -> pd.DataFrame:
    "The plan as a table, with estimates and what is on record."
    rows = []
    for name, trial in plan:
        corpus, changes = corpora[name], BASE | OF_CORPUS.get(name, {}) | trial.changes
        record = TrialLedger(results/f"{corpus.name}.jsonl").read().get(
            trial_key(trial, changes, corpus))
        learnt = sum(
            label is not None for of in (corpus, *(load_corpus(n, data) for n in trial.also))
            for c in of.splits["train"] for label in c.labels)
        minutes = core_minutes(
            trial.encoder, changes, learnt, sum(map(len, corpus.splits["validation"])))
        rows.append({
            "corpus": corpus.name, "trial": trial.name, "core minutes": f"{minutes:.0f}",
            "validation": f"{100*max(record['validation']):.1f}" if record else ""})
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "corpus", nargs="?",
        help="meld, iemocap, emorynlp, mosi, or a table of your own (default: all four, by rounds)")
    parser.add_argument("--data", help="where the corpora lie (or ERC_MOE_DATA)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the trials of these names")
    parser.add_argument("--list", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--results", type=Path, default="results/stage1")
    parser.add_argument("--work", default="runs/stage1", help="for checkpoints")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    args = parser.parse_args()
    names = [t.name for t in TRIALS]
    for name in args.only or ():
        if name not in names: parser.error(f"no trial {name!r}; there are {', '.join(names)}")
    wanted = (args.corpus,) if args.corpus else tuple(OF_CORPUS)
    plan = planned(wanted, tuple(t for t in TRIALS if t.name in (args.only or names)))
    try:
        corpora = {name: load_corpus(name, args.data) for name in wanted}
        if args.list: return print(listed(plan, corpora, args.results, args.data).to_string())
        for name, trial in plan:
            ledger = run_trials(
                corpora[name], args.data, (trial,), results=args.results, work=args.work,
                device=args.device, tell=lambda line: print(line, flush=True))
    except DataError as e: parser.exit(1, f"{e}\n")
    for corpus in corpora.values():
        ledger = TrialLedger(args.results/f"{corpus.name}.jsonl")
        if best := ledger.best: print(f"{corpus.name}: the best so far is {best['trial']}")
        print(ledger.table().to_string(index=False))


if __name__ == "__main__": main()
