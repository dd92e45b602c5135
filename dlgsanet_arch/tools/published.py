"""Figures of the paper (ICCV 2023): PSNR and SSIM on Y, parameters and multiply-adds to 1280x720.

Parameters are exact counts of the published networks. The GMACs come from a counter of the paper's
own, which differs from PyTorch's.
"""

from collections.abc import Mapping
from typing import NamedTuple

DATASETS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
Network = tuple[str, int]  # such as ("DLGSANet Tiny", 4), the scale second
Scores = Mapping[str, tuple[float, ...]]  # PSNR in dB and SSIM, by data set


class Published(NamedTuple):
    """What is published of a network."""

    parameters: int
    gmacs: float  # to 1280x720
    scores: Scores


_COSTS = """
Tiny   2    565710   128.1
Tiny   3    572205    56.9
Tiny   4    581298    32.0
Light  2    745188   170.1
Light  3    751683    75.6
Light  4    760776    42.5
Large  2   4733724  1097.3
Large  3   4745889   487.6
Large  4   4762920   274.3
"""
# The columns are DATASETS.
_SCORES = """
Tiny   2  38.16/0.9611  33.92/0.9202  32.26/0.9007  32.82/0.9343  39.14/0.9777
Tiny   3  34.63/0.9288  30.57/0.8459  29.21/0.8083  28.69/0.8630  34.10/0.9480
Tiny   4  32.46/0.8984  28.79/0.7861  27.70/0.7408  26.55/0.8002  30.98/0.9137
Light  2  38.20/0.9612  33.89/0.9203  32.30/0.9012  32.94/0.9355  39.29/0.9780
Light  3  34.70/0.9295  30.58/0.8465  29.24/0.8089  28.83/0.8653  34.16/0.9483
Light  4  32.54/0.8993  28.84/0.7871  27.73/0.7415  26.66/0.8033  31.13/0.9161
"""
# What the paper's authors got when they trained again, on one RTX 3090.
_RETRAINED = """
Tiny   2  38.1581/0.9615  33.8906/0.9200  32.2828/0.9017  32.8461/0.9343  39.1326/0.9780
Tiny   3  34.6197/0.9293  30.5370/0.8469  29.2335/0.8100  28.7829/0.8645  34.0463/0.9477
Tiny   4  32.4957/0.8992  28.7738/0.7862  27.7217/0.7426  26.5675/0.8006  30.9556/0.9142
Light  2  38.1577/0.9615  34.0453/0.9216  32.3058/0.9020  32.9323/0.9354  39.1995/0.9780
Light  3  34.6697/0.9298  30.5621/0.8466  29.2484/0.8101  28.8239/0.8655  34.1938/0.9483
Light  4  32.5333/0.8998  28.6401/0.7864  27.7299/0.7434  26.6702/0.8036  31.0196/0.9154
"""


def _rows(text: str) -> dict[Network, list[str]]:
    lines = (line.split() for line in text.strip().splitlines())
    return {(f"DLGSANet {name}", int(scale)): row for name, scale, *row in lines}


def _scores(text: str) -> dict[Network, Scores]:
    return {
        network: {
            dataset: tuple(map(float, cell.split("/")))
            for dataset, cell in zip(DATASETS, cells, strict=True)
        }
        for network, cells in _rows(text).items()
    }


RETRAINED = _scores(_RETRAINED)
PUBLISHED = {
    network: Published(int(parameters), float(gmacs), _scores(_SCORES).get(network, {}))
    for network, (parameters, gmacs) in _rows(_COSTS).items()
}
