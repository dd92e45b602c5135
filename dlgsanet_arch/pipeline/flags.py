"""The command line of training and testing: BasicSR's flags, and `--root`."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def build_parser(*, train: bool) -> argparse.ArgumentParser:
    """Return the parser of `train`, or of `test`: both take every flag of BasicSR."""
    verb, does = ("train", "Train a network") if train else ("test", "Test trained weights")
    parser = argparse.ArgumentParser(
        prog=f"dlgsanet {verb}",
        description=f"{does} as an option file says, through BasicSR.",
        epilog="Relative paths in the option file, experiments/ and results/ are below --root.",
    )
    parser.add_argument(
        "-opt", type=Path, required=True, metavar="FILE", help="the option file, a YAML file"
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="default: the folder of train.py and test.py, or the current folder",
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm"),
        default="none",
        help="what started the processes of a distributed run (default: none)",
    )
    parser.add_argument(
        "--auto_resume",
        action="store_true",
        help="go on from the run's newest saved state; without it an old run is renamed",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="name the run debug_…, and print and save often",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="given by some launchers"
    )
    parser.add_argument(
        "--force_yml",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="replace values of the option file, such as train:total_iter=1000",
    )
    return parser


def with_readable_numbers(entry: str, parse: Callable[[str], Any]) -> str:
    """Mark a number that BasicSR would take for a string (``-1``, ``1e-4``) as a number.

    Args:
        entry: An entry of ``--force_yml``, ``a:b=value``.
        parse: How BasicSR reads a value.
    """
    key, equals, value = entry.partition("=")
    text = value.strip()
    if isinstance(parse(text), str) and _NUMBER.fullmatch(text):
        return f"{key}{equals}!!float {text}"
    return entry


def for_basicsr(arguments: argparse.Namespace) -> list[str]:
    """Turn parsed arguments back into the command line that BasicSR's own parser takes."""
    argv = ["-opt", str(arguments.opt), "--launcher", arguments.launcher]
    argv += ["--local_rank", str(arguments.local_rank)]
    argv += ["--auto_resume"] * arguments.auto_resume
    argv += ["--debug"] * arguments.debug
    if arguments.force_yml:
        argv += ["--force_yml", *arguments.force_yml]
    return argv
