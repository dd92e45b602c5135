"""Files downloaded over as many connections and runs as it takes."""

import hashlib
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import requests
import urllib3

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import check_space, disk_faults_named, lock_file, read_json, write_json
from dlgsanet_arch.progress import progress_bar

# urllib3 drops the chunk in which a connection is reset or too slow, so chunks are small.
CHUNK = 2**13
# Seconds until a connection must be made, and until the next bytes must arrive.
TIMEOUT = (15, 60)
# Seconds to wait before each retry; bytes that arrive start the sequence again.
PAUSES = (1, 2, 5, 10, 20, 40, 60)

# What requests raises, and what passes through it where a server redirects to nonsense.
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, ValueError)


def _validator(headers: Mapping[str, str]) -> str | None:
    """The version of a file as If-Range takes it: a strong ETag, or else the date."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _begin(url: str, response: requests.Response, file: BinaryIO, record: Path) -> int:
    """Empty the file, record its version on the server and return its length."""
    headers = response.headers
    length = headers.get("Content-Length", "")
    if not re.fullmatch("[0-9]{1,15}", length) or "Content-Encoding" in headers:
        raise requests.RequestException("the server does not state how long the file is")
    if headers.get("Content-Type", "").startswith("text/html"):
        raise requests.RequestException("the server sends a web page instead of the file")
    # First, so that no bytes are ever under the record of another version.
    file.truncate(file.seek(0))
    write_json(record, {"url": url, "length": int(length), "validator": _validator(headers)})
    return int(length)


def _fetch(session: requests.Session, url: str, file: BinaryIO, record: Path, name: str) -> None:
    """Request what a file lacks over one connection; NETWORK_ERRORS if it breaks."""
    size, known = file.seek(0, os.SEEK_END), read_json(record) or {}
    length, validator = known.get("length"), known.get("validator")
    resumes = size > 0 and known.get("url") == url and isinstance(length, int)
    if resumes and size == length:
        return
    headers = {"Accept-Encoding": "identity", "Connection": "close"}
    if resumes and isinstance(validator, str):
        headers |= {"Range": f"bytes={size}-", "If-Range": validator}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (206, 416) and "Range" in headers:
            # servers that ignore If-Range send a part of another version
            same = _validator(response.headers) in (None, validator)
            rest = f"bytes {size}-{length - 1}/{length}"
            if not same or response.headers.get("Content-Range") != rest:
                file.truncate(file.seek(0))
                _fetch(session, url, file, record, name)
                return
        elif response.status_code == 200:
            size, length = 0, _begin(url, response, file, record)
        else:
            raise requests.HTTPError(f"the server answers {response.status_code} {response.reason}")
        check_space(record.parent, length - size, f"the rest of {url}")
        raw, more = response.raw, b""
        raw.enforce_content_length = False  # it is compared below
        body = getattr(raw, "_fp", None)  # of http.client, which ends at Content-Length
        if getattr(body, "will_close", False) and body.length:
            body.length += 1  # then there must be the connection's end
        with progress_bar(name, length, "B", done=size) as bar:
            while chunk := raw.read(min(CHUNK, length - file.tell())):
                file.write(chunk)
                bar.update(len(chunk))
        with suppress(urllib3.exceptions.HTTPError):
            more = raw.read(1)
    if file.tell() < length:
        raise requests.ConnectionError(f"{file.tell():,} of {length:,} bytes were received")
    if more:
        file.truncate(file.seek(0))
        raise requests.RequestException(f"the server sends more than its {length:,} bytes")


def _reason(error: BaseException) -> str:
    """The kind of an error and its first cause, which requests and urllib3 bury in their texts."""
    kind = type(error).__name__
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{kind}: {error}"


def _fetch_all(url: str, file: BinaryIO, record: Path, target: Path) -> None:
    """Fetch until the file is complete or no retry brings more of it."""
    most, pauses = file.tell(), iter(())
    with requests.Session() as session:
        while True:
            try:
                return _fetch(session, url, file, record, target.name)
            except NETWORK_ERRORS as error:
                reason = _reason(error)
                if file.tell() > most:
                    most, pauses = file.tell(), iter(PAUSES)
                pause = next(pauses, None)
                if pause is None:
                    raise UserError(
                        f"{url} cannot be downloaded: {reason}. Run the same command again to "
                        f"resume, or download it by hand and put it at {target}"
                    ) from error
            print(f"{target.name}: {reason}; next try in {pause} s", file=sys.stderr)
            time.sleep(pause)


def _check_hash(path: Path, sha256: str, url: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        path.unlink()
        raise UserError(
            f"{url} is not the published file: its SHA-256 is {digest.hexdigest()}, not {sha256}. "
            f"{path} was deleted"
        )


def download(url: str, target: Path, sha256: str | None = None) -> None:
    """Download a file, or the rest of it, unless it is there already.

    Bytes are collected in ``<target>.part``, and ``<target>.part.json`` records the file's version
    on the server. A file that changed there starts again, as does one whose server has no ranges.
    UserError if the network or the server fails, the SHA-256 differs, the disk is full, or another
    process is downloading to the same place.
    """
    if target.is_file():
        return
    part = target.with_name(f"{target.name}.part")
    record = part.with_name(f"{part.name}.json")
    with disk_faults_named(f"{url} cannot be written to {part}"):
        if target.is_dir():
            raise IsADirectoryError(None, "there is a folder of this name", str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            lock_file(file, part)
            _fetch_all(url, file, record, target)
            file.flush()
            os.fsync(file.fileno())
            if sha256:
                _check_hash(part, sha256, url)
            os.replace(part, target)
            record.unlink(missing_ok=True)
