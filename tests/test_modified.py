"""Networks that are hooked, wrapped, adapted, pruned or set otherwise after they were built.

Whatever computes a network, a changed one gives what a plain network of PyTorch's layers gives,
where each module is called: with gradients and without.
"""

import contextlib
import copy
import functools
import io
import pickle
from unittest import mock

import pytest
import torch
from test_network import build, images
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

from dlgsanet_arch import as_built, fused, layers, network
from dlgsanet_arch.cpu import library
from dlgsanet_arch.layers import Conv1x1, Conv3x3, DepthwiseConv, LayerNorm

# All kinds of modules that a network can have.
NETWORKS = {
    "paper": {},
    "variants": {
        "idynamic": False,
        "idynamic_ffn_type": "BaseFFN",
        "body_norm": True,
        "upsampler": "pixelshuffle",
    },
}
GROUP = "deep_feature_extraction.0.body"
LOCAL, GLOBAL = f"{GROUP}.0", f"{GROUP}.1"
MHDLSA, LOCAL_FFN = f"{LOCAL}.IDynamicDWConv", f"{LOCAL}.IDynamic_ffn"
GSA, GLOBAL_FFN = f"{GLOBAL}.restormer_attn", f"{GLOBAL}.restormer_ffn"


def put(net, name, module):
    """Put a module in the place of the one with this name."""
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, module)


@contextlib.contextmanager
def plain():
    """Call every module, and let PyTorch's own layers and operators compute."""
    with pytest.MonkeyPatch.context() as patch:
        for user in (network, layers, fused):
            patch.setattr(user, "is_as_built", lambda *_: False)
        patch.setattr(layers, "_has_settings", lambda *_: False)
        patch.setattr(library, "load", lambda: None)
        yield


def expected_of(net, x):
    """Return what a plain network gives in float64; the network is left as it was."""
    dtype = x.dtype
    with plain(), torch.no_grad():
        out = net.double()(x.double())
    net.to(dtype)
    return out


def made(options=None, size=(9, 7), batch=2):
    """A network in eval mode and images for it."""
    net = build(options or {}, torch.float32).eval()
    return net, images(net, batch, size)


def fresh(options=None, size=(9, 7)):
    """A network in eval mode, images for it, and what it gives before it is changed."""
    net, x = made(options, size)
    return net, x, expected_of(net, x)


def error(actual, expected):
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())


def assert_computes(net, x, unchanged=None):
    """Assert that a changed network computes as a plain one, and another result than before."""
    expected = expected_of(net, x)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert error(net(x), expected) < 1e-5
    if unchanged is not None and unchanged.shape == expected.shape:
        assert error(unchanged, expected) > 1e-4


def assert_gradients(net, x):
    """Assert that all gradients are those of a plain network."""

    def gradients(net, x):
        x = x.clone().requires_grad_()
        parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        loss = net(x).square().mean()
        found = torch.autograd.grad(loss, [x, *parameters.values()])
        return dict(zip(["input", *parameters], found, strict=True))

    found = gradients(net, x)
    with plain():
        expected = gradients(net.double(), x.double())
    net.to(x.dtype)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        apart = float((found[name] - grad).abs().max())
        assert apart < 1e-4 * grad.abs().max() + 1e-6 * largest, name


def scaled(x):
    """Multiply by a factor that differs from value to value: norms undo one that is the same."""
    return x * (2 + torch.arange(x.numel(), dtype=x.dtype).sin()).view_as(x)


def _hooked(register, on_module=True):
    """Change a module's output, or its input before the forward, by a hook put on by `register`."""

    @contextlib.contextmanager
    def change(net, name):
        chosen = net.get_submodule(name)

        def hook(module, given, *others):
            values = others[-1] if others else given[0]
            if module is chosen:
                return scaled(values) if others else (scaled(values), *given[1:])
            return None

        handle = register(chosen)(hook) if on_module else register(hook)
        yield
        handle.remove()

    return change


def _own_forward(net, name):
    module = net.get_submodule(name)
    before = module.forward
    return mock.patch.object(module, "forward", lambda x: scaled(before(x)))


@contextlib.contextmanager
def _subclass(net, name):
    module = net.get_submodule(name)
    kind = type(module)
    forward = {"forward": lambda self, x: scaled(kind.forward(self, x))}
    module.__class__ = type(kind.__name__, (kind,), forward)
    yield
    module.__class__ = kind


def _forward_of_class(net, name):
    chosen = net.get_submodule(name)
    before = type(chosen).forward

    def forward(self, *given):
        out = before(self, *given)
        return scaled(out) if self is chosen else out

    return mock.patch.object(type(chosen), "forward", forward)


class Scaled(nn.Module):
    """A module in place of another, without its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return scaled(self.inner(x))


@contextlib.contextmanager
def _wrapper(net, name):
    module = net.get_submodule(name)
    put(net, name, Scaled(module))
    yield
    put(net, name, module)


CHANGES = {
    "hook": _hooked(lambda module: module.register_forward_hook),
    "hook with kwargs": _hooked(
        lambda module: functools.partial(
            module.register_forward_hook, with_kwargs=True, always_call=True
        )
    ),
    "pre-hook": _hooked(lambda module: module.register_forward_pre_hook),
    "global hook": _hooked(torch_module.register_module_forward_hook, on_module=False),
    "global pre-hook": _hooked(torch_module.register_module_forward_pre_hook, on_module=False),
    "own forward": _own_forward,
    "subclass": _subclass,
    "forward of its class": _forward_of_class,
    "wrapper": _wrapper,
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_module_is_called(options, change):
    net, x, unchanged = fresh(options)
    wrong = {}
    for name in [name for name, _ in net.named_modules()]:
        if not name and change is _wrapper:
            continue  # the network itself lies in no other
        with change(net, name):
            expected = expected_of(net, x)
            errors = [error(net(x), expected)]
            with torch.no_grad():
                errors.append(error(net(x), expected))
        if max(errors) > 1e-5 or error(unchanged, expected) < 1e-4:
            wrong[name] = errors, error(unchanged, expected)
    assert wrong == {}
    assert_computes(net, x)
    assert error(net(x), unchanged) < 1e-5  # all changes were undone


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_see_each_module_once_and_the_whole_batch(options, grad):
    net, x = made(options, batch=3)
    names = [name for name, _ in net.named_modules()]

    def seen_by(hooked):
        seen = []
        with contextlib.ExitStack() as hooks, torch.set_grad_enabled(grad):
            for name in hooked:
                register = net.get_submodule(name).register_forward_hook
                hook = register(lambda *given, name=name: seen.append((name, given[2].shape)))
                hooks.enter_context(hook)
            net(x)
        return sorted(seen)

    together = seen_by(names)
    assert [name for name, _ in together] == sorted(names)
    assert all(shape[0] == len(x) for _, shape in together)
    assert sorted(seen for name in names for seen in seen_by([name])) == together


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hooks_of_every_module_are_called(options, register):
    net, x = made(options)
    x.requires_grad_()
    unhooked = net(x).detach().double()
    called = []

    def hook(name, module):
        def turned(module, grads, *_):
            called.append(name)
            return tuple(None if each is None else -each for each in grads)

        return getattr(module, register)(turned)

    for name, module in net.named_modules():
        handle = hook(name, module)
        out = net(x)
        out.mean().backward()
        with torch.no_grad():
            assert error(net(x), unhooked) < 1e-5, name
        assert error(out, unhooked) < 1e-5, name
        handle.remove()
    assert called == [name for name, _ in net.named_modules()]
    for name, module in net.named_modules():
        hook(name, module)
    assert_computes(net, x)
    assert_gradients(net, x)


def test_a_global_backward_hook_is_called_for_every_module():
    net, x = made()
    x.requires_grad_()
    seen = set()
    with torch_module.register_module_full_backward_hook(lambda module, *_: seen.add(module)):
        net(x).mean().backward()
    assert seen == set(net.modules())


def test_a_subclass_that_inherits_forward_is_called():
    class Whole(network.SparseGSA):
        def eval_window(self):
            return None

    net, x, unchanged = fresh()
    net.get_submodule(GSA).__class__ = Whole
    assert_computes(net, x, unchanged)


def depthwise(channels, kernel, bias):
    sizes = {"padding": kernel // 2, "groups": channels}
    return DepthwiseConv(channels, channels, kernel, **sizes, bias=bias)


def pointwise(ins, outs, bias=True):
    return Conv1x1(ins, outs, 1, bias=bias)


PROJECT_IN, DWCONV = f"{LOCAL_FFN}.project_in", f"{LOCAL_FFN}.dwconv"
GENERATOR = f"{MHDLSA}.conv"
# What makes the module that takes the place of another.
REPLACEMENTS = [
    (f"{LOCAL}.norm1", nn.Identity),
    (f"{LOCAL}.norm1", lambda: nn.BatchNorm2d(12).eval()),
    (f"{LOCAL}.norm1", lambda: nn.Sequential(LayerNorm(12), LayerNorm(12))),
    (f"{GLOBAL}.norm4", nn.Identity),
    (f"{LOCAL}.norm2.body", nn.Identity),
    (f"{LOCAL}.norm2.body", lambda: nn.Sequential(nn.LayerNorm(12), nn.GELU())),
    (f"{LOCAL}.norm2.body", lambda: nn.LayerNorm(12, elementwise_affine=False)),
    (f"{LOCAL}.norm2.body", lambda: nn.LayerNorm(12, bias=False)),
    (f"{GLOBAL}.norm3.body", lambda: nn.RMSNorm(12)),
    (PROJECT_IN, lambda: Conv3x3(12, 48, 3, padding=1)),
    (PROJECT_IN, lambda: pointwise(12, 48)),
    (PROJECT_IN, lambda: nn.Conv2d(12, 48, 1)),
    (PROJECT_IN, lambda: nn.Sequential(pointwise(12, 5, False), pointwise(5, 48, False))),
    (PROJECT_IN, lambda: nn.Sequential(pointwise(12, 48, False))),
    (DWCONV, lambda: Conv3x3(48, 48, 3, padding=1, bias=False)),
    (DWCONV, lambda: depthwise(48, 3, bias=True)),
    (DWCONV, lambda: depthwise(48, 5, bias=False)),
    (DWCONV, nn.Identity),
    (f"{LOCAL_FFN}.project_out", lambda: pointwise(24, 12)),
    (f"{LOCAL_FFN}.project_out", lambda: torch.jit.script(nn.Conv2d(24, 12, 1))),
    (LOCAL_FFN, nn.Identity),
    (LOCAL_FFN, lambda: pointwise(12, 12)),
    (LOCAL_FFN, lambda: nn.Sequential(pointwise(12, 12), nn.GELU())),
    (LOCAL_FFN, lambda: network.GDFN(12, 5)),
    (LOCAL_FFN, lambda: network.BaseFFN(12, 5)),
    (MHDLSA, nn.Identity),
    (MHDLSA, lambda: network.MHDLSA(12, 3, 5, dynamic=True)),
    (MHDLSA, lambda: network.GDFN(12, 5)),
    (f"{MHDLSA}.conv0", lambda: Conv3x3(12, 12, 3, padding=1)),
    (f"{MHDLSA}.conv1", lambda: pointwise(12, 12)),
    (GENERATOR, lambda: depthwise(12, 7, bias=True)),
    (GENERATOR, lambda: network.FilterGenerator(12, 4, 5)),
    (f"{GENERATOR}.conv1", lambda: pointwise(12, 3)),
    (f"{GENERATOR}.conv1.0", lambda: pointwise(12, 3, False)),
    (f"{GENERATOR}.conv1.1", lambda: depthwise(3, 5, bias=True)),
    (f"{GENERATOR}.conv1.1", lambda: Conv3x3(3, 3, 3, padding=1)),
    (f"{GENERATOR}.conv2", lambda: pointwise(3, 18)),
    (f"{GENERATOR}.conv2.0", lambda: pointwise(3, 18, False)),
    (f"{GENERATOR}.conv2.0", lambda: pointwise(3, 36)),
    (f"{GENERATOR}.conv2.0", lambda: Conv3x3(3, 18, 3, padding=1)),
    (GSA, lambda: network.SparseGSA(12, 3, "gelu", None)),
    (f"{GSA}.qkv", lambda: pointwise(12, 36)),
    (f"{GSA}.qkv", lambda: Conv3x3(12, 36, 3, padding=1)),
    (f"{GSA}.qkv_dwconv", lambda: depthwise(36, 5, bias=False)),
    (f"{GSA}.qkv_dwconv", lambda: depthwise(36, 3, bias=True)),
    (f"{GSA}.project_out", lambda: Conv3x3(12, 12, 3, padding=1)),
    (f"{GSA}.project_out", lambda: pointwise(12, 12)),
    (f"{GROUP}.2", lambda: pointwise(12, 12)),
    (f"{GROUP}.2", lambda: Conv3x3(12, 12, 3, padding=1, bias=False)),
]


@pytest.mark.parametrize(("name", "make"), REPLACEMENTS)
def test_layers_of_other_kinds_and_sizes_take_a_place(name, make):
    net, x, unchanged = fresh()
    put(net, name, make())
    assert_computes(net, x, unchanged)
    assert_gradients(net, x)


def test_layers_that_change_their_width_together():
    net, x, unchanged = fresh()
    for name, module in {
        f"{GSA}.qkv": pointwise(12, 72, False),
        f"{GSA}.qkv_dwconv": depthwise(72, 3, bias=False),
        f"{GSA}.project_out": pointwise(24, 12, False),
        f"{MHDLSA}.conv0": pointwise(12, 24, False),
        f"{MHDLSA}.conv": network.FilterGenerator(24, 4, 3),
        f"{MHDLSA}.conv1": pointwise(24, 12, False),
    }.items():
        put(net, name, module)
    assert_computes(net, x, unchanged)
    assert_gradients(net, x)


def test_layers_may_be_shared():
    net, x, unchanged = fresh()
    put(net, GLOBAL_FFN, net.get_submodule(LOCAL_FFN))
    put(net, f"{MHDLSA}.conv1", net.get_submodule(f"{MHDLSA}.conv0"))
    put(net, f"{GLOBAL}.norm4", net.get_submodule(f"{GLOBAL}.norm3"))
    assert_computes(net, x, unchanged)
    assert_gradients(net, x)


def train(net, x, steps=3):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    net.eval()


ADAPTED = r".*\.(qkv|project_in|project_out|conv0|conv2\.0)"


def test_peft_s_adapters_train_and_are_validated_as_they_were_trained():
    from peft import LoraConfig, inject_adapter_in_model

    net = build({}, torch.float32)
    x = images(net, 2, (9, 7))
    unchanged = expected_of(net.eval(), x)
    net = inject_adapter_in_model(LoraConfig(r=2, target_modules=ADAPTED), net)
    adapters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 8
    assert all("lora" in name for name in adapters)
    assert_computes(net.eval(), x)
    before = {name: p.detach().clone() for name, p in adapters.items()}
    train(net, x)
    assert [name for name, p in adapters.items() if torch.equal(p, before[name])] == []
    assert_computes(net, x, unchanged)
    assert_gradients(net, x)


class Adapter(nn.Module):
    """A low-rank adapter of a 1x1 convolution, as in LoRA, without a weight of its own name."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


def pointwise_convolutions(net):
    return [(name, m) for name, m in net.named_modules() if isinstance(m, Conv1x1)]


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_adapters_of_every_1x1_convolution(options):
    net = build(options, torch.float32)
    x = images(net, 2, (9, 7))
    unchanged = expected_of(net.eval(), x)
    for name, conv in pointwise_convolutions(net):
        put(net, name, Adapter(conv))
    assert_computes(net, x)
    assert error(net(x), unchanged) < 1e-5
    adapters = [p for n, p in net.named_parameters() if n.endswith(("down.weight", "up.weight"))]
    before = [p.detach().clone() for p in adapters]
    train(net, x)
    assert not any(map(torch.equal, adapters, before))
    assert_computes(net, x, unchanged)
    assert_gradients(net, x)


class Transparent(nn.Module):
    """A wrapper that computes what it wraps."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.wrapped(x)


def _old_weight_norm(conv):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(conv)


# What is made of each 1x1 convolution, and whether the network computes as before.
WRAPPERS = {
    "wrap": (Transparent, True),
    "in sequences": (nn.Sequential, True),
    "old weight norm": (_old_weight_norm, True),
    "weight norm": (parametrizations.weight_norm, True),
    "prune": (lambda conv: prune.l1_unstructured(conv, "weight", amount=0.4), False),
    "double": (
        lambda conv: parametrize.register_parametrization(conv, "weight", Scaled(nn.Identity())),
        False,
    ),
}


def _wrap(net, wrap):
    for name, conv in pointwise_convolutions(net):
        put(net, name, wrap(conv))


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(("wrap", "same"), WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_convolutions_train(options, wrap, same):
    net = build(options, torch.float32)
    x = images(net, 2, (9, 7))
    unwrapped = copy.deepcopy(net)
    _wrap(net, wrap)
    for each in (net, unwrapped):
        for _ in range(2):  # the second fails where a weight was made once and its graph freed
            each(x).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    if wrap in (Transparent, nn.Sequential):
        found = [p.grad for p in net.parameters()]
        expected = [p.grad for p in unwrapped.parameters()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_gradients(net, x)
    unchanged = expected_of(unwrapped.eval(), x)
    assert_computes(net.eval(), x, None if same else unchanged)
    if same:
        assert error(net(x), unchanged) < 1e-5
    train(net, x)
    assert_computes(net, x, unchanged)


def test_every_wrapper_is_called():
    net, x = made()
    _wrap(net, Transparent)
    net(x)
    with torch.no_grad():
        net(x)
    calls = {name: m.calls for name, m in net.named_modules() if isinstance(m, Transparent)}
    assert f"{MHDLSA}.conv.conv2.0" in calls
    assert set(calls.values()) == {2}


def test_what_is_made_permanent_is_as_built_again():
    net, x, unchanged = fresh()
    for number, (_, conv) in enumerate(pointwise_convolutions(net)):
        if number % 2:
            prune.l1_unstructured(conv, "weight", amount=0.4)
            prune.remove(conv, "weight")
        else:
            parametrizations.weight_norm(conv)
            parametrize.remove_parametrizations(conv, "weight")
    assert as_built.is_as_built(*(conv for _, conv in pointwise_convolutions(net)))
    assert_computes(net, x, unchanged)


def _set(name, **settings):
    def change(net):
        module = net.get_submodule(name)
        for key, value in settings.items():
            assert hasattr(module, key)
            setattr(module, key, value)

    return change


def _random(name, key, *shape, **settings):
    def change(net):
        setattr(net.get_submodule(name), key, nn.Parameter(torch.randn(shape)))
        _set(name, **settings)(net)

    return change


def _pruned(net, attributes=False):
    """Keep 5 of the 24 hidden channels of a feed-forward."""
    ffn = net.get_submodule(LOCAL_FFN)
    kept = [*range(5), *range(24, 29)]
    ffn.project_in.weight = nn.Parameter(ffn.project_in.weight[kept].clone())
    ffn.dwconv.weight = nn.Parameter(ffn.dwconv.weight[kept].clone())
    ffn.project_out.weight = nn.Parameter(ffn.project_out.weight[:, :5].clone())
    ffn.dwconv.groups = 10
    if attributes:
        ffn.project_in.out_channels = 10
        ffn.dwconv.in_channels = ffn.dwconv.out_channels = 10
        ffn.project_out.in_channels = 5


def _replaced_function(net):
    conv = net.get_submodule(f"{LOCAL_FFN}.project_in")
    conv._conv_forward = lambda x, weight, bias: -nn.Conv2d._conv_forward(conv, x, weight, bias)


SETTINGS = {
    "norm eps": _set(f"{LOCAL}.norm1.body", eps=1.0),
    "norm eps of a global layer": _set(f"{GLOBAL}.norm3.body", eps=1.0),
    "norm without weight": _set(f"{LOCAL}.norm2.body", weight=None),
    "norm without bias": _set(f"{GLOBAL}.norm4.body", bias=None),
    "dilation": _set(f"{LOCAL_FFN}.dwconv", dilation=(2, 2), padding=(2, 2)),
    "dilation of qkv": _set(f"{GSA}.qkv_dwconv", dilation=(2, 2), padding=(2, 2)),
    "dilation of the generator": _set(f"{MHDLSA}.conv.conv1.1", dilation=(3, 3), padding=(3, 3)),
    "dilation of a 3x3 convolution": _set(f"{GROUP}.2", dilation=(2, 2), padding=(2, 2)),
    "stride": _set(f"{LOCAL_FFN}.dwconv", stride=(2, 2), padding=(4, 4)),
    "stride of a 1x1 convolution": _set(f"{MHDLSA}.conv0", stride=(2, 2), padding=(3, 3)),
    "stride of a 3x3 convolution": _set("upsample.0", stride=(2, 2)),
    "reflect": _set(f"{LOCAL_FFN}.dwconv", padding_mode="reflect"),
    "replicate": _set(f"{GSA}.qkv_dwconv", padding_mode="replicate"),
    "circular": _set(f"{MHDLSA}.conv.conv1.1", padding_mode="circular"),
    "reflect of a 3x3 convolution": _set("upsample.0", padding_mode="reflect"),
    "no padding": _set("upsample.0", padding=(0, 0)),
    "larger filters": _random(f"{LOCAL_FFN}.dwconv", "weight", 48, 1, 5, 5, padding=(2, 2)),
    "larger filters of qkv": _random(
        f"{GSA}.qkv_dwconv", "weight", 36, 1, 5, 5, padding=(2, 2), kernel_size=(5, 5)
    ),
    "3x3 in place of 1x1": _random(f"{MHDLSA}.conv0", "weight", 12, 12, 3, 3, padding=(1, 1)),
    "groups of a 1x1 convolution": _random(
        f"{LOCAL_FFN}.project_in", "weight", 48, 6, 1, 1, groups=2
    ),
    "groups of qkv": _random(f"{GSA}.qkv", "weight", 36, 4, 1, 1, groups=3),
    "a full convolution": _random(f"{LOCAL_FFN}.dwconv", "weight", 48, 48, 3, 3, groups=1),
    "bias": _random(f"{LOCAL_FFN}.project_in", "bias", 48),
    "bias of a depthwise convolution": _random(f"{LOCAL_FFN}.dwconv", "bias", 48),
    "bias of the output": _random(f"{GLOBAL_FFN}.project_out", "bias", 12),
    "bias of qkv": _random(f"{GSA}.qkv", "bias", 36),
    "bias of the depthwise qkv": _random(f"{GSA}.qkv_dwconv", "bias", 36),
    "bias of the attention": _random(f"{GSA}.project_out", "bias", 12),
    "bias of conv0": _random(f"{MHDLSA}.conv0", "bias", 12),
    "bias of conv1": _random(f"{MHDLSA}.conv1", "bias", 12),
    "no bias of the generator": _set(f"{MHDLSA}.conv.conv1.0", bias=None),
    "no bias of its filters": _set(f"{MHDLSA}.conv.conv1.1", bias=None),
    "no bias of its projection": _set(f"{MHDLSA}.conv.conv2.0", bias=None),
    "no bias of a 3x3 convolution": _set(f"{GROUP}.2", bias=None),
    "one temperature": _set(GSA, temperature=nn.Parameter(torch.full((1, 1, 1), 0.3))),
    "heads": _set(GSA, heads=3, temperature=nn.Parameter(torch.full((3, 1, 1), 0.3))),
    "activation": _set(GSA, activation="softmax"),
    "window": _set(GSA, window=3),
    "no window": _set(GSA, window=None),
    "pruned": _pruned,
    "pruned with its attributes": lambda net: _pruned(net, attributes=True),
    "replaced function": _replaced_function,
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_changed_settings_are_followed(change):
    net, x, unchanged = fresh(size=(7, 7))
    change(net)
    assert_computes(net, x, unchanged)
    assert_gradients(net, x)


@pytest.mark.parametrize(
    "change",
    [
        _set(f"{LOCAL_FFN}.dwconv", padding="same"),
        _set(f"{GROUP}.2", padding="same"),
        _set(f"{GSA}.qkv", padding="valid"),
    ],
)
def test_settings_with_the_same_meaning_change_nothing(change):
    net, x, unchanged = fresh(size=(7, 7))
    change(net)
    assert_computes(net, x)
    assert error(net(x), unchanged) < 1e-5


@pytest.mark.parametrize("replace", [True, False])
def test_the_gelu_of_a_plain_feed_forward_may_be_another(replace):
    net, x, unchanged = fresh({"idynamic_ffn_type": "BaseFFN"}, size=(7, 7))
    body = net.get_submodule(f"{LOCAL_FFN}.body")
    if replace:
        body[1] = nn.ReLU()
    else:
        body[1].approximate = "tanh"
    expected = expected_of(net, x)
    with torch.no_grad():
        assert error(net(x), expected) < error(unchanged, expected) / 4


def _part_of_a_weight(name, outs=None, ins=None):
    def change(net):
        module = net.get_submodule(name)
        module.weight = nn.Parameter(module.weight[:outs, :ins].clone())

    return change


INCONSISTENT = {
    "project_in": _part_of_a_weight(f"{LOCAL_FFN}.project_in", 8),
    "project_in's input": _part_of_a_weight(f"{LOCAL_FFN}.project_in", None, 8),
    "dwconv": _part_of_a_weight(f"{LOCAL_FFN}.dwconv", 8),
    "project_out": _part_of_a_weight(f"{LOCAL_FFN}.project_out", None, 8),
    "qkv": _part_of_a_weight(f"{GSA}.qkv", 12),
    "qkv_dwconv": _part_of_a_weight(f"{GSA}.qkv_dwconv", 12),
    "attention's project_out": _part_of_a_weight(f"{GSA}.project_out", None, 4),
    "conv0": _part_of_a_weight(f"{MHDLSA}.conv0", 4),
    "generator": _part_of_a_weight(f"{MHDLSA}.conv.conv1.0", 2),
    "its filters": _part_of_a_weight(f"{MHDLSA}.conv.conv1.1", 2),
    "its projection": _part_of_a_weight(f"{MHDLSA}.conv.conv2.0", 16),
    "its projection's input": _part_of_a_weight(f"{MHDLSA}.conv.conv2.0", None, 2),
    "conv1": _part_of_a_weight(f"{MHDLSA}.conv1", None, 4),
    "3x3": _part_of_a_weight(f"{GROUP}.2", None, 4),
    "bias": _random(f"{MHDLSA}.conv.conv2.0", "bias", 9),
    "norm": _set(f"{LOCAL}.norm1.body", weight=nn.Parameter(torch.ones(6))),
    "temperature": _set(GSA, temperature=nn.Parameter(torch.ones(4, 1, 1))),
    "padding": _set(f"{LOCAL_FFN}.dwconv", padding=(0, 0)),
    "other layer": lambda net: put(net, PROJECT_IN, pointwise(12, 8, False)),
    "other width": lambda net: put(net, LOCAL_FFN, network.GDFN(8, 8)),
    "other groups": lambda net: put(net, f"{MHDLSA}.conv", network.FilterGenerator(12, 5, 3)),
    "other attention": lambda net: put(net, GSA, network.SparseGSA(8, 4, "relu", 4)),
}


@pytest.mark.parametrize("change", INCONSISTENT.values(), ids=INCONSISTENT)
@pytest.mark.parametrize("grad", [True, False])
def test_shapes_that_do_not_fit_are_refused_and_never_read(change, grad):
    net, x = made(size=(7, 7))
    change(net)
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)) as caught:
        net(x)
    assert any(each in str(caught.value) for each in ("size", "shape", "channels", "tensor"))


@pytest.mark.parametrize("grad", [True, False])
def test_weights_of_another_dtype_are_refused_as_by_pytorch(grad):
    net = build({}, torch.float32).eval()
    net.get_submodule(f"{MHDLSA}.conv0").double()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"same|type|dtype"):
        net(torch.rand(1, 3, 13, 9))


def _in_place(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)


def _by_data(net):
    for parameter in net.parameters():
        parameter.data = 0.9 * parameter.data


def _new_parameters(net):
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(1.1 * parameter.detach()))


def _from_a_vector(net):
    vector = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(0.9 * vector, net.parameters())


def _loaded(factor, assign):
    def change(net):
        state = {key: factor * value for key, value in net.state_dict().items()}
        net.load_state_dict(state, assign=assign)

    return change


def test_weights_are_read_anew_at_every_forward():
    net, x = made()
    loads = (_loaded(1.1, assign=False), _loaded(0.9, assign=True))
    for change in (_in_place, _by_data, *loads, _new_parameters, _from_a_vector):
        before = expected_of(net, x)
        with torch.no_grad():
            net(x)
        change(net)
        assert_computes(net, x, before)


def test_frozen_weights_are_read_and_get_no_gradient():
    net = build({}, torch.float32)
    x = images(net, 2, (9, 7))
    frozen = [p for number, p in enumerate(net.parameters()) if number % 2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    assert_gradients(net, x)
    net(x).mean().backward()
    assert all(parameter.grad is None for parameter in frozen)
    net.requires_grad_(False)
    assert net(x).grad_fn is None
    assert_computes(net.eval(), x)
    assert net(x.requires_grad_()).grad_fn is not None


def test_functional_call_with_other_parameters():
    net, x, before = fresh()
    others = {name: 1.1 * p.detach() for name, p in net.named_parameters()}
    twin = copy.deepcopy(net)
    twin.load_state_dict(others)
    expected = expected_of(twin, x)
    assert error(before, expected) > 1e-3
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert error(torch.func.functional_call(net, others, (x,)), expected) < 1e-5
            assert error(net(x), before) < 1e-5
    others = {name: p.requires_grad_() for name, p in others.items()}
    out = torch.func.functional_call(net, others, (x,))
    found = torch.autograd.grad(out.square().mean(), list(others.values()))
    expected = torch.autograd.grad(twin(x).square().mean(), list(twin.parameters()))
    torch.testing.assert_close(found, expected)


def test_inference_mode_leaves_nothing_that_training_trips_over():
    net, x = made(size=(13, 9))
    with torch.inference_mode():
        inferred = net(x)
    with torch.no_grad():
        assert torch.equal(net(x), inferred)
    net.train()(x).mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def _pickled(net):
    return pickle.loads(pickle.dumps(net))


def _saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_copies_compute_the_same_and_are_independent(options, copied):
    net, x = made(options)
    with torch.no_grad():
        expected = net(x)
        twin = copied(net)
        assert torch.equal(twin(x), expected)
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        assert torch.equal(net(x), expected)
    assert_computes(twin, x, expected)


def test_copies_keep_hooks_and_settings():
    net, x, unchanged = fresh()
    net.get_submodule(f"{GSA}.project_out").register_forward_hook(lambda *given: scaled(given[2]))
    net.get_submodule(f"{LOCAL}.norm1.body").eps = 1.0
    assert_computes(copy.deepcopy(net), x, unchanged)
    assert error(copy.deepcopy(net)(x), expected_of(net, x)) < 1e-5


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(
    ("convert", "tolerance"),
    [(nn.Module.half, 1e-2), (nn.Module.bfloat16, 0.1), (nn.Module.double, 1e-12)],
    ids=["half", "bfloat16", "double"],
)
@pytest.mark.parametrize("changed", [False, True])
def test_converted_copies(options, convert, tolerance, changed):
    net, x = made(options)
    with torch.no_grad():
        expected_before = net(x)
        if changed:
            for _, module in pointwise_convolutions(net):
                module.register_forward_hook(lambda *given: -given[2])
        twin = convert(copy.deepcopy(net))
        x = x.to(twin.mean.dtype)
        expected = expected_of(copy.deepcopy(twin), x)
        out = twin(x)
        assert out.dtype == x.dtype
        assert error(out, expected) < tolerance
    assert error(twin(x), expected) < tolerance
    back = twin.float()
    assert error(back(x.float()), expected_of(back, x.float())) < 1e-5
    assert changed or error(expected_before, expected) < max(tolerance, 1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_each_module_is_asked_about_a_time_or_two(grad, monkeypatch):
    net, x = made({"groups": 2, "blocks": 2})
    asked = []

    def counting(*modules):
        asked.extend(modules)
        return as_built.is_as_built(*modules)

    for user in (network, layers, fused):
        monkeypatch.setattr(user, "is_as_built", counting)
    with torch.set_grad_enabled(grad):
        net(x)
    assert set(asked) < set(net.modules())
    assert len(asked) <= 2 * len(list(net.modules()))
