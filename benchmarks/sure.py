"""Two measurements of SURE on random conversations of IEMOCAP's shape: its mixture of experts
alone, and the whole training step.

    python benchmarks/sure.py                          # paper size, some minutes on two cores
    python benchmarks/sure.py --preset cpu --steps 3

The mixture of experts (section 2.3), all modalities, forward and backward: "experts" is ours,
"experts, loop" the plain form that walks through
time steps and, within a step, through experts, over padded conversations. Both have the same
weights and the same loss.
"training step" is forward, the full loss, backward, clipping at norm 1 and AdamW; its bound counts
the query LSTM once per step of the reasoning. "training step, padded" is the straightforward form of
the whole: nn.GRU, nn.LSTM and nn.MultiheadAttention over padded conversations, a module per encoder.
How it is measured: common.py.
"""
import torch
from torch import nn

from common import Form, benchmark, training
from erc_moe.base import ConversationModel
from erc_moe.conversations import MODALITIES
from erc_moe.losses import LossParts
from erc_moe.sure import Sure, SureConfig
from erc_moe.sure.experts import GaussianExperts, Routing
from erc_moe.sure.model import SureOutput
from erc_moe.sure.transformer import positions


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


class PaddedReasoning(nn.Module):
    "Iterative reasoning over padded conversations."
    def __init__(self, d, steps):
        super().__init__()
        self.context = nn.GRU(d, d//2, bidirectional=True, batch_first=True)
        self.memory = nn.LSTM(d, d, batch_first=True)
        self.key, self.query, self.out = nn.Linear(d, d), nn.Linear(d, 2*d), nn.Linear(2*d, d)
        self.reader, self.steps = nn.LSTMCell(2*d, d), steps

    def forward(self, x, mask):                                            # (B, N, D), (B, N)
        keys, q = self.key(self.memory(x)[0]), self.query(self.context(x)[0]).flatten(0, 1)
        state = None
        for _ in range(self.steps):
            state = self.reader(q, state)
            asked = state[0].view_as(x)
            score = (asked @ keys.mT).masked_fill(~mask[:, None], -1e4)    # (B, N, N)
            q = torch.cat([asked, score.softmax(2).to(keys) @ keys], 2).flatten(0, 1)
        return self.out(q).view_as(x)


class PaddedEncoder(nn.Module):
    "One of the S*S Transformer encoders, and its gate."
    def __init__(self, d, heads, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, heads, batch_first=True)
        self.inner, self.outer, self.gate = (nn.Linear(d, d) for _ in range(3))
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, other, mask):
        heard = self.attention(x, other, other, key_padding_mask=~mask, need_weights=False)[0]
        h = self.first(x + self.dropout(heard))
        h = self.second(h + self.dropout(self.outer(self.dropout(self.inner(h).relu()))))
        return self.gate(h).sigmoid()*h


class PaddedSure(nn.Module):
    "SURE as one would first write it."
    def __init__(self, c):
        super().__init__()
        self.config, each = c, lambda make: nn.ModuleList(make() for _ in c.widths)
        self.inputs = nn.ModuleList(nn.Linear(d, c.width) for d in c.widths.values())
        self.moe = each(lambda: GaussianExperts(c.width, c.experts, c.chosen, c.routing))
        self.reasoning = each(lambda: PaddedReasoning(c.width, c.steps))
        self.speaker = nn.Embedding(c.speakers + 1, c.width)
        self.encoders = each(lambda: each(lambda: PaddedEncoder(c.width, c.heads, c.dropout)))
        self.fuse = each(lambda: nn.Linear(len(c.widths)*c.width, c.width))
        self.head, self.dropout = nn.Linear(len(c.widths)*c.width, c.classes), nn.Dropout(c.dropout)

    def forward(self, batch):
        c, mask, streams, routed = self.config, batch.mask, [], []
        steps = torch.arange(mask.shape[1], device=mask.device)
        place = positions(steps, c.width) + self.speaker(batch.speakers.clamp(max=c.speakers))
        for m, fc, moe, reason in zip(c.widths, self.inputs, self.moe, self.reasoning):
            z, routing = moe(fc(batch.features[m]).flatten(0, 1))
            routed.append(routing)
            streams.append(reason(z.view(*mask.shape, -1), mask) + place)
        final = [
            fuse(torch.cat([net(x, y, mask) for net, y in zip(nets, streams)], 2))
            for x, nets, fuse in zip(streams, self.encoders, self.fuse)]
        mean = lambda terms: torch.stack(terms).mean()
        return SureOutput(
            self.head(self.dropout(torch.cat(final, 2))), routing={}, uncertainty={}, attention={},
            divergence=mean([r.divergence.mean() for r in routed]),
            balance=mean([r.balance for r in routed]))

    def loss(self, output, batch) -> LossParts:
        c, parts = self.config, ConversationModel.loss(self, output, batch).parts
        return LossParts(parts | {
            "divergence": c.divergence_weight*output.divergence,
            "balance": c.balance_weight*output.balance})


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


def repeated(model):
    "The parameters of the query LSTMs, once for every further step of the reasoning."
    readers = [net.reader for net in model.modules() if hasattr(net, "reader")]
    return (model.config.steps - 1)*sum(p.numel() for net in readers for p in net.parameters())


def whole(args, kind=Sure):
    model = kind(config(args))
    return training(model, repeated(model))


if __name__ == "__main__":
    benchmark(
        "SURE",
        __doc__,
        {
            "experts": lambda args: experts(Batched(config(args))),
            "experts, loop": lambda args: experts(Loop(config(args))), "training step": whole,
            "training step, padded": lambda args: whole(args, PaddedSure)},
        lambda args: dict.fromkeys(
            MODALITIES, args.width if "step" in args.worker else config(args).width),
        [("experts", "experts, loop"), ("training step", "training step, padded")],
        dict(width=1024, batch=16, longest=110))
