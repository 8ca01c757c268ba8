"Recurrences in lock step are PyTorch's, whatever the lengths; dropout is what it says."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from erc_moe.ragged import Layout, dropout
from erc_moe.recurrence import bigru, lstm

KINDS = {
    "gru 1": (bigru, lambda: nn.GRU(3, 4, 1, bidirectional=True)),
    "gru 3": (bigru, lambda: nn.GRU(3, 4, 3, bidirectional=True)),
    "lstm": (lstm, lambda: nn.LSTM(3, 4))}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    networks=st.integers(1, 3),
)
def test_it_is_pytorch_s_on_every_conversation_alone(kind, lengths, seed, networks):
    torch.manual_seed(seed)
    run, make = KINDS[kind]
    layout, nets = (
        Layout(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]),
        [make().double() for _ in range(networks)])
    xs = [torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True) for _ in nets]
    ours = torch.stack(run(nets, xs, layout))
    theirs = torch.stack(
        [torch.cat([net(c)[0] for c in x.split(lengths)]) for net, x in zip(nets, xs)])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    wanted, towards = (
        [*xs, *(p for net in nets for p in net.parameters())],
        torch.randn(ours.shape, dtype=torch.float64))
    for a, b in zip(*(torch.autograd.grad((y*towards).sum(), wanted) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_layers_of_the_gru_have_dropout_between_them_in_training_only():
    torch.manual_seed(0)
    layout, x = Layout(torch.ones(2, 6, dtype=torch.bool)), torch.randn(12, 3)
    gru = nn.GRU(3, 4, 2, bidirectional=True, dropout=.5).train()
    assert not torch.equal(bigru([gru], [x], layout)[0], bigru([gru], [x], layout)[0])
    assert torch.equal(bigru([gru.eval()], [x], layout)[0], bigru([gru], [x], layout)[0])


def test_dropout_repeats_with_the_seed_and_scales_the_gradient():
    x = torch.randn(50, 7, requires_grad=True)
    masks = []
    for _ in range(2):
        torch.manual_seed(5)
        masks.append(dropout(x, .3, True))
    assert torch.equal(*masks)
    masks[0].sum().backward()
    torch.testing.assert_close(x.grad*x, masks[0])
