"Promises of the utterance encoders that hold for every family of transformers and any input: tiny random models, no network."
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (AutoModel, BertConfig, GemmaConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, RobertaConfig, T5Config)

from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.encoders.text import EmotionTextEncoder, TextEncoderConfig
from erc_moe.encoders.utterance import load_encoder

LABELS = ["joy", "anger", "neutral"]
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def talk(texts, name="talk"):
    return Conversation(name, [Utterance(f"{name}{i}", "AB"[i % 2], t, LABELS[i % 3]) for i, t in enumerate(texts)])


def opened(encoder):
    return {n for n, p in encoder.named_parameters() if p.requires_grad}


# Text

SIZE = dict(vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=.3)
BEGIN, BOTH, END = ("<s> $A", "<s> $A <s> $B:1"), ("<s> $A </s>", "<s> $A </s> </s> $B:1 </s>:1"), ("$A </s>", "$A </s> $B:1 </s>:1")
TEXT = {"llama": (LlamaConfig(num_key_value_heads=1, **SIZE), BEGIN), "qwen2": (Qwen2Config(num_key_value_heads=1, **SIZE), ()),
        "gemma": (GemmaConfig(num_key_value_heads=1, head_dim=8, **SIZE), BEGIN),
        "gpt2": (GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, initializer_range=.3), ()), "bert": (BertConfig(**SIZE), BOTH),
        "roberta": (RobertaConfig(pad_token_id=0, **SIZE), BOTH),
        "t5": (T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0), END)}
WAYS = {"lora": dict(), "full": dict(adaptation="full", frozen_layers=1, pooling="mean"), "frozen": dict(adaptation="frozen", pooling="last")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A folder with a tiny random model and a tokenizer of every family."
    folder, signs = tmp_path_factory.mktemp("hub"), ["<pad>", "<s>", "</s>"]
    for name, (config, template) in TEXT.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder/name)
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        t.train_from_iterator(["we have won", "no idea"], trainers.BpeTrainer(vocab_size=280, special_tokens=signs, show_progress=False,
                                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        if template:
            t.post_processor = processors.TemplateProcessing(single=template[0], pair=template[1], special_tokens=[(s, i) for i, s in enumerate(signs)])
        PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder/name)
    return folder


def text_encoder(hub, name, **changes):
    torch.manual_seed(1)
    return EmotionTextEncoder(TextEncoderConfig(**dict(encoder=str(hub/name), classes=3, labels=LABELS, width=12, dropout=0., lora_dropout=0.) | changes)).eval()


TEXTS = ["We won!", "No idea what you are talking about.", "", "Oh.", "日本語 😀", "we have won no idea " * 4]


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("way", WAYS)
def test_text_only_what_is_opened_moves_and_what_is_saved_is_enough(hub, tmp_path, name, way):
    encoder = text_encoder(hub, name, **WAYS[way])
    data, before = encoder.dataset([talk(TEXTS)], LABELS), {n: p.detach().clone() for n, p in encoder.named_parameters()}
    optimizer = torch.optim.SGD([dict(params=g["params"]) for g in encoder.train().parameter_groups()], lr=.3)
    for _ in range(2):
        batch = data.batch(data.learnable)
        encoder.loss(encoder(batch), batch).total.backward()
        optimizer.step(), optimizer.zero_grad()
    moved = {n for n, p in encoder.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= opened(encoder) and {n for n in moved if n.startswith("embed_layer") or n.startswith("classify")}
    assert any("lora_B" in n for n in moved) == (way == "lora")
    assert {n for n in moved if n.startswith("base.") and "lora_" not in n} == {n for n in moved if n.startswith("base.")} - {n for n in moved if "lora_" in n}
    if way == "frozen": assert not any(n.startswith("base.") for n in moved)
    encoder.save_pretrained(tmp_path)
    again = load_encoder(tmp_path)
    assert np.array_equal(again.embed(data), encoder.embed(data)) and not again.training
    assert (tmp_path/"encoder.safetensors").stat().st_size < sum(4*p.numel() for n, p in encoder.named_parameters() if n in opened(encoder)) + 8192


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("context", [0, 2])
def test_text_embedding_is_the_same_in_any_company(hub, name, context):
    encoder = text_encoder(hub, name, context=context)
    data = encoder.dataset([talk(TEXTS)], LABELS)
    e = encoder.embed(data)
    for order in ([0, 1, 2, 3, 4, 5], [5, 2], [3], [2]):
        with torch.no_grad(): got = encoder(data.batch(torch.tensor(order))).embedding
        np.testing.assert_allclose(got.numpy(), e[order], atol=2e-5)
    assert np.isfinite(e).all() and data.learnable.tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "bert", "t5"])
@quick
@given(st.lists(st.text(max_size=30), min_size=1, max_size=6), st.integers(0, 3), st.integers(12, 40))
def test_context_is_cut_from_its_oldest_end_and_the_utterance_never_for_it(hub, name, texts, context, max_tokens):
    encoder = text_encoder(hub, name, context=context, max_tokens=max_tokens)
    data, alone = encoder.dataset([talk(texts)], LABELS), text_encoder(hub, name, max_tokens=max_tokens).dataset([talk(texts)], LABELS)
    bare = lambda ids: [i for i in ids if i > 2]                              # without the signs
    tokens = encoder.tokenizer
    for i in range(len(texts)):
        ids, start = data.tokens[i], data.starts[i]
        assert 1 <= len(ids) <= max_tokens and bare(ids[start:]) == bare(alone.tokens[i])
        if not start: assert ids == alone.tokens[i]
        else:
            before = " ".join(texts[max(0, i - context):i]) + ("\n" if name == "gpt2" else "")
            full = bare(tokens(before, add_special_tokens=False)["input_ids"])
            assert context and bare(ids[:start]) == full[len(full) - len(bare(ids[:start])):]
            assert len(ids) == max_tokens or bare(ids[:start]) == full
    assert tokens.truncation_side == "right"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_long_text_is_cut_at_its_end_and_told(hub, name):
    encoder = text_encoder(hub, name, max_tokens=64)
    data = encoder.dataset([talk(["short", "x" * 10_000, "x" * 200])], LABELS)
    assert data.cut == ["talk1", "talk2"] and data.lengths.tolist() == [len(data.tokens[0]), 64, 64]
    assert data.tokens[1] == data.tokens[2] and np.allclose(*encoder.embed(data)[1:], atol=1e-6)


def test_text_that_is_empty_is_scored_and_never_learnt(hub):
    for name in TEXT:
        encoder = text_encoder(hub, name)
        data = encoder.dataset([talk(["", "  ", "yes"])], LABELS)
        assert data.learnable.tolist() == [2] and np.isfinite(encoder.embed(data)).all()
    assert encoder.embed(encoder.dataset([], LABELS)).shape == (0, 12)


def test_a_tiny_encoder_learns_a_batch_by_heart(hub):
    encoder = text_encoder(hub, "llama", adaptation="full", gamma=0., pooling="attentive", width=32).train()
    data = encoder.dataset([talk(["we won", "no", "idea", "have you", "what else", "oh no no"])], LABELS)
    optimizer = torch.optim.AdamW([dict(params=g["params"]) for g in encoder.parameter_groups()], lr=1e-2)
    batch = data.batch(data.learnable)
    for _ in range(60):
        encoder.loss(encoder(batch), batch).total.backward()
        optimizer.step(), optimizer.zero_grad()
    assert (encoder.eval()(batch).logits.argmax(1) == batch.labels).all()


def test_in_bfloat16_the_transformer_is_and_the_head_is_not(hub):
    encoder = text_encoder(hub, "llama", precision="bfloat16")
    kinds = {n: p.dtype for n, p in encoder.named_parameters()}
    assert {d for n, d in kinds.items() if n.startswith("base.") and "lora_" not in n} == {torch.bfloat16}
    assert {kinds[n] for n in opened(encoder)} == {torch.float32}
    data = encoder.dataset([talk(TEXTS)], LABELS)
    assert np.allclose(encoder.embed(data), text_encoder(hub, "llama").embed(data), atol=.1)


def test_another_transformer_in_the_same_folder_is_refused(hub, tmp_path):
    AutoModel.from_pretrained(hub/"bert").save_pretrained(tmp_path/"base")
    PreTrainedTokenizerFast.from_pretrained(hub/"bert").save_pretrained(tmp_path/"base")
    text_encoder(tmp_path, "base").save_pretrained(tmp_path/"tuned")
    load_encoder(tmp_path/"tuned")
    model = AutoModel.from_pretrained(tmp_path/"base")
    model.embeddings.word_embeddings.weight.data[5, 5] += 1
    model.save_pretrained(tmp_path/"base")
    with pytest.raises(DataError, match="was tuned on"): load_encoder(tmp_path/"tuned")


@pytest.mark.parametrize("changes, problem", [
    (dict(max_tokens=7), "8 or more"), (dict(context=-1), "0 or more"), (dict(pooling="max"), "attentive, mean, first, last"),
    (dict(targets=["no_such_matrix"]), "Name its matrices in targets"), (dict(four_bit=True), "bitsandbytes"), (dict(labels=["joy"]), "1 labels for 3 classes")])
def test_text_configuration_that_cannot_be(hub, changes, problem):
    with pytest.raises(DataError, match=problem): text_encoder(hub, "llama", **changes)


def test_an_encoder_that_cannot_be_had(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the encoder 'nobody/nothing' cannot be had"): EmotionTextEncoder(TextEncoderConfig(encoder="nobody/nothing", classes=3))
    (tmp_path/"config.json").write_text('{"model_type": "no_such_kind"}')
    with pytest.raises(DataError, match="cannot be had"): EmotionTextEncoder(TextEncoderConfig(encoder=str(tmp_path), classes=3))
    for name in ("bert", "llama", "t5", "gpt2"):
        AutoModel.from_pretrained(hub/name).save_pretrained(tmp_path/name)
        with pytest.raises(DataError, match="tokenizer.* has no vocabulary|AutoTokenizer.*cannot be had"): text_encoder(tmp_path, name).tokenizer


def test_more_tokens_than_the_encoder_has_positions_for(hub, tmp_path):
    AutoModel.from_pretrained(hub/"bert").save_pretrained(tmp_path/"short")
    PreTrainedTokenizerFast.from_pretrained(hub/"bert", model_max_length=64).save_pretrained(tmp_path/"short")
    with pytest.raises(DataError, match="max_tokens is 128, and this encoder reads 64"): text_encoder(tmp_path, "short").dataset([talk(TEXTS)], LABELS)
    assert text_encoder(tmp_path, "short", max_tokens=64).dataset([talk(TEXTS)], LABELS).cut == []


def test_batches_for_scoring_hold_every_utterance_once(hub):
    data = text_encoder(hub, "gpt2").dataset([talk(["word " * n for n in range(40)], "a"), talk(TEXTS, "b")], LABELS)
    data.budget = 64
    places = [i for _, rows in data.evaluation for i in rows.tolist()]
    assert sorted(places) == list(range(46))
    sizes = [batch.inputs["input_ids"].shape for batch, _ in data.evaluation]
    assert all(b == 1 or b*t <= 64 for b, t in sizes) and list(accumulate(b for b, _ in sizes))[-1] == 46
