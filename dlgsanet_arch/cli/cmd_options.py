"""`dlgsanet options`: prints a shipped option file, as a start for one of your own."""

import argparse
from collections.abc import Sequence

from dlgsanet_arch.cli import exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet options",
        description="Print a shipped option file: dlgsanet options tiny_x4 > my.yml",
        epilog="Without a name, the names are listed.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as tiny_x4")
    parser.add_argument("--test", action="store_true", help="the file to test, not to train")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Print an option file, or the names of all."""
    asked = build_parser().parse_args(argv)
    from dlgsanet_arch.options import shipped

    if asked.name is None:
        print(*shipped.names(train=not asked.test), sep="\n")
    else:
        file = shipped.find(asked.name, train=not asked.test)
        print(file.read_text(encoding="utf-8"), end="")
    return 0
