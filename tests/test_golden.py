"""The published network's numbers: weights load strictly, outputs and gradients agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dlgsanet_arch import DLGSANet

TOLERANCE = 1e-4  # of the expected values' standard deviation
NAMES = (
    "ablation_activation_gelu",
    "ablation_activation_sigmoid",
    "ablation_base_ffn",
    "ablation_body_norm",
    "ablation_edge_softmax",
    "ablation_gray",
    "ablation_img_range_255",
    "ablation_mdta_only",
    "ablation_mhdlsa_only",
    "ablation_no_tlc",
    "ablation_no_upsampler_x1",
    "ablation_pixelshuffle_x3",
    "ablation_static_depthwise",
    "tiny_x4",
)


def check(name: str, folder: Path, device: str) -> None:
    golden = np.load(folder / f"{name}.npz")

    def expected(key: str) -> torch.Tensor:
        return torch.from_numpy(golden[key]).to(device)

    def agree(actual: torch.Tensor, key: str) -> None:
        error = (actual - expected(key)).abs().max() / expected(key).std()
        assert error <= TOLERANCE, f"{key}: {error:.1e} of the standard deviation"

    net = DLGSANet(**json.loads(str(golden["config"]))).to(device)
    weights = {key[len("param/") :]: expected(key) for key in golden if key.startswith("param/")}
    assert list(net.state_dict()) == list(weights)  # optimizer states go by this order
    net.load_state_dict(weights, strict=True)

    inputs = sum(key.startswith("input_") for key in golden)
    assert inputs > 0
    with torch.no_grad():
        for i in range(inputs):
            agree(net.train()(expected(f"input_{i}")), f"train_output_{i}")
            agree(net.eval()(expected(f"input_{i}")), f"eval_output_{i}")

    x = expected("input_0").requires_grad_()
    net.train()(x).abs().mean().backward()
    agree(x.grad, "grad_input_0")
    gradients = [key for key in golden if key.startswith("grad/")]
    assert gradients
    for key in gradients:
        agree(net.get_parameter(key[len("grad/") :]).grad, key)


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers(name, shared_data):
    folder = shared_data / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden files at {folder} (set DLGSANET_SHARED)")
    check(name, folder, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_on_cuda(name, shared_data, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(name, shared_data / "golden", "cuda")
