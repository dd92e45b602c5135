"""Declare a function and its gradient to PyTorch as one operator."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def declare(
    name: str,
    forward: Callable[..., Any],
    *,
    result: Callable[..., Any],
    flops: Callable[..., int],
    backward: Callable[..., tuple[Tensor, ...]] | None = None,
    backward_flops: Callable[..., int] | None = None,
    device_types: str | None = None,
) -> Callable[..., Any]:
    """Declare the operator dlgsanet::`name`, and dlgsanet::`name`_backward if there is a gradient.

    Autograd, torch.compile, exporters and FlopCounterMode then see one operator each.

    Args:
        name: What the operator is called.
        forward: Takes tensors, perhaps None, and settings; their annotations are the schema. Its
            first result is the output; others are kept for the backward and have no gradient.
        result: Takes the same and returns empty tensors like the results.
        flops: Takes the same, with shapes in place of tensors, and returns the forward's count.
        backward: Takes the gradient of the output, what `forward` takes and its other results.
            Returns the gradients of all tensors in their shapes and layouts, for None an empty one.
        backward_flops: Counts what `backward` does, from what `flops` takes; by default twice the
            forward's.
        device_types: As in torch.library.custom_op.

    Returns:
        The operator, called as `forward`.
    """

    def operator(own_name: str, function: Callable[..., Any], fake: Any, count: Any) -> Any:
        made = torch.library.custom_op(
            f"dlgsanet::{own_name}", function, mutates_args=(), device_types=device_types
        )
        made.register_fake(fake)
        register_flop_formula(getattr(torch.ops.dlgsanet, own_name))(count)
        return made

    made = operator(name, forward, result, lambda *given, out_shape=None, **_: flops(*given))
    if backward is None:
        return made

    kinds = [each.annotation for each in inspect.signature(forward).parameters.values()]
    is_tensor = [kind in (Tensor, Tensor | None) for kind in kinds]

    def gradients_like(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
        tensors = (each for each, tensor in zip(given, is_tensor, strict=False) if tensor)
        return tuple(grad.new_empty(0) if t is None else torch.empty_like(t) for t in tensors)

    count = backward_flops or (lambda *given: 2 * flops(*given))
    gradient = operator(
        f"{name}_backward",
        backward,
        gradients_like,
        lambda _, *given, out_shape=None, **__: count(*given[: len(kinds)]),
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output[1:] if isinstance(output, tuple) else ()
        ctx.mark_non_differentiable(*kept)
        ctx.settings = [None if t else each for each, t in zip(inputs, is_tensor, strict=True)]
        tensors = (each if t else None for each, t in zip(inputs, is_tensor, strict=True))
        ctx.save_for_backward(*tensors, *kept)

    def gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = [
            tensor if t else setting
            for tensor, setting, t in zip(saved, ctx.settings, is_tensor, strict=False)
        ]
        found = iter(gradient(grad, *inputs, *saved[len(inputs) :]))
        wanted = [next(found) if t else None for t in is_tensor]
        return tuple(
            None if tensor is None else each for each, tensor in zip(wanted, saved, strict=False)
        )

    made.register_autograd(gradients, setup_context=save)
    return made
