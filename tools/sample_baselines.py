"""What text alone, speech alone and both together tell on the sample corpus: `python tools/sample_baselines.py`.

A logistic regression on single utterances (no context), on frozen sentence embeddings, on eGeMAPSv02 functionals, and on
both side by side. Its strength of regularisation is chosen on validation; test is scored once. Writes results/sample_baselines.json.
"""
import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from erc_moe.corpora import SPLITS, load_corpus
from erc_moe.features.speech import OpenSmile
from erc_moe.features.text import TextEncoder

corpus = load_corpus("sample")
utterances = {s: [u for c in corpus.splits[s] for u in c.utterances] for s in SPLITS}
labels = {s: [u.label for u in us] for s, us in utterances.items()}
text, speech = TextEncoder("minilm"), OpenSmile("egemaps")
features = {"text": {s: text.embed([u.text for u in us]) for s, us in utterances.items()},
            "speech": {s: np.stack(speech.rows([u.audio for u in us])) for s, us in utterances.items()}}


def inputs(modalities: list[str]) -> dict[str, np.ndarray]:
    "Per split (utterances, D): standardised on train, each modality with the same total variance."
    scaled = {m: StandardScaler().fit(features[m]["train"]) for m in modalities}
    return {s: np.concatenate([scaled[m].transform(features[m][s]) / np.sqrt(features[m][s].shape[1]) for m in modalities], 1) for s in SPLITS}


def weighted_f1(truth, predicted) -> float: return round(float(f1_score(truth, predicted, average="weighted")), 4)


results = {"always neutral": {s: weighted_f1(labels[s], ["neutral"] * len(labels[s])) for s in ("validation", "test")}}
for name, modalities in {"text alone": ["text"], "speech alone": ["speech"], "text and speech": ["text", "speech"]}.items():
    x = inputs(modalities)
    models = {C: LogisticRegression(C=C, max_iter=3000).fit(x["train"], labels["train"]) for C in (1, 3, 10, 30)}
    best = max(models, key=lambda C: weighted_f1(labels["validation"], models[C].predict(x["validation"])))
    results[name] = {s: weighted_f1(labels[s], models[best].predict(x[s])) for s in ("validation", "test")} | {"C": best}

Path(__file__).resolve().parent.parent.joinpath("results", "sample_baselines.json").write_text(json.dumps(dict(
    command="python tools/sample_baselines.py", corpus="sample", split_hash=corpus.split_hash, measure="weighted F1",
    text=text.extractor.name, speech=speech.extractor.name, results=results), indent=1) + "\n")
