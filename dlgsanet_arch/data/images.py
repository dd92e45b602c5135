"""Pixels of images, checked: a damaged file raises an error instead of giving gray areas.

Nothing is printed: an image's notices and an error's text say what a user should know. Pillow
decodes, because it refuses cut files, the rest of which OpenCV fills with gray. ICC profiles are
not applied, as BasicSR's readers apply none.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401 - importing registers it
from PIL.ImageFile import ImageFile

from dlgsanet_arch.data.finding import SUFFIXES
from dlgsanet_arch.data.samples import Pixels, Refusal, bits_of, check_tiff, on_white, samples
from dlgsanet_arch.errors import UserError

# Larger images are refused by their header. The largest cameras make 151 million pixels; above
# 179 million Pillow refuses by itself.
MAX_PIXELS = 160_000_000
# What MAX_PIXELS of 16-bit colour with alpha need uncompressed: larger files are not even read.
MAX_BYTES = 8 * MAX_PIXELS
# A small file must not fill the memory: beyond so many bytes uncompressed, an image may be at most
# so many times as large as its file. Decoders hold several times as much: up to 0.9 GB for 1 MB.
ANY_GROWTH, MAX_GROWTH = 2**27, 150
# Progressive JPEG files have 10 scans or so; hundreds are made to keep a decoder busy.
MAX_SCANS = 24
TOO_LARGE = (
    f"claims {{}} pixels; at most {MAX_PIXELS:,} are read: if the size is true, cut the image into "
    "parts"
)
JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"
PNG_END = b"IEND\xaeB\x60\x82"

FORMATS = ("PNG", "JPEG", "TIFF", "WebP", "BMP")
EXIF_ORIENTATION = 0x0112
# What stays true of an image that was turned or resized: description, camera, resolution,
# software, time, author, rights, then the EXIF and GPS folders, of which offsets and sizes go.
EXIF_KEPT = (0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x8298)
EXIF_FOLDERS = (0x8769, 0x8825)
EXIF_STALE = (0x927C, 0xA002, 0xA003, 0xA005)


class ImageError(UserError):
    """An image that cannot be used, and the reason: a sentence without its subject."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that the error survives pickling
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image that was read.

    `pixels` are upright, (H, W, C), uint8 or uint16: gray, gray and alpha, RGB, or RGB and alpha,
    colours not multiplied by alpha. From `read_8_bits`: (H, W, 3) in BGR, uint8.
    """

    pixels: Pixels
    notices: tuple[str, ...] = ()  # what was changed or left out, sentences without a subject
    icc: bytes | None = None  # the colour profile
    exif: bytes | None = None  # those EXIF data that stay true if the image is resized


def stored_size(path: Path) -> int:
    """Return how many bytes of a file are on the disk: holes in it are not."""
    found = path.stat()
    return 512 * getattr(found, "st_blocks", 0) or found.st_size  # some systems do not say


def read_bytes(path: Path) -> bytes:
    """Read an image's file; ImageError if it cannot be opened, or is larger than any image."""
    try:
        if path.exists() and not path.is_file():
            raise ImageError(path, "is not a file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(path, f"is a file of {size:,} bytes; at most {MAX_BYTES:,} are read")
        if size > max(ANY_GROWTH, MAX_GROWTH * stored_size(path)):
            raise ImageError(path, "is damaged: most of its bytes are not there")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # the last: a zero byte in the name
        reason = getattr(error, "strerror", error)
        raise ImageError(path, f"cannot be opened: {reason}") from error


def _format_of(start: bytes, formats: Sequence[str]) -> str:
    Image.preinit()  # the other formats
    for name in formats:
        if Image.OPEN[name.upper()][1](start[:16]):
            return name
    raise Refusal(f"is not an image: its first bytes are none of {', '.join(formats)}")


def _opened(file: BinaryIO, name: str) -> ImageFile:
    """Open by the reader of a format: `Image.open` would refuse large images, hide failures."""
    return Image.OPEN[name.upper()][0](file)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn what a decoder raises into an ImageError, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Refusal as error:
        raise ImageError(path, str(error)) from error
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:  # WebP, whose canvas is made on opening
        raise ImageError(path, TOO_LARGE.format("far too many")) from error
    except Exception as error:  # malformed files make Pillow raise nearly anything
        reason = f"damaged, cut short or of an unknown kind ({error or type(error).__name__})"
        raise ImageError(path, f"cannot be decoded: {reason}") from error


def _check_size(image: ImageFile, bits: int, file_size: int, least: int) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Refusal(TOO_LARGE.format(f"{width} x {height}"))
    if min(width, height) < least:
        raise Refusal(f"is too small: {width} x {height} pixels, both sides must be {least}")
    # Palettes become colours with alpha, as WebP's pixels are from the start.
    has_four = image.mode.startswith("P") or image.format == "WEBP"
    channels = 4 if has_four else len(image.getbands())
    uncompressed = width * height * channels * max(1, bits // 8)
    if uncompressed > max(ANY_GROWTH, MAX_GROWTH * file_size):
        raise Refusal(
            f"claims {width} x {height} pixels in {file_size:,} bytes, which is more than images "
            "compress: if the size is true, cut the image into parts"
        )


def _has_all_pixels(data: bytes) -> bool:
    """Whether a JPEG file without its end has all pixels: then other bytes there change none."""
    ends = (JPEG_END, b"\x55" * 64 + JPEG_END)
    return np.array_equal(*(np.asarray(_opened(BytesIO(data + end), "JPEG")) for end in ends))


def _open(data: bytes, least: int, converts: bool) -> ImageFile:
    """Open a complete file and check it; CMYK and Lab are refused, unless it `converts` them."""
    name = _format_of(data, FORMATS)
    if name == "TIFF":
        check_tiff(data)
    stream = BytesIO(data)
    image = _opened(stream, name)
    _check_size(image, bits_of(image, data), len(data), least)
    if name == "PNG":
        # Pillow's decoder reads neither the last chunks nor their checksums; this does.
        if PNG_END not in data:
            raise Refusal("is cut short: the end of the PNG file is missing")
        image.verify()
        image = _opened(BytesIO(data), name)
    if name == "JPEG":
        # Pillow stops behind the header of the first scan: images within EXIF lie before it.
        scans = stream.tell()
        if data.count(JPEG_SCAN, scans) > MAX_SCANS:
            raise Refusal(f"is made of more than {MAX_SCANS} scans: save it again")
        if data.find(JPEG_END, scans) < 0:
            data = data.removesuffix(JPEG_END[:1])
            if not (converts and _has_all_pixels(data)):
                raise Refusal("is cut short: the end of the JPEG file is missing")
            image = _opened(BytesIO(data + JPEG_END), name)
    if image.mode in ("CMYK", "LAB") and not converts:
        raise Refusal(f"holds {image.mode} colours: convert it to RGB with its colour profile")
    return image


def _orientation(image: ImageFile) -> int | None:
    """The EXIF orientation, 1 to 8, or None if the EXIF data cannot be read."""
    try:
        stated = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as in _decoding; the pixels are fine
        return None
    return stated if stated in range(1, 9) else 1


def _exif(image: ImageFile) -> bytes | None:
    """What `StoredImage.exif` holds; data that cannot be read or written is left out."""
    try:
        found, kept = image.getexif(), Image.Exif()
        for tag in (tag for tag in EXIF_KEPT if tag in found):
            kept[tag] = found[tag]
        for folder in EXIF_FOLDERS:
            entries = found.get_ifd(folder).items()
            if left := {tag: value for tag, value in entries if tag not in EXIF_STALE}:
                kept[folder] = left
        return kept.tobytes() if len(kept) else None
    except Exception:  # as in _decoding; the pixels are fine
        return None


def _notices(image: ImageFile, data: bytes, path: Path, orientation: int | None) -> Iterator[str]:
    name = _format_of(data, FORMATS)
    announced = SUFFIXES.get(path.suffix.lower(), name)
    if announced != name:
        yield f"is named as {announced} and holds {name}"
    if getattr(image, "is_animated", False):
        yield "holds more than one image; the first was read"
    if name == "JPEG" and data.rfind(JPEG_END) < data.rfind(JPEG_SCAN):
        yield "lacks the end of the JPEG file, and no pixel; it may be damaged"
    if image.mode in ("CMYK", "LAB"):
        by = "a rule of thumb, without a usable profile"
        by = "its profile" if "icc_profile" in image.info else by
        yield f"holds {image.mode} colours; they were converted to sRGB by {by}"
    if orientation is None:
        yield "has EXIF data that cannot be read; it was not rotated"


def _decode(data: bytes, path: Path, least: int, converts: bool = False) -> StoredImage:
    if not data:
        raise ImageError(path, "is empty: zero bytes")
    with _decoding(path):
        image = _open(data, least, converts)
        orientation = _orientation(image)
        image.load()
        pixels, alpha = samples(image, data, orientation or 1)
        notices = tuple(_notices(image, data, path, orientation))
    if alpha is not None and alpha.min() < np.iinfo(alpha.dtype).max:
        pixels = np.concatenate([pixels, alpha[..., None]], 2)
    icc = None if image.mode in ("CMYK", "LAB") else image.info.get("icc_profile")
    return StoredImage(np.ascontiguousarray(pixels), notices, icc, _exif(image))


def read_stored(path: Path) -> StoredImage:
    """Read an image of any size with what belongs to it: alpha, colour profile, EXIF data.

    The content decides on the format, not the suffix. Palettes and fewer than 8 bits are expanded,
    EXIF rotation is applied, CMYK and Lab are converted to sRGB, the first of several pages or
    frames is read, and alpha without any transparency is left out. ImageError if the file cannot be
    opened, is of another format, cut short, damaged, larger than `MAX_PIXELS` by its header, or has
    floating-point, signed or 32-bit samples.
    """
    return _decode(read_bytes(path), path, 1, converts=True)


def decode_8_bits(data: bytes, path: Path, *, least: int = 2) -> StoredImage:
    """Read an image as BasicSR sees it, (H, W, 3) in BGR, uint8.

    As `read_stored` reads it, but gray becomes three equal channels, alpha is composited on white,
    16 bits are rounded to 8, and CMYK and Lab are refused, as are sides of less than `least`
    pixels. `data` is the complete file, `path` its name in errors and notices.
    """
    stored = _decode(data, path, least)
    pixels, notices = stored.pixels, stored.notices
    if pixels.shape[2] in (2, 4):
        pixels = on_white(pixels[..., :-1], pixels[..., -1])
        notices += ("has transparent parts; it was composited on white",)
    if pixels.dtype != np.uint8:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        notices += ("holds 16 bits a sample; they were rounded to 8",)
    bgr = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels[..., ::-1]
    return StoredImage(np.ascontiguousarray(bgr), notices)


def read_8_bits(path: Path, *, least: int = 2) -> StoredImage:
    """Read an image's file as `decode_8_bits` does."""
    return decode_8_bits(read_bytes(path), path, least=least)


class Header(NamedTuple):
    """Size as BasicSR reads it, turned by EXIF; one channel? transparency? more than 8 bits?"""

    height: int
    width: int
    gray: bool
    alpha: bool
    deep: bool


def read_header(file: BinaryIO) -> Header:
    """Read the header of an image of any size; no pixel is decoded. ImageError if it is none."""
    with _decoding(Path(getattr(file, "name", "it"))):
        start = file.read(32)
        file.seek(0)
        image = _opened(file, _format_of(start, (*FORMATS, "PPM")))  # PPM: OpenCV reads it
        width, height = image.size
        # Pillow decodes a whole PNG to look for EXIF behind the pixels.
        if image.format == "JPEG" and (_orientation(image) or 1) >= 5:
            width, height = height, width
        mode = image.mode
        return Header(
            height,
            width,
            gray=mode in ("1", "L", "LA", "La") or mode.startswith(("I", "F")),
            alpha=mode.upper() in ("LA", "PA", "RGBA") or "transparency" in image.info,
            deep=mode.startswith(("I", "F")) or bits_of(image, start) > 8,
        )
