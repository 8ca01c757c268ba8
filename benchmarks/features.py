"""How fast features are computed: MiniLM's sentences, openSMILE's and Praat's clips of the sample
corpus, beside real time.

    python benchmarks/features.py --save results/benchmark-features.json
    python benchmarks/features.py --sentences 200 --clips 40 --rounds 2        # a quick look

The forms of a feature take turns, one round each, and the fastest round counts: other work on the
machine only ever adds. Processor time (of all processes) is told beside the clock. "as given" pads
the sentences in their own order, 32 at a time; "sorted" is `TextEncoder`; "bf16" and "int8" are
PyTorch's own (weights in bfloat16; dynamic quantisation). "difference" is the largest one of any
number of an embedding from "sorted", "company" that of a text embedded alone from the same text
beside longer ones.
"""
import argparse
import os
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from erc_moe.corpora import load_corpus
from erc_moe.features.prosody import Prosody8
from erc_moe.features.speech import RATE, OpenSmile
from erc_moe.features.text import TextEncoder, token_batches
from erc_moe.files import write_json
from erc_moe.recordings.sound import read_sound


def processor_seconds() -> float:
    "Of this process and its children, over their lives so far."
    here = psutil.Process()
    return sum(t.user + t.system for t in (
        p.cpu_times() for p in (here, *here.children(recursive=True))))


@contextmanager
def weights(encoder: TextEncoder, model: torch.nn.Module):
    "The encoder with other weights for a while."
    own, encoder.model = encoder.model, model
    try: yield
    finally: encoder.model = own


def text_forms(texts: list[str]) -> tuple[dict, dict]:
    "Form -> what embeds all texts; form -> what embeds some, padded together."
    encoder = TextEncoder()
    tokens = encoder.tokenizer(texts, truncation=True, max_length=encoder.limit)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        int8 = torch.ao.quantization.quantize_dynamic(
            encoder.model, {torch.nn.Linear}, torch.qint8)
    bf16 = TextEncoder().model.to(torch.bfloat16)
    by_length = token_batches([*map(len, tokens)], encoder.budget)
    as_given = [range(len(tokens))[i:i + 32] for i in range(0, len(tokens), 32)]

    class Float32(torch.nn.Module):       # `TextEncoder` pools in float32
        def forward(self, **inputs):
            out = bf16(**inputs)
            return type(out)(last_hidden_state=out.last_hidden_state.float())

    def embed(model, batches):
        out = np.empty((len(texts), encoder.extractor.width), np.float32)
        with weights(encoder, model), torch.inference_mode():
            for batch in batches: out[batch] = encoder._pool([tokens[i] for i in batch])
        return out

    def some(model, places):
        with weights(encoder, model): return encoder._pool([tokens[i] for i in places])
    models = {"sorted": encoder.model, "sorted, bf16": Float32(), "sorted, int8": int8}
    forms = {"as given": lambda: embed(encoder.model, as_given)}
    forms |= {name: lambda m=m: embed(m, by_length) for name, m in models.items()}
    return forms, {name: lambda places, m=m: some(m, places) for name, m in models.items()}


def sound_forms(clips: list[Path]) -> dict:
    "Form -> what measures all clips."
    cores = os.cpu_count()
    return {
        f"{name}, {workers} process{'es'*(workers > 1)}": lambda m=make(workers): m.rows(clips)
        for name, make in (("egemaps", lambda n: OpenSmile(workers=n)),
                           ("prosody8", lambda n: Prosody8(workers=n)))
        for workers in (1, cores)}


def measure(forms: dict, rounds: int) -> tuple[dict, dict]:
    "Form -> its fastest clock and processor seconds; form -> what it gave."
    told, given = {name: [] for name in forms}, {}
    for form in forms.values(): form()                  # what is loaded when it is needed first
    for _ in range(rounds):
        for name, form in forms.items():
            used, begin = processor_seconds(), time.perf_counter()
            given[name] = form()
            told[name].append((time.perf_counter() - begin, processor_seconds() - used))
    return {n: dict(zip(("clock", "cpu"), map(min, zip(*t)))) for n, t in told.items()}, given


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=930, help="of the sample corpus")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    utterances = [u for c in load_corpus("sample").conversations for u in c.utterances]
    texts = [u.text for u in utterances][:args.sentences]
    clips = [u.audio for u in utterances][:args.clips]
    seconds = sum(len(read_sound(c, RATE)[0]) for c in clips)/RATE

    forms, some = text_forms(texts)
    text, rows = measure(forms, args.rounds)
    long = max(range(len(texts)), key=lambda i: len(texts[i]))
    for name, told in text.items():
        told |= dict(per_second=len(texts)/told["clock"], per_cpu_second=len(texts)/told["cpu"],
                     difference=float(np.abs(rows[name] - rows["sorted"]).max()))
        if name in some:
            apart = [np.abs(some[name]([i])[0] - some[name]([i, long])[0]).max() for i in range(9)]
            told["company"] = float(max(apart))
        told["cpu_of_sorted"] = told["cpu"]/text["sorted"]["cpu"]
        print(f"{name:16s} {told['per_second']:6.0f} sentences/s, {told['per_cpu_second']:6.0f} a "
              f"CPU second, {told['cpu_of_sorted']:.2f} times the CPU time of sorted; difference "
              f"{told['difference']:.1e}, company {told.get('company', 0):.1e}")
    sound, rows = measure(sound_forms(clips), args.rounds)
    for name, told in sound.items():
        alone = rows[name.replace(f"{os.cpu_count()} processes", "1 process")]
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(rows[name], alone))
        told |= dict(per_second=len(clips)/told["clock"], per_cpu_second=len(clips)/told["cpu"],
                     real_time=seconds/told["clock"], cpu_real_time=seconds/told["cpu"],
                     same_rows=same)
        print(f"{name:22s} {told['per_second']:6.1f} clips/s, {told['real_time']:5.1f} times real "
              f"time ({told['cpu_real_time']:.1f} a CPU second); rows the same: {same}")
    if args.save:
        write_json(args.save, dict(
            command=f"python {' '.join(sys.argv)}", threads=torch.get_num_threads(),
            torch=torch.__version__, sentences=len(texts), clips=len(clips), sound_seconds=seconds,
            load=[round(x, 1) for x in os.getloadavg()], text=text, sound=sound))
