"""Inference in strips on a CPU: the definition at any height of strip, and no whole wide map."""

import pytest
import torch
from test_network import TINY, VARIANTS, build, defined, pictures
from torch.utils._python_dispatch import TorchDispatchMode

from dlgsanet_arch import DLGSANet, strips
from dlgsanet_arch.cpu import library


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: None)


@pytest.fixture(params=[1, 3, 8])
def least_rows(request, monkeypatch):
    """Make strips of this many rows, below and above the border of every filter."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 1)
    monkeypatch.setattr(strips, "LEAST_ROWS", request.param)


@pytest.mark.usefixtures("least_rows")
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_strips_equal_the_definition(options):
    net = build(options)
    x = pictures(net, 2, (13, 9))
    with torch.no_grad():
        torch.testing.assert_close(net.train()(x), defined(net, x, options, training=True))
        torch.testing.assert_close(net.eval()(x), defined(net, x, options, training=False))


@pytest.mark.parametrize("size", [(1, 1), (1, 31), (31, 1), (12, 6), (40, 23)])
def test_strips_equal_whole_maps(size, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 6 * 24 * size[1])
    net = build({}).eval()
    x = pictures(net, 3, size)
    with torch.no_grad():
        in_strips = net(x)
    torch.testing.assert_close(in_strips, net(x).detach())


@pytest.mark.usefixtures("least_rows")
def test_layers_leave_what_they_are_given_as_it_was():
    net = build({}, torch.float32).eval()
    group = net.deep_feature_extraction[0]
    x = torch.rand(2, 12, 13, 9).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        for layer in (*group.body[:-1], group):
            layer(x)
            assert torch.equal(x, before)


def test_sums_over_pixels_are_kept_in_float32(monkeypatch):
    monkeypatch.setattr(strips, "LEAST_ROWS", 5)
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 1)
    seen = []
    ones = torch.ones(1, 4, 64, 64, dtype=torch.bfloat16)

    def matrices(products, squares):
        seen.extend([products, squares])
        return torch.zeros_like(products, dtype=torch.bfloat16)

    strips.add_attention(
        ones, lambda x, rows: x[:, :, rows].repeat(1, 3, 1, 1), matrices, window=None
    )
    # In bfloat16 a sum of ones stops at 256.
    assert all(torch.equal(each, torch.full_like(each, 64 * 64)) for each in seen)
    assert {each.dtype for each in seen} == {torch.float32}


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements that any operator returned in new memory."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
        return result


def test_no_map_wider_than_the_features_is_whole():
    net = DLGSANet(**TINY, buildblock_type="sparseedge", upsampler="pixelshuffledirect").eval()
    height, width = 384, 128
    x = torch.rand(1, 3, height, width)
    with torch.no_grad(), LargestTensor() as whole:
        net(x)
    assert whole.elements <= max(height * width * 48, 2 * strips.STRIP_ELEMENTS)


def test_gradients_autocast_and_compilers_get_whole_maps():
    x = torch.rand(1, 4, 5, 6)
    assert not strips.pay_for(x)
    with torch.no_grad():
        assert strips.pay_for(x)
        assert not strips.pay_for(x.to("meta"))
        with torch.autocast("cpu"):
            assert not strips.pay_for(x)
        assert not torch.compile(strips.pay_for, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("rows", [slice(0, 9), slice(0, 2), slice(3, 4), slice(2, 9), None])
def test_depthwise_computes_the_rows_asked_for(rows):
    conv = torch.nn.Conv2d(4, 4, 5, padding=2, groups=4).double()
    x = torch.rand(1, 4, 9, 7, dtype=torch.float64)
    expected = conv(x) if rows is None else conv(x)[:, :, rows]
    torch.testing.assert_close(strips.depthwise(conv, x, rows), expected)


def test_inference_mode_leaves_nothing_that_training_trips_over():
    net = build({}, torch.float32)
    x = pictures(net, 1, (13, 9))
    with torch.inference_mode():
        inferred = net.eval()(x)
    with torch.no_grad():
        assert torch.equal(net(x), inferred)
    net.train()(x).mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
