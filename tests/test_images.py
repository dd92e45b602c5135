import os
import pickle
import struct
import unicodedata
import zlib
from io import BytesIO
from pathlib import Path, PurePath

import cv2
import numpy as np
import pytest
from PIL import Image

from dlgsanet_arch.data import finding, images
from dlgsanet_arch.data.finding import ImageEntry, find_images, image_key
from dlgsanet_arch.data.images import ImageError, read_image, read_stored
from dlgsanet_arch.errors import UserError

SIZE = (20, 30)


@pytest.fixture(autouse=True)
def _silent(capfd):
    yield
    assert capfd.readouterr() == ("", "")


def made(channels: int, dtype: type = np.uint8, smooth: bool = False) -> np.ndarray:
    """An image of SIZE: noise of all values, or a slope that lossy formats keep."""
    white = np.iinfo(dtype).max
    shape = SIZE if channels == 1 else (*SIZE, channels)
    if not smooth:
        return np.random.default_rng(channels).integers(0, white, shape, dtype, endpoint=True)
    slope = np.add.outer(np.arange(SIZE[0]) * 4, np.arange(SIZE[1]) * 5)
    return slope.astype(dtype) if channels == 1 else np.dstack([slope] * channels).astype(dtype)


def bgr(rgb: np.ndarray) -> np.ndarray:
    """What read_image makes of gray or RGB samples."""
    return np.dstack([rgb] * 3) if rgb.ndim == 2 else rgb[..., ::-1]


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    white = np.iinfo(colour.dtype).max
    share = alpha[..., None].astype(np.float64) / white
    return np.floor(colour * share + white * (1 - share) + 0.5).astype(colour.dtype)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def saved(path: Path, samples: np.ndarray, **options) -> Path:
    """Write by Pillow."""
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


def tiff(samples: np.ndarray, order: str = "<", tags: dict[int, int] | None = None) -> bytes:
    """Write an uncompressed TIFF file by hand, in one of the two byte orders."""
    height, width = samples.shape[:2]
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    photometric = 1 if channels < 3 else 2
    entries = {256: width, 257: height, 258: 0, 259: 1, 262: photometric, 273: 0, 277: channels}
    entries |= {278: height, 279: len(data)}
    bits = [samples.itemsize * 8] * channels
    if tags and 258 in tags:
        bits = [tags[258]] * channels
    entries |= {tag: value for tag, value in (tags or {}).items() if tag != 258}
    after = 8 + 2 + 12 * len(entries) + 4
    entries[273] = after + 8
    lines = b""
    for tag, value in sorted(entries.items()):
        if tag == 258 and channels > 2:
            lines += struct.pack(order + "HHII", tag, 3, channels, after)
        elif tag == 258:
            packed = bits + [0] * (2 - channels)
            lines += struct.pack(order + "HHIHH", tag, 3, channels, *packed)
        elif tag in (256, 257, 273, 278, 279):
            lines += struct.pack(order + "HHII", tag, 4, 1, value)
        else:
            lines += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    table = struct.pack(order + "H", len(entries)) + lines + struct.pack(order + "I", 0)
    widths = struct.pack(order + "4H", *(bits + [0] * 4)[:4])
    return start + table + widths + data


# What is found


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_are_found_in_natural_order(tmp_path):
    touch(tmp_path, "a10.png", "a2.PNG", "B1.jpeg", "c.JPG", "d.tif", "e.TIFF", "f.webp", "g.bmp")
    touch(tmp_path, "set 10/x.png", "set 2/x.png", "set 2/sub/x.png", "Ünïcode/夜景 1.png", "a.png")
    touch(tmp_path, ".hidden.png", ".git/x.png", "__MACOSX/._x.png")
    touch(tmp_path, "notes.txt", "png", "x.png.part")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    names = ["a.png", "a2.PNG", "a10.png", "B1.jpeg", "c.JPG", "d.tif", "e.TIFF", "f.webp"]
    names += ["g.bmp", "set 2/sub/x.png", "set 2/x.png", "set 10/x.png", "Ünïcode/夜景 1.png"]
    assert [image.path.relative_to(tmp_path).as_posix() for image in found] == names
    assert [image.key for image in found[:4]] == ["a", "a2", "a10", "B1"]
    assert found[11] == ImageEntry(tmp_path / "set 10" / "x.png", "set%2010+x")


def test_equal_numbers_have_an_order_too(tmp_path):
    touch(tmp_path, "1.png", "01.png", "001.png", "A.png", "a.png")
    found = [image.path.name for image in find_images(tmp_path)]
    assert found == ["001.png", "01.png", "1.png", "A.png", "a.png"]


@pytest.mark.parametrize(
    ("relative", "key"),
    [
        ("0801.png", "0801"),
        ("city/night_1-b.png", "city+night_1-b"),
        ("city/night 1.png", "city+night%201"),
        ("img.v2.png", "img%2Ev2"),
        ("a+b%~.png", "a%2Bb%25%7E"),
        ("é.png", "%C3%A9"),
        (unicodedata.normalize("NFD", "é.png"), "%C3%A9"),
        (os.fsdecode(b"\xff.png"), "%FF"),
    ],
)
def test_keys(relative, key):
    assert image_key(PurePath(relative)) == key


def test_keys_of_long_names_differ_and_fit():
    names = ["夜" * 80, "夜" * 79 + "景", "/".join(["folder"] * 100)]
    keys = [image_key(PurePath(f"{name}.png")) for name in names]
    assert len(set(keys)) == 3
    assert {len(key) for key in keys} == {finding.KEY_LENGTH}


def test_basicsr_reads_the_keys_back(tmp_path):
    from basicsr.data.data_util import paired_paths_from_lmdb
    from basicsr.utils.file_client import FileClient
    from basicsr.utils.lmdb_util import LmdbMaker

    names = ["a/b", "a+b", "a b", "a.b", "a%2Fb", "a", "夜景" * 40, "x/1", "y/1"]
    keys = [image_key(PurePath(f"{name}.png")) for name in names]
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


def test_equal_stems_are_refused_by_name(tmp_path):
    touch(tmp_path, "in/a.png", "in/a.JPG", "in/b.png", "c.png", "b.png")
    with pytest.raises(UserError, match=r"in/a\.JPG and in/a\.png; rename") as caught:
        find_images(tmp_path)
    assert "b.png" not in str(caught.value)
    touch(tmp_path, *(f"{stem}.{suffix}" for stem in "wxyz" for suffix in ("png", "bmp")))
    with pytest.raises(UserError, match=r"w\.bmp and w\.png, x\.bmp and x\.png, and 2 more"):
        find_images(tmp_path)


def test_stems_that_look_equal_are_refused(tmp_path):
    touch(tmp_path, *(unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")))
    with pytest.raises(UserError, match="share one name"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "missing does not exist"),
        ("file", "file is not a folder"),
        ("none", "below .*none"),
    ],
)
def test_folders_without_images_are_named(tmp_path, name, reason):
    touch(tmp_path, "file", "none/deep/notes.txt", "none/.hidden/x.png")
    with pytest.raises(UserError, match=reason):
        find_images(tmp_path / name)


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    whole = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    with pytest.raises(UserError, match="locked cannot be read: Permission denied"):
        find_images(tmp_path)


def test_links_neither_loop_nor_repeat(tmp_path):
    touch(tmp_path / "set", "real/x.png", "y.png")
    touch(tmp_path, "elsewhere/z.png", "elsewhere/one.png")
    links = {"real/up": "..", "again": "real", "self.png": "self.png"}
    links |= {"far": tmp_path / "elsewhere"}
    links |= {"linked.png": tmp_path / "elsewhere" / "one.png", "gone.png": "nowhere.png"}
    for link, target in links.items():
        (tmp_path / "set" / link).symlink_to(target)
    keys = [image.key for image in find_images(tmp_path / "set")]
    assert keys == ["far+one", "far+z", "gone", "linked", "real+x", "self", "y"]
    for name in ("gone.png", "self.png"):
        with pytest.raises(ImageError, match=f"{name} cannot be opened"):
            read_image(tmp_path / "set" / name)


# What is read


LOSSLESS = {
    "gray.png": lambda: (encoded(".png", made(1)), made(1)),
    "gray16.png": lambda: (encoded(".png", made(1, np.uint16)), made(1, np.uint16)),
    "rgb.png": lambda: (encoded(".png", made(3)), made(3)),
    "rgb16.png": lambda: (encoded(".png", made(3, np.uint16)), made(3, np.uint16)),
    "gray.tif": lambda: (tiff(made(1)), made(1)),
    "gray16.tif": lambda: (tiff(made(1, np.uint16)), made(1, np.uint16)),
    "gray16_motorola.tif": lambda: (tiff(made(1, np.uint16), ">"), made(1, np.uint16)),
    "gray16_lzw.tif": lambda: (encoded(".tif", made(1, np.uint16)), made(1, np.uint16)),
    "white_is_zero.tif": lambda: (tiff(255 - made(1), tags={262: 0}), made(1)),
    "rgb.tif": lambda: (tiff(made(3)), made(3)),
    "rgb_lzw.tif": lambda: (encoded(".tif", made(3)), made(3)),
    "rgb16.tif": lambda: (tiff(made(3, np.uint16)), made(3, np.uint16)),
    "rgb16_motorola.tif": lambda: (tiff(made(3, np.uint16), ">"), made(3, np.uint16)),
    "rgb16_lzw.tif": lambda: (encoded(".tif", made(3, np.uint16)), made(3, np.uint16)),
    "rgb16_deflate.tiff": lambda: (
        encoded(".tiff", made(3, np.uint16), cv2.IMWRITE_TIFF_COMPRESSION, 8),
        made(3, np.uint16),
    ),
    "rgb.webp": lambda: (encoded(".webp", made(3), cv2.IMWRITE_WEBP_QUALITY, 101), made(3)),
    "gray.bmp": lambda: (encoded(".bmp", made(1)), made(1)),
    "rgb.bmp": lambda: (encoded(".bmp", made(3)), made(3)),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_samples_come_back_as_written(tmp_path, name):
    data, samples = LOSSLESS[name]()
    result = read_image(written(tmp_path / name, data))
    assert result.pixels.dtype == samples.dtype
    assert result.pixels.flags.c_contiguous
    assert np.array_equal(result.pixels, bgr(samples))
    assert result.notices == ()


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossy_formats_come_back_nearly(tmp_path, suffix, channels):
    samples = made(channels, smooth=True)
    if channels == 3:
        samples = samples // np.array([1, 2, 3], np.uint8)
    if suffix == ".webp" and channels == 1:
        samples = np.dstack([samples] * 3)  # WebP has no gray
    result = read_image(saved(tmp_path / f"x{suffix}", samples, quality=98))
    assert np.abs(result.pixels.astype(int) - bgr(samples)).max() <= 8
    assert result.pixels.dtype == np.uint8
    assert result.notices == ()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_are_expanded(tmp_path, bits):
    values = np.arange(2**bits, dtype=np.uint8)
    samples = np.resize(values, (3, 8))
    each = np.unpackbits(samples[..., None], axis=2)[..., -bits:]
    rows = np.packbits(each.reshape(3, -1), axis=1)
    expected = bgr(samples * (255 // (2**bits - 1)))
    result = read_image(written(tmp_path / "x.png", png((3, 8), bits, 0, rows)))
    assert np.array_equal(result.pixels, expected)
    # the value 1 is transparent: white
    data = png((3, 8), bits, 0, rows, (b"tRNS", b"\0\1"))
    result = read_image(written(tmp_path / "x.png", data))
    assert np.array_equal(result.pixels, np.where(bgr(samples) == 1, 255, expected))
    assert len(result.notices) == 1


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_bilevel_images_are_expanded(tmp_path, suffix):
    samples = made(1) > 127
    result = read_image(saved(tmp_path / f"x{suffix}", samples))
    assert np.array_equal(result.pixels, bgr(samples * np.uint8(255)))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_palettes_are_expanded(tmp_path, suffix):
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    indices = Image.fromarray(made(1))
    indices.putpalette(palette.tobytes())
    indices.save(tmp_path / f"x{suffix}")
    result = read_image(tmp_path / f"x{suffix}")
    assert np.array_equal(result.pixels, bgr(palette[made(1)]))
    assert result.notices == ()


def test_transparent_palettes_are_put_on_white(tmp_path):
    palette = np.array([[10, 20, 30], [200, 100, 0], [5, 5, 5], [90, 80, 70]], np.uint8)
    alpha = np.array([0, 128, 255, 255], np.uint8)
    indices = made(1) % 4
    chunks = (b"PLTE", palette.tobytes()), (b"tRNS", alpha[:3].tobytes())
    result = read_image(written(tmp_path / "x.png", png(SIZE, 8, 3, indices, *chunks)))
    assert np.array_equal(result.pixels, bgr(on_white(palette[indices], alpha[indices])))
    # 200·128/255 + 255·127/255 = 227.4, 100 -> 177.2, 0 -> 127
    row, column = np.argwhere(indices == 1)[0]
    assert result.pixels[row, column].tolist() == [127, 177, 227]
    assert result.notices == ("has transparent parts; it was composited on white",)


ALPHA = {
    "rgba.png": lambda: (encoded(".png", made(4)), made(4)),
    "rgba16.png": lambda: (encoded(".png", made(4, np.uint16)), made(4, np.uint16)),
    "la.png": lambda: (png(SIZE, 8, 4, made(2).reshape(SIZE[0], -1)), made(2)),
    "la16.png": lambda: (png(SIZE, 16, 4, big_endian(made(2, np.uint16))), made(2, np.uint16)),
    "rgba.tif": lambda: (tiff(made(4), tags={338: 2}), made(4)),
    "rgba16.tif": lambda: (tiff(made(4, np.uint16), tags={338: 2}), made(4, np.uint16)),
    "rgba.webp": lambda: (encoded(".webp", made(4), cv2.IMWRITE_WEBP_QUALITY, 101), made(4)),
}


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_is_put_on_white(tmp_path, name):
    data, samples = ALPHA[name]()
    if name.endswith("webp"):  # OpenCV's writer forgets colour under full transparency
        samples = np.where(samples[..., 3:] == 0, 0, samples).astype(np.uint8)
    result = read_image(written(tmp_path / name, data))
    colour = np.dstack([samples[..., 0]] * 3) if samples.shape[2] == 2 else samples[..., :3]
    assert result.pixels.dtype == samples.dtype
    assert np.array_equal(result.pixels, bgr(on_white(colour, samples[..., -1])))
    assert result.notices == ("has transparent parts; it was composited on white",)


def test_alpha_in_bands_of_rows(tmp_path):
    samples = np.random.default_rng(0).integers(0, 256, (600, 3, 4), np.uint8)
    result = read_image(saved(tmp_path / "x.png", samples))
    assert np.array_equal(result.pixels, bgr(on_white(samples[..., :3], samples[..., 3])))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_opaque_alpha_goes_without_a_notice(tmp_path, dtype):
    samples = made(4, dtype)
    samples[..., 3] = np.iinfo(dtype).max
    result = read_image(written(tmp_path / "x.png", encoded(".png", samples)))
    assert np.array_equal(result.pixels, bgr(samples[..., :3]))
    assert result.notices == ()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", [0, 2])
def test_the_transparent_colour_of_png_is_white(tmp_path, bits, colour):
    dtype = {8: np.uint8, 16: np.uint16}[bits]
    samples = made(1 if colour == 0 else 3, dtype)
    samples[3, 4] = samples[7, 8] = key = samples[0, 0]
    # one channel beside it: only equality of all channels counts, and of both bytes
    samples[1, 1] = key
    samples[1, 1, ...] = samples[1, 1] - np.array([0, 0, 1] if colour else 1, dtype)
    rows = big_endian(samples) if bits == 16 else samples.reshape(SIZE[0], -1)
    named = np.atleast_1d(key).astype(">u2").tobytes()
    data = png(SIZE, bits, colour, rows, (b"tRNS", named))
    result = read_image(written(tmp_path / "x.png", data))
    hidden = (bgr(samples) == np.atleast_1d(key)[::-1]).all(2)
    assert hidden[3, 4]
    assert not hidden[1, 1]
    white = np.iinfo(dtype).max
    assert np.array_equal(result.pixels, np.where(hidden[..., None], white, bgr(samples)))
    assert len(result.notices) == 1


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


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    "name", ["x.jpg", "x.png", "x16.png", "x.tif", "x16.tif", "gray16.tif", "x.webp"]
)
def test_exif_rotation_is_applied(tmp_path, name, orientation):
    deep = "16" in name
    cells = np.array([[1, 2, 3], [4, 5, 6]]) * (10_000 if deep else 40)
    stored = np.kron(cells, np.ones((8, 8), int)).astype(np.uint16 if deep else np.uint8)
    if "gray" not in name:
        stored = np.dstack([stored] * 3)
    path = tmp_path / name
    exif = Image.Exif()
    exif[0x0112] = orientation
    if name.endswith("tif"):
        written(path, tiff(stored, tags={274: orientation}))
    elif deep:
        chunk = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        written(path, png(stored.shape[:2], 16, 2, big_endian(stored), chunk))
    else:
        saved(path, stored, exif=exif, quality=98)
    result = read_image(path)
    expected = np.array([[int(cell) for cell in row] for row in UPRIGHT[orientation]])
    height, width = expected.shape
    assert result.pixels.shape == (8 * height, 8 * width, 3)
    seen = result.pixels.reshape(height, 8, width, 8, 3).mean((1, 3, 4))
    assert np.array_equal(np.rint(seen / (10_000 if deep else 40)), expected)
    assert result.notices == ()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_deep_tiff_is_turned_once_by_any_opencv(tmp_path, monkeypatch, orientation):
    samples = made(3, np.uint16)
    path = written(tmp_path / "x.tif", tiff(samples, tags={274: orientation}))
    as_installed = read_image(path).pixels
    monkeypatch.setattr(cv2, "imdecode", lambda *_: bgr(samples))  # one that does not turn
    assert np.array_equal(read_image(path).pixels, as_installed)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: bgr(samples) ^ 256)
    refused(path, "Pillow and OpenCV read different samples")


def test_exif_data_that_cannot_be_read_is_noticed(tmp_path):
    broken = png_chunk(b"eXIf", b"nonsense that is not a TIFF header")
    end = png_chunk(b"IEND", b"")
    data = encoded(".png", made(3)).replace(end, broken + end)
    result = read_image(written(tmp_path / "x.png", data))
    assert np.array_equal(result.pixels, bgr(made(3)))
    assert result.notices == ("has EXIF data that cannot be read; it was not rotated",)


@pytest.mark.parametrize("suffix", [".tif", ".webp", ".png"])
def test_the_first_of_several_images_is_read(tmp_path, suffix):
    frames = [Image.fromarray(made(3)), Image.fromarray(255 - made(3))]
    frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    result = read_image(tmp_path / f"x{suffix}")
    assert np.array_equal(result.pixels, bgr(made(3)))
    assert result.notices == ("holds more than one image; the first was read",)


def test_content_decides_on_the_format(tmp_path):
    result = read_image(written(tmp_path / "x.jpg", encoded(".png", made(3))))
    assert np.array_equal(result.pixels, bgr(made(3)))
    assert result.notices == ("is named as JPEG and holds PNG",)


# What is refused


def refused(path: Path, reason: str, **options) -> str:
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path, **options)
    assert str(caught.value) == f"{path} {caught.value.reason}"
    assert caught.value.path == path
    return caught.value.reason


CUT = {
    "x.png": lambda: encoded(".png", made(3)),
    "x16.png": lambda: encoded(".png", made(3, np.uint16)),
    "x.jpg": lambda: encoded(".jpg", made(3)),
    "progressive.jpg": lambda: encoded(".jpg", made(3), cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "x.tif": lambda: tiff(made(3)),
    "x16.tif": lambda: tiff(made(3, np.uint16)),
    "lzw.tif": lambda: encoded(".tif", made(3)),
    "lzw16.tif": lambda: encoded(".tif", made(3, np.uint16)),
    "x.webp": lambda: encoded(".webp", made(3), cv2.IMWRITE_WEBP_QUALITY, 90),
    "lossless.webp": lambda: encoded(".webp", made(3), cv2.IMWRITE_WEBP_QUALITY, 101),
    "x.bmp": lambda: encoded(".bmp", made(3)),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_cut_files_are_refused(tmp_path, name, share):
    data = CUT[name]()
    assert read_image(written(tmp_path / name, data)).pixels.shape == (*SIZE, 3)
    refused(written(tmp_path / name, data[: int(len(data) * share)]), "cut short")


@pytest.mark.parametrize("name", [name for name in CUT if name.endswith(("png", "jpg", "webp"))])
@pytest.mark.parametrize("lost", [1, 2])
def test_the_last_bytes_are_missed(tmp_path, name, lost):
    refused(written(tmp_path / name, CUT[name]()[:-lost]), "cut short")


@pytest.mark.parametrize("name", ["x.png", "x16.png", "x.jpg", "progressive.jpg"])
def test_files_whose_second_half_never_arrived_are_refused(tmp_path, name):
    data = CUT[name]()
    half = len(data) // 2
    refused(written(tmp_path / name, data[:half] + bytes(len(data) - half)), "cut short|damaged")


def test_a_whole_thumbnail_does_not_hide_a_cut_jpeg(tmp_path):
    thumbnail = encoded(".jpg", made(3))
    body = b"Exif\0\0" + bytes(8) + thumbnail
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    data = encoded(".jpg", made(3, smooth=True))
    whole = data[:2] + segment + data[2:]
    assert read_image(written(tmp_path / "x.jpg", whole)).pixels.shape == (*SIZE, 3)
    refused(written(tmp_path / "x.jpg", whole[:-60]), "cut short")


def test_damaged_png_is_refused(tmp_path):
    data = bytearray(encoded(".png", made(3)))
    data[len(data) // 2] ^= 1
    refused(written(tmp_path / "x.png", bytes(data)), "damaged.*checksum in .*IDAT")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
def test_what_is_no_image_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    refused(written(path, b""), "zero bytes")
    refused(written(path, b"<html>404 Not Found</html>"), "is not an image")
    refused(written(path, b"BMW and other cars, in alphabetic order"), "cannot be decoded")
    gif = BytesIO()
    Image.fromarray(made(1)).save(gif, "GIF")
    refused(written(path, gif.getvalue()), "is not an image")
    refused(tmp_path / f"missing{suffix}", "cannot be opened: No such file")
    (tmp_path / f"folder{suffix}").mkdir()
    refused(tmp_path / f"folder{suffix}", "is not a file")


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path / "x.png", made(3))
    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read everything
    refused(path, "cannot be opened: Permission denied")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
def test_small_images_are_refused(tmp_path, suffix):
    path = saved(tmp_path / f"x{suffix}", np.zeros((1, 1, 3), np.uint8))
    assert "1 x 1" in refused(path, "is too small")
    path = saved(tmp_path / f"x{suffix}", np.zeros((12, 40, 3), np.uint8))
    assert read_image(path, least=12).pixels.shape == (12, 40, 3)
    assert "40 x 12" in refused(path, "both sides must be 13", least=13)


HUGE = 50_000


def huge_jpeg() -> bytes:
    data = encoded(".jpg", made(3))
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", HUGE, HUGE) + data[frame + 4 :]


def huge_webp(chunk: bytes) -> bytes:
    side = 16_383
    bodies = {
        b"VP8X": bytes(4) + (side - 1).to_bytes(3, "little") * 2,
        b"VP8L": b"\x2f" + (side - 1 | side - 1 << 14).to_bytes(4, "little") + bytes(5),
        b"VP8 ": bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", side, side),
    }
    body = b"WEBP" + chunk + struct.pack("<I", 10) + bodies[chunk]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def huge_bmp() -> bytes:
    numbers = (0, 0, 54, 40, HUGE, HUGE, 1, 24, *[0] * 6)
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", *numbers)


CLAIMS = {
    "x.png": lambda: png((HUGE, HUGE), 8, 2, made(3).reshape(SIZE[0], -1)),
    "x.jpg": huge_jpeg,
    "x.tif": lambda: tiff(made(3), tags={256: HUGE, 257: HUGE, 278: HUGE}),
    "x16.tif": lambda: tiff(made(3, np.uint16), tags={256: HUGE, 257: HUGE, 278: HUGE}),
    "extended.webp": lambda: huge_webp(b"VP8X"),
    "lossless.webp": lambda: huge_webp(b"VP8L"),
    "x.webp": lambda: huge_webp(b"VP8 "),
    "x.bmp": huge_bmp,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_absurd_sizes_are_refused_by_the_header(tmp_path, monkeypatch, name):
    def decoded(*_):
        raise AssertionError("decoded before its size was checked")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load_prepare", decoded)
    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", decoded)
    monkeypatch.setattr(cv2, "imdecode", decoded)
    refused(written(tmp_path / name, CLAIMS[name]()), "claims .* pixels; at most 160,000,000")


def test_small_files_do_not_fill_the_memory(tmp_path):
    data = png((9000, 9000), 8, 2, made(3).reshape(SIZE[0], -1))
    refused(written(tmp_path / "x.png", data), "9000 x 9000 pixels in .* more than images compress")
    data = encoded(".jpg", made(3), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = data[data.rindex(b"\xff\xda") : -2]
    refused(written(tmp_path / "x.jpg", data[:-2] + 64 * last + data[-2:]), "more than 64 scans")


def test_files_larger_than_any_image_are_not_read(tmp_path):
    path = written(tmp_path / "x.png", encoded(".png", made(3)))
    os.truncate(path, images.MAX_BYTES + 1)  # a hole: nothing is written
    refused(path, "is a file of 1,280,000,001 bytes")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: tiff(made(1).astype(np.float32), tags={339: 3}), "32-bit floating-point"),
        (lambda: tiff(made(3).astype(np.float32), tags={339: 3}), "32-bit floating-point"),
        (lambda: encoded(".tif", made(3).astype(np.float32)), "32-bit floating-point"),
        (lambda: tiff(made(1).astype(np.uint32)), "32-bit integer"),
        (lambda: tiff(made(3).astype(np.uint32)), "32-bit integer"),
        (lambda: tiff(made(1), tags={339: 2}), "8-bit signed integer"),
        (lambda: tiff(made(1, np.uint16), tags={258: 12}), "12-bit integer"),
        (lambda: tiff(made(1, np.uint16), tags={262: 0}), "zero for white"),
        (lambda: tiff(made(4, np.uint16), tags={338: 1}), "multiplied by alpha"),
        (lambda: tiff(made(4), tags={262: 5}), "CMYK"),
        (lambda: tiff(made(3), tags={262: 8}), "LAB"),
    ],
)
def test_samples_of_other_kinds_are_refused(tmp_path, data, reason):
    refused(written(tmp_path / "x.tif", data()), reason)


def test_cmyk_jpeg_is_refused(tmp_path):
    Image.fromarray(made(4), "CMYK").save(tmp_path / "x.jpg")
    refused(tmp_path / "x.jpg", "CMYK colours: convert it to RGB")


def stored(path: Path, data: bytes) -> images.StoredImage:
    return read_stored(written(path, data))


@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_that_lacks_its_end_alone_is_upscaled_with_a_notice(tmp_path, lost):
    data = encoded(".jpg", made(3))
    whole, cut = (stored(tmp_path / "x.jpg", each) for each in (data, data[:-lost]))
    assert np.array_equal(whole.pixels, cut.pixels)
    assert (len(whole.notices), len(cut.notices)) == (0, 1)
    assert "lacks the end of the JPEG file" in cut.notices[0]
    with pytest.raises(ImageError, match="cut short"):
        stored(tmp_path / "x.jpg", data[:-20])


def test_cmyk_with_an_unusable_profile_is_upscaled_by_a_rule(tmp_path):
    for profile in (b"not a profile", None):
        image = Image.fromarray(made(4), "CMYK")
        image.save(tmp_path / "x.jpg", icc_profile=profile)
        (notice,) = read_stored(tmp_path / "x.jpg").notices
        assert "a rule of thumb, without a usable profile" in notice


@pytest.mark.parametrize("orientation", [1, 6])
def test_deep_tiff_in_planes_is_read(tmp_path, orientation):
    tifffile = pytest.importorskip("tifffile")
    planes = np.moveaxis(made(3, np.uint16), -1, 0)
    tifffile.imwrite(
        tmp_path / "x.tif",
        planes,
        planarconfig="separate",
        photometric="rgb",
        extratags=[(274, 3, 1, orientation, True)],
    )
    upright = np.rot90(made(3, np.uint16), -1 if orientation == 6 else 0)
    assert np.array_equal(read_stored(tmp_path / "x.tif").pixels, upright)


def test_errors_travel_between_processes(tmp_path):
    error = pickle.loads(pickle.dumps(ImageError(tmp_path / "x.png", "is cut short")))
    assert str(error) == f"{tmp_path / 'x.png'} is cut short"
    assert isinstance(error, UserError)
    assert error.reason == "is cut short"
