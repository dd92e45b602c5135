"""Archives of pictures: fetched from a server and unpacked, both so that they can be interrupted.

What is whole has its own name and what is not has another: a download grows in
``<target>.part``, an archive is unpacked in ``<folder>.unfinished``, and each is renamed when
nothing is missing. Running the same command again goes on where the last run ended.
"""

import errno
import json
import os
import posixpath
import re
import shutil
import socket
import ssl
import stat
import struct
import sys
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

import requests
from tqdm import tqdm

from dlgsanet_arch.data.pictures import MAX_BYTES, SUFFIXES
from dlgsanet_arch.data.progress import progress_bar
from dlgsanet_arch.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

CHUNK = 2**16
# urllib3 drops the piece in which a connection breaks: small pieces, small loss.
RECEIVED = 2**13
# Seconds until a connection must stand, and until the next bytes must come.
TIMEOUT = (15, 60)
# Seconds to wait before each further try without progress. A router that dials in anew takes a
# minute or two.
PAUSES = (1, 2, 5, 10, 20, 40, 60)
# Faults of a server that may pass: time-out, too many requests, and its own (500 and above).
PASSING = (408, 429)

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


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes off a file until it is closed; the kernel does so when we are killed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process is at work on {path}: wait until it ends, then run this again"
        ) from error
    except OSError:
        return  # some network file systems have no locks; most runs are alone


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed:,} bytes and the disk of {folder} has {free:,} bytes free: "
            "free some space, then run the same command again"
        )


@contextmanager
def _disk_faults_named(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{what}: the disk is full; free some space and run the same command again, "
                "which goes on where this one stopped"
            ) from error
        place = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{what}: {place}{error.strerror or error}") from error


class _Fault(Exception):
    """Why nothing more came from a server, in plain words.

    Args:
        cause: A clause.
        passing: Whether asking again later may help.
    """

    def __init__(self, cause: str, *, passing: bool) -> None:
        super().__init__(cause)
        self.passing = passing


class _Part:
    """The beginning of a file on a server, and beside it a record of what file that is.

    Args:
        file: `path`, open for appending.
        path: Where the bytes go.
        url: Where they come from. What another address sent is thrown away.
    """

    def __init__(self, file: BinaryIO, path: Path, url: str) -> None:
        self._file = file
        self._record = path.with_name(f"{path.name}.json")
        self._url = url
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.length = 0
        self._version: dict[str, str] = {}
        self._read_record()

    def _read_record(self) -> None:
        try:
            record = json.loads(self._record.read_text())
            if record["url"] == self._url and self.size <= record["length"]:
                self.length, self._version = record["length"], record["version"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no record, or one that was cut: the bytes could be any file's
        if not self.resumable and not self.complete:
            self.clear()

    @property
    def complete(self) -> bool:
        return 0 < self.length == self.size

    @property
    def validator(self) -> str | None:
        """What If-Range takes: a strong ETag, or else the date."""
        etag = self._version.get("ETag", "W/")
        return self._version.get("Last-Modified") if etag.startswith("W/") else etag

    @property
    def resumable(self) -> bool:
        return self.validator is not None

    def clear(self) -> None:
        # The record goes first and comes last: bytes are never under another file's record.
        self._record.unlink(missing_ok=True)
        self._file.truncate(0)
        self.size, self.length, self._version = 0, 0, {}

    def begin(self, length: int, headers: Mapping[str, str]) -> None:
        self.clear()
        self.length = length
        self._version = {
            name: headers[name] for name in ("ETag", "Last-Modified") if name in headers
        }
        record = {"url": self._url, "length": length, "version": self._version}
        self._record.write_text(json.dumps(record))

    def continued_by(self, headers: Mapping[str, str]) -> bool:
        """Whether a 206 answer goes on here, and in the same version: some ignore If-Range."""
        expected = f"bytes {self.size}-{self.length - 1}/{self.length}"
        same = all(headers.get(name, value) == value for name, value in self._version.items())
        return same and headers.get("Content-Range") == expected

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.size += len(chunk)

    def finish(self, target: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.path, target)
        self._record.unlink(missing_ok=True)

    def __str__(self) -> str:
        if not self.size:
            return "nothing was received"
        there = f"{self.size:,} of {self.length:,} bytes are in {self.path}"
        if self.resumable:
            return f"{there}, and the same command goes on from there"
        return f"{there}, but the server has no way to go on from there"


def _in_words(error: BaseException) -> str:
    """The cause of a failed request; those that requests and urllib3 write name their classes."""
    causes = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if among(requests.exceptions.ProxyError):
        return "the proxy that the environment names (http_proxy, https_proxy) does not pass it on"
    if among(socket.gaierror):
        return "the server's name is not found: there is no network, no name service, or a typo"
    if among(ConnectionRefusedError):
        return "the server refuses connections"
    if among(ssl.SSLCertVerificationError):
        return "the server's certificate is not trusted"
    if among(requests.Timeout, TimeoutError):
        return "the server does not answer"
    if isinstance(error, ValueError):
        return f"the address cannot be used: {error}"
    system = next((cause.strerror for cause in causes if getattr(cause, "strerror", None)), None)
    return f"the connection broke ({system})" if system else "the connection broke"


def _status_in_words(status: int) -> str:
    with suppress(ValueError):
        return f"the server answers {status} ({HTTPStatus(status).phrase})"
    return f"the server answers {status}"


def _begin(part: _Part, headers: Mapping[str, str]) -> None:
    """Make room for the whole file that a server is about to send."""
    if headers.get("Content-Type", "").startswith("text/html"):
        raise _Fault("the server sends a web page instead of the file", passing=False)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise _Fault("the server sends it recoded, though asked not to", passing=False)
    length = headers.get("Content-Length", "")
    if not length.isdecimal() or int(length) == 0:
        raise _Fault("the server sends nothing, or does not say how much", passing=False)
    part.begin(int(length), headers)


def _ask(session: requests.Session, url: str, part: _Part) -> requests.Response:
    """Ask for what the part lacks; it is emptied where the server sends another file or all."""
    headers = {"Accept-Encoding": "identity"}
    if part.size and part.validator:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.validator}
    response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    status = response.status_code
    if status == 200:
        _begin(part, response.headers)
    elif "Range" not in headers or status not in (206, 416):
        raise _Fault(_status_in_words(status), passing=status in PASSING or status >= 500)
    elif status == 416 or not part.continued_by(response.headers):
        response.close()
        part.clear()
        return _ask(session, url, part)
    return response


def _fetch(session: requests.Session, url: str, part: _Part, name: str) -> None:
    """Fetch what the part lacks over one connection."""
    with _ask(session, url, part) as response:
        _check_space(part.path.parent, part.length - part.size, f"the rest of {url}")
        with progress_bar(name, part.length, "B") as bar:
            # Unlike an update, this leaves what was there before out of the speed.
            bar.initial = bar.n = part.size
            bar.refresh()
            for chunk in response.iter_content(RECEIVED):
                part.write(chunk)
                bar.update(len(chunk))
    if part.size > part.length:
        part.clear()
        raise _Fault("the server sent more than it had announced", passing=True)
    if part.size < part.length:
        raise _Fault("the connection broke", passing=True)


def _fetch_all(url: str, part: _Part, target: Path) -> None:
    """Fetch what the part lacks, over as many connections as it takes.

    A fault before the first new bytes is told at once. Later ones are waited out, until none of
    `PAUSES` brought new bytes.
    """
    most, pauses = part.size, iter(())
    with requests.Session() as session:
        while not part.complete:
            try:
                _fetch(session, url, part, target.name)
                continue
            except requests.RequestException as error:
                fault = _Fault(_in_words(error), passing=not isinstance(error, ValueError))
            except _Fault as error:
                fault = error
            if part.size > most:
                most, pauses = part.size, iter(PAUSES)
            pause = next(pauses, None)
            if pause is None or not fault.passing:
                raise UserError(
                    f"{url} cannot be downloaded: {fault}; {part}. "
                    f"Run the same command again, or download it elsewhere and put it at {target}"
                ) from fault
            print(f"{target.name}: {fault}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def download(url: str, target: Path) -> Path:
    """Fetch a file, or the rest of it, or find that it is there already.

    Bytes go to ``<target>.part``, with a record beside it of the server's name for this version
    of the file (ETag or Last-Modified). The next run goes on where the last one ended; a file
    that changed in between, or a server that cannot go on, is fetched from the start. Proxies
    are those of the environment.

    Args:
        url: Begins with ``http://`` or ``https://``.
        target: Where the file goes; one that exists is not looked at.

    Returns:
        `target`.

    Raises:
        UserError: The address is of another kind, the network or the server fails, the disk is
            too small, or another process is downloading to the same place.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(
            f"{url} cannot be downloaded: the address must begin with http:// or https://"
        )
    if target.is_dir():
        raise UserError(f"{target} is a folder where a file should go: move it away")
    if target.exists():
        return target
    path = target.with_name(f"{target.name}.part")
    with _disk_faults_named(f"{url} cannot be written to {path}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            _lock(file, path)
            # Between opening and locking, the process that held the lock may have finished.
            if target.exists():
                return target
            if not os.fstat(file.fileno()).st_nlink:
                raise UserError(f"another process gave up on {path} just now: run this again")
            part = _Part(file, path, url)
            try:
                _fetch_all(url, part, target)
                part.finish(target)
            finally:
                if not part.size:
                    part.clear()
                    path.unlink(missing_ok=True)
    return target


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


def _begin_unfinished(unfinished: Path, version: str) -> Path:
    """Keep what the same archive left in the folder, or empty it; returns its record."""
    record = unfinished / ".archive"
    if not record.is_file() or record.read_text() != version:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
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
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with _disk_faults_named(f"{archive} cannot be unpacked to {unfinished}"):
        if _is_finished(folder):
            return
        with archive.open("rb") as file:
            _lock(file, archive)
            if _is_finished(folder):  # by the process that held the lock
                return
            plan = _plan(archive, file)
            status = os.fstat(file.fileno())
            record = _begin_unfinished(unfinished, f"{status.st_size} {status.st_mtime_ns}")
            missing = {
                path: member
                for path, member in plan.items()
                if not _is_whole(unfinished / path, member.size)
            }
            needed = sum(member.size for member in missing.values())
            _check_space(unfinished, needed, f"what {archive} holds")
            total = sum(member.size for member in plan.values())
            with progress_bar(archive.name, total, "B") as bar:
                bar.initial = bar.n = total - needed
                bar.refresh()
                for path, member in missing.items():
                    with _damage_named(archive, f"its member {member.name!r}"):
                        _write_member(member, unfinished / path, bar)
            os.replace(unfinished, folder)
            (folder / record.name).unlink()
