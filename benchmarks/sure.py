"""Two measurements of SURE on random conversations of IEMOCAP's shape: its mixture of experts
alone, and the whole training step.

    python benchmarks/sure.py                          # paper size, some minutes on two cores
    python benchmarks/sure.py --preset cpu --steps 3

The mixture of experts (section 2.3), all modalities, forward and backward: "experts" is ours,
"experts, loop" the plain form that walks through
time steps and, within a step, through experts, over padded conversations. Both have the same
weights and the same loss.
"training step" is forward, the full loss, backward, clipping at norm 1 and AdamW; its bound counts
the query LSTM once per step of the reasoning.
How it is measured: common.py.
"""
import torch
from torch import nn

from common import Form, benchmark, training
from erc_moe.conversations import MODALITIES
from erc_moe.sure import Sure, SureConfig
from erc_moe.sure.experts import GaussianExperts, Routing


class Batched(nn.Module):
    "Our mixtures over the real utterances."
    def __init__(self, c):
        super().__init__()
        self.moe = nn.ModuleDict(
            {m: GaussianExperts(c.width, c.experts, c.chosen, c.routing) for m in c.widths})

    def forward(self, batch):  # -> modality -> (M, D), Routing
        return {m: net(batch.features[m][batch.mask]) for m, net in self.moe.items()}


class Loop(Batched):
    """The same mixtures, time step by time step and expert by expert; each expert answers for
    the utterances that chose it."""
    def forward(self, batch):
        told = {}
        for m, net in self.moe.items():
            mu_weight, sigma_weight = net.gaussians.weight.unflatten(
                0, (2, net.experts, -1)
            ).unbind(0)
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
                    sample = (
                        mu[took] + sigma[took] * torch.randn_like(mu[took])
                        if self.training
                        else mu[took])
                    z = z.index_add(0, took, weights[took, e, None]*sample)
                zs.append(z)
                routed.append((probabilities, weights, uncertainty, torch.stack(divergence, 1)))
            real = lambda steps: torch.stack(steps, 1)[batch.mask]         # (B, N, ...) -> (M, ...)
            told[m] = real(zs), Routing(*(real(x) for x in zip(*routed)))
        return told


def config(args):
    return getattr(SureConfig, args.preset)(
        "iemocap", dict.fromkeys(MODALITIES, args.width), args.classes)


def experts(model):
    """Forward and backward of the mixtures, with the terms of the experts' loss; as inside the
    model, their input asks for a gradient."""
    def step(batch):
        for x in batch.features.values(): x.requires_grad_().grad = None
        sum(
            z.square().mean() + r.divergence.mean() + r.balance for z, r in model(batch).values()
        ).backward()
        model.zero_grad()
    return Form(model.train(), step)


def whole(args):
    model = Sure(config(args))
    return training(
        model,
        sum(
            (model.config.steps - 1) * p.numel()
            for net in model.reasoning.values()
            for p in net.reader.parameters()))


if __name__ == "__main__":
    benchmark(
        "SURE",
        __doc__,
        {
            "experts": lambda args: experts(Batched(config(args))),
            "experts, loop": lambda args: experts(Loop(config(args))), "training step": whole},
        lambda args: dict.fromkeys(
            MODALITIES, args.width if args.worker == "training step" else config(args).width),
        [("experts", "experts, loop")],
        dict(width=1024, batch=16, longest=110))
