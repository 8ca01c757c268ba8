"""Which conversations of EmoryNLP are scenes of MELD's, split by split, and how often two scenes
share marks by chance: results/shared-scenes.json.

    python tools/shared_scenes.py --data corpora
"""
import argparse
from pathlib import Path

from erc_moe.corpora import load_corpus, seen
from erc_moe.files import write_json

SPLITS = "train", "validation", "test"


def marks(conversations) -> dict[str, list[str]]:
    return {c.id: seen.marks(c) for c in conversations}


def by_chance(learnt, held) -> dict[str, int]:
    "Conversations of `learnt` that share so many marks with one of `held`."
    at = {c.id: {*seen.marks(c)} for c in held}
    most = [max(len(at[h] & {*of}) for h in at) for of in learnt.values()]
    return {str(n): sum(m >= n for m in most) for n in (1, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="where the corpora lie (or ERC_MOE_DATA)")
    args = parser.parse_args()
    meld, emorynlp, iemocap = (
        load_corpus(name, args.data) for name in ("meld", "emorynlp", "iemocap"))
    write_json(Path("results/shared-scenes.json"), {
        "command": "python tools/shared_scenes.py --data corpora", "splits": SPLITS,
        "conversations": {
            c.name: {s: len(c.splits[s]) for s in SPLITS} for c in (meld, emorynlp)},
        "shared": [    # conversations of EmoryNLP's split (row) that are scenes of MELD's (column)
            [len(seen.shared(marks(emorynlp.splits[e]), meld.splits[m])) for m in SPLITS]
            for e in SPLITS],
        "by chance": {
            f"{c.name}, meld": by_chance(marks(c.splits["train"]), meld.splits["test"])
            for c in (meld, iemocap)}})


if __name__ == "__main__":
    main()
