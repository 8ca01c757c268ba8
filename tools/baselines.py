"""What single utterances tell without any context: `python tools/baselines.py mosi --text minilm
--speech audio73 [--data DIR]`.

A logistic regression on the frozen text embeddings, on the speech measures as they are, and on both
side by side. Its strength of regularisation is
chosen on validation; test is scored once. Writes results/baselines-CORPUS.json.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from erc_moe.corpora import SPLITS, load_corpus
from erc_moe.features import FeaturePipeline
from erc_moe.files import write_json
from erc_moe.training.results import provenance

RESULTS = Path(__file__).resolve().parent.parent / "results"
STRENGTHS = (0.1, 0.3, 1, 3, 10, 30)


def baselines(corpus, sources: dict[str, str]) -> dict:
    """Weighted F1 on validation and test of the commonest class, of each modality alone and of
    all together."""
    pipeline = FeaturePipeline(sources).fit(corpus)
    ready = pipeline.apply(corpus)
    utterances = {
        s: [(c, i) for c in ready.splits[s] for i, u in enumerate(c.utterances) if u.label]
        for s in SPLITS}
    truth = {s: [c.labels[i] for c, i in utterances[s]] for s in SPLITS}
    # each modality with the same variance
    rows = lambda m, s: (
        np.stack([c.features[m][i] for c, i in utterances[s]]) / np.sqrt(pipeline.widths[m]))
    inputs = lambda modalities: {
        s: np.concatenate([rows(m, s) for m in modalities], 1) for s in SPLITS}
    score = lambda model, x, s: round(
        float(f1_score(truth[s], model.predict(x[s]), average="weighted")), 4)
    first = inputs(list(sources)[:1])
    commonest = DummyClassifier(strategy="most_frequent").fit(first["train"], truth["train"])
    results = {
        f"always {commonest.predict(first['test'][:1])[0]}": {
            s: score(commonest, first, s) for s in ("validation", "test")}}
    for modalities in [[m] for m in sources] + ([list(sources)] if len(sources) > 1 else []):
        x = inputs(modalities)
        models = {
            C: LogisticRegression(C=C, max_iter=3000).fit(x["train"], truth["train"])
            for C in STRENGTHS}
        best = max(models, key=lambda C: score(models[C], x, "validation"))
        name = " and ".join(modalities) if len(modalities) > 1 else f"{modalities[0]} alone"
        results[name] = {s: score(models[best], x, s) for s in ("validation", "test")} | {"C": best}
    return dict(
        corpus=corpus.name, split_hash=corpus.split_hash, feature_hash=pipeline.feature_hash,
        features=sources, measure="weighted F1", **provenance("cpu"),
        command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", help="sample, meld, emorynlp, iemocap or mosi")
    parser.add_argument(
        "--data", help="the folder that holds the corpora; without it, ERC_MOE_DATA")
    parser.add_argument("--text", help="source of text features", default="minilm")
    parser.add_argument("--speech", help="source of speech features")
    args = parser.parse_args()
    sources = {"text": args.text} | (
        {"speech": "+".join(f"{term}@corpus" for term in args.speech.split("+"))}
        if args.speech
        else {})
    write_json(
        RESULTS / f"baselines-{args.corpus}.json",
        baselines(load_corpus(args.corpus, args.data), sources))
