"""How many operators a GPU would be given: each is a kernel or more, and microseconds of host time.

Counted without a GPU: on the meta device, which takes a GPU's path, and for autocast on a CPU, made
to normalise in float32 as CUDA's autocast does. Views cost no kernel and are not counted.
"""

import importlib
import importlib.util
from contextlib import nullcontext

import pytest
import torch
from dispatch import Operators
from helpers import SMALL_ARGUMENTS
from test_fused_triton import Launches

from dlgsanet_arch import DLGSANet, fused, network

TINY = {
    **SMALL_ARGUMENTS,
    **{"dim": 48, "groups": 3, "blocks": 3, "window_size": 7, "tlc_kernel": 48, "upscale": 4},
}


def launches(counted):
    """The operators that ran, without views."""
    return {
        each.name(): calls
        for each, calls in counted.calls.items()
        if not any(a.alias_info and not a.alias_info.is_write for a in each._schema.arguments)
        and each.name() != "aten::_unsafe_view"
    }


@pytest.fixture
def _autocast_as_on_cuda():
    """Let autocast on a CPU cast to float32 for a LayerNorm."""

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5, _=False):
        x, weight, bias = (None if each is None else each.float() for each in (x, weight, bias))
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("layer_norm", layer_norm, "AutocastCPU")
        yield


def test_forward_of_tiny():
    with torch.device("meta"):
        net = DLGSANet(**TINY).eval().bfloat16()
        x = torch.empty(1, 3, 180, 320, dtype=torch.bfloat16)
    with torch.no_grad():
        net(x)  # makes the tables of windows, which are kept
        with Operators() as counted:
            net(x)
    assert sum(launches(counted).values()) <= 450, launches(counted)


def test_forward_of_tiny_by_fused_layers(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: requirements-test.txt names it for Linux")
    forms = importlib.import_module("dlgsanet_arch.fused.triton_layers")
    monkeypatch.setattr(fused, "_forms", lambda _: forms)
    monkeypatch.setattr(forms, "is_eager", lambda _: True)  # the meta device has no autocast
    with torch.device("meta"):
        net = DLGSANet(**TINY).eval().bfloat16()
        x = torch.empty(1, 3, 180, 320, dtype=torch.bfloat16)
    with torch.no_grad(), Operators() as counted, Launches(lambda *_, **__: None) as kernels:
        net(x)
    assert kernels.count == 9 * 10
    made = "aten::empty", "aten::new_empty"  # memory alone
    others = {name: calls for name, calls in launches(counted).items() if not name.startswith(made)}
    assert sum(others.values()) <= 30, others


def trained(net, x):
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    out.float().abs().mean().backward()
    return out.detach(), [each.grad for each in net.parameters()]


@pytest.mark.usefixtures("_autocast_as_on_cuda")
def test_training_step_of_tiny_in_half_precision():
    net, x = DLGSANet(**TINY).train(), torch.rand(1, 3, 3, 3)
    with Operators() as counted:
        trained(net, x)
    assert launches(counted)["aten::_to_copy"] <= 150
    assert sum(launches(counted).values()) <= 1100, launches(counted)


def test_weights_cast_together_are_those_of_autocast(monkeypatch):
    net, x = DLGSANet(**{**TINY, "groups": 1, "blocks": 1}).train(), torch.rand(2, 3, 9, 7)
    out, gradients = trained(net, x)
    monkeypatch.setattr(network, "cast_together", lambda *_: nullcontext())
    plain, expected = trained(net, x)
    assert torch.equal(out, plain)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, wanted)


def test_gradients_in_half_precision_are_near_those_of_float32():
    net, x = DLGSANet(**{**TINY, "groups": 1, "blocks": 1}).train(), torch.rand(2, 3, 9, 7)
    _, gradients = trained(net, x)
    net.zero_grad(set_to_none=True)
    net(x).abs().mean().backward()
    for actual, (name, parameter) in zip(gradients, net.named_parameters(), strict=True):
        error = (actual - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.1, name
