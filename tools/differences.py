"""How far runs differ: `python tools/differences.py runs/sure-iemocap-frozen runs/sure-iemocap-no-moe runs/mister_e-iemocap-frozen`.

Weighted F1 on test of every further run less the first's, with a paired bootstrap over conversations of the means over seeds. Writes
results/differences-NAME.json, NAME being the first run's.
"""
import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from erc_moe.evaluation import conversation_counts, paired_bootstrap
from erc_moe.training import Run
from erc_moe.training.results import provenance, write_json

RESULTS = Path(__file__).resolve().parent.parent / "results"


def counts(run: Run) -> np.ndarray:
    "The confusion of every seed in every test conversation, (S, B, C, C)."
    index = {l: i for i, l in enumerate(run.labels)} | {"": -1}
    tables = [run.predictions(seed) for seed in run.seeds]
    return np.stack([conversation_counts(t.label.map(index), t.predicted.map(index), pd.factorize(t.conversation)[0], len(run.labels)) for t in tables])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders that erc_moe_train wrote; the first is what the others are compared with")
    first, *others = parser.parse_args().runs
    reference = counts(Run(first))
    write_json(RESULTS / f"differences-{first.name}.json", dict(
        reference=first.name, measure="weighted F1 on test, less the reference's", **provenance("cpu"), command=f"python {' '.join(sys.argv)}",
        differences={run.name: asdict(paired_bootstrap(counts(Run(run)), reference)) for run in others}))
