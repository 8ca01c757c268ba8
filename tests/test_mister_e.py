"What MiSTER-E promises beyond what every model does (test_models.py)."
import copy

import pytest
import torch
from hypothesis import given, settings

from erc_moe.conversations import collate
from erc_moe.mister_e import MisterE, MisterEConfig
from erc_moe.testing.model import LABELS, random_conversations
from test_models import lengths, seeds

WIDTHS = {"speech": 5, "text": 4}
SMALL = dict(hidden=4, layers=2, fusion_width=6, fusion_layers=2, attention_width=4, heads=2)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return MisterE(MisterEConfig(WIDTHS, 3, labels=LABELS, **SMALL | changes)).double().eval()


@pytest.fixture(scope="module", params=["paper", "released"])
def model(request):
    return small_model(
        **{}
        if request.param == "paper"
        else dict(gate="mlp", gate_temperature=2.0, consistency="symmetric", reduction="mean"))


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, seed=seeds)
def test_the_expert_of_an_absent_modality_is_not_heard(model, lengths, seed):
    batch = collate(random_conversations(lengths, seed, observed=.5), LABELS)
    gate = model(batch).gate
    for e, m in enumerate(WIDTHS): assert not gate[..., e][~batch.present[m]].any()
    assert (gate[..., 2][batch.mask] > 0).all()


@settings(max_examples=10, deadline=None)
@given(lengths=lengths, seed=seeds)
def test_speakers_are_not_looked_at(model, lengths, seed):
    batch = collate(random_conversations(lengths, seed), LABELS)
    other = copy.copy(batch)
    other.speakers = torch.randint(0, 9, batch.speakers.shape)
    assert torch.equal(model(batch).logits, model(other).logits)


def test_a_batch_without_labels_costs_nothing(model):
    batch = collate(random_conversations([3, 2], 0), LABELS)
    batch.labels = torch.full_like(batch.labels, -1)
    loss = model.loss(model(batch), batch)
    assert list(loss.parts) == [
        "speech", "text", "multimodal", "mixture", "contrastive", "consistency"]
    assert loss.total.item() == 0
    loss.total.backward()


@pytest.mark.parametrize("modality", ["speech", "text"])
def test_one_modality_has_one_term_of_loss(modality):
    model, batch = (
        MisterE(MisterEConfig({modality: WIDTHS[modality]}, 3, hidden=4, layers=1)),
        collate(random_conversations([4, 2], 0), LABELS))
    assert list(model.loss(model(batch), batch).parts) == [modality]
