"""What every benchmark does: random conversations, one process per form, turns, medians, the
machine's bound, a table, a file.

A form is one way to compute the same thing. Every form runs in a process of its own, so that its
peak memory is its own; the forms take
turns, and medians are compared. The bound is the time of 6 x parameters x real utterances
floating-point operations at the best GEMM rate that
this machine shows in the same run. Time is told by the clock and by the processor: on a machine
with other work to do, compare the latter.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from erc_moe.conversations import ConversationBatch
from erc_moe.ragged import keep_memory
from erc_moe.files import write_json
from erc_moe.precision import autocast


@dataclass
class Form:
    "One way to compute, ready to run."
    model: nn.Module
    step: Callable[[ConversationBatch], None]   # what is timed
    # parameters of products that an utterance passes once more, as often as it does
    repeated: int = 0

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def training(model: nn.Module, repeated: int = 0, precision: str = "fp32") -> Form:
    "Forward, the model's full loss, backward, clipping at norm 1 and AdamW."
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(batch):
        with autocast(precision, "cpu"): loss = model.loss(model(batch), batch).total
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Form(model, step, repeated)


def random_batch(
    generator: torch.Generator,
    lengths: torch.Tensor,      # (B,) utterances
    widths: dict[str, int],     # modality -> width
    classes: int,
) -> ConversationBatch:
    "Random features, two speakers, a quarter of the utterances unlabelled (as in IEMOCAP)."
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    labels = torch.randint(classes, mask.shape, generator=generator)
    labels[torch.rand(mask.shape, generator=generator) < .25] = -1
    return ConversationBatch(
        {
            m: torch.randn(*mask.shape, width, generator=generator) * mask[..., None]
            for m, width in widths.items()},
        mask,
        dict.fromkeys(widths, mask),
        labels.where(mask, -1),
        torch.randint(2, mask.shape, generator=generator) * mask,
        [str(i) for i in range(len(mask))],
        [[]] * len(mask))


def gemm_rate(seconds: float) -> float:
    """The best rate, in floating-point operations per second, of several large float32 matrix
    products, `seconds` for each."""
    best = 0.
    for m, k, n in ((2048, 2048, 2048), (4096, 4096, 4096), (512, 2048, 8192), (8192, 512, 2048)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            begin = time.perf_counter()
            a @ b
            best = max(best, 2*m*k*n / (time.perf_counter() - begin))
    return best


def work(form: Form, batches: list[ConversationBatch], profile: bool):
    "Answer every line on stdin with the time of one step, and then tell the peak memory."
    keep_memory()
    form.step(batches[0])
    if profile:
        with torch.profiler.profile() as profiler: form.step(batches[1])
        print(
            profiler.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=45),
            file=sys.stderr)
    print(
        json.dumps(dict(parameters=form.parameters, products=form.parameters + form.repeated)),
        flush=True)
    for i, _ in enumerate(sys.stdin):
        batch = batches[i % len(batches)]
        begin, used = time.perf_counter(), time.process_time()
        form.step(batch)
        print(
            json.dumps(
                dict(
                    seconds=time.perf_counter() - begin, cpu=time.process_time() - used,
                    utterances=int(batch.mask.sum()),
                    memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)),
            flush=True)


def benchmark(
    name: str,                                                 # of the model, as it is printed
    doc: str,                                                  # help
    forms: dict[str, Callable[[argparse.Namespace], Form]],    # how each is built
    widths: Callable[[argparse.Namespace], dict[str, int]],    # of the features
    ratios: list[tuple[str, str]],                             # forms to compare
    defaults: dict,  # batch, longest, width: the shape of the corpus and of the paper's features
):
    "The command line of a benchmark."
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=("paper", "cpu"), default="paper", help="which sizes to train")
    parser.add_argument("--width", type=int, help="width of the features of every modality")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--batch", type=int, help="conversations in a batch")
    parser.add_argument(
        "--shortest", type=int, default=20, help="utterances of the shortest conversation")
    parser.add_argument("--longest", type=int, help="utterances of the longest conversation")
    parser.add_argument(
        "--steps", type=int, default=9, help="timed steps of each form, of which medians are shown")
    parser.add_argument(
        "--gemm-seconds", type=float, default=0.3,
        help="time for each shape of the GEMM measurement, at every step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=forms, default=[*forms])
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file as well")
    parser.add_argument("--worker", choices=forms, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if args.worker:
        torch.manual_seed(args.seed)
        form, generator = forms[args.worker](args), torch.Generator().manual_seed(args.seed)
        lengths = [
            torch.randint(args.shortest, args.longest + 1, (args.batch,), generator=generator)
            for _ in range(3)]
        return work(
            form, [random_batch(generator, l, widths(args), args.classes) for l in lengths],
            args.profile)

    workers = {
        f: subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", f], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        for f in args.forms}
    size = {f: json.loads(w.stdout.readline()) for f, w in workers.items()}
    said, gemm = {f: [] for f in workers}, 0.
    for _ in range(args.steps):
        gemm = max(gemm, gemm_rate(args.gemm_seconds))
        for f, w in workers.items():
            w.stdin.write("step\n"); w.stdin.flush()
            said[f].append(json.loads(w.stdout.readline()))
    for w in workers.values(): w.stdin.close(); w.wait()

    print(
        f"{name}, preset {args.preset}, batches of {args.batch} conversations of "
        f"{args.shortest}-{args.longest} utterances, "
        f"features {args.width} wide, {torch.get_num_threads()} threads, PyTorch "
        f"{torch.__version__}, medians of {args.steps} steps")
    print(f"GEMM rate: {gemm/1e9:.0f} GFLOP/s")
    record = {}
    for f, steps in said.items():
        median = lambda of: statistics.median(s["utterances"]/s[of] for s in steps)
        told = record[f] = dict(
            parameters=size[f]["parameters"], utterances_per_second=round(median("seconds"), 1),
            utterances_per_cpu_second=round(median("cpu"), 1),
            of_bound=round(median("seconds") * 6 * size[f]["products"] / gemm, 3),
            peak_memory_bytes=max(s["memory"] for s in steps))
        print(
            f"{f:16s} {told['parameters'] / 1e6:6.2f} M parameters  "
            f"{told['utterances_per_second']:7.1f} utterances/s  "
            f"{told['utterances_per_cpu_second']:7.1f} a CPU second  "
            f"{told['of_bound']:5.1%} of the bound  peak memory "
            f"{told['peak_memory_bytes'] / 2**30:.2f} GiB")
    for a, b in ratios:
        if {a, b} <= record.keys():
            clock, cpu = (
                record[a][f"utterances_per_{of}"] / record[b][f"utterances_per_{of}"]
                for of in ("second", "cpu_second"))
            print(f"{a} / {b}: {clock:.2f} (CPU time {cpu:.2f})")
    if args.save:
        settings = {
            k: v for k, v in vars(args).items() if k not in ("save", "worker", "profile", "forms")}
        write_json(
            args.save,
            dict(
                command=f"python {' '.join(sys.argv)}", settings=settings,
                threads=torch.get_num_threads(), torch=torch.__version__, gemm_rate=round(gemm),
                load=[round(x, 1) for x in os.getloadavg()], forms=record))
