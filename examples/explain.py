"""Draw what a DLGSANet computes from one image: its local filters and its sparse attention.

    python examples/explain.py -i small_image.png -o explain.png

Above, the filters that MHDLSA predicts for a pixel on an edge, in a texture and in a flat area, or
for those of `--at X Y`. Below, for each SparseGSA layer and head, the share of similarities between
channels that are not positive, which ReLU sets to zero. Needs `pip install 'dlgsanet-arch[tools]'`.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from dlgsanet_arch.checkpoint import read_checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import FilterGenerator, SparseGSA
from dlgsanet_arch.tlc import Axis

WINDOW = 15  # side of the neighbourhoods that are rated as edge, texture or flat
COLUMNS = 4  # layers whose filters are drawn

Pixels = dict[str, tuple[int, int]]  # x and y by label


def choose_pixels(image: Tensor) -> Pixels:
    """Choose pixels of an image (1, C, H, W) by the eigenvalues of its structure tensor.

    One is large on an edge, both are large in a texture and small in a flat area.
    """
    dy, dx = torch.gradient(image.mean((0, 1)))
    xx, yy, xy = F.avg_pool2d(torch.stack([dx * dx, dy * dy, dx * dy]), WINDOW, stride=1)
    mean, difference = (xx + yy) / 2, (((xx - yy) / 2).square() + xy.square()).sqrt()
    large, small = mean + difference, mean - difference
    pixels = {}
    for label, score in (("edge", large - 4 * small), ("texture", small), ("flat", -large)):
        y, x = divmod(int(score.argmax()), score.shape[1])
        pixels[label] = (x + WINDOW // 2, y + WINDOW // 2)
    return pixels


def zero_share(attention: SparseGSA, qkv: Tensor) -> Tensor:
    """Return the share of similarities that are not positive, (heads,), the mean over windows."""
    window = attention.eval_window()
    rows, columns = (Axis.plan(length, window).windows() for length in qkv.shape[2:])
    shares = []
    for y, x in itertools.product(rows, columns):
        q, k, _ = qkv[0, :, y, x].unflatten(0, (3, attention.heads, -1)).flatten(3)
        similarities = F.normalize(q, dim=2) @ F.normalize(k, dim=2).mT * attention.temperature
        shares.append((similarities <= 0).float().mean((1, 2)))
    return torch.stack(shares).mean(0)


@torch.no_grad()
def observe(network: nn.Module, image: Tensor, pixels: Pixels) -> tuple[list[Tensor], list[Tensor]]:
    """Run the network; return filters (pixels, G, K, K) and shares (heads,) by layer."""
    filters, shares = [], []
    x, y = zip(*pixels.values(), strict=True)
    for module in network.modules():
        if isinstance(module, FilterGenerator):
            module.conv2.register_forward_hook(
                lambda _, inputs, output, side=module.kernel: filters.append(
                    output[0][:, y, x].T.unflatten(1, (-1, side, side))
                )
            )
        elif isinstance(module, SparseGSA):
            module.qkv_dwconv.register_forward_hook(
                lambda _, inputs, output, layer=module: shares.append(zero_share(layer, output))
            )
    network(image)
    return filters, shares


def mosaic(filters: Tensor) -> np.ndarray:
    """Arrange filters (G, K, K) in a rectangle, with NaN between them."""
    columns = math.ceil(math.sqrt(len(filters)))
    padded = F.pad(filters, (0, 1, 0, 1, 0, -len(filters) % columns), value=math.nan)
    return padded.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1).numpy()


def draw(image: Tensor, pixels: Pixels, filters: list[Tensor], shares: list[Tensor]) -> Figure:
    """Draw image and filters above, and the shares by layer and head below."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    left, right = top.subfigures(1, 2, width_ratios=(2, 5))
    axes = left.subplots()
    axes.imshow(image[0].permute(1, 2, 0).numpy())
    for label, (x, y) in pixels.items():
        axes.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgewidth=3, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    if filters:
        layers = np.unique(np.linspace(0, len(filters) - 1, COLUMNS).round().astype(int))
        grid = right.subplots(len(pixels), len(layers), squeeze=False)
        for row, column in np.ndindex(grid.shape):
            values = mosaic(filters[layers[column]][row])
            limit = np.nanmax(np.abs(values))
            grid[row, column].imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
            grid[row, column].set(xticks=[], yticks=[], xlabel=f"±{limit:.2g}")
            grid[row, 0].set_ylabel([*pixels][row])
            grid[0, column].set_title(f"MHDLSA {layers[column] + 1}")
    if shares:
        axes = bottom.subplots()
        percent = 100 * torch.stack(shares).T.numpy()
        extent = (0.5, percent.shape[1] + 0.5, percent.shape[0] + 0.5, 0.5)  # counts from 1
        drawn = axes.imshow(percent, vmin=0, vmax=100, aspect="auto", extent=extent)
        bottom.colorbar(drawn, ax=axes)
        axes.set(xlabel="SparseGSA layer", ylabel="head", title="similarities not positive, %")
    return figure


def main() -> None:
    """Read image and weights, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-i", "--input", type=Path, required=True, help="a small LR image")
    weights = "default: tiny_x4, which is bundled"
    parser.add_argument("-m", "--weights", type=Path, default=Path("tiny_x4"), help=weights)
    parser.add_argument("-o", "--output", type=Path, default=Path("explain.png"))
    parser.add_argument("--at", type=int, nargs=2, action="append", metavar=("X", "Y"))
    arguments = parser.parse_args()
    try:
        with Image.open(arguments.input) as opened:
            image = torch.from_numpy(np.array(opened.convert("RGB"))) / 255
        network = read_checkpoint(arguments.weights).network()
    except (OSError, UserError) as error:
        sys.exit(f"explain.py: {error}")
    height, width = image.shape[:2]
    image = image.permute(2, 0, 1)[None]
    if network.in_chans != 3 or min(height, width) < WINDOW:
        sys.exit(f"explain.py: needs weights for RGB, and an image of {WINDOW}x{WINDOW} or more")
    pixels = {f"({x}, {y})": (x, y) for x, y in arguments.at or ()} or choose_pixels(image)
    for x, y in pixels.values():
        if not (0 <= x < width and 0 <= y < height):
            sys.exit(f"explain.py: the pixel ({x}, {y}) is outside the image of {width}x{height}")
    filters, shares = observe(network, image, pixels)
    if shares:
        print(f"similarities that are not positive: {torch.stack(shares).mean():.1%}")
    try:
        draw(image, pixels, filters, shares).savefig(arguments.output, dpi=150)
    except (OSError, ValueError) as error:
        sys.exit(f"explain.py: {arguments.output} cannot be written: {error}")


if __name__ == "__main__":
    main()
