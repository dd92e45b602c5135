"""`dlgsanet upscale` on real and awkward files, and what its results hold."""

import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from test_inference import checkpoint, image

from dlgsanet_arch.checkpoint import save_checkpoint
from dlgsanet_arch.cli import main
from dlgsanet_arch.data.images import read_stored
from dlgsanet_arch.files import written_atomically
from dlgsanet_arch.inference import Upscaler, writing

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


@pytest.fixture
def call(weights, tmp_path, capsys):
    """Run the verb; what it prints comes back."""

    def call(source, out=tmp_path / "out", *more, status=0, weights=weights):
        files = ["-i", str(source), "-o", str(out), "-m", str(weights), "--device", "cpu"]
        assert main(["upscale", *files, *more]) == status
        return capsys.readouterr()

    return call


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def made_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def opened(path):
    with Image.open(path) as found:
        return np.asarray(found)


@pytest.mark.parametrize("size", [(1, 1), (30, 41)], ids=str)
@pytest.mark.parametrize("channels", [0, 3, 4])
@pytest.mark.parametrize(
    ("suffix", "depth"), [("png", np.uint8), ("png", np.uint16), ("tiff", np.uint16)]
)
def test_size_channels_and_depth_are_kept(call, expected, tmp_path, size, channels, suffix, depth):
    array = image(*size, channels, depth)
    writing.write_image(tmp_path / f"a.{suffix}", array if channels else array[..., None])
    call(tmp_path / f"a.{suffix}")
    found = read_stored(tmp_path / "out" / f"a.{suffix}").pixels
    assert np.array_equal(found.reshape(expected(array).shape), expected(array))
    assert found.dtype == depth


def test_gray_with_alpha_is_kept(call, expected, tmp_path):
    array = image(20, 31, 2, np.uint16)
    writing.write_image(tmp_path / "a.png", array)
    call(tmp_path / "a.png")
    call(tmp_path / "a.png", tmp_path / "out", "--format", "tiff")
    for made in (
        read_stored(tmp_path / "out" / "a.png").pixels,
        tifffile.imread(tmp_path / "out" / "a.tif"),
    ):
        assert np.array_equal(made, expected(array))


@pytest.mark.parametrize(
    ("name", "depth"),
    [("a.png", 8), ("a.jpg", 8), ("a.webp", 8), ("a.tif", 8), ("b.png", 16), ("b.tif", 16)],
)
def test_the_format_and_the_colour_profile_stay(call, tmp_path, name, depth):
    source, array = tmp_path / name, image(9, 12, 3, np.uint8 if depth == 8 else np.uint16)
    writing.write_image(source, array, icc=SRGB)
    call(source)
    with Image.open(tmp_path / "out" / name) as made, Image.open(source) as before:
        assert made.info["icc_profile"] == SRGB
        assert (made.format, made.size) == (before.format, (24, 18))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_the_image_is_seen_the_same_way_up(call, tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "A camera"
    exif[0x8769] = {0x9003: "2023:10:02 12:00:00", 0xA002: 24, 0x927C: b"offsets"}
    source = save(tmp_path / name, image(16, 24), exif=exif.tobytes())
    call(source)
    with Image.open(source) as before, Image.open(tmp_path / "out" / name) as after:
        kept = after.getexif()
        assert (kept.get(0x0112, 1), kept[0x010F]) == (1, "A camera")
        folder = kept.get_ifd(0x8769)
        assert folder[0x9003] == "2023:10:02 12:00:00"
        assert not {0xA002, 0x927C} & set(folder)
        seen = ImageOps.exif_transpose(before)
        shrunk = after.resize(seen.size, Image.Resampling.BOX)
        apart = np.abs(np.asarray(seen.convert("RGB")).astype(int) - np.asarray(shrunk))
    assert apart.mean() < 8


def test_a_folder_keeps_its_tree_and_its_names(call, weights, tmp_path):
    names = ["a.png", "sub/夜景 1.jpg", "sub/deep/é.webp", "sub/old.bmp", "sub/UPPER.PNG"]
    for name in names:
        save(tmp_path / "in" / name, image(8, 10))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    said = call(tmp_path / "in", tmp_path / "out", "--suffix", "_x2").out
    assert said == f"5 images upscaled x2 into {tmp_path / 'out'} by DLGSANet ({weights})\n"
    results = {"a_x2.png", "sub/old_x2.png", "sub/UPPER_x2.PNG"}
    assert made_in(tmp_path / "out") == results | {"sub/夜景 1_x2.jpg", "sub/deep/é_x2.webp"}


def test_what_a_format_cannot_hold_becomes_png(call, tmp_path):
    save(tmp_path / "in" / "wide.webp", image(1, 9000))
    save(tmp_path / "in" / "clear.png", image(5, 6, 4)).rename(tmp_path / "in" / "clear.jpg")
    said = call(tmp_path / "in").err
    assert made_in(tmp_path / "out") == {"wide.png", "clear.png"}
    assert "jpeg holds no transparency: clear.png is written" in said
    assert "webp holds sides up to 16,383" in said
    assert "2 skipped" in call(tmp_path / "in", tmp_path / "out", "--skip-existing").out
    said = call(tmp_path / "in", tmp_path / "out", "--format", "jpeg", status=1).err
    assert "clear.jpg cannot be written: jpeg holds no transparency" in said


def test_requests_that_cannot_be_met_are_named(call, tmp_path, capsys):
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
        assert said in call(*more, status=1).err
    for more, said in (
        (("--shard", "4/3"), "'4/3' is not a part"),
        (("--quality", "101"), "must be 1 to 100"),
    ):
        with pytest.raises(SystemExit):
            call(source, tmp_path / "out", *more)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_bundled_weights_serve_where_none_are_named(tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "a.png", image(5, 6))
    command = ["upscale", "-i", str(source), "-o", str(tmp_path / "new" / "b.jpg")]
    assert main([*command, "--device", "cpu"]) == 0
    with Image.open(tmp_path / "new" / "b.jpg") as made:
        assert (made.format, made.size) == ("JPEG", (24, 20))
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)  # a package without any
    assert main(command) == 1
    assert "dlgsanet upscale -m" in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--suffix", "_x2"), ("--format", "png"), ()])
def test_results_of_before_are_not_enlarged_again(call, tmp_path, more):
    folder = tmp_path / "in"
    out = folder if more else folder / "out"
    for name in ("a.jpg", "sub/b.webp", "sub/b_x20.webp"):
        save(folder / name, image(3, 7))
    before, seen = made_in(folder), []
    for again in ((), ("--skip-existing",), ()):
        call(folder, out, *more, *again)
        seen.append(made_in(folder) - before)
    assert len(seen[0]) == 3
    assert seen[0] == seen[1] == seen[2]
    assert {opened(folder / name).shape for name in seen[0]} == {(6, 14, 3)}
    if "--suffix" in more:  # another format, too, has no results for images
        call(folder, folder, *more, "--format", "tiff")
        assert len(made_in(folder)) == 9


def test_what_a_folder_holds_is_read_or_counted(call, tmp_path):
    for name in ("a.jfif", "b.JPE"):
        save(tmp_path / "in" / "x.jpg", image(5, 6)).rename(tmp_path / "in" / name)
    for name in ("c.heic", "d.gif", "e.gif", "notes.txt"):
        (tmp_path / "in" / name).touch()
    assert call(tmp_path / "in").out.endswith(
        "left out, as these are not read: 2 .gif, 1 .heic; convert them to PNG first\n"
    )
    with Image.open(tmp_path / "out" / "a.jfif") as made:
        assert made.format == "JPEG"
    assert (tmp_path / "out" / "b.JPE").is_file()
    for name in ("a.jfif", "b.JPE"):
        (tmp_path / "in" / name).unlink()
    said = call(tmp_path / "in", status=1).err
    assert "there are files that are not read: 2 .gif, 1 .heic" in said


def test_links_in_circles_and_equal_names_are_named_and_the_rest_is_done(call, tmp_path):
    folder = tmp_path / "in"
    for name in ("a.png", "b.png", "b.bmp", "sub/c.png"):
        save(folder / name, image(5, 6))
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    said = call(folder, tmp_path / "out", "--format", "png", status=1)
    assert said.out.endswith("3 FAILED\n")
    assert f"FAILED {folder}/loop.png" in said.err
    for name in ("b.png", "b.bmp"):
        assert f"FAILED {folder}/{name}: would share the result" in said.err
    assert made_in(tmp_path / "out") == {"a.png", "sub/c.png"}


@pytest.mark.parametrize(
    ("channels", "target", "said"),
    [
        (3, "/proc/nope/y.png", "/proc/nope/y.png cannot be written"),
        (3, "/proc/y.png", "/proc/y.png cannot be written"),
        (4, "y.jpg", "jpeg holds no transparency; use a name that ends in .png"),
        (3, "n" * 300 + ".png", "File name too long"),
        (3, "file/y.png", "y.png cannot be written: "),
        (3, "folder", "a.png cannot be written: it is a folder"),
    ],
)
def test_a_target_that_cannot_be_is_named_before_the_work(
    call, tmp_path, monkeypatch, channels, target, said
):
    source = save(tmp_path / "a.png", image(5, 6, channels))
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "a.png").mkdir(parents=True)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Upscaler, "many", None)
    assert said in call(source, tmp_path / target, status=1).err
    assert sorted(tmp_path.iterdir()) == before


def test_long_names_and_webp_without_loss_stay_so(call, expected, tmp_path):
    array, name = image(5, 6), "n" * 250 + ".webp"
    call(save(tmp_path / name, array, lossless=True, icc_profile=SRGB))
    assert np.array_equal(opened(tmp_path / "out" / name), expected(array))


def test_terminals_see_no_escapes(call, tmp_path):
    save(tmp_path / "in" / "a\x1b[31m.png", image(5, 6))
    (tmp_path / "in" / "b\x1b]0;x\x07.png").touch()
    said = call(tmp_path / "in", status=1)
    assert "\x1b" not in said.out
    assert "\x1b[31m" not in said.err
    assert "b\\x1b]0;x\\x07.png is empty" in said.err
    assert "\x1b" not in call(tmp_path / "in", weights=tmp_path / "\x1b[31m.pth", status=1).err


def test_bad_files_are_named_and_the_rest_is_done(call, tmp_path):
    folder = tmp_path / "in"
    for name in ("a.png", "z.jpg", "cut.jpg"):
        save(folder / name, image(8, 10))
    os.truncate(folder / "cut.jpg", 300)
    (folder / "text.png").write_text("This is not an image.")
    (folder / "empty.png").touch()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    said = call(folder, status=1)
    assert said.out.startswith("2 images upscaled x2 into ")
    assert said.out.endswith(", 4 FAILED\n")
    for name, reason in {
        "cut.jpg": "cut short",
        "text.png": "is not an image",
        "empty.png": "is empty",
        "gone.png": "cannot be opened",
    }.items():
        assert re.search(f"FAILED {folder}/{name}.*{reason}", said.err)
    assert made_in(tmp_path / "out") == {"a.png", "z.jpg"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_may_not_be_read_or_written_is_named(call, tmp_path):
    source = save(tmp_path / "in" / "a.png", image(5, 6))
    (tmp_path / "out").mkdir(mode=0o555)
    assert "Permission denied" in call(source, status=1).err
    source.chmod(0)
    assert "Permission denied" in call(source, tmp_path / "other", status=1).err


def test_a_fault_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, file, *_, **__):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(writing.WriteError, match="No space left"):
        writing.write_image(path, image(4, 4))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_may_write_one_file(tmp_path):
    path = tmp_path / "a.png"
    with written_atomically(path) as half:
        half.write(b"first")
        writing.write_image(path, image(9, 9))
        assert np.array_equal(opened(path), image(9, 9))
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_existing_results_are_skipped(call, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, image(5, 6))
    kept, made = (tmp_path / "out" / name for name in ("a.png", "b.png"))
    save(kept, image(1, 1))
    said = call(tmp_path / "in", tmp_path / "out", "--skip-existing").out
    assert said.startswith(f"1 image upscaled x2 into {made} (6x5 to 12x10) by ")
    assert said.endswith(", 1 skipped, as their results are there\n")
    assert opened(kept).shape == (1, 1, 3)


def test_parts_make_the_whole(call, tmp_path):
    for index in range(7):
        save(tmp_path / "in" / f"{index}.png", image(5, 6))
    for part in ("1/3", "2/3", "3/3"):
        call(tmp_path / "in", tmp_path / part[0], "--shard", part)
    seen = [made_in(tmp_path / part) for part in "123"]
    assert [len(each) for each in seen] == [3, 2, 2]
    assert len(set.union(*seen)) == 7


def test_images_of_one_size_are_computed_together(call, expected, tmp_path, monkeypatch):
    sizes = [(8, 10), (8, 10), (8, 10), (9, 10), (8, 10)]
    arrays = [image(*size, seed=index) for index, size in enumerate(sizes)]
    for index, array in enumerate(arrays):
        save(tmp_path / "in" / f"{index}.png", array)
    together, whole = [], Upscaler.many

    def many(self, images, progress=None):
        together.append(len(images))
        return whole(self, images, progress)

    monkeypatch.setattr(Upscaler, "many", many)
    call(tmp_path / "in", tmp_path / "out", "--batch", "2")
    assert together == [2, 1, 1, 1]
    for index, array in enumerate(arrays):
        made = opened(tmp_path / "out" / f"{index}.png")
        assert np.abs(made.astype(int) - expected(array)).max() <= 1


def test_options_reach_the_network(call, weights, tmp_path):
    array = image(40, 50)
    options = ("--tile", "32", "--overlap", "8", "--ensemble", "--scale", "3")
    call(save(tmp_path / "a.png", array), tmp_path / "out", *options)
    ours = Upscaler(weights, device="cpu", tile=32, overlap=8, ensemble=True, scale=3)
    assert np.array_equal(opened(tmp_path / "out" / "a.png"), ours(array))


def test_how_far_tiles_are_off_is_printed(call, tmp_path):
    save(tmp_path / "in" / "a.png", image(40, 50))
    save(tmp_path / "in" / "b.png", image(8, 8))
    (tmp_path / "in" / "c.png").touch()
    tiles = ("--tile", "32", "--overlap", "8", "--check-tiles")
    first, second = call(tmp_path / "in", tmp_path / "out", *tiles, status=1).out.splitlines()
    assert "a.png: tiles of 32 differ from the whole image by at most" in first
    assert "b.png: computed whole, no tiles" in second
    assert not (tmp_path / "out").exists()


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
    assert all(opened(path).shape == (300, 300, 3) for path in made)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (65, 200)], ids=str)
def test_16_bit_png_files_hold_what_they_were_given(tmp_path, channels, size):
    rng = np.random.default_rng(channels)
    array = rng.integers(0, 1 << 16, (*size, channels), np.uint16)
    array[..., -1][0, 0] = 7  # not opaque
    writing.write_image(tmp_path / "a.png", array, icc=SRGB, exif=b"Exif\0\0MM\0*")
    assert np.array_equal(read_stored(tmp_path / "a.png").pixels, array)
    with Image.open(tmp_path / "a.png") as found:
        found.load()
        assert (found.info["icc_profile"], found.info["exif"]) == (SRGB, b"Exif\0\0MM\0*")
    order = [[0], [0, 0, 0, 1], [2, 1, 0], [2, 1, 0, 3]][channels - 1]  # as OpenCV has them
    by_opencv = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(np.atleast_3d(by_opencv), array[..., order])
    slope = np.add.outer(np.arange(200) * 90, np.arange(300) * 70).astype(np.uint16)
    writing.write_image(tmp_path / "a.png", slope[..., None])
    assert (tmp_path / "a.png").stat().st_size < slope.nbytes / 20
