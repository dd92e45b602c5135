"""Damaged images, archives and answers of servers: they are read, or refused by their name.

`make test` draws the same examples each time; `make test-faults` draws more, by a printed seed.
"""

import io
import random
import resource
import shutil
import socket
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from http_server import proxies
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from dlgsanet_arch.data import downloads
from dlgsanet_arch.data.archives import extract
from dlgsanet_arch.data.downloads import download
from dlgsanet_arch.data.images import ImageError, read_8_bits, read_header, read_stored
from dlgsanet_arch.errors import UserError

SECONDS, MEGABYTES = 10, 1000


def examples(count: int) -> Callable:
    """A property's settings: the same examples each time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=SECONDS * 1000,
        suppress_health_check=checks,
    )


def searched(check: Callable, count: int) -> None:
    """Run a property with new examples, whose seed is printed."""
    number = random.SystemRandom().randrange(2**32)
    print(f"seed {number}", file=sys.stderr)
    new = settings(examples(count), derandomize=False, print_blob=True)
    seed(number)(new(check))()


def attempted(work: Callable, name: str) -> tuple[object, str]:
    """Return what work returns and what it is refused for, by the name; memory is bounded."""
    result, refusal = None, ""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = work()
    except UserError as error:
        refusal = str(error)
    assert not refusal or name in refusal
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1000
    return result, refusal


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A file with bytes changed, cut off, moved or repeated; large numbers are likely."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, other = (draw(st.integers(0, len(data))) for _ in range(2))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["byte", "number", "cut", "zeros", "move", "repeat", "drop"]))
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            order, number = draw(
                st.tuples(
                    st.sampled_from(["big", "little"]),
                    st.sampled_from([0, 1, 255, 65535, 100_000, 2**24, 2**31 - 1, 2**32 - 1]),
                )
            )
            data[at : at + 4] = number.to_bytes(4, order)
        elif kind == "cut":
            del data[at:]
        elif kind == "zeros":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            part = bytes(data[at : at + length])
            if kind != "repeat":
                del data[at : at + length]
            if kind != "drop":
                data[other:other] = part
        if not data:
            break
    return bytes(data)


def noise(channels: int, dtype: type = np.uint8) -> np.ndarray:
    shape = (18, 22) if channels == 1 else (18, 22, channels)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def saved(samples: np.ndarray, kind: str, mode: str | None = None, **options) -> bytes:
    image, file = Image.fromarray(samples), io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def by_opencv(suffix: str, samples: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode(suffix, samples)[1].tobytes()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "maker"
ICC = bytes(128)
IMAGES = {
    "rgb.png": saved(noise(3), "PNG", exif=EXIF, icc_profile=ICC),
    "palette.png": saved(noise(3), "PNG", "P", transparency=3),
    "alpha.png": saved(noise(4), "PNG"),
    "deep.png": by_opencv(".png", noise(3, np.uint16)),
    "deep_gray.png": by_opencv(".png", noise(1, np.uint16)),
    "rgb.jpg": saved(noise(3), "JPEG", exif=EXIF, icc_profile=ICC),
    "progressive.jpg": saved(noise(3), "JPEG", progressive=True),
    "cmyk.jpg": saved(noise(3), "JPEG", "CMYK"),
    "rgb.tif": saved(noise(3), "TIFF", exif=EXIF),
    "lzw.tif": saved(noise(3), "TIFF", compression="tiff_lzw"),
    "deflate.tif": saved(noise(1), "TIFF", compression="tiff_adobe_deflate"),
    "jpeg.tif": saved(noise(3), "TIFF", compression="jpeg"),
    "deep.tif": by_opencv(".tif", noise(3, np.uint16)),
    "lossy.webp": saved(noise(3), "WEBP", exif=EXIF),
    "lossless.webp": saved(noise(4), "WEBP", lossless=True),
    "frames.webp": saved(
        noise(3), "WEBP", save_all=True, append_images=[Image.fromarray(noise(3) // 2)]
    ),
    "rgb.bmp": saved(noise(3), "BMP"),
    "palette.bmp": saved(noise(3), "BMP", "P"),
}


def check_image(name: str, data: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(data)
    for read in (read_8_bits, read_stored):
        image, refusal = attempted(partial(read, path), str(path))
        assert refusal or (image.pixels.ndim == 3 and image.pixels.size)
    with suppress(ImageError), path.open("rb") as file:
        assert min(read_header(file)[:2]) >= 0


ANY_IMAGE = st.sampled_from(sorted(IMAGES)).flatmap(
    lambda name: st.tuples(st.just(name), damaged(IMAGES[name]))
)


@examples(250)
@given(image=ANY_IMAGE)
def test_damaged_images_are_read_or_refused(tmp_path, image):
    check_image(*image, tmp_path)


@pytest.mark.faults
def test_more_damaged_images_are_read_or_refused(tmp_path):
    searched(given(image=ANY_IMAGE)(lambda image: check_image(*image, tmp_path)), 8000)


def zipped(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in ("set/a.png", "set/b/c.jpg", "set/notes.txt"):
            archive.writestr(name, name.encode() * 40)
    return file.getvalue()


def tarred(kind: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for name in ("set/a.png", "set/" + "b" * 120 + "/é.jpg", "set/notes.txt"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 300, 1.5
            archive.addfile(info, io.BytesIO(bytes(300)))
    return file.getvalue()


ARCHIVES = [
    zipped(zipfile.ZIP_STORED),
    zipped(zipfile.ZIP_DEFLATED),
    tarred(tarfile.PAX_FORMAT),
    tarred(tarfile.GNU_FORMAT),
]
ANY_ARCHIVE = st.sampled_from(ARCHIVES).flatmap(damaged)


def check_archive(data: bytes, folder: Path) -> None:
    path, out = folder / "set.archive", folder / "out"
    path.write_bytes(data)
    _, refusal = attempted(partial(extract, path, out), str(path))
    assert out.exists() is not bool(refusal)
    if not refusal:
        found = [each for each in out.rglob("*") if not each.is_dir()]
        assert found
        assert all(each.is_file() and out.resolve() in each.resolve().parents for each in found)
        shutil.rmtree(out)
    assert [each.name for each in folder.iterdir()] == ["set.archive"]


@examples(150)
@given(data=ANY_ARCHIVE)
def test_damaged_archives_are_unpacked_or_refused(tmp_path, data):
    check_archive(data, tmp_path)


@pytest.mark.faults
def test_more_damaged_archives_are_unpacked_or_refused(tmp_path):
    searched(given(data=ANY_ARCHIVE)(lambda data: check_archive(data, tmp_path)), 5000)


BODY = b"the file " * 30
ANSWER = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 270\r\nETag: "1"\r\nLast-Modified: Mon, 01 Jan 2024 '
    b"00:00:00 GMT\r\nConnection: close\r\n\r\n" + BODY
)
PART = ANSWER.replace(b"200 OK", b"206 Partial Content").replace(
    b"ETag", b"Content-Range: bytes 90-269/270\r\nETag"
)
LENGTHS = ["270", "-1", "1e3", "0", "9" * 30, "9" * 5000, "٣", "270, 270", "269", "271", "0x10"]
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.just("Content-Length"), st.sampled_from(LENGTHS)),
        st.tuples(st.just("Transfer-Encoding"), st.sampled_from(["chunked", "gzip", "x"])),
        st.tuples(st.just("Content-Encoding"), st.sampled_from(["gzip", "br", ""])),
        st.tuples(
            st.just("Location"),
            st.sampled_from(
                ["/", "http://", "http://[", "//", "http://.x/", "x" * 70, "http://é/"]
            ),
        ),
        st.tuples(st.just("Content-Range"), st.sampled_from(["bytes 0-0/1", "x", "bytes */270"])),
        st.tuples(st.just("ETag"), st.sampled_from(['"1"', 'W/"1"', "", "\x80"])),
    ),
    max_size=4,
)


@st.composite
def made_answers(draw) -> bytes:
    status = draw(st.sampled_from(["200 OK", "206 X", "301 X", "416 X", "99 X", "1000", "abc", ""]))
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in draw(HEADERS))]
    return "\r\n".join(lines).encode(errors="replace") + b"\r\n\r\n" + BODY


ANY_ANSWER = st.one_of(damaged(ANSWER), damaged(PART), made_answers())
ANY_RECORD = st.sampled_from(
    [None, b"{}", b'{"url": "URL", "length": "x", "validator": 5}', b"[" * 20_000]
    + [b'{"url": "URL", "length": 270, "validator": "\\"1\\""}'] * 3
)


class Server:
    """Sends some bytes to whoever connects, whatever is asked for."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/set.zip"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(2)
                connection.recv(65536)
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch):
    for name in proxies():
        monkeypatch.delenv(name)
    monkeypatch.setattr(downloads, "PAUSES", ())
    monkeypatch.setattr(downloads, "TIMEOUT", (1, 1))
    server = Server()
    yield server
    server.close()


def check_answer(answer: bytes, record: bytes | None, server: Server, folder: Path) -> None:
    server.answer = answer
    target, part = folder / "set.zip", folder / "set.zip.part"
    if record is not None:
        (folder / "set.zip.part.json").write_bytes(record.replace(b"URL", server.url.encode()))
        part.write_bytes(BODY[:90])
    _, refusal = attempted(partial(download, server.url, target), server.url)
    assert target.is_file() is not bool(refusal)
    assert refusal or not part.exists()
    for each in folder.iterdir():
        each.unlink()


@examples(150)
@given(answer=ANY_ANSWER, record=ANY_RECORD)
@example(answer=b"HTTP/1.1 301 X\r\nLocation: http://[\r\n\r\n", record=None)
def test_any_answer_of_a_server_is_a_file_or_an_error(tmp_path, server, answer, record):
    check_answer(answer, record, server, tmp_path)


@pytest.mark.faults
def test_more_answers_of_a_server_are_files_or_errors(tmp_path, server):
    check = given(answer=ANY_ANSWER, record=ANY_RECORD)(
        lambda answer, record: check_answer(answer, record, server, tmp_path)
    )
    searched(check, 3000)
