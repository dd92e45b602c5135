"""The dynamic depthwise convolution: every form against the reference, output and gradients."""

import functools
import gc
import importlib
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from definition import dynamic_convolution
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch.ops import backends, dynamic_dwconv, projected_dwconv, shifted_taps
from dlgsanet_arch.ops.plain import dynamic_dwconv_plain
from dlgsanet_arch.ops.reference import dynamic_dwconv_reference, projected_dwconv_reference

# (B, C, H, W), G, K: smaller than the kernel, H != W, one channel a filter, one filter for all.
SHAPES = [
    ((1, 4, 1, 1), 2, 7),
    ((2, 6, 1, 5), 3, 3),
    ((3, 6, 9, 4), 1, 5),
    ((1, 12, 13, 17), 12, 7),
    ((2, 8, 6, 31), 2, 11),
    ((2, 4, 5, 6), 4, 1),
]
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
# Nothing in the batch, in the channels, in the height, in the width.
EMPTY = [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)]


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


def make_projected(shape, groups, kernel, dtype=torch.float64, device="cpu"):
    batch, _, height, width = shape
    depth = 5
    shapes = (shape, (batch, depth, height, width), (groups * kernel**2, depth))
    tensors = [torch.randn(each, dtype=torch.float64) for each in (*shapes, shapes[-1][:1])]
    return [each.to(device, dtype) for each in tensors]


def projected(kernel, function=projected_dwconv):
    return functools.partial(function, kernel=kernel)


def output_and_gradients(function, inputs, grad):
    inputs = [each.detach().requires_grad_() for each in inputs]
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad.to(out)))


def check_against_reference(function, inputs, tolerance, reference=dynamic_dwconv_reference):
    grad = torch.randn(inputs[0].shape, dtype=torch.float64).to(inputs[0])
    actual = output_and_gradients(function, inputs, grad)
    wide = output_and_gradients(reference, [each.double() for each in inputs], grad)
    names = ("output", "grad x", "grad hidden", "grad weight", "grad bias")
    if len(inputs) == 2:
        names = ("output", "grad x", "grad weight")
    for name, ours, judge in zip(names, actual, wide, strict=True):
        assert ours.dtype == inputs[0].dtype
        error = (ours.double() - judge).abs().max() / judge.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


def check_projected(inputs, kernel, tolerance):
    reference = projected(kernel, projected_dwconv_reference)
    check_against_reference(projected(kernel), inputs, tolerance, reference)


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_reference_is_the_formula(shape, groups, kernel):
    x, weight = make_inputs(shape, groups, kernel)
    expected = torch.from_numpy(dynamic_convolution(x.numpy(), weight.numpy()))
    torch.testing.assert_close(dynamic_dwconv_reference(x, weight), expected)


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_projected_reference_is_the_formula(shape, groups, kernel):
    x, hidden, weight, bias = make_projected(shape, groups, kernel)
    filters = nn.functional.conv2d(hidden, weight[:, :, None, None], bias)
    filters = filters.unflatten(1, (groups, kernel, kernel))
    expected = torch.from_numpy(dynamic_convolution(x.numpy(), filters.numpy()))
    actual = projected_dwconv_reference(x, hidden, weight, bias, kernel)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_operator_equals_reference(shape, groups, kernel, dtype):
    x, weight = make_inputs(shape, groups, kernel, dtype)
    check_against_reference(dynamic_dwconv, (x, weight), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_projected_operator_equals_reference(shape, groups, kernel, dtype):
    check_projected(make_projected(shape, groups, kernel, dtype), kernel, TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_operators_equal_reference_on_cuda(shape, groups, kernel, dtype):
    inputs = make_inputs(shape, groups, kernel, dtype, "cuda")
    check_against_reference(dynamic_dwconv, inputs, TOLERANCES[dtype])
    inputs = make_projected(shape, groups, kernel, dtype, "cuda")
    check_projected(inputs, kernel, TOLERANCES[dtype])


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_shifted_taps_serve_what_other_backends_take(shape, groups, kernel, monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_: shifted_taps)
    check_against_reference(dynamic_dwconv, make_inputs(shape, groups, kernel), 1e-13)
    check_projected(make_projected(shape, groups, kernel), kernel, 1e-13)


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_plain_form_equals_reference(shape, groups, kernel):
    x, weight = make_inputs(shape, groups, kernel)
    check_against_reference(dynamic_dwconv_plain, (x, weight), 1e-13)


def test_strips_change_nothing(monkeypatch):
    x, weight = make_inputs((2, 6, 23, 9), 3, 7)
    monkeypatch.setattr(backends, "choose", lambda *_: shifted_taps)
    monkeypatch.setattr(shifted_taps, "CPU_STRIP_ELEMENTS", 2 * 6 * 9 * 4)  # 4 rows, then 3
    check_against_reference(dynamic_dwconv, (x, weight), 1e-13)


def test_strips_of_projected_filters_change_nothing(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_: shifted_taps)
    monkeypatch.setattr(shifted_taps, "CPU_PROJECTED_STRIP_ELEMENTS", 2 * 6 * 9 * 4)
    check_projected(make_projected((2, 6, 23, 9), 3, 7), 7, 1e-13)


def test_any_strides():
    x, weight = make_inputs((2, 6, 8, 10), 3, 3)
    x = x.to(memory_format=torch.channels_last)[..., ::2, 1:]
    weight = weight.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    weight = weight[..., ::2, 1:]
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    check_against_reference(dynamic_dwconv, (x, weight), 1e-13)


def test_any_strides_of_the_taps():
    x, weight = make_inputs((2, 6, 5, 4), 3, 3)
    check_against_reference(dynamic_dwconv, (x, weight.transpose(2, 3)), 1e-13)


def test_any_strides_of_what_is_projected():
    x, hidden, weight, bias = make_projected((2, 6, 8, 10), 3, 3)
    x = x.to(memory_format=torch.channels_last)[..., ::2, 1:]
    hidden = hidden.mT.contiguous().mT[..., ::2, 1:]
    weight = weight.mT.contiguous().mT
    bias = bias.repeat_interleave(2)[::2]
    assert not any(each.is_contiguous() for each in (x, hidden, weight, bias))
    check_projected((x, hidden, weight, bias), 3, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_of_each_map_is_kept(dtype):
    x, hidden, weight, bias = make_projected((2, 6, 8, 10), 3, 3, dtype)
    for x_format, hidden_format in itertools.product(
        (torch.contiguous_format, torch.channels_last), repeat=2
    ):
        inputs = (
            x.contiguous(memory_format=x_format),
            hidden.contiguous(memory_format=hidden_format),
        )
        out, grad_x, grad_hidden, *_ = output_and_gradients(
            projected(3), (*inputs, weight, bias), torch.ones_like(x)
        )
        assert out.is_contiguous(memory_format=x_format)
        assert grad_x.is_contiguous(memory_format=x_format)
        assert grad_hidden.is_contiguous(memory_format=hidden_format)


def test_gradients_by_finite_differences():
    x, weight = make_inputs((2, 4, 3, 5), 2, 3)
    assert torch.autograd.gradcheck(dynamic_dwconv, (x.requires_grad_(), weight.requires_grad_()))


def test_projected_gradients_by_finite_differences():
    inputs = [each.requires_grad_() for each in make_projected((2, 4, 2, 3), 2, 3)]
    assert torch.autograd.gradcheck(projected(3), inputs)


def test_half_precision_is_summed_in_float32():
    # 1 + 48 · 2⁻⁹: in bfloat16 each addend alone is lost beside 1.
    x = torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    weight = torch.full((1, 1, 7, 7, 7, 7), 2.0**-9, dtype=torch.bfloat16)
    weight[:, :, 0, 0] = 1
    centre = dynamic_dwconv(x, weight)[0, 0, 3, 3]
    assert centre == torch.tensor(1 + 48 * 2.0**-9, dtype=torch.bfloat16)


def test_half_precision_is_projected_in_float32():
    # The same addends, in the filter and in the sum over taps.
    ones = torch.ones(1, 48, 7, 7, dtype=torch.bfloat16)
    small, one = torch.full((1, 48), 2.0**-9, dtype=torch.bfloat16), ones[0, 0, 0, :1]
    expected = torch.tensor(1 + 48 * 2.0**-9, dtype=torch.bfloat16)
    assert projected_dwconv(ones[:, :1], ones, small, one, 1)[0, 0, 3, 3] == expected
    weight = small[0, 0].repeat(49, 1)
    weight[0] = 1
    centre = projected_dwconv(ones[:, :1], ones[:, :1], weight, 0 * weight[:, 0], 7)[0, 0, 3, 3]
    assert centre == expected


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_declaration_holds(dtype):
    x, hidden, weight, bias = make_projected((2, 4, 5, 6), 2, 3, dtype)
    inputs = (x.to(memory_format=torch.channels_last), hidden, weight, bias)
    torch.library.opcheck(
        torch.ops.dlgsanet.projected_dwconv_backward, (torch.randn(x.shape).to(dtype), *inputs, 3)
    )
    inputs = [each.requires_grad_() for each in inputs]
    torch.library.opcheck(torch.ops.dlgsanet.projected_dwconv, (*inputs, 3))


def test_flops_are_counted():
    x, weight = make_inputs((2, 6, 5, 7), 3, 3, torch.float32)
    forward = 2 * (2 * 6 * 5 * 7) * 3 * 3
    with FlopCounterMode(display=False) as counter:
        out = dynamic_dwconv(x.requires_grad_(), weight.requires_grad_())
        assert counter.get_total_flops() == forward
        out.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_projected_flops_are_counted():
    inputs = [each.requires_grad_() for each in make_projected((2, 6, 5, 7), 3, 3, torch.float32)]
    convolution = 2 * (2 * 6 * 5 * 7) * 3 * 3
    projection = 2 * (2 * 5 * 7) * (3 * 3 * 3) * 5
    with FlopCounterMode(display=False) as counter:
        out = projected_dwconv(*inputs, 3)
        assert counter.get_total_flops() == convolution + projection
        out.sum().backward()
    # Two gradients of the convolution; the filters once more, and two gradients of the projection.
    assert counter.get_total_flops() == 3 * convolution + 4 * projection


@pytest.mark.parametrize(
    ("x", "weight", "names"),
    [
        (torch.rand(4, 3, 3), torch.rand(1, 2, 3, 3, 3, 3), r"\(4, 3, 3\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(2, 2, 3, 3, 3, 3), r"batch.*\(2, 2, 3, 3, 3, 3\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 3, 3, 3, 4), r"size.*\(1, 2, 3, 3, 3, 4\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 4, 4, 3, 3), r"odd.*\(1, 2, 4, 4, 3, 3\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 3, 5, 3, 3), r"square.*\(1, 2, 3, 5, 3, 3\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 3, 3, 3, 3, 3), r"4 channels.*\(1, 4, 3, 3\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 0, 3, 3, 3, 3), r"4 channels.*\(1, 4, 3, 3\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(1, 2, 3, 3, 3, 3).double(), "weight torch.float64"),
        (torch.ones(1, 4, 3, 3).int(), torch.ones(1, 2, 3, 3, 3, 3).int(), "x torch.int32"),
        (
            torch.rand(1, 4, 3, 3),
            torch.rand(1, 2, 3, 3, 3, 3, device="meta"),
            "on cpu and weight on meta|x on cpu, weight on meta",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, weight, names):
    with pytest.raises(ValueError, match=names):
        dynamic_dwconv(x, weight)


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"x": torch.rand(4, 3, 5)}, r"\(B, C or D, H, W\).*x \(4, 3, 5\)"),
        ({"hidden": torch.rand(2, 3, 5)}, r"hidden \(2, 3, 5\)"),
        ({"weight": torch.rand(18, 2, 1, 1)}, r"weight \(18, 2, 1, 1\)"),
        ({"bias": torch.rand(18, 1)}, r"bias \(18, 1\)"),
        ({"x": torch.rand(2, 4, 3, 5)}, r"batch.*x \(2, 4, 3, 5\), hidden \(1, 2, 3, 5\)"),
        ({"hidden": torch.rand(1, 2, 3, 6)}, r"picture size.*hidden \(1, 2, 3, 6\)"),
        ({"weight": torch.rand(18, 3)}, r"weight does not fit.*weight \(18, 3\)"),
        ({"bias": torch.rand(9)}, r"weight does not fit.*bias \(9,\)"),
        ({"kernel": 2}, r"odd.*kernel 2"),
        ({"kernel": 0}, r"odd.*kernel 0"),
        ({"kernel": 5}, r"K² rows a group.*weight \(18, 2\).*kernel 5"),
        ({"x": torch.rand(1, 5, 3, 5)}, r"5 channels.*2 filter groups.*\(1, 5, 3, 5\)"),
        ({"weight": torch.rand(0, 2), "bias": torch.rand(0)}, r"4 channels.*0 filter groups"),
        ({"hidden": torch.rand(1, 2, 3, 5).half()}, "x torch.float32, hidden torch.float16"),
        ({"bias": torch.rand(18).double()}, "bias torch.float64"),
        ({"weight": torch.rand(18, 2, device="meta")}, "weight on meta"),
    ],
)
def test_projected_inputs_that_do_not_fit_are_refused(changed, names):
    fitting = {
        "x": torch.rand(1, 4, 3, 5),
        "hidden": torch.rand(1, 2, 3, 5),
        "weight": torch.rand(18, 2),
        "bias": torch.rand(18),
        "kernel": 3,
    }
    projected_dwconv(**fitting)
    with pytest.raises(ValueError, match=names):
        projected_dwconv(**{**fitting, **changed})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_in_makes_nothing(shape, layout):
    for function, inputs in (
        (dynamic_dwconv, make_inputs(shape, 2, 3)),
        (projected(3), make_projected(shape, 2, 3)),
    ):
        inputs[0].data = inputs[0].contiguous(memory_format=layout)
        out, *gradients = output_and_gradients(function, inputs, torch.zeros(shape))
        assert out.shape == shape
        for each, like in zip(gradients, inputs, strict=True):
            assert torch.equal(each, torch.zeros_like(like))


def test_autocast_decides_the_dtype():
    inputs = make_projected((2, 6, 5, 7), 3, 3, torch.float32)
    grad = torch.randn(inputs[0].shape)
    with torch.autocast("cpu", torch.bfloat16):
        actual = output_and_gradients(projected(3), inputs, grad)
        # One in half precision already, as after a convolution, and what autocast leaves alone.
        mixed = projected_dwconv(inputs[0], inputs[1].bfloat16(), *inputs[2:], 3)
        wide = projected_dwconv(*(each.double() for each in inputs), 3)
    expected = output_and_gradients(projected(3), [each.bfloat16() for each in inputs], grad)
    assert actual[0].dtype == mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(mixed, expected[0])
    for ours, judge in zip(actual[1:], expected[1:], strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, judge.float())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend):
    torch.compiler.reset()
    for function, inputs in (
        (dynamic_dwconv, make_inputs((2, 6, 5, 7), 3, 3, torch.float32)),
        (projected(3), make_projected((2, 6, 5, 7), 3, 3, torch.float32)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        grad = torch.randn(inputs[0].shape)
        expected = output_and_gradients(function, inputs, grad)
        for ours, judge in zip(output_and_gradients(compiled, inputs, grad), expected, strict=True):
            torch.testing.assert_close(ours, judge)


class Layer(nn.Module):
    """A layer whose parameters project its filters."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x, hidden):
        return projected_dwconv(x, hidden, self.weight, self.bias, 3)


def test_export_has_plain_operators_for_any_size():
    x, hidden, weight, bias = make_projected((2, 6, 5, 7), 3, 3)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("w")}
    exported = torch.export.export(
        Layer(weight, bias), (x, hidden), dynamic_shapes={"x": sizes, "hidden": sizes}
    )
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called
    assert not [each for each in called if "dlgsanet" in str(each)]
    x, hidden, *_ = make_projected((3, 6, 8, 4), 3, 3)
    expected = projected_dwconv_reference(x, hidden, weight, bias, 3)
    torch.testing.assert_close(exported.module()(x, hidden), expected)


def test_checkpointing_changes_no_gradient():
    inputs = make_projected((2, 6, 5, 7), 3, 3, torch.float32)
    grad = torch.randn(inputs[0].shape)
    expected = output_and_gradients(projected(3), inputs, grad)
    recomputed = functools.partial(checkpoint, projected(3), use_reentrant=False)
    for ours, judge in zip(output_and_gradients(recomputed, inputs, grad), expected, strict=True):
        torch.testing.assert_close(ours, judge)


def test_distributed_training_gets_every_gradient(tmp_path):
    x, hidden, weight, bias = make_projected((2, 6, 5, 7), 3, 3, torch.float32)
    expected = output_and_gradients(projected(3), (x, hidden, weight, bias), torch.ones(x.shape))
    torch.distributed.init_process_group(
        "gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1
    )
    module = Layer(weight, bias)
    try:
        nn.parallel.DistributedDataParallel(module)(x, hidden).sum().backward()
        # Freed after the group, it would wait for gloo's threads with the lock that they wait for.
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(module.weight.grad, expected[3])
    torch.testing.assert_close(module.bias.grad, expected[4])


def largest_and_peak(function):
    """Return the largest piece of memory and the most at once, in bytes, that a call asks for."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(sizes), max(itertools.accumulate(sizes))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_are_never_in_memory(dtype, layout):
    x, *others = make_projected((1, 12, 320, 400), 2, 7, dtype)
    inputs = [x.contiguous(memory_format=layout).requires_grad_(), *others]
    inputs[1:] = [each.requires_grad_() for each in others]
    grad = torch.ones_like(x)

    def step(function):
        torch.autograd.grad(function(*inputs, 7), inputs, grad)

    filters = 320 * 400 * 2 * 49 * 4  # in float32, as they are summed
    if dtype == torch.float32 and layout == torch.contiguous_format:  # memory is seen at all
        assert largest_and_peak(lambda: step(projected_dwconv_reference))[0] >= filters
    largest, peak = largest_and_peak(lambda: step(projected_dwconv))
    print(f"map {filters / 1e6:.1f} MB, largest {largest / 1e6:.1f}, peak {peak / 1e6:.1f}")
    assert largest < filters / 3
    assert peak < 1.5 * filters  # with the map and its gradient, over 2


@pytest.fixture
def _nothing_said_yet():
    backends._warn_once.cache_clear()
    backends._has_triton.cache_clear()
    yield
    backends._warn_once.cache_clear()
    backends._has_triton.cache_clear()


@pytest.mark.usefixtures("_nothing_said_yet")
@pytest.mark.parametrize(
    ("device", "dtype", "kernel", "triton", "reason"),
    [
        ("mps", torch.float32, 7, True, "no kernel for mps"),
        ("cuda", torch.float64, 7, True, "no kernel for torch.float64"),
        ("cuda", torch.float32, 13, True, "over 11 wide, got 13"),
        ("cuda", torch.float32, 7, False, "Triton is not installed"),
    ],
)
def test_fall_back_is_said_once(device, dtype, kernel, triton, reason, monkeypatch):
    found = object() if triton else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    x = SimpleNamespace(device=torch.device(device), dtype=dtype)
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch: .*{reason}"):
        assert backends.choose(x, kernel) is shifted_taps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(x, kernel) is shifted_taps


@pytest.mark.usefixtures("_nothing_said_yet")
def test_backend_that_serves_is_chosen_in_silence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
            assert backends.choose(x, 11) == "dlgsanet_arch.ops.triton_kernels"
        for device in ("cpu", "meta"):
            for dtype in (torch.float64, torch.bfloat16):
                x = SimpleNamespace(device=torch.device(device), dtype=dtype)
                assert backends.choose(x, 13) != "dlgsanet_arch.ops.triton_kernels"
