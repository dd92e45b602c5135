"""DLGSANet for ComfyUI's nodes "Load Upscale Model" and "Upscale Image (using Model)".

Copy this folder into ComfyUI's `custom_nodes`, and install the package into ComfyUI's Python:
`python -m pip install '<this repository>[export]'`. Weights go into `models/upscale_models`.
"""

from dlgsanet_arch.spandrel import install

install()

NODE_CLASS_MAPPINGS = {}  # ComfyUI expects it; its own nodes do the work
