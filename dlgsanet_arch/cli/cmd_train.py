"""`dlgsanet train`: also behind train.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch import pipeline
from dlgsanet_arch.cli import exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    return pipeline.build_parser("train")


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Train; relative paths are below the current folder unless `argv` has ``--root``."""
    pipeline.train(Path.cwd(), sys.argv[1:] if argv is None else argv)
    return 0
