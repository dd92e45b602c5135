"""Declare a function and its gradient to PyTorch as one operator."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("dlgsanet", "FRAGMENT")


def _define(
    name: str,
    function: Callable[..., Any],
    result: Callable[..., Any],
    flops: Callable[..., int],
    key: str,
) -> Callable[..., Any]:
    """Return the operator dlgsanet::`name`, without a gradient.

    Registered key by key, not by torch.library.custom_op, which takes twice as long a call.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"dlgsanet::{name}", result, lib=_LIBRARY)
    operator = getattr(torch.ops.dlgsanet, name)
    register_flop_formula(operator)(lambda *given, out_shape=None, **_: flops(*given))
    return operator.default


def _with_gradient(
    operator: Callable[..., Any], gradient: Callable[..., Any], count: int
) -> Callable[..., Any]:
    """Return the operator as autograd calls it; its first `count` arguments are tensors.

    Below autograd, as torch.library's own wrapper, the call reaches the kernel of the device.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            ctx.save_for_backward(*given[:count])
            ctx.settings = given[count:]
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*given)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            found = gradient(*given, *saved, *ctx.settings)
            pairs = zip(saved, [found] if count == 1 else found, strict=True)
            own = (None if each is None else grad for each, grad in pairs)
            return *own, *(None for _ in ctx.settings)

    def with_autograd(*given: Any) -> Any:
        if torch.is_grad_enabled() and any(
            each is not None and each.requires_grad for each in given[:count]
        ):
            return Differentiable.apply(*given)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*given)

    return with_autograd


def declare(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    result: Callable[..., Any],
    flops: Callable[..., int],
    backward_flops: Callable[..., int] | None = None,
    key: str = "CompositeExplicitAutograd",
) -> Callable[..., Any]:
    """Declare the operators dlgsanet::`name` and dlgsanet::`name`_backward.

    Autograd, torch.compile, exporters and FlopCounterMode then see one operator each.

    Args:
        name: Of the operator.
        forward: Takes tensors, perhaps None, then settings; the annotations are the schema.
        backward: Takes the gradients of the results, then what `forward` takes. Returns those of
            all tensors in their shapes and layouts, for None an empty one.
        result: Takes what `forward` takes and returns empty tensors like its results.
        flops: Takes the same, with shapes in place of tensors, and returns the forward's count.
        backward_flops: Of the backward, from the same; by default twice the forward's.
        key: The dispatch key of both: "CPU", or by default that of every device.

    Returns:
        The operator, called as `forward`, differentiable once.
    """
    taken = inspect.signature(forward).parameters.values()
    tensors = [each.annotation for each in taken if each.annotation in (Tensor, Tensor | None)]
    count, grads = len(tensors), len(inspect.signature(backward).parameters) - len(taken)

    def gradients_like(*given: Any) -> Tensor | tuple[Tensor, ...]:
        like = [
            given[0].new_empty(0) if each is None else torch.empty_like(each)
            for each in given[grads : grads + count]
        ]
        return like[0] if count == 1 else tuple(like)

    def count_backward(*given: Any) -> int:
        given = given[grads:]
        return backward_flops(*given) if backward_flops else 2 * flops(*given)

    operator = _define(name, forward, result, flops, key)
    gradient = _define(f"{name}_backward", backward, gradients_like, count_backward, key)
    _LIBRARY.impl(name, _with_gradient(operator, gradient, count), "Autograd")
    return operator
