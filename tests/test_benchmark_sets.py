import errno
import hashlib
import os
import re
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils.matlab_functions import imresize
from helpers import noisy_image, tree
from helpers import save_image as save

from dlgsanet_arch.cli import cmd_data
from dlgsanet_arch.data import benchmark
from dlgsanet_arch.data.benchmark import (
    KNOWN,
    KnownSet,
    Scores,
    Summary,
    build,
    folder_sha256,
    report,
)
from dlgsanet_arch.data.discovery import find_source, set_name
from dlgsanet_arch.errors import UserError


def made(number: int, size: tuple[int, int] = (27, 34)) -> np.ndarray:  # no scale divides a side
    return noisy_image(number, size)


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR)


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    """BasicSR's bicubic, rounded to 8 bits."""
    result = imresize(image.astype(np.float32) / 255, factor)
    return (result * 255).round().clip(0, 255).astype(np.uint8)


def cropped(image: np.ndarray, scale: int) -> np.ndarray:
    height, width = image.shape[:2]
    return image[: height // scale * scale, : width // scale * scale]


def is_made_of(folder: Path, image: np.ndarray, name: str) -> bool:
    """Whether HR is the image cropped to the scale of the folder's name."""
    return np.array_equal(read(folder / "HR" / f"{name}.png"), cropped(image, int(folder.name[1])))


@pytest.fixture
def source(tmp_path) -> Path:
    for number in range(2):
        save(tmp_path / "in" / "HR" / f"p{number}.png", made(number))
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def make(source: Path, out: Path, *scales: int, name: str = "made", **options) -> Summary:
    return build(name, source, out, scales or None, **options)


def written(summary: Summary) -> list[bool]:
    return [each.written for each in summary.scales]


def refused(match: str, *arguments, **options) -> str:
    with pytest.raises(UserError, match=match) as caught:
        make(*arguments, **options)
    return str(caught.value)


# What is made


def test_set14_has_the_known_figures_at_every_scale(tmp_path, shared_data):
    source = shared_data / "data" / "Set14"
    if not source.is_dir():
        pytest.skip(f"the images of Set14 are not in {source}")
    summary = make(source, tmp_path, name="set14")
    measured = [each.bicubic for each in summary.scales]
    # NETWORK.md, measured by BasicSR's functions
    known = [(30.33, 0.8700), (27.63, 0.7760), (26.09, 0.7050)]
    assert np.allclose(np.array(measured), known, rtol=0, atol=[0.01, 0.0005])
    assert report(summary).count("  agrees\n") == 3
    assert (summary.name, summary.count, summary.notices) == ("Set14", 14, [])
    # the smallest image, by OpenCV and BasicSR alone
    hr = cropped(read(source / "HR" / "img_006.png"), 4)
    assert np.array_equal(read(tmp_path / "X4" / "HR" / "img_006.png"), hr)
    assert np.array_equal(read(tmp_path / "X4" / "LR" / "img_006.png"), resized(hr, 1 / 4))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_hr_is_cropped_lr_is_its_bicubic_and_figures_are_basicsrs(source, out, scale):
    measured = make(source, out, scale).scales[0].bicubic
    folder = out / f"X{scale}"
    files = ["HR/p0.png", "HR/p1.png", "LR/p0.png", "LR/p1.png", "recipe.json"]
    assert sorted(tree(out)) == [f"X{scale}/{name}" for name in files]
    scores = []
    for number in range(2):
        hr = cropped(made(number), scale)
        assert is_made_of(folder, made(number), f"p{number}")
        assert np.array_equal(read(folder / "LR" / f"p{number}.png"), resized(hr, 1 / scale))
        enlarged = resized(resized(hr, 1 / scale), scale)
        metrics = (calculate_psnr, calculate_ssim)
        scores.append([f(enlarged, hr, scale, test_y_channel=True) for f in metrics])
    assert np.allclose(measured, np.mean(scores, 0), rtol=0, atol=1e-9)


def test_an_image_of_one_colour_does_not_hide_the_others(source, out, tmp_path):
    alone = make(source, tmp_path / "alone", 2).scales[0]
    save(source / "HR" / "flat.png", np.full((40, 40, 3), 90, np.uint8))
    summary = make(source, out, 2)
    assert summary.scales[0].bicubic.psnr == alone.bicubic.psnr
    assert "bicubic restores 1 images without an error" in report(summary)


def test_the_verb_finds_its_set_and_prints_what_to_compare(tmp_path, capsys):
    save(tmp_path / "datasets" / "set 5" / "HR" / "a.png", made(1))
    (tmp_path / "datasets" / "set 5" / "HR" / "b.png").write_bytes(b"")
    arguments = ["--root", str(tmp_path), "benchmark", "--name", "SET5", "--scale", "2"]
    assert cmd_data.main(arguments) == 1
    assert "b.png is empty: zero bytes" in capsys.readouterr().err
    (tmp_path / "datasets/set 5/HR/others.avif").touch()
    assert cmd_data.main([*arguments, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"x2  [0-9.]+ dB / [0-9.]+  known 33.68 dB / 0.9305  differs", said)
    assert re.search(r"X2/HR  [0-9a-f]{64}\n  X2/LR  [0-9a-f]{64}", said)
    assert "Set5 has 5 images, here are 1" in said
    assert said.endswith("left out, as these are not read: 1 .avif; convert them to PNG first\n")


def sum_by_hand(folder: Path) -> str:
    data = b""
    for path in sorted(folder.iterdir(), key=lambda path: path.stem):
        image = read(path)
        data += path.stem.encode("utf-8") + b"\x00" + struct.pack("<II", *image.shape[:2])
        data += b"".join(bytes(pixel.tolist()) for row in image for pixel in row)
    return hashlib.sha256(data).hexdigest()


def test_sums_can_be_recomputed_by_their_description(source, out):
    # as file names `p-1.png` comes before `p.png`, as names `p` before `p-1`
    for name in ("p", "p-1", "P", "p10"):
        save(source / "HR" / f"{name}.png", made(ord(name[-1])))
    for each in make(source, out).scales:
        expected = {part: sum_by_hand(each.folder / part) for part in ("HR", "LR")}
        assert each.recipe["sha256"] == expected
    image = out / "X2" / "HR" / "p.png"
    before = folder_sha256(image.parent)
    image.rename(image.with_name("q.png"))
    assert folder_sha256(image.parent) != before


# Names and places


def test_names_of_sets():
    for name, spelled in (
        ("Set5", ["set5", "Set_5"]),
        ("Set14", ["Set 14"]),
        ("B100", ["BSD100", "BSDS100", "b100"]),
        ("Urban100", ["urban-100"]),
        ("Manga109", ["MANGA109"]),
        ("My_set-2", ["My_set-2"]),
    ):
        assert {set_name(each) for each in spelled} == {name}
    for text in ("", "../x", "a b", "ü", "a/b", "a.b"):
        with pytest.raises(UserError, match="cannot be a test set's name"):
            set_name(text)


def test_a_set_is_found_in_both_places_by_any_spelling(tmp_path):
    for place in ("benchmark/BSDS100", "b100"):
        folder = tmp_path / "datasets" / place
        folder.mkdir(parents=True)
        assert find_source("B100", tmp_path) == folder
    (tmp_path / "datasets" / "BSD100").mkdir()
    with pytest.raises(UserError, match=r"any of .*BSD100.*b100.*--hr"):
        find_source("B100", tmp_path)
    with pytest.raises(UserError, match=r"neither .*datasets/Set5 nor .*datasets/benchmark/Set5"):
        find_source("set5", tmp_path)


LAYOUTS = [
    "{}.png",
    "HR/{}.png",
    "Set5/hr/{}.png",
    "GT/{}.png",
    "Set5/original/{}.bmp",
    "Set5_HR/{}.png",
    "GTmod12/{}.png",
    "Set5/image_SRF_4/{}_SRF_4_HR.png",
    "{}_SRF_4_HR.png",
    "X4/HR/{}.png",
    "Set5/x4/hr/{}.png",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised(tmp_path, out, layout):
    names = ("baby", "img_002")
    for number, name in enumerate(names):
        save(tmp_path / "in" / layout.format(name), made(number))
    # beside them: other images than HR
    further = "Set5" if layout.startswith("Set5/") else ""
    for name in ("LR_bicubic/X4/babyx4.png", "image_SRF_4/baby_SRF_4_bicubic.png"):
        save(tmp_path / "in" / further / name, made(7, (6, 8)))
    summary = make(tmp_path / "in", out, 4, name="Set5")
    assert summary.count == 2
    assert all(is_made_of(out / "X4", made(n), name) for n, name in enumerate(names))
    notices = [text for text in summary.notices if "Set5 has 5 images" not in text]
    assert len(notices) == (layout in ("{}.png", "GTmod12/{}.png"))


def test_each_scale_takes_its_own_hr_of_selfexsr(tmp_path, out):
    for scale in (2, 4):
        save(tmp_path / "in" / f"image_SRF_{scale}/img_001_SRF_{scale}_HR.png", made(scale))
    # without a request, the scales that are there: Urban100 as it circulates has no x3
    alone = make(tmp_path / "in", out)
    assert [each.scale for each in alone.scales] == [2, 4]
    assert all(is_made_of(out / f"X{scale}", made(scale), "img_001") for scale in (2, 4))
    assert "no HR images for x3, which are not made" in report(alone)
    refused("no HR images for x3.*--scale 2 4", tmp_path / "in", out, 2, 3)
    assert not (out / "X3").exists()
    save(tmp_path / "in" / "HR" / "img_001.png", made(9))
    make(tmp_path / "in", out, 3)
    assert is_made_of(out / "X3", made(9), "img_001")


def test_of_several_folders_the_right_one_is_taken_or_all_are_named(tmp_path, out):
    for number, name in enumerate(("Set5/HR", "Set14/original", "Set14/GTmod12")):
        save(tmp_path / "in" / name / "baby.png", made(number))
    summary = make(tmp_path / "in", out, 2, name="Set14")
    assert summary.source == tmp_path / "in" / "Set14" / "original"  # before what was cropped
    assert is_made_of(out / "X2", made(1), "baby")
    said = refused("more than one place.*--hr", tmp_path / "in", tmp_path / "other")
    assert all(str(tmp_path / "in" / name) in said for name in ("Set5/HR", "Set14/original"))


def test_what_a_folder_holds_beside_a_set_is_named(tmp_path, out):
    save(tmp_path / "in" / "night 1.png", made(1))
    save(tmp_path / "in" / "more" / "b.png", made(2))
    summary = make(tmp_path / "in", out, 2)
    assert os.listdir(out / "X2" / "LR") == ["night%201.png"]  # a name that BasicSR can take
    assert "left out: more;" in summary.notices[0]
    save(tmp_path / "deep" / "a" / "b" / "c.png", made(1))
    refused("no HR images of made", tmp_path / "deep", out)
    refused("does not exist", tmp_path / "missing", out)
    for folder in ("image_SRF_2", "."):
        save(tmp_path / "two" / folder / "a_SRF_2_HR.png", made(1))
    refused("have one name", tmp_path / "two", out, 2)


# Bad images


def test_all_bad_images_are_named_before_anything_is_written(source, out):
    whole = (source / "HR" / "p0.png").read_bytes()
    (source / "HR" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "HR" / "empty.jpg").write_bytes(b"")
    save(source / "HR" / "small.png", made(1, (16, 19)))
    for number in range(7):
        save(source / "HR" / f"deep{number}.png", made(number).astype(np.uint16) * 257)
    said = refused("3 of 12 images cannot be used", source, out)
    reasons = {"cut": "is cut short", "empty": "zero bytes", "small": "too small"}
    for name, reason in reasons.items():
        assert [reason in line for line in said.splitlines() if f"{name}." in line] == [True]
    assert not out.exists()
    summary = make(source, out, skip_bad=True)
    assert (summary.count, len(summary.skipped)) == (9, 3)
    assert not {*os.listdir(out / "X4" / "LR")} & {"cut.png", "empty.png", "small.png"}
    (notice,) = summary.notices
    assert notice.startswith("7 x holds 16 bits")
    assert notice.endswith(": deep0.png, deep1.png, deep2.png, deep3.png, deep4.png, and 2 more")
    assert "left out (3):\n" in report(summary)
    for path in (*(source / "HR").glob("p*"), *(source / "HR").glob("deep*")):
        path.unlink()
    refused("3 of 3 images cannot.*nothing is left", source, out, skip_bad=True)


@pytest.mark.parametrize(("scale", "least"), [(2, 16), (3, 18), (4, 20)])
def test_the_border_leaves_a_window_of_ssim(tmp_path, out, scale, least):
    assert least - 2 * scale >= 11 > least - scale - 2 * scale
    save(tmp_path / "in" / "a.png", made(1, (least, 40)))
    assert 0 < make(tmp_path / "in", out, scale).scales[0].bicubic.ssim < 1
    save(tmp_path / "small" / "a.png", made(1, (40, least - 1)))
    refused("too small", tmp_path / "small", tmp_path / "other", scale)


def test_scales_that_are_not_made_are_refused(source, out):
    for scales in ([], [1], [2, 8]):
        with pytest.raises(ValueError, match="scales must be"):
            build("made", source, out, scales)


# Complete or absent


def test_finished_scales_are_left_alone(source, out, tmp_path):
    first = make(source, out, 2).scales[0]
    before = (out / "X2").stat().st_ino
    shutil.copytree(source, tmp_path / "moved")  # the same images
    for overwrite in (False, True):
        again = make(tmp_path / "moved", out, 2, 3, overwrite=overwrite)
        assert (out / "X2").stat().st_ino == before
        assert written(again) == [False, not overwrite]
        assert again.scales[0].recipe == first.recipe
    assert "was finished, left alone" in report(again)


HR, LR = "in/HR/p0.png", "out/X2/LR/p0.png"
OTHER_IMAGES = "X2 is another data set: of other images.*--overwrite"
WAS_CHANGED = "X2 was changed after it was made"
CHANGES = {
    "other HR": (HR, lambda path: save(path, made(5)), OTHER_IMAGES),
    "another name": (HR, lambda path: path.rename(path.with_name("q.png")), OTHER_IMAGES),
    "less HR": (HR, Path.unlink, OTHER_IMAGES),
    "other LR": (LR, lambda path: save(path, read(path) ^ 1), WAS_CHANGED),
    "less LR": (LR, Path.unlink, WAS_CHANGED),
    "LR cut": (LR, lambda path: path.write_bytes(path.read_bytes()[:-30]), WAS_CHANGED),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_scale_is_replaced_on_demand_only(source, out, tmp_path, change):
    make(source, out, 2)
    file, apply, reason = CHANGES[change]
    apply(tmp_path / file)
    before = tree(out)
    refused(reason, source, out, 2)
    assert tree(out) == before
    assert written(make(source, out, 2, overwrite=True)) == [True]
    make(source, tmp_path / "fresh", 2)
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("recipe", [None, b"{", b"[]", b'{"scale": 2, "train": []}'])
def test_what_others_made_is_never_touched(source, out, recipe):
    save(out / "X3" / "HR" / "theirs.png", made(1))
    if recipe is not None:
        (out / "X3" / "recipe.json").write_bytes(recipe)
    before = tree(out)
    for overwrite in (False, True):
        refused("X3 .*not made by this command", source, out, overwrite=overwrite)
    assert tree(out) == before  # X2 was not begun either


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_an_interrupted_run_is_continued(source, out, tmp_path, monkeypatch, error):
    whole, calls = benchmark._make, []

    def interrupted(source, scale, folder):
        if len(calls) == 3:
            raise error
        calls.append(scale)
        return whole(source, scale, folder)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "_make", interrupted)
        with pytest.raises((KeyboardInterrupt, UserError), match=r"disk is full|^$"):
            make(source, out)
    assert calls == [2, 2, 3]
    assert sorted(path.name for path in out.iterdir()) == ["X2", "X3.unfinished"]
    save(out / "X3.unfinished" / "HR" / "stray.png", made(5))
    assert written(make(source, out)) == [False, True, True]
    make(source, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_the_set_may_lie_where_the_tree_goes(source):
    first = make(source, source, 2).scales[0]
    both = make(source, source, 4, 2, 4)
    assert [each.scale for each in both.scales] == [2, 4]
    assert written(both) == [False, True]
    assert both.source == source / "HR"
    # what was made is enough to find it finished, and for nothing else
    shutil.rmtree(source / "HR")
    (source / "X3.unfinished").mkdir()
    shutil.copytree(source / "X2", source / "X2.old")
    alone = make(source, source, 2, 4)
    assert written(alone) == [False, False]
    assert alone.scales[0].recipe == first.recipe
    refused("no HR images for x3.*--scale 2 4", source, source, 2, 3, 4)
    save(source / "X2" / "HR" / "p0.png", made(5))
    refused("X2 was changed .*move it away", source, source, 2)


# The report


@pytest.mark.parametrize(
    ("psnr", "ssim", "agrees"),
    [(0.009, -0.0004, True), (-0.009, 0.0004, True), (0.011, 0, False), (0, -0.0006, False)],
)
def test_figures_agree_within_the_tolerance(source, out, monkeypatch, psnr, ssim, agrees):
    unknown = make(source, out, 2)
    assert "known" not in report(unknown)
    assert "notices" not in report(unknown)
    measured = unknown.scales[0].bicubic
    known = Scores(measured.psnr + psnr, measured.ssim + ssim)
    monkeypatch.setitem(KNOWN, "made", KnownSet(2, KNOWN["Set5"].tolerance, {2: known}))
    text = report(make(source, out, 2))
    assert ("  agrees\n" in text, "  differs: other images" in text) == (agrees, not agrees)
    assert f"known {known.psnr:.2f} dB / {known.ssim:.4f}" in text
