"""What a network looks at in a picture: filters of MHDLSA, and what SparseGSA's ReLU drops.

Both come from the network's own layers at work on the picture: their inputs are taken where they
enter, and each layer's own modules are run on them once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet, GlobalLayer, LocalLayer
from dlgsanet_arch.ops.attention import ACTIVATIONS
from dlgsanet_arch.tools import figures

_WINDOW = 15  # side of what a place is judged by, in pixels
_MARKS = ("edge", "texture", "flat")
_MOST_LAYERS = 4  # of filters that are drawn


@dataclass(frozen=True)
class Place:
    """A pixel whose filters are shown.

    Attributes:
        x: Column.
        y: Row.
        label: What is there.
    """

    x: int
    y: int
    label: str


@dataclass
class Seen:
    """What was seen in the layers, in the order of the network.

    Attributes:
        filters: Of each local layer, its name, and (places, G, K, K): the filters of each place.
        dropped: Of each global layer, its name, and (heads,): the share of similarities, from 0 to
            1, that are not positive, which ReLU makes zero; the mean over windows.
        keeps_sparse: Whether the network's activation is that ReLU.
    """

    filters: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, Tensor] = field(default_factory=dict)
    keeps_sparse: bool = True


def _filters(layer: LocalLayer, x: Tensor, places: Sequence[Place]) -> Tensor:
    generator = layer.IDynamicDWConv.conv
    hidden = generator.conv1(layer.IDynamicDWConv.conv0(layer.norm1(x)))[0]
    at = torch.stack([hidden[:, place.y, place.x] for place in places])
    found = generator.conv2(at[:, :, None, None]).flatten(1)
    return found.unflatten(1, (-1, generator.kernel, generator.kernel)).float().cpu()


def _dropped(layer: GlobalLayer, x: Tensor) -> Tensor:
    attention, shares = layer.restormer_attn, []
    activation = attention.activation

    def record(similarities: Tensor) -> Tensor:
        shares.append((similarities <= 0).double().mean((-2, -1)).flatten(0, -2))
        return ACTIVATIONS[activation](similarities)

    ACTIVATIONS["recorded"] = record
    attention.activation = "recorded"
    try:
        attention(layer.norm3(x))
    finally:
        attention.activation = activation
        del ACTIVATIONS["recorded"]
    return torch.cat(shares).mean(0).float().cpu()


def look(network: DLGSANet, picture: Tensor, places: Sequence[Place]) -> Seen:
    """Run a network on a picture and look into its layers.

    Args:
        network: In eval mode; its activations, windows and weights are used as they are.
        picture: (1, C, H, W) in [0, 1].
        places: Pixels of the picture.

    Raises:
        UserError: A place is outside the picture, or the network has neither kind of layer.
    """
    height, width = picture.shape[2:]
    for place in places:
        if not (0 <= place.x < width and 0 <= place.y < height):
            raise UserError(
                f"the pixel ({place.x}, {place.y}) is outside the picture of {width}x{height}"
            )
    seen = Seen(keeps_sparse=True)

    def watch(name: str, layer: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if isinstance(layer, GlobalLayer):
                seen.dropped[name] = _dropped(layer, arguments[0])
            elif layer.IDynamicDWConv.dynamic:
                seen.filters[name] = _filters(layer, arguments[0], places)

        return hook

    layers = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, LocalLayer | GlobalLayer)
    ]
    hooks = [
        module.register_forward_pre_hook(watch(*each)) for each in layers for module in each[1:]
    ]
    try:
        with torch.no_grad():
            network(picture)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen.filters and not seen.dropped:
        raise UserError("this network has neither dynamic filters nor attention to look at")
    return seen


def choose_places(picture: NDArray[np.uint8]) -> list[Place]:
    """Choose an edge, a texture and a flat place by the structure tensor.

    Of the tensor's two eigenvalues, the larger less the smaller is largest on an edge, the smaller
    on a texture, and the larger is smallest where nothing is.

    Args:
        picture: (H, W, 3) RGB or (H, W).
    """
    gray = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    gray = gray.astype(np.float32)
    dx, dy = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
    xx, yy, xy = (cv2.blur(each, (_WINDOW, _WINDOW)) for each in (dx * dx, dy * dy, dx * dy))
    middle, apart = (xx + yy) / 2, np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    larger, smaller = middle + apart, middle - apart
    rated = (larger - 4 * smaller, smaller, -larger)
    # Filters at the border look outside.
    border = min(_WINDOW // 2 + 1, (min(gray.shape) - 1) // 2)
    inside = np.full(gray.shape, False)
    inside[border : gray.shape[0] - border, border : gray.shape[1] - border] = True
    places = []
    for label, rating in zip(_MARKS, rated, strict=True):
        y, x = np.unravel_index(np.argmax(np.where(inside, rating, -np.inf)), gray.shape)
        places.append(Place(int(x), int(y), label))
    return places


def _mosaic(filters: Tensor) -> NDArray[np.float32]:
    """Lay G filters out in a rectangle with gaps, NaN between them."""
    count, kernel = filters.shape[:2]
    columns = int(np.ceil(np.sqrt(count * 2)))
    rows = -(-count // columns)
    sheet = np.full((rows * (kernel + 1) - 1, columns * (kernel + 1) - 1), np.nan, np.float32)
    for index, each in enumerate(filters):
        top, left = (kernel + 1) * (index // columns), (kernel + 1) * (index % columns)
        sheet[top : top + kernel, left : left + kernel] = each.numpy()
    return sheet


def _short(name: str) -> str:
    """Name a layer by its group and layer, counted from 1."""
    numbers = [int(part) + 1 for part in name.split(".") if part.isdigit()]
    return f"group {numbers[0]}, layer {numbers[1]}" if len(numbers) == 2 else name


def _spread(names: Sequence[str]) -> list[str]:
    """Choose up to _MOST_LAYERS of the layers, the first and the last among them."""
    if len(names) <= _MOST_LAYERS:
        return list(names)
    return [names[round(i * (len(names) - 1) / (_MOST_LAYERS - 1))] for i in range(_MOST_LAYERS)]


def draw(picture: NDArray[np.uint8], places: Sequence[Place], seen: Seen) -> Any:
    """Draw the picture with its places, their filters, and what ReLU drops, as one figure.

    Args:
        picture: (H, W, 3) RGB or (H, W).
        places: As `look` took them.
        seen: As `look` returned it.

    Returns:
        A figure of matplotlib's.
    """
    shown = _spread(list(seen.filters))
    figure = figures.new_figure(4.4 + 2.6 * max(len(shown), 2), 1.7 * len(places) + 3.6)
    parts = figure.subfigures(2 if seen.dropped else 1, 1, squeeze=False)[:, 0]
    left, right = parts[0].subfigures(1, 2, width_ratios=[4, 2.6 * max(len(shown), 1)])
    _draw_places(left, picture, places)
    if shown:
        _draw_filters(right, shown, places, seen)
    if seen.dropped:
        _draw_dropped(parts[1], seen)
    return figure


def _draw_places(part: Any, picture: NDArray[np.uint8], places: Sequence[Place]) -> None:
    axes = part.subplots()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
    for place, colour in zip(places, figures.COLOURS * len(places), strict=False):
        axes.plot(place.x, place.y, "o", ms=13, mfc="none", mec="white", mew=4)
        axes.plot(place.x, place.y, "o", ms=13, mfc="none", mec=colour, mew=2, label=place.label)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False, fontsize="small"
    )
    axes.set_axis_off()
    axes.set_title("input", fontsize="medium")


def _draw_filters(part: Any, shown: Sequence[str], places: Sequence[Place], seen: Seen) -> None:
    grid = part.subplots(len(places), len(shown), squeeze=False)
    for column, name in enumerate(shown):
        for row, place in enumerate(places):
            axes = grid[row][column]
            sheet = _mosaic(seen.filters[name][row])
            largest = float(np.nanmax(np.abs(sheet))) or 1.0
            axes.imshow(sheet, cmap="RdBu_r", vmin=-largest, vmax=largest)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            axes.set_xlabel(f"±{largest:.2g}", fontsize="x-small", labelpad=2)
            if row == 0:
                axes.set_title(_short(name), fontsize="small")
            if column == 0:
                colour = figures.COLOURS[row % len(figures.COLOURS)]
                axes.set_ylabel(place.label, color=colour, fontsize="small")
    part.suptitle("filters of MHDLSA, one a group of channels", fontsize="medium")


def _draw_dropped(part: Any, seen: Seen) -> None:
    axes = part.subplots()
    shares = torch.stack(list(seen.dropped.values())).mul(100).numpy()  # (layers, heads)
    image = axes.imshow(shares.T, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for (layer, head), share in np.ndenumerate(shares):
        ink = "black" if share > 60 else "white"
        axes.text(layer, head, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=8)
    names = [_short(name).replace(", ", "\n") for name in seen.dropped]
    axes.set_xticks(range(len(names)), names, fontsize="x-small")
    axes.set_yticks(range(shares.shape[1]), [f"head {n + 1}" for n in range(shares.shape[1])])
    axes.tick_params(axis="y", labelsize="x-small")
    what = "that ReLU drops" if seen.keeps_sparse else "that are not positive (no ReLU here)"
    axes.set_title(
        f"SparseGSA: share of similarities {what}, %; {shares.mean():.0f} % of all",
        fontsize="medium",
    )
    part.colorbar(image, ax=axes, fraction=0.02, pad=0.01)


def record(places: Sequence[Place], seen: Seen) -> dict[str, Any]:
    """Return the figures behind the drawing, for JSON."""
    return {
        "places": [vars(place) for place in places],
        "filters": {name: each.tolist() for name, each in seen.filters.items()},
        "dropped": {name: each.tolist() for name, each in seen.dropped.items()},
        "dropped_by_relu": seen.keeps_sparse,
    }
