"""The CPU kernels: the definition for every option, size, tile and number of threads."""

import os

import definition
import numpy as np
import pytest
import torch
from test_network import VARIANTS, build, defined, pictures
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch import cpu, strips
from dlgsanet_arch.cpu import layers, library
from dlgsanet_arch.network import GDFN, LayerNorm

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason=f"no CPU kernels: {cpu.why_not()}")

RUNNABLE = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(
    torch.backends.cpu.get_cpu_capability(), [library.variant()]
)


@pytest.fixture(params=RUNNABLE)
def variant(request, monkeypatch):
    """Take the kernels of another instruction set that this machine runs."""
    monkeypatch.setattr(library, "variant", lambda: request.param)
    library._library.cache_clear()
    assert library.load() is not None
    yield request.param
    library._library.cache_clear()


@pytest.fixture(params=[(1, 1), (3, 5), (100, 100)], ids="{0[0]}x{0[1]}".format)
def tile(request, monkeypatch):
    """Work in tiles of this size: smaller than any filter, across the borders of windows, whole."""
    monkeypatch.setattr(layers, "_tile", lambda *_: request.param)


@pytest.fixture
def threads():
    """Set the number of threads, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Operators(TorchDispatchMode):
    """Remember which operators ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))

    @property
    def kernels(self):
        return {name for name in self.names if name.startswith("dlgsanet::")}


def run(net, x):
    with torch.no_grad(), Operators() as ran:
        return net(x), ran.kernels


def assert_near(actual, expected):
    """Compare with what float64 gives: 1e-5 of the largest value, as promised for float32."""
    assert actual.dtype == torch.float32
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.usefixtures("variant", "tile")
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_kernels_equal_the_definition(options):
    net = build(options, torch.float32)
    x = pictures(net, 2, (13, 9))
    for training in (True, False):
        out, kernels = run(net.train(training), x)
        assert_near(out, defined(net, x, options, training=training))
        assert "dlgsanet::convolve3x3" in kernels


def test_the_paper_s_layers_all_have_kernels():
    net = build({"groups": 2}, torch.float32).eval()
    _, kernels = run(net, pictures(net, 1, (13, 9)))
    names = ("add_gdfn", "add_mhdlsa", "attention_sums", "add_attended", "convolve3x3")
    assert kernels == {f"dlgsanet::{name}" for name in names}


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("size", [(1, 1), (1, 131), (90, 1), (12, 6), (40, 64), (17, 79), (9, 300)])
def test_any_size(size):
    net = build({"window_size": 7, "tlc_kernel": 16}, torch.float32).eval()
    x = pictures(net, 1, size)
    out, kernels = run(net, x)
    assert kernels
    with torch.no_grad():
        assert_near(out, net.double()(x.double()))


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
    net = build(options, torch.float32).eval()
    x = pictures(net, 2, (21, 70))
    out, kernels = run(net, x)
    assert "dlgsanet::add_mhdlsa" in kernels
    with torch.no_grad():
        assert_near(out, net.double()(x.double()))


def test_larger_filters_are_left_to_pytorch():
    options = {"window_size": cpu.LARGEST_KERNEL + 2, "dim": 4, "idynamic_num_heads": 2}
    net = build({**options, "restormer_num_heads": 1}, torch.float32).eval()
    x = pictures(net, 1, (5, 40))
    out, kernels = run(net, x)
    assert "dlgsanet::add_mhdlsa" not in kernels
    assert "dlgsanet::add_gdfn" in kernels
    with torch.no_grad():
        assert_near(out, net.double()(x.double()))


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
        added = net.float().add_by_kernel(x, norm.float())
    error = (added.double() - x)[:, 0] - expected
    assert float(error.abs().max()) < 1e-6 * max(1, float(expected.abs().max()))
    assert np.allclose(definition.gelu(np.array([1.0])), 0.841345, atol=1e-6)


def test_threads_of_either_kind_give_one_result(threads, monkeypatch):
    net = build({"groups": 2, "tlc_kernel": 16}, torch.float32).eval()
    x = pictures(net, 3, (50, 70))
    threads(1)
    expected, _ = run(net, x)
    threads(3)
    monkeypatch.setattr(layers, "_tile", lambda *_: (8, 16))
    together, _ = run(net, x)
    monkeypatch.setattr(library, "_openmp", lambda: None)
    apart, _ = run(net, x)
    assert torch.equal(apart, together)
    torch.testing.assert_close(together, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own(threads, monkeypatch):
    monkeypatch.setattr(library, "_openmp", lambda: None)
    threads(2)
    convolve = (torch.rand(1, 2, 20, 20), torch.rand(3, 2, 3, 3), None)
    expected = cpu.convolve3x3(*convolve)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1" if torch.equal(cpu.convolve3x3(*convolve), expected) else b"0")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.waitpid(child, 0)
    os.close(reader)


def test_no_memory_is_an_error_that_says_so():
    x = torch.rand(1, 4, 3, 3)
    with pytest.raises(MemoryError, match="convolve3x3"):
        library.run("convolve3x3", [x, x, None, x], [1, 3, 3, 3, 3, 4, 1 << 40])


def _observe(net, monkeypatch):
    net.deep_feature_extraction[0].body[0].IDynamicDWConv.register_forward_hook(lambda *_: None)


def _replace(net, monkeypatch):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net.deep_feature_extraction[0].body[0].IDynamicDWConv.conv0 = Doubled(12, 12, 1, bias=False)


def _weight_norm(net, monkeypatch):
    conv = net.deep_feature_extraction[0].body[0].IDynamicDWConv.conv0
    nn.utils.parametrizations.weight_norm(conv)


def _override(net, monkeypatch):
    conv = net.deep_feature_extraction[0].body[0].IDynamicDWConv.conv0
    monkeypatch.setattr(conv, "forward", lambda x: -nn.Conv2d.forward(conv, x))


@pytest.mark.parametrize("change", [_observe, _replace, _weight_norm, _override])
def test_what_is_observed_or_replaced_runs_as_a_module(change, monkeypatch):
    net = build({}, torch.float32).eval()
    change(net, monkeypatch)
    x = pictures(net, 1, (13, 9))
    out, kernels = run(net, x)
    assert "dlgsanet::add_mhdlsa" not in kernels
    torch.testing.assert_close(out, net(x).detach())


def test_a_hook_is_called():
    net = build({}, torch.float32).eval()
    seen = []
    net.deep_feature_extraction[0].body[1].restormer_ffn.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    run(net, pictures(net, 1, (13, 9)))
    assert seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_pytorch(dtype):
    net = build({}, dtype).eval()
    _, kernels = run(net, pictures(net, 1, (13, 9)))
    assert kernels <= {"dlgsanet::projected_dwconv"}


def test_weights_of_another_dtype_are_refused_as_ever():
    net = build({}, torch.float32).eval()
    net.deep_feature_extraction[0].body[0].IDynamicDWConv.conv0.double()
    with pytest.raises(RuntimeError, match=r"same|type"):
        run(net, torch.rand(1, 3, 13, 9))


def test_gradients_come_from_pytorch():
    net = build({}, torch.float32)
    x = pictures(net, 1, (13, 9))
    with Operators() as ran:
        net(x).mean().backward()
    assert ran.kernels <= {"dlgsanet::projected_dwconv", "dlgsanet::projected_dwconv_backward"}
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_without_kernels_strips_give_the_same(monkeypatch):
    net = build({"groups": 2}, torch.float32).eval()
    x = pictures(net, 2, (40, 23))
    expected, _ = run(net, x)
    monkeypatch.setattr(library, "load", lambda: None)
    out, kernels = run(net, x)
    assert kernels <= {"dlgsanet::projected_dwconv"}
    torch.testing.assert_close(out, expected)


def test_any_layout_of_input_and_weights():
    net = build({}, torch.float32).eval()
    x = pictures(net, 2, (26, 18))[:, :, ::2, ::2]
    expected, _ = run(net, x.contiguous())
    assert torch.equal(run(net, x)[0], expected)
    net = net.to(memory_format=torch.channels_last)
    assert torch.equal(run(net, x.to(memory_format=torch.channels_last))[0], expected)


def test_nothing_gives_nothing():
    net = build({}, torch.float32).eval()
    out, _ = run(net, torch.rand(0, 3, 13, 9))
    assert out.shape == (0, 3, 26, 18)


def test_rows_beyond_the_picture_are_never_written():
    """Memory before and behind a map stays as it is: no tile and no vector reaches over an end."""
    x, weight = torch.rand(1, 2, 5, 7), torch.rand(7, 2, 3, 3)
    whole = torch.full((7 * 5 * 7 + 64,), -1.0)
    out = whole[32:-32].view(1, 7, 5, 7)
    library.run("convolve3x3", [x, weight, None, out], [1, 5, 7, 2, 3, 2, 7])
    assert (whole[:32] == -1).all()
    assert (whole[-32:] == -1).all()
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, padding=1))


def operators():
    """Return calls of every operator, with sizes that differ from one another."""
    x, norm = torch.rand(2, 6, 5, 7), (torch.rand(6), torch.rand(6))
    gdfn = (torch.rand(8, 6, 1, 1), torch.rand(8, 1, 3, 3), torch.rand(6, 4, 1, 1))
    mhdlsa = (
        *(torch.rand(6, 6, 1, 1), torch.rand(2, 6, 1, 1), torch.rand(2)),
        *(torch.rand(2, 1, 3, 3), torch.rand(2), torch.rand(27, 2, 1, 1), torch.rand(27)),
        torch.rand(6, 6, 1, 1),
    )
    qkv = (torch.rand(18, 6, 1, 1), torch.rand(18, 1, 3, 3))
    cuts = ([0, 2, 5], [0, 7])
    return {
        "add_gdfn": (x, *norm, *gdfn),
        "add_mhdlsa": (x, *norm, *mhdlsa),
        "attention_sums": (x, *norm, *qkv, 2, *cuts, [2, 7]),
        "add_attended": (x, x + 1, torch.rand(2, 2, 1, 6, 6), *cuts),
        "convolve3x3": (x, torch.rand(5, 6, 3, 3), torch.rand(5)),
    }


@pytest.mark.parametrize(
    "name", ["add_gdfn", "add_mhdlsa", "attention_sums", "add_attended", "convolve3x3"]
)
def test_operators_are_what_they_declare(name):
    operator = getattr(torch.ops.dlgsanet, name).default
    torch.library.opcheck(
        operator, operators()[name], test_utils=("test_schema", "test_faketensor")
    )


def test_flops_are_those_of_the_plain_layers(monkeypatch):
    net = build({"tlc_flag": False, "dim": 24, "window_size": 5}, torch.float32).eval()
    monkeypatch.setattr(layers, "_tile", lambda *_: (100, 100))

    def count_a_pixel():
        counts = []
        for height in (13, 14):  # what is done once a window is no part of it
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net(torch.rand(2, 3, height, 9))
            counts.append(counter.get_total_flops())
        return (counts[1] - counts[0]) / (2 * 9)

    by_kernels = count_a_pixel()
    monkeypatch.setattr(strips, "pay_for", lambda x: False)
    # v is met by one matrix, the projection included, in place of two.
    assert by_kernels == count_a_pixel() - 2 * 24 * (24 // 6)


def test_inference_mode_leaves_nothing_that_training_trips_over():
    net = build({}, torch.float32).eval()
    x = pictures(net, 1, (13, 9))
    layers._cells.cache_clear()
    with torch.inference_mode():
        inferred = net(x)
    out, kernels = run(net, x)
    assert kernels
    assert torch.equal(out, inferred)
    net.train()(x).mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
