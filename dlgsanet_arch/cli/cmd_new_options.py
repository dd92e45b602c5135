"""`dlgsanet new-options`: option files for a user's own images."""

import argparse
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import add_common, exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import printable


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet new-options",
        description="Make data sets of your own images, and option files that train and test on "
        "them.",
        epilog="Images are not changed; without --val one in 10 is held out for validation. The "
        "published batch of 16 patches of 48x48 is divided into parts if it does not fit half "
        "of the free memory.",
    )
    add, folder = parser.add_argument, {"type": Path, "metavar": "FOLDER"}
    hr = "HR images, sub-folders too, or what `dlgsanet data train` made"
    add("--hr", **folder, required=True, help=hr)
    add("--scale", type=int, choices=(2, 3, 4), required=True, help="HR side over LR side")
    add("--lr", **folder, help="LR images of the same names (default: bicubic)")
    val = "HR images to validate on, or a prepared test set (default: some are held out; for "
    add("--val", **folder, help=f"{val}prepared data those, or Set5)")
    variants = ("tiny", "light", "large")
    add("--variant", choices=variants, default="tiny", help="of the network (default: tiny)")
    add("--name", help="of the run and files (default: VARIANT_xSCALE_FOLDER)")
    weights = "weights to fine-tune from: a file, or bundled ones by name, such as tiny_x4"
    add("-m", "--weights", type=Path, metavar="FILE", help=weights)
    add_common(parser, "param-key")
    add("--patch", type=int, metavar="N", help="side of patches in LR pixels (default: 48)")
    iterations = "default: by the number of images, a day at most"
    add("--iterations", type=int, metavar="N", help=iterations)
    memory = "of the machine that trains, if another (default: what is free here)"
    add("--memory", type=float, metavar="GIB", help=memory)
    root = "the folder that holds datasets/ and experiments/ (default: the current folder)"
    add("--root", **folder, default=Path(), help=root)
    add("-o", "--output", **folder, help="default: options, below --root")
    add("--skip-bad", action="store_true", help="leave out images that cannot be used")
    add("--overwrite", action="store_true", help="replace files of the same names")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Make the data sets, write the files, and print what to run next."""
    asked = build_parser().parse_args(argv)
    try:
        from dlgsanet_arch.tools.new_options import write_option_files
    except ImportError as error:
        raise UserError(
            f"preparing data needs a package that cannot be imported ({error}); `dlgsanet doctor` "
            "says what to do"
        ) from error
    for flag in ("patch", "iterations", "memory"):
        value = getattr(asked, flag)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag} {value}: give a number above 0")
    if asked.name is not None and not re.fullmatch(r"\w[\w.+-]*", asked.name):
        raise UserError(f"--name {asked.name!r}: use letters, digits, -, _ and .")
    asked.output = asked.output or asked.root / "options"
    files, notes = write_option_files(asked)
    print(printable("\n".join(notes)))
    root = [] if os.path.samefile(asked.root, ".") else ["--root", str(asked.root)]
    print(printable(f"written: {files[0]}, {files[1]}; next:"))
    for verb, file, more in zip(("train", "test"), files, (["--auto_resume"], []), strict=True):
        print(f"  {shlex.join(['dlgsanet', verb, *root, '-opt', str(file), *more])}")
    return 0
