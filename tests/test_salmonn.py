"What BEATs and SALMONN promise for every batch, and for checkpoints as they are published."
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save
from torch import nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.t5.modeling_t5 import T5Attention

from erc_moe.conversations import DataError
from erc_moe.encoders.beats import (
    FIXED, Beats, BeatsConfig, GatedAttention, fbank, position_buckets, read_weights)
from erc_moe.encoders.salmonn import Salmonn, SalmonnConfig, windows

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = SalmonnConfig.tiny()
seeds = st.integers(0, 2**16)
few = settings(max_examples=12, deadline=None)


def salmonn(seed=0, **changes):
    torch.manual_seed(seed)
    model = Salmonn(replace(CONFIG, **changes)).eval()
    for n, p in model.named_parameters():
        if "lora_B" in n or "grep_a" in n: nn.init.normal_(p, std=.5)
    return model


@pytest.fixture(scope="module")
def model(): return salmonn()


def waves(lengths, seed=0, behind=0.):
    rng = torch.Generator().manual_seed(seed)
    wave = torch.full((len(lengths), max(lengths)), behind)
    for row, n in zip(wave, lengths): row[:n] = .1*torch.randn(max(lengths), generator=rng)[:n]
    return wave, torch.tensor(lengths)


# --- BEATs

@few
@given(st.integers(400, 9000), seeds)
def test_filter_bank_is_kaldis(samples, seed):
    wave = np.random.default_rng(seed).normal(size=samples).astype(np.float32)*.1
    filters = mel_filter_bank(
        257, 128, 20, 8000, 16000, mel_scale="kaldi", triangularize_in_mel_space=True)
    theirs = spectrogram(
        wave * 2.0**15, window_function(400, "povey", periodic=False), 400, 160, fft_length=512,
        power=2.0, center=False, preemphasis=0.97, remove_dc_offset=True, mel_floor=2.0**-23,
        log_mel="log", mel_filters=filters).T
    ours = fbank(torch.from_numpy(wave)[None])[0]
    assert ours.shape == theirs.shape == (1 + (samples - 400)//160, 128)
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


@pytest.mark.parametrize(
    "length, buckets, furthest", [(1600, 320, 800), (70, 32, 60), (40, 8, 11), (1, 16, 20)]
)
def test_buckets_are_t5s(length, buckets, furthest):
    at = torch.arange(length)
    theirs = T5Attention._relative_position_bucket(
        at - at[:, None], num_buckets=buckets, max_distance=furthest)
    assert torch.equal(position_buckets(length, buckets, furthest), theirs)


@few
@given(st.integers(1, 12), st.integers(1, 12), seeds)
def test_attention_is_torchs_when_the_gate_is_still(length, other, seed):
    torch.manual_seed(seed)
    ours, theirs = (
        GatedAttention(8, 2, nn.Embedding(8, 2)), nn.MultiheadAttention(8, 2, batch_first=True))
    # both gates one half: 2 - 1/2 + s/4
    for p in (ours.grep_linear.weight, ours.grep_linear.bias): nn.init.zeros_(p)
    nn.init.constant_(ours.grep_a, .8)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([f.weight for f in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.in_proj_bias.copy_(
            torch.cat([f.bias for f in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        S = max(length, other)
        x, real = torch.randn(2, S, 8), torch.arange(S) < torch.tensor([[length], [other]])
        bias = ours.relative_attention_bias(position_buckets(S, 8, 6)).permute(2, 0, 1)  # (H, S, S)
        mask = (
            (1.7 * bias)
            .repeat(2, 1, 1)
            .unflatten(0, (2, 2))
            .masked_fill(~real[:, None, None], -torch.inf)
            .flatten(0, 1))
        a, b = ours(x, bias, real), theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(a[real], b[real], atol=1e-5, rtol=1e-4)


@few
@given(
    st.lists(st.integers(2800, 20000), min_size=1, max_size=4),
    seeds,
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
def test_beats_hears_a_clip_alone_as_in_a_batch(lengths, seed, behind):
    torch.manual_seed(seed)
    beats = Beats(CONFIG.beats).eval()
    wave, n = waves(lengths, seed, behind)
    with torch.no_grad():
        together, real = beats(wave, n)
        for i, length in enumerate(lengths):
            alone, _ = beats(wave[i:i + 1, :length], n[i:i + 1])
            assert (
                alone.shape[1] == real[i].sum() == 8 * ((1 + (length - 400) // 160) // 16)
                and real[i, : alone.shape[1]].all())
            torch.testing.assert_close(together[i, real[i]], alone[0], atol=1e-4, rtol=1e-4)


def test_beats_takes_the_published_names_and_nothing_else(tmp_path):
    with torch.device("meta"): full = Beats()
    names = {
        n.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tuple(t.shape)
        for n, t in full.state_dict().items()}
    layer = {
        "self_attn.grep_a": (1, 12, 1, 1),
        "self_attn.grep_linear.weight": (8, 64),
        "self_attn.grep_linear.bias": (8,),
        "self_attn.relative_attention_bias.weight": (320, 12),
        "fc1.weight": (3072, 768),
        "fc1.bias": (3072,),
        "fc2.weight": (768, 3072),
        "fc2.bias": (768,),
        **{
            f"self_attn.{p}_proj.{k}": s
            for p in ("q", "k", "v", "out")
            for k, s in (("weight", (768, 768)), ("bias", (768,)))},
        **{
            f"{n}.{k}": (768,)
            for n in ("self_attn_layer_norm", "final_layer_norm")
            for k in ("weight", "bias")}}
    assert names == {
        "patch_embedding.weight": (512, 1, 16, 16), "layer_norm.weight": (512,),
        "layer_norm.bias": (512,), "post_extract_proj.weight": (768, 512),
        "post_extract_proj.bias": (768,), "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (768, 48, 128), "encoder.pos_conv.0.bias": (768,),
        "encoder.layer_norm.weight": (768,), "encoder.layer_norm.bias": (768,),
        **{f"encoder.layers.{i}.{n}": s for i in range(12) for n, s in layer.items()}}
    torch.save(dict(cfg=FIXED | dict(encoder_layers=1), model={}), tmp_path/"empty.pt")
    with pytest.raises(DataError, match="do not fit .*patch_embedding.weight"):
        Beats.load(tmp_path/"empty.pt", unpickle=True)
    torch.save(dict(cfg=FIXED | dict(gru_rel_pos=False), model={}), tmp_path/"other.pt")
    with pytest.raises(DataError, match="gru_rel_pos is False"):
        Beats.load(tmp_path/"other.pt", unpickle=True)


class Evil:
    def __reduce__(self): return (open, (self.path, "w"))


@pytest.mark.parametrize("unpickle", [False, True])
def test_no_code_runs_when_a_checkpoint_is_read(tmp_path, unpickle):
    Evil.path = str(tmp_path/"it_ran")
    torch.save(dict(model=Evil()), tmp_path/"evil.pth")
    (tmp_path/"plain.pth").write_bytes(pickle.dumps(dict(model=Evil())))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(DataError, match="cannot be read" if unpickle else "is a pickle"):
            read_weights(tmp_path/name, unpickle)
    assert not (tmp_path/"it_ran").exists()


# --- SALMONN's own parts

@few
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(1, 20),
    seeds,
)
def test_windows_are_those_of_a_loop(heard, kernel, stride, seed):
    frames = torch.randn(len(heard), 60, 2, generator=torch.Generator().manual_seed(seed))
    loop = [
        [clip[s : s + kernel] for s in range(0, n, stride) if s + kernel <= 60]
        for clip, n in zip(frames, heard)]
    cut, count = windows(frames, torch.tensor(heard), kernel, stride)
    assert count.tolist() == [len(ws) for ws in loop] and torch.equal(
        cut, torch.stack([w for ws in loop for w in ws]))


@pytest.mark.parametrize("queries", [1, 3])
def test_qformer_of_a_batch_of_windows_is_a_loop_over_windows_in_torchs_attention(queries):
    model = salmonn(queries=queries)
    wave, lengths = waves([16000, 40000])
    def attend(block, x, seen):
        a, C = block.attention, seen.shape[-1]
        m = nn.MultiheadAttention(8, 2, kdim=C, vdim=C)
        if C == 8: m.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        else:
            (
                m.q_proj_weight.copy_(a.query.weight), m.k_proj_weight.copy_(a.key.weight),
                m.v_proj_weight.copy_(a.value.weight))
        (
            m.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias])),
            m.out_proj.load_state_dict(block.output.dense.state_dict()))
        return block.output.LayerNorm(x + m(x, seen, seen, need_weights=False)[0])
    with torch.no_grad():
        frames, (words, count) = model.listen(wave, lengths), model.hear(wave, lengths)
        at = 0
        for clip, n in zip(frames, lengths.tolist()):
            for start in range(0, -(-n//320), 17):
                x = model.qformer.layernorm(model.queries[0])
                for layer in model.qformer.encoder.layer:
                    x = attend(layer.attention, x, x)
                    x = attend(layer.crossattention, x, clip[start:start + 17])
                    x = layer.output_query.LayerNorm(
                        x + layer.output_query.dense(F.gelu(layer.intermediate_query.dense(x))))
                torch.testing.assert_close(words[at], model.proj(x), atol=1e-5, rtol=1e-4)
                at += 1
    assert at == len(words) == count.sum()


@pytest.mark.parametrize("samples", [40000, 5000])
def test_frames_are_both_encoders_and_silence_after_the_clip(model, samples):
    wave, lengths = waves([samples])
    second = F.pad(wave, (0, max(0, 16000 - samples)))  # BEATs hears one second at least
    with torch.no_grad():
        frames, (audio, _) = (
            model.listen(wave, lengths)[0], model.beats(second, torch.tensor([second.shape[1]])))
        mel = model.mel(wave[0].numpy(), sampling_rate=16000, return_tensors="pt").input_features
        speech = model.whisper(mel).last_hidden_state
    assert frames.shape == (250, 28)
    torch.testing.assert_close(frames[:, :16], F.layer_norm(speech[0], (16,)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        frames[: audio.shape[1], 16:], F.layer_norm(audio[0], (12,)), atol=1e-5, rtol=1e-4)
    assert (frames[audio.shape[1]:, 16:] == 0).all()


# --- SALMONN whole

@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.integers(1600, 60000), min_size=2, max_size=4),
    seeds,
    st.sampled_from([0.0, 0.5, float("nan")]),
)
def test_a_clip_is_heard_alone_as_in_any_batch_and_order(model, lengths, seed, behind):
    wave, n = waves(lengths, seed, behind)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        hidden, mask = model(wave, n)
        turned, same = model(wave[order], n[order])
        assert torch.equal(mask[order], same)
        for i, (length, words) in enumerate(zip(lengths, mask.sum(1) - len(CONFIG.after))):
            alone, m = model(wave[i:i + 1, :length], n[i:i + 1])
            at = (order == i).nonzero().item()
            assert words == -(-(-(-length//320))//17)
            torch.testing.assert_close(hidden[i, mask[i]], alone[m], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(turned[at, mask[i]], alone[m], atol=1e-4, rtol=1e-4)


def test_the_output_depends_on_the_clip_only_where_the_mask_is_true(model):
    wave, n = waves([30000, 30000])
    with torch.no_grad(): hidden, mask = model(wave, n)
    differs = (hidden[0] != hidden[1]).any(1)
    assert torch.equal(differs, mask[0]) and torch.equal(mask[0], mask[1])


def test_only_what_is_meant_to_learn_learns():
    model = salmonn(queries=2).train()  # two queries: self-attention learns too
    assert (
        not model.whisper.training
        and not model.beats.training
        and model.qformer.training
        and model.llm.training)
    start = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)  # all parameters are offered to it
    wave, lengths = waves([16000, 30000])
    for _ in range(3):
        hidden, mask = model(wave, lengths)
        loss = (hidden[mask] - 1).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    meant = {n for n in start if n.startswith(("qformer.", "queries", "proj.")) or ".lora_" in n}
    assert set(model.trainable()) == meant and moved <= meant
    # a constant added to all keys changes no softmax
    assert all("key.bias" in n for n in meant - moved)
    assert {n.split(".")[0] for n in meant} == {"qformer", "queries", "proj", "llm"} and sum(
        ".lora_" in n for n in meant
    ) == 2 * 2 * 2


def test_it_can_fit_a_batch():
    torch.manual_seed(0)
    model = Salmonn(CONFIG)
    head = nn.Linear(24, 2)
    optimizer = torch.optim.Adam(
        [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad], lr=3e-2)
    wave, lengths = waves([16000, 20000, 24000, 16000])
    for _ in range(40):
        hidden, mask = model(wave, lengths)
        logits = head((hidden*mask[..., None]).sum(1)/mask.sum(1, keepdim=True))
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < .1


def test_the_adapter_comes_back_to_the_same_bits_without_the_models_under_it():
    tuned = salmonn()
    for n, p in tuned.named_parameters():
        if p.requires_grad: nn.init.normal_(p, std=.2)
    stored = load(save({n: t.contiguous() for n, t in tuned.adapter().items()}))
    assert set(tuned.trainable()) <= set(stored) and not any(
        n.startswith(("whisper", "beats")) or "base_layer" in n or "embed_tokens" in n
        for n in stored)
    fresh, batch = salmonn(), waves([16000, 30000])
    with torch.no_grad():
        before = fresh(*batch)[0]
        assert torch.equal(
            fresh.load_adapter(stored)(*batch)[0], tuned(*batch)[0]
        ) and not torch.equal(before, fresh(*batch)[0])


# --- published checkpoints

def published_layout(width, frames, whisper, beats, inner, llm, key, layers, rank=8):
    "Names and shapes of a published checkpoint, written down from the published code."
    linear = lambda o, i: {"weight": (o, i), "bias": (o,)}
    norm = lambda d: {"weight": (d,), "bias": (d,)}
    parts = {
        "ln_speech": norm(whisper), "ln_audio": norm(beats),
        "speech_llama_proj": linear(llm, width),
        "speech_Qformer.bert.embeddings.LayerNorm": norm(width)}
    for i in (0, 1):
        at = f"speech_Qformer.bert.encoder.layer.{i}."
        for kind, seen in (("attention", width), ("crossattention", frames)):
            parts |= {
                f"{at}{kind}.self.query": linear(width, width),
                f"{at}{kind}.self.key": linear(width, seen),
                f"{at}{kind}.self.value": linear(width, seen),
                f"{at}{kind}.output.dense": linear(width, width),
                f"{at}{kind}.output.LayerNorm": norm(width)}
        parts |= {
            f"{at}intermediate_query.dense": linear(inner, width),
            f"{at}output_query.dense": linear(width, inner),
            f"{at}output_query.LayerNorm": norm(width)}
    shapes = {"speech_query_tokens": (1, 1, width)} | {
        f"{part}.{k}": s for part, of in parts.items() for k, s in of.items()}
    for i in range(layers):
        for m, out in (("q_proj", llm), ("v_proj", key)):
            at = f"llama_model.base_model.model.model.layers.{i}.self_attn.{m}."
            shapes |= {
                f"{at}lora_A.default.weight": (rank, llm),
                f"{at}lora_B.default.weight": (out, rank)}
    return shapes


@pytest.mark.parametrize(
    "config, llm, layers, millions",
    [(SalmonnConfig.salmonn_7b(), 4096, 32, 30.2), (SalmonnConfig.salmonn_13b(), 5120, 40, 33.3)],
)
def test_every_published_name_has_its_place_at_full_size(tmp_path, config, llm, layers, millions):
    with torch.device("meta"): model = Salmonn(replace(config, before=(1,), after=(1,)))
    shapes = published_layout(768, 2048, 1280, 768, 3072, llm, llm, layers)
    own = {n: tuple(t.shape) for n, t in model.adapter().items()}
    assert len(shapes) == len(own) and sorted(shapes.values()) == sorted(own.values())
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad)/1e6, 1) == millions
    names = {}
    model.load_adapter = names.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "erc_moe.encoders.salmonn.read_weights",
            lambda path, unpickle: {
                "model": {n: torch.empty(s, device="meta") for n, s in shapes.items()}})
        model.load_published(tmp_path/"salmonn.pth")
    assert {n: tuple(t.shape) for n, t in names.items()} == own


def tiny_checkpoint():
    rng = torch.Generator().manual_seed(3)
    return {
        n: torch.randn(s, generator=rng)
        for n, s in published_layout(8, 28, 16, 12, 16, 24, 24, 2).items()}


def test_every_weight_of_a_published_file_arrives_where_it_belongs(tmp_path):
    state = tiny_checkpoint()
    torch.save(
        dict(
            model=state
            | {
                "speech_Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
                "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(
                    3)},
            epoch=1),
        tmp_path / "salmonn_v1.pth")
    model = salmonn().load_published(tmp_path, unpickle=True)  # the folder holds one file
    q = model.qformer.encoder.layer
    for name, p in {
        "speech_query_tokens": model.queries,
        "ln_speech.weight": model.ln_speech.weight,
        "ln_audio.bias": model.ln_audio.bias,
        "speech_llama_proj.weight": model.proj.weight,
        "speech_Qformer.bert.embeddings.LayerNorm.weight": model.qformer.layernorm.weight,
        "speech_Qformer.bert.encoder.layer.1.attention.self.query.weight": q[
            1
        ].attention.attention.query.weight,
        "speech_Qformer.bert.encoder.layer.0.crossattention.self.value.weight": q[
            0
        ].crossattention.attention.value.weight,
        "speech_Qformer.bert.encoder.layer.1.crossattention.output.LayerNorm.bias": q[
            1
        ].crossattention.output.LayerNorm.bias,
        "speech_Qformer.bert.encoder.layer.0.output_query.dense.bias": q[0].output_query.dense.bias,
        "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight": model.llm.base_model.model.layers[
            1]
        .self_attn.v_proj.lora_B["default"]
        .weight,
    }.items():
        assert torch.equal(p, state[name]), name
    assert sum(p.double().sum() for p in model.adapter().values()).item() == pytest.approx(
        sum(t.double().sum() for t in state.values()).item())


@pytest.mark.parametrize(
    "harm, told",
    [
        (lambda s: s.pop("speech_query_tokens"), "queries missing"),
        (
            lambda s: s.update({"speech_Qformer.cls.bias": torch.ones(2)}),
            "speech_Qformer.cls.bias unknown",
        ),
        (
            lambda s: s.update(
                {
                    "llama_model.base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight": torch.ones(
                        8, 24
                    )
                }
            ),
            "layers.2.*unknown",
        ),
        (lambda s: s.update({"ln_speech.bias": torch.ones(3)}), "ln_speech.bias of another shape"),
        (
            lambda s: [s.pop("ln_audio.bias"), s.pop("speech_llama_proj.bias")],
            "ln_audio.bias, proj.bias missing",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    tmp_path, harm, told
):
    state, model = tiny_checkpoint(), salmonn()
    harm(state)
    torch.save(dict(model=state), tmp_path/"salmonn.pth")
    before = {n: t.clone() for n, t in model.adapter().items()}
    with pytest.raises(DataError, match=told):
        model.load_published(tmp_path/"salmonn.pth", unpickle=True)
    assert all(torch.equal(t, before[n]) for n, t in model.adapter().items())


@pytest.mark.parametrize(
    "wave, lengths, told",
    [
        (torch.zeros(1, 90000), [80001], "5.0 s long, and Whisper hears 5 s"),
        (torch.zeros(1, 100), [0], "do not have the lengths"),
        (torch.zeros(1, 100), [101], "do not have the lengths"),
        (torch.zeros(2, 100), [100], "do not have the lengths"),
        (torch.zeros(100), [100], "do not have the lengths"),
    ],
)
def test_bad_waves_are_refused(model, wave, lengths, told):
    with pytest.raises(DataError, match=told): model(wave, torch.tensor(lengths))


def test_bad_configurations_are_refused():
    with pytest.raises(DataError, match="no token ids"): Salmonn(replace(CONFIG, before=None))
    with pytest.raises(DataError, match="BEATs is 16 wide, and the configuration says 12"):
        Salmonn(CONFIG, beats=Beats(replace(CONFIG.beats, encoder_embed_dim=16)))
    with pytest.raises(DataError, match="has not one"):
        replace(CONFIG, prompt="<SpeechHere><SpeechHere>").tokenized(None)
