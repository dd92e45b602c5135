"""Halves of layers in C: the definition for every option, size, tile and number of threads."""

import contextlib
import os
from unittest import mock

import definition
import numpy as np
import pytest
import torch
from dispatch import LargestTensor, Operators
from test_network import VARIANTS, build, defined, images
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch import cpu, fused
from dlgsanet_arch.cpu import library
from dlgsanet_arch.fused import c_layers
from dlgsanet_arch.network import GDFN, LayerNorm

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason=f"no C library: {cpu.why_not()}")
FUSED = ("add_gdfn", "add_mhdlsa", "attention_sums", "add_attended", "convolve3x3")


@pytest.fixture(params=[(1, 1), (3, 5), (100, 100)], ids="{0[0]}x{0[1]}".format)
def tile(request, monkeypatch):
    """Work in tiles of this size: smaller than any filter, across the borders of windows, whole."""
    monkeypatch.setattr(c_layers, "_tile", lambda *_: request.param)


@contextlib.contextmanager
def kernels():
    """Collect the names of the fused forms' kernels that run."""
    names, plain = set(), cpu.run

    def remember(kernel, *given):
        names.add(kernel)
        plain(kernel, *given)

    with mock.patch.object(cpu, "run", remember):
        yield names


def run(net, x):
    """Return the output, and which fused operators made it."""
    with torch.no_grad(), kernels() as ran:
        return net(x), ran


@pytest.fixture
def no_c(monkeypatch):
    """Fail where C is called."""
    monkeypatch.setattr(cpu, "run", lambda kernel, *_: pytest.fail(f"C was called: {kernel}"))


def assert_near(actual, expected):
    """Compare with what float64 gives: 1e-5 of the largest value, as promised for float32."""
    assert actual.dtype == torch.float32
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


def assert_computes(options, batch, size):
    """Compare a network with itself in float64; return which fused operators ran."""
    net = build(options, torch.float32).eval()
    x = images(net, batch, size)
    out, ran = run(net, x)
    with torch.no_grad():
        assert_near(out, net.double()(x.double()))
    return ran


@pytest.mark.usefixtures("variant", "tile")
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_fused_layers_and_those_with_gradients_equal_the_definition(options):
    net = build(options, torch.float32)
    x = images(net, 2, (13, 9))
    for training in (True, False):
        expected = defined(net, x, options, training=training)
        out, ran = run(net.train(training), x)
        assert "convolve3x3" in ran
        assert_near(out, expected)
        assert_near(net(x).detach(), expected)
        with torch.inference_mode():
            assert torch.equal(net(x), out)


def test_all_layers_of_the_paper_are_fused():
    net = build({"groups": 2}, torch.float32).eval()
    with Operators() as seen:
        _, ran = run(net, images(net, 1, (13, 9)))
    assert ran == set(FUSED)
    assert not seen.ours


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("size", [(1, 1), (1, 131), (90, 1), (12, 6), (40, 64), (17, 79), (9, 300)])
def test_any_size(size):
    assert assert_computes({"window_size": 7, "tlc_kernel": 16}, 1, size)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    "options",
    [
        # Channels that fill no block of results, and filters shared by more than a block.
        {"dim": 26, "idynamic_num_heads": 13, "restormer_num_heads": 2},
        {"dim": 7, "idynamic_num_heads": 7, "restormer_num_heads": 1},
        {"window_size": 33, "dim": 4, "idynamic_num_heads": 2, "restormer_num_heads": 1},
        {"dim": 90, "window_size": 7},
    ],
    ids=str,
)
def test_odd_channels_and_the_largest_filter(options):
    assert "add_mhdlsa" in assert_computes(options, 2, (21, 70))


def test_larger_filters_are_left_to_pytorch():
    options = {"window_size": fused.LARGEST_KERNEL + 2, "dim": 4, "idynamic_num_heads": 2}
    ran = assert_computes({**options, "restormer_num_heads": 1}, 1, (5, 40))
    assert "add_mhdlsa" not in ran
    assert "add_gdfn" in ran


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gelu_is_exact(scale):
    net, norm = GDFN(4, 2), LayerNorm(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.project_in.weight[:2, 0, 0, 0] = scale  # a: the first channel; b: its absolute bias
        net.project_in.weight[2:, 1, 0, 0] = 1
        net.dwconv.weight[:, 0, 1, 1] = 1
        net.project_out.weight[0, 0] = 1
        x = torch.randn(1, 4, 64, 64)
        expected = net.double()(norm.double()(x.double()))[:, 0]
        added = fused.add_gdfn(x, norm.float(), net.float())
    error = (added.double() - x)[:, 0] - expected
    assert float(error.abs().max()) < 1e-6 * max(1, float(expected.abs().max()))
    assert np.allclose(definition.gelu(np.array([1.0])), 0.841345, atol=1e-6)


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_change_no_bit(openmp, threads, monkeypatch):
    if not openmp:
        monkeypatch.setattr(library, "_openmp", lambda: None)
    net = build({"groups": 2, "dim": 24, "tlc_kernel": 16}, torch.float32).eval()
    x = images(net, 2, (70, 50))
    results = []
    for count in (1, 2, 3):
        threads(count)
        out, ran = run(net, x)
        assert ran == set(FUSED)
        results.append(out)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.usefixtures("tile")
def test_tiles_change_rounding_only():
    assert_computes({"groups": 2, "tlc_kernel": 16}, 3, (50, 70))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own(threads, monkeypatch):
    monkeypatch.setattr(library, "_openmp", lambda: None)
    threads(2)
    convolve = (torch.rand(1, 2, 20, 20), torch.rand(3, 2, 3, 3), None)
    expected = fused.convolve3x3(*convolve)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1" if torch.equal(fused.convolve3x3(*convolve), expected) else b"0")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.waitpid(child, 0)
    os.close(reader)


def test_no_memory_is_an_error_that_says_so():
    x = torch.rand(1, 4, 3, 3)
    with pytest.raises(MemoryError, match="convolve3x3"):
        library.run("convolve3x3", [x, x, None, x], [1, 3, 3, 3, 3, 4, 1 << 40])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_to_pytorch(dtype):
    net = build({}, dtype).eval()
    x = images(net, 2, (13, 9))
    out, ran = run(net, x)
    assert out.dtype == dtype
    assert not ran


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_keeps_maps_or_traces_is_not_fused(monkeypatch):
    net = build({}, torch.float32).eval()
    x = images(net, 1, (13, 9))
    with kernels() as ran:
        net(x).mean().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            net(x)
        with torch.no_grad():
            traced = torch.jit.trace(net, x, check_trace=False)
    assert not ran
    assert all(p.grad.isfinite().all() for p in net.parameters())
    layer, features = net.deep_feature_extraction[0].body[0], torch.rand(1, 12, 13, 9)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert fused.can_run(features, layer.norm1, layer.IDynamicDWConv) == (not grad)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), net(x))
    torch.jit.trace(net, x)  # traces once more without gradients and compares
    monkeypatch.setattr(library, "load", lambda: None)
    assert not run(net, x)[1]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_without_the_library_pytorch_gives_the_same(options, monkeypatch):
    net = build(options, torch.float32).eval()
    x = images(net, 2, (13, 9))
    expected, _ = run(net, x)
    monkeypatch.setattr(library, "load", lambda: None)
    out, ran = run(net, x)
    assert not ran
    assert_near(out, expected.double())


def test_no_map_wider_than_the_features_is_made():
    net = build({"dim": 24, "tlc_kernel": 48}, torch.float32).eval()
    height, width = 96, 64
    x = images(net, 1, (height, width))
    with torch.no_grad(), LargestTensor() as largest:
        net(x)
    assert largest.elements == height * width * 24


@pytest.mark.parametrize("kind", ["float64", "without the library", "plain feed-forward"])
def test_a_batch_needs_the_wide_maps_of_one_image(kind, monkeypatch):
    if kind == "without the library":
        monkeypatch.setattr(library, "load", lambda: None)
    options = {"dim": 24, "tlc_kernel": 48}
    if kind == "plain feed-forward":
        options = {**options, "idynamic_ffn_type": "BaseFFN", "restormer_ffn_type": "BaseFFN"}
    dtype = torch.float64 if kind == "float64" else torch.float32
    net = build(options, dtype).eval()
    height, width = 32, 24
    elements = []
    for batch in (1, 4):
        with torch.no_grad(), LargestTensor() as largest:
            net(images(net, batch, (height, width)))
        elements.append(largest.elements)
    # Features are there for the whole batch; within layers they are twice to four times as wide.
    assert elements[1] <= max(elements[0], 4 * height * width * 24)


def test_layers_leave_what_they_are_given_as_it_was():
    net = build({}, torch.float32).eval()
    group = net.deep_feature_extraction[0]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(2, 12, 13, 9).to(memory_format=layout)
        before = x.clone()
        with torch.no_grad():
            for layer in (*group.body[:-1], group):
                layer(x)
                assert torch.equal(x, before)


def test_any_layout_of_input_and_weights():
    net = build({}, torch.float32).eval()
    x = images(net, 2, (26, 18))[:, :, ::2, ::2]
    expected, _ = run(net, x.contiguous())
    assert torch.equal(run(net, x)[0], expected)
    net = net.to(memory_format=torch.channels_last)
    assert torch.equal(run(net, x.to(memory_format=torch.channels_last))[0], expected)


def test_rows_beyond_the_image_are_never_written():
    """Memory before and behind a map stays as it is: no tile and no vector reaches over an end."""
    x, weight = torch.rand(1, 2, 5, 7), torch.rand(7, 2, 3, 3)
    whole = torch.full((7 * 5 * 7 + 64,), -1.0)
    out = whole[32:-32].view(1, 7, 5, 7)
    library.run("convolve3x3", [x, weight, None, out], [1, 5, 7, 2, 3, 2, 7])
    assert (whole[:32] == -1).all()
    assert (whole[-32:] == -1).all()
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, padding=1))


def forms():
    """Return each fused form, what it is given, and the kernels that it runs."""
    net = build({"tlc_kernel": 4}, torch.float32).eval()
    local, attending = net.deep_feature_extraction[0].body[:2]
    x = torch.rand(2, 12, 5, 7)
    return {
        "gdfn": (fused.add_gdfn, x, local.norm2, local.IDynamic_ffn),
        "mhdlsa": (fused.add_mhdlsa, x, local.norm1, local.IDynamicDWConv),
        "attention": (fused.add_attention, x, attending.norm3, attending.restormer_attn),
    }


MISFITS = {
    "wider": lambda t: torch.rand(*t.shape[:-1], t.shape[-1] + 1),
    "longer": lambda t: torch.rand(t.shape[0] + 1, *t.shape[1:]),
    "shorter": lambda t: torch.rand(t.shape[0] - 1, *t.shape[1:]),
    "flat": torch.flatten,
    "one axis more": lambda t: t[None],
    "double": torch.Tensor.double,
    "bfloat16": torch.Tensor.bfloat16,
    "meta": lambda t: t.to("meta"),
}


def misfits():
    """Yield forms, names of their weights, and a change that does not fit there."""
    for name, (_, _, norm, mixer) in forms().items():
        for part, module in enumerate((norm, mixer)):
            for key, weight in module.named_parameters():
                for misfit in MISFITS:
                    # A temperature is PyTorch's to refuse: C never sees it.
                    if key != "temperature" and not (misfit == "flat" and weight.dim() == 1):
                        yield name, part, key, misfit


@pytest.mark.parametrize(("name", "part", "key", "misfit"), [*misfits()])
def test_weights_that_do_not_fit_are_refused_before_c_sees_them(name, part, key, misfit, no_c):
    add, x, *parts = forms()[name]
    owner, _, own = key.rpartition(".")
    owner = parts[part].get_submodule(owner)
    setattr(owner, own, torch.nn.Parameter(MISFITS[misfit](getattr(owner, own).detach())))
    with torch.no_grad(), pytest.raises(ValueError, match=r"needs|share"):
        add(x, *parts)


@pytest.mark.parametrize("shape", [(2, 13, 5, 7), (12, 5, 7), (1, 2, 12, 5, 7), (0,)])
@pytest.mark.parametrize("name", ["gdfn", "mhdlsa", "attention"])
def test_maps_that_do_not_fit_are_refused_before_c_sees_them(name, shape, no_c):
    add, _, *parts = forms()[name]
    with torch.no_grad(), pytest.raises(ValueError, match="needs"):
        add(torch.rand(shape), *parts)


@pytest.mark.parametrize("misfit", ["wider", "shorter", "flat", "one axis more", "double", "meta"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_3x3_convolution_refuses_what_does_not_fit_before_c_sees_it(misfit, position, no_c):
    given = [torch.rand(2, 6, 5, 7), torch.rand(5, 6, 3, 3), torch.rand(5)]
    given[position] = MISFITS[misfit](given[position])
    if (position, misfit) in {(0, "wider"), (0, "shorter"), (2, "flat")}:
        return  # another image, or the same bias
    with pytest.raises(ValueError, match="convolve3x3 needs"):
        fused.convolve3x3(*given)


@pytest.mark.parametrize("heads", [0, 5, -1, 24])
def test_heads_that_do_not_fit_are_refused_before_c_sees_them(heads, no_c):
    add, x, norm, attention = forms()["attention"]
    attention.heads = heads
    with torch.no_grad(), pytest.raises(ValueError, match="h = "):
        add(x, norm, attention)


def test_kernels_take_float32_on_the_cpu_alone(monkeypatch):
    x, weight = torch.rand(1, 6, 5, 7), torch.rand(5, 6, 3, 3)
    monkeypatch.setattr(library, "load", lambda: pytest.fail)  # calling a kernel of it would raise
    for kind in (torch.float64, torch.bfloat16, torch.int64, "meta"):
        with pytest.raises(TypeError, match="float32 on a CPU"):
            fused.convolve3x3(x.to(kind), weight.to(kind), None)


def test_a_map_without_pixels_or_images_never_reaches_c():
    net = build({}, torch.float32).eval()
    for batch, height, width in ((0, 13, 9), (2, 0, 9), (2, 13, 0)):
        x = torch.rand(batch, 3, height, width)
        try:
            expected = net(x).shape
        except RuntimeError:
            with pytest.raises(RuntimeError):
                run(net, x)
        else:
            assert run(net, x)[0].shape == expected == (batch, 3, 2 * height, 2 * width)
    assert run(net, torch.rand(0, 3, 13, 9))[0].shape == (0, 3, 26, 18)


def test_a_whole_network_counts_alike_with_gradients_and_without():
    net = build({"tlc_flag": False}, torch.float32).eval()
    counts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            net(torch.rand(2, 3, 13, 9))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
