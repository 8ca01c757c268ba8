"""Train the paper-size MiSTER-E on random conversations of IEMOCAP's shape and say how near it
comes to the machine's bound.

    python benchmarks/mister_e.py                        # paper size, some minutes on two cores
    python benchmarks/mister_e.py --preset cpu --width 384

One step is forward, the full loss (eq. 18), backward, clipping at norm 1 and AdamW. "padded" is the
straightforward form: nn.Conv1d, nn.GRU
and nn.MultiheadAttention over padded conversations, of the same sizes. How it is measured:
common.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

from common import benchmark, training
from erc_moe.losses import LossParts
from erc_moe.mister_e import MisterE, MisterEConfig
from erc_moe.mister_e.model import MisterEOutput


class PaddedContext(nn.Module):
    "The context addition network over padded conversations."
    def __init__(self, width, c):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, 2*c.hidden, k, padding=k//2) for k in (1, 3, 5))
        self.gru = nn.GRU(
            2 * c.hidden, c.hidden, c.layers, bidirectional=True, batch_first=True,
            dropout=c.context_dropout if c.layers > 1 else 0)
        self.residual, self.head = nn.Linear(width, 2*c.hidden), nn.Linear(2*c.hidden, c.classes)
        self.dropout = nn.Dropout(c.context_dropout)

    def forward(self, x):                                                  # (B, N, D) -> (B, N, C)
        near = sum(F.relu(conv(x.transpose(1, 2))) for conv in self.convs).transpose(1, 2)
        return self.head(
            self.dropout(self.dropout(self.gru(self.dropout(near))[0]) + self.residual(x)))


class PaddedAttention(nn.Module):
    "Attention 120 wide inside 1024, then residual and norm."
    def __init__(self, c):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(c.fusion_width, c.attention_width) for _ in range(3))
        self.attention = nn.MultiheadAttention(c.attention_width, c.heads, batch_first=True)
        self.out, self.norm = (
            nn.Linear(c.attention_width, c.fusion_width), nn.LayerNorm(c.fusion_width))
        self.dropout = nn.Dropout(c.fusion_dropout)

    def forward(self, x, other, mask):                                     # (B, N, W) twice, (B, N)
        q, k, v = (fc(y) for fc, y in zip(self.inner, (x, other, other)))
        return self.norm(
            x
            + self.dropout(
                self.out(self.attention(q, k, v, key_padding_mask=~mask, need_weights=False)[0])))


class PaddedMisterE(nn.Module):
    """MiSTER-E as one would first write it; attention's projections inside nn.MultiheadAttention
    add 0.9M parameters."""
    def __init__(self, c):
        super().__init__()
        self.model = MisterE(c)  # for its loss and its gate
        self.model.context, self.model.fusion = None, nn.Identity()
        self.contexts = nn.ModuleList(PaddedContext(d, c) for d in c.widths.values())
        self.inputs = nn.ModuleList(nn.Linear(d, c.fusion_width) for d in c.widths.values())
        self.layers = nn.ModuleList(
            nn.ModuleList(PaddedAttention(c) for _ in range(4)) for _ in range(c.fusion_layers))
        self.head, self.dropout = (
            nn.Linear(2 * c.fusion_width, c.classes), nn.Dropout(c.fusion_dropout))

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
        logits, weights = self.model.gate(
            experts.flatten(0, 1), mask.flatten()[:, None].expand(-1, 3))
        return MisterEOutput(
            logits.unflatten(0, mask.shape), dict(zip(c.experts, said)),
            weights.unflatten(0, mask.shape), representations=torch.stack([s[mask], t[mask]]))

    def loss(self, output, batch) -> LossParts:
        return self.model.loss(output, batch)


def widths(args):
    return {"speech": args.width, "text": args.width}


def config(args):
    return getattr(MisterEConfig, args.preset)("iemocap", widths(args), args.classes)


if __name__ == "__main__":
    benchmark(
        "MiSTER-E",
        __doc__,
        {
            "ours": lambda args: training(MisterE(config(args))),
            "padded": lambda args: training(PaddedMisterE(config(args)))},
        widths,
        [("ours", "padded")],
        dict(width=2048, batch=8, longest=90))
