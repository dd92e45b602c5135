"""Fixtures shared by every test module."""

import os
from pathlib import Path

import pytest
import torch

import dlgsanet_arch  # noqa: F401 - repairs BasicSR before a test module imports it

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root: where train.py and options/ are."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of golden files and images, as `reporting.shared_folder` of benchmarks/."""
    own = REPOSITORY / "shared"
    default = own if own.is_dir() else REPOSITORY.parent / "shared"
    return Path(os.environ.get("DLGSANET_SHARED", default))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; `make gpu` refuses to start there."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make gpu"))
