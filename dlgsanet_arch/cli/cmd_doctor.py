"""`dlgsanet doctor`: what is installed, what is wrong and how to fix it."""

import argparse
from collections.abc import Sequence

from dlgsanet_arch.cli import VERBS, exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    return argparse.ArgumentParser(
        prog="dlgsanet doctor",
        description=VERBS["doctor"],
        epilog="Exit status 1 where training cannot run.",
    )


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Print versions, repairs, devices and problems; 1 where training cannot run."""
    build_parser().parse_args(argv)
    from dlgsanet_arch.tools import doctor

    return doctor.report()
