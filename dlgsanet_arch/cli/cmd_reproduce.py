"""`dlgsanet reproduce`: the paper's table, measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.tools.published import DATASETS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet reproduce",
        description="Measure the paper's table, cell by cell, next to the published figures.",
        epilog="Test sets are <datasets>/<name>/X<scale>/{HR,LR}, as `dlgsanet data benchmark` "
        "makes them. OUT gets images.csv (every image), table.md and table.json. "
        "Run again, the command continues with images that are not in images.csv yet.",
    )
    add = parser.add_argument
    weights = ".pth or .safetensors; each fills the row of its network and scale"
    add("-m", "--weights", type=Path, nargs="+", required=True, metavar="FILE", help=weights)
    folder = {"type": Path, "metavar": "FOLDER", "help": "default: %(default)s"}
    add("--datasets", **folder, default=Path("datasets/benchmark"))
    add("--sets", nargs="+", default=DATASETS, metavar="NAME", help="test sets (default: all five)")
    add("-o", "--output", **folder, default=Path("results/reproduce"))
    tolerance = "difference in PSNR up to which a cell counts as reproduced (default: 0.05)"
    add("--tolerance", type=float, default=0.05, metavar="DB", help=tolerance)
    add("--measured-only", action="store_true", help="leave cells without a figure out of table.md")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU, else the CPU)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    add("--tile", type=int, default=0, metavar="N", help="side of tiles in LR (default: 0, none)")
    add("--ensemble", action="store_true", help="the mean over 8 flips and rotations")
    add("--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table; a UserError where no cell was measured."""
    asked = build_parser().parse_args(argv)
    if not asked.tolerance >= 0:
        raise UserError(f"--tolerance is in dB, 0 or more; got {asked.tolerance}")
    from dlgsanet_arch.data.discovery import set_name
    from dlgsanet_arch.tools import reproduction

    options = {name: getattr(asked, name) for name in ("device", "dtype", "tile", "ensemble")}
    weights = [
        reproduction.load(path, param_key=asked.param_key, **options)
        for path in dict.fromkeys(asked.weights)
    ]
    sets = list(dict.fromkeys(map(set_name, asked.sets)))
    table = reproduction.reproduce(
        weights, asked.datasets, asked.output, datasets=sets, tolerance=asked.tolerance
    )
    only = asked.measured_only
    print(reproduction.markdown(table, only_measured=only))
    written = reproduction.write(table, asked.output, only_measured=only)
    for path in (asked.output / reproduction.IMAGES, *written):
        print(f"written: {path}")
    if all(cell["psnr"] is None for cell in table["cells"]):
        raise UserError("no cell could be measured; the table says what is missing")
    return 0
