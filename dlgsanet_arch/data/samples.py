"""Samples of images: which are read, and colour and alpha of 8 or 16 bits, upright."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin
from PIL.ImageFile import ImageFile

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES = 258, 262, 284
TIFF_EXTRA_SAMPLES, TIFF_SAMPLE_FORMAT = 338, 339
BAND = 256  # rows composited at a time, so that wide intermediates stay small

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


class Refusal(Exception):
    """The reason of an ImageError, raised where the file's name is not known."""


def bits_of(image: ImageFile, start: bytes) -> int:
    """Bits of a sample in the file that starts so; Pillow's modes lose them for colour."""
    if image.format == "PNG":
        return start[24]
    return int(max(np.ravel(image.tag_v2.get(TIFF_BITS, 1)))) if image.format == "TIFF" else 8


def check_tiff(data: bytes) -> None:
    """Refuse by their tags the samples that Pillow does not know, or reads as something else."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])  # 43: BigTIFF
    stream = BytesIO(data)
    stream.seek(tags.next)
    tags.load(stream)
    bits = max(np.ravel(tags.get(TIFF_BITS, 1)))
    formats = {int(number) for number in np.ravel(tags.get(TIFF_SAMPLE_FORMAT, 1))}
    if formats != {1} or bits not in (1, 2, 4, 8, 16):
        kinds = {1: "integer", 2: "signed integer", 3: "floating-point"}
        kind = " and ".join(kinds.get(number, "unknown") for number in sorted(formats))
        raise Refusal(f"holds {bits}-bit {kind} samples: save it with 8 or 16 bits")
    if bits == 16 and tags.get(TIFF_PHOTOMETRIC, 1) == 0:
        raise Refusal("is 16-bit gray with zero for white: save it with zero for black")
    if bits == 16 and 1 in np.ravel(tags.get(TIFF_EXTRA_SAMPLES, 0)):
        raise Refusal("has 16-bit colours multiplied by alpha: save it with unassociated alpha")


def turned(array: Pixels, orientation: int) -> Pixels:
    """Turn stored pixels, (H, W) or (H, W, C), by an EXIF orientation from 1 to 8."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return array[rows, columns]


def _by_opencv(data: bytes, coarse: NDArray[np.uint8], orientation: int) -> NDArray[np.uint16]:
    """Read 16-bit colour, for which Pillow has no type; `coarse` has its upper bytes, upright.

    Versions of OpenCV differ in whether they turn images: what equals `coarse` is right.
    """
    try:
        import cv2
    except ImportError as error:
        raise Refusal(
            "holds 16-bit colour, which OpenCV reads: pip install opencv-python-headless"
        ) from error
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    channels = coarse.shape[2]
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise Refusal("cannot be decoded: a kind of 16-bit colour that OpenCV does not read")
    if decoded.shape[2] >= channels:
        deep = decoded[..., [2, 1, 0, 3][: max(channels, 3)]]
        for candidate in (deep, turned(deep, orientation)):
            if candidate.shape == coarse.shape and np.array_equal(candidate >> 8, coarse):
                return candidate
    raise Refusal("cannot be decoded: Pillow and OpenCV read different samples from it")


def _in_rgb(image: ImageFile) -> Image.Image:
    """Convert CMYK or Lab colours to sRGB, by the file's profile if it has one."""
    profile = image.info.get("icc_profile")
    try:
        own = None if profile is None else ImageCms.ImageCmsProfile(BytesIO(profile))
    except (OSError, ImageCms.PyCMSError):
        own = None
        del image.info["icc_profile"]  # the notice then says that it is unusable
    if own is None and image.mode == "CMYK":
        return image.convert("RGB")
    own = own or ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")


def samples(image: ImageFile, data: bytes, orientation: int) -> tuple[Pixels, Pixels | None]:
    """Separate colour and alpha of a loaded image, which Pillow has turned if it is TIFF.

    Returns (H, W, 1) gray or (H, W, 3) RGB, and (H, W) alpha, None if it has none.
    """
    transparent, bits = image.info.get("transparency"), bits_of(image, data)
    loaded = image
    if image.mode in ("P", "PA"):
        opaque = image.mode == "P" and transparent is None
        loaded, transparent = image.convert("RGB" if opaque else "RGBA"), None
    elif image.mode in ("1", "La", "YCbCr"):
        loaded = image.convert({"1": "L", "La": "LA", "YCbCr": "RGB"}[image.mode])
    elif image.mode in ("CMYK", "LAB"):
        loaded = _in_rgb(image)
    array = turned(np.asarray(loaded), 1 if image.format == "TIFF" else orientation)
    if array.ndim == 2:
        array = array[..., None]
    if bits == 16:
        if array.shape[2] == 1:  # in types of several widths and byte orders
            array = array.astype(np.uint16)
        elif image.format == "TIFF" and image.tag_v2.get(TIFF_PLANES, 1) == 2:
            import tifffile

            planes = tifffile.imread(BytesIO(data), key=0)
            array = turned(np.moveaxis(planes, 0, -1), orientation)
        else:
            array = _by_opencv(data, array, orientation)
        if image.format == "PNG" and data[25] == 4:  # gray and alpha, read as four channels
            array = array[..., 2:]
    if array.shape[2] in (2, 4):
        return array[..., :-1], array[..., -1]
    if transparent is None:
        return array, None
    # PNG names one colour as the transparent one, in samples of the file's width.
    if image.mode == "L" and bits < 8:
        transparent = transparent * 255 // (2**bits - 1)
    alpha = np.full(array.shape[:2], np.iinfo(array.dtype).max, array.dtype)
    alpha[(array == transparent).all(2)] = 0
    return array, alpha


def on_white(colour: Pixels, alpha: Pixels) -> Pixels:
    """Composite (H, W, C) on white by (H, W): α·colour + (1 - α)·white, rounded."""
    result = np.empty(colour.shape, colour.dtype)
    white = np.uint32(np.iinfo(colour.dtype).max)
    for start in range(0, len(colour), BAND):
        rows = slice(start, start + BAND)
        share = alpha[rows, :, None].astype(np.uint32)
        # at most white², which 32 bits hold with the half that rounds
        mixed = colour[rows] * share + white * (white - share)
        result[rows] = (mixed + white // 2) // white
    return result
