"""Two measurements of SURE on random conversations of IEMOCAP's shape: its mixture of experts alone, and the whole training step.

    python benchmarks/sure.py                          # paper size, some minutes on two cores
    python benchmarks/sure.py --preset cpu --steps 3

The mixture of experts (section 2.3), all modalities, forward and backward: "batched" is ours, "loop" the plain form that walks through time steps
and, within a step, through experts, over padded conversations. Both have the same weights and the same loss.
The training step is forward, the full loss, backward, clipping at norm 1 and AdamW. Its bound is the time of the floating-point operations of its
matrix products with weights (6 x parameters x real utterances, the query LSTM counted once per step of the reasoning) at the best GEMM
rate that this machine shows in the same run.
Every form runs in a process of its own, so that its peak memory is its own; the forms take turns, and medians are compared.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from erc_moe.conversations import ConversationBatch
from erc_moe.sure import Sure, SureConfig
from erc_moe.sure.experts import GaussianExperts, Routing
from erc_moe.sure.model import MODALITIES
from mister_e import gemm_rate


class Batched(nn.Module):
    "Our mixtures over the real utterances."
    def __init__(self, c):
        super().__init__()
        self.moe = nn.ModuleDict({m: GaussianExperts(c.width, c.experts, c.chosen, c.routing) for m in c.widths})

    def forward(self, batch):                                              # -> modality -> (M, D), Routing
        return {m: net(batch.features[m][batch.mask]) for m, net in self.moe.items()}


class Loop(Batched):
    "The same mixtures, time step by time step and expert by expert; each expert answers for the utterances that chose it."
    def forward(self, batch):
        told = {}
        for m, net in self.moe.items():
            mu_weight, sigma_weight = net.gaussians.weight.unflatten(0, (2, net.experts, -1)).unbind(0)
            mu_bias, sigma_bias = net.gaussians.bias.unflatten(0, (2, net.experts, -1)).unbind(0)
            zs, routed = [], []
            for t in range(batch.mask.shape[1]):
                x = batch.features[m][:, t]                                # (B, D)
                sigmas, uncertainty, divergence = [], [], []
                for e in range(net.experts):
                    log_variance = nn.functional.linear(x, sigma_weight[e], sigma_bias[e])
                    sigmas.append((log_variance/2).exp())
                    uncertainty.append(sigmas[e].mean(1))
                    mu = nn.functional.linear(x, mu_weight[e], mu_bias[e])
                    divergence.append((mu**2 + sigmas[e]**2 - 1 - log_variance).mean(1)/2)
                    sigmas[e] = mu, sigmas[e]
                uncertainty = torch.stack(uncertainty, 1)                  # (B, E)
                probabilities = (net.score(x) - net.caution*uncertainty).softmax(1)
                kept, index = probabilities.topk(net.chosen)
                weights = torch.zeros_like(probabilities).scatter(1, index, kept)
                z = torch.zeros_like(x)
                for e, (mu, sigma) in enumerate(sigmas):
                    took = weights[:, e].nonzero()[:, 0]
                    sample = mu[took] + sigma[took]*torch.randn_like(mu[took]) if self.training else mu[took]
                    z = z.index_add(0, took, weights[took, e, None]*sample)
                zs.append(z)
                routed.append((probabilities, weights, uncertainty, torch.stack(divergence, 1)))
            real = lambda steps: torch.stack(steps, 1)[batch.mask]         # (B, N, ...) -> (M, ...)
            told[m] = real(zs), Routing(*(real(x) for x in zip(*routed)))
        return told


def random_batch(generator, lengths, width, classes) -> ConversationBatch:
    "Conversations of the given lengths: random features in three modalities, two speakers, a quarter of the utterances unlabelled (as in IEMOCAP)."
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    labels = torch.randint(classes, mask.shape, generator=generator)
    labels[torch.rand(mask.shape, generator=generator) < .25] = -1
    return ConversationBatch({m: torch.randn(*mask.shape, width, generator=generator) * mask[..., None] for m in MODALITIES}, mask,
                             {m: mask for m in MODALITIES}, labels.where(mask, -1), torch.randint(2, mask.shape, generator=generator) * mask,
                             [str(i) for i in range(len(mask))], [[]]*len(mask))


def worker(form, args):
    "Answer every line on stdin with the time of one step, and then tell the peak memory."
    generator = torch.Generator().manual_seed(args.seed)
    lengths = [torch.randint(args.shortest, args.longest + 1, (args.batch,), generator=generator) for _ in range(3)]
    config = getattr(SureConfig, args.preset)("iemocap", dict.fromkeys(MODALITIES, args.width), args.classes)
    batches = [random_batch(generator, l, args.width if form == "sure" else config.width, args.classes) for l in lengths]
    torch.manual_seed(args.seed)
    model = {"batched": Batched, "loop": Loop, "sure": Sure}[form](config).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if form == "sure" else None

    def step(batch):
        if form == "sure":
            model.loss(model(batch), batch).total.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        else: sum(z.square().mean() + r.divergence.mean() + r.balance for z, r in model(batch).values()).backward()
        model.zero_grad()

    step(batches[0])
    if args.profile:
        with torch.profiler.profile() as profiler: step(batches[1])
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=45), file=sys.stderr)
    products = sum(p.numel() for p in parameters)
    if form == "sure": products += sum((config.steps - 1)*p.numel() for net in model.reasoning.values() for p in net.reader.parameters())
    print(json.dumps(dict(parameters=sum(p.numel() for p in parameters), products=products)), flush=True)
    for i, _ in enumerate(sys.stdin):
        batch = batches[i % len(batches)]
        begin = time.perf_counter()
        step(batch)
        print(json.dumps(dict(seconds=time.perf_counter() - begin, utterances=int(batch.mask.sum()),
                              memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("paper", "cpu"), default="paper", help="which sizes to train")
    parser.add_argument("--width", type=int, default=1024, help="width of the features of every modality")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="conversations in a batch")
    parser.add_argument("--shortest", type=int, default=20, help="utterances of the shortest conversation")
    parser.add_argument("--longest", type=int, default=110, help="utterances of the longest conversation")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each form, of which medians are shown")
    parser.add_argument("--gemm-seconds", type=float, default=.3, help="time for each shape of the GEMM measurement, at every step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=("batched", "loop", "sure"), default=["batched", "loop", "sure"])
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--worker", choices=("batched", "loop", "sure"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return worker(args.worker, args)

    command = [sys.executable, *sys.argv]
    workers = {f: subprocess.Popen([*command, "--worker", f], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for f in args.forms}
    size = {f: json.loads(w.stdout.readline()) for f, w in workers.items()}
    said, gemm = {f: [] for f in workers}, 0.
    for _ in range(args.steps):
        gemm = max(gemm, gemm_rate(args.gemm_seconds))
        for f, w in workers.items():
            w.stdin.write("step\n"); w.stdin.flush()
            said[f].append(json.loads(w.stdout.readline()))
    for w in workers.values(): w.stdin.close(); w.wait()

    print(f"SURE, preset {args.preset}, three modalities, batches of {args.batch} conversations of {args.shortest}-{args.longest} utterances, "
          f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, medians of {args.steps} steps")
    print(f"GEMM rate: {gemm/1e9:.0f} GFLOP/s")
    names = dict(batched="experts, batched", loop="experts, loop", sure="training step")
    speed = {}
    for f, steps in said.items():
        speed[f] = statistics.median(s["utterances"]/s["seconds"] for s in steps)
        bound = gemm / (6*size[f]["products"])
        print(f"{names[f]:17s} {size[f]['parameters']/1e6:6.2f} M parameters  {speed[f]:7.1f} utterances/s  {speed[f]/bound:5.1%} of the bound  "
              f"peak memory {max(s['memory'] for s in steps)/2**30:.2f} GiB")
    if {"batched", "loop"} <= speed.keys(): print(f"experts, batched / loop: {speed['batched']/speed['loop']:.2f}")


if __name__ == "__main__":
    main()
