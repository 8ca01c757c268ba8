"""A training step of MiSTER-E and SURE at the papers' sizes on one GPU: utterances per second, share
of the bound, peak memory, beside padded forms, in three precisions.

    python benchmarks/gpu.py --save results/benchmark-gpu.json     # under 5 minutes on one card
    python benchmarks/gpu.py --device cpu --tiny                   # the same road, without a card

One step is forward, the full loss, backward, clipping at norm 1 and AdamW, on random conversations
of IEMOCAP's shape. "ours" works on real utterances alone; "padded" is the straightforward form of
mister_e.py and sure.py; "released" is MiSTER-E with the choices of its authors' released code. The
bound is the time of 6 x parameters x real utterances floating-point operations at the GEMM rate that
this card shows in the same run, in the same precision: float32, float32 with TF32 products, bfloat16
by autocast. Forms take turns; medians of rounds of several steps, which are queued without waiting.
`host` is the share of a round in which the CPU still queued work: near 1, the card waits for it.
`waits` counts, in one step, how often the CPU waited for the card.
"""
import argparse
import gc
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from common import random_batch
from erc_moe.files import write_json
from erc_moe.mister_e import MisterE, MisterEConfig
from erc_moe.sure import Sure, SureConfig
from mister_e import PaddedMisterE
from sure import PaddedSure, repeated

PRECISIONS = ("float32", "tf32", "bfloat16")
CLASSES = 6
WIDTHS = {
    "mister_e": {"speech": 2048, "text": 2048},
    "sure": {"text": 1024, "speech": 1024, "visual": 1024}}
BATCH = {"mister_e": (8, 90), "sure": (16, 110)}    # conversations, utterances of the longest
TINY = {
    "mister_e": dict(hidden=8, fusion_width=16, attention_width=12, heads=3, layers=2),
    "sure": dict(width=16, heads=2)}


def forms(name: str, tiny: bool) -> dict:
    "Form -> how its model is made."
    widths = dict.fromkeys(WIDTHS[name], 12) if tiny else WIDTHS[name]
    made = lambda kind, preset: getattr(kind, preset)(
        "iemocap", widths, CLASSES, **(TINY[name] if tiny else {}))
    if name == "sure":
        c = made(SureConfig, "paper")
        return {"ours": lambda: Sure(c), "padded": lambda: PaddedSure(c)}
    paper, released = (made(MisterEConfig, p) for p in ("paper", "released"))
    return {"ours": lambda: MisterE(paper), "padded": lambda: PaddedMisterE(paper),
            "released": lambda: MisterE(released)}


class Precision:
    "Float32 products as they are, by TF32, or in bfloat16 by autocast."
    def __init__(self, name: str, device: str):
        self.name, self.device = name, device

    def __enter__(self):
        exact = self.name == "float32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact

    def __exit__(self, *_):
        torch.set_float32_matmul_precision("highest")

    def autocast(self):
        half = self.name == "bfloat16"
        return torch.autocast(self.device, torch.bfloat16) if half else nullcontext()


def finish(device: str):
    if device == "cuda": torch.cuda.synchronize()


def gemm_rate(precision: Precision, size: int, seconds: float) -> float:
    "The best rate of square products, in floating-point operations per second."
    kind = torch.bfloat16 if precision.name == "bfloat16" else torch.float32
    best = 0.
    for n in (size//2, size):
        a, b = (torch.randn(n, n, device=precision.device, dtype=kind) for _ in range(2))
        until = time.perf_counter() + seconds
        with precision:
            while time.perf_counter() < until:
                finish(precision.device)
                began = time.perf_counter()
                for _ in range(4): a @ b
                finish(precision.device)
                best = max(best, 4*2*n**3/(time.perf_counter() - began))
    return best


class Form:
    "A model under training, ready to be timed."
    def __init__(self, make, precision: Precision, batches: list):
        torch.manual_seed(0)
        self.precision, self.batches = precision, batches
        self.model = make().to(precision.device).train()
        self.parameters = [*self.model.parameters()]
        self.products = sum(p.numel() for p in self.parameters)
        if hasattr(self.model, "reasoning"): self.products += repeated(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def step(self, batch):
        with self.precision.autocast():
            loss = self.model.loss(self.model(batch), batch).total
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def round(self) -> tuple[float, float]:
        "Seconds of a step, and the share of them in which the CPU queued it."
        finish(self.precision.device)
        with self.precision:
            began = time.perf_counter()
            for batch in self.batches: self.step(batch)
            queued = time.perf_counter() - began
            finish(self.precision.device)
        took = time.perf_counter() - began
        return took/len(self.batches), queued/took

    def waits(self) -> int|None:
        "How often the CPU waits for the card in one step."
        if self.precision.device != "cuda": return None
        with warnings.catch_warnings(record=True) as told, self.precision:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step(self.batches[0])
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(w.message) for w in told)


def measure(name: str, times: int, args: argparse.Namespace, rates: dict[str, float]) -> dict:
    "Figures of every form of a model, in every precision, at `times` the paper's batch."
    generator, (size, longest) = torch.Generator().manual_seed(0), BATCH[name]
    if args.tiny: size, longest = 2, 25
    widths = dict.fromkeys(WIDTHS[name], 12) if args.tiny else WIDTHS[name]
    batches = []
    for _ in range(args.batches):
        lengths = torch.randint(20, longest + 1, (times*size,), generator=generator)
        batches.append(random_batch(generator, lengths, widths, CLASSES).to(args.device))
    utterances = sum(sum(b.host.lengths.tolist()) for b in batches)/len(batches)
    ready, memory = {}, {}
    for form, make in forms(name, args.tiny).items():
        for p in PRECISIONS:
            if args.device == "cuda":
                gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            ready[form, p] = Form(make, Precision(p, args.device), batches)
            ready[form, p].round()    # warms up
            memory[form, p] = (
                torch.cuda.max_memory_allocated() - before if args.device == "cuda" else None)
    took = {key: [] for key in ready}
    for _ in range(args.rounds):
        for key, form in ready.items(): took[key].append(form.round())
    told = {}
    for (form, p), rounds in took.items():
        seconds, host = (statistics.median(x) for x in zip(*rounds))
        told.setdefault(form, {})[p] = dict(
            utterances_per_second=round(utterances/seconds, 1),
            of_bound=round(6*ready[form, p].products*utterances/seconds/rates[p], 4),
            peak_memory_bytes=memory[form, p], host=round(host, 3),
            waits=ready[form, p].waits())
    for form, of in told.items():
        for p, f in of.items():
            held, waits = f["peak_memory_bytes"], f["waits"]
            ratio = told["ours"][p]["utterances_per_second"]/f["utterances_per_second"]
            card = "" if held is None else f"{held/2**30:.2f} GiB  {waits} waits  "
            print(
                f"  {form:9s} {p:9s} {f['utterances_per_second']:10.1f} utterances/s  "
                f"{f['of_bound']:6.1%} of the bound  {card}host {f['host']:.0%}  "
                f"ours / this {ratio:.2f}", flush=True)
    return dict(utterances=round(utterances, 1), forms=told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a test of this script")
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=[*WIDTHS])
    parser.add_argument(
        "--times", nargs="+", type=int, default=[1, 8], help="batches, in the paper's batch sizes")
    parser.add_argument("--batches", type=int, default=4, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here. --device cpu --tiny runs everything without one.")
    began = time.perf_counter()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    size, seconds = (256, .02) if args.tiny else (8192, .5)
    rates = {p: gemm_rate(Precision(p, args.device), size, seconds) for p in PRECISIONS}
    print(f"{card}, PyTorch {torch.__version__}, GEMM rates: " + ", ".join(
        f"{p} {r/1e12:.2f} TFLOP/s" for p, r in rates.items()))
    models = {}
    for name in args.models:
        for times in args.times:
            print(f"{name}, {times} times the paper's batch of {BATCH[name][0]} conversations")
            models.setdefault(name, {})[str(times)] = measure(name, times, args, rates)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.save:
        write_json(args.save, dict(
            command=f"python {' '.join(sys.argv)}", device=card, torch=torch.__version__,
            tiny=args.tiny, gemm_rate={p: round(r) for p, r in rates.items()}, models=models))
