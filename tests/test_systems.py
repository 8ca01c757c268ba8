"""Parts of the systems against oracles that share no line with them. What every model promises is
in test_models.py; the naive forms are in the chapters."""
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.ragged import Layout
from erc_moe.systems import attention
from erc_moe.systems.attention import TurnAttention

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
