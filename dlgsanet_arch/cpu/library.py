"""The compiled kernels: which of them this machine runs, when, and how threads share their work."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

LARGEST_KERNEL = 33  # LARGEST_KERNEL of common.h
SOURCES = ("common.h", "dynamic.c", "layers.c", "operators.c", "work.c")  # as in setup.py
BUILD = "'pip install --no-deps .' in the checkout (with -e, if you did so before)"


class _Call(ctypes.Structure):
    """`struct call` of work.c."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("next", ctypes.c_int64),
        ("failed", ctypes.c_int64),
    )


def variant() -> str | None:
    """Return which instruction set's kernels are used, as in setup.py; None for none.

    PyTorch's own choice is followed, ATEN_CPU_CAPABILITY included; DLGSANET_KERNELS=avx2 takes the
    narrower ones on a processor that has both, and DLGSANET_KERNELS=0 none.
    """
    if platform.machine() in ("aarch64", "arm64"):
        found = ["neon"]
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        found = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(capability, [])
    wanted = os.environ.get("DLGSANET_KERNELS")
    return next((name for name in found if wanted in (None, "", name)), None)


class _Library(NamedTuple):
    """The kernels, or why there are none."""

    kernels: ctypes.CDLL | None
    fault: str


@functools.cache
def _library() -> _Library:
    name = variant()
    if name is None:
        limits = {key: os.environ.get(key) for key in ("ATEN_CPU_CAPABILITY", "DLGSANET_KERNELS")}
        causes = [f"{key} is {value!r}" for key, value in limits.items() if value]
        cause = f", as {' and '.join(causes)}" if causes else ""
        return _Library(None, f"none is for what PyTorch uses here{cause}")
    spec = importlib.util.find_spec(f"dlgsanet_arch.cpu._{name}")
    if spec is None:
        if os.name != "posix":
            return _Library(None, f"they are not built on {platform.system()}")
        cure = f"{BUILD} builds them, with gcc, clang or Zig, which pip fetches where it can"
        return _Library(None, f"this Python's were not built; {cure}")
    try:
        kernels = ctypes.CDLL(spec.origin)
        digest = ctypes.c_char.in_dll(kernels, "source_digest")
    except (OSError, ValueError) as error:
        return _Library(None, f"{spec.origin} does not load ({error}); {BUILD} builds it anew")
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    if sources[0].exists():  # in a checkout, not in an installed package
        built_from = ctypes.string_at(ctypes.addressof(digest)).decode()
        if built_from != hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest():
            return _Library(None, f"{spec.origin} is older than its source; {BUILD} builds it anew")
    return _Library(kernels, "")


def load() -> ctypes.CDLL | None:
    """Return the library of kernels, None where there is none."""
    return _library().kernels


def why_not() -> str:
    """Say why there are no kernels, or return an empty text where there are."""
    return _library().fault


@functools.cache
def _keep_freed_memory() -> None:
    """Let the process keep the memory of freed maps instead of giving it back to the system.

    glibc maps every block above a threshold afresh, and each of its pages then costs a fault. The
    threshold follows the largest block freed so far, up to 32 MiB. Elsewhere this does nothing.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode derivatives are in use.

    Declared operators raise under the first, and have no derivative under the second: it would be
    zero without a word.
    """
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


def is_eager(device_type: str) -> bool:
    """Return whether kernels may be called: nothing compiles, exports, traces or transforms.

    Compilers and exporters get PyTorch's own operators, which they know, and so do autocast and
    torch.func.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(device_type)
        or torch.jit.is_tracing()
        or is_transformed()
    )


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor is dense memory of this dtype, not empty and not of a subclass."""
    return (
        tensor.dtype == dtype
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.numel() > 0
    )


def can_run(*tensors: Tensor | None) -> bool:
    """Return whether kernels can compute with all of these: eager float32 on a CPU, not empty.

    Nothing of this is remembered: a tensor's data may be replaced.
    """
    if not is_eager("cpu") or load() is None:
        return False
    for each in tensors:
        if each is not None and not (each.device.type == "cpu" and is_plain(each, torch.float32)):
            return False
    _keep_freed_memory()
    return True


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """Return what runs a function in the threads that PyTorch's own operators use.

    Threads beside those would share the processor with them: for some milliseconds after each of
    PyTorch's operators, OpenMP's threads wait for the next one without rest.
    """
    run = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if run is not None:
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
    return run


@functools.cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="dlgsanet-cpu")


# A forked process has the record of the threads but not the threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def _in_threads(work: Callable[[], None], count: int) -> None:
    """Call `work` in `count` threads, for a PyTorch whose OpenMP cannot be asked."""
    futures = [_helpers(count - 1).submit(work) for _ in range(count - 1)]
    try:
        work()
    finally:
        wait(futures)


def _numbers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _address(kernel: str, each: Tensor | ctypes.Array | None) -> int | None:
    if not isinstance(each, Tensor):
        return each if each is None else ctypes.addressof(each)
    if not each.is_cpu or each.dtype != torch.float32:
        raise TypeError(f"{kernel} computes in float32 on a CPU; got {each.dtype}, {each.device}")
    return each.data_ptr()


def run(name: str, tensors: Sequence[Tensor | Sequence[int] | None], sizes: Sequence[int]) -> None:
    """Call a kernel in as many threads as PyTorch uses.

    Args:
        name: Of the kernel in the C sources.
        tensors: Its tensors in order, contiguous and on the CPU; lists of whole numbers among
            them, and None for what is left out.
        sizes: Its sizes in order.

    Raises:
        TypeError: For a tensor of another dtype or device.
        MemoryError: If a thread found no memory for its rows.
    """
    library = load()
    kept = [_numbers(each) if isinstance(each, list) else each for each in tensors]
    pointers = (ctypes.c_void_p * len(tensors))(*(_address(name, each) for each in kept))
    numbers = _numbers(sizes)
    call = _Call(
        *(ctypes.cast(each, ctypes.c_void_p) for each in (library[name], pointers, numbers))
    )
    # An interrupt may end the wait for a thread, but not the thread: what it reads must stay.
    call.kept = (kept, pointers, numbers)
    threads, openmp = torch.get_num_threads(), _openmp()
    if threads == 1:
        library.work(ctypes.byref(call))
    elif openmp is not None:
        openmp(library.work, ctypes.byref(call), threads, 0)
    else:
        _in_threads(lambda: library.work(ctypes.byref(call)), threads)
    if call.failed:
        raise MemoryError(f"no memory for what a thread of {name} keeps")
