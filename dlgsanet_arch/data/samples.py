"""The samples of an image that Pillow has loaded: colour and alpha apart, 8 or 16 bits."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES = 258, 262, 284
TIFF_EXTRA_SAMPLES, TIFF_SAMPLE_FORMAT = 338, 339
# Images are composited in bands of rows, so that wide intermediates stay small.
BAND = 256


Pixels = NDArray[np.uint8] | NDArray[np.uint16]


class Refusal(Exception):
    """The reason of a ImageError, from where the file's name is not known."""


def bits_of(image: ImageFile, name: str, data: bytes) -> int:
    """The bits of a sample in the file; Pillow's own modes lose it for colour."""
    if name == "PNG":
        return data[24]
    return int(max(np.ravel(image.tag_v2.get(TIFF_BITS, 1)))) if name == "TIFF" else 8


def turned(array: Pixels, orientation: int) -> Pixels:
    """Turn stored pixels, (H, W) or (H, W, C), as an EXIF orientation from 1 to 8 asks for."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return array[rows, columns]


def _deep_colour(
    data: bytes, coarse: NDArray[np.uint8], orientation: int, planar: bool
) -> NDArray[np.uint16]:
    """Read the samples of 16-bit colour by OpenCV, whose versions differ in whether they turn.

    In separate planes, as TIFF may have it, only tifffile reads them.

    Args:
        data: The file.
        planar: Whether it is such a file.
        coarse: (H, W, C) in RGB or RGBA, the samples' upper bytes by Pillow, which decide.
        orientation: The file's EXIF orientation.

    Returns:
        (H, W, C), turned as `coarse` is.
    """
    if planar:
        import tifffile

        return turned(np.moveaxis(tifffile.imread(BytesIO(data), key=0), 0, -1), orientation)
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
    deep = decoded[..., [2, 1, 0, 3][: max(channels, 3)]] if decoded.shape[2] >= channels else None
    for candidate in () if deep is None else (deep, turned(deep, orientation)):
        if candidate.shape == coarse.shape and np.array_equal(candidate >> 8, coarse):
            return candidate
    raise Refusal("cannot be decoded: Pillow and OpenCV read different samples from it")


def _in_rgb(image: ImageFile) -> Image.Image:
    """Convert CMYK or Lab colours to sRGB, by the file's profile where it has one."""
    profile = image.info.get("icc_profile")
    try:
        own = None if profile is None else ImageCms.ImageCmsProfile(BytesIO(profile))
    except (OSError, ImageCms.PyCMSError):
        own = None
        del image.info["icc_profile"]  # the notice then speaks of a rule of thumb
    if own is None and image.mode == "CMYK":
        return image.convert("RGB")
    own = own or ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")


def samples(
    image: ImageFile, data: bytes, name: str, orientation: int
) -> tuple[Pixels, Pixels | None]:
    """Separate colour and alpha.

    Returns:
        (H, W, 1) gray or (H, W, 3) RGB, and (H, W) alpha, None where there is none.
    """
    transparent = image.info.get("transparency")
    bits = bits_of(image, name, data)
    if image.mode in ("P", "PA"):
        opaque = image.mode == "P" and transparent is None
        array = np.asarray(image.convert("RGB" if opaque else "RGBA"))
        transparent = None
    elif image.mode in ("1", "La", "YCbCr"):
        array = np.asarray(image.convert({"1": "L", "La": "LA", "YCbCr": "RGB"}[image.mode]))
    elif image.mode in ("CMYK", "LAB"):
        array = np.asarray(_in_rgb(image))
    else:
        array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if bits == 16:
        # Pillow holds 16-bit gray in types of more than one width and byte order
        gray = array.shape[2] == 1
        planar = name == "TIFF" and image.tag_v2.get(TIFF_PLANES, 1) == 2
        array = array.astype(np.uint16) if gray else _deep_colour(data, array, orientation, planar)
        if name == "PNG" and data[25] == 4:  # gray and alpha, for which Pillow has no 16-bit mode
            array = array[..., 2:]
    if array.shape[2] in (2, 4):
        return array[..., :-1], array[..., -1]
    if transparent is None:
        return array, None
    # PNG names one colour as the transparent one, in samples of the file's width.
    if image.mode == "L" and bits < 8:
        transparent = transparent * 255 // (2**bits - 1)
    white = np.iinfo(array.dtype).max
    return array, np.where((array == transparent).all(2), 0, white).astype(array.dtype)


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
