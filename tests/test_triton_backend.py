"""The Triton kernels against the reference: in the interpreter of Triton, and on a GPU.

What is interpreted runs in a separate process, by the fixture `interpreted`.
"""

import importlib.util
import itertools
from unittest import mock

import pytest
import torch
from helpers import run

from dlgsanet_arch.ops import projected_dwconv
from dlgsanet_arch.ops.reference import projected_dwconv_reference

LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    # Every second row of a larger map, from its second column and channel on: nothing is aligned.
    "sliced": lambda x: _slice_of_a_larger_map(x, torch.contiguous_format),
    "sliced channels last": lambda x: _slice_of_a_larger_map(x, torch.channels_last),
}
# Tiles are 8 pixels wide and 4 high, 2 in float32: below, at and above; smaller than the kernel;
# H != W. Tiny's and Large's layers; groups of channels that vectors of 2 do not divide.
# (B, C, H, W), G, K, D, dtype, layout of x, of the hidden features, of the arriving gradient.
CASES = [
    ((1, 12, 3, 9), 2, 3, 12, "float32", "channels last", "channels last", "channels last"),
    ((1, 4, 2, 3), 2, 5, 5, "float32", "channels last", "nchw", "sliced"),
    ((1, 48, 1, 2), 8, 7, 12, "float16", "nchw", "channels last", "nchw"),
    ((1, 90, 1, 2), 15, 7, 22, "bfloat16", "channels last", "channels last", "channels last"),
    ((1, 2, 1, 2), 1, 11, 2, "float16", "nchw", "nchw", "transposed"),
    ((2, 4, 5, 9), 2, 1, 4, "bfloat16", "sliced", "sliced", "nchw"),
    ((1, 30, 2, 4), 15, 3, 17, "float16", "transposed", "transposed", "channels last"),
    ((1, 9, 1, 3), 1, 3, 2, "float32", "sliced", "channels last", "nchw"),
    ((1, 10, 3, 1), 1, 1, 1, "float16", "channels last", "sliced", "sliced"),
    ((2, 4, 2, 3), 2, 3, 3, "float32", "sliced channels last", "transposed", "channels last"),
]
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1.5e-3}
NAMES = ("output", "grad x", "grad hidden", "grad weight", "grad bias")


def _slice_of_a_larger_map(x, layout):
    batch, channels, height, width = x.shape
    larger = torch.full((batch, channels + 1, 2 * height, width + 1), torch.nan).to(x)
    larger = larger.contiguous(memory_format=layout)
    part = larger[:, 1:, ::2, 1:]
    return part.copy_(x)


def make_tensors(shape, groups, kernel, depth, dtype, device="cpu"):
    """Return the arriving gradient, x, hidden, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    batch, _, height, width = shape
    shapes = (shape, shape, (batch, depth, height, width), (groups * kernel**2, depth))
    tensors = [torch.randn(each, generator=generator) for each in (*shapes, shapes[-1][:1])]
    return [each.to(device, dtype) for each in tensors]


def judge(reference, grad, *inputs):
    """Return the reference's output and gradients in float64."""
    inputs = [each.detach().double().requires_grad_() for each in inputs]
    out = reference(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


def check(names, actual, expected, inputs, tolerance):
    """Compare values by the largest error over the largest value; dtypes and layouts exactly."""
    for name, ours, exact, like in zip(names, actual, expected, inputs, strict=True):
        assert ours.dtype == like.dtype, f"{name} is {ours.dtype}"
        assert ours.stride() == torch.empty_like(like).stride(), f"{name} has another layout"
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e} for {like.dtype}"


# The functions up to "The tests" run in the interpreting process.
def _kernels():
    from dlgsanet_arch.ops import triton_backend

    return triton_backend


def check_case(shape, groups, kernel, depth, dtype, x_layout, hidden_layout, grad_layout):
    kernels = _kernels()
    grad, x, hidden, weight, bias = make_tensors(
        shape, groups, kernel, depth, getattr(torch, dtype)
    )
    grad, x = LAYOUTS[grad_layout](grad), LAYOUTS[x_layout](x)
    hidden = LAYOUTS[hidden_layout](hidden)
    weight = weight.mT.contiguous().mT
    inputs = (x, hidden, weight, bias)
    actual = (
        kernels.projected_forward(*inputs, kernel),
        *kernels.projected_backward(grad, *inputs, kernel),
    )
    expected = judge(lambda *each: projected_dwconv_reference(*each, kernel), grad, *inputs)
    check(NAMES, actual, expected, (x, *inputs), TOLERANCES[dtype])


def check_expanded_gradient():
    # The gradient of sum(): one number for all pixels, all strides zero.
    kernels = _kernels()
    _, x, hidden, weight, bias = inputs = make_tensors((1, 2, 2, 3), 1, 3, 2, torch.float32)
    grad = torch.ones(()).expand(x.shape)
    actual = kernels.projected_backward(grad, x, hidden, weight, bias, 3)
    expected = judge(lambda *each: projected_dwconv_reference(*each, 3), grad, *inputs[1:])
    check(NAMES[1:], actual, expected[1:], inputs[1:], 1e-6)


def check_shares_of_tiles():
    # Three tiles in two shares.
    with mock.patch.object(_kernels(), "PROJECTION_SPLITS", 2):
        check_case((1, 2, 5, 3), 1, 3, 2, "float32", "nchw", "nchw", "nchw")


def check_full_precision():
    # Two taps at a time: the second block of a column's three shares one with the first.
    with mock.patch.object(_kernels(), "dot_precision", return_value="ieee"):
        check_case((1, 6, 2, 3), 1, 3, 5, "float32", "nchw", "nchw", "nchw")


def check_out_of_reach():
    # A row of infinities, which no tap reaches from the rows above the last two.
    grad, x, *others = make_tensors((1, 2, 4, 3), 1, 3, 2, torch.float32)
    x[:, :, 3] = torch.inf
    _, grad_hidden, *_ = _kernels().projected_backward(grad, x, *others, 3)
    assert grad_hidden[:, :, :2].isfinite().all()
    assert not grad_hidden[:, :, 2:].isfinite().any()


def check_same_bits():
    kernels = _kernels()
    grad, *inputs = make_tensors((1, 2, 5, 3), 1, 3, 3, torch.float32)
    first = kernels.projected_backward(grad, *inputs, 3)
    second = kernels.projected_backward(grad, *inputs, 3)
    for name, one, other in zip(NAMES[1:], first, second, strict=True):
        assert torch.equal(one, other), name


def check_wide_offsets():
    # 64-bit offsets, as for tensors of more than 2**31 elements.
    kernels = _kernels()
    with mock.patch.object(kernels, "offset_type", return_value=kernels.tl.int64):
        check_case((2, 2, 3, 2), 1, 3, 2, "float32", "nchw", "channels last", "nchw")


def check_precision():
    kernels, cudnn = _kernels(), torch.backends.cudnn
    assert kernels.dot_precision(torch.float16) == "tf32"
    for allowed, precision in ((False, "ieee"), (True, "tf32")):
        cudnn.allow_tf32 = allowed
        assert kernels.dot_precision(torch.float32) == precision
    if hasattr(cudnn, "conv"):
        for precision in ("ieee", "tf32"):
            cudnn.conv.fp32_precision = precision
            assert kernels.dot_precision(torch.float32) == precision


def check_index():
    kernels = _kernels()
    small = torch.empty(1, 2, 3, 4)
    assert kernels.offset_type(small, small) == kernels.tl.int32
    large = torch.empty(1, device="meta").as_strided((1, 48, 7000, 7000), (0, 7000**2, 7000, 1))
    assert kernels.offset_type(small, large) == kernels.tl.int64


# The tests.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_reference(interpreted, case):
    interpreted(check_case, *case)


@pytest.mark.parametrize(
    "check",
    [
        check_expanded_gradient,
        check_shares_of_tiles,
        check_full_precision,
        check_out_of_reach,
        check_same_bits,
        check_wide_offsets,
        check_precision,
        check_index,
    ],
)
def test_kernels_hold_for(interpreted, check):
    interpreted(check)


def test_kernels_compile_without_a_gpu(repository):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: requirements-test.txt names it for Linux")
    arguments = ["--target", "90", "--dtype", "bfloat16", "--only", "convolve"]
    finished = run([repository / "scripts" / "compile_kernels.py", *arguments], repository)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "4 programs, 0 of them spill" in finished.stdout


# (B, C, H, W), G, K, D: Tiny to 1280x720, a batch of its training patches, Large with odd sizes.
TINY = ((1, 48, 180, 320), 8, 7, 12)
PATCHES = ((16, 48, 48, 48), 8, 7, 12)
LARGE = ((2, 90, 101, 67), 15, 7, 22)
WIDEST = ((1, 24, 45, 70), 2, 11, 7)
REAL_TOLERANCES = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 1e-2, "float16": 2e-3}
# Kernels are compiled for G, K, D, precision and one of two layouts: 4 for each set of these.
REAL = [
    *((TINY, *each) for each in itertools.product(REAL_TOLERANCES, ["nchw", "channels last"])),
    *((PATCHES, "bfloat16", layout) for layout in LAYOUTS),
    (LARGE, "bfloat16", "nchw"),
    (LARGE, "bfloat16", "channels last"),
    (LARGE, "float32", "channels last"),
    (WIDEST, "float16", "nchw"),
]


@pytest.fixture
def _nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.gpu
@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize(("sizes", "precision", "layout"), REAL, ids=str)
def test_real_sizes_on_cuda(sizes, precision, layout):
    shape, groups, kernel, depth = sizes
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = getattr(torch, precision, torch.float32)
    grad, x, hidden, weight, bias = make_tensors(shape, groups, kernel, depth, dtype, "cuda")
    x, hidden = LAYOUTS[layout](x), LAYOUTS[layout](hidden)
    inputs = [each.requires_grad_() for each in (x, hidden, weight, bias)]
    out = projected_dwconv(*inputs, kernel)
    actual = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    expected = judge(lambda *each: projected_dwconv_reference(*each, kernel), grad, *inputs)
    check(NAMES, actual, expected, (x, *inputs), REAL_TOLERANCES[precision])


@pytest.mark.gpu
def test_gradients_have_the_same_bits_on_cuda():
    grad, *inputs = make_tensors((16, 48, 48, 48), 8, 7, 12, torch.bfloat16, "cuda")
    inputs = [each.requires_grad_() for each in inputs]
    first, second = (
        torch.autograd.grad(projected_dwconv(*inputs, 7), inputs, grad) for _ in range(2)
    )
    for name, one, other in zip(NAMES[1:], first, second, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "channels last"])
def test_new_size_compiles_nothing_on_cuda(layout, monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *args, **kwargs: compiled.append(kwargs)
    )

    def run(batch, height, width):
        # A depth that no other test has, so that the first size does compile.
        shape = (batch, 40, height, width)
        grad, x, hidden, weight, bias = make_tensors(shape, 4, 5, 9, torch.float32, "cuda")
        x, hidden, grad = (LAYOUTS[layout](each) for each in (x, hidden, grad))
        inputs = [each.requires_grad_() for each in (x, hidden, weight, bias)]
        torch.autograd.grad(projected_dwconv(*inputs, 5), inputs, grad)

    run(1, 64, 64)
    assert len(compiled) == 4
    for size in [(2, 64, 64), (1, 45, 83), (3, 16, 16), (1, 128, 1), (1, 1, 31), (5, 7, 256)]:
        run(*size)
    assert len(compiled) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_cuda(dtype):
    grad, *inputs = make_tensors((2, 48, 40, 56), 8, 7, 12, torch.float32, "cuda")
    inputs = [each.requires_grad_() for each in inputs]
    with torch.autocast("cuda", dtype):
        out = projected_dwconv(*inputs, 7)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, inputs, grad.to(dtype))
    expected = judge(lambda *each: projected_dwconv_reference(*each, 7), grad, *inputs)
    tolerance = 2 * REAL_TOLERANCES[str(dtype).removeprefix("torch.")]
    check(NAMES[1:], gradients, expected[1:], inputs, tolerance)


@pytest.mark.gpu
def test_filters_are_never_in_memory_on_cuda():
    grad, *inputs = make_tensors((1, 48, 360, 640), 8, 7, 12, torch.bfloat16, "cuda")
    inputs = [each.requires_grad_() for each in inputs]
    torch.autograd.grad(projected_dwconv(*inputs, 7), inputs, grad)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(projected_dwconv(*inputs, 7), inputs, grad)
    filters = 360 * 640 * 8 * 49 * 2
    assert torch.cuda.max_memory_allocated() - before < filters / 2


@pytest.mark.gpu
def test_forward_is_captured_in_a_cuda_graph():
    _, *inputs = make_tensors((1, 48, 60, 80), 8, 7, 12, torch.bfloat16, "cuda")
    expected = projected_dwconv(*inputs, 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = projected_dwconv(*inputs, 7)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
