"""Run the declared trials of stage 1 that are not on record: `python tools/trials.py meld --data
corpora`.

Each is judged on validation and becomes a line of results/stage1/CORPUS.jsonl; a trial that is
stopped carries on from its checkpoint in runs/stage1. `make trials` calls this.
"""
import argparse

from erc_moe.errors import DataError
from erc_moe.experiments.recipes import TRIALS, run_trials

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="meld, iemocap, emorynlp, mosi, or a table of your own")
    parser.add_argument("--data", help="where the corpora lie (or ERC_MOE_DATA)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the trials of these names")
    parser.add_argument("--results", default="results/stage1")
    parser.add_argument("--work", default="runs/stage1", help="for checkpoints")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    args = parser.parse_args()
    names = [t.name for t in TRIALS]
    for name in args.only or ():
        if name not in names: parser.error(f"no trial {name!r}; there are {', '.join(names)}")
    try:
        ledger = run_trials(
            args.corpus, args.data, tuple(t for t in TRIALS if t.name in (args.only or names)),
            results=args.results, work=args.work, device=args.device,
            tell=lambda line: print(line, flush=True))
    except DataError as e: parser.exit(1, f"{e}\n")
    print(ledger.table().to_string(index=False))
