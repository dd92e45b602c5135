"""`dlgsanet upscale` on real and awkward files, and what its results hold."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from test_inference import checkpoint, image

from dlgsanet_arch.checkpoint import save_checkpoint
from dlgsanet_arch.cli import main
from dlgsanet_arch.data.images import read_stored
from dlgsanet_arch.files import written_atomically
from dlgsanet_arch.inference import Upscaler, writing
from dlgsanet_arch.inference.files import Job, plan

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_checkpoint(checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def expected(weights):
    """What an image should become, by the library."""
    return Upscaler(weights, device="cpu")


def call(weights, source, out, *more):
    return main(
        ["upscale", "-i", str(source), "-o", str(out), "-m", str(weights), "--device", "cpu", *more]
    )


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def save_deep(path, array):
    """Write 16 bits by OpenCV."""
    order = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.ndim == 3 else array
    assert cv2.imwrite(str(path), order)
    return path


def deep_gray_alpha(path, array):
    """Write 16-bit gray and alpha, for which neither library has a writer."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    height, width = array.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0))]
    parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


# What is kept


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (30, 41)], ids=str)
@pytest.mark.parametrize("channels", [0, 2, 3, 4])
def test_8_bits(weights, expected, tmp_path, channels, size):
    array = image(*size, channels)
    source = save(tmp_path / "a.png", array)
    assert call(weights, source, tmp_path / "out") == 0
    made = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert made.shape == (2 * size[0], 2 * size[1], *array.shape[2:])
    assert np.array_equal(made, expected(array))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [0, 3, 4])
def test_16_bits(weights, expected, tmp_path, channels, suffix):
    array = image(70, 21, channels, np.uint16)
    source = save_deep(tmp_path / f"a.{suffix}", array)
    assert call(weights, source, tmp_path / "out") == 0
    made = cv2.imread(str(tmp_path / "out" / f"a.{suffix}"), cv2.IMREAD_UNCHANGED)
    assert made.dtype == np.uint16
    if channels:
        made = made[..., [2, 1, 0, 3][:channels]]
    assert np.array_equal(made, expected(array))
    stored = read_stored(tmp_path / "out" / f"a.{suffix}")
    assert np.array_equal(stored.pixels.squeeze(), made)


def test_16_bit_gray_with_alpha(weights, expected, tmp_path):
    array = image(20, 31, 2, np.uint16)
    source = deep_gray_alpha(tmp_path / "a.png", array)
    assert np.array_equal(read_stored(source).pixels, array)
    assert call(weights, source, tmp_path / "out") == 0
    data = (tmp_path / "out" / "a.png").read_bytes()
    assert (data[24], data[25]) == (16, 4)
    assert np.array_equal(read_stored(tmp_path / "out" / "a.png").pixels, expected(array))
    assert call(weights, source, tmp_path / "out", "--format", "tiff") == 0
    made = tifffile.imread(tmp_path / "out" / "a.tif")
    assert np.array_equal(made, expected(array))


def test_palettes_and_their_transparency(weights, tmp_path):
    indexed = Image.fromarray(image(20, 30)).quantize(16)
    indexed.save(tmp_path / "opaque.png")
    indexed.save(tmp_path / "clear.png", transparency=3)
    assert call(weights, tmp_path, tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "opaque.png") as opaque:
        assert opaque.mode == "RGB"
    with Image.open(tmp_path / "out" / "clear.png") as clear:
        assert clear.mode == "RGBA"
        alpha = np.asarray(clear)[::2, ::2, 3]
    assert ((alpha < 128) == (np.asarray(indexed) == 3)).mean() > 0
    assert alpha.min() < 50
    assert alpha.max() > 200


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif"])
def test_the_format_stays(weights, tmp_path, suffix):
    source = save(tmp_path / f"a.{suffix}", image(30, 40), quality=95)
    assert call(weights, source, tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / f"a.{suffix}") as made, Image.open(source) as before:
        assert made.format == before.format
        assert made.size == (80, 60)


def test_cmyk_is_converted_and_said(weights, tmp_path, capsys):
    rgb = image(30, 40)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    assert call(weights, tmp_path / "a.jpg", tmp_path / "out") == 0
    assert "holds CMYK colours; they were converted to sRGB" in capsys.readouterr().err
    with Image.open(tmp_path / "out" / "a.jpg") as made:
        assert made.mode == "RGB"
        small = np.asarray(made.resize((40, 30), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - rgb).mean() < 15


@pytest.mark.parametrize(
    ("name", "depth"),
    [("a.png", 8), ("a.jpg", 8), ("a.webp", 8), ("a.tif", 8), ("b.png", 16), ("b.tif", 16)],
)
def test_the_colour_profile_stays(weights, tmp_path, name, depth):
    if depth == 8:
        source = save(tmp_path / name, image(9, 12), icc_profile=SRGB)
    else:
        source = tmp_path / name
        pixels = image(9, 12, 3, np.uint16)
        writing.write_image(source, pixels, icc=SRGB)
    assert call(weights, source, tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / name) as made:
        assert made.info["icc_profile"] == SRGB


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_the_image_is_seen_the_same_way_up(weights, tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "A camera"
    exif[0x8769] = {0x9003: "2023:10:02 12:00:00", 0xA002: 24, 0x927C: b"offsets"}
    smooth = image(16, 24)
    source = save(tmp_path / name, smooth, exif=exif.tobytes())
    assert call(weights, source, tmp_path / "out") == 0
    from PIL import ImageOps

    with Image.open(source) as before, Image.open(tmp_path / "out" / name) as after:
        kept = after.getexif()
        assert kept.get(0x0112, 1) == 1
        assert kept[0x010F] == "A camera"
        folder = kept.get_ifd(0x8769)
        assert folder[0x9003] == "2023:10:02 12:00:00"
        assert not {0xA002, 0x927C} & set(folder)
        seen = ImageOps.exif_transpose(before)
        shrunk = after.resize(seen.size, Image.Resampling.BOX)
        apart = np.abs(np.asarray(seen.convert("RGB")).astype(int) - np.asarray(shrunk))
    assert apart.mean() < 8


# Where results go


def test_a_folder_keeps_its_tree_and_its_names(weights, tmp_path, capsys):
    names = ["a.png", "sub/夜景 1.jpg", "sub/deep/é.webp", "sub/old.bmp", "sub/UPPER.PNG"]
    for name in names:
        save(tmp_path / "in" / name, image(8, 10))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    assert call(weights, tmp_path / "in", tmp_path / "out", "--suffix", "_x2") == 0
    found = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == {
        "a_x2.png",
        "sub/夜景 1_x2.jpg",
        "sub/deep/é_x2.webp",
        "sub/old_x2.png",
        "sub/UPPER_x2.PNG",
    }
    said = f"5 images upscaled x2 into {tmp_path / 'out'} by DLGSANet ({weights})\n"
    assert capsys.readouterr().out == said


def test_a_file_by_name(weights, tmp_path):
    source = save(tmp_path / "a.png", image(8, 10))
    assert call(weights, source, tmp_path / "new" / "b.jpg") == 0
    with Image.open(tmp_path / "new" / "b.jpg") as made:
        assert made.format == "JPEG"


def test_what_a_format_cannot_hold_becomes_png(weights, tmp_path, capsys):
    save(tmp_path / "in" / "wide.webp", image(1, 9000))
    save(tmp_path / "in" / "clear.png", image(5, 6, 4)).rename(tmp_path / "in" / "clear.jpg")
    assert call(weights, tmp_path / "in", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"wide.png", "clear.png"}
    said = capsys.readouterr().err
    assert "jpeg holds no transparency: clear.png is written" in said
    assert "webp holds sides up to 16,383" in said
    assert call(weights, tmp_path / "in", tmp_path / "out", "--skip-existing") == 0
    assert "2 skipped" in capsys.readouterr().out
    assert call(weights, tmp_path / "in", tmp_path / "out", "--format", "jpeg") == 1
    assert "clear.jpg cannot be written: jpeg holds no transparency" in capsys.readouterr().err


def test_wishes_that_cannot_be_met_are_named(weights, tmp_path, capsys):
    source = save(tmp_path / "in" / "a.png", image(5, 6))
    save(tmp_path / "in" / "a.jpg", image(5, 6))
    for more, said in (
        ((tmp_path / "none", tmp_path), "none does not exist"),
        ((source, tmp_path / "in"), "a.png: would be replaced by its result"),
        ((source, tmp_path / "a.gif"), "a.gif has no suffix of a format"),
        ((source, tmp_path / "a.jpg", "--format", "png"), "is not named as png"),
        ((source, tmp_path / "out", "--suffix", "/../../x"), "cannot lead to another folder"),
        ((source, tmp_path / "out", "--tile", "3"), "tile must be"),
    ):
        assert call(weights, *more) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_weights_of_the_package_serve_where_none_are_named(tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "a.png", image(5, 6))
    command = ["upscale", "-i", str(source), "-o", str(tmp_path / "out.png"), "--device", "cpu"]
    assert main(command) == 0
    assert cv2.imread(str(tmp_path / "out.png")).shape == (20, 24, 3)
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)  # a package without any
    assert main(command) == 1
    assert "dlgsanet upscale -m" in capsys.readouterr().err


def test_results_of_before_are_no_images_of_now(weights, tmp_path):
    save(tmp_path / "a.png", image(5, 6))
    for _ in range(2):
        assert call(weights, tmp_path, tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    results = tmp_path / "out" / "a.png"
    assert plan(tmp_path, tmp_path / "out") == ([Job(tmp_path / "a.png", results)], {})


@pytest.mark.parametrize("more", [("--suffix", "_x2"), ("--format", "png")])
def test_results_beside_the_images_are_not_enlarged_again(weights, tmp_path, more):
    folder = tmp_path / "in"
    for name in ("a.jpg", "sub/b.webp", "sub/b_x20.webp"):
        save(folder / name, image(3, 7))
    before = sorted(folder.rglob("*.*"))
    seen = []
    for again in ((), ("--skip-existing",), ()):
        assert call(weights, folder, folder, *more, *again) == 0
        seen.append(sorted(path for path in folder.rglob("*.*") if path not in before))
    assert len(seen[0]) == 3
    assert seen[0] == seen[1] == seen[2]
    assert {Image.open(path).size for path in seen[0]} == {(14, 6)}
    # Another format, too, has no results for images.
    if "--suffix" in more:
        assert call(weights, folder, folder, *more, "--format", "tiff") == 0
        assert len(list(folder.rglob("*.*"))) == 9


def test_what_a_folder_holds_is_read_or_counted(weights, tmp_path, capsys):
    for name in ("a.jfif", "b.JPE"):
        save(tmp_path / "in" / "x.jpg", image(5, 6)).rename(tmp_path / "in" / name)
    for name in ("c.heic", "d.gif", "e.gif", "notes.txt"):
        (tmp_path / "in" / name).touch()
    assert call(weights, tmp_path / "in", tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith(
        "left out, as these are not read: 2 .gif, 1 .heic; convert them to PNG first\n"
    )
    with Image.open(tmp_path / "out" / "a.jfif") as made:
        assert made.format == "JPEG"
    assert (tmp_path / "out" / "b.JPE").is_file()
    for name in ("a.jfif", "b.JPE"):
        (tmp_path / "in" / name).unlink()
    assert call(weights, tmp_path / "in", tmp_path / "out") == 1
    assert "there are files that are not read: 2 .gif, 1 .heic" in capsys.readouterr().err


def test_links_in_circles_and_equal_names_are_named_and_the_rest_is_done(weights, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a.png", "b.png", "b.bmp", "sub/c.png"):
        save(folder / name, image(5, 6))
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    assert call(weights, folder, tmp_path / "out", "--format", "png") == 1
    said = capsys.readouterr()
    assert said.out.endswith("3 FAILED\n")
    assert f"FAILED {folder}/loop.png" in said.err
    for name in ("b.png", "b.bmp"):
        assert f"FAILED {folder}/{name}: would share the result" in said.err
    made = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert made == {"a.png", "sub/c.png"}


@pytest.mark.parametrize(
    ("channels", "target", "said"),
    [
        (3, "/proc/nope/y.png", "/proc/nope/y.png cannot be written"),
        (3, "/proc/y.png", "/proc/y.png cannot be written"),
        (4, "y.jpg", "jpeg holds no transparency; use a name that ends in .png"),
        (3, "n" * 300 + ".png", "File name too long"),
    ],
)
def test_a_target_that_cannot_be_is_named_before_the_work(
    weights, tmp_path, capsys, monkeypatch, channels, target, said
):
    source = save(tmp_path / "a.png", image(5, 6, channels))
    monkeypatch.setattr(Upscaler, "many", None)
    assert call(weights, source, tmp_path / target) == 1
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [source]


def test_long_names_and_webp_without_loss_stay_so(weights, expected, tmp_path):
    array = image(5, 6)
    name = "n" * 250 + ".webp"
    source = save(tmp_path / name, array, lossless=True, icc_profile=SRGB)
    assert call(weights, source, tmp_path / "out") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name)), expected(array))


def test_terminals_see_no_escapes(weights, tmp_path, capsys):
    save(tmp_path / "in" / "a\x1b[31m.png", image(5, 6))
    (tmp_path / "in" / "b\x1b]0;x\x07.png").touch()
    assert call(weights, tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert "\x1b[31m" not in said.err
    assert "b\\x1b]0;x\\x07.png is empty" in said.err
    assert call(tmp_path / "\x1b[31m.pth", tmp_path / "in", tmp_path / "out") == 1
    assert "\x1b" not in capsys.readouterr().err


def test_two_processes_may_write_one_file(tmp_path):
    path = tmp_path / "a.png"
    first, second = image(9, 9), image(9, 9, seed=1)
    with written_atomically(path) as half:
        half.write(b"half")
        writing.write_image(path, second)
        assert np.array_equal(np.asarray(Image.open(path)), second)
        half.seek(0)
        Image.fromarray(first).save(half, "PNG")
    assert np.array_equal(np.asarray(Image.open(path)), first)
    assert list(tmp_path.iterdir()) == [path]


# Bad files


def test_bad_files_are_named_and_the_rest_is_done(weights, tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "a.png", image(8, 10))
    save(folder / "z.jpg", image(8, 10))
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.jpg").write_bytes((folder / "z.jpg").read_bytes()[:300])
    (folder / "text.png").write_text("This is not an image.")
    (folder / "empty.png").touch()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    ending = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    ending += b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + ending)
    assert call(weights, folder, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.out.startswith("2 images upscaled x2 into ")
    assert said.out.endswith(", 6 FAILED\n")
    for name, reason in {
        "cut.png": "cut short",
        "cut.jpg": "cut short",
        "text.png": "is not an image",
        "empty.png": "is empty",
        "gone.png": "cannot be opened",
        "bomb.png": "claims 100000 x 100000 pixels",
    }.items():
        lines = [
            line for line in said.err.splitlines() if line.startswith(f"FAILED {folder}/{name}")
        ]
        assert len(lines) == 1, name
        assert reason in lines[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "z.jpg"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_may_not_be_read_or_written_is_named(weights, tmp_path, capsys):
    source = save(tmp_path / "in" / "a.png", image(5, 6))
    (tmp_path / "out").mkdir(mode=0o555)
    assert call(weights, source, tmp_path / "out") == 1
    source.chmod(0)
    assert call(weights, source, tmp_path / "other") == 1
    assert capsys.readouterr().err.count("Permission denied") == 2


def test_what_cannot_be_read_or_written_is_named(weights, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a.png", "b/c.png"):
        save(folder / name, image(5, 6))
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    (tmp_path / "out" / "b").touch()
    assert call(weights, folder, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.out == "0 images upscaled x2, 2 FAILED\n"
    assert f"{tmp_path / 'out' / 'a.png'} cannot be written: " in said.err
    assert f"{tmp_path / 'out' / 'b' / 'c.png'} cannot be written: " in said.err
    (folder / "d.png").mkdir()
    assert call(weights, folder / "d.png", tmp_path / "out") == 1
    assert "no images below" in capsys.readouterr().err


def test_a_fault_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(file, *_, **__):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_encode", fail)
    with pytest.raises(writing.WriteError, match="No space left"):
        writing.write_image(path, image(4, 4))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# The run


def test_what_is_there_is_passed_over(weights, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, image(5, 6))
    save(tmp_path / "out" / "a.png", image(1, 1))
    assert call(weights, tmp_path / "in", tmp_path / "out", "--skip-existing") == 0
    said = capsys.readouterr().out
    assert said.startswith(
        f"1 image upscaled x2 into {tmp_path / 'out' / 'b.png'} (6x5 to 12x10) by "
    )
    assert said.endswith(", 1 skipped, as their results are there\n")
    with Image.open(tmp_path / "out" / "a.png") as kept:
        assert kept.size == (1, 1)


def test_parts_make_the_whole(weights, tmp_path):
    for index in range(7):
        save(tmp_path / "in" / f"{index}.png", image(5, 6))
    seen = []
    for part in ("1/3", "2/3", "3/3"):
        out = tmp_path / part[0]
        assert call(weights, tmp_path / "in", out, "--shard", part) == 0
        seen.append({path.name for path in out.iterdir()})
    assert [len(each) for each in seen] == [3, 2, 2]
    assert len(set.union(*seen)) == 7
    with pytest.raises(SystemExit):
        call(weights, tmp_path / "in", tmp_path, "--shard", "4/3")


def test_images_of_one_size_are_computed_together(weights, expected, tmp_path, monkeypatch):
    sizes = [(8, 10), (8, 10), (8, 10), (9, 10), (8, 10)]
    arrays = [image(*size, seed=index) for index, size in enumerate(sizes)]
    for index, array in enumerate(arrays):
        save(tmp_path / "in" / f"{index}.png", array)
    together, whole = [], Upscaler.many

    def many(self, images, progress=None):
        together.append(len(images))
        return whole(self, images, progress)

    monkeypatch.setattr(Upscaler, "many", many)
    assert call(weights, tmp_path / "in", tmp_path / "out", "--batch", "2") == 0
    assert together == [2, 1, 1, 1]
    for index, array in enumerate(arrays):
        made = np.asarray(Image.open(tmp_path / "out" / f"{index}.png"))
        assert np.abs(made.astype(int) - expected(array)).max() <= 1


def test_options_reach_the_network(weights, tmp_path):
    array = image(40, 50)
    source = save(tmp_path / "a.png", array)
    options = ("--tile", "32", "--overlap", "8", "--ensemble", "--scale", "3")
    assert call(weights, source, tmp_path / "out", *options) == 0
    ours = Upscaler(weights, device="cpu", tile=32, overlap=8, ensemble=True, scale=3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), ours(array))


def test_how_far_tiles_are_off_is_printed(weights, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", image(40, 50))
    save(tmp_path / "in" / "b.png", image(8, 8))
    (tmp_path / "in" / "c.png").touch()
    tiles = ("--tile", "32", "--overlap", "8", "--check-tiles")
    assert call(weights, tmp_path / "in", tmp_path / "out", *tiles) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "a.png: tiles of 32 differ from the whole image by at most" in first
    assert "b.png: computed whole, no tiles" in second
    assert not (tmp_path / "out").exists()


def test_several_devices_are_refused_with_the_commands_to_use_instead(weights, tmp_path, capsys):
    source = save(tmp_path / "a.png", image(5, 6))
    with pytest.raises(SystemExit) as exit_:
        call(weights, source, tmp_path / "out", "--device", "cuda:0,cuda:1")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "one process for each" in said
    assert "--device cuda:0 --shard 1/2" in said
    assert "--device cuda:1 --shard 2/2" in said


@pytest.mark.parametrize(
    ("number", "status", "last"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)
def test_an_interrupted_run_leaves_complete_images(weights, tmp_path, number, status, last):
    for index in range(30):
        save(tmp_path / "in" / f"{index}.png", image(150, 150))
    command = [sys.executable, "-m", "dlgsanet_arch", "upscale", "-i", str(tmp_path / "in")]
    command += ["-o", str(tmp_path / "out"), "-m", str(weights), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 90
        while not list((tmp_path / "out").glob("*.png")) and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert said.endswith(f"dlgsanet: {last}\n")
    made = list((tmp_path / "out").iterdir())
    assert 0 < len(made) < 30
    for path in made:
        with Image.open(path) as found:
            found.load()
            assert found.size == (300, 300)


# The reader and the writer


def test_opaque_alpha_is_left_out_and_colours_stay_bit_for_bit(tmp_path):
    array = np.dstack([image(6, 7), np.full((6, 7), 255, np.uint8)])
    assert np.array_equal(read_stored(save(tmp_path / "a.png", array)).pixels, array[..., :3])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (64, 3), (65, 200), (200, 7)], ids=str)
def test_16_bit_png_files_hold_what_they_were_given(tmp_path, channels, size):
    rng = np.random.default_rng(channels)
    array = rng.integers(0, 1 << 16, (*size, channels), np.uint16)
    array[..., -1][0, 0] = 7  # not opaque
    writing.write_image(tmp_path / "a.png", array, icc=SRGB, exif=b"Exif\0\0MM\0*")
    assert np.array_equal(read_stored(tmp_path / "a.png").pixels, array)
    with Image.open(BytesIO((tmp_path / "a.png").read_bytes())) as found:
        found.load()
        assert found.info["icc_profile"] == SRGB
        assert found.info["exif"] == b"Exif\0\0MM\0*"


def test_smooth_16_bit_png_files_are_small(tmp_path):
    slope = np.add.outer(np.arange(200) * 90, np.arange(300) * 70).astype(np.uint16)
    writing.write_image(tmp_path / "a.png", slope[..., None])
    assert (tmp_path / "a.png").stat().st_size < slope.nbytes / 20
