import hashlib
import os
import random
import shutil
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from http_server import Served, proxies, serving
from processes import started

from dlgsanet_arch.data import downloads
from dlgsanet_arch.data.downloads import download
from dlgsanet_arch.errors import UserError

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
# Connections break after whole chunks: urllib3 2 drops one that is cut, urllib3 1 keeps it.
CHUNK = downloads.CHUNK
BROKEN = 12 * CHUNK
DATE = "Wed, 21 Oct 2020 07:28:00 GMT"
WEAK = {"ETag": 'W/"1"'}


@pytest.fixture
def server(monkeypatch):
    for name in proxies():
        monkeypatch.delenv(name)
    monkeypatch.setattr(downloads, "PAUSES", (0, 0, 0))
    with serving(CONTENT) as served:
        yield served


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "set.zip"


def part_of(target: Path) -> Path:
    return target.with_name("set.zip.part")


def refused(url: str, target: Path, reason: str, *arguments: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        download(url, target, *arguments)
    assert not target.exists()
    assert url in str(caught.value)


def broken_at(server: Served, target: Path, size: int = BROKEN) -> None:
    """Leave `size` bytes: the connection breaks there, and so do all retries."""
    server.cuts = [size, 0, 0, 0]
    refused(server.url, target, f"Run the same command again to resume, or .* put it at {target}")
    assert part_of(target).read_bytes() == server.content[:size]
    server.requests.clear()


def test_a_file_arrives_complete_and_alone_and_is_not_requested_again(server, target):
    for _ in range(2):
        download(server.url, target)
        assert target.read_bytes() == CONTENT
        assert [path.name for path in target.parent.iterdir()] == ["set.zip"]
    (request,) = server.requests
    assert request["Accept-Encoding"] == "identity"
    assert "Range" not in request


@pytest.mark.parametrize(
    ("headers", "validator"),
    [({"ETag": '"1"'}, '"1"'), ({**WEAK, "Last-Modified": DATE}, DATE)],
)
def test_the_next_run_resumes(server, target, headers, validator, monkeypatch):
    server.headers = headers
    broken_at(server, target)
    # the rest is all that needs space
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000 - BROKEN))
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    (request,) = server.requests
    assert (request["Range"], request["If-Range"]) == (f"bytes={BROKEN}-", validator)
    assert [path.name for path in target.parent.iterdir()] == ["set.zip"]


# What happens between two runs, after which the file starts again: changes of the server, of the
# address, or of the record beside the file.
CHANGES = {
    "changed": {"content": OTHER, "headers": {"ETag": '"2"'}},
    "ignored If-Range": {"content": OTHER, "headers": {"ETag": '"2"'}, "if_range": False},
    "ignored If-Range, other length": {"content": OTHER[:150_000], "if_range": False},
    "range refused": {"content": CONTENT[:BROKEN], "if_range": False},
    "no ranges": {"ranges": False},
    "other address": {"content": OTHER, "url": "?mirror"},
    "empty record": {"record": ""},
    "record of something else": {"record": "{}"},
    "record that is not one": {"record": '{"url": 1, "length": "x", "validator": 5}'},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_resumed_starts_again(server, target, change):
    broken_at(server, target)
    changes = dict(CHANGES[change])
    url = server.url + changes.pop("url", "")
    if "record" in changes:
        target.with_name("set.zip.part.json").write_text(changes.pop("record"))
        part_of(target).write_bytes(bytes(BROKEN))
    for name, value in changes.items():
        setattr(server, name, value)
    download(url, target)
    assert target.read_bytes() == server.content


@pytest.mark.parametrize("headers", [{}, WEAK])
def test_without_a_strong_validator_nothing_is_resumed(server, target, headers):
    server.headers, server.cuts = headers, [BROKEN]
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert not any("Range" in request for request in server.requests)


def test_a_broken_connection_is_resumed_in_the_same_run(server, target):
    # More breaks than PAUSES: each brings something, so none counts towards giving up.
    server.cuts = [CHUNK * chunks for chunks in (1, 9, 0, 2, 0, 0, 3, 0, 1)]
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    starts = [request.get("Range", "bytes=0-") for request in server.requests]
    sizes = [CHUNK * chunks for chunks in (0, 1, 10, 10, 12, 12, 12, 15, 15, 16)]
    assert starts == [f"bytes={size}-" for size in sizes]


def test_retries_wait_longer_and_longer_and_follow_progress_only(server, target, monkeypatch):
    server.status = 503
    refused(server.url, target, "the server answers 503 Service Unavailable")
    assert len(server.requests) == 1
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        server.status = 503 if len(slept) < 3 else 200
        server.content, server.headers = OTHER, {"ETag": '"2"'}  # must not be mixed

    monkeypatch.setattr(downloads, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(downloads, "PAUSES", (7, 8, 9))
    server.status, server.cuts = 200, [CHUNK]
    download(server.url, target)
    assert target.read_bytes() == OTHER
    assert slept == [7, 8, 9]


def test_a_run_killed_before_the_renaming_is_finished_without_a_request(
    server, target, monkeypatch
):
    replace = os.replace

    def killed(source, place):
        if place == target:
            raise KeyboardInterrupt
        replace(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(downloads.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            download(server.url, target)
    server.requests.clear()
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert server.requests == []


# What the server does, and what is said of it.
UNKNOWN_LENGTH = "does not state how long the file is"
FAULTS = [
    ({"longer": 1}, "300,000 of 300,001 bytes"),
    ({"longer": -1}, "sends more than its 299,999 bytes"),
    ({"longer": None, "headers": {"Content-Length": "9" * 5000}}, UNKNOWN_LENGTH),
    ({"longer": None}, UNKNOWN_LENGTH),
    ({"headers": {"Content-Encoding": "gzip"}}, UNKNOWN_LENGTH),
    ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "a web page"),
    ({"status": 404}, "the server answers 404 Not Found"),
    ({"status": 204}, "the server answers 204 No Content"),
    ({"status": 302, "headers": {"Location": "file:///etc/hosts"}}, "InvalidSchema"),
]


@pytest.mark.parametrize(("changes", "reason"), FAULTS)
def test_faults_of_the_server_are_named(server, target, changes, reason):
    for name, value in changes.items():
        setattr(server, name, value)
    refused(server.url, target, reason)


def test_faults_of_the_network_are_named(server, target, monkeypatch):
    for url in ("file:///etc/hosts", "set.zip", "http://[::1"):
        refused(url, target, "cannot be downloaded: (Invalid|Missing)")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}/set.zip"
        refused(nowhere, target, r"ConnectionError: \[Errno \d+\] Connection refused\. Run")
    monkeypatch.setattr(downloads, "TIMEOUT", (1, 0.05))
    server.gate = threading.Event()
    refused(server.url, target, "timed out")
    server.gate.set()


def test_a_known_hash_is_checked(server, target):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    server.content = OTHER
    refused(server.url, target, f"not the published file: its SHA-256 is .*, not {sha256}", sha256)
    assert not part_of(target).exists()
    server.content = CONTENT
    download(server.url, target, sha256)
    assert target.read_bytes() == CONTENT


def test_a_place_that_cannot_be_written_is_named(server, target, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=299_999))
        refused(server.url, target, r"needs 300,000 bytes .* has 299,999 bytes free")
    assert part_of(target).stat().st_size == 0  # before anything is received
    (tmp_path / "file").write_text("a file where a folder should be")
    refused(server.url, tmp_path / "file" / "set.zip", r"cannot be written to .*\.part: .*file")
    with pytest.raises(UserError, match="there is a folder of this name"):
        download(server.url, tmp_path)
    assert len(server.requests) == 1


def test_the_environment_s_proxy_is_used(server, target, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/set.zip"))
    download("http://nowhere.invalid/set.zip", target)
    assert target.read_bytes() == CONTENT
    assert [request["target"] for request in server.requests] == ["http://nowhere.invalid/set.zip"]


def download_directly(url: str, target: Path) -> None:
    """Download in a process whose environment may name proxies."""
    for name in proxies():
        del os.environ[name]
    download(url, target)


def test_kill_9_loses_nothing_that_was_received(server, target):
    server.gate = threading.Event()
    with started(download_directly, server.url, target) as process:
        deadline = time.monotonic() + 60
        while not part_of(target).exists() or part_of(target).stat().st_size < BROKEN:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # While it lives, nobody else writes to the same place.
        with pytest.raises(UserError, match=r"another process is at work on .*set\.zip\.part"):
            download(server.url, target)
        assert len(server.requests) == 1
    server.gate.set()
    server.gate = None
    received = part_of(target).read_bytes()
    assert received == CONTENT[: len(received)]
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == f"bytes={len(received)}-"
