"""DLGSANet for spandrel, the library that ComfyUI, chaiNNer and others read weights with.

    from dlgsanet_arch.spandrel import install

    install()
    model = spandrel.ModelLoader().load_from_file("net_g_latest.pth")

spandrel recognises a network by the names of its weights alone. What these do not show is as in
the paper (see `checkpoint.infer_config`): networks with softmax (`edge`), GELU or sigmoid
attention, without TLC, or with another `tlc_kernel` or `img_range` load without an error and give
wrong images; use `dlgsanet upscale` for them, with a .safetensors file that has the configuration.
"""

from torch import Tensor

from dlgsanet_arch.checkpoint import ANCHOR, Checkpoint, infer_config
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet

try:
    from spandrel import (
        MAIN_REGISTRY,
        Architecture,
        ArchRegistry,
        ArchSupport,
        ImageModelDescriptor,
        ModelTiling,
        SizeRequirements,
    )
    from spandrel.util import KeyCondition
except ModuleNotFoundError as error:
    raise UserError(
        f"spandrel cannot be imported, {error.name} is not installed; run: pip install "
        "'dlgsanet-arch[export]' (or pip install spandrel)"
    ) from error

__all__ = ["DLGSANetArch", "install"]


# Weights of the first layer, with and without a norm before the groups.
_FIRST_LAYERS = [
    f"deep_feature_extraction.{group}.body.0.{part}"
    for group in (0, 1)
    for part in ("IDynamicDWConv.conv0.weight", "restormer_attn.temperature")
]


class DLGSANetArch(Architecture[DLGSANet]):
    """Recognises weights of a DLGSANet, and builds the network."""

    def __init__(self) -> None:
        known = KeyCondition.has_all(ANCHOR, KeyCondition.has_any(*_FIRST_LAYERS))
        super().__init__(id="DLGSANet", detect=known)

    def load(self, state_dict: dict[str, Tensor]) -> ImageModelDescriptor[DLGSANet]:
        """Build the network that `infer_config` detects, in eval mode, with these weights.

        Long sums are in float32, so both half precisions are supported; so are tiles, as attention
        is computed within windows. CheckpointError for weights that are not of a DLGSANet.
        """
        config = infer_config(state_dict)
        checkpoint = Checkpoint(state_dict, config)
        _, *variant = checkpoint.name.split()  # "DLGSANet Tiny x4", or no more than the first
        return ImageModelDescriptor(
            DLGSANet(**config).eval(),
            state_dict,
            architecture=self,
            purpose="SR" if checkpoint.scale > 1 else "Restoration",
            tags=variant[:1] + [f"{config[name]}{name}" for name in ("dim", "groups", "blocks")],
            supports_half=True,
            supports_bfloat16=True,
            scale=checkpoint.scale,
            input_channels=config["in_chans"],
            output_channels=config["in_chans"],
            size_requirements=SizeRequirements(),
            tiling=ModelTiling.SUPPORTED,
        )


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Add DLGSANet to spandrel's architectures; doing it again changes nothing."""
    registry.add(ArchSupport.from_architecture(DLGSANetArch()), ignore_duplicates=True)
