"""The network in use: images in, larger images out.

An image passes through the modules in one direction: `files` decodes it, `upscaler` splits it into
colour and alpha (`arrays`) and into tiles that fit the memory (`tiles`, `memory`), runs the network
on each and puts them together, and `writing` writes the file.
"""

from dlgsanet_arch.inference.upscaler import Upscaler, upscale

__all__ = ["Upscaler", "upscale"]
