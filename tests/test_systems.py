"""Parts of the systems against oracles that share no line with them. What every model promises is
in test_models.py; the naive forms are in the chapters."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.baselines.dialogue_rnn import DialogueRecurrence
from erc_moe.ragged import Layout
from erc_moe.systems import attention, relational_attention
from erc_moe.systems.attention import TurnAttention
from erc_moe.baselines.dialogue_loop import read_dialogues
from erc_moe.systems.mmgat_emo import balance_loss
from erc_moe.systems.multiemo_losses import soft_hgr_loss
from erc_moe.systems.telme import ShiftingGate, relation_loss

several = settings(max_examples=20, deadline=None)
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=4)
seeds = st.integers(0, 2**16)


def layout_of(lengths):
    return Layout(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


@several
@given(lengths=lengths, seed=seeds, causal=st.booleans(), alone=st.booleans())
def test_turns_hear_what_pytorchs_attention_hears(lengths, seed, causal, alone):
    torch.manual_seed(seed)
    layout, M = layout_of(lengths), sum(lengths)
    layer = TurnAttention(2, 6, 2, causal=causal).double()
    x, y, seen = *torch.randn(2, 2, M, 6, dtype=torch.float64), torch.rand(2, M) < .7
    pairs = attention.PAIRS
    attention.PAIRS = 0 if alone else pairs
    try: told = layer(x, y, seen, layout)
    finally: attention.PAIRS = pairs
    for e in range(2):
        oracle = nn.MultiheadAttention(6, 2, batch_first=True).double()
        with torch.no_grad():
            oracle.in_proj_weight.copy_(torch.cat([layer.q_weight[e], layer.kv_weight[e]], 1).T)
            oracle.in_proj_bias.copy_(torch.cat([layer.q_bias[e, 0], layer.kv_bias[e, 0]]))
            oracle.out_proj.weight.copy_(layer.out_weight[e].T)
            oracle.out_proj.bias.copy_(layer.out_bias[e, 0])
        for rows in torch.arange(M).split(lengths):
            for i in rows.tolist():
                keys = [j for j in rows.tolist() if seen[e, j] and (j <= i or not causal)]
                heard = oracle(x[e, None, i:i + 1], y[e, None, keys], y[e, None, keys])[0][0, 0] \
                    if keys else oracle.out_proj.bias
                expected = nn.functional.layer_norm(x[e, i] + heard, (6,))
                torch.testing.assert_close(told[e, i], expected, atol=1e-10, rtol=0)


@several
@given(lengths=lengths, seed=seeds)
def test_dialogues_read_together_are_read_alone(lengths, seed):
    torch.manual_seed(seed)
    layout, M = layout_of(lengths), sum(lengths)
    nets = [DialogueRecurrence(5, 4, 4, 3).double() for _ in range(3)]
    xs, speakers = [*torch.randn(3, M, 5, dtype=torch.float64)], torch.randint(3, (M,))
    told = read_dialogues(nets, xs, speakers, layout, [False, True, True])
    for net, x, back, h in zip(nets, xs, (False, True, True), told):
        torch.testing.assert_close(h[0], net(x, speakers, layout, back)[0], atol=1e-10, rtol=0)


@several
@given(lengths=lengths, seed=seeds, cells=st.sampled_from([1, 40, 2**24]))
def test_edges_are_weighed_one_by_one(lengths, seed, cells):
    torch.manual_seed(seed)
    layout, M = layout_of(lengths), sum(lengths)
    asks, keys = torch.randn(2, 2, M, dtype=torch.float64)
    bias, values = torch.randn(2, 5).double(), torch.randn(2, M, 3).double()
    seen, graph = torch.rand(2, M) < .7, torch.randint(6, (*layout.mask.shape, max(lengths)))
    whole = relational_attention.CELLS
    relational_attention.CELLS = cells
    try:
        told = relational_attention.relational_attention(
            asks, keys, bias, values, graph.to(torch.uint8), seen, layout)
    finally: relational_attention.CELLS = whole
    for e in range(2):
        for b, rows in enumerate(torch.arange(M).split(lengths)):
            for i, at in enumerate(rows.tolist()):
                kinds = graph[b, i, :len(rows)].tolist()
                ends = [(k, j) for k, j in zip(kinds, rows.tolist()) if k and seen[e, j]]
                expected = torch.zeros(3, dtype=torch.float64)
                if ends:
                    score = torch.stack([
                        asks[e, at] + keys[e, j] + bias[e, k - 1] for k, j in ends])
                    weight = torch.where(score > 0, score, .2*score).softmax(0)
                    expected = weight @ values[e, [j for _, j in ends]]
                torch.testing.assert_close(told[e, at], expected, atol=1e-10, rtol=0)


@several
@given(seed=seeds, count=st.integers(2, 9))
def test_correlations_are_those_of_numpy(seed, count):
    rng = np.random.default_rng(seed)
    f, g = rng.normal(size=(2, count, 4))
    cov = lambda x: np.cov(x.T)
    both = ((f - f.mean(0))*(g - g.mean(0))).sum()/(count - 1)
    told = soft_hgr_loss(torch.tensor(np.stack([f, g])), torch.ones(2, count, dtype=torch.bool))
    assert told.item() == pytest.approx(-(both - np.trace(cov(f) @ cov(g))/2)/4)
    p, q = (torch.tensor(x).div(2).softmax(1).numpy() for x in (f, g))
    rho = lambda a, b: np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
    told = relation_loss(torch.tensor(f), torch.tensor(g), 2.)
    assert told.item() == pytest.approx(4*(2 - rho(p, q) - rho(p.T, q.T)), abs=1e-6)


@several
@given(seed=seeds, most=st.floats(0, 2))
def test_a_shift_is_cut_to_its_limit_and_never_enlarged(seed, most):
    torch.manual_seed(seed)
    gate, text = ShiftingGate(5, 3, most).double(), torch.randn(6, 5, dtype=torch.float64)
    heard = torch.randn(6, 3).double()*torch.tensor([[1e-3], [1.], [1e3]]).repeat(2, 1)
    told, moved = gate(text, heard)
    assert told.isfinite().all() and (moved <= most + 1e-9).all()
    h = gate.gate(torch.cat([heard, text], 1)).relu() * gate.move(heard)
    for i, (t, by) in enumerate(zip(text, h)):
        share = min(1., most*t.norm().item() / max(by.norm().item(), 1e-6))
        torch.testing.assert_close(told[i], gate.norm(t + share*by), atol=1e-9, rtol=0)


@several
@given(seed=seeds, experts=st.integers(2, 5))
def test_the_balance_is_least_where_shares_are_even(seed, experts):
    torch.manual_seed(seed)
    even, gate = torch.full((7, experts), 1/experts), torch.randn(7, experts).softmax(1)
    alone = torch.eye(experts)[torch.zeros(7, dtype=torch.long)]
    assert abs(balance_loss(even)) < 1e-5 <= 1e-5 + balance_loss(gate) <= 2e-5 + balance_loss(alone)
