"""Images into files, with their depth, transparency, colour profile and EXIF data."""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dlgsanet_arch.data.samples import Pixels
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import written_atomically

# Formats by the names that users give them, and the suffixes that mean them.
FORMATS = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "webp": (".webp",),
    "tiff": (".tif", ".tiff"),
}
QUALITY = 95
_LONGEST = {"jpeg": 65_500, "webp": 16_383}
_PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG's number of a kind of image, by channels


class WriteError(UserError):
    """An image that cannot be written as requested."""


def format_of(path: Path) -> str | None:
    """Return the format that a suffix means, None for one that is not written."""
    suffix = path.suffix.lower()
    return next((name for name, suffixes in FORMATS.items() if suffix in suffixes), None)


def why_not(format: str, shape: Sequence[int], depth: Any) -> str | None:
    """Return why a format cannot hold an image (H, W, C), None where it can."""
    longest = _LONGEST.get(format)
    if longest is None:
        return None
    if depth == np.uint16:
        return f"{format} holds 8 bits and the image has 16"
    if format == "jpeg" and shape[2] in (2, 4):
        return "jpeg holds no transparency"
    if max(shape[:2]) > longest:
        return f"{format} holds sides up to {longest:,} and the result has {max(shape[:2]):,}"
    return None


def _write_deep_png(
    file: IO[bytes], pixels: NDArray[np.uint16], icc: bytes | None, exif: bytes | None
) -> None:
    """Write 16 bits a sample: Pillow has no such colours, and OpenCV no gray with alpha."""

    def write(name: bytes, body: bytes) -> None:
        checked = name + body
        file.write(struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked)))

    height, width, channels = pixels.shape
    file.write(b"\x89PNG\r\n\x1a\n")
    write(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR[channels], 0, 0, 0))
    if icc is not None:
        write(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
    if exif is not None:
        write(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    packer = zlib.compressobj()
    above = np.zeros(2 * width * channels, np.uint8)
    for row in pixels.astype(">u2").view(np.uint8).reshape(height, -1):
        # PNG's filter 2: differences from the row above.
        if packed := packer.compress(b"\2" + (row - above).tobytes()):
            write(b"IDAT", packed)
        above = row
    write(b"IDAT", packer.flush())
    write(b"IEND", b"")


def _write_deep_tiff(file: IO[bytes], pixels: NDArray[np.uint16], icc: bytes | None) -> None:
    try:
        import tifffile
    except ImportError as error:
        raise WriteError(
            "16-bit TIFF files need tifffile: pip install tifffile, or use --format png"
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


def write_image(
    path: Path,
    pixels: Pixels,
    *,
    icc: bytes | None = None,
    exif: bytes | None = None,
    quality: int = QUALITY,
    lossless: bool = False,
) -> None:
    """Write an image in the format of its suffix, complete or not at all.

    Pixels are (H, W, C) as of `StoredImage`, which has profile and EXIF data alike; 16-bit TIFF
    files go without EXIF. `quality`, 1 to 100, is of JPEG and WebP, `lossless` of WebP.

    Raises:
        WriteError: The format cannot hold the image, or the file cannot be written.
    """
    format = format_of(path)
    options = {
        "jpeg": {"quality": quality, "subsampling": 0},
        "webp": {"quality": quality, "lossless": lossless, "exact": True},
        # Pillow compresses no TIFF file that has a folder of EXIF data.
        "tiff": {} if exif else {"compression": "tiff_adobe_deflate"},
        "png": {},
    }
    kept = {name: value for name, value in (("icc_profile", icc), ("exif", exif)) if value}
    try:
        with written_atomically(path) as file:
            if pixels.dtype == np.uint16 and format == "png":
                _write_deep_png(file, pixels, icc, exif)
            elif pixels.dtype == np.uint16:
                _write_deep_tiff(file, pixels, icc)
            else:
                image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                image.save(file, format, **options[format], **kept)
    except (OSError, RuntimeError, ValueError, TypeError, struct.error) as error:
        reason = getattr(error, "strerror", None) or error  # the system's, or an encoder's
        raise WriteError(f"{path} cannot be written: {reason}") from error


def is_lossless_webp(path: Path) -> bool:
    """Return whether a file is WebP without loss."""
    with path.open("rb") as file:
        if file.read(12)[8:] != b"WEBP":
            return False
        while len(head := file.read(8)) == 8:
            if head.startswith(b"VP8") and head[3:4] in b"L ":
                return head[3:4] == b"L"
            length = int.from_bytes(head[4:], "little")
            file.seek(length + length % 2, os.SEEK_CUR)
    return False
