"""How well embeddings tell emotions apart in each split, for text that is frozen, tuned, or tuned
and cross-fitted: results/separability.json.

    python tools/separability.py meld frozen=minilm tuned=features/meld-tuned
    cross-fitted=features/meld-crossfit

The measure knows nothing of any model: every labelled utterance of a split takes the commonest
label of its ten nearest neighbours in that split (cosine), and the weighted F1 of that is written.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestNeighbors

from erc_moe.conversations import label_indices
from erc_moe.corpora import load_corpus
from erc_moe.features import FeaturePipeline
from erc_moe.files import write_json
from erc_moe.training.results import code_revision


def neighbours_f1(rows: np.ndarray, labels: np.ndarray, k: int = 10) -> float:     # (M, D), (M,)
    near = (
        NearestNeighbors(n_neighbors=k + 1, metric="cosine")
        .fit(rows)
        .kneighbors(rows, return_distance=False))
    # (M, C)
    votes = np.stack([
        np.bincount([labels[j] for j in js if j != i][:k], minlength=labels.max() + 1)
        for i, js in enumerate(near)])
    return f1_score(labels, votes.argmax(1), average="weighted")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument(
        "sources", nargs="+", metavar="NAME=SOURCE",
        help="a name for the figure, and what --text would be given")
    parser.add_argument("--data", help="the folder of the corpora; without it ERC_MOE_DATA is read")
    args = parser.parse_args()
    corpus, path = load_corpus(args.corpus, args.data), Path("results/separability.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    figures = {}
    for name, source in (s.split("=", 1) for s in args.sources):
        ready = FeaturePipeline({"text": source}).fit(corpus).apply(corpus)
        figures[name] = {}
        for split, conversations in ready.splits.items():
            rows, labels = (
                np.concatenate([c.features["text"] for c in conversations]),
                np.concatenate([label_indices(c, corpus.labels) for c in conversations]))
            figures[name][split] = round(
                float(neighbours_f1(rows[labels >= 0], labels[labels >= 0])), 4)
        print(args.corpus, name, figures[name])
    write_json(
        path,
        kept
        | {
            args.corpus: dict(
                figures=figures, split_hash=corpus.split_hash, code_revision=code_revision(),
                command=f"python tools/separability.py {args.corpus} {' '.join(args.sources)}")})


if __name__ == "__main__": main()
