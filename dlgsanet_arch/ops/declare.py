"""Declare a function and its gradient to PyTorch as one operator."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _operator(
    name: str,
    function: Callable[..., Any],
    result: Callable[..., Any],
    flops: Callable[..., int],
    device_types: str | None,
) -> Callable[..., Any]:
    made = torch.library.custom_op(
        f"dlgsanet::{name}", function, mutates_args=(), device_types=device_types
    )
    made.register_fake(result)
    register_flop_formula(getattr(torch.ops.dlgsanet, name))(
        lambda *given, out_shape=None, **_: flops(*given)
    )
    return made


def declare(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    result: Callable[..., Any],
    flops: Callable[..., int],
    backward_flops: Callable[..., int] | None = None,
    device_types: str | None = None,
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
        device_types: As in torch.library.custom_op.

    Returns:
        The operator, called as `forward`.
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

    made = _operator(name, forward, result, flops, device_types)
    gradient = _operator(f"{name}_backward", backward, gradients_like, count_backward, device_types)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.settings = inputs[count:]

    def gradients(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = gradient(*given, *saved, *ctx.settings)
        pairs = zip(saved, [found] if count == 1 else found, strict=True)
        return *(None if each is None else grad for each, grad in pairs), *(
            None for _ in ctx.settings
        )

    made.register_autograd(gradients, setup_context=save)
    return made
