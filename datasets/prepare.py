"""Prepare and verify data sets: ``python datasets/prepare.py --help``."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dlgsanet_arch.cli import cmd_data  # noqa: E402 - found through the line above

if __name__ == "__main__":
    sys.exit(cmd_data.main(["--root", str(ROOT), *sys.argv[1:]]))
