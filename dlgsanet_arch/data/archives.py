"""Archives of pictures, unpacked so that it can be interrupted.

An archive is unpacked in ``<folder>.unfinished``, which is renamed when nothing is missing. Running
the same command again goes on where the last run ended.
"""

import errno
import os
import posixpath
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from tqdm import tqdm

from dlgsanet_arch.data.pictures import MAX_BYTES, SUFFIXES
from dlgsanet_arch.data.progress import progress_bar
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_space, disk_faults_named, lock_file, unfinished

CHUNK = 2**16
# Photographs in PNG or JPEG do not shrink further. An archive that claims to grow by more than
# this is made to fill the disk.
MAX_GROWTH = 100
ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
GZIP_START = b"\x1f\x8b"
# What the standard library raises on damaged archives, by what the damage hits. Besides: OSError
# without a number from gzip, and "Invalid argument" for places before the file's first byte.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class _Member:
    """An entry of an archive.

    Args:
        name: As the archive writes it.
        size: Bytes, as the archive claims.
        kind: ``file``, ``folder``, or why it is refused.
        open: Gives the content.
    """

    name: str
    size: int
    kind: str
    open: Callable[[], IO[bytes]]


def _zip_kind(info: zipfile.ZipInfo) -> str:
    # Unix keeps a file's mode in the upper half; other systems leave that zero.
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is neither a file nor a folder"
    if info.orig_filename.endswith("/"):  # its is_dir() fails on an empty name
        return "folder"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}, not by deflate"
    return "file"


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return "folder"
    if info.issym():
        return "is a symbolic link"
    if info.islnk():
        return "is a hard link"
    return "file" if info.isreg() else "is neither a file nor a folder"


def _opened(archive: Path, file: BinaryIO) -> zipfile.ZipFile | tarfile.TarFile:
    start = file.read(4)
    file.seek(0)
    if start in ZIP_STARTS:
        return zipfile.ZipFile(file)
    if start.startswith(GZIP_START):
        return tarfile.open(fileobj=file, mode="r:gz")
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError as error:
        raise UserError(
            f"{archive} is not a zip, tar or tar.gz archive: "
            "delete it and run the same command again, or download it elsewhere and put it there"
        ) from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Find the end of an archive whose members were all read.

    tarfile takes a header that it cannot read, or none, for the end. The end is a block of zeros;
    reading on to the last byte makes gzip look at its checksum.
    """
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end is missing")
    while archive.fileobj.read(CHUNK):
        pass


def _members(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            # zipfile cuts its other name for it at a zero byte.
            name = info.orig_filename
            yield _Member(name, info.file_size, _zip_kind(info), partial(archive.open, info))
    else:
        for info in archive:
            content = partial(archive.extractfile, info)
            yield _Member(info.name, info.size, _tar_kind(info), content)
        _check_end(archive)


@contextmanager
def _damage_named(archive: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and (
            error.errno not in (None, errno.EINVAL) or error.filename
        ):
            raise  # the disk's fault
        raise UserError(
            f"{archive} is damaged or cut short, at {what} ({error}): "
            "delete it and run the same command again, which downloads it anew"
        ) from error


def _fault_of_name(name: str) -> str | None:
    if name.startswith("/"):
        return "is an absolute path"
    if re.match("[A-Za-z]:", name):
        return "names a drive"
    if "\\" in name:
        return "has a backslash in its name"
    if "\0" in name:
        return "has a zero byte in its name"
    if ".." in name.split("/"):
        return "leads out of the folder"
    return None


def _is_picture(member: _Member) -> bool:
    """As `find_pictures` sees it: by suffix, not hidden; and not what macOS keeps beside one."""
    path = PurePosixPath(member.name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return member.kind == "file" and not hidden and path.suffix.lower() in SUFFIXES


def _folded(path: PurePosixPath) -> str:
    """A name as file systems see it that take upper and lower case, or two spellings, for one."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _check_names_differ(archive: Path, paths: list[PurePosixPath]) -> None:
    seen: dict[str, PurePosixPath] = {}
    for path in paths:
        other = seen.setdefault(_folded(path), path)
        if other is not path:
            raise UserError(
                f"{archive} is refused: its members {str(other)!r} and {str(path)!r} have one name"
            )
    for path in paths:
        for parent in path.parents:
            if _folded(parent) in seen:
                raise UserError(
                    f"{archive} is refused: its member {str(parent)!r} is a file and a folder"
                )


def _fault_of(member: _Member, most: int) -> str | None:
    """Why a member is refused, a clause without its subject; `most` bytes are believed."""
    if member.kind not in ("file", "folder"):
        return member.kind
    if not 0 <= member.size <= most:
        return f"claims {member.size:,} bytes, which are too many for this archive"
    if _is_picture(member) and member.size > MAX_BYTES:
        return f"claims {member.size:,} bytes; pictures have at most {MAX_BYTES:,}"
    return _fault_of_name(member.name)


def _plan(archive: Path, file: BinaryIO) -> dict[PurePosixPath, _Member]:
    """Check every member of an archive, and say which are written where, in the archive's order."""
    most = MAX_GROWTH * os.fstat(file.fileno()).st_size
    pictures: list[tuple[PurePosixPath, _Member]] = []
    with _damage_named(archive, "what names its members"):
        for member in _members(_opened(archive, file)):
            fault = _fault_of(member, most)
            if fault is not None:
                raise UserError(f"{archive} is refused: its member {member.name!r} {fault}")
            most -= member.size
            if _is_picture(member):
                pictures.append((PurePosixPath(member.name), member))
    if not pictures:
        raise UserError(f"{archive} holds no pictures: looked for {', '.join(SUFFIXES)}")
    _check_names_differ(archive, [path for path, _ in pictures])
    shared = posixpath.commonpath([str(path.parent) for path, _ in pictures])
    return {path.relative_to(shared): member for path, member in pictures}


def _begin(growing: Path, version: str) -> Path:
    """Keep what the same archive left in the folder, or empty it; returns its record."""
    record = growing / ".archive"
    if not record.is_file() or record.read_text() != version:
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        record.write_text(version)
    return record


def _write_member(member: _Member, path: Path, bar: tqdm) -> None:
    part = path.with_name(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, part.open("wb") as file:
        while chunk := source.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if part.stat().st_size != member.size:
        raise EOFError(f"{part.stat().st_size:,} of {member.size:,} bytes")
    os.replace(part, path)


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_finished(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def extract(archive: Path, folder: Path) -> None:
    """Unpack the pictures of an archive, or the rest of them, or find that they are there already.

    Every member is checked before the first is written. Leading folders that all pictures share
    are left out: ``DIV2K_train_HR/0001.png`` becomes ``<folder>/0001.png``. Members without one of
    `SUFFIXES`, hidden ones and macOS's ``__MACOSX`` are passed over. All is written to
    ``<folder>.unfinished``, which is renamed at the end; the next run keeps what it finds there.

    Args:
        archive: zip, tar or tar.gz; told by content, not by suffix.
        folder: Where the pictures go; one that exists and is not empty is left alone.

    Raises:
        UserError: The archive is missing, damaged, cut short or none, or holds no pictures; it has
            members that lead elsewhere, are links or encrypted, share a name, or claim absurd
            sizes; the disk is too small; or another process is unpacking the same archive.
    """
    growing = unfinished(folder)
    with disk_faults_named(f"{archive} cannot be unpacked to {growing}"):
        if _is_finished(folder):
            return
        with archive.open("rb") as file:
            lock_file(file, archive)
            if _is_finished(folder):  # by the process that held the lock
                return
            plan = _plan(archive, file)
            status = os.fstat(file.fileno())
            record = _begin(growing, f"{status.st_size} {status.st_mtime_ns}")
            missing = {
                path: member
                for path, member in plan.items()
                if not _is_whole(growing / path, member.size)
            }
            needed = sum(member.size for member in missing.values())
            check_space(growing, needed, f"what {archive} holds")
            total = sum(member.size for member in plan.values())
            with progress_bar(archive.name, total, "B") as bar:
                bar.initial = bar.n = total - needed
                bar.refresh()
                for path, member in missing.items():
                    with _damage_named(archive, f"its member {member.name!r}"):
                        _write_member(member, growing / path, bar)
            os.replace(growing, folder)
            (folder / record.name).unlink()
