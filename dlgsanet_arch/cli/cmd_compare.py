"""`dlgsanet compare`: the figure of crops that papers show."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError


def _labelled(text: str) -> tuple[str, Path]:
    """Split LABEL=PATH; without a label it is empty."""
    label, equals, path = text.partition("=")
    return (" ".join(label.split()), Path(path)) if equals else ("", Path(text))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet compare",
        description="Draw one detail of an image by several methods, with PSNR and SSIM.",
        epilog="Crops are in the order bicubic, --result, --weights, HR. PSNR and SSIM are of the "
        "whole image: Y channel, `scale` pixels at each side left out.",
    )
    add = parser.add_argument
    add("--hr", type=Path, required=True, metavar="IMAGE", help="the original")
    lr = "its small version (default: made by MATLAB's bicubic, which needs --scale or --weights)"
    add("--lr", type=Path, metavar="IMAGE", help=lr)
    add("--scale", type=int, metavar="N", help="HR side over LR side")
    results = "another method's result, or a folder that holds one of the original's name; may be "
    results += "given several times"
    several = {"type": _labelled, "action": "append", "default": []}
    add("--result", **several, metavar="LABEL=PATH", help=results)
    weights = "weights to run; may be given several times"
    add("-m", "--weights", **several, metavar="[LABEL=]FILE", help=weights)
    output = ".png, .pdf or .svg (default: compare.png)"
    add("-o", "--output", type=Path, default=Path("compare.png"), metavar="FILE", help=output)
    add(
        "--box",
        type=int,
        nargs="+",
        metavar="N",
        help="the detail, in pixels of HR: X Y SIDE, or SIDE alone (default: where methods differ "
        "most, a fifth of the shorter side)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU, else the CPU)")
    add("--ensemble", action="store_true", help="the mean over 8 flips and rotations")
    tile = "side of tiles, in pixels of LR (default: 0, none)"
    add("--tile", type=int, default=0, metavar="N", help=tile)
    add("--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)")
    return parser


def find_result(place: Path, name: str) -> Path:
    """Find a method's result of an image.

    Args:
        place: The result, or a folder of results.
        name: The image's name without its ending. In a folder the result has this name, or
            begins with it and continues with no letter or digit, or with a scale: `baby_EDSR.png`,
            `baby-x4.png`, `babyx4.png`.

    Raises:
        UserError: None is found, or more than one.
    """
    from dlgsanet_arch.data.finding import SUFFIXES
    from dlgsanet_arch.hints import named

    if place.is_file():
        return place
    if not place.is_dir():
        raise UserError(f"{place} does not exist: name a result or a folder of results")
    images = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    found = [path for path in images if path.stem == name]
    if not found:
        pattern = re.compile(re.escape(name) + r"([^0-9A-Za-z]|[xX][0-9]).*", re.DOTALL)
        found = [path for path in images if pattern.fullmatch(path.stem)]
    if len(found) == 1:
        return found[0]
    names = [path.name for path in found or images]
    if found:
        raise UserError(f"{place} holds several results of {name}: {named(names)}; name one file")
    there = f"it holds {named(names)}" if names else "it holds no images"
    raise UserError(f"{place} holds no result of {name}: {there}")


def _read(path: Path) -> Any:
    """Read an image as (H, W, 3) in RGB, 8 bits."""
    from dlgsanet_arch.data.images import read_8_bits

    return read_8_bits(path).pixels[..., ::-1].copy()


def _scale_between(hr: Any, lr: Any) -> int:
    """Return how many times larger HR is; some of its rows and columns may make no pixel of LR."""
    scale = hr.shape[0] // lr.shape[0]
    if scale < 1 or tuple(side // scale for side in hr.shape[:2]) != lr.shape[:2]:
        raise UserError(
            f"LR is {lr.shape[1]}x{lr.shape[0]}, which is not a small version of HR, "
            f"{hr.shape[1]}x{hr.shape[0]}"
        )
    return scale


def _pair(arguments: argparse.Namespace, scales: Mapping[str, int]) -> tuple[Any, Any, int]:
    """Read or make HR and LR; return them with the scale that all who state it agree on."""
    from dlgsanet_arch.data.bicubic import bicubic

    hr, lr, stated = _read(arguments.hr), None, dict(scales)
    if arguments.scale is not None:
        stated[f"--scale is {arguments.scale}"] = arguments.scale
    if arguments.lr:
        lr = _read(arguments.lr)
        between = _scale_between(hr, lr)
        stated[f"{arguments.lr} makes it x{between}"] = between
    if not stated:
        raise UserError("the scale is not known: give --scale, --lr or --weights")
    if len(set(stated.values())) > 1:
        raise UserError(f"the scales differ: {'; '.join(stated)}")
    scale = next(iter(stated.values()))
    if not 1 <= scale <= min(hr.shape[:2]):
        raise UserError(f"{arguments.hr} cannot be made {scale} times smaller")
    height, width = (side // scale * scale for side in hr.shape[:2])
    hr = hr[:height, :width]
    return hr, bicubic(hr, 1 / scale) if lr is None else lr, scale


def _add(results: dict[str, Any], label: str, image: Any) -> None:
    if label in results or label == "HR":
        raise UserError(f"two crops would be called {label!r}: write LABEL=PATH for one of them")
    results[label] = image


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Write the figure, and print the scores under its crops."""
    arguments = build_parser().parse_args(argv)
    from dlgsanet_arch.checkpoint import read_checkpoint
    from dlgsanet_arch.data.bicubic import bicubic
    from dlgsanet_arch.inference import Upscaler
    from dlgsanet_arch.tools import figure

    figure.check_path(arguments.output)
    box = arguments.box
    if box and len(box) not in (1, 3):
        raise UserError(f"--box takes X Y SIDE, or SIDE alone; got {len(box)} numbers")
    given = len(arguments.result) + len(arguments.weights) + 2
    if given > 8:
        raise UserError(f"the figure has 8 crops at most, with bicubic and HR; got {given}")
    weights = [
        (label, path, read_checkpoint(path, arguments.param_key))
        for label, path in arguments.weights
    ]
    scales = {f"{path} is of x{each.scale}": each.scale for _, path, each in weights}
    hr, lr, scale = _pair(arguments, scales)
    results = {"bicubic": bicubic(lr, scale)}
    for label, place in arguments.result:
        _add(results, label or place.stem, _read(find_result(place, arguments.hr.stem)))
    for label, path, checkpoint in weights:
        upscaler = Upscaler(
            checkpoint,
            device=arguments.device,
            ensemble=arguments.ensemble,
            tile=arguments.tile,
            notice=lambda text: print(f"note: {text}"),
        )
        name = checkpoint.name
        _add(results, label or (f"{name} ({path.stem})" if name in results else name), upscaler(lr))

    box = None if not box else box[0] if len(box) == 1 else figure.Box(*box)
    compared = figure.compare(arguments.hr.stem, hr, results, scale, box)
    figure.save(figure.draw([compared]), arguments.output)
    for panel in compared.panels[:-1]:
        print(f"{panel.label}: {panel.scores}")
    print("box:", *compared.box)
    print(f"written: {arguments.output}")
    return 0
