"""Ends with a message where this Python has no torch that finds a CUDA device."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    sys.exit(
        f"make gpu: {sys.executable} has no torch; name a Python that has: make PYTHON=... gpu"
    )

import torch

if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} of {sys.executable} finds no CUDA device")
