"""Encoders of other people: read whole and alone, or refused in one line. Tiny random models, no
network."""
import numpy as np
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.corpora import Corpus
from erc_moe.encoders.text import EmotionTextEncoder, TextEncoderConfig
from erc_moe.encoders.utterance import lora_targets
from erc_moe.features import TextEncoder
from erc_moe.features.hub import one_line
from erc_moe.features.pipeline import FeaturePipeline
from erc_moe.features.text import Pretrained

WORDS = ["[PAD]", "[UNK]", "yes", "no", "we", "have", "won", "lost", "it", "again"]
SIZE = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, initializer_range=.3)
BOTH = dict(vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
            decoder_ffn_dim=48, pad_token_id=0)
ONE = {f"{k}_groups": 1 for k in ("q", "k", "v", "post_attention", "intermediate", "output")}
FEW = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2)
FAMILIES = {   # architectures that peft has no list for, and what LoRA should go to
    "distilbert": (T.DistilBertConfig(vocab_size=40, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
                   ["q_lin", "v_lin"]),
    "mpnet": (T.MPNetConfig(**SIZE), ["q", "v"]),
    "camembert": (T.CamembertConfig(**SIZE), ["query", "value"]),
    "albert": (T.AlbertConfig(embedding_size=16, **SIZE), ["query", "value"]),
    "longformer": (T.LongformerConfig(attention_window=[4, 4], **SIZE), ["query", "value"]),
    "xlnet": (T.XLNetConfig(vocab_size=40, d_model=32, n_layer=2, n_head=2, d_inner=48),
              ["layer_1", "layer_2"]),
    "modernbert": (T.ModernBertConfig(pad_token_id=0, **SIZE), ["Wqkv"]),
    "flaubert": (T.FlaubertConfig(vocab_size=40, emb_dim=32, n_layers=2, n_heads=2),
                 ["q_lin", "v_lin"]),
    "squeezebert": (T.SqueezeBertConfig(embedding_size=32, **ONE, **SIZE), ["query", "value"]),
    "phi3": (T.Phi3Config(num_key_value_heads=1, pad_token_id=0, **SIZE), ["qkv_proj"]),
    "mixtral": (T.MixtralConfig(num_key_value_heads=1, num_local_experts=2, **SIZE),
                ["q_proj", "v_proj"]),
    "mamba": (T.MambaConfig(state_size=4, **FEW), ["x_proj", "in_proj"]),
    "blenderbot": (T.BlenderbotConfig(**BOTH), ["q_proj", "v_proj"]),
    "opt": (T.OPTConfig(ffn_dim=48, num_attention_heads=2, word_embed_proj_dim=16, **FEW),
            ["q_proj", "v_proj"])}
TEXTS = ["yes", "we have won it again", "no", "it", "we lost", "no no no no"]


def save(folder, config, words=WORDS, **tokenizer):
    "A tiny random model of a configuration with a tokenizer of whole words."
    torch.manual_seed(0)
    T.AutoModel.from_config(config).save_pretrained(folder)
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    signs = dict(pad_token="[PAD]", unk_token="[UNK]")
    T.PreTrainedTokenizerFast(tokenizer_object=t, **signs, **tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_frozen_and_tuned_with_lora(tmp_path, name):
    config, targets = FAMILIES[name]
    folder = str(save(tmp_path/name, config))
    encoder = TextEncoder(folder, normalize=False)
    rows = encoder.embed(TEXTS)
    assert rows.shape == (6, encoder.extractor.width)
    for text, row in zip(TEXTS, rows): np.testing.assert_allclose(encoder.embed([text])[0], row,
                                                                  atol=2e-4*np.abs(rows).max())
    tuned = EmotionTextEncoder(TextEncoderConfig(encoder=folder, classes=2, width=8, dropout=0.))
    assert tuned.config.targets == targets
    said = [Utterance(f"u{i}", "A", t, "ab"[i % 2]) for i, t in enumerate(TEXTS)]
    data = tuned.dataset([Conversation("c", said)], ["a", "b"])
    optimizer = torch.optim.SGD([p for p in tuned.train().parameters() if p.requires_grad], lr=.1)
    for _ in range(2):
        batch = data.batch(data.learnable)
        tuned.loss(tuned(batch), batch).total.backward()
        optimizer.step()
    idle = [n for n, p in tuned.named_parameters()
            if "lora_" in n and (p.grad is None or not p.grad.any())]
    assert not idle, "LoRA stands where the model does not pass"


@pytest.mark.parametrize("name", ["fnet", "convbert"])
def test_padding_that_an_encoder_reads_is_not_given_to_it(tmp_path, name):
    few = {k: v for k, v in SIZE.items() if k != "num_attention_heads"}
    config = (T.FNetConfig(**few) if name == "fnet"
              else T.ConvBertConfig(embedding_size=32, head_ratio=1, **SIZE))
    folder = str(save(tmp_path/name, config))
    encoder = TextEncoder(folder, normalize=False)
    rows, long = encoder.embed(TEXTS), [4]*5
    for text, row in zip(TEXTS, rows): np.testing.assert_allclose(encoder.embed([text])[0], row,
                                                                  atol=1e-5)
    assert np.abs(encoder._pool([[2], long])[0] - rows[0]).max() > 1e-3*np.abs(rows).max()
    with pytest.raises(DataError, match="depends on the texts beside it"):
        EmotionTextEncoder(TextEncoderConfig(encoder=folder, classes=2, adaptation="frozen"))


def test_an_encoder_whose_numbers_are_chance_is_refused(tmp_path):
    encoder = TextEncoder(str(save(tmp_path, T.BertConfig(**SIZE))))
    encoder.model.train()                                   # dropout is on
    with pytest.raises(DataError, match="or on chance"): encoder.embed(TEXTS)


def prefixed(w): return {f"module.{k}": v for k, v in w.items()}
def without(w): return {k: v for k, v in w.items() if "layer.1.output.dense" not in k}
def resized(w): return w | {"encoder.layer.0.output.dense.weight": torch.zeros(3, 3)}


@pytest.mark.parametrize("harm, told", [(prefixed, "module."), (without, "layer.1.output.dense"),
                                        (resized, "layer.0.output.dense.weight")])
def test_weights_that_do_not_fit_are_not_drawn_at_random(tmp_path, harm, told):
    file = save(tmp_path, T.BertConfig(**SIZE))/"model.safetensors"
    save_file(harm(load_file(file)), file, metadata={"format": "pt"})
    for load in (lambda: TextEncoder(str(tmp_path)).embed(["yes"]),
                 lambda: EmotionTextEncoder(TextEncoderConfig(encoder=str(tmp_path), classes=2))):
        with pytest.raises(DataError, match=f"do not fit its config.json.*{told}"): load()


def test_a_head_for_masked_words_is_no_harm(tmp_path):
    save(tmp_path, T.BertConfig(**SIZE))
    T.BertForMaskedLM(T.BertConfig(**SIZE)).save_pretrained(tmp_path)
    assert TextEncoder(str(tmp_path)).embed(["yes"]).shape == (1, 32)


def cut(folder): (folder/"model.safetensors").write_bytes(b"\xff"*40)
def half(folder):
    file = folder/"model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
def pointer(folder):
    (folder/"model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
def bare(folder): (folder/"config.json").unlink()
def others(folder): save(folder/"more", T.BertConfig(**SIZE), [f"w{i}" for i in range(90)]
                         + WORDS), (folder/"more"/"tokenizer.json").rename(folder/"tokenizer.json")


@pytest.mark.parametrize("harm, told", [
    (cut, "damaged or cut short"), (half, "damaged or cut short"), (pointer, "git -C .* lfs pull"),
    (bare, "has no config.json"), (others, "is another model's")])
def test_a_damaged_folder_has_one_line(tmp_path, harm, told):
    save(tmp_path, T.BertConfig(**SIZE))
    harm(tmp_path)
    with pytest.raises(DataError, match=told) as e: TextEncoder(str(tmp_path)).embed(["yes", "w5"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("config, told", [
    (T.Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=32, conv_dim=(16,)*7), "hears speech"),
    (T.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                 image_size=32), "sees images"),
    (T.CLIPConfig(text_config=dict(SIZE, projection_dim=8),
                  vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32, image_size=32, patch_size=16)),
     "pairs text with images")])
def test_what_is_no_text_encoder_is_refused_by_what_it_is(tmp_path, config, told):
    save(tmp_path, config)
    for load in (lambda: TextEncoder(str(tmp_path)).extractor,
                 lambda: EmotionTextEncoder(TextEncoderConfig(encoder=str(tmp_path), classes=2))):
        with pytest.raises(DataError, match=told): load()


def test_code_of_a_strangers_is_not_run_and_not_asked_about(tmp_path, monkeypatch):
    save(tmp_path, T.BertConfig(**SIZE))
    (tmp_path/"config.json").write_text(
        '{"model_type": "new", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}')
    (tmp_path/"own.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(DataError, match="needs Python code of its author's"):
        TextEncoder(str(tmp_path)).embed(["yes"])
    assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("name", ["./nope", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_folder_that_is_missing_is_told_as_one(name):
    with pytest.raises(DataError, match=f"there is no folder {name}"): Pretrained(name).config


def test_a_hub_that_cannot_be_reached_says_one_line(caplog):
    import logging
    client = logging.getLogger("huggingface_hub.utils._http")
    with one_line():
        for n in range(6):
            client.warning("'[Errno -2]' thrown while requesting HEAD https://x")
            client.warning(f"Retrying in {n}s [Retry {n}/5].")
    client.warning("afterwards")
    told = [r.getMessage() for r in caplog.records]
    assert told == ["The hub is out of reach; trying for half a minute.", "afterwards"]


def test_what_is_not_read_is_told(tmp_path):
    encoder = TextEncoder(str(save(tmp_path, T.BertConfig(**SIZE), model_max_length=4)))
    unread, cut = encoder.notes({"a": "yes no", "b": "oui", "c": "yes yes yes yes yes"})
    assert "1 of 8, half of the text or more: 1 (b)" in unread and "--text hf:" in unread
    assert "more than 4 tokens: 1 (c)" in cut
    assert encoder.notes({"a": "yes no"}) == encoder.notes({}) == []
    assert encoder.embed(["yes yes yes yes yes", "no"]).shape == (2, 32)
    said = {s: [Conversation(s, [Utterance(s, "A", t, "x")])]
            for s, t in dict(train="yes", validation="no", test="oui").items()}
    pipeline = FeaturePipeline({"text": f"hf:{tmp_path}"})
    corpus = Corpus("c", ["x"], said)
    told = pipeline.fit(corpus, False).apply(corpus, cache=False).faults
    assert any("cannot read" in t and "(test)" in t for t in told)


@pytest.mark.parametrize("sources, told", [
    ({"speech": "minilm"}, "source of text.*--text minilm"),
    ({"text": "egemaps"}, "source of speech.*--speech egemaps"),
    ({"text": "prosody8"}, "source of speech"),
    ({"visual": "minilm"}, "source of text"),
    ({"text": "densenet:timm/densenet121"}, "source of visual"),
    ({"speech": "hf:facebook/wav2vec2-base"}, "no source of speech.*--modality speech"),
    ({"speech": "lost.npy"}, "lost.npy is missing"),
    ({"speech": "no/such/store"}, "no/such/store is missing"),
    ({"text": "hf:nowhere/at/all", "speech": "minilm"}, "source of text")])
def test_a_source_fits_its_modality_and_is_there(sources, told):
    talk = Conversation("c", [Utterance("u", "A", "yes", "x")])
    with pytest.raises(DataError, match=told):
        FeaturePipeline(sources).fit(Corpus("c", ["x"], {"train": [talk]}), False)


def test_a_model_without_queries_has_its_inner_layers():
    few = {k: v for k, v in SIZE.items() if k != "num_attention_heads"}
    assert lora_targets(T.AutoModel.from_config(T.FNetConfig(**few))) == ["dense"]
