"""`dlgsanet reproduce`: the paper's table, measured."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import VERBS, add_common, exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import printable
from dlgsanet_arch.tools.published import DATASETS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet reproduce",
        description=VERBS["reproduce"],
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
    add("--tile", type=int, default=0, metavar="N", help="side of tiles in LR (default: 0, none)")
    add_common(parser, "device", "dtype", "ensemble", "param-key")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table; a UserError where no cell was measured."""
    asked = build_parser().parse_args(argv)
    if not asked.tolerance >= 0:
        raise UserError(f"--tolerance is in dB, 0 or more; got {asked.tolerance}")
    from dlgsanet_arch.data.discovery import set_name
    from dlgsanet_arch.files import disk_faults_named, write_atomically
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
    text = reproduction.markdown(table, only_measured=asked.measured_only)
    print(printable(text))
    written = {"table.md": text, "table.json": json.dumps(table, indent=1) + "\n"}
    with disk_faults_named(f"{asked.output} cannot be written"):
        for name, content in written.items():
            write_atomically(asked.output / name, content.encode())
    for name in (reproduction.IMAGES, *written):
        print(printable(f"written: {asked.output / name}"))
    if all(cell["psnr"] is None for cell in table["cells"]):
        raise UserError("no cell could be measured; the table says what is missing")
    return 0
