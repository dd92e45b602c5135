"""Where autocast may reach."""

from contextlib import AbstractContextManager, nullcontext

import torch

# Asked once: up to PyTorch 2.11 torch.compile breaks the graph where this is asked.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off; devices without autocast, as meta, have nothing to switch."""
    if device_type in AUTOCAST_DEVICES:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
