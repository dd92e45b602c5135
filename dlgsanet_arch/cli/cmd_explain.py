"""`dlgsanet explain`: what a network looks at in a picture."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet explain",
        description="Draw what a network looks at: local filters, and the sparsity of attention.",
        epilog="The figure has the picture with its chosen pixels, the filters that MHDLSA makes "
        "for them in up to four layers, and for each SparseGSA layer and head the share of "
        "similarities between channels that its ReLU drops.",
    )
    add = parser.add_argument
    add("-i", "--input", type=Path, required=True, metavar="PICTURE", help="a small picture, LR")
    add(
        "-m",
        "--model",
        type=Path,
        metavar="WEIGHTS",
        help=".pth or .safetensors (default: those of the package)",
    )
    add(
        "-o",
        "--out",
        type=Path,
        default=Path("explain.png"),
        metavar="FILE",
        help=".png, .pdf or .svg (default: explain.png)",
    )
    add(
        "--at",
        type=int,
        nargs=2,
        action="append",
        metavar=("X", "Y"),
        help="a pixel, column and row; may be given again (default: edge, texture, flat)",
    )
    add("--json", type=Path, metavar="FILE", help="write the numbers, too")
    add("--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure."""
    arguments = build_parser().parse_args(argv)
    import torch

    from dlgsanet_arch.checkpoint import read_checkpoint
    from dlgsanet_arch.data.pictures import read_8_bits
    from dlgsanet_arch.files import disk_faults_named, write_whole
    from dlgsanet_arch.inference.upscaler import find_weights
    from dlgsanet_arch.tools import explanation, figures

    figures.check_figure_path(arguments.out)
    figures.new_figure(1, 1)  # says now that matplotlib is absent
    checkpoint = read_checkpoint(arguments.model or find_weights(), arguments.param_key)
    if checkpoint.config["in_chans"] != 3:
        raise UserError("explain takes weights of RGB networks; these have other channels")
    picture = read_8_bits(arguments.input, least=1).pixels[..., ::-1].copy()
    places = explanation.choose_places(picture)
    if arguments.at:
        places = [explanation.Place(x, y, f"({x}, {y})") for x, y in arguments.at]
    given = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    seen = explanation.look(checkpoint.network(), given, places)
    seen.keeps_sparse = (
        checkpoint.config["activation"] == "relu"
        and checkpoint.config["buildblock_type"] == "sparseedge"
    )
    figures.save_figure(explanation.draw(picture, places, seen), arguments.out)
    print(f"written: {arguments.out}")
    if arguments.json is not None:
        with disk_faults_named(f"{arguments.json} cannot be written"):
            text = json.dumps(explanation.record(places, seen), indent=1)
            write_whole(arguments.json, text.encode())
        print(f"written: {arguments.json}")
    if seen.dropped:
        share = torch.stack(list(seen.dropped.values())).mean().item()
        print(f"similarities that are not positive: {share:.1%}")
    return 0
