"""Components of the tables' systems against what they must be by other means: closed forms,
libraries, plain loops over random shapes."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.ragged import Layout
from erc_moe.systems import mmgcn
from erc_moe.systems.broad_mamba import StateSpace, scan
from erc_moe.systems.cfn_esa import EmotionShift
from erc_moe.systems.cogmen import (
    GraphTransformer, RelationalConvolution, WindowGraph, graph_contrast)
from erc_moe.systems.df_erc import context_alignment, contribution_alignment
from erc_moe.systems.mmgcn import GraphConvolutions, ModalityGraph

several = settings(max_examples=25, deadline=None)
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)
seeds = st.integers(0, 2**16)


def layout_of(lengths):
    return Layout(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def uniform(rng, *shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


@several
@given(lengths=lengths, seed=seeds, pairs=st.sampled_from([1, 20, 2**22]))
def test_the_roots_of_degrees_are_a_fixed_point_of_the_graph(lengths, seed, pairs):
    "D^-1/2 A D^-1/2 has the eigenvector D^1/2 1 of eigenvalue 1, whatever A is."
    rng, M, layout = torch.Generator().manual_seed(seed), sum(lengths), layout_of(lengths)
    x, seen = uniform(rng, 3, M, 4), torch.rand(3, M, generator=rng) < .7
    kept, mmgcn.PAIRS = mmgcn.PAIRS, pairs
    try: graph = ModalityGraph(x, seen, layout)
    finally: mmgcn.PAIRS = kept
    root = torch.where(seen, graph.scale.where(seen, 1)**-1, 0.)[..., None]
    close(graph.propagate(root), root)
    assert not graph.scale[~seen].any() and (graph.across <= 1).all()


def test_edges_are_angles():
    x = torch.tensor([[[1., 0.], [0., 2.], [-3., 0.], [5., 5.]]]).double()
    graph = ModalityGraph(x, torch.ones(1, 4, dtype=torch.bool), layout_of([4]))
    wanted = 1 - torch.tensor([0., 90., 180., 45.]).double()/180
    close(graph.blocks[0, 0, 0], wanted, atol=2e-3)    # cosines are drawn in by 1e-5


def test_deep_fusion_is_not_drowned_in_dropout():
    """Each layer's dropout falls on what it adds: sixteen layers carry a signal (dropout of the sum
    in every layer leaves 600 times as much noise)."""
    torch.manual_seed(0)
    x, layout = torch.randn(3, 6, 8).double(), layout_of([6])
    net = GraphConvolutions(8, 16, 16, dropout=.4, dynamic=True).double().train()
    graph = ModalityGraph(x, torch.ones(3, 6, dtype=torch.bool), layout)
    with torch.no_grad(): runs = torch.stack([net(x, graph) for _ in range(200)])
    assert runs.var(0).mean() < 2*runs.mean(0).square().mean()


def test_where_the_first_layer_is_all_the_graph_is_nothing():
    torch.manual_seed(0)
    x, layout = torch.randn(2, 6, 4).double(), layout_of([4, 2])
    net = GraphConvolutions(4, 5, 1, alpha=1., decay=math.e - 1, dropout=0.).double()
    h = net(x, ModalityGraph(x, torch.ones(2, 6, dtype=torch.bool), layout))
    close(h, (net.input(x).relu() @ net.weight[0]).relu())    # theta = log(e) = 1


@several
@given(lengths=lengths, seed=seeds)
def test_a_window_over_everything_is_full_attention(lengths, seed):
    rng, M, layout = torch.Generator().manual_seed(seed), sum(lengths), layout_of(lengths)
    torch.manual_seed(seed)
    x, net = uniform(rng, M, 6), GraphTransformer(6, 2).double()
    graph = WindowGraph(layout, torch.zeros(M, dtype=torch.int64), 9, 9)
    fast, begin = net(x, graph)[0] - net.skip(x), 0
    for n in lengths:
        q, k, v = (
            f(x[begin:begin + n]).unflatten(1, (2, 6)).transpose(0, 1)
            for f in (net.query, net.key, net.value))
        whole = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        close(fast[begin:begin + n], whole)
        begin += n


def test_a_relation_reads_whom_it_is_of():
    "Each relation adds a number of its own, so what was read can be told from the sum."
    layout, who = layout_of([4]), torch.tensor([0, 1, 1, 0])
    graph, net = WindowGraph(layout, who, 1, 1), RelationalConvolution(1, 1, 8).double()
    nn.init.zeros_(net.root.weight), nn.init.zeros_(net.root.bias)
    net.weight.data = 10.**torch.arange(8, dtype=torch.float64).view(8, 1, 1)
    told = net(torch.ones(4, 1).double(), graph)[:, 0].tolist()
    A_A, A_B, B_A, B_B = 0, 2, 4, 6    # + 1: not earlier
    assert told == [
        10**(A_A + 1) + 10**(B_A + 1), 10**A_B + 10**(B_B + 1), 10**B_B + 10**(B_B + 1)
        + 10**(A_B + 1), 10**B_A + 10**(A_A + 1)]


def test_a_copy_that_is_the_same_is_known_again():
    h = torch.eye(5).double()
    close(graph_contrast(h, h, .1), torch.log(1 + 8*torch.exp(torch.tensor(-10.).double())))
    assert graph_contrast(h, h.roll(1, 0), .1) > 9


@several
@given(lengths=lengths, seed=seeds, backwards=st.booleans())
def test_a_scan_is_a_loop(lengths, seed, backwards):
    rng, M, layout = torch.Generator().manual_seed(seed), sum(lengths), layout_of(lengths)
    a, b = torch.rand(M, 3, generator=rng).double().requires_grad_(), uniform(rng, M, 3)
    a.data[torch.rand(M, 3, generator=rng) < .2] = 0
    b.requires_grad_()
    begins = layout.position == (layout.length - 1 if backwards else 0)
    fast = scan(a.masked_fill(begins[:, None], 0), b, max(lengths), backwards)
    rows, begin = [None]*M, 0
    for n in lengths:
        h = torch.zeros(3).double()
        for t in (reversed(range(n)) if backwards else range(n)):
            h = rows[begin + t] = a[begin + t]*h + b[begin + t]
        begin += n
    naive = torch.stack(rows)
    close(fast, naive)
    for x, y in zip(*(
        torch.autograd.grad(out.sin().sum(), [a, b], allow_unused=True) for out in (fast, naive)
    )):
        close(x, torch.zeros_like(x) if y is None else y)


def test_a_state_follows_its_differential_equation():
    "dh/dt = A h + b u over a time that the network chose, integrated in small steps."
    torch.manual_seed(0)
    net, x = StateSpace(3, 2, 2).double(), 5*torch.randn(1, 3).double()
    nn.init.constant_(net.delta.bias, 1.)    # long enough for the equation to matter
    nn.init.zeros_(net.skip)
    u = F.silu(net.taps[:, 0]*(x @ net.input.weight.T).chunk(2, 1)[0])[0]       # (E,)
    write, read = net.select(u).chunk(2)
    rate, span, h = -net.log_rate.exp(), F.softplus(net.delta(u)), torch.zeros(2, 2).double()
    steps = 4_000
    for _ in range(steps): h = h + (span/steps)[:, None]*(rate*h + write*u[:, None])
    y = (h @ read + net.skip*u) * F.silu((x @ net.input.weight.T).chunk(2, 1)[1])[0]
    torch.testing.assert_close(net(x, layout_of([1]))[0], net.output(y), rtol=2e-3, atol=0)


@several
@given(lengths=lengths, seed=seeds)
def test_shifts_are_of_pairs_within_a_conversation(lengths, seed):
    rng, M, layout = torch.Generator().manual_seed(seed), sum(lengths), layout_of(lengths)
    torch.manual_seed(seed)
    f, again, net = uniform(rng, M, 4), uniform(rng, M, 4), EmotionShift(4, 3).double()
    y = torch.randint(3, (M,), generator=rng)
    i, j = (layout.conversation[:, None] == layout.conversation).nonzero().T
    logits = net.out(net.hidden(torch.cat([f[i], again[j]], 1)).relu())
    close(
        net.loss(f, again, y, layout.conversation), F.cross_entropy(logits, (y[i] != y[j]).long()))


@several
@given(lengths=lengths, seed=seeds)
def test_attention_that_is_as_asked_costs_nothing(lengths, seed):
    "Emotions as orthogonal questions and keys: all attention goes to those of one's own."
    rng, M, layout = torch.Generator().manual_seed(seed), sum(lengths), layout_of(lengths)
    y = torch.randint(-1, 3, (M,), generator=rng)
    q = 200*F.one_hot(y.clamp(min=0) + 1, 4).double()
    k = F.one_hot(y + 1, 4).double()    # those without a label have a key of their own
    close(context_alignment(q, k, y, layout), torch.zeros(M).double())
    assert (context_alignment(uniform(rng, M, 4), k, y, layout) >= -1e-12).all()


def test_contributions_are_told_by_kl():
    torch.manual_seed(0)
    logits, y = torch.randn(3, 8, 4).double(), torch.randint(4, (8,))
    shares, seen = torch.rand(3, 8).double().softmax(0), torch.ones(3, 8, dtype=torch.bool)
    right = logits.softmax(2)[:, torch.arange(8), y]                               # (3, 8)
    wanted = F.kl_div(shares.log().T, (right/right.sum(0)).T, reduction="batchmean")
    close(contribution_alignment(shares, logits, y, seen), wanted)
    exact = contribution_alignment(right/right.sum(0), logits, y, seen)
    close(exact, torch.zeros(()).double())


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000])
def test_a_scan_of_ones_is_a_sum(n):
    b = torch.randn(n, 2).double()
    close(scan(torch.ones(n, 2).double(), b, n), b.cumsum(0), atol=1e-9)
