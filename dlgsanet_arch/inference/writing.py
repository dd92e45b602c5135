"""Images into files, with their depth, alpha, colour profile and EXIF data."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dlgsanet_arch.data.images import Pixels
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import written_atomically

# Formats by the names that users give them, and the suffixes that mean them.
FORMATS = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "tiff": (".tif", ".tiff"),
}
QUALITY = 95
_LONGEST = {"jpeg": 65_500, "webp": 16_383}
_PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG's number of a kind of image, by channels
_BAND = 64  # rows that are filtered at a time


class WriteError(UserError):
    """An image that cannot be written as asked."""


def format_of(path: Path) -> str | None:
    """Return the format that a suffix means, None for one that is not written."""
    suffix = path.suffix.lower()
    return next((name for name, suffixes in FORMATS.items() if suffix in suffixes), None)


def why_not(format: str, pixels: Pixels) -> str | None:
    """Return why a format cannot hold an image (H, W, C), None where it can."""
    longest = _LONGEST.get(format)
    if longest is None:
        return None
    if pixels.dtype == np.uint16:
        return f"{format} holds 8 bits and the image has 16"
    if format == "jpeg" and pixels.shape[2] in (2, 4):
        return "jpeg holds no transparency"
    if max(pixels.shape[:2]) > longest:
        return f"{format} holds sides up to {longest:,} and the image has {max(pixels.shape):,}"
    return None


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _filtered(pixels: NDArray[np.uint16]) -> Iterator[bytes]:
    """Yield a PNG's rows, each byte less what Paeth's predictor makes of its neighbours."""
    height, width, channels = pixels.shape
    step = 2 * channels
    above = np.zeros((1, width * step), np.uint8)
    for start in range(0, height, _BAND):
        band = pixels[start : start + _BAND].astype(">u2").view(np.uint8)
        rows = band.reshape(len(band), width * step)
        up = np.concatenate([above, rows[:-1]])
        left, corner = np.zeros_like(rows), np.zeros_like(rows)
        left[:, step:], corner[:, step:] = rows[:, :-step], up[:, :-step]
        a, b, c = (each.astype(np.int16) for each in (left, up, corner))
        to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
        nearest_a = (to_a <= to_b) & (to_a <= to_c)
        predicted = np.where(nearest_a, left, np.where(to_b <= to_c, up, corner))
        lines = np.full((len(rows), 1 + width * step), 4, np.uint8)
        lines[:, 1:] = rows - predicted
        above = rows[-1:]
        yield lines.tobytes()


def _write_deep_png(
    file: IO[bytes], pixels: NDArray[np.uint16], icc: bytes | None, exif: bytes | None
) -> None:
    """Write 16 bits a sample: Pillow has no such colours, and OpenCV no gray with alpha."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR[channels], 0, 0, 0)
    file.write(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header))
    if icc is not None:
        file.write(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    if exif is not None:
        file.write(_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    packer = zlib.compressobj()
    for lines in _filtered(pixels):
        packed = packer.compress(lines)
        if packed:
            file.write(_chunk(b"IDAT", packed))
    file.write(_chunk(b"IDAT", packer.flush()) + _chunk(b"IEND", b""))


def _write_deep_tiff(file: IO[bytes], pixels: NDArray[np.uint16], icc: bytes | None) -> None:
    try:
        import tifffile
    except ImportError as error:
        raise WriteError(
            "16-bit TIFF files are written by a package that is not there: pip install tifffile, "
            "or use --format png"
        ) from error
    channels = pixels.shape[2]
    tifffile.imwrite(
        file,
        pixels[..., 0] if channels == 1 else pixels,
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        compression="zlib",
        iccprofile=icc,
        metadata=None,
    )


def _write(
    file: IO[bytes],
    format: str,
    pixels: Pixels,
    icc: bytes | None,
    exif: bytes | None,
    quality: int,
) -> None:
    if pixels.dtype == np.uint16:
        if format == "png":
            _write_deep_png(file, pixels, icc, exif)
        else:
            _write_deep_tiff(file, pixels, icc)
        return
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    kept = {name: value for name, value in (("icc_profile", icc), ("exif", exif)) if value}
    options = {
        "jpeg": {"quality": quality, "subsampling": 0},
        "webp": {"quality": quality, "exact": True},
        # Pillow compresses no TIFF file that has a folder of EXIF data.
        "tiff": {} if exif else {"compression": "tiff_adobe_deflate"},
        "png": {},
    }
    image.save(file, format.upper(), **options[format], **kept)


def write_image(
    path: Path,
    format: str,
    pixels: Pixels,
    *,
    icc: bytes | None = None,
    exif: bytes | None = None,
    quality: int = QUALITY,
) -> None:
    """Write an image, whole or not at all.

    Args:
        path: The file; its folder is made where it is missing.
        format: A key of `FORMATS`.
        pixels: (H, W, C) of uint8 or uint16: gray, gray and alpha, RGB, or RGB and alpha.
        icc: The colour profile.
        exif: EXIF data as `StoredImage` has it; 16-bit TIFF files go without.
        quality: Of JPEG and WebP, 1 to 100.

    Raises:
        WriteError: The format cannot hold the image, or the file cannot be written.
    """
    reason = why_not(format, pixels)
    if reason is not None:
        raise WriteError(f"{path} cannot be written: {reason}; use --format png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            _write(file, format, pixels, icc, exif, quality)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error
    except (RuntimeError, ValueError, TypeError, struct.error) as error:  # an encoder's refusals
        raise WriteError(f"{path} cannot be written as {format}: {error}") from error
