"""Write erc_moe/learning_rates.csv, which the presets read, from the records of the search:
`python tools/learning_rates.py`. `make rates` trains the search and the finals and calls this.

The rule and what is on record are in nbs/851_learning_rates.ipynb. A search that is not complete
keeps its line. Where the file changes, the exit status is 1: commit it before the next training,
whose record names the commit that it was made with.
"""
import argparse
from pathlib import Path

from erc_moe.experiments import Ledger
from erc_moe.experiments.papers import RATES
from erc_moe.experiments.rates import best_rates, rate_table
from erc_moe.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=ROOT/"results"/"reproduce")
    parser.add_argument("--out", type=Path, default=ROOT/"erc_moe"/"learning_rates.csv")
    args = parser.parse_args(argv)
    ledger = Ledger(args.results)
    frame, best = rate_table(ledger), best_rates(ledger)
    text = frame.to_csv(index=False, lineterminator="\n").encode()
    changed = not args.out.exists() or args.out.read_bytes() != text
    if changed: atomic_write(args.out, text)
    wide = frame.pivot(index="model", columns="corpus", values="rate")
    print(wide.loc[frame.model.unique()].to_string())
    edges = [
        f"{m} on {c} ({of[0]:g})" for (m, c), of in best.items() if of[0] in (RATES[0], RATES[-1])]
    print(f"{len(best)} of {len(frame)} searches are complete.")
    if edges: print(f"At an edge of the grid: {', '.join(edges)}.")
    print("The table has changed: commit it." if changed else "The table is as it was.")
    return int(changed)


if __name__ == "__main__": raise SystemExit(main())
