"""Whether a module is as it was built, so that its weights may be read instead of calling it."""

from torch import nn
from torch.nn.modules import module as torch_module

from dlgsanet_arch.ops.convolutions import NORM_EPS

# The forward that each known class was defined with.
_FORWARDS = {kind: kind.forward for kind in (nn.GELU, nn.LayerNorm, nn.Sequential)}


def register(kind: type[nn.Module]) -> type[nn.Module]:
    """Let `is_as_built` know a class by its forward; a decorator.

    A class with settings or layers that can be changed has a method `has_settings`, which says
    whether they are those that it was built with.
    """
    _FORWARDS[kind] = kind.forward
    return kind


def is_as_built(*parts: nn.Module) -> bool:
    """Return whether reading the weights of these modules is as good as calling them.

    It is not where one of them, or one within, is changed as `is_unchanged` says. Nothing is
    remembered between calls.
    """
    return all(is_unchanged(module) for part in parts for module in part.modules())


def is_unchanged(module: nn.Module) -> bool:
    """Return whether calling a module computes what its class and attributes say.

    It does not where a hook of any kind is set on it or for all modules, where its forward was
    replaced (on the object or on its class), where it is of another class (as with
    parametrisations, adapters and wrappers), and where its settings or shapes were changed.
    """
    own, kind = module.__dict__, type(module)
    if (
        kind not in _FORWARDS
        or kind.forward is not _FORWARDS[kind]
        or "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or torch_module._has_any_global_hook()
    ):
        return False
    if kind is nn.LayerNorm:
        return _norm_has_settings(module)
    return not hasattr(kind, "has_settings") or module.has_settings()


def has_layers(module: nn.Module, *kinds: type[nn.Module] | tuple[type, int, bool]) -> bool:
    """Return whether the modules directly within are of exactly these classes, in order.

    A convolution is given by its class, the side of its filters, and whether it has a bias.
    """
    layers = module._modules.values()
    return len(layers) == len(kinds) and all(map(_is_layer, layers, kinds))


def _is_layer(layer: nn.Module, kind: type[nn.Module] | tuple[type, int, bool]) -> bool:
    if not isinstance(kind, tuple):
        return type(layer) is kind
    wanted, side, has_bias = kind
    return (
        type(layer) is wanted
        and layer.kernel_size == (side, side)
        and (layer.bias is not None) == has_bias
    )


def _norm_has_settings(norm: nn.LayerNorm) -> bool:
    own = norm.__dict__
    shape = own["normalized_shape"]
    return (
        own["eps"] == NORM_EPS
        and norm.weight is not None
        and norm.bias is not None
        and len(shape) == 1
        and norm.weight.shape == norm.bias.shape == shape
    )
