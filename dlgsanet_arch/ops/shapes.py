"""Check the tensors of an operator by a pattern of their shapes."""

import functools
from typing import TypeAlias

import torch
from torch import Tensor, nn

Axis: TypeAlias = tuple[int, str]  # 2E is (2, "E"), GKK (1, "GKK")
Shapes: TypeAlias = tuple[tuple[int, ...] | None, ...]


class Pattern:
    """The shapes that fit together, as "x: B 2E H W; weight: O 2E 1 1".

    A letter stands for one size everywhere. An axis may be a product, as 2E or GKK, in which at
    most one letter has no size yet when it is reached.

    Attributes:
        tensors: The name of each tensor and its axes.
    """

    def __init__(self, text: str) -> None:
        parts = (part.split(":") for part in text.split(";"))
        self.tensors = [(name.strip(), list(map(_axis, axes.split()))) for name, axes in parts]


def _axis(text: str) -> Axis:
    letters = text.lstrip("0123456789")
    return int(text.removesuffix(letters) or 1), letters


def sizes(
    operator: str, pattern: Pattern, *tensors: Tensor | None, **known: int
) -> tuple[int, ...]:
    """Return the sizes of a pattern's letters, and refuse tensors that do not fit together.

    Args:
        operator: Named in errors.
        pattern: Of the tensors.
        tensors: One for each name, None for one that is left out; the last may be missing.
        known: Sizes of letters.

    Returns:
        The sizes of the other letters, in the order in which they appear.

    Raises:
        ValueError: For the first tensor of another shape, and for dtypes or devices that differ.
    """
    first = tensors[0]
    for (name, _), tensor in zip(pattern.tensors, tensors, strict=False):
        if tensor is None:
            continue
        if tensor.dtype != first.dtype or tensor.device != first.device:
            got = f"got {tensor.dtype} on {tensor.device}"
            wanted = f"{first.dtype} on {first.device}, as {pattern.tensors[0][0]}"
            raise ValueError(f"{operator} needs {name} to be {wanted}; {got}")
    shapes = tuple(None if each is None else each.shape for each in tensors)
    # Symbols, as compilers and tracers have in place of sizes, cannot be looked up.
    are_numbers = type(first) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return (_remembered if are_numbers else _find)(operator, pattern, shapes, *known.items())


def _find(
    operator: str, pattern: Pattern, shapes: Shapes, *known: tuple[str, int]
) -> tuple[int, ...]:
    found = dict(known)
    for (name, axes), shape in zip(pattern.tensors, shapes, strict=False):
        if shape is not None and (len(shape) != len(axes) or not _fit(found, axes, shape)):
            wanted = ", ".join("·".join([str(n)] * (n > 1 or not s) + [*s]) for n, s in axes)
            values = [f"{letter} = {found[letter]}" for letter in found if letter in wanted]
            having = f" with {', '.join(values)}" if values else ""
            got = f"got {tuple(shape)}"
            raise ValueError(f"{operator} needs {name} of shape ({wanted}){having}; {got}")
    given = [letter for letter, _ in known]
    return tuple(size for letter, size in found.items() if letter not in given)


# An operator is called hundreds of times with the same shapes.
_remembered = functools.lru_cache(maxsize=1024)(_find)


def _fit(found: dict[str, int], axes: list[Axis], shape: tuple[int, ...]) -> bool:
    """Return whether a shape has these axes, and enter the sizes of new letters in `found`."""
    for (factor, letters), size in zip(axes, shape, strict=True):
        unknown = ""
        for letter in letters:
            if letter in found:
                factor *= found[letter]
            else:
                unknown = letter
        if not unknown:
            if size != factor:
                return False
        elif factor < 1 or size % factor:
            return False
        else:
            found[unknown] = size // factor
    return True
