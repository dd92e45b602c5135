"""Images unpacked from zip and tar archives that may be damaged or hostile."""

import errno
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dlgsanet_arch.data.finding import SUFFIXES
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_space, disk_faults_named, lock_file, unfinished
from dlgsanet_arch.progress import progress_bar

# Photographs in PNG or JPEG do not compress further: an archive that expands by more than this
# factor is made to fill the disk.
MAX_GROWTH = 100

Archive = zipfile.ZipFile | tarfile.TarFile
Info = zipfile.ZipInfo | tarfile.TarInfo


def _files(archive: Archive) -> Iterator[tuple[Info, str, int]]:
    """Yield all ordinary files, their names and the sizes that the archive claims."""
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the archive was not made on Unix
            if kind in (0, stat.S_IFREG) and not info.is_dir():
                yield info, info.filename, info.file_size
        return
    yield from ((info, info.name, info.size) for info in archive if info.isfile())
    # A damaged header ends the loop, too. The true end is a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end is missing")


def _images(path: Path, archive: Archive) -> Iterator[tuple[Info, PurePosixPath, int]]:
    """Yield the images, their paths and sizes, without hidden files and macOS's ``__MACOSX``."""
    left = MAX_GROWTH * path.stat().st_size
    for info, name, size in _files(archive):
        image = PurePosixPath(name)
        if image.is_absolute() or ".." in image.parts or re.search(r"^[A-Za-z]:|\\", name):
            raise UserError(f"{path} is refused: its member {name!r} leads out of the folder")
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in image.parts)
        if hidden or image.suffix.lower() not in SUFFIXES:
            continue
        if not 0 <= size <= left:
            raise UserError(f"{path} is refused: its member {name!r} expands the archive too far")
        left -= size
        yield info, image, size


def _unpack(path: Path, file: BinaryIO, folder: Path) -> None:
    is_zip = file.read(2) == b"PK"
    file.seek(0)
    with zipfile.ZipFile(file) if is_zip else tarfile.open(fileobj=file, mode="r:") as archive:
        images = list(_images(path, archive))  # all are checked before one is written
        if not images:
            raise UserError(f"{path} holds no images: looked for {', '.join(SUFFIXES)}")
        folder.mkdir(parents=True)
        total = sum(size for *_, size in images)
        check_space(folder, total, f"the content of {path}")
        with progress_bar(path.name, total, "B") as bar:
            for info, image, size in images:
                target = folder / image
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.open(info) if is_zip else archive.extractfile(info)
                with content, target.open("xb") as out:  # names occur once
                    shutil.copyfileobj(content, out)
                bar.update(size)


def extract(archive: Path, folder: Path) -> None:
    """Unpack the images of a zip or tar archive, all or none, unless the folder holds some.

    Links, devices and other files are skipped. Leading folders that all images share are left out:
    ``DIV2K_train_HR/0001.png`` becomes ``<folder>/0001.png``.
    UserError if the archive is missing, damaged, hostile or holds no images, the disk is full, or
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
                    f"{archive} cannot be unpacked ({error}): it is damaged or not a zip or tar "
                    "archive; delete it, and the same command downloads it again"
                ) from error
            finally:
                shutil.rmtree(growing, ignore_errors=True)
