"""Headers of images: size and kind, without a pixel decoded."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image, PpmImagePlugin

from dlgsanet_arch.data.images import EXIF_ORIENTATION, MAX_BYTES, READERS
from dlgsanet_arch.data.samples import bits_of

# OpenCV, which reads for BasicSR, reads these as well.
FORMATS = READERS | {"PPM": PpmImagePlugin.PpmImageFile}
# How many bytes of an image are tried.
HEADS = (2**12, 2**16, MAX_BYTES)


class Header(NamedTuple):
    """Size as BasicSR reads it, turned by EXIF; one channel? transparency? more than 8 bits?"""

    height: int
    width: int
    gray: bool
    alpha: bool
    deep: bool


def _parse(data: bytes) -> Header:
    name = next((name for name in FORMATS if Image.OPEN[name.upper()][1](data[:16])), None)
    if name is None:
        raise ValueError("not an image")
    # Not Image.open, which refuses what it takes for decompression bombs and OpenCV reads.
    image = FORMATS[name](BytesIO(data))
    width, height = image.size
    # Pillow decodes a whole PNG to look for EXIF behind the pixels.
    if name == "JPEG" and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
        width, height = height, width
    deep = image.mode.startswith(("I", "F"))
    return Header(
        height,
        width,
        gray=image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;"),
        alpha=image.mode.upper() in ("LA", "PA", "RGBA") or "transparency" in image.info,
        deep=deep or bits_of(image, name, data) > 8,
    )


def _first_bytes(source: Path | memoryview, count: int) -> bytes:
    if not isinstance(source, Path):
        return bytes(source[:count])
    with source.open("rb") as file:
        return file.read(count)


def read_header(source: Path | memoryview) -> Header:
    """Read the header of an image of any size, and as little more of it as that takes.

    Args:
        source: The file, or its bytes, such as an LMDB's entry.

    Raises:
        OSError: It cannot be opened, or is not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in HEADS:
            data = _first_bytes(source, count)
            try:
                return _parse(data)
            except Exception as error:  # malformed files make Pillow raise nearly anything
                fault = error
            if len(data) < count:
                break
    raise OSError(f"not an image: {fault}") from fault
