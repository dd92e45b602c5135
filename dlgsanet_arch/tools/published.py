"""Figures as papers print them: PSNR on Y, parameters and multiply-adds to 1280x720.

DLGSANet: its paper, ICCV 2023 (parameters are exact counts of its published networks). The GMACs it
prints come from a counter of its own, which differs from PyTorch's. SwinIR-light: its paper, ICCV
workshops 2021. EDSR and RCAN x4: their papers, 2017 and 2018. EDSR-baseline x4: as tables of later
papers on light networks have it. What could not be looked up is absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

DATASETS = ("Set5", "Set14", "B100", "Urban100", "Manga109")


@dataclass(frozen=True)
class Figures:
    """What is published of a network at a scale.

    Attributes:
        parameters: Their number.
        gmacs: Multiply-adds to an output of 1280x720, in 1e9.
        psnr: By data set, in dB.
    """

    parameters: int | None = None
    gmacs: float | None = None
    psnr: Mapping[str, float] = field(default_factory=dict)


def _figures(parameters: int | None, gmacs: float | None, *psnr: float) -> Figures:
    return Figures(parameters, gmacs, dict(zip(DATASETS, psnr, strict=True)) if psnr else {})


PUBLISHED = {
    ("DLGSANet Tiny", 2): _figures(565_710, 128.1, 38.16, 33.92, 32.26, 32.82, 39.14),
    ("DLGSANet Tiny", 3): _figures(572_205, 56.9, 34.63, 30.57, 29.21, 28.69, 34.10),
    ("DLGSANet Tiny", 4): _figures(581_298, 32.0, 32.46, 28.79, 27.70, 26.55, 30.98),
    ("DLGSANet Light", 2): _figures(745_188, 170.1, 38.20, 33.89, 32.30, 32.94, 39.29),
    ("DLGSANet Light", 3): _figures(751_683, 75.6, 34.70, 30.58, 29.24, 28.83, 34.16),
    ("DLGSANet Light", 4): _figures(760_776, 42.5, 32.54, 28.84, 27.73, 26.66, 31.13),
    ("DLGSANet Large", 2): _figures(4_733_724, 1097.3),
    ("DLGSANet Large", 3): _figures(4_745_889, 487.6),
    ("DLGSANet Large", 4): _figures(4_762_920, 274.3),
    ("SwinIR-light", 2): _figures(878_000, 195.6, 38.14, 33.86, 32.31, 32.76, 39.12),
    ("SwinIR-light", 3): _figures(886_000, None, 34.62, 30.54, 29.20, 28.66, 33.98),
    ("SwinIR-light", 4): _figures(897_000, 49.6, 32.44, 28.77, 27.69, 26.47, 30.92),
    ("EDSR-baseline", 4): _figures(1_518_000, 114.0, 32.09, 28.58, 27.57, 26.04, 30.35),
    ("EDSR", 4): _figures(None, None, 32.46, 28.80, 27.71, 26.64, 31.02),
    ("RCAN", 4): _figures(None, None, 32.63, 28.87, 27.77, 26.82, 31.22),
}
