"""The network in use: images in, larger images out.

An image passes through the modules in one direction: `files` decodes it, `upscaler` splits it into
colour and alpha (`arrays`) and into tiles that fit the memory (`tiles`, `memory`), and `forward`
runs the network on each tile.
"""

from dlgsanet_arch.inference.upscaler import Upscaler, upscale

__all__ = ["Upscaler", "upscale"]
