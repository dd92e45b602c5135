"""The dtypes that are computed in: sums, and what autocast casts."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

# Asked once: up to PyTorch 2.11 torch.compile breaks the graph where this is asked.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)
_casts = threading.local()  # .of: casts of weights by the weights' ids, within a forward


def is_autocast(device_type: str) -> bool:
    """Return whether autocast is on; devices without it, as meta, have none."""
    return device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off."""
    if is_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def cast_together(weights: Iterable[Tensor], device_type: str) -> Iterator[None]:
    """Under autocast, cast all these float32 weights at once; `cast` finds them within.

    Autocast by itself casts each, and each gradient back: hundreds of small kernels.
    """
    if not is_autocast(device_type) or torch.compiler.is_compiling():
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    kept = [
        each
        for each in weights
        if each.dtype == torch.float32
        and each.device.type == device_type
        and each.is_contiguous()
        and type(each) in (Tensor, nn.Parameter)
    ]
    # Odd numbers of values last, so that all before them begin at multiples of 16 bytes.
    kept.sort(key=lambda each: each.numel() % 8 != 0)
    if kept:
        flat = torch.cat([each.flatten() for each in kept]).to(dtype)
        parts = flat.split([each.numel() for each in kept])
        _casts.of = {id(each): part.view_as(each) for each, part in zip(kept, parts, strict=True)}
    try:
        yield
    finally:
        _casts.of = {}


def cast(weight: Tensor | None) -> Tensor | None:
    """Return the cast of a weight that `cast_together` made, else the weight itself."""
    if weight is None or torch.compiler.is_compiling():
        return weight
    return getattr(_casts, "of", {}).get(id(weight), weight)
