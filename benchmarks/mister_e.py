"""Train the paper-size MiSTER-E on random conversations of IEMOCAP's shape and say how near it comes to the machine's bound.

    python benchmarks/mister_e.py                        # paper size, some minutes on two cores
    python benchmarks/mister_e.py --preset cpu --width 384

One step is forward, the full loss (eq. 18), backward, clipping at norm 1 and AdamW. The bound is the time of 6 x parameters x
real utterances floating-point operations at the best GEMM rate that this machine shows in the same run. "padded" is the
straightforward form: nn.Conv1d, nn.GRU and nn.MultiheadAttention over padded conversations, of the same sizes.
Every form runs in a process of its own, so that its peak memory is its own; the forms take turns, and medians are compared.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from erc_moe.conversations import ConversationBatch
from erc_moe.losses import LossParts
from erc_moe.mister_e import MisterE, MisterEConfig
from erc_moe.mister_e.model import MisterEOutput


class PaddedContext(nn.Module):
    "The context addition network over padded conversations."
    def __init__(self, width, c):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, 2*c.hidden, k, padding=k//2) for k in (1, 3, 5))
        self.gru = nn.GRU(2*c.hidden, c.hidden, c.layers, bidirectional=True, batch_first=True, dropout=c.context_dropout if c.layers > 1 else 0)
        self.residual, self.head = nn.Linear(width, 2*c.hidden), nn.Linear(2*c.hidden, c.classes)
        self.dropout = nn.Dropout(c.context_dropout)

    def forward(self, x):                                                  # (B, N, D) -> (B, N, C)
        near = sum(F.relu(conv(x.transpose(1, 2))) for conv in self.convs).transpose(1, 2)
        return self.head(self.dropout(self.dropout(self.gru(self.dropout(near))[0]) + self.residual(x)))


class PaddedAttention(nn.Module):
    "Attention 120 wide inside 1024, then residual and norm."
    def __init__(self, c):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(c.fusion_width, c.attention_width) for _ in range(3))
        self.attention = nn.MultiheadAttention(c.attention_width, c.heads, batch_first=True)
        self.out, self.norm = nn.Linear(c.attention_width, c.fusion_width), nn.LayerNorm(c.fusion_width)
        self.dropout = nn.Dropout(c.fusion_dropout)

    def forward(self, x, other, mask):                                     # (B, N, W) twice, (B, N)
        q, k, v = (fc(y) for fc, y in zip(self.inner, (x, other, other)))
        return self.norm(x + self.dropout(self.out(self.attention(q, k, v, key_padding_mask=~mask, need_weights=False)[0])))


class PaddedMisterE(nn.Module):
    "MiSTER-E as one would first write it; attention's projections inside nn.MultiheadAttention add 0.9M parameters."
    def __init__(self, c):
        super().__init__()
        self.model = MisterE(c)                                            # for its loss and its gate
        self.model.context, self.model.fusion = None, nn.Identity()
        self.contexts = nn.ModuleList(PaddedContext(d, c) for d in c.widths.values())
        self.inputs = nn.ModuleList(nn.Linear(d, c.fusion_width) for d in c.widths.values())
        self.layers = nn.ModuleList(nn.ModuleList(PaddedAttention(c) for _ in range(4)) for _ in range(c.fusion_layers))
        self.head, self.dropout = nn.Linear(2*c.fusion_width, c.classes), nn.Dropout(c.fusion_dropout)

    def forward(self, batch):
        c, mask = self.model.config, batch.mask
        xs = [F.dropout(batch.features[m], c.input_dropout, self.training) for m in c.widths]
        said = [net(x) for net, x in zip(self.contexts, xs)]
        s, t = (fc(x) for fc, x in zip(self.inputs, xs))
        for cross_s, cross_t, self_s, self_t in self.layers:
            s, t = cross_s(s, t, mask), cross_t(t, s, mask)
            s, t = self_s(s, s, mask), self_t(t, t, mask)
        said.append(self.head(self.dropout(torch.cat([s, t], -1))))
        experts = torch.stack(said, 2)                                     # (B, N, E, C)
        logits, weights = self.model.gate(experts.flatten(0, 1), mask.flatten()[:, None].expand(-1, 3))
        return MisterEOutput(logits.unflatten(0, mask.shape), dict(zip(c.experts, said)), weights.unflatten(0, mask.shape),
                             torch.stack([s[mask], t[mask]]))

    def loss(self, output, batch) -> LossParts:
        return self.model.loss(output, batch)


def random_batch(generator, lengths, width, classes) -> ConversationBatch:
    "Conversations of the given lengths with random features and labels, a quarter of the utterances unlabelled (as in IEMOCAP)."
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    draw = lambda: torch.randn(*mask.shape, width, generator=generator) * mask[..., None]
    labels = torch.randint(classes, mask.shape, generator=generator)
    labels[torch.rand(mask.shape, generator=generator) < .25] = -1
    return ConversationBatch({m: draw() for m in ("speech", "text")}, mask, {m: mask for m in ("speech", "text")},
                             labels.where(mask, -1), torch.zeros_like(labels), [str(i) for i in range(len(mask))], [[]]*len(mask))


def gemm_rate(seconds) -> float:
    "The best rate, in floating-point operations per second, of several large float32 matrix products, `seconds` for each."
    best = 0.
    for m, k, n in ((2048, 2048, 2048), (4096, 4096, 4096), (512, 2048, 8192), (8192, 512, 2048)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            begin = time.perf_counter()
            a @ b
            best = max(best, 2*m*k*n / (time.perf_counter() - begin))
    return best


def worker(form, args):
    "Answer every line on stdin with the time of one training step, and then tell the peak memory."
    generator = torch.Generator().manual_seed(args.seed)
    lengths = [torch.randint(args.shortest, args.longest + 1, (args.batch,), generator=generator) for _ in range(3)]
    batches = [random_batch(generator, l, args.width, args.classes) for l in lengths]
    torch.manual_seed(args.seed)
    config = getattr(MisterEConfig, args.preset)("iemocap", {"speech": args.width, "text": args.width}, args.classes)
    model = {"ours": MisterE, "padded": PaddedMisterE}[form](config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(batch):
        model.loss(model(batch), batch).total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    if args.profile:
        with torch.profiler.profile() as profiler: step(batches[1])
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=45), file=sys.stderr)
    print(json.dumps(dict(parameters=sum(p.numel() for p in parameters))), flush=True)
    for i, _ in enumerate(sys.stdin):
        batch = batches[i % len(batches)]
        begin = time.perf_counter()
        step(batch)
        print(json.dumps(dict(seconds=time.perf_counter() - begin, utterances=int(batch.mask.sum()),
                              memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("paper", "cpu"), default="paper", help="which sizes to train")
    parser.add_argument("--width", type=int, default=2048, help="width of the embeddings of both modalities")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="conversations in a batch")
    parser.add_argument("--shortest", type=int, default=20, help="utterances of the shortest conversation")
    parser.add_argument("--longest", type=int, default=90, help="utterances of the longest conversation")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each form, of which medians are shown")
    parser.add_argument("--gemm-seconds", type=float, default=.3, help="time for each shape of the GEMM measurement, at every step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=("ours", "padded"), default=["ours", "padded"])
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file as well")
    parser.add_argument("--worker", choices=("ours", "padded"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return worker(args.worker, args)

    command = [sys.executable, *sys.argv]
    workers = {f: subprocess.Popen([*command, "--worker", f], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for f in args.forms}
    size = {f: json.loads(w.stdout.readline())["parameters"] for f, w in workers.items()}
    said, gemm = {f: [] for f in workers}, 0.
    for _ in range(args.steps):
        gemm = max(gemm, gemm_rate(args.gemm_seconds))
        for f, w in workers.items():
            w.stdin.write("step\n"); w.stdin.flush()
            said[f].append(json.loads(w.stdout.readline()))
    for w in workers.values(): w.stdin.close(); w.wait()

    print(f"MiSTER-E, preset {args.preset}, {args.width}-wide embeddings, batches of {args.batch} conversations of "
          f"{args.shortest}-{args.longest} utterances, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, medians of {args.steps} steps")
    print(f"GEMM rate: {gemm/1e9:.0f} GFLOP/s")
    speed, record = {}, {}
    for f, steps in said.items():
        speed[f] = statistics.median(s["utterances"]/s["seconds"] for s in steps)
        bound = gemm / (6*size[next(iter(size))])
        memory = max(s["memory"] for s in steps)
        print(f"{f:7s} {size[f]/1e6:6.2f} M parameters  {speed[f]:7.1f} utterances/s  {speed[f]/bound:5.1%} of the bound  peak memory {memory/2**30:.2f} GiB")
        record[f] = dict(parameters=size[f], utterances_per_second=round(speed[f], 1), of_bound=round(speed[f]/bound, 3), peak_memory_bytes=memory)
    if len(speed) == 2: print(f"ours / padded: {speed['ours']/speed['padded']:.2f}")
    if args.save:
        settings = {k: v for k, v in vars(args).items() if k not in ("save", "worker", "profile", "forms")}
        args.save.write_text(json.dumps(dict(command=f"python {' '.join(sys.argv)}", settings=settings, threads=torch.get_num_threads(), torch=torch.__version__,
                                             gemm_rate=round(gemm), forms=record), indent=1) + "\n")


if __name__ == "__main__":
    main()
