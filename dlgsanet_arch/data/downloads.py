"""Files fetched from a server, over as many connections and runs as it takes.

What is whole has its own name and what is not has another: a download grows in ``<target>.part``
and is renamed when nothing is missing. Running the same command again goes on where it ended.
"""

import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

import requests

from dlgsanet_arch.data.progress import progress_bar
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_space, disk_faults_named, lock_file

# urllib3 drops the piece in which a connection breaks: small pieces, small loss.
RECEIVED = 2**13
# Seconds until a connection must stand, and until the next bytes must come.
TIMEOUT = (15, 60)
# Seconds to wait before each further try without progress. A router that dials in anew takes a
# minute or two.
PAUSES = (1, 2, 5, 10, 20, 40, 60)
# Faults of a server that may pass: time-out, too many requests, and its own (500 and above).
PASSING = (408, 429)


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
        check_space(part.path.parent, part.length - part.size, f"the rest of {url}")
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
    with disk_faults_named(f"{url} cannot be written to {path}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            lock_file(file, path)
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
