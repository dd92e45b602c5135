"""Halves of layers as Triton kernels: the formula in float64, in Triton's interpreter and on a GPU.

What is interpreted runs in a separate process, by the fixture `interpreted`.
"""

import importlib
import importlib.util
import itertools
from unittest import mock

import pytest
import torch
from test_fused import MISFITS, forms, misfits
from test_network import build, defined, images, relative_error

from dlgsanet_arch import DLGSANet, fused, network
from dlgsanet_arch.configs import published_configs
from dlgsanet_arch.layers import LayerNorm

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
ADD = {"GDFN": "add_gdfn", "MHDLSA": "add_mhdlsa", "SparseGSA": "add_attention"}
TOLERANCES = {"float32": 1e-5, "tf32": 5e-3, "float16": 3e-3, "bfloat16": 2e-2}
# A kind of mixer, its sizes, (B, C, H, W). Tiles are of 4 x 16 or 64 pixels: below, at and above.
CASES = [
    ("GDFN", (12, 24), (2, 12, 5, 17)),
    ("GDFN", (7, 5), (1, 7, 1, 3)),
    ("GDFN", (20, 70), (1, 20, 3, 1)),
    ("MHDLSA", (12, 6, 3, True), (2, 12, 5, 17)),
    ("MHDLSA", (27, 3, 5, True), (1, 27, 2, 3)),  # groups in two blocks
    ("MHDLSA", (18, 9, 7, True), (1, 18, 1, 2)),  # single channels at a time, groups of 9
    ("MHDLSA", (12, 12, 1, True), (1, 12, 3, 3)),
    # Windows: none; one over all; overlapping; nearly equal, so that blocks cut what they share.
    ("SparseGSA", (12, 3, "relu", None), (2, 12, 5, 17)),
    ("SparseGSA", (10, 1, "gelu", 48), (1, 10, 2, 3)),
    ("SparseGSA", (8, 2, "softmax", 6), (1, 8, 13, 9)),
    ("SparseGSA", (6, 2, "relu", 17), (1, 6, 18, 18)),
    ("SparseGSA", (70, 7, "sigmoid", 1), (1, 70, 2, 1)),  # heads in two blocks
]
HALF = [*itertools.product([CASES[1], CASES[5], CASES[8]], ["float16", "bfloat16"])]


def make_layer(kind, channels, *sizes):
    """Return a norm and a mixer whose weights all matter, in float64 and eval mode."""
    parts = LayerNorm(channels), getattr(network, kind)(channels, *sizes)
    with torch.no_grad():
        for part in parts:
            for parameter in part.double().eval().parameters():
                if parameter.dim() in (1, 3):
                    parameter += 0.3 * torch.randn_like(parameter)
    return parts


def made(case, dtype, device="cpu"):
    """Return a map, a norm and a mixer."""
    kind, sizes, shape = case
    torch.manual_seed(0)
    parts = make_layer(kind, *sizes)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return [each.to(device, dtype) for each in (x, *parts)]


def error(add, x, norm, mixer):
    """Return the largest error of a layer over the largest value; x is left as it was."""
    before = x.clone()
    with torch.no_grad():
        out = add(x, norm, mixer)
        assert torch.equal(x, before)
        assert (out.dtype, out.shape) == (x.dtype, x.shape)
        expected = x.double() + mixer.double()(norm.double()(x.double()))
    return float((out.double() - expected).abs().max() / expected.abs().max())


def _forms():
    return importlib.import_module("dlgsanet_arch.fused.triton_layers")


class Launches:
    """Counts launches; while it is entered, kernels run or, if given, `instead` does."""

    def __init__(self, instead=None):
        self.count, self.patches = 0, []
        for name in ("parts", "layers", "attention"):
            module = importlib.import_module(f"dlgsanet_arch.fused.triton_{name}")
            run = self.counted(instead or module.launch)
            self.patches.append(mock.patch.object(module, "launch", run))

    def counted(self, launch):
        def run(*given, **settings):
            self.count += 1
            launch(*given, **settings)

        return run

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


# The functions up to "The tests" run in the interpreting process.
def check_layer(case, dtype):
    found = error(getattr(_forms(), ADD[case[0]]), *made(case, getattr(torch, dtype)))
    assert found <= TOLERANCES[dtype], f"{found:.1e}"


def check_any_layout_of_map_and_weights():
    for case in (CASES[1], CASES[6], CASES[8]):
        x, norm, mixer = made(case, torch.float32)
        add = getattr(_forms(), ADD[case[0]])
        expected = add(x, norm, mixer)
        for part in (norm, mixer):
            for parameter in part.parameters():
                wider = torch.full((*parameter.shape, 2), torch.nan)
                parameter.data = wider[..., 0].copy_(parameter)
        larger = torch.full((*x.shape[:3], x.shape[3] + 1), torch.nan)
        for each in (x.contiguous(), larger[..., 1:].copy_(x)):
            assert torch.equal(add(each, norm, mixer), expected)


def check_wide_offsets():
    # 64-bit offsets, as for tensors of more than 2**31 elements, and products without TF32.
    parts = importlib.import_module("dlgsanet_arch.fused.triton_parts")
    with (
        mock.patch.object(parts, "offset_type", return_value=parts.tl.int64),
        mock.patch.object(parts, "dot_precision", return_value="tf32x3"),
    ):
        for case in (CASES[1], CASES[4], CASES[8]):
            check_layer(case, "float32")


def check_zeros():
    # Nothing has a norm: the floor keeps what is divided finite, in half precision too.
    for dtype in (torch.float32, torch.float16):
        x, norm, mixer = made(CASES[8], dtype)
        with torch.no_grad():
            mixer.qkv.weight.zero_()
            out = _forms().add_attention(x, norm, mixer)
        assert torch.equal(out, x)


def check_small_values():
    # Where the epsilon under the norm's variance counts.
    x, norm, mixer = made(CASES[1], torch.float32)
    assert error(_forms().add_gdfn, 1e-3 * x, norm, mixer) <= TOLERANCES["float32"]


def check_network(name):
    config = {**published_configs()[name], "groups": 1, "blocks": 1}
    net = build(config, torch.float32).eval()
    x = images(net, 1, (3, 2))
    with torch.no_grad(), mock.patch.object(fused, "_forms", return_value=_forms()):
        with Launches() as launches:
            out = net(x)
        if name.endswith("Tiny x4"):
            net.deep_feature_extraction[0].body[0].norm2.register_forward_hook(lambda *_: None)
            with Launches() as others:
                net(x)
            assert others.count == 8
    assert launches.count == 10
    assert relative_error(out, defined(net, x, config, training=False)) < 1e-4


# The tests.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_equal_the_formula(interpreted, case):
    interpreted(check_layer, case, "float32")


@pytest.mark.parametrize(("case", "dtype"), HALF, ids=str)
def test_layers_in_half_precision(interpreted, case, dtype):
    interpreted(check_layer, case, dtype)


@pytest.mark.parametrize(
    "check",
    [check_any_layout_of_map_and_weights, check_wide_offsets, check_zeros, check_small_values],
)
def test_layers_hold_for(interpreted, check):
    interpreted(check)


@pytest.mark.parametrize("name", published_configs())
def test_published_networks_equal_the_definition(interpreted, name):
    interpreted(check_network, name)


@needs_triton
@pytest.mark.parametrize(("name", "part", "key", "misfit"), [*misfits()])
def test_weights_that_do_not_fit_are_refused_before_a_launch(name, part, key, misfit):
    add, x, *parts = forms()[name]
    owner, _, own = key.rpartition(".")
    owner = parts[part].get_submodule(owner)
    setattr(owner, own, torch.nn.Parameter(MISFITS[misfit](getattr(owner, own).detach())))
    with Launches(print) as launches, pytest.raises(ValueError, match=r"needs|share"):
        getattr(_forms(), add.__name__)(x, *parts)
    assert not launches.count


@needs_triton
@pytest.mark.parametrize("misfit", ["longer", "shorter", "flat", "double", "meta"])
def test_a_temperature_that_does_not_fit_is_refused_before_a_launch(misfit):
    _, x, norm, mixer = forms()["attention"]
    mixer.temperature = torch.nn.Parameter(MISFITS[misfit](mixer.temperature.detach()))
    with Launches(print) as launches, pytest.raises(ValueError, match="temperature"):
        _forms().add_attention(x, norm, mixer)
    assert not launches.count


@needs_triton
@pytest.mark.parametrize("shape", [(2, 13, 5, 7), (12, 5, 7), (1, 2, 12, 5, 7), (0,)])
@pytest.mark.parametrize("name", ["gdfn", "mhdlsa", "attention"])
def test_maps_that_do_not_fit_are_refused_before_a_launch(name, shape):
    add, _, *parts = forms()[name]
    with Launches(print) as launches, pytest.raises(ValueError, match="needs"):
        getattr(_forms(), add.__name__)(torch.rand(shape), *parts)
    assert not launches.count


@needs_triton
def test_what_has_no_kernel_is_left_to_the_formula(monkeypatch):
    monkeypatch.setattr(fused, "_forms", lambda _: _forms())

    def runs(case, dtype=torch.float32, change=lambda *_: None):
        x, norm, mixer = made(case, dtype)
        change(x, norm, mixer)
        return fused.can_run(x, norm, mixer)

    with torch.no_grad():
        assert all(runs(case) for case in CASES)
        assert runs(CASES[0], torch.bfloat16)
        assert not runs(CASES[0], torch.float64)
        assert not runs(CASES[0], change=lambda x, norm, mixer: mixer.half())
        assert not runs(CASES[0], change=lambda x, norm, mixer: norm.to("meta"))
        assert not runs(("GDFN", (130, 4), (1, 130, 2, 2)))
        assert not runs(("MHDLSA", (12, 6, 13, True), (1, 12, 2, 2)))
        assert not runs(("GDFN", (12, 4), (0, 12, 2, 2)))

        def wrong_temperature(x, norm, mixer):
            mixer.temperature = torch.nn.Parameter(torch.ones(1, 1, 1))

        assert not runs(CASES[7], change=wrong_temperature)
        with torch.autocast("cpu", torch.bfloat16):
            assert not runs(CASES[0])
    assert not runs(CASES[0])


GEOMETRIES = {"Tiny": (48, 6), "Large": (90, 6)}
REAL = [*itertools.product(ADD, GEOMETRIES, TOLERANCES)]


def real(kind, geometry, size):
    """Return a case with a published geometry."""
    channels, many = GEOMETRIES[geometry]
    sizes = {"GDFN": (2 * channels,), "MHDLSA": (many, 7, True), "SparseGSA": (many, "relu", 48)}
    return kind, (channels, *sizes[kind]), (size[0], channels, *size[1:])


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "geometry", "precision"), REAL)
def test_real_sizes_on_cuda(kind, geometry, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    given = made(
        real(kind, geometry, (2, 101, 67)), getattr(torch, precision, torch.float32), "cuda"
    )
    add = getattr(fused, ADD[kind])
    with torch.no_grad():
        assert fused.can_run(*given)
        assert torch.equal(add(*given), add(*given))
    found = error(add, *given)
    assert found <= TOLERANCES[precision], f"{found:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ADD)
def test_new_size_compiles_nothing_on_cuda(kind, monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *args, **kwargs: compiled.append(kwargs)
    )
    counts = []
    for size in [(2, 64, 64), (1, 48, 48), (1, 45, 83), (3, 16, 16), (1, 128, 1), (1, 1, 96)]:
        getattr(fused, ADD[kind])(*made(real(kind, "Tiny", size), torch.float16, "cuda"))
        counts.append(len(compiled))
    assert counts[0] == counts[-1]


@pytest.mark.gpu
def test_a_network_is_captured_in_a_cuda_graph():
    config = {**published_configs()["DLGSANet Tiny x4"], "groups": 1, "blocks": 1}
    net = DLGSANet(**config).eval().cuda().bfloat16()
    x = torch.rand(1, 3, 60, 80, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected, graph = net(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(x)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
