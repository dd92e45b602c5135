"""Check the tensors of an operator by a pattern of their shapes."""

from typing import TypeAlias

from torch import Tensor

Axis: TypeAlias = tuple[int, str]  # 2E is (2, "E"), GKK (1, "GKK")
Pattern: TypeAlias = list[tuple[str, list[Axis]]]


def parse(pattern: str) -> Pattern:
    """Read a pattern such as "x: B 2E H W; weight: O 2E 1 1".

    A letter stands for one size everywhere. An axis may be a product, as 2E or GKK, in which at
    most one letter has no size yet when it is reached.
    """
    parts = (part.split(":") for part in pattern.split(";"))
    return [(name.strip(), list(map(_axis, axes.split()))) for name, axes in parts]


def _axis(text: str) -> Axis:
    letters = text.lstrip("0123456789")
    return int(text.removesuffix(letters) or 1), letters


def sizes(operator: str, pattern: Pattern, *tensors: Tensor | None, **known: int) -> list[int]:
    """Return the sizes of a pattern's letters, and refuse tensors that do not fit together.

    Args:
        operator: Named in errors.
        pattern: From `parse`.
        tensors: One for each name, or None for one that is left out.
        known: Sizes of letters.

    Returns:
        The sizes of the other letters, in the order in which they appear.

    Raises:
        ValueError: For the first tensor of another shape, and for dtypes or devices that differ.
    """
    found, first = dict(known), tensors[0]
    for (name, axes), tensor in zip(pattern, tensors, strict=True):
        if tensor is None:
            continue
        shape = tensor.shape
        if len(shape) != len(axes) or not _fit(found, axes, shape):
            wanted = ", ".join("·".join([str(n)] * (n > 1 or not s) + [*s]) for n, s in axes)
            values = [f"{letter} = {found[letter]}" for letter in found if letter in wanted]
            having = f" with {', '.join(values)}" if values else ""
            got = f"got {tuple(shape)}"
            raise ValueError(f"{operator} needs {name} of shape ({wanted}){having}; {got}")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            got = f"got {tensor.dtype} on {tensor.device}"
            wanted = f"{first.dtype} on {first.device}, as {pattern[0][0]}"
            raise ValueError(f"{operator} needs {name} to be {wanted}; {got}")
    return [size for letter, size in found.items() if letter not in known]


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
