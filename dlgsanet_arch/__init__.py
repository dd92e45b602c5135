"""DLGSANet (Li et al., ICCV 2023) as a plugin for BasicSR.

Importing this package registers the network in BasicSR, as soon as BasicSR is imported or at once
where it is; an option file then says `network_g: {type: DLGSANet, …}`. Without BasicSR the network
is an ordinary module. `upscale` and `Upscaler` enlarge images by trained weights. The package
itself imports the standard library alone: each name below is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dlgsanet_arch import _basicsr
from dlgsanet_arch.version import __version__

if TYPE_CHECKING:
    from dlgsanet_arch.inference import Upscaler, upscale
    from dlgsanet_arch.network import DLGSANet

__all__ = ["DLGSANet", "Upscaler", "__version__", "upscale"]

_MODULES = {"DLGSANet": "network", "Upscaler": "inference", "upscale": "inference"}

_basicsr.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
