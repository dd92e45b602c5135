"""The network against its float64 definition, and what PyTorch is expected to do with it."""

import inspect
import itertools
import shutil

import definition
import numpy as np
import pytest
import torch
from helpers import SMALL_ARGUMENTS
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.layers import Conv3x3
from dlgsanet_arch.ops import channel_attention

BASE = {**SMALL_ARGUMENTS, "tlc_kernel": 6}
VARIANTS = {
    "paper": {},
    "two groups of two blocks": {"groups": 2, "blocks": 2},
    "windows with softmax": {"buildblock_type": "edge"},
    "softmax only": {"buildblock_type": "restormer", "blocks": 2},
    "local only": {"buildblock_type": "idynamic", "blocks": 2},
    "static depthwise": {"idynamic": False},
    "one channel a filter": {"idynamic_num_heads": 1, "restormer_num_heads": 12},
    "one filter for all": {"idynamic_num_heads": 12, "restormer_num_heads": 1},
    "heads unequal": {"idynamic_num_heads": 3, "restormer_num_heads": 4},
    "kernel 1": {"window_size": 1},
    "kernel 9": {"window_size": 9},
    "gelu": {"activation": "gelu"},
    "sigmoid": {"activation": "sigmoid"},
    "no windows": {"tlc_flag": False},
    "narrow GDFN": {"idynamic_ffn_expansion_factor": 0.5, "restormer_ffn_expansion_factor": 2.66},
    "plain feed-forward": {
        "idynamic_ffn_type": "BaseFFN",
        "restormer_ffn_type": "BaseFFN",
        "idynamic_ffn_expansion_factor": 1.5,
    },
    "body_norm": {"body_norm": True},
    "gray": {"in_chans": 1, "img_range": 255.0},
    "two channels": {"in_chans": 2},
    "x1 direct": {"upscale": 1},
    "x3 direct": {"upscale": 3},
    "pixelshuffle x2": {"upsampler": "pixelshuffle"},
    "pixelshuffle x3": {"upsampler": "pixelshuffle", "upscale": 3},
    "pixelshuffle x4": {"upsampler": "pixelshuffle", "upscale": 4},
    "no upsampler": {"upsampler": "", "upscale": 5},
}
TINY = {"dim": 48, "groups": 3, "blocks": 3, "window_size": 7, "tlc_kernel": 48, "upscale": 4}


def build(options: dict, dtype: torch.dtype = torch.float64) -> DLGSANet:
    """Build a network whose norms and temperatures matter: defaults are ones and zeros."""
    net = DLGSANet(**{**BASE, **options}).to(dtype)
    if net.in_chans == 3:
        net.mean.copy_(torch.tensor(definition.MEAN, dtype=torch.float64).view(3, 1, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() in (1, 3):
                parameter += 0.3 * torch.randn_like(parameter)
    return net


def defined(net: DLGSANet, x: torch.Tensor, options: dict, training: bool) -> torch.Tensor:
    parameters = {key: value.double().numpy() for key, value in net.state_dict().items()}
    return torch.from_numpy(
        definition.network(x.double().numpy(), parameters, {**BASE, **options}, training=training)
    )


def images(net: DLGSANet, batch: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(batch, net.in_chans, *size, dtype=net.mean.dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().std())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_option_equals_the_definition(options):
    net = build(options)
    x = images(net, 2, (9, 7))
    with torch.no_grad():
        torch.testing.assert_close(net.train()(x), defined(net, x, options, training=True))
        torch.testing.assert_close(net.eval()(x), defined(net, x, options, training=False))


@pytest.mark.parametrize(
    ("batch", "size"),
    [(1, (1, 1)), (2, (1, 2)), (3, (5, 1)), (1, (6, 6)), (3, (7, 20)), (2, (13, 6))],
)
def test_any_size_and_batch(batch, size):
    net = build({}).eval()
    x = images(net, batch, size)
    with torch.no_grad():
        torch.testing.assert_close(net(x), defined(net, x, {}, training=False))


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4)]
PRECISIONS += [(torch.bfloat16, 0.15), (torch.float16, 0.02)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_precision(dtype, tolerance):
    net = build({}, dtype).eval()
    x = images(net, 2, (13, 9))
    with torch.no_grad():
        out = net(x)
    assert out.dtype == dtype
    assert relative_error(out, defined(net, x, {}, training=False)) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_precision_on_cuda(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = build({}, dtype).eval()
    x = images(net, 2, (13, 9))
    expected = defined(net, x, {}, training=False)
    net, x = net.cuda(), x.cuda()
    with torch.no_grad():
        assert relative_error(net(x).cpu(), expected) < tolerance
        first = net(x)
        assert all(torch.equal(net(x), first) for _ in range(3))  # no atomic adds
    net.train()(x).float().abs().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_autocast_trains():
    net = build({}, torch.float32)
    x = images(net, 2, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    out.float().abs().mean().backward()
    assert relative_error(out.detach(), net(x).detach()) < 0.15
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_has_a_gradient(options):
    net = build(options)
    net(images(net, 1, (6, 5))).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradients_in_eval_mode_go_through_the_windows():
    net = build({"dim": 4, "idynamic_num_heads": 2, "restormer_num_heads": 2, "tlc_kernel": 3})
    net.eval()
    x = images(net, 1, (4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(net, x, fast_mode=True)


def test_attention_survives_half_precision_on_a_whole_image():
    # Σ q·k over 57,600 pixels is far beyond float16's largest value.
    qkv = torch.full((1, 12, 180, 320), 4.0, dtype=torch.float16)
    temperature = torch.ones(1, 1, 1, dtype=torch.float16)
    out = channel_attention(qkv, temperature, 1, "relu")
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.full_like(out, 16.0))  # four similarities of 1 · 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_of_a_black_map_is_zero_not_nan(dtype):
    qkv = torch.zeros(1, 12, 2, 5, dtype=dtype)
    qkv[:, 8:] = 1
    qkv.requires_grad_()
    out = channel_attention(qkv, torch.ones(1, 1, 1, dtype=dtype), 1, "relu")
    assert torch.equal(out, torch.zeros_like(out))
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.isfinite().all()


def test_batch_items_do_not_meet():
    net = build({}).eval()
    x = images(net, 3, (13, 9))
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(item[None]) for item in x]))


def test_eval_twice_gives_the_same_bits_and_keeps_no_state():
    net = build({}, torch.float32).eval()
    before = set(net.__dict__)
    x = images(net, 2, (13, 9))
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
    assert set(net.__dict__) == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("batch", "size"), [(2, (20, 14)), (1, (40, 24))])
def test_threads_change_no_bit_of_a_training_step(batch, size, training, threads):
    net = build({"groups": 2, "tlc_kernel": 16}, torch.float32).train(training)
    x = images(net, batch, size).requires_grad_()
    steps = []
    for count in (1, 2, 3):
        threads(count)
        out = net(x)
        gradients = torch.autograd.grad(out.abs().mean(), [x, *net.parameters()])
        steps.append((out.detach(), *gradients))
    # Gradients of 3x3 convolutions are PyTorch's own sums, cut among the threads.
    own = {id(p) for each in net.modules() if isinstance(each, Conv3x3) for p in each.parameters()}
    names = ["output", "input", *(name for name, _ in net.named_parameters())]
    owners = [x, x, *net.parameters()]
    for name, owner, first, *others in zip(names, owners, *steps, strict=True):
        for other in others:
            if id(owner) in own:
                torch.testing.assert_close(other, first)
            else:
                assert torch.equal(other, first), name


def assert_compiled(compiled, net, x):
    out, expected = compiled(x), net(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    found, expected = (
        torch.autograd.grad(each.abs().mean(), list(net.parameters())) for each in (out, expected)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_other_sizes_and_batches_without_a_graph_break(dynamic):
    torch.compiler.reset()
    net = build({}, torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=dynamic)
    for batch, size in ((2, (7, 6)), (2, (5, 8)), (3, (5, 8))):
        assert_compiled(compiled, net, images(net, batch, size))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_for_ten_sizes_in_a_few_graphs(training):
    torch.compiler.reset()
    net = build({}, torch.float32).train(training)
    graphs = []
    compiled = torch.compile(
        net, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for side in range(7, 17):  # in eval mode within several windows down and across
        x = images(net, 1 + side % 3, (side, 2 * side))
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 4


@pytest.mark.parametrize("training", [True, False])
def test_compiles_with_its_backward(training):
    torch.compiler.reset()
    net = build({}).train(training)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_compiled(compiled, net, images(net, 2, (8, 7)))


def test_what_is_compiled_is_hooked_as_it_was_before():
    torch.compiler.reset()
    net = build({}, torch.float32).eval()
    attention = net.deep_feature_extraction[0].body[1].restormer_attn
    attention.project_out.register_forward_hook(lambda module, given, out: 3 * out)
    attention.qkv_dwconv.dilation = attention.qkv_dwconv.padding = (2, 2)
    x = images(net, 2, (6, 5))
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    torch.compiler.reset()
    net = build({}, torch.float32).eval()
    x = images(net, 2, (8, 7))
    with torch.no_grad():
        out = torch.compile(net, fullgraph=True)(x)
        torch.testing.assert_close(out, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_compiled_with_graphs_it_trains_as_without_on_cuda():
    torch.compiler.reset()
    losses = []
    for mode in (None, "reduce-overhead"):
        torch.manual_seed(0)
        net = build({}, torch.float32).train().cuda()
        if mode:
            net.compile(mode=mode)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        x = images(net, 2, (16, 16)).cuda()
        losses.append([])
        for _ in range(5):  # the first ones are not replayed
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                out = net(x)
            loss = out.float().square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[0][-1] < 0.97 * losses[0][0]


@pytest.mark.parametrize("windows", [False, True])
def test_exports_to_plain_operators(windows):
    """With dynamic sizes, or with windows at a fixed size."""
    net = build({"tlc_flag": windows}, torch.float32).eval()
    sizes = [(2, (13, 9))] if windows else [(2, (8, 7)), (1, (13, 5)), (3, (6, 9))]
    batch, height, width = (torch.export.Dim(name, min=1, max=512) for name in "bhw")
    dynamic = None if windows else [{0: batch, 2: height, 3: width}]
    program = torch.export.export(net, (images(net, *sizes[0]),), dynamic_shapes=dynamic)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert not any("dlgsanet" in str(each) for each in called)
    for size in sizes:
        x = images(net, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


def test_flops_of_tiny_are_those_of_the_formulas():
    with torch.device("meta"):
        net = DLGSANet(**{**BASE, **TINY}).train()
        x = torch.empty(1, 3, 180, 320)
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert round(counter.get_total_flops() / 1e9, 3) == 69.337


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ({"dim": 48, "groups": 3}, (565_710, 572_205, 581_298)),
        ({"dim": 48, "groups": 4}, (745_188, 751_683, 760_776)),
        ({"dim": 90, "groups": 6, "blocks": 4}, (4_733_724, 4_745_889, 4_762_920)),
    ],
)
def test_published_parameter_counts(sizes, counts):
    for scale, count in zip((2, 3, 4), counts, strict=True):
        with torch.device("meta"):
            net = DLGSANet(**{**BASE, **TINY, **sizes, "upscale": scale})
        assert sum(p.numel() for p in net.parameters()) == count


def test_mean_follows_device_and_dtype_and_is_no_entry_of_a_checkpoint():
    net = build({}).to(torch.bfloat16)
    assert net.mean.dtype == torch.bfloat16
    assert net.to("meta").mean.is_meta
    assert not any("mean" in key for key in net.state_dict())


def test_defaults_are_the_published_ones():
    parameters = inspect.signature(DLGSANet).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults == {**definition.DEFAULTS, "input_resolution": None}
    with torch.device("meta"):
        DLGSANet()
        DLGSANet(**BASE, input_resolution=(64, 64))


NOT_COUNTS = (0, -1, 2.5, "3", True, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("in_chans", "dim", "groups", "blocks", "upscale"), NOT_COUNTS),
        *itertools.product(("window_size", "tlc_kernel"), NOT_COUNTS),
        *itertools.product(("idynamic_num_heads", "restormer_num_heads"), NOT_COUNTS),
        *itertools.product(
            ("idynamic_ffn_expansion_factor", "restormer_ffn_expansion_factor"),
            (0, -1.0, 0.01, float("nan"), float("inf")),
        ),
        *itertools.product(("img_range",), (0, -1.0, float("nan"), float("inf"))),
        *itertools.product(("buildblock_type", "activation"), ("softmax", "", None)),
        *itertools.product(("idynamic_ffn_type", "restormer_ffn_type"), ("gdfn", "", None)),
        *itertools.product(("idynamic", "tlc_flag", "body_norm"), ("false", None, 2)),
        ("upsampler", "nearest+conv"),
        ("dim", 13),
        ("dim", 2),
        ("window_size", 4),
        ("idynamic_num_heads", 5),
        ("restormer_num_heads", 8),
    ],
)
def test_a_value_that_cannot_be_built_is_named(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        DLGSANet(**{**BASE, name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("upscale", [1, 5, 6, 12])
def test_pixelshuffle_makes_powers_of_two_and_three_only(upscale):
    with pytest.raises(ValueError, match=f"upscale.*{upscale}"):
        DLGSANet(**{**BASE, "upsampler": "pixelshuffle", "upscale": upscale})


def test_heads_that_a_block_type_does_not_use_need_not_divide():
    DLGSANet(**{**BASE, "buildblock_type": "idynamic", "restormer_num_heads": 5})
    DLGSANet(**{**BASE, "buildblock_type": "restormer", "idynamic_num_heads": 5})
    DLGSANet(**{**BASE, "dim": np.int64(12)})


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8), (8, 8, 3)])
def test_images_of_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        build({}, torch.float32)(torch.rand(shape))
