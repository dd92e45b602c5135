"""`dlgsanet new-options`: option files for a user's own images."""

import argparse
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet new-options",
        description="Make data sets of your own images, and option files that train and test on "
        "them.",
        epilog="Images are not changed; without --val one in 10 is held out for validation. The "
        "published batch of 16 patches of 48x48 is divided into parts where it would not fit half "
        "of the free memory; only where that is not enough, patches become smaller.",
    )
    add = parser.add_argument
    add(
        "--hr",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="HR images, sub-folders too, or what `dlgsanet data train` made",
    )
    add("--scale", type=int, choices=(2, 3, 4), required=True, help="HR side over LR side")
    add("--lr", type=Path, metavar="FOLDER", help="LR images of the same names (default: bicubic)")
    add(
        "--val",
        type=Path,
        metavar="FOLDER",
        help="HR images to validate on, or a prepared test set (default: some are held out; for "
        "prepared data those, or Set5)",
    )
    variants = ("tiny", "light", "large")
    add("--variant", choices=variants, default="tiny", help="of the network (default: tiny)")
    add("--name", help="of the run and files (default: VARIANT_xSCALE_FOLDER)")
    add(
        "-m",
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights to fine-tune from: a file, or tiny_x4",
    )
    add("--patch", type=int, metavar="N", help="side of patches in LR pixels (default: 48)")
    add(
        "--iterations",
        type=int,
        metavar="N",
        help="default: by the number of images, a day at most",
    )
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="of the machine that trains, if another (default: what is free here)",
    )
    add(
        "--root",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="the folder that holds datasets/ and experiments/ (default: the current folder)",
    )
    add("-o", "--output", type=Path, metavar="FOLDER", help="default: options, below --root")
    add("--skip-bad", action="store_true", help="leave out images that cannot be used")
    add("--overwrite", action="store_true", help="replace files of the same names")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Make the data sets, write the files, and print what to run next."""
    arguments = build_parser().parse_args(argv)
    try:
        from dlgsanet_arch.tools.new_options import write_option_files
    except ImportError as error:
        raise UserError(
            f"preparing data needs a package that cannot be imported ({error}); `dlgsanet doctor` "
            "says what to do"
        ) from error
    for flag in ("patch", "iterations", "memory"):
        value = getattr(arguments, flag)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag} {value}: give a number above 0")
    if arguments.name is not None and not re.fullmatch(r"\w[\w.+-]*", arguments.name):
        raise UserError(f"--name {arguments.name!r}: use letters, digits, -, _ and .")
    if arguments.output is None:
        arguments.output = arguments.root / "options"
    files, notes = write_option_files(arguments)
    print(*notes, sep="\n")
    root = [] if os.path.samefile(arguments.root, ".") else ["--root", str(arguments.root)]
    print(f"written: {files[0]}, {files[1]}; next:")
    for verb, file in zip(("train", "test"), files, strict=True):
        resume = ["--auto_resume"] if verb == "train" else []
        print(f"  {shlex.join(['dlgsanet', verb, *root, '-opt', str(file), *resume])}")
    return 0
