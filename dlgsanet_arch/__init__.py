"""DLGSANet (Li et al., ICCV 2023) as a plugin for BasicSR.

Importing this package registers the network in BasicSR, where BasicSR is installed; an option file
then says `network_g: {type: DLGSANet, …}`. Without BasicSR the network is an ordinary module.
"""

from dlgsanet_arch import plugin
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.version import __version__

__all__ = ["DLGSANet", "__version__"]

plugin.register()
