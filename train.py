"""Train a network: ``python train.py -opt options/train/tiny_x4.yml``."""

import sys
from pathlib import Path

from dlgsanet_arch.cli import cmd_train

if __name__ == "__main__":
    sys.exit(cmd_train.main(["--root", str(Path(__file__).resolve().parent), *sys.argv[1:]]))
