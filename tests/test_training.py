"The trainer, the run folder and prediction, with a model that the library has never heard of."
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.corpora.core import Corpus, FeatureTable
from erc_moe.losses import LossParts
from erc_moe.models import ModelEntry, register
from erc_moe.training import Run, train
from erc_moe.training.loop import epoch_seed

LABELS = ["neutral", "joy", "anger"]


@dataclass
class TinyConfig:
    widths: dict[str, int]
    classes: int
    labels: list[str] | None = None
    dropout: float = 0.2
    class_weights: list[float] | None = None
    model: str = "tiny"

    @classmethod
    def cpu(cls, corpus, widths, classes, **changes): return cls(widths, classes, **changes)


@dataclass
class TinyOutput:
    logits: torch.Tensor
    experts: dict
    gate: torch.Tensor | None


class Tiny(nn.Module, PyTorchModelHubMixin):
    "A linear expert per modality and a gate of their logits: nothing in the library knows it."
    def __init__(self, config):
        super().__init__()
        self.config = config if isinstance(config, TinyConfig) else TinyConfig(**config)
        self.experts = nn.ModuleDict({
            m: nn.Sequential(nn.Dropout(self.config.dropout), nn.Linear(d, self.config.classes))
            for m, d in sorted(self.config.widths.items())})
        self.gate = nn.Linear(len(self.experts)*self.config.classes, len(self.experts))

    def forward(self, batch):
        experts = {m: e(batch.features[m])*batch.mask[..., None] for m, e in self.experts.items()}
        stacked = torch.stack(list(experts.values()), 2)                       # (B, N, E, C)
        gate = self.gate(stacked.flatten(2)).softmax(-1)*batch.mask[..., None]
        return TinyOutput(torch.einsum("bne,bnec->bnc", gate, stacked), experts, gate)

    def loss(self, output, batch):
        weight = self.config.class_weights and torch.tensor(
            self.config.class_weights, device=output.logits.device)
        ce = lambda x: nn.functional.cross_entropy(
            x.flatten(0, 1).float(), batch.labels.flatten(), weight, ignore_index=-1)
        return LossParts(
            {"mixture": ce(output.logits), "experts": sum(map(ce, output.experts.values()))})

    def save_pretrained(self, folder):
        super().save_pretrained(folder, config={"config": asdict(self.config)})


register(ModelEntry(
    "tiny", Tiny, TinyConfig, training={"cpu": {"": dict(epochs=6, batch_size=4, lr=1e-2)}}))


def make_corpus(seed=0, labels=LABELS):
    "Conversations whose two feature arrays each tell half of the emotion; some clips are lost."
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(labels), 6))
    splits, ids, words, voice = {}, [], [], []
    for split, n in (("train", 14), ("validation", 5), ("test", 6)):
        splits[split] = []
        for i in range(n):
            turns = []
            for j in range(rng.integers(2, 9)):
                y = int(rng.integers(len(labels)))
                turns.append(
                    Utterance(
                        f"{split}{i}_{j}", "AB"[j % 2], f"turn {j}",
                        None if rng.random() < 0.1 else labels[y]))
                ids.append(turns[-1].id)
                words.append(means[y] + rng.normal(size=6))
                voice.append(means[y][:3] + 1.5*rng.normal(size=3))
            splits[split].append(Conversation(f"{split}{i}", turns))
    heard = rng.random(len(ids)) < 0.9
    arrays = {
        "words": FeatureTable("words", ids, np.array(words, np.float32), ""),
        "voice": FeatureTable(
            "voice", [i for i, h in zip(ids, heard) if h], np.array(voice, np.float32)[heard], "")}
    return Corpus("made_up", list(labels), splits, [], arrays)


@pytest.fixture(scope="module")
def corpus(): return make_corpus()


def run_tiny(corpus, out, **kwargs):
    return train(
        "tiny",
        corpus,
        **dict(text="words", speech="voice", seeds=2, device="cpu", progress=False, out=out)
        | kwargs)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory): return run_tiny(corpus, tmp_path_factory.mktemp("runs")/"tiny")


def weights(run, seed, name="model"): return run.model(seed, name).state_dict()


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_summary_holds_what_a_result_needs(run, corpus):
    s = json.loads((run.folder/"summary.json").read_text())
    for key in (
        "model", "corpus", "protocol", "preset", "seeds", "split_hash", "feature_hash", "config",
        "versions", "device", "code_revision", "command", "seconds"):
        assert key in s, key
    assert s["split_hash"] == corpus.split_hash and s["seeds"] == [0, 1]
    f1 = s["test"]["weighted_f1"]
    assert (
        f1["mean"] == pytest.approx(np.mean(f1["per_seed"]))
        and f1["std"] == pytest.approx(np.std(f1["per_seed"], ddof=1))
        and len(f1["per_seed"]) == 2)
    assert f1["interval"]["low"] <= f1["mean"] <= f1["interval"]["high"]
    assert set(s["test"]["experts"]) == {"text", "speech"}
    assert f1["mean"] > 0.4, "a tiny model on separable features learns something"


def test_the_trainer_knows_no_model():
    "No model's name stands in the training code."
    from erc_moe.training import loop, predictions, results, runs
    for module in (loop, predictions, results, runs):
        text = Path(module.__file__).read_text().lower()
        assert (
            "mistere" not in text
            and "import mister_e" not in text
            and "== \"mister_e\"" not in text)


def test_metrics_of_the_summary_are_those_of_the_predictions(run):
    from sklearn.metrics import f1_score
    for seed, f1 in zip(run.seeds, run.summary["test"]["weighted_f1"]["per_seed"]):
        rows = run.predictions(seed).query("label != ''")
        assert f1 == pytest.approx(f1_score(rows.label, rows.predicted, average="weighted"))


def test_finished_seeds_are_not_repeated(run, corpus):
    # a card tells of all seeds
    before = {
        p: p.stat().st_mtime_ns
        for p in run.folder.glob("seed-*/**/*")
        if p.is_file() and p.name != "README.md"}
    more = run_tiny(corpus, run.folder, seeds=[0, 1, 2])
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert more.seeds == [0, 1, 2]
    run_tiny(corpus, run.folder)


def test_other_settings_do_not_mix(run, corpus):
    with pytest.raises(DataError, match=r"config.training.lr: 0.01 there, 0.02 now"):
        run_tiny(corpus, run.folder, changes=["lr=0.02"])
    with pytest.raises(DataError, match="split_hash"):
        run_tiny(make_corpus(1), run.folder)


def test_a_folder_with_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path/"thesis.txt").write_text("do not overwrite")
    with pytest.raises(DataError, match="is not empty and holds no run"): run_tiny(corpus, tmp_path)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_stopping_at_any_epoch_changes_nothing(
    corpus, tmp_path, stop, checkpoint_seconds, monkeypatch
):
    options = dict(
        changes=dict(epochs=6, ema=0.9, schedule="cosine", buckets=True),
        checkpoint_seconds=checkpoint_seconds)
    alone = run_tiny(corpus, tmp_path/"alone", seeds=[3], **options)
    steps, forward = math.ceil(14/4)*stop + 2, Tiny.loss
    count = iter(range(10**6))
    def unplugged(self, output, batch):
        if next(count) == steps: raise KeyboardInterrupt
        return forward(self, output, batch)
    monkeypatch.setattr(Tiny, "loss", unplugged)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(corpus, tmp_path/"stopped", seeds=[3], **options)
    with pytest.raises(DataError, match="was not finished"): Run(tmp_path/"stopped")
    assert (tmp_path/"stopped"/"seed-3"/"checkpoint.pt").exists() == (checkpoint_seconds == 0)
    resumed = run_tiny(corpus, tmp_path/"stopped", seeds=[3], **options)
    assert same(weights(alone, 3), weights(resumed, 3))
    assert not (tmp_path/"stopped"/"seed-3"/"checkpoint.pt").exists()
    timeless = lambda r: [{k: v for k, v in e.items() if k != "seconds"} for e in r.log(3)]
    assert timeless(alone) == timeless(resumed)


def test_the_paper_protocol_keeps_the_strict_choice_of_the_same_training(corpus, run, tmp_path):
    paper = run_tiny(corpus, tmp_path/"paper", protocol="paper")
    assert "test-selected" in paper.summary["selection"]
    for seed in (0, 1): assert same(weights(run, seed), weights(paper, seed, "model-strict"))
    strict, selected = (
        paper.summary["strict"]["test"]["weighted_f1"]["per_seed"],
        paper.summary["test"]["weighted_f1"]["per_seed"])
    assert strict == run.summary["test"]["weighted_f1"]["per_seed"]
    assert all(b >= a for a, b in zip(strict, selected))
    assert "test-selected" in paper._repr_html_()


def test_strict_never_looks_at_test(corpus, run, tmp_path):
    "Other test conversations, same training."
    other = Corpus(
        "made_up", corpus.labels, corpus.splits | {"test": corpus.splits["test"][:2]}, [],
        corpus.arrays)
    assert same(weights(run, 0), weights(run_tiny(other, tmp_path/"other", seeds=1), 0))


def test_of_equal_epochs_the_earliest_counts(corpus, tmp_path):
    still = run_tiny(
        corpus, tmp_path / "still", seeds=1, changes=dict(lr=0.0, epochs=4), protocol="paper")
    assert (
        still.summary["epochs"] == [1]
        and still.summary["strict"]["epochs"] == [1]
        and len(still.log()) == 4)


def test_ema_evaluates_the_average(corpus, tmp_path):
    raw = run_tiny(corpus, tmp_path/"raw", seeds=1, changes=dict(epochs=1))
    mean = run_tiny(corpus, tmp_path/"mean", seeds=1, changes=dict(epochs=1, ema=0.99))
    initial = torch.cat(
        [p.flatten() for p in fresh(raw.summary["features"]["widths"]).parameters()])
    moved = lambda r: (torch.cat([p.flatten() for p in r.model(0).parameters()]) - initial).norm()
    assert 0 < moved(mean) < moved(raw)


def fresh(widths):
    torch.manual_seed(epoch_seed(0, 0))
    return Tiny(TinyConfig(widths, 3))


def test_class_weights_reach_the_model(corpus, tmp_path):
    weighted = run_tiny(
        corpus, tmp_path / "weighted", seeds=1, changes=["class_weights=inverse_frequency"])
    labels = [l for c in corpus.splits["train"] for l in c.labels if l]
    expected = [len(labels)/(3*labels.count(l)) for l in LABELS]
    assert weighted.summary["config"]["model"]["class_weights"] == pytest.approx(expected)


def test_bf16_and_adam(corpus, tmp_path):
    half = run_tiny(
        corpus, tmp_path / "bf16", seeds=1, changes=["precision=bf16", "optimizer=adam", "lr=0.05"])
    assert half.summary["test"]["weighted_f1"]["mean"] > 0.3
    assert next(half.model().parameters()).dtype == torch.float32


def test_the_folder_is_enough(run, corpus, tmp_path):
    moved = Run(shutil.copytree(run.folder, tmp_path/"moved"))
    shutil.rmtree(moved.folder/"seed-0")
    test = moved.pipeline.apply(corpus).splits["test"]
    saved = run.predictions(1)
    assert np.allclose(
        saved.confidence, moved.predict(test, 1, prepared=True).probabilities.max(-1), atol=1e-4)


def test_probabilities_are_averaged_over_seeds(run, corpus):
    convs = run.pipeline.apply(corpus).splits["test"]
    both, single = (
        run.predict(convs, prepared=True),
        [run.predict(convs, s, prepared=True) for s in run.seeds])
    assert np.allclose(both.probabilities, np.mean([p.probabilities for p in single], 0))
    assert np.allclose(both.gate.sum(1), 1)


def test_evaluating_again_gives_the_same_figures(run, corpus):
    scored = run.evaluate(corpus)
    for split in ("validation", "test"):
        assert scored[split]["weighted_f1"]["per_seed"] == pytest.approx(
            run.summary[split]["weighted_f1"]["per_seed"])
        assert scored[split]["confusion"] == run.summary[split]["confusion"]
    with pytest.raises(DataError, match="Evaluate on a corpus with the same label set"):
        run.evaluate(make_corpus(labels=["neutral", "joy", "fear"]))


# what cannot work

def test_no_run(tmp_path):
    with pytest.raises(
        DataError, match="holds no summary.json. Give a folder that erc_moe train wrote"
    ):
        Run(tmp_path)


def test_checkpoint_of_another_label_set_model_or_width(run, corpus, tmp_path):
    copy = Run(shutil.copytree(run.folder, tmp_path/"copy"))
    path = copy.folder/"seed-0"/"model"/"config.json"
    original = path.read_text()
    for key, value, what in (
        ("labels", ["neutral", "joy", "fear"], "label set"), ("model", "large", "kind")):
        changed = json.loads(original)
        changed["config"][key] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=f"of another {what}"): copy.model(0)
    other = run_tiny(make_corpus(), tmp_path/"other", speech=None, seeds=1)
    shutil.rmtree(copy.folder/"seed-0"/"model")
    shutil.copytree(other.folder/"seed-0"/"model", copy.folder/"seed-0"/"model")
    with pytest.raises(DataError, match="of another feature widths"): copy.model(0)
    shutil.rmtree(copy.folder/"seed-1"/"model")
    with pytest.raises(DataError, match="there is no model"): copy.model(1)
    with pytest.raises(DataError, match="the run has no seed 7. It has 0, 1"): copy.model(7)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(text=None, speech=None), "no features were asked for"),
        (dict(preset="huge"), "It has cpu"),
        (dict(protocol="lucky"), "The protocols are strict, paper"),
        (dict(changes=["lr=fast"]), "must be of type float"),
        (dict(changes=dict(rate=1)), "has an option 'rate'"),
        (dict(seeds=0), "no seeds"),
    ],
)
def test_impossible_wishes(corpus, tmp_path, change, message):
    with pytest.raises(DataError, match=message): run_tiny(corpus, tmp_path/"run", **change)


def test_unknown_model_and_corpus(corpus, tmp_path):
    with pytest.raises(DataError, match="there is no model 'tinny'. The models are .*tiny"):
        train("tinny", corpus, text="words", out=tmp_path/"a")
    with pytest.raises(DataError): train("tiny", "no_such_corpus", text="minilm", out=tmp_path/"b")


def test_conversation_without_a_needed_modality(run, corpus):
    convs = [c for c in run.pipeline.apply(corpus).splits["test"]]
    deaf = replace(
        convs[0], features={"text": convs[0].features["text"]},
        present={"text": convs[0].present["text"]})
    with pytest.raises(DataError, match="no 'speech' features, which the model needs"):
        run.predict([deaf], prepared=True)
    with pytest.raises(DataError, match="4 wide where the model takes"):
        run.predict([convs[0].with_features("speech", np.zeros((len(convs[0]), 4)))], prepared=True)


def test_a_model_in_a_file_of_ones_own(corpus, tmp_path, capsys):
    "The run folder knows the model by name, and runs nothing until the user has named the file."
    from erc_moe.models import MODELS
    file = tmp_path/"mine.py"
    file.write_text(
        "from test_training import Tiny, TinyConfig\n"
        "class Mine(Tiny):\n"
        "    config_class = TinyConfig\n"
        "    presets = {'cpu': {'': dict(epochs=2, batch_size=4, lr=1e-2)}}\n")
    run = train(
        f"{file}:Mine", corpus, text="words", seeds=1, device="cpu", progress=False,
        out=tmp_path/"run")
    assert run.summary["model"] == "mine.py:Mine" and str(tmp_path) not in run.summary["model"]
    for name in [m for m in MODELS if ".py:" in m]: del MODELS[name]
    with pytest.raises(DataError, match="If you have that file and trust it.*--model"):
        Run(run.folder)
    again = Run(run.folder, f"{file}:Mine")
    assert same(weights(run, 0), weights(again, 0))
    file.write_text(file.read_text() + "Mine.marked = True\n")
    capsys.readouterr()
    Run(run.folder, f"{file}:Mine")
    assert "has changed since it was trained" in capsys.readouterr().err
    with pytest.raises(DataError, match="the run's model is mine.py:Mine"):
        Run(run.folder, "tiny")
    for name in [m for m in MODELS if ".py:" in m]: del MODELS[name]


def test_weights_that_are_no_numbers_are_refused(run, tmp_path):
    from safetensors.torch import load_file, save_file
    copy = Run(shutil.copytree(run.folder, tmp_path/"copy"))
    path = copy.folder/"seed-0"/"model"/"model.safetensors"
    state = load_file(path)
    save_file({k: torch.full_like(x, math.nan) for k, x in state.items()}, path)
    with pytest.raises(DataError, match="hold NaN or infinity"): copy.model(0)


def test_another_corpus_of_the_same_name_is_not_scored_as_its_own(run):
    with pytest.raises(DataError, match="not the made_up that the run was trained on"):
        run.evaluate(make_corpus(1))
    assert run.evaluate(make_corpus(1), other=True)


@pytest.mark.parametrize("change,message", [
    (dict(seeds=[0, 0]), "the seed 0 was given twice"), (dict(seeds=[-1]), "a seed is -1"),
    (dict(checkpoint_seconds=math.nan), "checkpoint_seconds is nan")])
def test_more_impossible_wishes(corpus, tmp_path, change, message):
    with pytest.raises(DataError, match=message): run_tiny(corpus, tmp_path/"run", **change)


def test_seeds_asked_for_before_stay_in_the_summary(corpus, tmp_path, capsys):
    run_tiny(corpus, tmp_path/"run", seeds=2, changes=dict(epochs=1))
    assert run_tiny(corpus, tmp_path/"run", seeds=1, changes=dict(epochs=1)).seeds == [0, 1]
    assert "holds more finished seeds: 1" in capsys.readouterr().err
