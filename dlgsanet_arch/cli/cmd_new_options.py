"""`dlgsanet new-options`: option files for a user's own pictures."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError

_GIB = 2**30


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet new-options",
        description="Write option files that train and test on your own pictures.",
        epilog="Derived from the shipped files, comments included. Pictures are not changed; "
        "without --val one in 10 is held out to validate on, by links. The published 16 patches of "
        "48x48 stay where they fit half of the free memory; else they are worked on in parts, and "
        "only then they become smaller. What to run next is printed at the end.",
    )
    add = parser.add_argument
    add(
        "--hr",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="HR pictures, sub-folders too, or what `dlgsanet data train` made",
    )
    add("--scale", type=int, choices=(2, 3, 4), required=True, help="HR side over LR side")
    add(
        "--lr",
        type=Path,
        metavar="FOLDER",
        help="LR pictures of the same names (default: made by MATLAB's bicubic)",
    )
    add(
        "--val",
        type=Path,
        metavar="FOLDER",
        help="HR pictures to validate on, or a prepared test set (default: some are held out; "
        "of prepared data those, or Set5)",
    )
    add(
        "--variant",
        choices=("tiny", "light", "large"),
        default="tiny",
        help="of the network (default: tiny)",
    )
    add("--name", help="of the run and the files (default: VARIANT_xSCALE_FOLDER)")
    add("--weights", type=Path, metavar="FILE", help="a .pth to fine-tune from")
    add("--patch", type=int, metavar="N", help="side of patches in LR pixels (default: 48)")
    add("--iterations", type=int, metavar="N", help="default: by the number of pictures")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="that the training has (default: what is free here, of the GPU where there is one)",
    )
    add(
        "--root",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="the folder that holds datasets/ and experiments/ (default: the current folder)",
    )
    add(
        "-o",
        "--out",
        type=Path,
        metavar="FOLDER",
        help="gets train/NAME.yml and test/NAME.yml (default: options, below --root)",
    )
    add("--overwrite", action="store_true", help="replace files of the same names")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, and say what to run next."""
    arguments = build_parser().parse_args(argv)
    try:
        from dlgsanet_arch.tools import drafting
    except ImportError as error:
        raise UserError(
            "option files for pictures need what reads pictures, and an import fails "
            f"({error}); `dlgsanet doctor` says what to do"
        ) from error
    if arguments.memory is not None and not 0 < arguments.memory < math.inf:
        raise UserError(f"--memory {arguments.memory}: must be a number of GiB above 0")
    root = arguments.root.expanduser()
    if not root.is_dir():
        raise UserError(f"--root: there is no folder {root}")
    request = drafting.Request(
        hr=arguments.hr,
        scale=arguments.scale,
        variant=arguments.variant,
        lr=arguments.lr,
        val=arguments.val,
        name=arguments.name,
        start=arguments.weights,
        patch=arguments.patch,
        iterations=arguments.iterations,
        root=root,
        free=None if arguments.memory is None else int(arguments.memory * _GIB),
        overwrite=arguments.overwrite,
    )
    folder = arguments.out or root / "options"
    made = drafting.draft(request)
    drafting.write(request, made, folder)
    for path in drafting.paths(made, folder):
        print(f"written: {path}")
    for note in made.notes:
        print(f"note: {note}")
    print("next:")
    for line in drafting.next_commands(request, made, folder):
        print(f"  {line}")
    return 0
