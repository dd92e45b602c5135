"""Images unpacked from zip, tar and tar.gz archives that may be damaged or hostile."""

import errno
import gzip
import os
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dlgsanet_arch.data.finding import SUFFIXES
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_space, disk_faults_named, lock_file, unfinished
from dlgsanet_arch.progress import progress_bar

# Photographs in PNG or JPEG do not compress further: an archive that expands by more than this
# factor is made to fill the disk. The others keep one from filling the memory.
MAX_GROWTH = 100
MAX_MEMBERS = 100_000
MAX_HEADER = 2**20

Archive = zipfile.ZipFile | tarfile.TarFile
Info = zipfile.ZipInfo | tarfile.TarInfo


class _Gzip(gzip.GzipFile):
    def read(self, size: int | None = -1) -> bytes:
        """Read as `gzip` does, but refuse a tar header that would fill the memory."""
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError("a header is too large")
        return super().read(size)


def _open(path: Path, file: BinaryIO) -> Archive:
    start = file.read(4)
    file.seek(0)
    if start in (b"PK\x03\x04", b"PK\x05\x06"):
        return zipfile.ZipFile(file)
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"{path} cannot be unpacked safely by this Python: "
            "use Python 3.10.12, 3.11.4 or a later one, or unpack it by hand"
        )
    stream = _Gzip(fileobj=file) if start.startswith(b"\x1f\x8b") else file
    return tarfile.open(fileobj=stream, mode="r:")


def _zip_files(archive: zipfile.ZipFile) -> Iterator[tuple[Info, str, int]]:
    """Yield all ordinary files, their names and the sizes that the archive claims."""
    for info in archive.infolist():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile would decompress it without a bound on memory
            raise zipfile.BadZipFile(f"{info.filename!r} is not compressed by deflate")
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
        if kind in (0, stat.S_IFREG) and not info.is_dir():
            yield info, info.filename, info.file_size


def _tar_files(archive: tarfile.TarFile) -> Iterator[tuple[Info, str, int]]:
    for count, info in enumerate(archive):
        if count == MAX_MEMBERS:
            raise tarfile.ReadError(f"more than {MAX_MEMBERS:,} members")
        if info.isfile():
            yield info, info.name, info.size
    # A damaged header ends the loop, too. The true end is a block of zeros and gzip's checksum.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end is missing")
    while archive.fileobj.read(MAX_HEADER):
        pass


def _images(path: Path, archive: Archive) -> Iterator[tuple[Info, int]]:
    """Yield the images and their sizes; hidden files and macOS's ``__MACOSX`` are skipped."""
    left, names = MAX_GROWTH * path.stat().st_size, set()
    files = _zip_files if isinstance(archive, zipfile.ZipFile) else _tar_files
    for info, name, size in files(archive):
        image = PurePosixPath(name)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in image.parts)
        # equal where a file system ignores case or how characters are composed
        folded = unicodedata.normalize("NFC", str(image)).casefold()
        if image.is_absolute() or ".." in image.parts or re.search(r"^[A-Za-z]:|\\", name):
            fault = "leads out of the folder"
        elif hidden or image.suffix.lower() not in SUFFIXES:
            continue
        elif not 0 <= size <= left:
            fault = "expands the archive too far"
        elif folded in names:
            fault = "has the same name as another"
        else:
            left -= size
            names.add(folded)
            yield info, size
            continue
        raise UserError(f"{path} is refused: its member {name!r} {fault}")


def _unpack(path: Path, file: BinaryIO, folder: Path) -> None:
    with _open(path, file) as archive:
        images = list(_images(path, archive))  # all are checked before one is written
        if not images:
            raise UserError(f"{path} holds no images: looked for {', '.join(SUFFIXES)}")
        folder.mkdir(parents=True)
        total = sum(size for _, size in images)
        check_space(folder, total, f"the content of {path}")
        options = {"filter": "data"} if isinstance(archive, tarfile.TarFile) else {}
        with progress_bar(path.name, total, "B") as bar:
            for info, size in images:
                archive.extract(info, folder, **options)
                bar.update(size)


def extract(archive: Path, folder: Path) -> None:
    """Unpack the images of an archive, all or none.

    Links, devices and files that are not named as images are skipped. Leading folders that all
    images share are left out: ``DIV2K_train_HR/0001.png`` becomes ``<folder>/0001.png``.

    Args:
        archive: A zip, tar or tar.gz archive, recognised by its content.
        folder: Where the images go. A folder that is not empty counts as finished.

    Raises:
        UserError: The archive is missing, damaged or holds no images; an image leads out of the
            folder, expands the archive too far or has the name of another; the disk is full; or
            another process is unpacking the same archive.
    """
    growing = unfinished(folder)
    with disk_faults_named(f"{archive} cannot be unpacked to {growing}"):
        if folder.exists() and any(folder.iterdir()):
            return
        with archive.open("rb") as file:
            lock_file(file, archive)
            shutil.rmtree(growing, ignore_errors=True)
            try:
                _unpack(archive, file, growing)
                top = growing
                while len(inside := list(top.iterdir())) == 1 and inside[0].is_dir():
                    top = inside[0]
                os.replace(top, folder)
            except Exception as error:  # damage makes the libraries raise nearly anything
                on_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
                if on_disk or isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{archive} cannot be unpacked ({error}): it is damaged or not a zip, tar "
                    "or tar.gz archive; delete it, and the same command downloads it anew"
                ) from error
            finally:
                shutil.rmtree(growing, ignore_errors=True)
