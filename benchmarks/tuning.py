"""What an epoch of stage 1 costs, as ratios: with the frozen layers computed once and every time,
in float32 and in bfloat16, and with four turns of context in windows and in one pass.

    python benchmarks/tuning.py                                # minilm, a minute on two cores
    python benchmarks/tuning.py --encoder mpnet --frozen 8     # its top four layers; ten minutes

An epoch is training on `--utterances` of the sample corpus' utterances (repeated as often as it
takes) in batches of 32, and scoring a tenth as many. All forms have the same weights and take
turns, batch by batch; what is told is the time of the processor, of which other work on the
machine takes less than of the clock's. What the cache costs once is told beside.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import torch

from erc_moe.corpora import load_corpus
from erc_moe.encoders.reading import ConversationText
from erc_moe.encoders.text import EmotionTextEncoder, TextEncoderConfig
from erc_moe.features.published import PUBLISHED
from erc_moe.files import write_json

FORMS = {   # name -> changes of the encoder's configuration, precision
    "uncached": (dict(), "no"),
    "cached, float32": (dict(cache="float32"), "no"),
    "cached, float16": (dict(cache="float16"), "no"),
    "uncached, bf16": (dict(), "bf16"),
    "cached, float16, bf16": (dict(cache="float16"), "bf16"),
    "windows": (dict(context=4, cache="float16"), "no"),
    "one pass": (
        dict(context=4, reading="conversation", max_tokens=384, cache="float16"), "no"),
}
RATIOS = [
    ("uncached", "cached, float32"), ("uncached", "cached, float16"),
    ("uncached", "uncached, bf16"), ("cached, float16", "cached, float16, bf16"),
    ("uncached", "cached, float16, bf16"), ("windows", "cached, float16"),
    ("one pass", "cached, float16"), ("windows", "one pass")]


class Trainer:
    "One form: its encoder, its data and its optimizer."
    def __init__(self, encoder: str, frozen: int, name: str, conversations: list, labels: list):
        changes, self.precision = FORMS[name]
        torch.manual_seed(0)
        self.model = EmotionTextEncoder(TextEncoderConfig.cpu(
            encoder, len(labels), labels=labels, frozen_layers=frozen, **changes))
        used = time.process_time()
        self.data = self.model.dataset(conversations, labels)
        self.once = time.process_time() - used
        self.optimizer = torch.optim.AdamW(
            [dict(params=g["params"]) for g in self.model.parameter_groups()], lr=1e-5, fused=True)

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def chosen(self, generator: torch.Generator) -> torch.Tensor:
        "Items of 32 utterances at random, or of a few more."
        if not isinstance(self.data, ConversationText):
            return torch.randint(len(self.data), (32,), generator=generator)
        order = torch.randperm(len(self.data.passages), generator=generator).tolist()
        held = [0, *accumulate(len(self.data.targets([i])) for i in order)]
        return torch.tensor([i for i, before in zip(order, held) if before < 32])

    def train(self, index: torch.Tensor) -> float:
        "Seconds of the processor for a training step, per utterance."
        used = time.process_time()
        self.model.train()
        batch = self.data.batch(index)
        with self.autocast(): loss = self.model.loss(self.model(batch), batch).total
        loss.backward()
        self.optimizer.step(); self.optimizer.zero_grad()
        return (time.process_time() - used)/len(batch.labels)

    @torch.no_grad()
    def score(self, index: torch.Tensor) -> float:
        "Seconds of the processor for scoring, per utterance."
        used = time.process_time()
        self.model.eval()
        batch = self.data.batch(index)
        with self.autocast(): self.model(batch)
        return (time.process_time() - used)/len(batch.labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--frozen", type=int, default=2, help="lowest layers that are not tuned")
    parser.add_argument("--utterances", type=int, default=320)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file as well")
    args = parser.parse_args()
    published = PUBLISHED.get(args.encoder)
    encoder = str(published.folder()) if published else args.encoder
    corpus = load_corpus("sample")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ERC_MOE_CACHE"] = cache    # so that filling it is measured
        forms = {
            name: Trainer(encoder, args.frozen, name, corpus.conversations, corpus.labels)
            for name in args.forms}
        count = len(next(iter(forms.values())).data)
        said = {name: dict(train=[], score=[]) for name in forms}
        for i in range(args.utterances//32):
            for name, form in forms.items():
                index = form.chosen(torch.Generator().manual_seed(i))
                said[name]["train"].append(form.train(index))
                said[name]["score"].append(form.score(index))
    record = {}
    for name, form in forms.items():
        step, scored = (statistics.median(said[name][k]) for k in ("train", "score"))
        record[name] = dict(
            epoch=round(step + scored/10, 6), train=round(step, 6), score=round(scored, 6),
            once=round(form.once/count, 6))
        print(
            f"{name:22s} {1e3*record[name]['epoch']:8.2f} ms of the processor per utterance and "
            f"epoch (training {1e3*record[name]['train']:.2f}, scoring "
            f"{1e3*record[name]['score']:.2f}); once {1e3*record[name]['once']:.2f}")
    ratios = {f"{a} / {b}": round(record[a]["epoch"]/record[b]["epoch"], 2)
              for a, b in RATIOS if {a, b} <= record.keys()}
    for name, ratio in ratios.items(): print(f"{name}: {ratio}")
    if args.save:
        write_json(args.save, dict(
            command=f"python {' '.join(sys.argv)}", encoder=args.encoder, frozen=args.frozen,
            utterances=args.utterances, threads=torch.get_num_threads(), torch=torch.__version__,
            seconds_per_utterance=record, ratios=ratios))
