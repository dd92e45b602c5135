"""Pixels of images, checked: a damaged file raises an error instead of giving gray areas.

Nothing is printed: what a user should hear is in a result's notices or in an error's text.
Decoded by Pillow, which refuses cut files where OpenCV fills the rest with gray; OpenCV reads
the samples of 16-bit colour, for which Pillow has no type, and is imported for these alone. ICC
profiles are not applied, as BasicSR's readers apply none; `read_stored` hands them on.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from dlgsanet_arch.data.finding import SUFFIXES
from dlgsanet_arch.data.samples import (
    TIFF_BITS,
    TIFF_EXTRA_SAMPLES,
    TIFF_PHOTOMETRIC,
    TIFF_SAMPLE_FORMAT,
    Pixels,
    Refusal,
    bits_of,
    on_white,
    samples,
    turned,
)
from dlgsanet_arch.errors import UserError

# Larger images are refused by their header. The largest cameras make 151 million pixels; above
# 179 million Pillow refuses by itself.
MAX_PIXELS = 160_000_000
# What MAX_PIXELS of 16-bit colour with alpha need uncompressed: larger files are not even read.
MAX_BYTES = 8 * MAX_PIXELS
# A small file must not fill the memory: beyond so many bytes uncompressed, an image may be at most
# so many times as large as its file.
ANY_GROWTH = 2**27
MAX_GROWTH = 200
# Progressive JPEG files have 10 scans or so; hundreds are made to keep a decoder busy.
MAX_SCANS = 64
TOO_LARGE = (
    f"claims {{}} pixels; at most {MAX_PIXELS:,} are read: if the size is true, cut the image into "
    "parts"
)
JPEG_END = b"\xff\xd9"
PNG_END = b"IEND\xaeB\x60\x82"

READERS = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
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
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


@dataclass(frozen=True, eq=False)
class ReadImage:
    """An image that was read.

    Args:
        pixels: (H, W, 3) in BGR, as BasicSR's data sets and OpenCV's writers expect; uint8, or
            uint16 where the file holds 16 bits. Of a `StoredImage`: (H, W, C), upright, gray, gray
            and alpha, RGB, or RGB and alpha, colours not multiplied by alpha.
        notices: What was changed or left out on the way, one sentence without its subject each.
    """

    pixels: Pixels
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class StoredImage(ReadImage):
    """An image as its file holds it, with ICC profile and those EXIF data that stay true."""

    icc: bytes | None = None
    exif: bytes | None = None


def read_bytes(path: Path) -> bytes:
    """Read an image's file.

    Raises:
        ImageError: It cannot be opened, or is larger than any image.
    """
    try:
        if path.exists() and not path.is_file():
            raise ImageError(path, "is not a file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(path, f"is a file of {size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(path, f"cannot be opened: {error.strerror}") from error


def _format_of(data: bytes) -> str:
    for name in READERS:
        accepts = Image.OPEN[name.upper()][1]
        if accepts(data[:16]):
            return name
    raise Refusal(f"is not an image: its first bytes are none of {', '.join(READERS)}")


def _check_size(image: ImageFile, bits: int, file_size: int, least: int) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Refusal(TOO_LARGE.format(f"{width} x {height}"))
    if min(width, height) < least:
        raise Refusal(f"is too small: {width} x {height} pixels, both sides must be {least}")
    uncompressed = width * height * len(image.getbands()) * max(1, bits // 8)
    if uncompressed > max(ANY_GROWTH, MAX_GROWTH * file_size):
        raise Refusal(
            f"claims {width} x {height} pixels in {file_size:,} bytes, which is more than images "
            "compress: if the size is true, cut the image into parts"
        )


def _check_tiff(stream: BytesIO) -> None:
    """Refuse by their tags the samples that Pillow does not know, or reads as something else."""
    header = stream.read(8)
    if header[2] == 43:  # BigTIFF
        header += stream.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    stream.seek(tags.next)
    tags.load(stream)
    bits = max(np.ravel(tags.get(TIFF_BITS, 1)))
    formats = {int(number) for number in np.ravel(tags.get(TIFF_SAMPLE_FORMAT, 1))}
    numbers = {1: "integer", 2: "signed integer", 3: "floating-point"}
    kind = " and ".join(numbers.get(number, "unknown") for number in sorted(formats))
    if formats != {1} or bits not in (1, 2, 4, 8, 16):
        raise Refusal(f"holds {bits}-bit {kind} samples: save it with 8 or 16 bits")
    if bits == 16 and tags.get(TIFF_PHOTOMETRIC, 1) == 0:
        raise Refusal("is 16-bit gray with zero for white: save it with zero for black")
    if bits == 16 and 1 in np.ravel(tags.get(TIFF_EXTRA_SAMPLES, 0)):
        raise Refusal("has 16-bit colours multiplied by alpha: save it with unassociated alpha")


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn what a decoder raises into a refusal, and keep its warnings to ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (Refusal, MemoryError):
            raise
        except Image.DecompressionBombError as error:  # WebP, whose canvas is made on opening
            raise Refusal(TOO_LARGE.format("far too many")) from error
        except Exception as error:  # malformed files make Pillow raise nearly anything
            raise Refusal(
                "cannot be decoded: damaged, cut short or of an unknown kind "
                f"({error or type(error).__name__})"
            ) from error


def _lacks_end_alone(data: bytes) -> bool:
    """Whether a JPEG file without its end has all pixels: then other bytes there change none."""
    ends = (JPEG_END, b"\x55" * 64 + JPEG_END)
    images = [np.asarray(READERS["JPEG"](BytesIO(data + end))) for end in ends]
    return np.array_equal(*images)


def _load(data: bytes, name: str, least: int, converts: bool) -> tuple[ImageFile, int | None]:
    """Decode a complete file; unless it `converts` them, CMYK and Lab are refused.

    Returns:
        The loaded image, and its EXIF orientation as the file states it, None where that cannot
        be read; Pillow has already turned TIFF images, and then states another.
    """
    stream = BytesIO(data)
    if name == "TIFF":
        _check_tiff(stream)
        stream.seek(0)
    # The reader's own class, not Image.open: that would hide the reason of a failure.
    image = READERS[name](stream)
    _check_size(image, bits_of(image, name, data), len(data), least)
    if name == "PNG":
        # Pillow's decoder reads neither the last chunks nor their checksums; this does.
        if PNG_END not in data:
            raise Refusal("is cut short: the end of the PNG file is missing")
        image.verify()
        image = READERS[name](BytesIO(data))
    if name == "JPEG":
        # Pillow stops behind the header of the first scan: images within EXIF lie before it.
        if data.find(JPEG_END, stream.tell()) < 0:
            data = data.removesuffix(JPEG_END[:1])
            if not (converts and _lacks_end_alone(data)):
                raise Refusal("is cut short: the end of the JPEG file is missing")
            image = READERS[name](BytesIO(data + JPEG_END))
        if data.count(b"\xff\xda", stream.tell()) > MAX_SCANS:
            raise Refusal(f"is made of more than {MAX_SCANS} scans: save it again")
    if image.mode in ("CMYK", "LAB") and not converts:
        raise Refusal(f"holds {image.mode} colours: convert it to RGB with its colour profile")
    stated = _orientation(image)
    image.load()
    return image, stated


def _orientation(image: ImageFile) -> int | None:
    """The EXIF orientation, 1 to 8, or None where the EXIF data cannot be read."""
    try:
        stated = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as in _decoding; the pixels are fine
        return None
    return stated if stated in range(1, 9) else 1


def _exif(image: ImageFile) -> bytes | None:
    """What `StoredImage.exif` holds; data that cannot be read or written is left out."""
    try:
        found, kept = image.getexif(), Image.Exif()
        for tag in EXIF_KEPT:
            if tag in found:
                kept[tag] = found[tag]
        for folder in EXIF_FOLDERS:
            entries = found.get_ifd(folder).items()
            left = {tag: value for tag, value in entries if tag not in EXIF_STALE}
            if left:
                kept[folder] = left
        return kept.tobytes() if len(kept) else None
    except Exception:  # as in _decoding; the pixels are fine
        return None


@dataclass(frozen=True, eq=False)
class _Decoded:
    """Upright colours (H, W, 1) or (H, W, 3), alpha (H, W) where it is not opaque, and the rest."""

    image: ImageFile
    colour: Pixels
    alpha: Pixels | None
    notices: tuple[str, ...]


def _decode(data: bytes, path: Path, least: int, converts: bool = False) -> _Decoded:
    if not data:
        raise ImageError(path, "is empty: zero bytes")
    notices = []
    try:
        name = _format_of(data)
        with _decoding():
            image, stated = _load(data, name, least, converts)
            colour, alpha = samples(image, data, name, stated or 1)
            # asked a second time, Pillow takes EXIF data that it could not read for none
            left = None if stated is None else _orientation(image)
    except Refusal as error:
        raise ImageError(path, str(error)) from error
    announced = SUFFIXES.get(path.suffix.lower(), name)
    if announced != name:
        notices.append(f"is named as {announced} and holds {name}")
    if getattr(image, "is_animated", False):
        notices.append("holds more than one image; the first was read")
    if name == "JPEG" and data.rfind(JPEG_END) < data.rfind(b"\xff\xda"):
        notices.append("lacks the end of the JPEG file, and no pixel; it may be damaged")
    if left is None:
        notices.append("has EXIF data that cannot be read; it was not rotated")
    if image.mode in ("CMYK", "LAB"):
        rule = (
            "its profile"
            if "icc_profile" in image.info
            else "a rule of thumb, without a usable profile"
        )
        notices.append(f"holds {image.mode} colours; they were converted to sRGB by {rule}")
    if alpha is not None and alpha.min() == np.iinfo(alpha.dtype).max:
        alpha = None
    upright = [each if each is None else turned(each, left or 1) for each in (colour, alpha)]
    return _Decoded(image, *upright, tuple(notices))


def _for_training(decoded: _Decoded) -> ReadImage:
    """Make three channels in BGR, on white."""
    colour, notices = decoded.colour, decoded.notices
    if decoded.alpha is not None:
        colour = on_white(colour, decoded.alpha)
        notices += ("has transparent parts; it was composited on white",)
    if colour.shape[2] == 1:
        return ReadImage(np.repeat(colour, 3, 2), notices)
    return ReadImage(np.ascontiguousarray(colour[..., ::-1]), notices)


def read_image(path: Path, *, least: int = 2) -> ReadImage:
    """Read an image as three channels of 8 or 16 bits.

    The content decides on the format, not the suffix. Gray becomes three equal channels, palettes
    and fewer than 8 bits are expanded, EXIF rotation is applied, alpha is composited on white, and
    of several pages or frames the first is read; the last two give a notice.

    Args:
        path: PNG, JPEG, TIFF, WebP or BMP.
        least: The smallest side in pixels that is of use to the caller.

    Raises:
        ImageError: The file cannot be opened, is empty, not an image, cut short, damaged, smaller
            than `least`, larger than `MAX_PIXELS` by its header, or of colours or samples that
            are not read: CMYK, Lab, floating-point, signed, 32-bit.
    """
    return _for_training(_decode(read_bytes(path), path, least))


def read_stored(path: Path) -> StoredImage:
    """Read an image with what belongs to it: alpha, colour profile, EXIF data.

    As `read_image` reads it, but gray stays gray, CMYK and Lab are converted to sRGB with a notice,
    and of any size from 1 x 1 pixels; opaque alpha is left out.
    """
    decoded = _decode(read_bytes(path), path, 1, converts=True)
    pixels, image = decoded.colour, decoded.image
    if decoded.alpha is not None:
        pixels = np.concatenate([pixels, decoded.alpha[..., None]], 2)
    icc = None if image.mode in ("CMYK", "LAB") else image.info.get("icc_profile")
    return StoredImage(np.ascontiguousarray(pixels), decoded.notices, icc, _exif(image))


def decode_8_bits(data: bytes, path: Path, *, least: int = 2) -> ReadImage:
    """Read an image as `read_8_bits` does, from a file's bytes, such as an LMDB's entry.

    Args:
        data: The complete file.
        path: What to call it in errors; its suffix, if any, is compared with the content.
        least: The smallest side in pixels that is of use to the caller.
    """
    image = _for_training(_decode(data, path, least))
    if image.pixels.dtype == np.uint8:
        return image
    notice = "holds 16 bits a sample; they were rounded to 8"
    rounded = (image.pixels.astype(np.uint32) + 128) // 257
    return ReadImage(rounded.astype(np.uint8), (*image.notices, notice))


def read_8_bits(path: Path, *, least: int = 2) -> ReadImage:
    """Read an image as `read_image` does, and round 16 bits to 8, as BasicSR sees it: uint8."""
    return decode_8_bits(read_bytes(path), path, least=least)
