"""The operators: each against its definition in float64, the output and every gradient."""

import contextlib
import functools
import gc
import importlib
import itertools
import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from definition import dynamic_convolution
from dispatch import Operators
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch import cpu, ops
from dlgsanet_arch.cpu import library
from dlgsanet_arch.ops import c_backend, dynamic, dynamic_dwconv, projected_dwconv, pytorch_backend
from dlgsanet_arch.ops.reference import dynamic_dwconv_reference, projected_dwconv_reference

needs_c = pytest.mark.skipif(bool(cpu.why_not()), reason=f"no C library: {cpu.why_not()}")


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan():
    """An output that is never written fails instead of passing by luck."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def define_normed(x, norm_weight, norm_bias, weight, bias=None):
    pixels = F.layer_norm(x.movedim(1, -1), norm_weight.shape, norm_weight, norm_bias, 1e-5)
    return F.conv2d(pixels.movedim(-1, 1), weight, bias)


def define_depthwise(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def define_gate(x, norm_weight, norm_bias, weight, filters):
    expanded = define_normed(x, norm_weight, norm_bias, weight)
    a, b = define_depthwise(expanded, filters).chunk(2, 1)
    return F.gelu(a) * b


def define_attention(qkv, temperature, heads, activation):
    q, k, v = qkv.flatten(2).unflatten(1, (3, heads, -1)).unbind(1)
    q, k = (F.normalize(each, dim=-1, eps=1e-12) for each in (q, k))
    activations = {"relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid}
    act = activations.get(activation, functools.partial(torch.softmax, dim=-1))
    return (act(q @ k.mT * temperature) @ v).flatten(1, 2).unflatten(2, qkv.shape[2:])


class Operator(NamedTuple):
    """A public function and what it must equal.

    `tensors` gives the shapes from that of x and the sizes of a case, None for a bias left out; of
    these sizes, `settings` are what the function takes after its tensors.
    """

    ours: Callable[..., torch.Tensor]
    definition: Callable[..., torch.Tensor]
    tensors: Callable[..., list[tuple[int, ...] | None]]
    settings: Callable[..., tuple[Any, ...]] = lambda *_: ()


def _weights(x, outs, bias=True):
    return [(outs, x[1], 1, 1), (outs,) if bias else None]


OPERATORS = {
    "pointwise": Operator(ops.pointwise, F.conv2d, lambda x, *sizes: [x, *_weights(x, *sizes)]),
    "normed_pointwise": Operator(
        ops.normed_pointwise,
        define_normed,
        lambda x, *sizes: [x, x[1:2], x[1:2], *_weights(x, *sizes)],
    ),
    "depthwise": Operator(
        ops.depthwise,
        define_depthwise,
        lambda x, k, bias=True: [x, (x[1], 1, k, k), x[1:2] if bias else None],
    ),
    "gdfn_gate": Operator(
        ops.gdfn_gate,
        define_gate,
        lambda x, outs, k: [x, x[1:2], x[1:2], (outs, x[1], 1, 1), (outs, 1, k, k)],
    ),
    "channel_attention": Operator(
        ops.channel_attention,
        define_attention,
        lambda x, heads, _: [x, (heads, 1, 1)],
        lambda heads, activation: (heads, activation),
    ),
    "projected_dwconv": Operator(
        projected_dwconv,
        projected_dwconv_reference,
        lambda x, g, k, depth: [x, (x[0], depth, *x[2:]), (g * k**2, depth), (g * k**2,)],
        lambda g, k, depth: (k,),
    ),
    "dynamic_dwconv": Operator(
        dynamic_dwconv,
        dynamic_dwconv_reference,
        lambda x, g, k: [x, (x[0], g, k, k, *x[2:])],
    ),
}
# A small case of each.
SMALL = {
    "pointwise": ((2, 6, 5, 7), 4),
    "normed_pointwise": ((2, 6, 5, 7), 4),
    "depthwise": ((2, 6, 5, 7), 3),
    "gdfn_gate": ((2, 6, 5, 7), 8, 3),
    "channel_attention": ((2, 18, 5, 7), 2, "gelu"),
    "projected_dwconv": ((2, 6, 5, 7), 3, 3, 5),
    "dynamic_dwconv": ((2, 6, 5, 7), 3, 3),
}
IN_C = [name for name in SMALL if name != "dynamic_dwconv"]
# What each is declared as.
DECLARED = {
    **{name: (name,) for name in SMALL},
    "normed_pointwise": ("pointwise",),
    "channel_attention": ("head_sums", "head_apply"),
}


def each_of(function, tensors):
    """Apply a function to all tensors but a bias that is left out."""
    return [each if each is None else function(each) for each in tensors]


def make(name, *sizes, dtype=torch.float32):
    """Return the tensors of a case, None for a bias that is left out, and its settings."""
    operator, (x, *rest) = OPERATORS[name], sizes
    shapes = operator.tensors(x, *rest)
    return each_of(lambda shape: torch.randn(shape, dtype=dtype), shapes), operator.settings(*rest)


def output_and_gradients(function, tensors, settings=(), grad=None):
    """Return the output and the gradient of each tensor, given that of the output, or ones."""
    tensors = each_of(lambda each: each.detach().requires_grad_(), tensors)
    out = function(*tensors, *settings)
    grad = torch.ones((), dtype=out.dtype).expand(out.shape) if grad is None else grad
    given = [each for each in tensors if each is not None]
    return (out.detach(), *torch.autograd.grad(out, given, grad))


def assert_near(actual, expected, tolerance, dtype=torch.float32):
    """Compare the output and each gradient by its largest error over its largest value."""
    for i, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        what = f"gradient {i - 1}" if i else "output"
        assert ours.dtype == dtype, what
        assert ours.shape == exact.shape, what
        error, most = (ours.double() - exact).abs().max(), exact.abs().max()
        assert error <= tolerance * most + 1e-12, f"{what}: {error:.1e} beside {most:.1e}"


def check(name, tensors, settings, grad=None, tolerance=1e-5):
    """Compare float32 with the definition in float64 for the same values."""
    operator = OPERATORS[name]
    actual = output_and_gradients(operator.ours, tensors, settings, grad)
    *wide, wide_grad = each_of(torch.Tensor.double, [*tensors, grad])
    expected = output_and_gradients(operator.definition, wide, settings, wide_grad)
    assert_near(actual, expected, tolerance, tensors[0].dtype)
    return actual


@pytest.fixture(params=IN_C)
def name(request):
    """An operator that C computes, where a test does not name others."""
    if cpu.why_not():
        pytest.skip(f"no C library: {cpu.why_not()}")
    return request.param


def _planes_in_nan(x):
    """Whole channels of a larger map; between them, and in its other channels, is NaN."""
    batch, channels, height, width = x.shape
    larger = torch.full((batch, channels + 2, height * width + 37), torch.nan)
    part = larger[:, 1:-1, 19 : 19 + height * width].unflatten(2, (height, width))
    return part.copy_(x)


def _window_of_nan(x):
    """A window of a larger map of NaN, every second row."""
    batch, channels, height, width = x.shape
    larger = torch.full((batch + 1, channels + 1, 2 * height + 1, width + 3), torch.nan)
    return larger[1:, 1:, 1::2, 2:-1].copy_(x)


def _weight_in_nan(weight):
    """A weight between NaN."""
    count = weight.numel()
    return torch.full((count + 64,), torch.nan)[32 : 32 + count].view(weight.shape).copy_(weight)


LAYOUTS = {
    "planes": _planes_in_nan,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "window": _window_of_nan,
    "dense": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "one image": lambda x: x[:1].expand(x.shape),
}


def lay_out(layout, tensors):
    """Give the maps among these tensors a layout, and put the others between NaN."""
    x = tensors[0]

    def place(each):
        is_map = each.dim() == 4 and each.shape[2:] == x.shape[2:] and len(each) == len(x)
        return LAYOUTS[layout](each) if is_map else _weight_in_nan(each)

    return each_of(place, tensors)


GUARD = 64


@pytest.fixture
def guarded(monkeypatch):
    """Put what the operators allocate between guards, and see afterwards that none was touched."""
    if "SANITISED_KERNELS" in os.environ:  # the sanitiser guards all memory
        yield
        return
    plain, made = torch.Tensor.new_empty, []

    def new_empty(self, *size, **options):
        if not self.is_cpu or self.dtype != torch.float32:
            return plain(self, *size, **options)
        size = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        memory = torch.full((size.numel() + 2 * GUARD,), torch.nan)
        memory[:GUARD] = memory[-GUARD:] = 7
        made.append(memory)
        return memory[GUARD:-GUARD].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert made
    for memory in made:
        assert (memory[:GUARD] == 7).all()
        assert (memory[-GUARD:] == 7).all()


# Images of 1 pixel, of one row or column, around whole vectors (8, 16), blocks (64) and pieces
# (256), of several bands, slices and tiles; channels that fill no block of 6. x, then other sizes.
# fmt: off
CASES = {
    "pointwise": [
        ((1, 1, 1, 1), 1), ((3, 5, 1, 7), 7), ((5, 7, 8, 1), 13, False), ((1, 13, 7, 9), 90),
        ((1, 90, 8, 8), 6), ((3, 6, 5, 13), 48), ((1, 7, 1, 257), 1, False), ((3, 5, 150, 41), 7),
        ((1, 5, 37, 1001), 2), ((2, 90, 20, 31), 270),
    ],
    "depthwise": [
        ((1, 1, 1, 1), 1), ((3, 5, 1, 7), 3), ((5, 7, 8, 1), 5, False), ((1, 13, 9, 63), 7),
        ((3, 6, 5, 64), 3), ((1, 5, 3, 65), 9, False), ((3, 7, 150, 9), 7), ((2, 3, 150, 64), 3),
        ((1, 2, 20, 257), 33), ((1, 90, 3, 4), 5), ((1, 2, 70, 8), 33), ((1, 1, 13, 600), 1),
    ],
    "gdfn_gate": [
        ((5, 7, 1, 1), 10, 3), ((3, 5, 1, 7), 10, 1), ((5, 7, 8, 1), 14, 5),
        ((1, 13, 9, 63), 26, 3), ((3, 5, 150, 65), 2, 3), ((1, 5, 20, 257), 4, 7),
        ((3, 6, 60, 9), 4, 33), ((1, 90, 2, 64), 180, 9),
    ],
    "channel_attention": [
        (*sizes, activation)
        for sizes in [
            ((1, 3, 1, 1), 1), ((3, 18, 1, 7), 6), ((5, 21, 8, 1), 1), ((1, 39, 7, 9), 1),
            ((3, 90, 13, 20), 6), ((1, 270, 8, 33), 6), ((2, 42, 5, 13), 2),
        ]
        for activation in ("relu", "gelu", "sigmoid", "softmax")
    ],
    "projected_dwconv": [
        ((1, 1, 1, 1), 1, 1, 1), ((1, 1, 1, 1), 1, 7, 2), ((3, 6, 1, 7), 1, 3, 5),
        ((5, 7, 8, 1), 7, 5, 2), ((1, 13, 9, 63), 1, 7, 3), ((3, 12, 5, 64), 2, 3, 13),
        ((1, 5, 3, 65), 5, 9, 1), ((3, 6, 150, 9), 1, 3, 4), ((5, 2, 150, 8), 2, 5, 3),
        ((1, 14, 5, 257), 2, 3, 5), ((1, 26, 4, 7), 2, 7, 5), ((1, 90, 6, 7), 15, 7, 22),
        ((1, 2, 40, 20), 1, 33, 2), ((1, 1, 3, 300), 1, 33, 1), ((5, 2, 420, 3), 1, 3, 1),
        ((1, 2, 3, 530), 1, 3, 2),
    ],
}
# fmt: on
CASES["normed_pointwise"] = CASES["pointwise"]
CASES["pointwise"] = [*CASES["pointwise"], ((1, 3, 37, 1001), 2)]
CASES = [(name, *sizes) for name, cases in CASES.items() for sizes in cases]


@needs_c
@pytest.mark.usefixtures("variant", "guarded")
@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda at: " ".join(map(str, CASES[at])))
def test_c_equals_the_definition(at):
    name, *sizes = CASES[at]
    tensors, settings = make(name, *sizes)
    layouts = list(LAYOUTS)
    tensors = lay_out(layouts[at % 5], tensors)
    with Operators() as ran:
        out = OPERATORS[name].ours(*tensors, *settings)
    assert ran.ours == {f"dlgsanet::{each}" for each in DECLARED[name]}
    check(name, tensors, settings, LAYOUTS[layouts[(2 * at + 1) % 5]](torch.randn_like(out)))
    check(name, tensors, settings)


@pytest.mark.usefixtures("variant", "guarded")
def test_any_layout_of_images_and_gradients(name):
    tensors, settings = make(name, *SMALL[name])
    tensors = lay_out("one image", tensors)  # the same values in every layout
    out = OPERATORS[name].ours(*tensors, *settings)
    grad = torch.randn_like(out)[:1].expand_as(out)
    exact = check(name, tensors, settings, grad)
    for layout, grad_layout in itertools.product(LAYOUTS, repeat=2):
        laid_out = lay_out(layout, tensors)
        actual = output_and_gradients(
            OPERATORS[name].ours, laid_out, settings, LAYOUTS[grad_layout](grad)
        )
        for ours, expected in zip(actual, exact, strict=True):
            assert torch.equal(ours, expected), (layout, grad_layout)
        if name == "projected_dwconv":  # it keeps layouts
            for ours, like in zip(actual, (laid_out[0], *laid_out), strict=True):
                assert ours.stride() == torch.empty_like(like).stride()


@needs_c
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("activation", ["relu", "gelu", "sigmoid", "softmax"])
def test_channels_of_zeros_have_finite_gradients(activation):
    (qkv, temperature), settings = make("channel_attention", (2, 36, 5, 7), 3, activation)
    qkv[0, 1] = qkv[1, 2] = qkv[0, 13] = qkv[0, 15] = 0  # of q; of k, beside the first and alone
    qkv[1, 20] = 1e-14  # under the floor, but not zero
    for dtype in (torch.float32, torch.float64):
        given = [qkv.to(dtype), temperature.to(dtype)]
        grad = torch.randn(2, 12, 5, 7, dtype=dtype)
        out, grad_qkv, grad_t = output_and_gradients(ops.channel_attention, given, settings, grad)
        wide = [each.double() for each in given]
        exact = output_and_gradients(define_attention, wide, settings, grad.double())
        assert_near((out, grad_t), exact[::2], 1e-5, dtype)
        # The gradients of zeros are those of others over 1e-12: compare each channel by its own.
        most = exact[1].abs().amax((0, 2, 3), keepdim=True)
        assert ((grad_qkv - exact[1]).abs() <= 1e-5 * most).all()


@needs_c
@pytest.mark.usefixtures("variant")
def test_gate_is_exact():
    """GELU and its slope over all that float32 can tell from 0 and from a."""
    a = torch.linspace(-12, 12, 24001)
    x = torch.stack([a, torch.ones_like(a)]).view(1, 2, 1, -1)
    ones = torch.ones(2, 1, 1, 1)
    grad = torch.ones(1, 1, 1, len(a))
    out = c_backend.gate(x, ones)
    grad_x, _ = c_backend.gate_backward(grad, x, ones)
    exact, grad_a = output_and_gradients(F.gelu, [a.double()])
    size = a.abs().clamp_min(1)
    assert ((out[0, 0, 0] - exact).abs() <= 3e-7 * size).all()
    assert ((grad_x[0, 0, 0] - grad_a).abs() <= 1e-6 * size).all()
    assert ((grad_x[0, 1, 0] - exact).abs() <= 3e-7 * size).all()


@pytest.mark.usefixtures("variant")
def test_one_image_does_not_see_another(name):
    """NaN in an image, as a diverging training has it, stays in that image."""
    tensors, settings = make(name, *THREADED[name])
    tensors[0][0, :, ::7, -1] = torch.nan
    maps = [i for i, each in enumerate(tensors) if each.shape[::2] == tensors[0].shape[::2]]
    grad = torch.randn_like(OPERATORS[name].ours(*tensors, *settings))
    grad[0, :, ::5, -1] = torch.nan
    out, *gradients = output_and_gradients(OPERATORS[name].ours, tensors, settings, grad)
    for each in (out, *(gradients[i] for i in maps)):
        assert each[0].isnan().any()
        assert each[1:].isfinite().all()


# Several bands, slices and heads.
THREADED = {
    "pointwise": ((3, 7, 90, 41), 13),
    "normed_pointwise": ((3, 7, 90, 41), 13),
    "depthwise": ((3, 7, 40, 41), 5),
    "gdfn_gate": ((3, 7, 70, 41), 14, 3),
    "channel_attention": ((3, 54, 40, 41), 6, "softmax"),
    "projected_dwconv": ((3, 12, 70, 30), 2, 5, 3),
}


@needs_c
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("openmp", [True, False], ids=["OpenMP", "own threads"])
@pytest.mark.parametrize("name", THREADED)
def test_threads_change_no_bit(name, openmp, threads, monkeypatch):
    if not openmp:
        monkeypatch.setattr(library, "_openmp", lambda: None)
    tensors, settings = make(name, *THREADED[name])
    grad = torch.randn_like(OPERATORS[name].ours(*tensors, *settings))
    threads(1)
    expected = check(name, tensors, settings, grad)
    for count in (1, 2, 3):
        threads(count)
        actual = output_and_gradients(OPERATORS[name].ours, tensors, settings, grad)
        assert all(map(torch.equal, actual, expected)), count


def operator_calls(name, dtype=torch.float32):
    """Return each forward operator and what it takes, and each backward and what that takes."""
    tensors, settings = make(name, *SMALL[name], dtype=dtype)
    given = dict.fromkeys(DECLARED[name], (*tensors, *settings))
    if name.endswith("pointwise"):
        given = {"pointwise": (tensors[0], *tensors[-2:], name != "pointwise")}
    elif name == "gdfn_gate":
        x, _, _, weight, filters = tensors
        given = {name: (x, weight, weight[:, 0, 0, 0].clone(), filters)}
    elif name == "channel_attention":
        qk, v = tensors[0].split([12, 6], 1)
        given = {"head_sums": (qk, 2), "head_apply": (torch.randn(2, 2, 3, 3), v)}
    forwards, backwards = [], []
    for own, arguments in given.items():
        forwards.append((getattr(torch.ops.dlgsanet, own).default, arguments))
        results = forwards[-1][0](*arguments)
        results = results if isinstance(results, tuple) else (results,)
        backward = getattr(torch.ops.dlgsanet, f"{own}_backward").default
        backwards.append((backward, (*map(torch.randn_like, results), *arguments)))
    return forwards, backwards


WITH_DTYPES = [(name, torch.float32) for name in IN_C]
WITH_DTYPES += [(name, torch.bfloat16) for name in ("projected_dwconv", "dynamic_dwconv")]


@needs_c
@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES, ids=str)
def test_operators_are_what_they_declare(name, dtype):
    for i, calls in enumerate(operator_calls(name, dtype)):
        for operator, given in calls:
            given = list(given)
            for at, each in enumerate(given):
                if isinstance(each, torch.Tensor):
                    layout = torch.channels_last if each.dim() == 4 else torch.contiguous_format
                    given[at] = each.detach().clone(memory_format=layout).requires_grad_(i == 0)
            # Eager and compiled runs may differ by rounding only, and here by nothing.
            torch.library.opcheck(operator, tuple(given))
            if name in ("pointwise", "normed_pointwise", "depthwise"):
                given[2 + i] = None  # the bias
                torch.library.opcheck(operator, tuple(given))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_by_finite_differences(name):
    sizes = {
        "gdfn_gate": ((2, 3, 3, 4), 4, 3),
        "channel_attention": ((2, 12, 2, 3), 2, "sigmoid"),
        "projected_dwconv": ((2, 4, 2, 3), 2, 3, 5),
        "dynamic_dwconv": ((2, 4, 3, 5), 2, 3),
    }.get(name, ((2, 4, 3, 4), 3))
    tensors, settings = make(name, *sizes, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in tensors]
    assert torch.autograd.gradcheck(lambda *given: OPERATORS[name].ours(*given, *settings), inputs)


@pytest.mark.parametrize("name", ["pointwise", "depthwise"])
def test_an_image_without_a_batch_is_convolved(name):
    (x, *weights), settings = make(name, *SMALL[name])
    out = OPERATORS[name].ours(x[0], *weights, *settings)
    torch.testing.assert_close(out, OPERATORS[name].ours(x, *weights, *settings)[0])


def test_only_what_needs_a_gradient_gets_one(name):
    tensors, settings = make(name, *SMALL[name])
    expected = output_and_gradients(OPERATORS[name].ours, tensors, settings)
    for i, chosen in enumerate(tensors):
        chosen.requires_grad_()
        OPERATORS[name].ours(*tensors, *settings).sum().backward()
        assert torch.equal(chosen.grad, expected[1 + i])
        chosen.requires_grad_(False)


@needs_c
@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name):
    tensors, settings = make(name, *SMALL[name])
    x = tensors[0].requires_grad_()
    out = OPERATORS[name].ours(*tensors, *settings)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        grad.sum().backward()


def count(function, tensors, settings=()):
    """Return the operations of the forward and of the backward."""
    with FlopCounterMode(display=False) as counter:
        out = function(*each_of(lambda each: each.detach().requires_grad_(), tensors), *settings)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


# (B, C, H, W) = (2, 6, 5, 7), and two gradients cost twice the forward. The backward makes the
# projected filters once more, and all that the gate is made of.
CONVOLVED = 2 * (2 * 6 * 5 * 7) * 3 * 3
EXPANDED, GATED = 2 * (2 * 5 * 7) * 6 * 8, 2 * (2 * 8 * 5 * 7) * 3 * 3
PROJECTED = 2 * (2 * 5 * 7) * (3 * 3 * 3) * 5
ATTENDED = 2 * 2 * (2 * 6 * 5 * 7) * 3
COUNTS = {
    "pointwise": (2 * (2 * 5 * 7) * 6 * 4, 4 * (2 * 5 * 7) * 6 * 4),
    "normed_pointwise": (2 * (2 * 5 * 7) * 6 * 4, 4 * (2 * 5 * 7) * 6 * 4),
    "depthwise": (CONVOLVED, 2 * CONVOLVED),
    "gdfn_gate": (EXPANDED + GATED, 3 * (EXPANDED + GATED)),
    "channel_attention": (ATTENDED, 2 * ATTENDED),
    "projected_dwconv": (CONVOLVED + PROJECTED, 2 * CONVOLVED + 3 * PROJECTED),
    "dynamic_dwconv": (CONVOLVED, 2 * CONVOLVED),
}


@pytest.mark.parametrize("name", COUNTS)
def test_operations_are_counted(name):
    tensors, settings = make(name, *SMALL[name])
    assert count(OPERATORS[name].ours, tensors, settings) == COUNTS[name]


@needs_c
def test_operations_are_those_that_pytorch_counts():
    for name in ("pointwise", "normed_pointwise", "channel_attention"):
        ours, definition, *_ = OPERATORS[name]
        case = make(name, *SMALL[name])
        assert count(ours, *case) == count(definition, *case)
    (x, *rest), _ = make("depthwise", *SMALL["depthwise"])
    # PyTorch counts the weight's gradient once for every pair of channels: compare that of x.
    forward, grad_x = count(lambda each: define_depthwise(each, *rest), [x])
    assert count(ops.depthwise, [x, *rest]) == (forward, 2 * grad_x)
    tensors, _ = make("gdfn_gate", *SMALL["gdfn_gate"])
    assert count(ops.gdfn_gate, tensors)[0] == count(define_gate, tensors)[0]


class Unreachable:
    """A C library that must not be called."""

    def __getitem__(self, kernel):
        pytest.fail(f"C was called: {kernel}")


def _other_shapes(tensor):
    """Yield this tensor larger and smaller along each axis, and with one axis more or less."""
    for axis, size in enumerate(tensor.shape):
        for other in (size - 1, size + 1):
            yield axis, tensor.new_ones((*tensor.shape[:axis], other, *tensor.shape[axis + 1 :]))
    for other in (tensor[None], tensor[0], tensor.flatten()[0], tensor.flatten()):
        if other.shape != tensor.shape:
            yield None, other


def changed(given, change):
    """Yield what an operator takes with one tensor changed, in turn; and which, and how."""
    for i, each in enumerate(given):
        if isinstance(each, torch.Tensor):
            for how, other in change(each):
                yield (*given[:i], other, *given[i + 1 :]), i, how


# Which axes of which argument may have any size: a forward takes any image.
FREE = {name: {(0, 0), (0, 2), (0, 3)} for name in IN_C if name != "projected_dwconv"}
FREE |= {"head_sums": FREE["channel_attention"], "head_apply": {(1, 2), (1, 3)}}
FREE_BACKWARD = {"head_sums": {(2, 2), (2, 3)}}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_operators_refuse_what_does_not_fit_before_c_sees_it(name, backward, monkeypatch):
    calls = operator_calls(name)[backward]
    for operator, given in calls:
        operator(*given)
    monkeypatch.setattr(library, "load", Unreachable)
    dynamic = name == "projected_dwconv"
    others = (torch.float64, torch.bfloat16, torch.int64, torch.int32)
    for (operator, given), own in zip(calls, DECLARED[name], strict=True):
        for arguments, i, axis in changed(given, _other_shapes):
            # Nothing in x makes nothing of the dynamic convolution, whatever the rest is.
            nothing = dynamic and arguments[i].numel() == 0
            if not nothing and (i, axis) not in (FREE_BACKWARD if backward else FREE).get(own, ()):
                with pytest.raises(ValueError, match=r"need|fit"):
                    operator(*arguments)
        for arguments, _, dtype in changed(given, lambda each: ((t, each.to(t)) for t in others)):
            # The dynamic convolution has a form for every dtype, if not for all mixtures.
            refused = pytest.raises((TypeError, ValueError), match=str(dtype))
            if dynamic:
                refused = contextlib.suppress(TypeError, ValueError, RuntimeError)
            with refused:
                operator(*arguments)
        for arguments, *_ in changed(given, lambda each: [("meta", each.to("meta"))]):
            with contextlib.suppress(TypeError, RuntimeError):  # or what is declared
                operator(*arguments)


@needs_c
@pytest.mark.parametrize(
    ("own", "setting"),
    [
        *(("head_sums", heads) for heads in (0, -1, 4, 5)),
        *(("projected_dwconv", kernel) for kernel in (0, -3, 1, 2, 5, 9)),
    ],
)
def test_operators_refuse_settings_before_c_sees_them(own, setting, monkeypatch):
    name = "channel_attention" if own == "head_sums" else own
    calls = [each[0] for each in operator_calls(name)]
    monkeypatch.setattr(library, "load", Unreachable)
    for operator, (*arguments, _) in calls:
        with pytest.raises(ValueError, match=r"need|fit"):
            operator(*arguments, setting)


@needs_c
@pytest.mark.parametrize("kernel", [2, 4, 35])
def test_filters_that_c_does_not_know_are_refused(kernel, monkeypatch):
    names = ("depthwise", "gdfn_gate")
    calls = [call for name in names for call in itertools.chain(*operator_calls(name))]
    (x, hidden, *_), _ = make("projected_dwconv", *SMALL["projected_dwconv"])
    weight = torch.ones(3 * kernel**2, 5)
    projected = (x, hidden, weight, weight[:, 0], kernel)
    calls += [(c_backend.projected_forward, projected)]
    calls += [(c_backend.projected_backward, (x, *projected))]
    monkeypatch.setattr(library, "load", Unreachable)
    for operator, given in calls:
        given = [
            each.new_ones(*each.shape[:2], kernel, kernel)
            if isinstance(each, torch.Tensor) and each.shape[1:] == (1, 3, 3)
            else each
            for each in given
        ]
        with pytest.raises(ValueError, match=r"needs|fit"):
            operator(*given)


def test_functions_give_c_nothing_that_does_not_fit(name, monkeypatch):
    """They raise, or PyTorch has a result for it, as for a 1x1 convolution's 3x3 weight."""
    tensors, settings = make(name, *SMALL[name])
    monkeypatch.setattr(library, "load", Unreachable)
    for arguments, i, axis in changed(tensors, _other_shapes):
        # C makes the map for the gate, and PyTorch refuses the filters.
        stopped = name == "gdfn_gate" and i >= 3
        if not stopped and (i, axis) not in FREE.get(name, ()):
            with contextlib.suppress(ValueError, RuntimeError, IndexError):
                OPERATORS[name].ours(*arguments, *settings)


SHAPE = (RuntimeError, ValueError)  # PyTorch's, and ours where C would run


def test_functions_say_what_does_not_fit():
    x, norm, heads = torch.rand(1, 6, 4, 5), torch.rand(6), torch.rand(4, 1, 1)
    narrow, fitting = torch.rand(4, 5, 1, 1), torch.rand(4, 6, 1, 1)
    attention = ops.channel_attention
    for call, error, words in [
        (lambda: ops.pointwise(x, narrow), SHAPE, "6 channels|C = 6"),
        (lambda: ops.pointwise(x, fitting, norm), SHAPE, "bias"),
        (lambda: ops.pointwise(x, fitting.double()), RuntimeError, "same|type"),
        (lambda: ops.normed_pointwise(x, norm, norm, narrow), SHAPE, "channels|C = 6"),
        (lambda: ops.normed_pointwise(x, norm[1:], norm, fitting), SHAPE, "shape"),
        (lambda: ops.depthwise(x, torch.rand(5, 1, 3, 3)), SHAPE, "groups|channels|C = 6"),
        (lambda: ops.depthwise(x, torch.rand(6, 1, 3, 3), norm[1:]), SHAPE, "bias"),
        (
            lambda: ops.gdfn_gate(x, norm, norm, fitting[:3], torch.rand(3, 1, 3, 3)),
            *(SHAPE, "2·E|must match"),
        ),
        (lambda: attention(x, heads, 4, "relu"), ValueError, r"3·h·c.*h = 4"),
        (lambda: attention(x, norm[:2], 2, "relu"), ValueError, r"\(2, 1, 1\); got \(2,\)"),
        (lambda: attention(x, heads[:0], 0, "relu"), ValueError, r"3·h·c.*h = 0"),
        (lambda: attention(x, heads[:1], 1, "tanh"), ValueError, "relu, gelu"),
    ]:
        with pytest.raises(error, match=words):
            call()


@needs_c
@pytest.mark.parametrize("shape", [(0, 6, 5, 7), (2, 0, 5, 7), (2, 6, 0, 7), (2, 6, 5, 0)])
def test_operators_make_nothing_of_nothing(shape):
    """The functions leave it to PyTorch; the operators, called by themselves, do not crash."""
    channels = shape[1]
    for name, given in {
        "pointwise": (torch.rand(4, channels, 1, 1), torch.rand(4), True),
        "depthwise": (torch.rand(channels, 1, 3, 3), None),
        "gdfn_gate": (torch.rand(4, channels, 1, 1), torch.rand(4), torch.rand(4, 1, 3, 3)),
    }.items():
        x = torch.rand(shape)
        out = getattr(torch.ops.dlgsanet, name)(x, *given)
        assert (out.shape[0], *out.shape[2:]) == (shape[0], *shape[2:])
        gradients = getattr(torch.ops.dlgsanet, f"{name}_backward")(out, x, *given)
        assert gradients[0].shape == shape
        assert all(each.isfinite().all() for each in gradients[1:])


class Subclass(torch.Tensor):
    """A tensor that may do anything."""


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, Subclass, "autocast"], ids=str)
def test_other_kinds_of_tensors_and_autocast_take_the_plain_form(name, kind):
    tensors, settings = make(name, *SMALL[name])
    others, autocast = tensors, contextlib.nullcontext()
    if kind == "autocast":
        autocast = torch.autocast("cpu", torch.bfloat16)
    else:
        others = [t.as_subclass(Subclass) if kind is Subclass else t.to(kind) for t in tensors]
    with autocast, Operators() as ran:
        out = OPERATORS[name].ours(*others, *settings)
    # The dynamic convolution is an operator for every kind of tensor.
    assert ran.ours <= {"dlgsanet::projected_dwconv"}
    assert kind == "autocast" or out.dtype == others[0].dtype
    expected = OPERATORS[name].definition(*(each.double() for each in tensors), *settings)
    half = kind in (torch.bfloat16, "autocast")
    assert half == (out.dtype == torch.bfloat16)
    error = (out.double() - expected).abs().max()
    assert error <= (0.05 if half else 1e-5) * expected.abs().max()


@needs_c
@pytest.mark.parametrize("kernel", [33, 35])
def test_larger_filters_take_the_plain_form(kernel):
    for name, *sizes in (
        ("depthwise", (1, 2, 5, 40), kernel),
        ("gdfn_gate", (1, 5, 5, 40), 4, kernel),
        ("projected_dwconv", (1, 2, 5, 40), 1, kernel, 3),
    ):
        tensors, settings = make(name, *sizes)
        with Operators() as ran:
            check(name, tensors, settings)
        if name != "projected_dwconv":
            assert (f"dlgsanet::{name}" in ran.ours) == (kernel == 33)
    assert dynamic.choose_backend(kernel, *tensors) is (
        c_backend if kernel == 33 else pytorch_backend
    )


@needs_c
@pytest.mark.parametrize("name", [name for name in IN_C if name != "projected_dwconv"])
def test_compilers_take_the_plain_form(name):
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    tensors, settings = make(name, *SMALL[name])
    compiled = torch.compile(OPERATORS[name].ours, fullgraph=True, backend=backend)
    actual = output_and_gradients(compiled, tensors, settings)
    wide = [each.double() for each in tensors]
    assert_near(actual, output_and_gradients(OPERATORS[name].definition, wide, settings), 1e-5)
    assert graphs
    assert not [n for graph in graphs for n in graph.graph.nodes if "dlgsanet" in str(n.target)]


@pytest.mark.parametrize("name", OPERATORS)
def test_function_transforms_take_the_plain_form(name):
    """The operators would raise under torch.func.grad, and have a derivative of 0 forwards."""
    tensors, settings = make(name, *SMALL[name])
    ours, definition = OPERATORS[name][:2]
    x, *rest = tensors
    wide, tangent = [each.double() for each in rest], torch.randn_like(x)
    with Operators() as ran:
        moved = torch.func.jvp(lambda x: ours(x, *rest, *settings), (x,), (tangent,))
        grad = torch.func.grad(lambda x: ours(x, *rest, *settings).sum())(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            dual = torch.autograd.forward_ad.unpack_dual(ours(dual, *rest, *settings))
    assert not ran.ours
    at = (x.double(),), (tangent.double(),)
    exact = torch.func.jvp(lambda x: definition(x, *wide, *settings), *at)
    assert_near((*moved, *dual), (*exact, *exact), 1e-5)
    _, exact, *_ = output_and_gradients(definition, [x.double(), *wide], settings)
    assert_near([grad], [exact], 1e-5)


def test_whether_c_can_run_is_asked_each_time(name, monkeypatch):
    tensors, settings = make(name, *SMALL[name])
    asked = []
    can_run = cpu.can_run
    monkeypatch.setattr(cpu, "can_run", lambda *each: asked.append(each) or can_run(*each))
    in_c = OPERATORS[name].ours(*tensors, *settings)
    before = len(asked)
    assert before
    with Operators() as ran:
        assert torch.equal(OPERATORS[name].ours(*tensors, *settings), in_c)
    assert ran.ours
    assert len(asked) == 2 * before
    monkeypatch.setattr(library, "load", lambda: None)  # as where nothing was built
    with Operators() as ran:
        plain = OPERATORS[name].ours(*tensors, *settings)
    assert ran.ours <= {"dlgsanet::projected_dwconv"}
    torch.testing.assert_close(plain, in_c, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    for each in tensors:  # what holds a tensor may replace its data
        each.data = each.data.double()
    assert OPERATORS[name].ours(*tensors, *settings).dtype == torch.float64


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
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
# Nothing in the batch, in the channels, in the height, in the width.
EMPTY = [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)]


def make_dynamic(shape, groups, kernel, dtype=torch.float64):
    """Return what `dynamic_dwconv` takes."""
    return make("dynamic_dwconv", shape, groups, kernel, dtype=dtype)[0]


def make_projected(shape, groups, kernel, dtype=torch.float64):
    """Return what `projected_dwconv` takes, without its kernel."""
    return make("projected_dwconv", shape, groups, kernel, 5, dtype=dtype)[0]


def projected(kernel):
    return functools.partial(projected_dwconv, kernel=kernel)


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_references_are_the_formula(shape, groups, kernel):
    x, weight = make_dynamic(shape, groups, kernel)
    expected = torch.from_numpy(dynamic_convolution(x.numpy(), weight.numpy()))
    torch.testing.assert_close(dynamic_dwconv_reference(x, weight), expected)
    x, hidden, weight, bias = make_projected(shape, groups, kernel)
    filters = F.conv2d(hidden, weight[:, :, None, None], bias)
    filters = filters.unflatten(1, (groups, kernel, kernel))
    expected = torch.from_numpy(dynamic_convolution(x.numpy(), filters.numpy()))
    actual = projected_dwconv_reference(x, hidden, weight, bias, kernel)
    torch.testing.assert_close(actual, expected)


def check_dynamic(shape, groups, kernel, dtype, device="cpu"):
    for name, given in (
        ("dynamic_dwconv", make_dynamic(shape, groups, kernel, dtype)),
        ("projected_dwconv", make_projected(shape, groups, kernel, dtype)),
    ):
        settings = (kernel,) if name == "projected_dwconv" else ()
        grad = torch.randn(shape, device=device).to(dtype)
        check(name, [each.to(device) for each in given], settings, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_dynamic_convolution_equals_the_reference(shape, groups, kernel, dtype):
    check_dynamic(shape, groups, kernel, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES[2:4])  # each compiles 4 kernels
def test_dynamic_convolution_equals_the_reference_on_cuda(
    shape, groups, kernel, dtype, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_dynamic(shape, groups, kernel, dtype, "cuda")


@pytest.mark.parametrize("rows", [1, 4])
def test_strips_change_nothing(rows, monkeypatch):
    monkeypatch.setattr(pytorch_backend, "_CPU_ELEMENTS", 2 * 6 * 9 * rows)
    check_dynamic((2, 6, 23, 9), 3, 7, torch.float64)


@pytest.mark.parametrize(("shape", "groups", "kernel"), SHAPES)
def test_plain_form_equals_the_reference(shape, groups, kernel):
    tensors = make_dynamic(shape, groups, kernel)
    actual = output_and_gradients(pytorch_backend.plain, tensors)
    expected = output_and_gradients(dynamic_dwconv_reference, tensors)
    assert_near(actual, expected, 1e-13, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_strides(dtype):
    tolerance = TOLERANCES[dtype]
    x, filters = make_dynamic((2, 6, 8, 10), 3, 3, dtype)
    x = x.to(memory_format=torch.channels_last)[..., ::2, 1:]
    last = filters.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    check("dynamic_dwconv", (x, last[..., ::2, 1:]), (), tolerance=tolerance)
    check("dynamic_dwconv", (x, filters.transpose(2, 3)[..., ::2, 1:]), (), tolerance=tolerance)
    _, hidden, weight, bias = make_projected((2, 6, 8, 10), 3, 3, dtype)
    hidden = hidden.mT.contiguous().mT[..., ::2, 1:]
    weight = weight.mT.contiguous().mT
    bias = bias.repeat_interleave(2)[::2]
    assert not any(each.is_contiguous() for each in (x, last, hidden, weight, bias))
    check("projected_dwconv", (x, hidden, weight, bias), (3,), tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_of_each_map_is_kept(dtype):
    x, hidden, weight, bias = make_projected((2, 6, 8, 10), 3, 3, dtype)
    for formats in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        maps = (x.contiguous(memory_format=formats[0]), hidden.contiguous(memory_format=formats[1]))
        out, grad_x, grad_hidden, *_ = output_and_gradients(projected(3), (*maps, weight, bias))
        for each, like in ((out, 0), (grad_x, 0), (grad_hidden, 1)):
            assert each.is_contiguous(memory_format=formats[like])


def test_half_precision_is_summed_and_projected_in_float32():
    # 1 + 48 · 2⁻⁹: in bfloat16 each addend alone is lost beside 1.
    expected = torch.tensor(1 + 48 * 2.0**-9, dtype=torch.bfloat16)
    ones = torch.ones(1, 48, 7, 7, dtype=torch.bfloat16)
    x, one = ones[:, :1], ones[0, 0, 0, :1]
    small = torch.full((49, 1), 2.0**-9, dtype=torch.bfloat16)
    taps = small.clone()
    taps[0] = 1
    filters = taps.view(1, 1, 7, 7, 1, 1).expand(1, 1, 7, 7, 7, 7)
    assert dynamic_dwconv(x, filters)[0, 0, 3, 3] == expected
    # The same addends, in the filter and in the sum over taps.
    assert projected_dwconv(x, ones, small[:48].mT, one, 1)[0, 0, 3, 3] == expected
    assert projected_dwconv(x, x, taps, 0 * taps[:, 0], 7)[0, 0, 3, 3] == expected


def given(*shape, **options):
    return torch.ones(shape, **options)


MAPS = {"x": given(1, 4, 3, 3), "weight": given(1, 2, 3, 3, 3, 3)}
PROJECTED = {
    **{"x": given(1, 4, 3, 5), "hidden": given(1, 2, 3, 5), "weight": given(18, 2)},
    **{"bias": given(18), "kernel": 3},
}


@pytest.mark.parametrize(
    ("fitting", "changed", "names"),
    [
        (MAPS, {"x": given(4, 3, 3)}, r"x .*\(4, 3, 3\)"),
        (MAPS, {"weight": given(2, 2, 3, 3, 3, 3)}, r"x .*B = 2.*\(1, 4, 3, 3\)"),
        (MAPS, {"weight": given(1, 2, 3, 3, 3, 4)}, r"x .*W = 4.*\(1, 4, 3, 3\)"),
        (MAPS, {"weight": given(1, 2, 4, 4, 3, 3)}, "odd side; got 4"),
        (MAPS, {"weight": given(1, 2, 3, 5, 3, 3)}, r"K, K.*\(1, 2, 3, 5, 3, 3\)"),
        (MAPS, {"weight": given(1, 3, 3, 3, 3, 3)}, r"G·S.*G = 3.*\(1, 4, 3, 3\)"),
        (MAPS, {"weight": given(1, 0, 3, 3, 3, 3)}, r"G·S.*G = 0.*\(1, 4, 3, 3\)"),
        (MAPS, {"weight": MAPS["weight"].double()}, "torch.float32"),
        (MAPS, {name: each.int() for name, each in MAPS.items()}, "torch.int32"),
        (MAPS, {"weight": MAPS["weight"].to("meta")}, "on meta"),
        (PROJECTED, {"x": given(4, 3, 5)}, r"x of shape \(B, G·S, H, W\).*got \(4, 3, 5\)"),
        (PROJECTED, {"hidden": given(2, 3, 5)}, r"hidden of shape .*got \(2, 3, 5\)"),
        (PROJECTED, {"weight": given(18, 2, 1, 1)}, r"weight of shape .*got \(18, 2, 1, 1\)"),
        (PROJECTED, {"bias": given(18, 1)}, r"bias of shape .*got \(18, 1\)"),
        (PROJECTED, {"x": given(2, 4, 3, 5)}, r"x of shape .*B = 1.*got \(2, 4, 3, 5\)"),
        (PROJECTED, {"hidden": given(1, 2, 3, 6)}, r"x of shape .*W = 6.*got \(1, 4, 3, 5\)"),
        (PROJECTED, {"weight": given(18, 3)}, r"hidden of shape .*D = 3"),
        (PROJECTED, {"bias": given(9)}, r"bias of shape \(G·K·K\).*got \(9,\)"),
        (PROJECTED, {"kernel": 2}, "odd side; got 2"),
        (PROJECTED, {"kernel": 0}, "odd side; got 0"),
        (PROJECTED, {"kernel": 5}, r"weight of shape \(G·K·K, D\) with K = 5; got \(18, 2\)"),
        (PROJECTED, {"x": given(1, 5, 3, 5)}, r"x of shape .*G = 2.*got \(1, 5, 3, 5\)"),
        (PROJECTED, {"weight": given(0, 2), "bias": given(0)}, r"x of shape .*G = 0"),
        (PROJECTED, {"hidden": PROJECTED["hidden"].half()}, "hidden to be torch.float32.*float16"),
        (PROJECTED, {"bias": given(18).double()}, "bias to be torch.float32.*torch.float64"),
        (PROJECTED, {"weight": given(18, 2, device="meta")}, "on meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fitting, changed, names):
    function = dynamic_dwconv if fitting is MAPS else projected_dwconv
    function(**fitting)
    with pytest.raises(ValueError, match=names):
        function(**{**fitting, **changed})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_in_makes_nothing(shape, layout, dtype):
    for function, inputs in (
        (dynamic_dwconv, make_dynamic(shape, 2, 3, dtype)),
        (projected(3), make_projected(shape, 2, 3, dtype)),
    ):
        inputs[0] = inputs[0].contiguous(memory_format=layout)
        out, *gradients = output_and_gradients(function, inputs)
        assert out.shape == shape
        for each, like in zip(gradients, inputs, strict=True):
            assert torch.equal(each, torch.zeros_like(like))


def test_autocast_decides_the_dtype():
    inputs = make_projected((2, 6, 5, 7), 3, 3, torch.float32)
    grad = torch.randn(inputs[0].shape, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = output_and_gradients(projected(3), inputs, (), grad)
        # One in half precision already, as after a convolution, and what autocast leaves alone.
        mixed = projected_dwconv(inputs[0], inputs[1].bfloat16(), *inputs[2:], 3)
        wide = projected_dwconv(*(each.double() for each in inputs), 3)
    expected = output_and_gradients(projected(3), [each.bfloat16() for each in inputs], (), grad)
    assert actual[0].dtype == mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(mixed, expected[0])
    for ours, exact in zip(actual[1:], expected[1:], strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_for_any_size_without_a_graph_break(backend, dtype):
    torch.compiler.reset()
    for function, maker in ((dynamic_dwconv, make_dynamic), (projected(3), make_projected)):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for shape in ((2, 6, 5, 7), (3, 6, 4, 9), (1, 6, 8, 8)):
            inputs = maker(shape, 3, 3, dtype)
            expected = output_and_gradients(function, inputs)
            for ours, exact in zip(output_and_gradients(compiled, inputs), expected, strict=True):
                assert torch.equal(ours, exact)


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


def test_checkpointing_changes_no_gradient(name):
    tensors, settings = make(name, *SMALL[name])
    expected = output_and_gradients(OPERATORS[name].ours, tensors, settings)
    recomputed = functools.partial(checkpoint, OPERATORS[name].ours, use_reentrant=False)
    actual = output_and_gradients(recomputed, tensors, settings)
    assert all(map(torch.equal, actual, expected))


def test_distributed_training_gets_every_gradient(tmp_path):
    x, hidden, weight, bias = make_projected((2, 6, 5, 7), 3, 3, torch.float32)
    expected = output_and_gradients(projected(3), (x, hidden, weight, bias))
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
    inputs = [x.contiguous(memory_format=layout), *others]
    inputs = [each.requires_grad_() for each in inputs]
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
    dynamic._warn_once.cache_clear()
    dynamic.has_triton.cache_clear()
    yield
    dynamic._warn_once.cache_clear()
    dynamic.has_triton.cache_clear()


def on(device, dtype):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1,))


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
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch: .*{reason}"):
        assert dynamic.choose_backend(kernel, on(device, dtype)) is pytorch_backend
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dynamic.choose_backend(kernel, on(device, dtype)) is pytorch_backend


@pytest.mark.usefixtures("_nothing_said_yet")
def test_backend_that_serves_is_chosen_in_silence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            chosen = dynamic.choose_backend(11, on("cuda", dtype))
            assert chosen == "dlgsanet_arch.ops.triton_backend"  # imported here and not before
        for device in ("cpu", "meta"):
            for dtype in (torch.float64, torch.bfloat16):
                assert dynamic.choose_backend(13, on(device, dtype)) is pytorch_backend
        assert dynamic.choose_backend(7, torch.rand(1, device="meta")) is pytorch_backend
