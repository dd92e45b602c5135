"""Files that are complete or absent, written by one process at a time."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dlgsanet_arch.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# Within a data set's folder: what it was made from.
RECIPE = "recipe.json"
OPEN_FILES = "too many files are open for the system's limit: raise it, as by `ulimit -n 1024`"
# Suffixes of what is not complete yet, and of what is about to be removed.
UNFINISHED = ".unfinished"
OLD = ".old"


def unfinished(path: Path) -> Path:
    """Where a file or folder is made before it gets its name."""
    return path.with_name(path.name + UNFINISHED)


@contextmanager
def written_atomically(
    path: Path, check: Callable[[Path], None] | None = None
) -> Iterator[IO[bytes]]:
    """Open a temporary file, renamed at the end: after a crash `path` is the old or the new file.

    `check` is called with the written file before that; what it raises keeps the old one.
    """
    # Of a name of its own: two processes may write one file, and the name may be a long one.
    temporary = path.with_name(f".{os.urandom(8).hex()}{UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name, too, has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_target(path: Path) -> None:
    """Raise the OSError that writing a file would end with, before the work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    with suppress(FileNotFoundError):
        path.stat()  # fails on a name that is too long
    # Folders that are absent are made where it is written.
    folder = next(filter(os.path.lexists, path.parents))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write the bytes of a file: after a crash it is the old one or the new one."""
    with written_atomically(path) as file:
        file.write(data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, None where it is absent or not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # the last: thousands of brackets
        return None
    return content if isinstance(content, dict) else None


def replace_folder(made: Path, path: Path) -> None:
    """Give a folder its name; what had the name goes, only once the new one is complete."""
    old = path.with_name(path.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(made, path)
    shutil.rmtree(old, ignore_errors=True)


def lock_file(file: IO[bytes] | int, what: Path) -> None:
    """Lock an open file, or the descriptor of a file or folder, until it is closed.

    The kernel closes it when we are killed. UserError, naming `what`, if another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process is at work on {what}: wait until it ends, then run this again"
        ) from error
    except OSError:
        return  # some network file systems have no locks; most runs are alone


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes off it; see `lock_file`."""
    folder.mkdir(parents=True, exist_ok=True)
    directory = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if directory is not None:
            lock_file(directory, folder)
        yield
    finally:
        if directory is not None:
            os.close(directory)
        with suppress(OSError):
            folder.rmdir()  # only where nothing was written


@contextmanager
def disk_faults_named(fault: str) -> Iterator[None]:
    """Turn an OSError of the block into a UserError: `fault`, such as "… cannot be written"."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{fault}: the disk is full; free some space and run the same command again, "
                "finished work is kept"
            ) from error
        if error.errno == errno.EMFILE:
            raise UserError(f"{fault}: {OPEN_FILES}") from error
        place = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{fault}: {place}{error.strerror or error}") from error


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise a UserError where the disk of a folder has fewer bytes free than something needs."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed:,} bytes and the disk of {folder} has {free:,} bytes free: "
            "free some space, then run the same command again"
        )
