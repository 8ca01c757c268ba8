"""The model in the box and `erc_moe.load`: what ships, what it computes, what it says of itself."""
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

import erc_moe
from erc_moe.conversations import Conversation, DataError, Utterance, collate
from erc_moe.corpora import load_corpus
from erc_moe.corpora.core import FeatureTable
from erc_moe.evaluation.calibration import calibrate
from erc_moe.predict import PRETRAINED, Predictor, load

BOX = PRETRAINED/"meld"
RECORD = json.loads((Path(__file__).parents[1]/"results/pretrained-meld.json").read_text())
PAIRS = [("Ann", "I got the job!"), ("Ben", "No way! Really?"), ("Ann", "I start on Monday."),
         ("Ben", "But then you have to move away."), ("Ann", "I know. That is the bad part.")]


@pytest.fixture(scope="module")
def model(): return load("meld")


@pytest.fixture(scope="module")
def heard():
    "A conversation whose third turn has no sound, and its measures."
    turns = [Utterance(f"u{i}", *pair) for i, pair in enumerate(PAIRS)]
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    rows = rows*[1, 5, 2, 40, 20, 50, 1, 3] + [2, 60, 8, 180, 50, 200, 4, 8]
    ids = [u.id for u in turns if u.id != "u2"]
    return Conversation("talk", turns), dict(
        prosody8=FeatureTable("prosody8", ids, rows[[0, 1, 3, 4]]))


def test_what_ships():
    files = sorted(p for p in BOX.rglob("*") if p.is_file())
    assert sum(p.stat().st_size for p in files) < 6e6
    assert {p.suffix for p in files} == {".json", ".safetensors", ".md"}
    config = json.loads((BOX/"config.json").read_text())
    assert len(config["seeds"]) == 5 and config["temperature"] == RECORD["temperature"]
    assert not any(str(Path.home()) in p.read_text() or "/work" in p.read_text()
                   for p in files if p.suffix != ".safetensors")


def test_by_hand(model, heard):
    "Stage by stage, without the pipeline, the merged encoder or `Predictions`."
    conv, arrays = heard
    from erc_moe.encoders import load_encoder
    encoder = load_encoder(BOX/"text-encoder")
    text = encoder.embed(encoder.dataset([conv], model.labels))                      # (5, W)
    raw = arrays["prosody8"].values.astype(np.float64)                               # (4, 8)
    scaled = lambda x, part: np.clip((x - part.mean)/part.std, -10, 10)
    (words,), (voice,) = model.pipeline.parts["text"], model.pipeline.parts["speech"]
    z = scaled(raw, voice)
    z = (z - z.mean(0))/z.std(0)
    speech = np.zeros((5, 8))
    speech[[0, 1, 3, 4]] = z
    ready = conv.with_features("text", scaled(text, words))
    ready = ready.with_features("speech", speech, np.array([1, 1, 0, 1, 1], bool))
    batch = collate([ready], model.labels, ["speech", "text"])
    with torch.no_grad():
        said = [m(batch).logits[0].double().softmax(-1) for m in model.models.values()]
    logs = torch.stack(said).mean(0).log()/model.temperature
    predicted = model.predict(conv, arrays=arrays)
    np.testing.assert_allclose(predicted.probabilities, logs.softmax(-1).numpy(), atol=1e-4)
    assert predicted.emotions("speech")[2] == "" and all(
        predicted.emotions("speech")[i] for i in (0, 1, 3, 4))


def test_a_missing_voice_is_no_voice(model, heard):
    conv, arrays = heard
    same = lambda a, b: np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-6)
    chat, without = model.predict(PAIRS), model.predict(conv, arrays=arrays, without=["speech"])
    same(chat, without)
    assert chat.emotions("speech") == [""]*5 and (chat.gate[:, 0] == 0).all()
    other = dict(
        prosody8=replace(arrays["prosody8"], values=arrays["prosody8"].values[::-1].copy()))
    same(model.predict(conv, arrays=other, without=["speech"]), without)
    deaf = model.predict(conv, arrays=arrays, without=["text"])
    assert deaf.emotions("text") == [""]*5 and (deaf.gate[:, 1] == 0).all()
    reworded = Conversation("talk", [replace(u, text="?") for u in conv.utterances])
    same(model.predict(reworded, arrays=arrays, without=["text"]), deaf)
    silent = Conversation(
        "talk", [replace(u, text="" if u.id == "u1" else u.text) for u in conv.utterances])
    assert model.predict(silent, arrays=arrays).emotions("text")[1] == ""


def test_batch_mates_order_and_speakers_change_nothing(model):
    other = Conversation(
        "other", [Utterance(f"o{i}", "Cy", t) for i, t in enumerate(["Hm.", "Go away!"])])
    talk = Conversation("chat", [Utterance(f"chat_{i}", *p) for i, p in enumerate(PAIRS)])
    renamed = Conversation(
        "chat", [replace(u, speaker={"Ann": "1", "Ben": "2"}[u.speaker]) for u in talk.utterances])
    alone = model.predict(PAIRS).probabilities
    for given in ([talk, other], [other, talk], [renamed]):
        np.testing.assert_allclose(model.predict(given)["chat"].probabilities, alone, atol=1e-5)


def test_calibration(model):
    "The temperature is the best one for the validation's log probabilities on record."
    held = RECORD["validation"]
    logs, truth = np.array(held["log_probabilities"]), np.array(held["truth"])
    def loss(log_t):
        z = logs/np.exp(log_t)
        return -(z - np.log(np.exp(z).sum(1, keepdims=True)))[np.arange(len(truth)), truth].mean()
    found = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)
    assert found == pytest.approx(model.temperature, rel=1e-3)
    before, after = (RECORD["calibration"]["validation"][k]["ece"] for k in ("before", "after"))
    assert after < before
    plain = replace(model, temperature=1.).predict(PAIRS)
    np.testing.assert_allclose(calibrate(plain.probabilities, model.temperature),
                               model.predict(PAIRS).probabilities, atol=1e-12)


def test_saved_and_loaded_to_the_bit(model, tmp_path):
    again = load(model.save(tmp_path/"mine"))
    digest = lambda folder: {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
                             for p in folder.rglob("*") if p.is_file()}
    assert digest(tmp_path/"mine") == digest(BOX)
    assert (again.predict(PAIRS).probabilities == model.predict(PAIRS).probabilities).all()


def test_uploads_what_it_saves(model, monkeypatch):
    sent = {}
    class Hub:
        def __init__(self, token=None): sent["token"] = token
        def create_repo(self, repo, private, exist_ok): return f"https://hub/{repo}"
        def upload_folder(self, repo_id, folder_path, commit_message):
            sent.update(
                repo=repo_id, files={p.name for p in Path(folder_path).rglob("*") if p.is_file()})
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert model.push_to_hub("ann/talks", token="t") == "https://hub/ann/talks"
    assert sent["repo"] == "ann/talks" and sent["files"] == {
        p.name for p in BOX.rglob("*") if p.is_file()}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "features/pipeline.json",
                                  "features/scaling.safetensors"])
def test_damage_is_named(model, tmp_path, file):
    folder = model.save(tmp_path/"mine")
    (folder/file).write_bytes((folder/file).read_bytes()[:-30])
    with pytest.raises(DataError, match="no usable|damaged|no file"): load(folder)
    (folder/file).unlink()
    with pytest.raises(DataError, match="no usable|damaged|no file"): load(folder)


def test_columns_that_a_prediction_does_not_need(model, tmp_path):
    (tmp_path/"talk.csv").write_text(
        "conversation,order,speaker,text,label,split\nc,1,A,Hi,contempt,dev\nc,2,B,Ho,Joy,\n")
    assert model.predict(tmp_path/"talk.csv").table().label.tolist() == ["contempt", "Joy"]


def test_nothing_heavy_is_imported():
    "Importing the package imports no torch; a prediction none of the training's libraries."
    script = (
        "import sys, erc_moe; assert 'torch' not in sys.modules; "
        f"erc_moe.load('meld').predict({PAIRS!r}); "
        "print([m for m in ('sklearn', 'transformers', 'peft', 'matplotlib', "
        "'opensmile', 'scipy.signal', 'scipy.special', 'accelerate') "
        "if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(
    "ERC_MOE_DATA" not in os.environ, reason="ERC_MOE_DATA names no folder of corpora"
)
def test_the_card_tells_the_truth(model):
    "Strict scores of the shipped model on MELD's test split, computed again."
    corpus = load_corpus("meld")
    if "prosody8" not in corpus.arrays: pytest.skip("MELD's prosody tables are not there")
    assert corpus.split_hash == RECORD["split_hash"]
    from sklearn.metrics import f1_score
    test = corpus.splits["test"]
    truth = [u.label for c in test for u in c.utterances]
    card = (BOX/"README.md").read_text()
    for way, without in (
        ("text and speech", ()), ("text alone", ("speech",)), ("speech alone", ("text",))):
        said = model.predict(test, arrays=corpus.arrays, without=without)
        f1 = f1_score(truth, said.predicted, average="weighted")
        assert f1 == pytest.approx(RECORD["test"][way]["together"]["weighted_f1"], abs=2e-3)
        assert (
            f"| {way} |" in card
            and f"| {100 * RECORD['test'][way]['together']['weighted_f1']:.1f} |" in card)
    one = f1_score(
        truth, model.predict(test, arrays=corpus.arrays, seed=0).predicted, average="weighted")
    assert one == pytest.approx(RECORD["test"]["text and speech"]["seeds"]["per_seed"][0], abs=2e-3)


def test_predictor_is_reachable(): assert erc_moe.Predictor is Predictor and erc_moe.load is load


@pytest.mark.parametrize("file", ["model.safetensors", "text-encoder/encoder.safetensors"])
def test_weights_that_are_not_finite_are_refused(tmp_path, file):
    from safetensors.torch import load_file, save_file
    load("meld").save(tmp_path)
    weights = load_file(tmp_path/file)
    name = next(n for n, x in weights.items() if x.is_floating_point())
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, tmp_path/file)
    with pytest.raises(DataError, match="hold NaN or infinity"): load(tmp_path).predict(PAIRS)
