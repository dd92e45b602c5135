import io
import os
import pickle
import struct
import tracemalloc
import unicodedata
import zlib
from pathlib import Path, PurePath

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from dlgsanet_arch.data import finding, images
from dlgsanet_arch.data.finding import find_images, image_key
from dlgsanet_arch.data.images import ImageError, read_8_bits, read_header, read_stored
from dlgsanet_arch.data.similarity import pixel_digest
from dlgsanet_arch.errors import UserError

SIZE = (20, 30)
ON_WHITE = "has transparent parts; it was composited on white"


@pytest.fixture(autouse=True)
def _silent(capfd):
    yield
    assert capfd.readouterr() == ("", "")


def made(channels: int, dtype: type = np.uint8) -> np.ndarray:
    """Noise of all values, of SIZE."""
    shape = SIZE if channels == 1 else (*SIZE, channels)
    white = np.iinfo(dtype).max
    return np.random.default_rng(channels).integers(0, white, shape, dtype, endpoint=True)


def bgr(rgb: np.ndarray) -> np.ndarray:
    """Three channels of gray or RGB samples."""
    return np.dstack([rgb] * 3) if rgb.ndim == 2 else rgb[..., ::-1]


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    white = np.iinfo(colour.dtype).max
    share = alpha[..., None].astype(np.float64) / white
    return np.floor(colour * share + white * (1 - share) + 0.5).astype(colour.dtype)


def rounded(samples: np.ndarray) -> np.ndarray:
    """To 8 bits."""
    return samples if samples.dtype == np.uint8 else np.floor(samples / 257 + 0.5).astype(np.uint8)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def saved(path: Path, samples: np.ndarray, **options) -> Path:
    Image.fromarray(samples).save(path, **options)
    return path


def encoded(suffix: str, samples: np.ndarray, *options: int) -> bytes:
    """Encode by OpenCV: RGB, RGBA or gray."""
    if samples.ndim == 3:
        samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]
    fine, data = cv2.imencode(suffix, samples, options)
    assert fine
    return data.tobytes()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    size: tuple[int, int], bits: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]
) -> bytes:
    """Write a PNG file by hand; `rows` holds the packed bytes of each row, (H, bytes)."""
    header = struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def big_endian(samples: np.ndarray) -> np.ndarray:
    """16-bit samples (H, W[, C]) as rows of bytes, the upper ones first."""
    return samples.astype(">u2").reshape(len(samples), -1).view(np.uint8)


def tiff(samples: np.ndarray, orientation: int = 1, **options) -> bytes:
    """Encode by tifffile, uncompressed."""
    file = io.BytesIO()
    options.setdefault("photometric", "minisblack" if samples.ndim == 2 else "rgb")
    tags = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(file, samples, extratags=tags, metadata=None, **options)
    return file.getvalue()


# What is found


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_are_found_in_natural_order(tmp_path):
    touch(tmp_path, "a10.png", "a2.PNG", "B.jpeg", "c.JPG", "d.tif", "e.TIFF", "f.webp", "g.bmp")
    touch(tmp_path, "set 2/x.png", "set 2/sub/x.png", "Ünïcode/夜景 1.png")
    touch(tmp_path, ".hidden.png", ".git/x.png", "__MACOSX/._x.png")
    touch(tmp_path, "notes.txt", "png", "x.png.part")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    names = ["a2.PNG", "a10.png", "B.jpeg", "c.JPG", "d.tif", "e.TIFF", "f.webp", "g.bmp"]
    names += ["set 2/sub/x.png", "set 2/x.png", "Ünïcode/夜景 1.png"]
    assert [path.relative_to(tmp_path).as_posix() for path in found.values()] == names
    assert [*found][:3] == ["a2", "a10", "B"]
    assert found["set%202+x"] == tmp_path / "set 2" / "x.png"


def test_keys():
    for relative, key in {
        "0801.png": "0801",
        "city/night_1-b.png": "city+night_1-b",
        "city/night 1.png": "city+night%201",
        "img.v2.png": "img%2Ev2",
        "a+b%~.png": "a%2Bb%25%7E",
        "é.png": "%C3%A9",
        unicodedata.normalize("NFD", "é.png"): "%C3%A9",
        os.fsdecode(b"\xff.png"): "%FF",
    }.items():
        assert image_key(PurePath(relative)) == key


def test_basicsr_reads_the_keys_back(tmp_path):
    from basicsr.data.data_util import paired_paths_from_lmdb
    from basicsr.utils.file_client import FileClient
    from basicsr.utils.lmdb_util import LmdbMaker

    names = ["a/b", "a+b", "a b", "a.b", "a%2Fb", "a", "夜景" * 40, "夜景" * 41, "x/1", "y/1"]
    keys = [image_key(PurePath(f"{name}.png")) for name in names]
    assert max(map(len, keys)) == finding.KEY_LENGTH
    folders = [str(tmp_path / f"{part}.lmdb") for part in ("lq", "gt")]
    for folder in folders:
        maker = LmdbMaker(folder, map_size=2**20)
        for key, name in zip(keys, names, strict=True):
            maker.put(name.encode(), f"{key}_s001", (1, 1, 3))
        maker.close()
    paths = [pair["lq_path"] for pair in paired_paths_from_lmdb(folders, ["lq", "gt"])]
    client = FileClient("lmdb", db_paths=folders, client_keys=["lq", "gt"])
    assert sorted(client.get(path, "gt").decode() for path in paths) == sorted(names)
    # BasicSR's validation and pairs by meta_info_file name an image by this alone
    assert {os.path.splitext(os.path.basename(path))[0] for path in paths} == set(paths)


def test_images_that_would_share_a_key_are_refused(tmp_path):
    touch(tmp_path, "in/a.png", "in/a.JPG", "in/b.png", "c.png", "b.png")
    with pytest.raises(UserError, match=r"in/a\.JPG and in/a\.png; rename") as caught:
        find_images(tmp_path)
    assert "b.png" not in str(caught.value)
    touch(tmp_path, *(f"{stem}.{suffix}" for stem in "wxyz" for suffix in ("png", "bmp")))
    with pytest.raises(UserError, match=r"w\.bmp and w\.png, x\.bmp and x\.png, and 2 more"):
        find_images(tmp_path)
    touch(tmp_path / "é", *(unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")))
    with pytest.raises(UserError, match="share one name"):
        find_images(tmp_path / "é")


def test_folders_without_images_are_named(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    touch(tmp_path, "file", "none/deep/notes.txt", "none/.hidden/x.png")
    for name, reason in (
        ("missing", "missing does not exist"),
        ("file", "file is not a folder"),
        ("none", "below .*none"),
    ):
        with pytest.raises(UserError, match=reason):
            find_images(tmp_path / name)
    monkeypatch.setattr(os, "scandir", denied)  # root may read everything
    with pytest.raises(UserError, match=f"{tmp_path.name} cannot be read: Permission denied"):
        find_images(tmp_path)


def test_links_neither_loop_nor_repeat(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    touch(tmp_path / "set", "real/x.png", "y.png")
    touch(tmp_path, "elsewhere/z.png", "elsewhere/one.png")
    links = {"real/up": "..", "again": "real", "self.png": "self.png"}
    links |= {"far": tmp_path / "elsewhere"}
    links |= {"linked.png": tmp_path / "elsewhere" / "one.png", "gone.png": "nowhere.png"}
    for link, target in links.items():
        (tmp_path / "set" / link).symlink_to(target)
    assert [*find_images(tmp_path / "set")] == [
        "far+one",
        "far+z",
        "gone",
        "linked",
        "real+x",
        "self",
        "y",
    ]
    for name in ("gone.png", "self.png"):
        refused(tmp_path / "set" / name, "cannot be opened")
    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read everything
    refused(tmp_path / "set" / "y.png", "cannot be opened: Permission denied")


# What is read

LOSSLESS_WEBP = (cv2.IMWRITE_WEBP_QUALITY, 101)
GRAY, RGB, RGBA = made(1), made(3), made(4)
GRAY_16, RGB_16, RGBA_16 = (made(channels, np.uint16) for channels in (1, 3, 4))
OPAQUE = np.full(SIZE, 65535, np.uint16)
LOSSLESS = {
    "gray.png": (encoded(".png", GRAY), GRAY),
    "gray16.png": (encoded(".png", GRAY_16), GRAY_16),
    "rgb.png": (encoded(".png", RGB), RGB),
    "rgb16.png": (encoded(".png", RGB_16), RGB_16),
    "opaque16.png": (encoded(".png", np.dstack([RGB_16, OPAQUE])), RGB_16),
    "gray.tif": (tiff(GRAY), GRAY),
    "gray16.tif": (tiff(GRAY_16), GRAY_16),
    "gray16_motorola.tif": (tiff(GRAY_16, byteorder=">"), GRAY_16),
    "gray16_lzw.tif": (encoded(".tif", GRAY_16), GRAY_16),
    "white_is_zero.tif": (tiff(255 - GRAY, photometric="miniswhite"), GRAY),
    "rgb.tif": (tiff(RGB), RGB),
    "rgb_lzw.tif": (encoded(".tif", RGB), RGB),
    "big.tif": (tiff(RGB, bigtiff=True), RGB),
    "rgb16.tif": (tiff(RGB_16), RGB_16),
    "rgb16_motorola.tif": (tiff(RGB_16, byteorder=">"), RGB_16),
    "rgb16_lzw.tif": (encoded(".tif", RGB_16), RGB_16),
    "rgb.webp": (encoded(".webp", RGB, *LOSSLESS_WEBP), RGB),
    "gray.bmp": (encoded(".bmp", GRAY), GRAY),
    "rgb.bmp": (encoded(".bmp", RGB), RGB),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_samples_come_back_as_written(tmp_path, name):
    data, samples = LOSSLESS[name]
    path = written(tmp_path / name, data)
    stored = read_stored(path)
    assert stored.pixels.dtype == samples.dtype
    assert stored.pixels.flags.c_contiguous
    assert np.array_equal(stored.pixels, np.atleast_3d(samples))
    assert stored.notices == ()
    seen = read_8_bits(path)
    assert seen.pixels.flags.c_contiguous
    assert np.array_equal(seen.pixels, bgr(rounded(samples)))
    deep = ("holds 16 bits a sample; they were rounded to 8",)
    assert seen.notices == (deep if samples.dtype == np.uint16 else ())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_are_expanded(tmp_path, bits):
    values = np.arange(2**bits, dtype=np.uint8)
    samples = np.resize(values, (3, 8))
    each = np.unpackbits(samples[..., None], axis=2)[..., -bits:]
    rows = np.packbits(each.reshape(3, -1), axis=1)
    expected = bgr(samples * (255 // (2**bits - 1)))
    result = read_8_bits(written(tmp_path / "x.png", png((3, 8), bits, 0, rows)))
    assert np.array_equal(result.pixels, expected)
    # the value 1 is transparent: white
    data = png((3, 8), bits, 0, rows, (b"tRNS", b"\0\1"))
    result = read_8_bits(written(tmp_path / "x.png", data))
    assert np.array_equal(result.pixels, np.where(bgr(samples) == 1, 255, expected))
    assert result.notices == (ON_WHITE,)


def test_palettes_are_expanded(tmp_path):
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    indices = Image.fromarray(GRAY)
    indices.putpalette(palette.tobytes())
    for suffix in (".png", ".tif", ".bmp"):
        indices.save(tmp_path / f"x{suffix}")
        result = read_stored(tmp_path / f"x{suffix}")
        assert np.array_equal(result.pixels, palette[GRAY])
        assert result.notices == ()
    # with transparency
    palette = np.array([[10, 20, 30], [200, 100, 0], [5, 5, 5], [90, 80, 70]], np.uint8)
    alpha = np.array([0, 128, 255, 255], np.uint8)
    chunks = (b"PLTE", palette.tobytes()), (b"tRNS", alpha[:3].tobytes())
    path = written(tmp_path / "x.png", png(SIZE, 8, 3, GRAY % 4, *chunks))
    expected = np.dstack([palette[GRAY % 4], alpha[GRAY % 4]])
    assert np.array_equal(read_stored(path).pixels, expected)
    # 200·128/255 + 255·127/255 = 227.4, 100 -> 177.2, 0 -> 127
    row, column = np.argwhere(GRAY % 4 == 1)[0]
    assert read_8_bits(path).pixels[row, column].tolist() == [127, 177, 227]


UNASSOCIATED = {"extrasamples": ["unassalpha"]}
TALL = np.random.default_rng(0).integers(0, 256, (600, 3, 4), np.uint8)  # in bands of rows
ALPHA = {
    "rgba.png": (encoded(".png", RGBA), RGBA),
    "rgba16.png": (encoded(".png", RGBA_16), RGBA_16),
    "la.png": (png(SIZE, 8, 4, made(2).reshape(SIZE[0], -1)), made(2)),
    "la16.png": (png(SIZE, 16, 4, big_endian(made(2, np.uint16))), made(2, np.uint16)),
    "rgba.tif": (tiff(RGBA, **UNASSOCIATED), RGBA),
    "rgba16.tif": (tiff(RGBA_16, **UNASSOCIATED), RGBA_16),
    "rgba.webp": (encoded(".webp", RGBA, *LOSSLESS_WEBP), RGBA),
    "tall.png": (encoded(".png", TALL), TALL),
}


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_is_read_and_put_on_white(tmp_path, name):
    data, samples = ALPHA[name]
    if name.endswith("webp"):  # OpenCV's writer forgets colour under full transparency
        samples = np.where(samples[..., 3:] == 0, 0, samples).astype(np.uint8)
    path = written(tmp_path / name, data)
    assert np.array_equal(read_stored(path).pixels, samples)
    seen = read_8_bits(path)
    colour = samples[..., 0] if samples.shape[2] == 2 else samples[..., :3]
    mixed = on_white(np.atleast_3d(colour), samples[..., -1])
    assert np.array_equal(seen.pixels, bgr(rounded(mixed[..., 0] if colour.ndim == 2 else mixed)))
    assert seen.notices[0] == ON_WHITE


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("colour", [0, 2])
def test_the_transparent_colour_of_png_is_alpha(tmp_path, dtype, colour):
    bits = 8 * np.dtype(dtype).itemsize
    samples = made(1 if colour == 0 else 3, dtype)
    samples[3, 4] = samples[7, 8] = key = samples[0, 0]
    # one channel beside it: only equality of all channels counts, and of both bytes
    samples[1, 1] = key - np.array([0, 0, 1] if colour else 1, dtype)
    rows = big_endian(samples) if bits == 16 else samples.reshape(SIZE[0], -1)
    named = np.atleast_1d(key).astype(">u2").tobytes()
    data = png(SIZE, bits, colour, rows, (b"tRNS", named))
    pixels = read_stored(written(tmp_path / "x.png", data)).pixels
    assert np.array_equal(pixels[..., :-1], np.atleast_3d(samples))
    hidden = (np.atleast_3d(samples) == key).all(2)
    assert (hidden[3, 4], hidden[1, 1]) == (True, False)
    assert np.array_equal(pixels[..., -1], np.where(hidden, 0, np.iinfo(dtype).max))


# Written by hand: what must be seen when a camera stored 1 2 3 over 4 5 6.
UPRIGHT = {
    1: ["123", "456"],
    2: ["321", "654"],
    3: ["654", "321"],
    4: ["456", "123"],
    5: ["14", "25", "36"],
    6: ["41", "52", "63"],
    7: ["63", "52", "41"],
    8: ["36", "25", "14"],
}
TURNED = ["x.jpg", "x.png", "x16.png", "x.tif", "x16.tif", "gray16.tif", "planar16.tif", "x.webp"]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", TURNED)
def test_exif_rotation_is_applied(tmp_path, name, orientation):
    path, step, dtype = tmp_path / name, *((10_000, np.uint16) if "16" in name else (40, np.uint8))
    cells = np.array([[1, 2, 3], [4, 5, 6]]) * step
    stored = np.kron(cells, np.ones((8, 8), int)).astype(dtype)
    if "gray" not in name:
        stored = np.dstack([stored] * 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if "planar" in name:
        planes = np.moveaxis(stored, -1, 0)
        written(path, tiff(planes, orientation, planarconfig="separate", photometric="rgb"))
    elif name.endswith("tif"):
        written(path, tiff(stored, orientation))
    elif "16" in name:
        chunk = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        written(path, png(stored.shape[:2], 16, 2, big_endian(stored), chunk))
    else:
        saved(path, stored, exif=exif, quality=98)
    result = read_stored(path)
    expected = np.array([[int(cell) for cell in row] for row in UPRIGHT[orientation]])
    height, width = expected.shape
    assert result.pixels.shape[:2] == (8 * height, 8 * width)
    seen = result.pixels.reshape(height, 8, width, 8, -1).mean((1, 3, 4))
    assert np.array_equal(np.rint(seen / step), expected)
    assert result.notices == ()
    if name == "x.jpg":  # where BasicSR turns, too
        assert header_of(path)[:2] == cv2.imread(str(path)).shape[:2] == result.pixels.shape[:2]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_deep_tiff_is_turned_once_by_any_opencv(tmp_path, monkeypatch, orientation):
    path = written(tmp_path / "x.tif", tiff(RGB_16, orientation))
    as_installed = read_stored(path).pixels
    monkeypatch.setattr(cv2, "imdecode", lambda *_: bgr(RGB_16))  # one that does not turn
    assert np.array_equal(read_stored(path).pixels, as_installed)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: bgr(RGB_16) ^ 256)
    refused(path, "Pillow and OpenCV read different samples")


def frames(kind: str) -> bytes:
    file, first, second = io.BytesIO(), Image.fromarray(RGB), Image.fromarray(255 - RGB)
    first.save(file, kind, save_all=True, append_images=[second], lossless=True)
    return file.getvalue()


END = png_chunk(b"IEND", b"")
EXIF = png_chunk(b"eXIf", b"nonsense that is not a TIFF header")
SEVERAL = "holds more than one image; the first was read"
NOTICED = [
    ("x.jpg", encoded(".png", RGB), "is named as JPEG and holds PNG"),
    ("x.tif", frames("TIFF"), SEVERAL),
    ("x.webp", frames("WebP"), SEVERAL),
    ("x.png", frames("PNG"), SEVERAL),
    (
        "x.png",
        encoded(".png", RGB).replace(END, EXIF + END),
        "has EXIF data that cannot be read; it was not rotated",
    ),
]


@pytest.mark.parametrize(("name", "data", "notice"), NOTICED)
def test_what_a_user_may_not_expect_is_noticed(tmp_path, name, data, notice):
    result = read_stored(written(tmp_path / name, data))
    assert np.array_equal(result.pixels, RGB)
    assert result.notices == (notice,)


# What is refused


def refused(path: Path, reason: str, **options) -> str:
    with pytest.raises(ImageError, match=reason) as caught:
        read_8_bits(path, **options)
    assert str(caught.value) == f"{path} {caught.value.reason}"
    error = pickle.loads(pickle.dumps(caught.value))  # it comes from other processes
    assert (str(error), error.reason) == (str(caught.value), caught.value.reason)
    return caught.value.reason


CUT = {
    **{name: data for name, (data, _) in LOSSLESS.items() if name.startswith("rgb")},
    "x.jpg": encoded(".jpg", RGB),
    "progressive.jpg": encoded(".jpg", RGB, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "lossy.webp": encoded(".webp", RGB, cv2.IMWRITE_WEBP_QUALITY, 90),
}


@pytest.mark.parametrize("name", CUT)
def test_incomplete_files_are_refused(tmp_path, name):
    path, data = tmp_path / name, CUT[name]
    assert read_8_bits(written(path, data)).pixels.shape == (*SIZE, 3)
    half = len(data) // 2
    ends = [len(data) // 20, half, 9 * len(data) // 10]
    ends += [] if name.endswith(("tif", "bmp")) else [-1, -2]
    for end in ends:
        refused(written(path, data[:end]), "cut short")
    if name.endswith(("png", "jpg")):  # the second half never arrived
        refused(written(path, data[:half] + bytes(len(data) - half)), "cut short|damaged")


def test_a_complete_thumbnail_does_not_hide_a_cut_jpeg(tmp_path):
    body = b"Exif\0\0" + bytes(8) + encoded(".jpg", RGB)
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    data = encoded(".jpg", RGB)
    whole = data[:2] + segment + data[2:]
    assert read_8_bits(written(tmp_path / "x.jpg", whole)).pixels.shape == (*SIZE, 3)
    refused(written(tmp_path / "x.jpg", whole[:-60]), "cut short")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
def test_what_is_no_image_or_too_small_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for data, reason in (
        (b"", "zero bytes"),
        (b"<html>404 Not Found</html>", "is not an image"),
        (b"BMW and other cars, in alphabetic order", "cannot be decoded"),
        (encoded(".gif", RGB), "is not an image"),
    ):
        refused(written(path, data), reason)
    refused(tmp_path / f"missing{suffix}", "cannot be opened: No such file")
    refused(tmp_path, "is not a file")
    saved(path, np.zeros((1, 1, 3), np.uint8))
    refused(path, "is too small: 1 x 1")
    saved(path, np.zeros((12, 40, 3), np.uint8))
    assert read_8_bits(path, least=12).pixels.shape == (12, 40, 3)
    refused(path, "40 x 12 pixels, both sides must be 13", least=13)


HUGE = 50_000


def huge_jpeg() -> bytes:
    data = bytearray(encoded(".jpg", RGB))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, HUGE, HUGE)
    return bytes(data)


def huge_webp() -> bytes:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + (16_382).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_tag(data: bytes, before: tuple[int, ...], after: tuple[int, ...]) -> bytes:
    """Change an entry of a TIFF file: tag, type, count, value."""
    entries = [struct.pack("<HHII", *entry) for entry in (before, after)]
    assert entries[0] in data
    return data.replace(*entries)


def huge_tiff(samples: np.ndarray) -> bytes:
    data = tiff(samples)
    for tag, side in ((256, SIZE[1]), (257, SIZE[0])):
        data = with_tag(data, (tag, 4, 1, side), (tag, 4, 1, HUGE))
    return data


CLAIMS = {
    "x.png": png((HUGE, HUGE), 8, 2, RGB.reshape(SIZE[0], -1)),
    "x.jpg": huge_jpeg(),
    "x.tif": huge_tiff(RGB),
    "x16.tif": huge_tiff(RGB_16),
    "x.webp": huge_webp(),
}


def test_absurd_sizes_are_refused_by_the_header(tmp_path, monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded before its size was checked")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load_prepare", decoded)
    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", decoded)
    monkeypatch.setattr(cv2, "imdecode", decoded)
    for name, data in CLAIMS.items():
        refused(written(tmp_path / name, data), "claims .* pixels; at most 160,000,000")


def test_small_files_do_not_fill_the_memory(tmp_path):
    for side, colour in ((9000, 2), (6000, 3)):  # palettes become four channels
        data = png((side, side), 8, colour, RGB.reshape(SIZE[0], -1), (b"PLTE", bytes(3)))
        reason = f"{side} x {side} pixels in .* more than images compress"
        refused(written(tmp_path / "x.png", data), reason)
    data = encoded(".jpg", RGB, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = data[data.rindex(b"\xff\xda") : -2]
    refused(written(tmp_path / "x.jpg", data[:-2] + 24 * last + data[-2:]), "more than 24 scans")
    with pytest.raises(ImageError, match="more than 24 scans"):  # before it is decoded for its end
        read_stored(written(tmp_path / "x.jpg", data[:-2] + 24 * last))
    path = written(tmp_path / "x.png", encoded(".png", RGB))
    os.truncate(path, images.MAX_BYTES // 2)  # a hole: nothing is written
    refused(path, "most of its bytes are not there")
    os.truncate(path, images.MAX_BYTES + 1)
    refused(path, "is a file of 1,280,000,001 bytes")


def test_memory_is_a_few_times_that_of_the_pixels(tmp_path):
    data = png((1000, 1000), 8, 0, np.zeros((1000, 1000), np.uint8), (b"tRNS", b"\0\1"))
    path = written(tmp_path / "x.png", data)
    tracemalloc.start()
    try:
        pixels = read_8_bits(path).pixels
        assert tracemalloc.get_traced_memory()[1] < 8e6
        tracemalloc.reset_peak()
        pixel_digest(pixels)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


OTHER_SAMPLES = [
    (tiff(GRAY.astype(np.float32)), "32-bit floating-point"),
    (tiff(RGB.astype(np.float32)), "32-bit floating-point"),
    (encoded(".tif", RGB.astype(np.float32)), "32-bit floating-point"),
    (tiff(GRAY.astype(np.uint32)), "32-bit integer"),
    (tiff(RGB.astype(np.uint32)), "32-bit integer"),
    (tiff(GRAY.astype(np.int8)), "8-bit signed integer"),
    (with_tag(tiff(GRAY_16), (258, 3, 1, 16), (258, 3, 1, 12)), "12-bit integer"),
    (tiff(GRAY_16, photometric="miniswhite"), "zero for white"),
    (tiff(RGBA_16, extrasamples=["assocalpha"]), "multiplied by alpha"),
    (tiff(RGBA, photometric="separated"), "CMYK colours: convert it to RGB"),
    (tiff(RGB, photometric="cielab"), "LAB colours: convert it to RGB"),
]


def test_samples_of_other_kinds_are_refused(tmp_path):
    for data, reason in OTHER_SAMPLES:
        refused(written(tmp_path / "x.tif", data), reason)


# What is read for upscaling alone


@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_that_lacks_its_end_alone_is_upscaled_with_a_notice(tmp_path, lost):
    data = encoded(".jpg", RGB)
    whole = read_stored(written(tmp_path / "x.jpg", data))
    cut = read_stored(written(tmp_path / "x.jpg", data[:-lost]))
    assert np.array_equal(whole.pixels, cut.pixels)
    assert (len(whole.notices), len(cut.notices)) == (0, 1)
    assert "lacks the end of the JPEG file" in cut.notices[0]
    with pytest.raises(ImageError, match="cut short"):
        read_stored(written(tmp_path / "x.jpg", data[:-20]))


def test_cmyk_with_an_unusable_profile_is_upscaled_by_a_rule(tmp_path):
    for profile in (b"not a profile", None):
        Image.fromarray(RGBA, "CMYK").save(tmp_path / "x.jpg", icc_profile=profile)
        refused(tmp_path / "x.jpg", "CMYK colours")
        (notice,) = read_stored(tmp_path / "x.jpg").notices
        assert "a rule of thumb, without a usable profile" in notice


# Headers


def header_of(path: Path) -> tuple:
    with path.open("rb") as file:
        return read_header(file)


def test_headers_tell_what_opencv_decodes(tmp_path):
    for suffix in ("png", "jpg", "bmp", "webp", "tif", "ppm"):
        file = tmp_path / f"a.{suffix}"
        assert cv2.imwrite(str(file), np.zeros((5, 9, 3), np.uint8))
        assert header_of(file) == (5, 9, False, False, False), suffix
    for suffix in ("png", "tif"):
        for channels in (1, 3, 4):
            file = tmp_path / f"deep{channels}.{suffix}"
            assert cv2.imwrite(str(file), np.full((5, 9, channels), 40_000, np.uint16))
            assert header_of(file) == (5, 9, channels == 1, channels == 4, True), file
