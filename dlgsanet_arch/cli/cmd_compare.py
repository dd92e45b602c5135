"""`dlgsanet compare`: the figure of crops that papers show."""

import argparse
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
    add(
        "--lr",
        type=Path,
        metavar="IMAGE",
        help="its small version (default: made by MATLAB's bicubic, which needs --scale or "
        "--weights)",
    )
    add("--scale", type=int, metavar="N", help="HR side over LR side")
    add(
        "--result",
        type=_labelled,
        action="append",
        default=[],
        metavar="LABEL=PATH",
        help="another method's result, or a folder that holds one of the original's name; may be "
        "given several times",
    )
    add(
        "--weights",
        type=_labelled,
        action="append",
        default=[],
        metavar="[LABEL=]FILE",
        help="weights to run; may be given several times",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("compare.png"),
        metavar="FILE",
        help=".png, .pdf or .svg (default: compare.png)",
    )
    add(
        "--box",
        type=int,
        nargs=3,
        metavar=("X", "Y", "SIZE"),
        help="the detail, in pixels of HR: left, top, side (default: where methods differ most)",
    )
    add("--size", type=int, metavar="N", help="side of the detail where its place is found")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU, else the CPU)")
    add("--ensemble", action="store_true", help="the mean over 8 flips and rotations")
    add(
        "--tile",
        type=int,
        default=0,
        metavar="N",
        help="side of tiles, in pixels of LR (default: 0, none)",
    )
    add("--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)")
    return parser


def _agreed(told: Mapping[str, int]) -> int:
    """Return the one scale that all who tell it, by their words, agree on."""
    if not told:
        raise UserError("the scale is not known: give --scale, --lr or --weights")
    if len(set(told.values())) > 1:
        raise UserError(f"the scales differ: {'; '.join(told)}")
    return next(iter(told.values()))


def _add(results: dict[str, Any], label: str, image: Any) -> None:
    if label in results or label == "HR":
        raise UserError(f"two crops would be called {label!r}: write LABEL=PATH for one of them")
    results[label] = image


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Write the figure, and print the figures under the crop_figure."""
    arguments = build_parser().parse_args(argv)
    from dlgsanet_arch.tools import crop_figure, figures

    figures.check_figure_path(arguments.output)
    if arguments.box and arguments.size is not None:
        raise UserError("--box names the side of the detail already: leave out --size")
    given = len(arguments.result) + len(arguments.weights) + 2
    if given > crop_figure.MOST:
        raise UserError(
            f"the figure has {crop_figure.MOST} crops at most, with bicubic and HR; got {given}"
        )
    from dlgsanet_arch.checkpoint import read_checkpoint
    from dlgsanet_arch.data.bicubic import bicubic
    from dlgsanet_arch.inference import Upscaler

    hr = crop_figure.read_rgb(arguments.hr)
    weights = [
        (label, path, read_checkpoint(path, arguments.param_key))
        for label, path in arguments.weights
    ]
    lr = crop_figure.read_rgb(arguments.lr) if arguments.lr else None
    told = {f"{path} is of x{each.scale}": each.scale for _, path, each in weights}
    if arguments.scale is not None:
        told[f"--scale is {arguments.scale}"] = arguments.scale
    if lr is not None:
        between = crop_figure.scale_between(hr, lr)
        told[f"{arguments.lr} makes it x{between}"] = between
    scale = _agreed(told)
    if not 1 <= scale <= min(hr.shape[:2]):
        raise UserError(f"{arguments.hr} cannot be made {scale} times smaller")
    height, width = (side // scale * scale for side in hr.shape[:2])
    hr = hr[:height, :width]
    if lr is None:
        lr = bicubic(hr, 1 / scale)

    results = {"bicubic": bicubic(lr, scale)}
    for label, place in arguments.result:
        found = crop_figure.find_result(place, arguments.hr.stem)
        _add(results, label or place.stem, crop_figure.read_rgb(found))
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

    made = crop_figure.panels(hr, results, scale)
    if arguments.box:
        box = crop_figure.Box(*arguments.box)
    else:
        side = crop_figure.usual_side(hr) if arguments.size is None else arguments.size
        box = crop_figure.most_different_crop(made, side)
    drawn = crop_figure.draw(made, box, name=arguments.hr.stem, scale=scale)
    figures.save_figure(drawn, arguments.output)
    for panel in made[:-1]:
        print(f"{panel.label}: {panel.figures}")
    print(f"box: {box.left} {box.top} {box.side}")
    print(f"written: {arguments.output}")
    return 0
