"""Fixtures shared by every test module."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root: where train.py and options/ are."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of golden files and pictures beside the checkout, or the one named by the user."""
    return Path(os.environ.get("DLGSANET_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
