"""What runs only where torchaudio, torchvision and timm import: an environment of its own, with
torch 2.9.1, torchvision 0.24.1 and torchaudio 2.9 (torchaudio does not import beside newer ones)."""
import numpy as np
import pytest
import torch

from erc_moe.features.visual import densenet_of
from erc_moe.recordings import resample


def importable(name):
    "A library, or a skip where it is not installed or does not import beside this torch."
    try: return pytest.importorskip(name, exc_type=ImportError)
    except OSError as e: pytest.skip(f"{name} does not import here ({e})")


@pytest.mark.parametrize("source, target", [(44100, 16000), (48000, 16000), (8000, 16000)])
def test_torchaudio_resamples_as_scipy_does(source, target):
    importable("torchaudio")
    t = np.arange(2*source)/source
    x = (0.4*np.sin(2*np.pi*440*t) + 0.2*np.sin(2*np.pi*1700*t)).astype(np.float32)
    one, other = (resample(x, source, target, name) for name in ("scipy", "torchaudio"))
    n, edge = min(len(one), len(other)), target//20
    assert abs(len(one) - len(other)) <= 1 and n == pytest.approx(2*target, abs=1)
    assert np.abs(one[:n] - other[:n])[edge:-edge].max() < 5e-3
    assert np.abs(one[:n] - np.roll(other[:n], 1))[edge:-edge].max() > 5e-2    # a sample late: seen


@pytest.mark.parametrize("library", ["timm", "torchvision.models"])
def test_a_densenet_of_theirs_is_ours(library):
    make = importable(library).create_model if library == "timm" else None
    torch.manual_seed(0)
    if make: theirs = make("densenet121", pretrained=False)
    else: theirs = importable(library).densenet121(weights=None)
    for name, buffer in theirs.named_buffers():      # statistics of a trained one
        if name.endswith("running_mean"): buffer.normal_(0, 0.1)
        if name.endswith("running_var"): buffer.uniform_(0.5, 1.5)
    theirs.eval()
    x = torch.randn(2, 3, 96, 96)
    features = theirs.forward_features(x) if make else theirs.features(x).relu()
    with torch.inference_mode():
        want, got = features.mean((2, 3)), densenet_of(theirs.state_dict())(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
