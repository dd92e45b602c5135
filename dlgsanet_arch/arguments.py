"""The arguments that a DLGSANet can be built of."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from dlgsanet_arch.hints import cut

# The layers of a block, by type of block, and what gives the heads of each.
BLOCKS = {
    "sparseedge": ("local", "global"),
    "edge": ("local", "global"),
    "idynamic": ("local",),
    "restormer": ("global",),
}
_HEADS = {"local": "idynamic_num_heads", "global": "restormer_num_heads"}
_CHOICES = {
    "buildblock_type": tuple(BLOCKS),
    **dict.fromkeys(("idynamic_ffn_type", "restormer_ffn_type"), ("GDFN", "BaseFFN")),
    "activation": ("relu", "gelu", "sigmoid"),
    "upsampler": ("pixelshuffledirect", "pixelshuffle", ""),
    **dict.fromkeys(("idynamic", "tlc_flag", "body_norm"), (True, False)),
}
_COUNTS = (
    *("in_chans", "dim", "groups", "blocks", "window_size", "tlc_kernel"),
    *("idynamic_num_heads", "restormer_num_heads"),
)


def check_arguments(config: Mapping[str, Any]) -> None:
    """Refuse all arguments, by name, of which `DLGSANet` cannot be built.

    Raises:
        ValueError: The message names argument and value.
    """
    for name, choices in _CHOICES.items():
        value = config[name]
        if not any(value is choice or value == choice for choice in choices):
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{name} must be one of {known}; got {cut(repr(value), 60)}")
    for name in (*_COUNTS, *(["upscale"] if config["upsampler"] else [])):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(
                f"{name} must be a whole number of 1 or more; got {cut(repr(value), 60)}"
            )
    dim, upscale = config["dim"], config["upscale"]
    if dim < 4:
        raise ValueError(f"dim must be 4 or more (filters come from dim // 4); got {dim}")
    if config["window_size"] % 2 == 0:
        raise ValueError(f"window_size must be odd; got {config['window_size']}")
    if not 0 < config["img_range"] < math.inf:
        raise ValueError(f"img_range must be positive; got {cut(repr(config['img_range']), 60)}")
    stages = upscale == 3 or (upscale > 1 and int(upscale).bit_count() == 1)
    if config["upsampler"] == "pixelshuffle" and not stages:
        raise ValueError(f"upscale must be 3 or 2, 4, 8, … for 'pixelshuffle'; got {upscale}")
    for name in ("idynamic_ffn_expansion_factor", "restormer_ffn_expansion_factor"):
        factor = config[name]
        if not 0 < factor < math.inf or int(dim * factor) < 1:
            raise ValueError(
                f"{name} must give int(dim · {name}) of 1 or more; got {cut(repr(factor), 60)}"
            )
    for layer in BLOCKS[config["buildblock_type"]]:
        name, heads = _HEADS[layer], config[_HEADS[layer]]
        if dim % heads:
            raise ValueError(f"dim must be divisible by {name}; got dim={dim}, {name}={heads}")
