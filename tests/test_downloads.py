import errno
import json
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

from dlgsanet_arch import files
from dlgsanet_arch.data import downloads
from dlgsanet_arch.data.downloads import download
from dlgsanet_arch.errors import UserError

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
# Connections break after whole pieces: urllib3 2 drops one that is cut, urllib3 1 keeps it.
PIECE = downloads.RECEIVED
BROKEN = 12 * PIECE
DATE = "Wed, 21 Oct 2020 07:28:00 GMT"


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


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def files_beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def refused_download(url: str, target: Path, reason: str) -> str:
    with pytest.raises(UserError, match=reason) as caught:
        download(url, target)
    assert not target.exists()
    assert url in str(caught.value)
    return str(caught.value)


def download_directly(url: str, target: Path) -> None:
    """Download in a process whose environment may name proxies."""
    for name in proxies():
        del os.environ[name]
    download(url, target)


def broken_at(server: Served, target: Path, size: int = BROKEN) -> None:
    """Leave `size` bytes: the connection breaks there, and the tries after it are refused."""
    server.cuts = [size, 0, 0, 0]
    message = refused_download(server.url, target, "the connection broke")
    assert f"{size:,} of 300,000 bytes are in {part_of(target)}" in message
    assert part_of(target).read_bytes() == server.content[:size]
    server.requests.clear()


def test_a_file_arrives_whole_and_alone(server, target):
    assert download(server.url, target) == target
    assert target.read_bytes() == CONTENT
    assert files_beside(target) == ["set.zip"]
    assert server.requests[0]["Accept-Encoding"] == "identity"
    assert "Range" not in server.requests[0]


def test_a_finished_file_is_not_fetched_again(server, target):
    target.parent.mkdir()
    target.write_bytes(b"put here by hand")
    assert download(server.url, target) == target
    assert target.read_bytes() == b"put here by hand"
    assert server.requests == []


@pytest.mark.parametrize("headers", [{"ETag": '"1"'}, {"Last-Modified": DATE}])
def test_the_next_run_goes_on_where_the_last_one_broke(server, target, headers):
    server.headers = headers
    broken_at(server, target)
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert [request["Range"] for request in server.requests] == [f"bytes={BROKEN}-"]
    assert server.requests[0]["If-Range"] in headers.values()
    assert files_beside(target) == ["set.zip"]


def test_a_broken_connection_is_taken_up_in_the_same_run(server, target):
    # More breaks than PAUSES: each brings something, so none counts towards giving up.
    server.cuts = [PIECE * pieces for pieces in (1, 9, 0, 2, 0, 0, 3, 0, 1)]
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    starts = [request.get("Range", "bytes=0-") for request in server.requests]
    sizes = [PIECE * pieces for pieces in (0, 1, 10, 10, 12, 12, 12, 15, 15, 16)]
    assert starts == [f"bytes={size}-" for size in sizes]


def test_tries_without_progress_come_to_an_end(server, target):
    server.cuts = [PIECE, *[0] * 100]
    message = refused_download(server.url, target, "the same command goes on from there")
    assert f"put it at {target}" in message
    assert len(server.requests) == 2 + 2  # the first, and one for each of the three pauses


def test_a_fault_is_waited_out_after_progress_only(server, target, monkeypatch):
    server.status = 503
    refused_download(server.url, target, "503")
    assert len(server.requests) == 1
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        server.status = 503 if len(slept) < 3 else 200

    monkeypatch.setattr(downloads, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(downloads, "PAUSES", (7, 8, 9))
    server.status, server.cuts = 200, [PIECE]
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert slept == [7, 8, 9]


def test_a_file_that_changed_on_the_server_is_fetched_anew(server, target):
    broken_at(server, target)
    server.content, server.headers = OTHER, {"ETag": '"2"'}
    download(server.url, target)
    assert target.read_bytes() == OTHER
    assert [request["If-Range"] for request in server.requests] == ['"1"']


@pytest.mark.parametrize("content", [OTHER, OTHER[:150_000], OTHER[:50_000], OTHER + CONTENT])
def test_a_changed_file_is_noticed_where_the_server_ignores_if_range(server, target, content):
    broken_at(server, target)
    server.content, server.headers, server.if_range = content, {"ETag": '"2"'}, False
    download(server.url, target)
    assert target.read_bytes() == content


def test_a_file_that_changes_between_two_connections_is_not_mixed(server, target, monkeypatch):
    def change(_):
        server.content, server.headers = OTHER, {"ETag": '"2"'}

    monkeypatch.setattr(downloads, "time", SimpleNamespace(sleep=change))
    server.cuts = [BROKEN]
    download(server.url, target)
    assert target.read_bytes() == OTHER


def test_a_server_without_ranges_starts_over(server, target):
    broken_at(server, target)
    server.ranges = False
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"1"'}])
def test_without_a_strong_name_of_the_version_nothing_is_resumed(server, target, headers):
    server.headers, server.cuts = headers, [BROKEN]
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert not any("Range" in request for request in server.requests)


def test_bytes_of_another_address_are_not_continued(server, target):
    broken_at(server, target)
    server.content = OTHER
    download(server.url + "?mirror", target)
    assert target.read_bytes() == OTHER


@pytest.mark.parametrize("record", [None, "", "{}", "[]", '{"url": 1, "length": "x"}'])
def test_bytes_without_a_record_are_not_continued(server, target, record):
    broken_at(server, target)
    path = part_of(target).with_name("set.zip.part.json")
    if record is None:
        path.unlink()
    else:
        path.write_text(record)
    part_of(target).write_bytes(bytes(BROKEN))
    download(server.url, target)
    assert target.read_bytes() == CONTENT


def test_a_run_killed_before_the_renaming_is_finished_without_a_request(
    server, target, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(downloads.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download(server.url, target)
    server.requests.clear()
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert server.requests == []


def test_a_range_that_is_refused_starts_over(server, target):
    broken_at(server, target)
    server.content, server.if_range = CONTENT[:BROKEN], False  # 416: nothing is left of it
    download(server.url, target)
    assert target.read_bytes() == CONTENT[:BROKEN]
    assert ["Range" in request for request in server.requests] == [True, False]


def test_two_downloads_to_one_place_do_not_mix(server, target):
    server.gate = threading.Event()
    first = threading.Thread(target=download, args=(server.url, target))
    first.start()
    try:
        while not server.requests:
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"another process is at work on .*set\.zip\.part"):
            download(server.url, target)
    finally:
        server.gate.set()
        first.join()
    assert target.read_bytes() == CONTENT


def test_a_download_that_another_process_finished_meanwhile_is_left(server, target, monkeypatch):
    def finished_meanwhile(_, path):
        os.replace(path, target)
        target.write_bytes(b"by the other process")

    monkeypatch.setattr(downloads, "lock_file", finished_meanwhile)
    download(server.url, target)
    assert target.read_bytes() == b"by the other process"
    assert server.requests == []


def test_file_systems_without_locks_are_used_without(server, target, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    download(server.url, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("longer", [1, 1_000])
def test_a_file_shorter_than_announced_is_never_taken_for_whole(server, target, longer):
    server.longer = longer
    refused_download(server.url, target, "the connection broke")


@pytest.mark.parametrize(
    ("headers", "longer", "reason"),
    [
        ({}, None, "does not say how much"),
        ({"Content-Type": "text/html; charset=utf-8"}, 0, "a web page instead of the file"),
        ({"Content-Encoding": "gzip"}, 0, "recoded"),
    ],
)
def test_answers_that_cannot_be_the_file_are_refused(server, target, headers, longer, reason):
    server.headers, server.longer = headers, longer
    refused_download(server.url, target, reason)
    assert files_beside(target) == []


@pytest.mark.parametrize(
    ("status", "phrase"),
    [(404, "Not Found"), (403, "Forbidden"), (503, "Service Unavailable"), (799, "")],
)
def test_a_status_is_told_with_the_way_out(server, target, status, phrase):
    server.status = status
    message = refused_download(server.url, target, f"the server answers {status}.*{phrase}")
    assert f"download it elsewhere and put it at {target}" in message
    assert files_beside(target) == []


def test_a_lasting_status_is_not_waited_out(server, target, monkeypatch):
    def gone(_):
        server.status = 404
        server.requests.clear()

    monkeypatch.setattr(downloads, "time", SimpleNamespace(sleep=gone))
    server.cuts = [PIECE]
    refused_download(server.url, target, "404")
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_told(server, target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set.zip"
        message = refused_download(url, target, "the server refuses connections; nothing was rec")
    assert f"put it at {target}" in message


def test_a_name_that_is_not_found_is_told(server, target, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused_download("http://set.example/set.zip", target, "the server's name is not found")


def test_a_server_that_falls_silent_is_told(server, target, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", (1, 0.05))
    server.gate = threading.Event()
    try:
        refused_download(server.url, target, "the server does not answer")
    finally:
        server.gate.set()


def test_the_proxy_of_the_environment_is_used(server, target, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.rsplit("/", 1)[0])
    download("http://set.example/set.zip", target)
    assert target.read_bytes() == CONTENT
    assert server.requests[0]["target"] == "http://set.example/set.zip"


def test_a_proxy_that_fails_is_told(server, target, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused.getsockname()[1]}")
        refused_download("http://set.example/set.zip", target, "the proxy that the environment")


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://x/set.zip", "set.zip", "data:,x"])
def test_other_schemes_are_refused(target, url):
    refused_download(url, target, "must begin with http:// or https://")
    assert not target.parent.exists()


@pytest.mark.parametrize("url", ["http://", "http://[::1", "https://a:b:c/x"])
def test_addresses_that_are_none_are_refused(target, url):
    refused_download(url, target, "the address cannot be used")


def test_a_redirection_to_another_scheme_is_refused(server, target):
    server.status, server.headers = 302, {"Location": "file:///etc/hosts"}
    refused_download(server.url, target, "the address cannot be used")


def test_too_small_a_disk_is_told_before_anything_is_fetched(server, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=299_999))
    with pytest.raises(UserError, match=r"needs 300,000 bytes .* has 299,999 bytes free"):
        download(server.url, target)
    assert files_beside(target) == []


def test_what_is_there_needs_no_space(server, target, monkeypatch):
    broken_at(server, target)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000 - BROKEN))
    download(server.url, target)
    assert target.read_bytes() == CONTENT


def test_a_disk_that_fills_up_is_told_and_the_next_run_goes_on(server, target, monkeypatch):
    write = downloads._Part.write

    def full(part, chunk):
        if part.size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(part, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(downloads._Part, "write", full)
        refused_download(server.url, target, "the disk is full; free some space")
    left = part_of(target).stat().st_size
    assert left > 100_000
    download(server.url, target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == f"bytes={left}-"


def test_a_place_that_cannot_be_written_is_told(server, tmp_path):
    (tmp_path / "raw").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot be written to .*set\.zip\.part: .*raw"):
        download(server.url, tmp_path / "raw" / "set.zip")
    with pytest.raises(UserError, match="is a folder where a file should go"):
        download(server.url, tmp_path)


def test_the_bar_starts_at_what_is_there(server, target, monkeypatch):
    broken_at(server, target)
    bars = []
    plain = downloads.progress_bar

    def spied(*arguments):
        bars.append(plain(*arguments))
        return bars[-1]

    monkeypatch.setattr(downloads, "progress_bar", spied)
    download(server.url, target)
    (bar,) = bars
    assert (bar.initial, bar.n, bar.total) == (BROKEN, 300_000, 300_000)


def test_kill_9_loses_nothing_that_was_received(server, target):
    server.gate = threading.Event()
    with started(download_directly, server.url, target) as process:
        deadline = time.monotonic() + 60
        while size_of(part_of(target)) < BROKEN:
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


def test_a_record_is_readable_and_names_its_version(server, target):
    broken_at(server, target, PIECE)
    record = json.loads(part_of(target).with_name("set.zip.part.json").read_text())
    assert record == {"url": server.url, "length": 300_000, "version": {"ETag": '"1"'}}
