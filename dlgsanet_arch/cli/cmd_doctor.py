"""`dlgsanet doctor`: what is installed, what is wrong and how to fix it."""

import argparse
from collections.abc import Sequence

from dlgsanet_arch.cli import VERBS, exit_status
from dlgsanet_arch.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet doctor",
        description=VERBS["doctor"],
        epilog="Exit status 1 if training cannot run.",
    )
    install = "show what pip would install to fix the problems, BasicSR included, then ask and do"
    parser.add_argument("--fix", action="store_true", help=f"{install} it")
    parser.add_argument("--yes", action="store_true", help="with --fix: do not ask")
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Print versions, repairs, devices and problems; 1 where training cannot run."""
    parser = build_parser()
    asked = parser.parse_args(argv)
    if asked.yes and not asked.fix:
        parser.error("--yes needs --fix")
    try:
        from dlgsanet_arch.tools import doctor
    except (ImportError, OSError) as error:  # OSError: a library of torch's does not load
        raise UserError(
            f"an import of what all verbs need fails ({error}); run: pip install --force-reinstall "
            "torch numpy"
        ) from error
    problems = doctor.report()
    return doctor.fix(problems, yes=asked.yes) if asked.fix else int(bool(problems))
