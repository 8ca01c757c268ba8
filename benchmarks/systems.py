"""Train the recurrent baselines and every system of the tables on random conversations of
IEMOCAP's shape and say what a step costs beside MiSTER-E's, and beside the same system in its naive
form; and what MiSTER-E's costs in bfloat16.

    python benchmarks/systems.py                        # small presets, some minutes on two cores
    python benchmarks/systems.py --forms hcam mister_e --preset paper --steps 3

One step is forward, the full loss, backward, clipping at norm 1 and AdamW, on text and speech.
"NAME-alone" is the naive form: conversation by conversation, their gradients added up. How it is
measured: common.py.
"""
from argparse import Namespace
from functools import partial

import torch
from torch import nn

from common import Form, benchmark, training
from erc_moe.conversations import ConversationBatch
from erc_moe.models import MODELS

NAMES = ["bc_lstm", "dialogue_rnn"] + [
    n for n, e in MODELS.items() if e.model.__module__.startswith("erc_moe.systems.")]


def widths(args: Namespace) -> dict[str, int]:
    return {"text": args.width, "speech": args.width}


def batched(name: str, args: Namespace, precision: str = "fp32") -> Form:
    entry, labels = MODELS[name], [f"class {i}" for i in range(args.classes)]
    return training(
        entry.model(entry.model_config(args.preset, "iemocap", widths(args), labels)),
        precision=precision)


def alone(name: str, args: Namespace) -> Form:
    "As one would write it first: no batch, so no padding."
    form = batched(name, args)
    model, parameters = form.model, [*form.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(batch: ConversationBatch):
        for b, n in enumerate(batch.lengths.tolist()):
            cut = lambda x: x[b:b + 1, :n]
            one = ConversationBatch(
                {m: cut(x) for m, x in batch.features.items()}, cut(batch.mask),
                {m: cut(x) for m, x in batch.present.items()}, cut(batch.labels),
                cut(batch.speakers), batch.conversation_ids[b:b + 1], [[]])
            (model.loss(model(one), one).total / len(batch)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Form(model, step)


if __name__ == "__main__":
    benchmark(
        "Systems",
        __doc__,
        {n: partial(batched, n) for n in ("mister_e", *NAMES)}
        | {"mister_e, bf16": partial(batched, "mister_e", precision="bf16")}
        | {f"{n}-alone": partial(alone, n) for n in NAMES},
        widths,
        [("mister_e", "mister_e, bf16")]
        + [pair for n in NAMES for pair in (("mister_e", n), (n, f"{n}-alone"))],
        dict(preset="cpu", width=384, batch=8, longest=90))
