"""The dynamic depthwise convolution: every form against the reference, output and gradients."""

import pytest
import torch
from definition import dynamic_convolution
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch.ops import dynamic_dwconv, shifted_taps
from dlgsanet_arch.ops.plain import dynamic_dwconv_plain
from dlgsanet_arch.ops.reference import dynamic_dwconv_reference

# (B, C, H, W), G, K: smaller than the kernel, H != W, one channel a filter, one filter for all.
SHAPES = [
    ((1, 4, 1, 1), 2, 7),
    ((2, 6, 1, 5), 3, 3),
    ((3, 6, 9, 4), 1, 5),
    ((1, 12, 13, 17), 12, 7),
    ((2, 8, 6, 31), 2, 11),
    ((2, 4, 5, 6), 4, 1),
]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan():
    """An output that is never written fails instead of passing by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(shape, groups, kernel, dtype=torch.float64, device="cpu"):
    batch, _, height, width = shape
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(batch, groups, kernel, kernel, height, width, dtype=torch.float64)
    return x.to(device, dtype), weight.to(device, dtype)


def output_and_gradients(function, x, weight, grad):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight)
    return (out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(out)))


def check_against_reference(function, x, weight, tolerance):
    grad = torch.randn(x.shape, dtype=torch.float64)
    actual = output_and_gradients(function, x, weight, grad)
    wide = output_and_gradients(dynamic_dwconv_reference, x.double(), weight.double(), grad.to(x))
    for name, ours, judge in zip(("output", "grad x", "grad weight"), actual, wide, strict=True):
        assert ours.dtype == x.dtype
        error = (ours.double() - judge).abs().max() / judge.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_reference_is_the_formula(shape, groups, kernel):
    x, weight = make_inputs(shape, groups, kernel)
    expected = torch.from_numpy(dynamic_convolution(x.numpy(), weight.numpy()))
    torch.testing.assert_close(dynamic_dwconv_reference(x, weight), expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_operator_equals_reference(shape, groups, kernel, dtype):
    x, weight = make_inputs(shape, groups, kernel, dtype)
    check_against_reference(dynamic_dwconv, x, weight, TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_operator_equals_reference_on_cuda(shape, groups, kernel, dtype):
    x, weight = make_inputs(shape, groups, kernel, dtype, "cuda")
    tolerance = TOLERANCES.get(dtype, 2e-3)
    check_against_reference(dynamic_dwconv, x, weight, tolerance)


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_plain_form_equals_reference(shape, groups, kernel):
    x, weight = make_inputs(shape, groups, kernel)
    check_against_reference(dynamic_dwconv_plain, x, weight, 1e-13)


def test_strips_change_nothing(monkeypatch):
    x, weight = make_inputs((2, 6, 23, 9), 3, 7)
    monkeypatch.setattr(shifted_taps, "CPU_STRIP_ELEMENTS", 2 * 6 * 9 * 4)  # 4 rows, then 3
    check_against_reference(dynamic_dwconv, x, weight, 1e-13)


def test_any_strides():
    x, weight = make_inputs((2, 6, 8, 10), 3, 3)
    x = x.to(memory_format=torch.channels_last)[..., ::2, 1:]
    weight = weight.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    weight = weight[..., ::2, 1:]
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    check_against_reference(dynamic_dwconv, x, weight, 1e-13)


def test_gradients_by_finite_differences():
    x, weight = make_inputs((2, 4, 3, 5), 2, 3)
    assert torch.autograd.gradcheck(dynamic_dwconv, (x.requires_grad_(), weight.requires_grad_()))


def test_half_precision_is_summed_in_float32():
    # 1 + 48 · 2⁻⁹: in bfloat16 each addend alone is lost beside 1.
    x = torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    weight = torch.full((1, 1, 7, 7, 7, 7), 2.0**-9, dtype=torch.bfloat16)
    weight[:, :, 0, 0] = 1
    centre = dynamic_dwconv(x, weight)[0, 0, 3, 3]
    assert centre == torch.tensor(1 + 48 * 2.0**-9, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declaration_holds(dtype):
    x, weight = make_inputs((2, 4, 5, 6), 2, 3, dtype)
    # Values may differ between eager and compiled runs by rounding only, and here by nothing.
    torch.library.opcheck(
        torch.ops.dlgsanet.dynamic_dwconv, (x.requires_grad_(), weight.requires_grad_())
    )
    torch.library.opcheck(
        torch.ops.dlgsanet.dynamic_dwconv_backward,
        (torch.randn(x.shape).to(dtype), x.detach(), weight.detach()),
    )


def test_flops_are_counted():
    x, weight = make_inputs((2, 6, 5, 7), 3, 3, torch.float32)
    forward = 2 * (2 * 6 * 5 * 7) * 3 * 3
    with FlopCounterMode(display=False) as counter:
        out = dynamic_dwconv(x.requires_grad_(), weight.requires_grad_())
        assert counter.get_total_flops() == forward
        out.sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(
    ("x", "weight", "error", "names"),
    [
        (torch.rand(4, 3, 3), torch.rand(1, 2, 3, 3, 3, 3), ValueError, r"\(4, 3, 3\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(2, 2, 3, 3, 3, 3), ValueError, "batch"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 3, 3, 3, 4), ValueError, "picture size"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 4, 4, 3, 3), ValueError, "4x4"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 3, 5, 3, 3), ValueError, "3x5"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 3, 3, 3, 3, 3), ValueError, "4 channels"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 3, 3, 3, 3).double(), TypeError, "float64"),
        (
            torch.rand(1, 4, 3, 3),
            torch.rand(1, 2, 3, 3, 3, 3, device="meta"),
            ValueError,
            "on cpu and weight on meta",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, weight, error, names):
    with pytest.raises(error, match=names):
        dynamic_dwconv(x, weight)
