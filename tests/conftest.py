"""Fixtures shared by every test module."""

import gc
import importlib.util
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dlgsanet_arch  # noqa: F401 - repairs BasicSR before a test module imports it
from dlgsanet_arch.cpu import library

REPOSITORY = Path(__file__).resolve().parent.parent

# A shell's background jobs ignore SIGINT, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def registered() -> dict[str, dict[str, Any]]:
    """What BasicSR's registries hold, by registry and name."""
    from dlgsanet_arch.pipeline import runs

    return runs.registered()


@pytest.fixture(scope="session")
def option_root(tmp_path_factory) -> Path:
    """A folder with images in data/, an LMDB in pairs.lmdb/ and a file weights.pth."""
    import lmdb
    from helpers import write_pairs

    folder = tmp_path_factory.mktemp("root")
    write_pairs(folder / "data", 2)
    lmdb.open(str(folder / "pairs.lmdb")).close()
    (folder / "pairs.lmdb" / "meta_info.txt").write_text("image0.png (48,64,3) 1\n")
    (folder / "empty.lmdb").mkdir()
    (folder / "empty").mkdir()
    (folder / "empty" / "Thumbs.db").touch()
    (folder / "names.txt").write_text("image0.png (48,64,3)\n")
    torch.save({}, folder / "weights.pth")
    return folder


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that BasicSR's logger is given."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("basicsr")
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    # Networks freed after it would wait for gloo's threads with the lock that they wait for.
    gc.collect()
    torch.distributed.destroy_process_group()


def _prepare_interpreter() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Return a function that runs another in a process where Triton interprets its kernels.

    Triton decides that at import, from `TRITON_INTERPRET`. Other tests are not affected.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: requirements-test.txt names it for Linux")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # for the process, which starts here
            process.submit(_prepare_interpreter).result()
        yield lambda function, *args: process.submit(function, *args).result()


@pytest.fixture
def threads():
    """Set the number of PyTorch's threads, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


RUNNABLE = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(
    torch.backends.cpu.get_cpu_capability(), [library.variant()]
)


@pytest.fixture(params=RUNNABLE)
def variant(request, monkeypatch):
    """Take the C library of each instruction set that this machine runs."""
    monkeypatch.setattr(library, "variant", lambda: request.param)
    library._library.cache_clear()
    assert library.load() is not None
    yield request.param
    library._library.cache_clear()


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
