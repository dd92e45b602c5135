"""Test trained weights: ``python test.py -opt options/test/tiny_x4.yml``."""

import sys
from pathlib import Path

from dlgsanet_arch.cli import cmd_test

if __name__ == "__main__":
    sys.exit(cmd_test.main(["--root", str(Path(__file__).resolve().parent), *sys.argv[1:]]))
