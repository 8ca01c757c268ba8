"""A prompted language model: its likelihoods against transformers' own loss, and a whole tuning
of a tiny random one."""
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast,
    Qwen2Config)

from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.corpora import Corpus
from erc_moe.systems.instruct_erc import (
    InstructErc, InstructErcConfig, PromptData, dialogue_prompt)
from erc_moe.training import score
from erc_moe.training.tuning import embed, tune

LABELS = ["joy", "anger", "neutral"]
SIZE = dict(
    vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, initializer_range=0.3)
FAMILIES = {
    "llama": LlamaConfig(num_key_value_heads=1, **SIZE),
    "qwen2": Qwen2Config(num_key_value_heads=1, **SIZE),
    "gemma": GemmaConfig(num_key_value_heads=1, head_dim=8, **SIZE),
    "gpt2": GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A folder with a tiny random language model of every family."
    folder, signs = tmp_path_factory.mktemp("hub"), ["<pad>", "<s>", "</s>"]
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    t.train_from_iterator([dialogue_prompt(talk("A"), 1, LABELS)], trainers.BpeTrainer(
        vocab_size=320, special_tokens=signs, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder/name)
        PreTrainedTokenizerFast(
            tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder/name)
    return folder


def talk(name, n=4, last="Oh."):
    texts = ["We have won!", "No idea what you are talking about.", "", last][:n]
    return Conversation(name, [
        Utterance(f"{name}{i}", "AB"[i % 2], t, LABELS[i % 3]) for i, t in enumerate(texts)])


def tiny(hub, name, **changes):
    torch.manual_seed(1)
    config = InstructErcConfig.cpu(
        str(hub/name), 3, labels=LABELS, **dict(lora_dropout=0.) | changes)
    return InstructErc(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_likelihoods_are_what_transformers_own_loss_says(hub, name):
    model = tiny(hub, name)
    plain = AutoModelForCausalLM.from_pretrained(hub/name).eval()
    data = model.dataset([talk("A"), talk("B", 2)], LABELS)
    told = model(data.batch(torch.arange(len(data)))).logits
    for row, prompt in zip(told, data.tokens):
        for mine, answer, real in zip(row, data.answers, data.answered):
            answer = answer[real > 0]
            ids = torch.cat([torch.tensor(prompt), answer])[None]
            asked = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
            mean = plain(input_ids=ids, labels=asked).loss
            assert mine.item() == pytest.approx(-mean.item()*len(answer), abs=1e-3)


def test_one_utterance_alone_is_as_likely_as_in_company(hub):
    model = tiny(hub, "llama")
    data = model.dataset([talk("A"), talk("B", 2)], LABELS)
    with torch.no_grad():
        together = model(data.batch(torch.arange(len(data)))).logits
        alone = torch.cat([model(data.batch(torch.tensor([i]))).logits for i in range(len(data))])
        assert (together - alone).abs().max() < 1e-4
        told = score(model, data)
    assert (told.logits - together).abs().max() < 1e-4


def test_nothing_later_is_read(hub):
    model = tiny(hub, "llama")
    a, b = (model.dataset([talk("A", last=last)], LABELS).tokens for last in ("Oh.", "Hurray!"))
    assert a[:3] == b[:3] and a[3] != b[3]


def test_a_window_and_a_budget_drop_the_oldest_turns(hub):
    tokenizer, long = tiny(hub, "llama").tokenizer, talk("A")
    texts = lambda **limits: [
        tokenizer.decode(ids) for ids in PromptData([long], LABELS, tokenizer, **limits).tokens]
    assert "We have won!" in texts()[3] and "We have won!" not in texts(context=2)[3]
    assert texts(context=0)[3].count("Speaker_") == 2
    most = max(map(len, PromptData([long], LABELS, tokenizer).tokens))
    cut = texts(max_tokens=most - 1)[3]
    assert "We have won!" not in cut and cut.startswith("<s>You are") and cut.endswith("neutral>:")


def test_a_tuning_trains_scores_and_is_found_again(hub, tmp_path):
    talks = [talk(c) for c in "ABCDE"]
    corpus = Corpus(
        "own", LABELS, dict(train=talks[:3], validation=talks[3:4], test=talks[4:]))
    run = tune(
        "prompt", str(hub/"llama"), corpus, seeds=1, out=tmp_path/"run", device="cpu",
        progress=False, changes=dict(epochs=6, batch_size=4, lr=3e-2, context=1, rank=16))
    losses = [e["losses"]["answer"] for e in run.log()]
    assert losses[-1] < 0.7*losses[0]
    assert 0 <= run.summary["test"]["weighted_f1"]["mean"] <= 1
    model = run.encoder()
    data = model.dataset(talks, LABELS)
    assert model.config.targets == ["q_proj", "v_proj"] and model.config.context == 1
    batch = data.batch(torch.arange(4))
    with torch.no_grad(): assert torch.equal(model(batch).logits, run.encoder()(batch).logits)
    with pytest.raises(DataError, match="gives no embeddings"):
        embed(run, corpus, tmp_path/"store")


def test_a_model_that_reads_ahead_is_refused(hub, monkeypatch):
    "What stands left of a token and counts as padding changes nothing, or the model is not taken."
    honest = InstructErc.log_p
    def shifted(self, ids, mask, kept, **options):    # positions that count the padding
        self.takes = self.takes - {"position_ids"}
        return honest(self, ids, mask, kept, **options)
    monkeypatch.setattr(InstructErc, "log_p", shifted)
    with pytest.raises(DataError, match="depends on how it is read"): tiny(hub, "gpt2")


def test_nothing_to_train_is_told(hub):
    with pytest.raises(DataError, match="adaptation=lora"):
        tiny(hub, "llama", adaptation="frozen").parameter_groups()
    with pytest.raises(DataError, match="has no head"):
        replace(tiny(hub, "llama").config, gamma=1.)
