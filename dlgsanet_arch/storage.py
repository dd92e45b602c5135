"""Tensors in files: `.pth` as torch.save writes it, and `.safetensors`, complete or refused."""

import errno
import io
import pickletools
import re
import time
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, write_atomically, written_atomically

_ZIP_MAGIC = b"PK\x03\x04"  # what torch.save writes is a zip file
_GET_ANOTHER = "get it again, or use an earlier checkpoint"
_PICKLES = 5  # of a file in PyTorch's old format
# What a pickle may have at most.
_MOST = {"values in a tuple": 1_000_000, "integers of over 64 bits": 1000}

# Network file systems fail for a moment now and then.
_ATTEMPTS = 3
_SECONDS_BETWEEN = 1.0


class CheckpointError(UserError):
    """A file of weights that cannot be used; the message says why and what would help."""


def _read(path: Path) -> tuple[bytes, int]:
    """Read a file of torch.save's, and compare it with the checksums that it holds.

    Returns its bytes and a checksum of its content, 0 for PyTorch's old format, which has none.
    """
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} cannot be read: it does not exist, or is not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the weights {path} cannot be read: {error.strerror}") from error
    if not data:
        raise CheckpointError(f"{path} is empty: writing it was cut off; use an earlier checkpoint")
    if not data.startswith(_ZIP_MAGIC):
        _check_pickle(path, data)
        return data, 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} is compressed, as torch.save never does")
            # PyTorch reads an entry that is marked as a folder as one without content.
            folders = [entry.filename for entry in entries if entry.external_attr & 0x10]
            damaged = folders[0] if folders else archive.testzip()
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            _check_pickle(path, b"".join(map(archive.read, pickles[:1])))
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); {_GET_ANOTHER}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged at its record {damaged}; {_GET_ANOTHER}")
    return data, zlib.crc32(repr([(entry.filename, entry.CRC) for entry in entries]).encode())


def _check_pickle(path: Path, start: bytes) -> None:
    """Refuse what a small pickle makes large or slow, and no weights need.

    These are bytes by their number, text by an encoding of quadratic time, tuples of tuples, which
    as keys take as long to hash as if they were written out, and long integers, which as keys can
    all have one hash.
    """
    if b"\nbytearray\n" in start:
        raise CheckpointError(f"{path} holds a bytearray, which no weights need; it is refused")
    if b"\nencode\n" in start and re.search(b"punycode|idna", start, re.IGNORECASE):
        raise CheckpointError(f"{path} holds encoded text, which no weights need; it is refused")
    file, found = io.BytesIO(start), dict.fromkeys(_MOST, 0)
    with suppress(ValueError, IndexError):  # damage, which torch.load names
        for _ in range(_PICKLES):
            _measure(file, found)
    for what, most in _MOST.items():
        if found[what] > most:
            raise CheckpointError(
                f"{path} holds more than {most:,} {what}, which no weights need; it is refused"
            )


def _measure(file: IO[bytes], found: dict[str, int]) -> None:
    """Count in a pickle what `_MOST` bounds: a tuple's values as if they were written out."""
    stack = []
    memo: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(file):
        if isinstance(argument, int) and argument.bit_length() > 64:
            found["integers of over 64 bits"] += 1
        if "GET" in code.name:
            stack.append(memo.get(argument, 1))
        elif "PUT" in code.name:
            memo[argument] = stack[-1]
        elif code.name == "MARK":
            stack.append(0)
        else:
            at = len(stack) - len(code.stack_before)
            if pickletools.markobject in code.stack_before:
                at = len(stack) - 1
                while stack[at]:
                    at -= 1
                at -= code.stack_before.index(pickletools.markobject)
            size = 1 + (sum(stack[at:]) if "TUPLE" in code.name else 0)
            stack[at:] = [size] * len(code.stack_after)
            found["values in a tuple"] = max(found["values in a tuple"], size)


def check_complete(path: Path) -> int:
    """Read a complete file; return its checksum, or raise a CheckpointError if it is damaged."""
    return _read(path)[1]


def save_complete(content: Any, path: Path) -> int:
    """Save as torch.save does, so that after a crash the file is the old one or the new one.

    It is written under a temporary name, flushed to the disk, read again and checked first. Returns
    the checksum that `read_complete` returns for it. If it cannot be written, which is a
    CheckpointError, the old file is as it was.
    """
    checksums: list[int] = []
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with written_atomically(
                path, lambda written: checksums.append(check_complete(written))
            ) as file:
                torch.save(content, file)
            break
        except (OSError, RuntimeError, CheckpointError) as error:
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            is_full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if is_full or attempt == _ATTEMPTS:
                reason = "the disk is full" if is_full else f"{type(cause).__name__}: {cause}"
                raise CheckpointError(
                    f"{path} cannot be written ({reason}); the file from before is untouched; "
                    "free space or fix the cause; a training run then resumes with --auto_resume"
                ) from error
            time.sleep(_SECONDS_BETWEEN)
    return checksums[-1]


def read_complete(path: Path) -> tuple[Any, int]:
    """Load a file of torch.save's on the CPU without running code that it may hold; read once.

    Returns its content, and the checksum that `save_complete` returned. A file that is missing,
    truncated or damaged, or holds more than tensors, is a CheckpointError.
    """
    data, checksum = _read(path)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), checksum
    except Exception as error:  # torch.load has a dozen ways to fail on bytes that are not its own
        text = str(error)
        if refused := re.search(r"GLOBAL ([\w.]+)", text):
            fault = (
                f"holds a Python object ({refused[1]}) beside tensors; such files can run code "
                "when loaded and are refused; save the state dict alone and use that file"
            )
        elif "TorchScript" in text:
            fault = "is a TorchScript program, not a checkpoint; use the .pth it was made from"
        elif data.startswith(_ZIP_MAGIC) or isinstance(error, EOFError) or "EOF" in text:
            fault = f"is truncated or damaged; {_GET_ANOTHER}"
        else:
            fault = (
                f"is not a checkpoint of PyTorch's ({type(error).__name__}); weights are files "
                "such as experiments/<name>/models/net_g_latest.pth"
            )
        raise CheckpointError(f"{path} {fault}") from error


def is_safetensors(path: Path) -> bool:
    """Detect the format by the content: the length of a JSON object, and the object."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"the weights {path} cannot be read: {error.strerror}") from error
    by_name = path.suffix == ".safetensors" and not start.startswith(_ZIP_MAGIC)
    return start[8:] == b"{" or by_name


def _checksum(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a checksum over everything that a .safetensors file of ours holds."""
    stated = sorted(each for each in metadata.items() if each[0] != "checksum")
    total = zlib.crc32(repr(stated).encode())
    for name, tensor in sorted(weights.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), total)
    return f"crc32:{total:08x}"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except Exception as error:  # its own, the system's, and what a dtype new to it raises
        raise CheckpointError(
            f"{path} is truncated, damaged or not a .safetensors file ({error}); get it again"
        ) from error
    # Its name or its value may be what is damaged.
    sums = [text for name, text in metadata.items() if name == "checksum" or text[:6] == "crc32:"]
    if sums and sums != [_checksum(tensors, metadata)]:
        raise CheckpointError(f"{path} is damaged: its checksum differs; {_GET_ANOTHER}")
    return tensors, metadata


def write_safetensors(weights: Mapping[str, Tensor], notes: Mapping[str, str], path: Path) -> None:
    """Write tensors with metadata and a checksum, complete or not at all."""
    from safetensors.torch import save

    metadata = {"format": "pt", **notes}
    metadata["checksum"] = _checksum(weights, metadata)
    data = save(dict(weights), metadata)
    with disk_faults_named(f"{path} cannot be written"):
        write_atomically(path, data)
