"""Promises of the utterance encoders that hold for every family of transformers and any input:
tiny random models, no network."""
import os
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel, BertConfig, GemmaConfig, GPT2Config, HubertConfig, LlamaConfig, MPNetConfig,
    PreTrainedTokenizerFast, Qwen2AudioConfig, Qwen2AudioProcessor, Qwen2Config, RobertaConfig,
    T5Config, Wav2Vec2Config, Wav2Vec2FeatureExtractor, WavLMConfig, WhisperConfig,
    WhisperFeatureExtractor)

from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.corpora import Corpus
from erc_moe.encoders.frozen import FrozenStates, frozen_depth, quiet_below
from erc_moe.encoders.reading import Signs, block_mask, passages, window
from erc_moe.encoders.salmonn import Salmonn, SalmonnConfig
from erc_moe.encoders.speech import EmotionSpeechEncoder, SalmonnParts, SpeechEncoderConfig
from erc_moe.encoders.text import EmotionTextEncoder, TextEncoderConfig
from erc_moe.encoders.utterance import load_encoder
from erc_moe.training.loop import TrainingConfig, fit

LABELS = ["joy", "anger", "neutral"]
quick = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def talk(texts, name="talk"):
    return Conversation(
        name, [Utterance(f"{name}{i}", "AB"[i % 2], t, LABELS[i % 3]) for i, t in enumerate(texts)])


def opened(encoder):
    return {n for n, p in encoder.named_parameters() if p.requires_grad}


def moved_by_two_steps(encoder, data):
    "The parameters that two steps of training change."
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    optimizer = torch.optim.SGD(
        [dict(params=g["params"]) for g in encoder.train().parameter_groups()], lr=0.3)
    for _ in range(2):
        batch = data.batch(data.learnable)
        encoder.loss(encoder(batch), batch).total.backward()
        optimizer.step(), optimizer.zero_grad()
    return {n for n, p in encoder.named_parameters() if not torch.equal(p, before[n])}


# Text

SIZE = dict(
    vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, initializer_range=0.3)
BEGIN, BOTH, END = (
    ("<s> $A", "<s> $A <s> $B:1"), ("<s> $A </s>", "<s> $A </s> </s> $B:1 </s>:1"),
    ("$A </s>", "$A </s> $B:1 </s>:1"))
TEXT = {
    "llama": (LlamaConfig(num_key_value_heads=1, **SIZE), BEGIN),
    "qwen2": (Qwen2Config(num_key_value_heads=1, **SIZE), ()),
    "gemma": (GemmaConfig(num_key_value_heads=1, head_dim=8, **SIZE), BEGIN),
    "gpt2": (GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3), ()),
    "bert": (BertConfig(**SIZE), BOTH),
    "roberta": (RobertaConfig(pad_token_id=0, **SIZE), BOTH),
    "mpnet": (MPNetConfig(pad_token_id=0, **SIZE), BOTH),
    "t5": (
        T5Config(
            vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            decoder_start_token_id=0),
        END)}
WAYS = {
    "lora": dict(), "full": dict(adaptation="full", frozen_layers=1, pooling="mean"),
    "frozen": dict(adaptation="frozen", pooling="last")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A folder with a tiny random model and a tokenizer of every family."
    folder, signs = tmp_path_factory.mktemp("hub"), ["<pad>", "<s>", "</s>"]
    for name, (config, template) in TEXT.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder/name)
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
        t.train_from_iterator(
            ["we have won", "no idea"],
            trainers.BpeTrainer(
                vocab_size=280, special_tokens=signs, show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        if template:
            t.post_processor = processors.TemplateProcessing(
                single=template[0], pair=template[1],
                special_tokens=[(s, i) for i, s in enumerate(signs)])
        PreTrainedTokenizerFast(
            tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder / name)
    return folder


def text_encoder(hub, name, **changes):
    torch.manual_seed(1)
    return EmotionTextEncoder(TextEncoderConfig(
        **dict(
            encoder=str(hub / name), classes=3, labels=LABELS, width=12, dropout=0.0,
            lora_dropout=0.0)
        | changes
    )).eval()


TEXTS = [
    "We won!", "No idea what you are talking about.", "", "Oh.", "日本語 😀",
    "we have won no idea " * 4]


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("way", WAYS)
def test_text_only_what_is_opened_moves_and_what_is_saved_is_enough(hub, tmp_path, name, way):
    encoder = text_encoder(hub, name, **WAYS[way])
    data = encoder.dataset([talk(TEXTS)], LABELS)
    moved = moved_by_two_steps(encoder, data)
    assert moved <= opened(encoder) and {
        n for n in moved if n.startswith("embed_layer") or n.startswith("classify")}
    assert any("lora_B" in n for n in moved) == (way == "lora")
    assert {n for n in moved if n.startswith("base.") and "lora_" not in n} == {
        n for n in moved if n.startswith("base.")
    } - {n for n in moved if "lora_" in n}
    if way == "frozen": assert not any(n.startswith("base.") for n in moved)
    encoder.save_pretrained(tmp_path)
    again = load_encoder(tmp_path)
    assert np.array_equal(again.embed(data), encoder.embed(data)) and not again.training
    assert (tmp_path / "encoder.safetensors").stat().st_size < sum(
        4 * p.numel() for n, p in encoder.named_parameters() if n in opened(encoder)
    ) + 8192



def test_a_tuned_encoder_with_weights_that_are_no_numbers_is_refused(hub, tmp_path):
    text_encoder(hub, next(iter(TEXT)), adaptation="lora").save_pretrained(tmp_path)
    file = tmp_path/"encoder.safetensors"
    whole = load_file(file)
    for value in (np.nan, np.inf):
        name = next(n for n, x in whole.items() if x.is_floating_point())
        broken = whole[name].clone()
        broken.view(-1)[0] = value
        save_file(whole | {name: broken}, file)
        with pytest.raises(DataError, match="hold NaN or infinity"): load_encoder(tmp_path)



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
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=6), st.integers(0, 3), st.integers(12, 40)
)
def test_context_is_cut_from_its_oldest_end_and_the_utterance_never_for_it(
    hub, name, texts, context, max_tokens
):
    encoder = text_encoder(hub, name, context=context, max_tokens=max_tokens)
    data, alone = (
        encoder.dataset([talk(texts)], LABELS),
        text_encoder(hub, name, max_tokens=max_tokens).dataset([talk(texts)], LABELS))
    bare = lambda ids: [i for i in ids if i > 2]                              # without the signs
    tokens = encoder.tokenizer
    for i in range(len(texts)):
        ids, (start, end) = data.tokens[i], data.spans[i]
        assert 1 <= len(ids) <= max_tokens and end == len(ids)
        assert bare(ids[start:]) == bare(alone.tokens[i])
        if not start: assert ids == alone.tokens[i]
        else:
            turn = lambda t: tokens(t, add_special_tokens=False)["input_ids"]
            between = turn("\n") if name == "gpt2" else []
            full = [
                t for text in texts[max(0, i - context):i] if text.strip()
                for t in (*turn(text), *between)]
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
    encoder = text_encoder(
        hub, "llama", adaptation="full", gamma=0.0, pooling="attentive", width=32
    ).train()
    data = encoder.dataset(
        [talk(["we won", "no", "idea", "have you", "what else", "oh no no"])], LABELS)
    optimizer = torch.optim.AdamW(
        [dict(params=g["params"]) for g in encoder.parameter_groups()], lr=1e-2)
    batch = data.batch(data.learnable)
    for _ in range(60):
        encoder.loss(encoder(batch), batch).total.backward()
        optimizer.step(), optimizer.zero_grad()
    assert (encoder.eval()(batch).logits.argmax(1) == batch.labels).all()


def test_in_bfloat16_the_transformer_is_and_the_head_is_not(hub):
    encoder = text_encoder(hub, "llama", dtype="bfloat16")
    kinds = {n: p.dtype for n, p in encoder.named_parameters()}
    assert {d for n, d in kinds.items() if n.startswith("base.") and "lora_" not in n} == {
        torch.bfloat16}
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


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(max_tokens=7), "8 or more"),
        (dict(context=-1), "0 or more"),
        (dict(context_after=-1), "later utterances, 0 or more"),
        (dict(context_after=1), "reads from left to right.*context_after=0"),
        (dict(reading="conversation"), "--set context=2"),
        (dict(pooling="max"), "attentive, mean, first, last"),
        (dict(targets=["no_such_matrix"]), "Its linear layers are called"),
        (dict(four_bit=True), "bitsandbytes"),
        (dict(labels=["joy"]), "1 labels for 3 classes"),
    ],
)
def test_text_configuration_that_cannot_be(hub, changes, problem):
    with pytest.raises(DataError, match=problem): text_encoder(hub, "llama", **changes)


def test_an_encoder_that_cannot_be_had(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the encoder 'nobody/nothing' cannot be had"):
        EmotionTextEncoder(TextEncoderConfig(encoder="nobody/nothing", classes=3))
    (tmp_path/"config.json").write_text('{"model_type": "no_such_kind"}')
    with pytest.raises(DataError, match="cannot be had"):
        EmotionTextEncoder(TextEncoderConfig(encoder=str(tmp_path), classes=3))
    for name in ("bert", "llama", "t5", "gpt2"):
        AutoModel.from_pretrained(hub/name).save_pretrained(tmp_path/name)
        with pytest.raises(
            DataError, match="tokenizer.* has no vocabulary|AutoTokenizer.*cannot be had"
        ):
            text_encoder(tmp_path, name).tokenizer


def test_more_tokens_than_the_encoder_has_positions_for(hub, tmp_path):
    AutoModel.from_pretrained(hub/"bert").save_pretrained(tmp_path/"short")
    PreTrainedTokenizerFast.from_pretrained(hub / "bert", model_max_length=64).save_pretrained(
        tmp_path / "short")
    with pytest.raises(DataError, match="max_tokens is 128, and this encoder reads 64"):
        text_encoder(tmp_path, "short").dataset([talk(TEXTS)], LABELS)
    assert text_encoder(tmp_path, "short", max_tokens=64).dataset([talk(TEXTS)], LABELS).cut == []


def test_batches_for_scoring_hold_every_utterance_once(hub):
    data = text_encoder(hub, "gpt2").dataset(
        [talk(["word " * n for n in range(40)], "a"), talk(TEXTS, "b")], LABELS)
    data.budget = 64
    places = [i for _, rows in data.evaluation for i in rows.tolist()]
    assert sorted(places) == list(range(46))
    sizes = [batch.inputs["input_ids"].shape for batch, _ in data.evaluation]
    assert (
        all(b == 1 or b * t <= 64 for b, t in sizes)
        and list(accumulate(b for b, _ in sizes))[-1] == 46)


# Frozen layers, computed once

CACHED = ["bert", "roberta", "mpnet", "llama", "gpt2", "qwen2", "gemma"]
TOP = {"lora": dict(), "full": dict(adaptation="full"), "frozen": dict(adaptation="frozen")}


def trained(hub, name, texts, cache, way, steps=3, dropout=0.2, **changes):
    """An encoder after some steps with dropout; without a cache its frozen layers are made quiet
    by hand, which is what the cache must equal."""
    encoder = text_encoder(
        hub, name, frozen_layers=0 if way == "frozen" else -1, cache=cache, dropout=dropout,
        lora_dropout=dropout, **TOP[way], **changes)
    data = encoder.dataset([talk(texts)], LABELS)
    optimizer = torch.optim.AdamW(
        [dict(params=g["params"]) for g in encoder.parameter_groups()], lr=1e-2)
    encoder.train()
    if cache == "none": quiet_below(encoder.base, frozen_depth(encoder.base))
    torch.manual_seed(3)
    for _ in range(steps):
        batch = data.batch(data.learnable)
        encoder.loss(encoder(batch), batch).total.backward()
        optimizer.step(), optimizer.zero_grad()
    state = {n: p.detach() for n, p in encoder.named_parameters() if p.requires_grad}
    return state, encoder.embed(data)


ALIKE = ["zqxkz", "kkqzx", "xzzqk", "qkxzz"]   # of one length: both are padded alike


@pytest.mark.parametrize("way", TOP)
@pytest.mark.parametrize("name", CACHED)
def test_training_on_kept_states_is_training(hub, tmp_path, monkeypatch, name, way):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path))
    assert len({*text_encoder(hub, name).dataset([talk(ALIKE)], LABELS).lengths.tolist()}) == 1
    plain, embedded = trained(hub, name, ALIKE, "none", way)
    same, alike = trained(hub, name, ALIKE, "float32", way)
    for n in plain: assert torch.equal(plain[n], same[n]), n
    assert np.array_equal(embedded, alike)
    half, near = trained(hub, name, ALIKE, "float16", way)
    assert not np.array_equal(embedded, near)
    assert np.abs(embedded - near).max() < 0.02*np.abs(embedded).max()


@pytest.mark.parametrize("name", CACHED)
def test_kept_states_of_ragged_texts_train_alike(hub, tmp_path, monkeypatch, name):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path))
    plain, embedded = trained(hub, name, TEXTS, "none", "full", context=2)
    same, alike = trained(hub, name, TEXTS, "float32", "full", context=2)
    np.testing.assert_allclose(embedded, alike, atol=2e-3*np.abs(embedded).max())


def test_kept_states_are_shared_and_told_apart(hub, tmp_path, monkeypatch):
    "Another talk with the same words computes nothing; another depth or context does."
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path))
    filled = []
    fill = FrozenStates.fill
    def counted(self, keys, *args, **options):
        filled.append(len({k for k in keys if k not in self}))
        fill(self, keys, *args, **options)
    monkeypatch.setattr(FrozenStates, "fill", counted)
    said = lambda texts, name="talk", **changes: text_encoder(
        hub, "bert", cache="float16", **dict(frozen_layers=1) | changes
    ).dataset([talk(texts, name)], LABELS)
    said(["we won", "no", "no"]), said(["no", "we won"], "again"), said(["no", "idea"])
    assert filled == [2, 0, 1]
    said(["no", "we won"], context=1)
    assert filled[-1] == 1, "the first has nothing before it"
    said(["no", "we won"], adaptation="frozen", frozen_layers=0)
    assert filled[-1] == 2


def test_kept_states_that_are_damaged_or_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path))
    make = lambda **changes: text_encoder(hub, "bert", cache="float16", frozen_layers=1, **changes)
    before = make().embed(make().dataset([talk(TEXTS)], LABELS))
    [index] = tmp_path.rglob("*.index")
    states = index.with_suffix(".states")
    index.unlink()    # as a fill leaves it that is stopped between both
    again = make().embed(make().dataset([talk(TEXTS)], LABELS))
    assert np.array_equal(before, again) and not states.exists()
    [index] = tmp_path.rglob("*.index")
    index.with_suffix(".states").write_bytes(b"short")
    with pytest.raises(DataError, match="is damaged.*Delete"): make().dataset([talk(TEXTS)], LABELS)


@pytest.mark.parametrize(
    "name, changes, problem",
    [
        ("bert", dict(cache="float16"), "the lowest layer is tuned.*frozen_layers=-4"),
        ("bert", dict(cache="float8"), "none, float16, float32"),
        ("bert", dict(cache="float16", frozen_layers=2), "frozen_layers is 2, and .* has 2 layers"),
        ("t5", dict(cache="float16", frozen_layers=1), "hand on more than states.*cache=none"),
        ("bert", dict(cache="float32", frozen_layers=1, cache_gigabytes=1e-9),
         "--set cache=float16, or --set cache_gigabytes=1"),
    ],
)
def test_what_cannot_be_kept(hub, tmp_path, monkeypatch, name, changes, problem):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=problem):
        text_encoder(hub, name, **changes).dataset([talk(TEXTS)], LABELS)


# With the turns around it

DECODERS, BOTH_WAYS = ("llama", "gpt2", "qwen2", "gemma"), ("bert", "roberta", "mpnet", "t5")
READINGS = ("windows", "conversation")
TURNS = ["we won", "no idea what", "have", "", "we have won no", "idea", "oh no", "won"]


def embedded(encoder, *conversations):
    return encoder.embed(encoder.dataset(list(conversations), LABELS))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("speakers", [False, True])
def test_for_a_decoder_one_pass_says_what_windows_say(hub, name, speakers):
    windows, one = (
        text_encoder(hub, name, context=99, reading=reading, speakers=speakers)
        for reading in READINGS)
    there = [i for i, t in enumerate(TURNS) if t]
    talked = talk([TURNS[i] for i in there])
    np.testing.assert_allclose(
        embedded(windows, talked)[1:], embedded(one, talked)[1:], atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", TEXT)
def test_the_past_does_not_know_the_future(hub, name, reading):
    encoder = text_encoder(hub, name, context=2, reading=reading, max_tokens=120)
    first = embedded(encoder, talk(TURNS))
    for j in range(1, len(TURNS)):
        other = embedded(encoder, talk([*TURNS[:j], "what else", *TURNS[j + 1:]]))
        np.testing.assert_allclose(first[:j], other[:j], atol=1e-5)
        assert np.abs(first[j] - other[j]).max() > 1e-3
        if j + 1 < len(TURNS) and TURNS[j + 1]:
            assert np.abs(first[j + 1] - other[j + 1]).max() > 1e-5, "the turn before is read"


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_with_turns_after_it_the_future_is_read(hub, name, reading):
    encoder = text_encoder(hub, name, context_after=1, reading=reading)
    first, other = (embedded(encoder, talk([*TURNS[:6], t])) for t in ("oh no", "we won"))
    assert np.abs(first[5] - other[5]).max() > 1e-5
    if reading == "windows": np.testing.assert_allclose(first[:5], other[:5], atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_what_lies_before_the_window_is_not_read(hub, name, reading):
    "Nor by way of the signs at the beginning, which every turn sees: they see no turn."
    encoder = text_encoder(hub, name, context_after=1, reading=reading, max_tokens=120)
    # of equal length, so that the others keep their places
    first, other = (embedded(encoder, talk([t, *TURNS[1:]])) for t in ("oh no", "no oh"))
    assert np.abs(first[0] - other[0]).max() > 1e-5
    np.testing.assert_allclose(first[1:], other[1:], atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["bert", "mpnet", "llama", "gpt2"])
def test_a_conversation_is_read_as_if_it_were_alone(hub, name, reading):
    encoder = text_encoder(hub, name, context=2, reading=reading, max_tokens=40, speakers=True)
    talks = [talk(TURNS, "a"), talk(["oh"], "b"), talk(TURNS[2:] * 3, "c"), talk(["", " "], "d")]
    together = np.split(embedded(encoder, *talks), np.cumsum([len(t) for t in talks])[:-1])
    for t, rows in zip(talks, together):
        np.testing.assert_allclose(embedded(encoder, t), rows, atol=1e-5)
        renamed = replace(t, utterances=[
            replace(u, speaker={"A": "Zoe", "B": "Al"}[u.speaker]) for u in t.utterances])
        np.testing.assert_array_equal(embedded(encoder, renamed), embedded(encoder, t))
    one = replace(talks[0], utterances=[replace(u, speaker="A") for u in talks[0].utterances])
    assert np.abs(embedded(encoder, one) - together[0]).max() > 1e-3, "who speaks is read"


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama", "gpt2"])
def test_one_pass_trains_what_is_opened_and_on_kept_states(hub, tmp_path, monkeypatch, name):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path))
    options = dict(context=2, reading="conversation", max_tokens=60)
    encoder = text_encoder(hub, name, **options)
    data = encoder.dataset([talk(TURNS)], LABELS)
    moved = moved_by_two_steps(encoder, data)
    assert moved <= opened(encoder) and any("lora_B" in n for n in moved)
    batch = data.batch(data.learnable)
    assert sorted(batch.utterance_ids) == [f"talk{i}" for i in range(len(TURNS))]
    assert batch.labels[batch.utterance_ids.index("talk3")] == -1, "nothing was said"
    # one passage a batch in both: padded alike
    plain, embedded_plain = trained(hub, name, TURNS[:3], "none", "full", **options)
    same, embedded_same = trained(hub, name, TURNS[:3], "float32", "full", **options)
    for n in plain: assert torch.equal(plain[n], same[n]), n
    assert np.array_equal(embedded_plain, embedded_same)


turn_lists = st.lists(st.lists(st.integers(3, 9), max_size=9), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(turn_lists, st.integers(0, 4), st.integers(0, 2), st.integers(6, 50))
def test_every_turn_is_the_target_of_one_passage(turns, before, after, limit):
    signs = Signs([0], [1], [2])
    made = passages(turns, before, after, signs, limit)
    assert [j for p in made for j in p.spans] == [*range(len(turns))]
    for p in made:
        assert len(p.ids) == len(p.turn) <= limit
        for j, (start, end) in p.spans.items():
            assert p.ids[start:end] == (turns[j][:limit - 3] or [1])
        there = sorted({*p.turn} - {-1})
        assert there == [*range(there[0], there[-1] + 1)]
        around = lambda j: {*range(max(0, j - before), min(len(turns), j + after + 1))}
        assert {*there} <= set.union(*map(around, p.spans))
        # only a first target may lose context for want of room
        for j in [*p.spans][1:]: assert around(j) <= {*there}
        if before == after == 0: assert {*there} == {*p.spans}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-2, 4), min_size=1, max_size=8).map(sorted), st.integers(0, 3),
    st.integers(0, 2), st.booleans())
def test_the_mask_is_what_it_says(turn, before, after, causal):
    seen = block_mask(torch.tensor([turn]), before, after, causal)[0]
    for i, q in enumerate(turn):
        for j, k in enumerate(turn):
            reached = k == -1 and q >= -1 or q >= 0 <= k and q - before <= k <= q + after
            assert bool(seen[i, j]) == (i == j or reached and not (causal and j > i))


@settings(max_examples=60, deadline=None)
@given(turn_lists, st.integers(0, 4), st.integers(0, 2), st.integers(6, 50))
def test_a_window_keeps_its_own_and_drops_the_farthest(turns, before, after, limit):
    signs = Signs([0], [1], [2])
    for i, own in enumerate(turns):
        ids, start, end = window(turns, i, before, after, signs, limit)
        assert len(ids) <= limit and ids[0] == 0 and ids[-1] == 2
        mine = ids[start or 1:end if end < len(ids) else -1]
        assert mine == own[:limit - 2]
        past = [t for turn in turns[max(0, i - before):i] if turn for t in (*turn, 1)]
        future = [t for turn in turns[i + 1:i + 1 + after] if turn for t in (1, *turn)]
        left, right = ids[1:start or 1], ids[end:-1]
        assert past[len(past) - len(left):] == left and future[:len(right)] == right
        assert len(ids) == limit or (left, right) == (past, future)


# Speech

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
WAVES = SMALL | dict(
    conv_dim=[8] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, layerdrop=0.0,
    vocab_size=32, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    feat_proj_dropout=0.0)
LARGE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
LISTEN = dict(
    d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=20)
AUDIO_SIGNS = [
    "<pad>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "What", "is", "the", "emotion", "of",
    "person?:"]
SPEECH = {
    "wav2vec2-base": Wav2Vec2Config(**WAVES),
    "wav2vec2-large": Wav2Vec2Config(**WAVES, **LARGE),
    "hubert-base": HubertConfig(**WAVES),
    "hubert-large": HubertConfig(**WAVES, **LARGE),
    "wavlm-base": WavLMConfig(**WAVES),
    "wavlm-large": WavLMConfig(**WAVES, **LARGE),
    "whisper": WhisperConfig(
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **LISTEN),
    "qwen2-audio": Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", **LISTEN),
        audio_token_index=1,
        text_config=dict(
            model_type="qwen2", vocab_size=32, num_key_value_heads=1, initializer_range=0.3, **SMALL
        ))}


@pytest.fixture(scope="module")
def speech_hub(tmp_path_factory):
    "A folder with a tiny random model of every family, and what makes its inputs."
    folder = tmp_path_factory.mktemp("speech_hub")
    for name, config in SPEECH.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder/name)
        mel = name in ("whisper", "qwen2-audio")
        (
            WhisperFeatureExtractor(20)
            if mel
            else Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask="large" in name)
        ).save_pretrained(folder / name)
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(AUDIO_SIGNS)}, unk_token="<pad>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", additional_special_tokens=AUDIO_SIGNS[1:4]
    ).save_pretrained(folder / "qwen2-audio")
    return folder


def speech_encoder(hub, name, **changes):
    torch.manual_seed(1)
    return EmotionSpeechEncoder(SpeechEncoderConfig(
        **dict(
            encoder=str(hub / name), classes=3, labels=LABELS, width=12, dropout=0.0,
            lora_dropout=0.0, seconds=2.0, whole_window=False, crop="centre")
        | changes
    )).eval()


def noise(path, seconds, rate=16000, channels=1, seed=0):
    "A file of noise whose loudness rises and falls, as the voice's does."
    n = round(seconds*rate)
    wave = (
        np.random.default_rng(seed).normal(size=(n, channels))
        * 0.1
        * (1 + np.sin(np.arange(n) / rate * 20))[:, None])
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


def voices(*paths):
    return [
        Conversation(
            "voices", [Utterance(f"v{i}", "A", "", LABELS[i % 3], p) for i, p in enumerate(paths)])]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [noise(folder/f"{i}.wav", s, seed=i) for i, s in enumerate((.1, .35, 1.2, 1.9))]


@pytest.mark.parametrize("name", SPEECH)
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(pooling="attentive", whole_window=True), dict(pooling="last")],
    ids=["mean", "attentive", "last"],
)
def test_speech_embedding_is_the_same_in_any_company(speech_hub, clips, name, changes):
    encoder = speech_encoder(speech_hub, name, **changes)
    data = encoder.dataset(voices(*clips, None), LABELS)
    e = encoder.embed(data)
    assert np.isfinite(e).all() and np.abs(np.diff(e, axis=0)).max(1).min() > 1e-4
    for order in ([0, 1, 2, 3, 4], [3, 0], [0], [4]):
        with torch.no_grad(): got = encoder(data.batch(torch.tensor(order))).embedding
        np.testing.assert_allclose(got.numpy(), e[order], atol=2e-5)


@pytest.mark.parametrize("name", SPEECH)
@pytest.mark.parametrize("way", ["lora", "full", "frozen"])
def test_speech_only_what_is_opened_moves_and_what_is_saved_is_enough(
    speech_hub, clips, tmp_path, name, way
):
    encoder = speech_encoder(speech_hub, name, adaptation=way)
    data = encoder.dataset(voices(*clips), LABELS)
    moved = moved_by_two_steps(encoder, data)
    assert moved <= opened(encoder) and any(n.startswith("embed_layer") for n in moved)
    assert not any("feature_extractor" in n or "embed_positions" in n for n in moved)
    # no LoRA that nothing passes through
    assert {n for n in opened(encoder) if "lora_B" in n} == {n for n in moved if "lora_B" in n}
    assert any("lora_B" in n for n in moved) == (way == "lora") and any(
        n.startswith("base.") for n in moved
    ) == (way != "frozen")
    if name == "qwen2-audio" and way == "lora":
        assert not any("audio_tower" in n or "projector" in n for n in opened(encoder))
    encoder.eval().save_pretrained(tmp_path)
    assert np.array_equal(load_encoder(tmp_path).embed(data), encoder.embed(data))


@pytest.mark.parametrize("name", ["wav2vec2-base", "wavlm-large"])
@quick
@given(st.lists(st.integers(1600, 20000), min_size=2, max_size=4))
def test_speech_of_any_lengths_is_heard_as_the_plain_model_hears_it_alone(
    speech_hub, name, lengths
):
    encoder, plain = (
        speech_encoder(speech_hub, name), AutoModel.from_pretrained(speech_hub / name).eval())
    waves = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in lengths]
    with torch.no_grad():
        hidden, mask = encoder.ear.hidden(encoder.base, encoder.ear.inputs(waves))
        for h, m, w in zip(hidden, mask, waves):
            alone = plain(
                encoder.ear.extractor(w, sampling_rate=16000, return_tensors="pt").input_values
            ).last_hidden_state[0]
            np.testing.assert_allclose(h[m].numpy(), alone.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["wav2vec2-base", "hubert-large", "wavlm-base"])
def test_what_is_masked_in_training_follows_pytorchs_seed_and_a_blip_does_not_stop_it(
    speech_hub, clips, name
):
    encoder, told = speech_encoder(speech_hub, name, adaptation="frozen"), []
    numpys = np.random.get_state()[1].copy()
    for which in ([0], [0, 3]):
        batch = encoder.dataset(voices(*clips), LABELS).batch(torch.tensor(which))
        for mode, seed in ((True, 3), (True, 3), (True, 4), (False, 5)):
            torch.manual_seed(seed)
            told.append(encoder.train(mode)(batch).embedding.detach()[-1])
    assert torch.equal(told[0], told[1]) and torch.equal(told[4], told[5])
    assert not torch.equal(told[4], told[6]) and not torch.equal(told[4], told[7])
    assert (np.random.get_state()[1] == numpys).all()


@pytest.mark.parametrize("name", ["hubert-base", "wav2vec2-large", "whisper", "qwen2-audio"])
def test_silence_and_files_of_any_kind_are_heard(speech_hub, tmp_path, name):
    soundfile.write(tmp_path/"silence.wav", np.zeros(16000), 16000)
    files = [
        tmp_path / "silence.wav", noise(tmp_path / "stereo.wav", 1, channels=2),
        noise(tmp_path / "phone.wav", 1, 8000), noise(tmp_path / "studio.flac", 1, 48000),
        noise(tmp_path / "film.flac", 600, 8000)]
    encoder = speech_encoder(speech_hub, name)
    data = encoder.dataset(voices(*files), LABELS)
    assert data.lengths.tolist() == [16000]*4 + [32000] and data.cut == ["v4"]
    assert np.isfinite(encoder.embed(data)).all()
    assert [len(data.wave(i)) for i in range(5)] == data.lengths.tolist()


def test_one_sound_is_one_embedding_whatever_its_file(speech_hub, tmp_path):
    wave = np.sin(2*np.pi*300*np.arange(48000)/48000)*.3
    for rate in (8000, 16000, 48000):
        soundfile.write(tmp_path/f"{rate}.wav", np.repeat(wave[::48000//rate, None], 2, 1), rate)
    encoder = speech_encoder(speech_hub, "wav2vec2-large")
    e = encoder.embed(
        encoder.dataset(voices(*(tmp_path / f"{r}.wav" for r in (8000, 16000, 48000))), LABELS))
    assert np.abs(e - e[1]).max() < .1*np.abs(e).max()


@pytest.mark.parametrize(
    "name, problem",
    [
        ("nowhere", "does not exist"),
        ("click", "30 ms long"),
        ("empty", "is empty"),
        ("words", "cannot be read"),
        ("half", "cut short"),
    ],
)
def test_a_broken_clip_is_told_by_name_or_counts_as_absent(speech_hub, tmp_path, name, problem):
    whole = noise(tmp_path/"whole.wav", 1)
    (
        noise(tmp_path / "click.wav", 0.03), (tmp_path / "empty.wav").touch(),
        (tmp_path / "words.wav").write_text("no sound"))
    (tmp_path/"half.wav").write_bytes(whole.read_bytes()[:20000])
    broken = voices(whole, tmp_path/f"{name}.wav")
    encoder = speech_encoder(speech_hub, "hubert-base")
    with pytest.raises(DataError, match=f"utterance 'v1'.*{problem}"):
        encoder.embed(encoder.dataset(broken, LABELS))
    encoder = speech_encoder(speech_hub, "hubert-base", missing="absent")
    data = encoder.dataset(broken, LABELS)
    assert data.lengths.tolist() == [16000, 0] and data.learnable.tolist() == [0]
    np.testing.assert_allclose(
        encoder.embed(data)[1], encoder.embed(encoder.dataset(voices(None), LABELS))[0], atol=1e-6)


@quick
@given(
    st.floats(0.1, 3),
    st.floats(0.1, 2),
    st.sampled_from(["random", "start", "centre"]),
    st.integers(0, 9),
)
def test_a_crop_lies_inside_its_clip(speech_hub, tmp_path_factory, length, seconds, crop, seed):
    path, n = tmp_path_factory.mktemp("ramp")/"ramp.wav", round(length*16000) + 1
    ramp = np.arange(n)/2**17
    soundfile.write(path, ramp, 16000, subtype="FLOAT")
    torch.manual_seed(seed)
    data = speech_encoder(speech_hub, "hubert-base", seconds=seconds, crop=crop).dataset(
        voices(path), LABELS)
    wave, begin = data.wave(0), round(float(data.wave(0)[0])*2**17) if crop != "random" else None
    heard = min(n, round(seconds*16000))
    assert len(wave) == heard == data.lengths[0] and (data.cut == ["v0"]) == (n > heard)
    assert (
        np.array_equal(np.diff(wave), np.full(heard - 1, 2**-17, np.float32))
        and 0 <= wave[0]
        and wave[-1] <= ramp[-1])
    if begin is not None: assert begin == (0 if crop == "start" else (n - heard)//2)


def test_a_random_crop_is_drawn_in_training_and_never_in_scoring(speech_hub, tmp_path):
    encoder = speech_encoder(speech_hub, "hubert-base", crop="random", seconds=.5)
    data = encoder.dataset(voices(noise(tmp_path/"long.wav", 3)), LABELS)
    assert len({data.wave(0).tobytes() for _ in range(8)}) > 4
    e = encoder.embed(data)
    centre = speech_encoder(speech_hub, "hubert-base", crop="centre", seconds=.5)
    assert np.array_equal(e, encoder.embed(data)) and np.array_equal(
        e, centre.embed(centre.dataset(voices(tmp_path / "long.wav"), LABELS)))
    assert data.crop == "random"


@quick
@given(st.integers(1600, 32000))
def test_qwen2_audio_is_asked_as_its_processor_asks(speech_hub, samples):
    encoder = speech_encoder(speech_hub, "qwen2-audio", whole_window=True)
    processor = Qwen2AudioProcessor(
        encoder.ear.extractor, encoder.ear.pretrained.fetch("AutoTokenizer"))
    wave = np.random.default_rng(samples).normal(size=samples).astype(np.float32)
    theirs = processor(
        text="<|audio_bos|><|AUDIO|><|audio_eos|>What is the emotion of the person?:", audio=[wave],
        sampling_rate=16000, return_tensors="pt")
    ours = encoder.ear.inputs([wave])
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(
        ours["feature_attention_mask"], theirs["feature_attention_mask"]
    ) and torch.allclose(ours["input_features"], theirs["input_features"])


def test_speech_in_bfloat16(speech_hub, clips):
    for name in SPEECH:
        encoder, exact = (
            speech_encoder(speech_hub, name, dtype=p) for p in ("bfloat16", "float32"))
        data = encoder.dataset(voices(*clips), LABELS)
        e = encoder.embed(data)
        assert (
            np.isfinite(e).all() and np.abs(e - exact.embed(data)).max() < 0.25 * np.abs(e).max()
        ), name


def test_salmonn_is_known_by_all_its_parts(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(
        "erc_moe.encoders.speech.Pretrained.weights",
        property(lambda self: f"weights of {self.name}"))
    for name in ("beats.pt", "salmonn.pth"): (tmp_path/name).write_bytes(name.encode())
    parts, known = (
        dict(beats=str(tmp_path / "beats.pt"), checkpoint=str(tmp_path / "salmonn.pth")), set())
    known.add(SalmonnParts("salmonn-7b", parts).weights)
    known.add(SalmonnParts("salmonn-7b", parts | dict(llm="another")).weights)
    known.add(SalmonnParts("salmonn-7b", parts | dict(checkpoint=None)).weights)
    (tmp_path/"beats.pt").write_bytes(b"others")
    known.add(SalmonnParts("salmonn-7b", parts).weights)
    assert len(known) == 4
    given = {}

    def random_salmonn(sizes, **rest):
        given.update(rest)
        torch.manual_seed(0)
        return Salmonn(replace(SalmonnConfig.tiny(), rank=sizes.rank))
    monkeypatch.setattr(Salmonn, "from_parts", random_salmonn)
    for way in ("lora", "frozen"):
        encoder = EmotionSpeechEncoder(SpeechEncoderConfig.paper(
            "salmonn-7b", 3, width=12, rank=3, parts=parts, adaptation=way
        )).eval()
        assert given == parts | dict(dtype=torch.float32) and any(
            n.startswith("base.") for n in opened(encoder)
        ) == (way == "lora")
        assert all(p.shape[0] == 3 for n, p in encoder.named_parameters() if "lora_A" in n)
        data = encoder.dataset(voices(*clips, None), LABELS)
        with torch.no_grad():
            np.testing.assert_allclose(
                encoder(data.batch(torch.tensor([0]))).embedding[0].numpy(), encoder.embed(data)[0],
                atol=2e-5)
        encoder.save_pretrained(tmp_path/way)
        assert np.array_equal(load_encoder(tmp_path/way).embed(data), encoder.embed(data))
    (tmp_path/"salmonn.pth").write_bytes(b"others")
    with pytest.raises(DataError, match="was tuned on"): load_encoder(tmp_path/"lora")


@pytest.mark.parametrize(
    "name, changes, problem",
    [
        ("hubert-base", dict(crop="end"), "random, start, centre"),
        ("hubert-base", dict(missing="skip"), "error, absent"),
        ("hubert-base", dict(seconds=0.01), "0.1 or more"),
        ("whisper", dict(seconds=31.0), "this encoder hears 30"),
        ("wavlm-base", dict(targets=["q_proj"]), "does not pass through LoRA"),
        ("wavlm-base", dict(targets=r".*\.v_proj"), "does not pass through LoRA on v_proj"),
        ("qwen2-audio", dict(layer_decay=0.5), "do not apply to a speech LLM"),
        ("hubert-base", dict(targets=["nothing"]), "Its linear layers are called"),
    ],
)
def test_speech_configuration_that_cannot_be(speech_hub, name, changes, problem):
    with pytest.raises(DataError, match=problem): speech_encoder(speech_hub, name, **changes)


@pytest.mark.parametrize("parts", [None, dict(checkpoint="a.pth"), dict(beats="a.pt", bits=4)])
def test_salmonn_wants_its_parts(parts):
    with pytest.raises(DataError, match="parts=dict"):
        EmotionSpeechEncoder(SpeechEncoderConfig.paper("salmonn-7b", 3, parts=parts))


def test_frozen_layers_of_speech_stay_with_all_below_them(speech_hub):
    for name in ("wav2vec2-base", "hubert-large", "wavlm-base", "whisper"):
        up = opened(speech_encoder(speech_hub, name, adaptation="full", frozen_layers=1))
        assert any("layers.1." in n for n in up) and not any(
            part in n
            for n in up
            for part in ("layers.0.", "feature_", "conv1", "conv2", "embed_positions")
        ), name


@pytest.mark.skipif(
    "ERC_MOE_DATA" not in os.environ, reason="ERC_MOE_DATA names no folder of corpora"
)
def test_what_five_seconds_lose_of_the_real_corpora():
    data = Path(os.environ["ERC_MOE_DATA"])
    meld = pd.concat(
        [pd.read_csv(data / "meld" / f"{s}_prosody8.csv") for s in ("train", "dev", "test")]
    )["duration"].to_numpy()
    times = pd.read_csv(data/"iemocap"/"utterances.csv")
    for seconds, (median, over, lost) in (
        (meld, (2.5, 0.17, 0.14)), ((times.end - times.start).to_numpy(), (3.5, 0.31, 0.21))):
        assert abs(np.median(seconds) - median) < .05 and abs((seconds > 5).mean() - over) < .005
        assert abs(1 - np.minimum(seconds, 5).sum()/seconds.sum() - lost) < .005


def test_a_stopped_tuning_of_speech_carries_on_to_the_same_bits(speech_hub, tmp_path):
    talks = [
        replace(c, id=n, utterances=tuple(replace(u, id=n + u.id) for u in c.utterances))
        for n in ("train", "validation", "test")
        for c in voices(*(noise(tmp_path / f"{n}{i}.wav", 0.8 + i / 4, seed=i) for i in range(6)))]
    corpus = Corpus("voices", LABELS, {c.id: [c] for c in talks})
    config = TrainingConfig(epochs=3, batch_size=3, lr=1e-3, ema=.5)
    tuned = lambda config, out: fit(
        speech_encoder(
            speech_hub, "wav2vec2-base", adaptation="full", crop="random", seconds=1.0, dropout=0.5
        ),
        corpus,
        config,
        out=out,
        device="cpu",
        progress=False,
        checkpoint_seconds=0)
    whole = tuned(config, None)
    tuned(replace(config, epochs=2), tmp_path)
    again = tuned(config, tmp_path)
    assert [e["losses"] for e in whole.log] == [e["losses"] for e in again.log] and whole.best[
        "validation"
    ].epoch == again.best["validation"].epoch
    for n, x in whole.best["validation"].state.items():
        assert torch.equal(x, again.best["validation"].state[n]), n
