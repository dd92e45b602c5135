"""`dlgsanet reproduce`: the paper's table, measured."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.tools.published import DATASETS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet reproduce",
        description="Measure the paper's table, cell by cell, beside the published figures.",
        epilog="Test sets are <datasets>/<name>/X<scale>/{HR,LR}, as `dlgsanet data benchmark` "
        "makes them. OUT gets images.csv (every image), table.md, table.tex and table.json. "
        "Run again, the command continues with images that are not in images.csv yet.",
    )
    add = parser.add_argument
    weights = ".pth or .safetensors; each fills the row of its network and scale"
    add("-m", "--weights", type=Path, nargs="+", required=True, metavar="FILE", help=weights)
    folder = {"type": Path, "metavar": "FOLDER"}
    datasets = "of the test sets (default: datasets/benchmark)"
    add("--datasets", **folder, default=Path("datasets/benchmark"), help=datasets)
    sets = f"test sets (default: {' '.join(DATASETS)})"
    add("--sets", nargs="+", default=DATASETS, metavar="NAME", help=sets)
    output = Path("results/reproduce")
    add("-o", "--output", **folder, default=output, help=f"default: {output}")
    tolerance = "difference in PSNR up to which a cell counts as reproduced (default: 0.05)"
    add("--tolerance", type=float, default=0.05, metavar="DB", help=tolerance)
    add("--measured-only", action="store_true", help="leave cells without a figure out of table.md")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU, else the CPU)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    add("--tile", type=int, default=0, metavar="N", help="side of tiles in LR (default: 0, none)")
    add("--ensemble", action="store_true", help="the mean over 8 flips and rotations")
    add("--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)")
    return parser


def _bar(total: int) -> Callable[[], None]:
    from dlgsanet_arch.progress import progress_bar

    bar = progress_bar("reproduce", total, "image")

    def step() -> None:
        bar.update()
        if bar.n == total:
            bar.close()

    return step


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table.

    Returns:
        0 where at least one cell was measured, else 1.
    """
    arguments = build_parser().parse_args(argv)
    if not arguments.tolerance >= 0:
        raise UserError(f"--tolerance is in dB, 0 or more; got {arguments.tolerance}")
    from dlgsanet_arch.data.benchmarks import set_name
    from dlgsanet_arch.tools import reproduction

    options = {name: getattr(arguments, name) for name in ("device", "dtype", "tile", "ensemble")}
    weights = [
        reproduction.load(path, param_key=arguments.param_key, **options)
        for path in dict.fromkeys(arguments.weights)
    ]
    result = reproduction.reproduce(
        weights,
        arguments.datasets,
        arguments.output,
        datasets=list(dict.fromkeys(map(set_name, arguments.sets))),
        tolerance=arguments.tolerance,
        progress=_bar,
    )
    only = arguments.measured_only
    print(reproduction.markdown(result, only_measured=only))
    written = reproduction.write(result, arguments.output, only_measured=only)
    for path in (arguments.output / reproduction.IMAGES, *written):
        print(f"written: {path}")
    if all(cell.psnr is None for cell in result.cells):
        raise UserError("no cell could be measured; the table says what is missing")
    return 0
