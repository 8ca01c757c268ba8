"""Promises of the video reader, the DenseNet and its encoder, and a model trained and used on
video from end to end."""
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from erc_moe.conversations import DataError
from erc_moe.corpora.own import load_own
from erc_moe.features.pipeline import FeaturePipeline
from erc_moe.features.store import FeatureStore, extract
from erc_moe.features.visual import DenseNet, DenseNetEncoder, densenet_of, evenly, read_frames
from erc_moe.predict import predict_file
from erc_moe.training import Run, train

needs_av = pytest.mark.skipif(
    find_spec("av") is None, reason="video files are written and read with PyAV: pip install av")
FORMATS = {
    "a.mp4": ("libx264", "yuv420p"), "a.mkv": ("libx264", "yuv420p"), "a.avi": ("mpeg4", "yuv420p"),
    "a.webm": ("libvpx-vp9", "yuv420p"), "a.mov": ("mjpeg", "yuvj420p")}


def grey(i, shape=(48, 64)):
    "A frame that tells its number by its brightness."
    return np.full((*shape, 3), 20 + 7*i, np.uint8)


def write_clip(path, frames, codec="ffv1", pixels="bgr0", **options):
    import av
    with av.open(str(path), "w", options=options) as clip:
        stream = clip.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for f in frames: clip.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        clip.mux(stream.encode())
    return path


def write_crops(folder, frames):
    folder.mkdir(parents=True)
    for i, f in enumerate(frames): Image.fromarray(f).save(folder/f"{i}.png")
    return folder


def random_densenet(seed=0, **config):
    torch.manual_seed(seed)
    model = DenseNet(
        **{"growth": 4, "blocks": (2, 2), "channels": 3, "small": True, **config}
    ).eval()
    for m in model.modules():
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
    return model


def config(size=(3, 32, 32)):
    return json.dumps({
        "architecture": "densenet121",
        "pretrained_cfg": {
            "input_size": size, "mean": [0.5] * size[0], "std": [0.25] * size[0],
            "interpolation": "bilinear"}})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A tiny random DenseNet, as the hub would have it."
    folder = tmp_path_factory.mktemp("weights")/"tiny"
    folder.mkdir()
    save_file(random_densenet().state_dict(), folder/"model.safetensors")
    (folder/"config.json").write_text(config())
    return folder


# Frames

@given(st.integers(0, 500), st.integers(1, 60))
def test_positions_are_even(n, frames):
    at = evenly(n, frames)
    assert len(at) == min(n, frames) and all(0 <= i < n for i in at) and (np.diff(at) > 0).all()
    if n > frames:
        assert at[0] + 1 - (n - at[-1]) in (-1, 0, 1)  # as far from the beginning as from the end
        assert set(np.diff(at)) <= {n//frames, -(-n//frames)}


@needs_av
@pytest.mark.parametrize("name", FORMATS)
def test_frames_of_any_format_are_evenly_spaced(tmp_path, name):
    clip = write_clip(tmp_path/name, [grey(i) for i in range(30)], *FORMATS[name])
    for wanted in (1, 7, 30, 99):
        frames = read_frames(clip, wanted)
        assert [f.shape for f in frames] == [(48, 64, 3)] * min(wanted, 30) and frames[
            0
        ].dtype == np.uint8
        # less than a frame's step
        assert np.abs([f.mean() for f in frames] - (20 + 7*np.array(evenly(30, wanted)))).max() < 6


@needs_av
def test_colours_are_red_green_blue(tmp_path):
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[..., 0] = 200  # red
    assert (read_frames(write_clip(tmp_path/"red.mkv", [frame]), 1)[0] == frame).all()
    assert (read_frames(write_crops(tmp_path/"red", [frame]), 1)[0] == frame).all()


@needs_av
@pytest.mark.parametrize(
    "matrix, turns", [((0, 1, -1, 0), 3), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)]
)
def test_a_recording_that_lies_is_turned_up(tmp_path, matrix, turns):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :16] = 255  # a bright left edge
    data = bytearray(write_clip(tmp_path/"upright.mp4", [frame]*3, "mpeg4", "yuv420p").read_bytes())
    at, (a, b, c, d) = data.index(b"tkhd") + 44, matrix  # the track's display matrix, 16.16
    data[at : at + 36] = b"".join(
        int(v * 2**e).to_bytes(4, "big", signed=True)
        for v, e in zip((a, b, 0, c, d, 0, 0, 0, 1), (16, 16, 30) * 3))
    (tmp_path/"turned.mp4").write_bytes(data)
    turned, = read_frames(tmp_path/"turned.mp4", 1)
    assert np.abs(turned.astype(int) - np.rot90(frame, turns)).max() < 60 and (
        turned.shape[0] > turned.shape[1]
    ) == (turns % 2 == 1)


@needs_av
@settings(max_examples=12, deadline=None)
# 0.2 of its 1.2 seconds may lack without being missed
@given(
    st.sampled_from(
        [
            ("mpeg4", "yuv420p", "fast.mp4"),
            ("ffv1", "bgr0", "a.mkv"),
            ("mpeg4", "yuv420p", "a.avi"),
            ("libx264", "yuv420p", "late.mp4"),
        ]
    ),
    st.floats(0, 0.8),
)
def test_a_clip_cut_anywhere_is_refused_by_name(tmp_path_factory, how, share):
    codec, pixels, name = how
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(30)]
    path = write_clip(
        tmp_path_factory.mktemp("clips") / name, frames, codec, pixels,
        **{"movflags": "faststart"} if "fast" in name else {})
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    with pytest.raises(
        DataError,
        match="utterance 'u7': its video file (is empty|is cut short|cannot be read|holds no)",
    ):
        read_frames(path, 4, "u7")


@needs_av
@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["a.mp4", "a.mkv", "a.avi"]),
    st.floats(0, 0.99),
    st.binary(min_size=20, max_size=400),
)
@example(
    "a.mkv", 0.24609375, b"\x01\x01\x01\x01\x01\x01\x80" + bytes(13)
)  # a title that is not UTF-8
def test_noise_in_a_clip_ends_in_frames_or_in_its_name(tmp_path_factory, name, share, noise):
    path = write_clip(
        tmp_path_factory.mktemp("clips") / name, [grey(i) for i in range(30)], *FORMATS[name])
    data = bytearray(path.read_bytes())
    at = int(share*len(data))
    data[at:at + len(noise)] = noise[:len(data) - at]
    path.write_bytes(data)
    try: frames = read_frames(path, 4, "u7")
    except DataError as e: assert e.utterance == "u7"
    else: assert 1 <= len(frames) <= 4 and all(f.ndim == 3 and f.shape[2] == 3 for f in frames)


def test_crops_come_in_the_order_of_their_numbers_in_any_kind(tmp_path):
    frames = [grey(i, (20 + i, 30)) for i in range(12)]  # no two of one size
    folder = tmp_path/"crops"
    folder.mkdir()
    for i, f in enumerate(frames):
        Image.fromarray(f).save(folder/f"frame_det_00_{i}.{'png' if i % 2 else 'BMP'}")
    Image.fromarray(frames[5][..., 0]).save(folder/"frame_det_00_5.png")  # one is grey
    for litter in (".hidden.png", "notes.txt", "._frame_det_00_0.png"):
        (folder/litter).write_text("x")
    assert [f.shape for f in read_frames(folder, 99)] == [f.shape for f in frames]
    assert all((a == frames[i]).all() for a, i in zip(read_frames(folder, 5), evenly(12, 5)))


# The network

def names_of_densenet121():
    """What torchvision's densenet121 calls its tensors, with their shapes, written out from the
    paper's table 1."""
    norm = lambda at, c: {
        f"{at}.weight": (c,), f"{at}.bias": (c,), f"{at}.running_mean": (c,),
        f"{at}.running_var": (c,), f"{at}.num_batches_tracked": ()}
    shapes, c = {"features.conv0.weight": (64, 3, 7, 7), **norm("features.norm0", 64)}, 64
    for block, layers in enumerate((6, 12, 24, 16), 1):
        for layer in range(1, layers + 1):
            at = f"features.denseblock{block}.denselayer{layer}"
            shapes |= {
                **norm(f"{at}.norm1", c), f"{at}.conv1.weight": (128, c, 1, 1),
                **norm(f"{at}.norm2", 128), f"{at}.conv2.weight": (32, 128, 3, 3)}
            c += 32
        if block < 4:
            shapes |= {
                **norm(f"features.transition{block}.norm", c),
                f"features.transition{block}.conv.weight": (c // 2, c, 1, 1)}
            c //= 2
    return shapes | {
        **norm("features.norm5", 1024), "classifier.weight": (1000, 1024),
        "classifier.bias": (1000,)}


def test_the_published_layout_of_densenet121_loads_strictly():
    weights = {name: torch.zeros(shape) for name, shape in names_of_densenet121().items()}
    assert len(weights) == 727
    model = densenet_of(weights)
    assert model.width == 1024 and set(model.state_dict()) == {
        n for n in weights if not n.startswith("classifier")}
    weights["features.denseblock3.denselayer24.conv2.weight"] = torch.zeros(32, 128, 1, 1)
    with pytest.raises(DataError, match="size mismatch"): densenet_of(weights)


def test_every_layer_sees_every_layer_before_it():
    """Equation (2): what goes into a dense layer is the block's input and the output of every
    layer before, side by side."""
    model, entered, left = random_densenet(blocks=(4,)), [], []
    for layer in model.features.denseblock1.values():
        layer.register_forward_hook(
            lambda module, args, out: (entered.append(args[0]), left.append(out)) and None)
    with torch.inference_mode(): model(torch.rand(2, 3, 16, 16))
    assert [x.shape[1] for x in entered] == [8, 12, 16, 20]
    assert all(torch.equal(x, torch.cat([entered[0], *left[:i]], 1)) for i, x in enumerate(entered))


# The encoder

@pytest.fixture
def faces(tmp_path):
    rng = np.random.default_rng(0)
    return [
        write_crops(
            tmp_path / "faces" / f"u{k}",
            [rng.integers(0, 255, (40, 40, 3), dtype=np.uint8) for _ in range(n)])
        for k, n in enumerate((3, 20, 1, 9))]


def test_a_clip_has_one_row_in_any_company(tiny, faces):
    rows = DenseNetEncoder(str(tiny), frames=5).rows(faces)
    assert [r.shape for r in rows] == [(16,)]*4 and np.ptp(rows, axis=0).max() > 0.01
    for setting in ({"batch": 1}, {"batch": 2, "workers": 3}, {"workers": 1}):
        encoder = DenseNetEncoder(str(tiny), frames=5, **setting)
        assert encoder.extractor == DenseNetEncoder(str(tiny), frames=5).extractor
        for path, row, again in zip(faces[::-1], rows[::-1], encoder.rows(faces[::-1])):
            assert (
                np.abs(again - row).max() < 1e-5
                and np.abs(encoder.rows([path])[0] - row).max() < 1e-5)


def test_a_row_is_the_mean_of_its_frames(tiny, faces):
    encoder = DenseNetEncoder(str(tiny), frames=5)
    each = [
        encoder.rows([write_crops(faces[1].parent / f"one{i}", [f])])[0]
        for i, f in enumerate(read_frames(faces[1], 5))]
    assert (
        np.abs(encoder.rows([faces[1]])[0] - np.mean(each, 0)).max() < 1e-5
        and np.ptp(each, axis=0).max() > 0.01)


def test_every_kind_of_file_gives_the_same_rows(tiny, faces, tmp_path):
    weights, want = random_densenet().state_dict(), DenseNetEncoder(str(tiny)).rows(faces)
    old = {
        k.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2."): v
        for k, v in weights.items()
        if "num_batches_tracked" not in k}
    for name, tensors in {"pytorch_model.bin": weights, "densenet.pth": old}.items():
        folder = tmp_path/name.split(".")[0]
        folder.mkdir()
        torch.save(tensors, folder/name)
        shutil.copy(tiny/"config.json", folder)
        assert np.array_equal(DenseNetEncoder(str(folder)).rows(faces), want)


def test_a_pickle_with_more_than_tensors_runs_nothing(tiny, tmp_path):
    class Touch:
        def __reduce__(self): return Path.touch, (tmp_path/"ran",)
    torch.save({"features.conv0.weight": Touch()}, tmp_path/"net.pth")
    shutil.copy(tiny/"config.json", tmp_path)
    with pytest.raises(DataError, match="tensors alone are read"):
        DenseNetEncoder(str(tmp_path)).extractor
    assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_from_the_hub_are_those_of_the_folder(tiny, kind, faces, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants
    if kind == "pytorch_model.bin":
        (
            (tmp_path / "older").mkdir(), shutil.copy(tiny / "config.json", tmp_path / "older"),
            torch.save(random_densenet().state_dict(), tmp_path / "older" / kind))
        tiny = tmp_path/"older"
    repo = tmp_path/"models--timm--tiny"
    (repo/"refs").mkdir(parents=True), (repo/"refs"/"main").write_text("abc123")
    (repo/"snapshots").mkdir(), (repo/"snapshots"/"abc123").symlink_to(tiny)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub, local = DenseNetEncoder("timm/tiny"), DenseNetEncoder(str(tiny))
    assert (
        hub.folder.parent.parent == repo
        and hub.extractor.revision == local.extractor.revision
        and hub.extractor.name == "timm/tiny")
    assert np.array_equal(hub.rows(faces), local.rows(faces))
    with pytest.raises(
        DataError, match="'timm/none' cannot be had.*Check the name and the network"
    ):
        DenseNetEncoder("timm/none").extractor


def test_without_pyav_a_video_stops_the_work_and_folders_do_not(tiny, faces, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path/"a.mp4").write_bytes(b"anything")
    store = FeatureStore(tmp_path/"store", (encoder := DenseNetEncoder(str(tiny))).extractor)
    with pytest.raises(DataError, match="PyAV is not installed"):
        extract(store, {"u": tmp_path/"a.mp4"}, encoder.rows, missing="absent")
    assert len(store) == 0 and not store.absent and len(encoder.rows(faces)) == 4


# In the pipeline, and from end to end

LABELS = ["neutral", "joy", "anger"]


def write_table(folder, conversations, seed=0, labelled=True, films=True):
    """A table of conversations whose clips are as bright as the emotion; some utterances are not
    filmed, others have a folder of crops."""
    rng, rows = (
        np.random.default_rng(seed),
        ["conversation,speaker,text,label,video" if films else "conversation,speaker,text,label"])
    (folder/"clips").mkdir(parents=True, exist_ok=True)
    for c in range(conversations):
        for i in range(4):
            label, name = int(rng.integers(3)), f"clips/{seed}_{c}_{i}"
            frames = [
                np.clip(rng.normal(40 + 80 * label, 12, (40, 40, 3)), 0, 255).astype(np.uint8)
                for _ in range(6)]
            if i == 3: cell = ""
            elif i == 2 or find_spec("av") is None: cell = write_crops(folder/name, frames) and name
            else: cell = write_clip(folder/f"{name}.mkv", frames) and f"{name}.mkv"
            rows.append(
                f"c{seed}{c},{'ab'[i % 2]},Line {i}.,{LABELS[label] if labelled else ''}"
                + (f",{cell}" if films else ""))
    (folder/f"calls{seed}.csv").write_text("\n".join(rows) + "\n")
    return folder/f"calls{seed}.csv"


def test_the_pipeline_sees_what_was_filmed_and_only_once(tiny, tmp_path, monkeypatch):
    corpus = load_own(write_table(tmp_path, 5))
    source = {"visual": f"densenet:{tiny}"}
    ready = (
        FeaturePipeline(source)
        .fit(corpus, tmp_path / "cache")
        .apply(corpus, cache=tmp_path / "cache"))
    for c in ready.conversations:
        assert c.present["visual"].tolist() == [True, True, True, False] and c.features[
            "visual"
        ].shape == (4, 16)
        assert (c.features["visual"][3] == 0).all() and np.ptp(c.features["visual"][:3]) > 0
    assert any("utterances without a video: 5" in f for f in ready.faults)
    monkeypatch.setattr(DenseNetEncoder, "look", lambda *_: pytest.fail("computed twice"))
    again = (
        FeaturePipeline(source)
        .fit(corpus, tmp_path / "cache")
        .apply(corpus, cache=tmp_path / "cache"))
    assert all(
        np.array_equal(a.features["visual"], b.features["visual"])
        for a, b in zip(ready.conversations, again.conversations))


def test_a_broken_clip_is_named_or_told(tiny, tmp_path):
    corpus = load_own(write_table(tmp_path, 5))
    broken = next(
        u for c in corpus.conversations for u in c.utterances if u.video and u.video.is_dir())
    for image in broken.video.iterdir(): image.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"utterance '{broken.id}': its image .* cannot be read"):
        FeaturePipeline({"visual": f"densenet:{tiny}"}).fit(corpus, False)
    pipeline = FeaturePipeline({"visual": f"densenet:{tiny}"}, missing="absent").fit(corpus, False)
    there = {
        u.id: here
        for c in pipeline.apply(corpus, cache=False).conversations
        for u, here in zip(c.utterances, c.present["visual"])}
    assert (
        not there[broken.id]
        and sum(there.values()) == 14
        and any(f"({broken.id}: its image" in t for t in pipeline.told))


def test_rows_that_exist_come_from_a_store_a_file_or_beside_the_table(tiny, tmp_path):
    table = write_table(tmp_path, 5)
    corpus, encoder = load_own(table), DenseNetEncoder(str(tiny))
    films = {u.id: u.video for c in corpus.conversations for u in c.utterances if u.video}
    rows = dict(zip(films, encoder.rows(list(films.values()))))
    store = extract(FeatureStore(tmp_path/"store", encoder.extractor), films, encoder.rows)
    store.add(
        [], np.zeros((0, 16)),
        {u.id: "not filmed" for c in corpus.conversations for u in c.utterances if not u.video})
    save_file({id: torch.tensor(row) for id, row in rows.items()}, tmp_path/"rows.safetensors")
    shutil.copy(tmp_path/"rows.safetensors", tmp_path/f"{table.stem}.face.safetensors")
    corpus = load_own(table)
    features = lambda source: [
        c.features["visual"]
        for c in FeaturePipeline({"visual": source})
        .fit(corpus, False)
        .apply(corpus, cache=False)
        .conversations]
    want = features(f"densenet:{tiny}")
    for source in (str(tmp_path/"store"), str(tmp_path/"rows.safetensors"), "face"):
        assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(features(source), want)), source
    every = np.random.default_rng(0).normal(size=(20, 3))  # .npy: a row for each of the table's
    np.save(tmp_path/"every.npy", every)
    assert all(f.shape == (4, 3) for f in features(str(tmp_path/"every.npy")))


def test_sure_trains_on_video_and_predicts_new_video(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ERC_MOE_CACHE", str(tmp_path/"cache"))
    run = train(
        "sure", load_own(write_table(tmp_path, 10)), visual=f"densenet:{tiny}", seeds=1,
        out=tmp_path / "run", device="cpu", progress=False,
        changes={"epochs": 1, "width": 8, "heads": 2, "experts": 2, "chosen": 1})
    assert run.summary["features"] == {
        "sources": {"visual": f"densenet:{tiny}"}, "widths": {"visual": 16}}
    new = write_table(tmp_path, 2, seed=1, labelled=False)
    told = predict_file(Run(tmp_path/"run"), new).table()
    assert (
        len(told) == 8
        and set(told.predicted) <= set(LABELS)
        and told.confidence.between(0, 1).all())
    alone = predict_file(tmp_path/"run", new, seed=0).table()
    assert alone.confidence.tolist() == told.confidence.tolist()
    unfilmed = write_table(tmp_path, 2, seed=2, labelled=False, films=False)
    with pytest.raises(
        DataError, match="no utterance has 'visual', which the model was trained with"
    ):
        predict_file(tmp_path/"run", unfilmed)

