"""Damaged images, archives and answers of servers: they are read, or refused by their name.

`make test` draws the same examples each time; `make test-faults` draws more, by a printed seed.
"""

import io
import random
import resource
import shutil
import socketserver
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
from helpers import tarred, zipped
from http_server import proxies
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from dlgsanet_arch.data import downloads
from dlgsanet_arch.data.archives import extract
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


def searched(count: int) -> Callable:
    """Settings with new examples each time, whose seed is printed."""
    number = random.SystemRandom().randrange(2**32)
    print(f"seed {number}", file=sys.stderr)
    new = settings(examples(count), derandomize=False, print_blob=True)
    return lambda check: seed(number)(new(check))


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
        end = at + draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["byte", "number", "cut", "zeros", "move", "repeat", "drop"]))
        part = bytes(data[at:end])
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            order = draw(st.sampled_from(["big", "little"]))
            numbers = [0, 1, 255, 65535, 100_000, 2**24, 2**31 - 1, 2**32 - 1]
            data[at : at + 4] = draw(st.sampled_from(numbers)).to_bytes(4, order)
        elif kind == "zeros":
            data[at:end] = bytes(len(part))
        elif kind != "repeat":
            del data[at : len(data) if kind == "cut" else end]
        if kind in ("move", "repeat"):
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


NAMES = ("set/a.png", "set/" + "b" * 120 + "/é.jpg", "set/notes.txt")
MEMBERS = [(name, name.encode() * 40) for name in NAMES]
ARCHIVES = [
    *(zipped(MEMBERS, method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)),
    *(tarred(MEMBERS, kind) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)),
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


BODY = b"the file " * 30
ANSWERS = [
    b'HTTP/1.1 200 OK\r\nContent-Length: 270\r\nETag: "1"\r\n\r\n' + BODY,
    b"HTTP/1.1 206 X\r\nContent-Length: 180\r\nContent-Range: bytes 90-269/270\r\n"
    b'ETag: "1"\r\n\r\n' + BODY[90:],
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10e\r\n" + BODY + b"\r\n0\r\n\r\n",
    b"HTTP/1.1 301 X\r\nLocation: http://127.0.0.1:1/a\r\nContent-Length: 0\r\n\r\n",
]
ANY_ANSWER = st.sampled_from(ANSWERS).flatmap(damaged)


@pytest.fixture
def server(monkeypatch):
    """A server that sends its `answer`, whatever is asked for."""
    for name in proxies():
        monkeypatch.delenv(name)
    monkeypatch.setattr(downloads, "PAUSES", ())
    monkeypatch.setattr(downloads, "TIMEOUT", (1, 1))

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(self.server.answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def check_answer(answer: bytes, has_part: bool, server, folder: Path) -> None:
    server.answer = answer
    url = f"http://127.0.0.1:{server.server_address[1]}/set.zip"
    target, part = folder / "set.zip", folder / "set.zip.part"
    if has_part:
        record = f'{{"url": "{url}", "length": 270, "validator": "\\"1\\""}}'
        (folder / "set.zip.part.json").write_text(record)
        part.write_bytes(BODY[:90])
    _, refusal = attempted(partial(downloads.download, url, target), url)
    assert target.is_file() is not bool(refusal)
    assert refusal or not part.exists()
    for each in folder.iterdir():
        each.unlink()


@examples(150)
@given(answer=ANY_ANSWER, has_part=st.booleans())
@example(answer=b"HTTP/1.1 301 X\r\nLocation: http://[\r\n\r\n", has_part=False)
@example(answer=ANSWERS[1], has_part=True)
def test_any_answer_of_a_server_is_a_file_or_an_error(tmp_path, server, answer, has_part):
    check_answer(answer, has_part, server, tmp_path)


@pytest.mark.faults
def test_more_damage(tmp_path, server):
    searched(8000)(given(image=ANY_IMAGE)(lambda image: check_image(*image, tmp_path)))()
    archives = tmp_path / "archives"
    archives.mkdir()
    searched(5000)(given(data=ANY_ARCHIVE)(lambda data: check_archive(data, archives)))()
    answers = tmp_path / "answers"
    answers.mkdir()
    check = given(answer=ANY_ANSWER, has_part=st.booleans())(
        lambda answer, has_part: check_answer(answer, has_part, server, answers)
    )
    searched(3000)(check)()
