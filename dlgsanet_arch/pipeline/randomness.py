"""The generators of this process: Python's, NumPy's and PyTorch's."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def state(*, cuda: bool = True) -> dict[str, Any]:
    """Return the state of all generators, of the current GPU's as well if `cuda`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    found = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(found: Mapping[str, Any]) -> None:
    """Put the generators into a state that `state` returned."""
    random.setstate(found["python"])
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(found["torch"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])


@contextmanager
def preserved(*, cuda: bool = True) -> Iterator[None]:
    """Put the generators back at the end; a worker may not ask for CUDA's."""
    before = state(cuda=cuda)
    try:
        yield
    finally:
        restore(before)
