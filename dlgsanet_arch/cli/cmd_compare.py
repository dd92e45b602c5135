"""`dlgsanet compare`: the figure of crops that papers show."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import named, printable


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
    several = {"type": _labelled, "action": "append", "default": []}
    results = "another method's result, or a folder that holds one of the original's name; repeat"
    add("--result", **several, metavar="LABEL=PATH", help=f"{results} for more")
    weights = "weights to run; repeat for more"
    add("-m", "--weights", **several, metavar="[LABEL=]FILE", help=weights)
    output = ".png, .pdf or .svg (default: compare.png)"
    add("-o", "--output", type=Path, default=Path("compare.png"), metavar="FILE", help=output)
    box = "the detail, in pixels of HR: X Y SIDE, or SIDE alone (default: where methods differ "
    add("--box", type=int, nargs="+", metavar="N", help=f"{box}most, a fifth of the shorter side)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU, else the CPU)")
    add("--ensemble", action="store_true", help="the mean over 8 flips and rotations")
    tile = "side of tiles, in pixels of LR (default: 0, none)"
    add("--tile", type=int, default=0, metavar="N", help=tile)
    add("--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)")
    return parser


def find_result(place: Path, name: str) -> Path:
    """Find a method's result of an image: a file, or the only one of a folder by its name.

    That is the image's name, or begins with it and continues with no letter or digit, or with a
    scale: `baby_EDSR.png`, `baby-x4.png`, `babyx4.png`. UserError for none or several.
    """
    from dlgsanet_arch.data.finding import SUFFIXES

    if place.is_file():
        return place
    if not place.is_dir():
        raise UserError(f"{place} does not exist: name a result or a folder of results")
    images = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    pattern = re.compile(re.escape(name) + r"([^0-9A-Za-z]|[xX][0-9]).*", re.DOTALL)
    found = [path for path in images if path.stem == name]
    found = found or [path for path in images if pattern.fullmatch(path.stem)]
    if len(found) == 1:
        return found[0]
    there = named([path.name for path in found or images]) or "no images"
    if found:
        raise UserError(f"{place} holds several results of {name}: {there}; name one file")
    raise UserError(f"{place} holds no result of {name}: it holds {there}")


def _read(path: Path) -> Any:
    """Read an image as (H, W, 3) in RGB, 8 bits."""
    from dlgsanet_arch.data.images import read_8_bits

    return read_8_bits(path).pixels[..., ::-1].copy()


def _pair(asked: argparse.Namespace, stated: dict[str, int]) -> tuple[Any, Any, int]:
    """Read or make HR and LR; return them with the scale that all who state it agree on."""
    from dlgsanet_arch.data.bicubic import bicubic

    hr, lr = _read(asked.hr), None
    if asked.scale is not None:
        stated[f"--scale is {asked.scale}"] = asked.scale
    if asked.lr:
        lr = _read(asked.lr)
        between = hr.shape[0] // lr.shape[0]
        if between < 1 or tuple(side // between for side in hr.shape[:2]) != lr.shape[:2]:
            raise UserError(
                f"LR is {lr.shape[1]}x{lr.shape[0]}, which is not a small version of HR, "
                f"{hr.shape[1]}x{hr.shape[0]}"
            )
        stated[f"{asked.lr} makes it x{between}"] = between
    if not stated:
        raise UserError("the scale is not known: give --scale, --lr or --weights")
    if len(set(stated.values())) > 1:
        raise UserError(f"the scales differ: {'; '.join(stated)}")
    scale = next(iter(stated.values()))
    if not 1 <= scale <= min(hr.shape[:2]):
        raise UserError(f"{asked.hr} cannot be made {scale} times smaller")
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
    asked = build_parser().parse_args(argv)
    from dlgsanet_arch.checkpoint import read_checkpoint
    from dlgsanet_arch.data.bicubic import bicubic
    from dlgsanet_arch.inference import Upscaler
    from dlgsanet_arch.tools import figure

    figure.check_path(asked.output)
    box = asked.box
    if box and len(box) not in (1, 3):
        raise UserError(f"--box takes X Y SIDE, or SIDE alone; got {len(box)} numbers")
    inputs = [asked.hr, asked.lr, *(path for _, path in (*asked.result, *asked.weights))]
    if any(each and os.path.realpath(each) == os.path.realpath(asked.output) for each in inputs):
        raise UserError(f"-o {asked.output} is also read: give the figure another name")
    given = len(asked.result) + len(asked.weights) + 2
    if given > 8:
        raise UserError(f"the figure has 8 crops at most, with bicubic and HR; got {given}")
    read = {path: read_checkpoint(path, asked.param_key) for _, path in asked.weights}
    stated = {f"{path} is of x{each.scale}": each.scale for path, each in read.items()}
    hr, lr, scale = _pair(asked, stated)
    results = {"bicubic": bicubic(lr, scale)}
    for label, place in asked.result:
        _add(results, label or place.stem, _read(find_result(place, asked.hr.stem)))
    options = {"device": asked.device, "ensemble": asked.ensemble, "tile": asked.tile}
    for label, path in asked.weights:
        upscaler = Upscaler(read[path], **options, notice=lambda text: print(f"note: {text}"))
        name = read[path].name
        _add(results, label or (f"{name} ({path.stem})" if name in results else name), upscaler(lr))

    box = None if not box else box[0] if len(box) == 1 else figure.Box(*box)
    compared = figure.compare(asked.hr.stem, hr, results, scale, box)
    figure.save(figure.draw([compared]), asked.output)
    for panel in compared.panels[:-1]:
        print(printable(f"{panel.label}: {panel.scores}"))
    print("box:", *compared.box)
    print(printable(f"written: {asked.output}"))
    return 0
