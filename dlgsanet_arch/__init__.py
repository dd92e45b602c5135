"""DLGSANet (Li et al., ICCV 2023) as a plugin for BasicSR.

Importing this package registers the network in BasicSR, where BasicSR is installed; an option file
then says `network_g: {type: DLGSANet, …}`. Without BasicSR the network is an ordinary module.
`upscale` and `Upscaler` enlarge pictures by trained weights; they are imported when asked for.
"""

from typing import TYPE_CHECKING, Any

from dlgsanet_arch import plugin
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.version import __version__

if TYPE_CHECKING:
    from dlgsanet_arch.inference import Upscaler, upscale

__all__ = ["DLGSANet", "Upscaler", "__version__", "upscale"]

plugin.register()


def __getattr__(name: str) -> Any:
    if name in ("Upscaler", "upscale"):
        from dlgsanet_arch import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
