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
from helpers import tree

from dlgsanet_arch.cli import cmd_data
from dlgsanet_arch.data import benchmark, workers
from dlgsanet_arch.data.benchmark import build, folder_sha256, report
from dlgsanet_arch.data.benchmarks import KNOWN, KnownSet, set_name
from dlgsanet_arch.data.discovery import find_source
from dlgsanet_arch.data.scores import Scores
from dlgsanet_arch.errors import UserError

SIZE = (27, 34)  # no scale divides a side


def made(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth image with some noise, another one for each number."""
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (4, 5, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    return (smooth + random.normal(0, 5, smooth.shape)).round().clip(0, 255).astype(np.uint8)


def saved(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fine, data = cv2.imencode(path.suffix, image)
    assert fine
    path.write_bytes(data.tobytes())
    return path


def read(path: Path) -> np.ndarray:
    """The stored samples: dtype and channels as they are in the file."""
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    """BasicSR's bicubic, rounded to 8 bits."""
    result = imresize(image.astype(np.float32) / 255, factor)
    return (result * 255).round().clip(0, 255).astype(np.uint8)


def cropped(image: np.ndarray, scale: int) -> np.ndarray:
    height, width = image.shape[:2]
    return image[: height // scale * scale, : width // scale * scale]


def source_of(folder: Path, count: int = 2) -> Path:
    for number in range(count):
        saved(folder / "HR" / f"p{number}.png", made(number))
    return folder


def refused(match: str, *arguments, **options) -> str:
    with pytest.raises(UserError, match=match) as caught:
        build(*arguments, **options)
    return str(caught.value)


# What is made


def test_set14_has_the_known_figures_at_every_scale(tmp_path, shared_data):
    source = shared_data / "data" / "Set14"
    if not source.is_dir():
        pytest.skip(f"the images of Set14 are not in {source}")
    summary = build("set14", source, tmp_path)
    measured = [(each.scale, each.bicubic.psnr, each.bicubic.ssim) for each in summary.scales]
    # NETWORK.md, measured by BasicSR's functions
    known = [(2, 30.33, 0.8700), (3, 27.63, 0.7760), (4, 26.09, 0.7050)]
    assert np.allclose(np.array(measured), known, rtol=0, atol=[0, 0.01, 0.0005])
    assert [each.agrees for each in summary.scales] == [True] * 3
    assert (summary.name, summary.count, summary.notices) == ("Set14", 14, [])
    # the smallest image, by OpenCV and BasicSR alone
    hr = cropped(read(source / "HR" / "img_006.png")[..., :3], 4)
    assert np.array_equal(read(tmp_path / "X4" / "HR" / "img_006.png"), hr)
    assert np.array_equal(read(tmp_path / "X4" / "LR" / "img_006.png"), resized(hr, 1 / 4))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_hr_is_cropped_and_lr_is_its_bicubic(tmp_path, scale):
    build("made", source_of(tmp_path / "in"), tmp_path / "out", [scale])
    folder = tmp_path / "out" / f"X{scale}"
    assert sorted(tree(folder)) == [
        *("HR/p0.png", "HR/p1.png", "LR/p0.png", "LR/p1.png"),
        "recipe.json",
    ]
    for number in range(2):
        hr = cropped(made(number), scale)
        assert np.array_equal(read(folder / "HR" / f"p{number}.png"), hr)
        assert np.array_equal(read(folder / "LR" / f"p{number}.png"), resized(hr, 1 / scale))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == [
        folder.name
    ]


METRICS = (calculate_psnr, calculate_ssim)


def test_figures_are_the_mean_of_basicsrs_metrics(tmp_path):
    summary = build("made", source_of(tmp_path / "in"), tmp_path / "out", [3])
    scores = []
    for number in range(2):
        hr = cropped(made(number), 3)
        enlarged = resized(resized(hr, 1 / 3), 3)
        scores.append([f(enlarged, hr, 3, test_y_channel=True) for f in METRICS])
    measured = summary.scales[0].bicubic
    assert np.allclose([measured.psnr, measured.ssim], np.mean(scores, 0), rtol=0, atol=1e-9)


def sum_by_hand(folder: Path) -> str:
    data = b""
    for path in sorted(folder.iterdir(), key=lambda path: path.stem):
        image = read(path)
        data += path.stem.encode("utf-8") + b"\x00"
        data += struct.pack("<I", image.shape[0]) + struct.pack("<I", image.shape[1])
        for row in image:
            data += b"".join(bytes(pixel.tolist()) for pixel in row)
    return hashlib.sha256(data).hexdigest()


def test_a_image_of_one_colour_does_not_hide_the_others(tmp_path):
    saved(tmp_path / "in" / "a.png", made(1))
    alone = build("set", tmp_path / "in", tmp_path / "alone", [2]).scales[0]
    saved(tmp_path / "in" / "flat.png", np.full((40, 40, 3), 90, np.uint8))
    summary = build("set", tmp_path / "in", tmp_path / "both", [2])
    assert summary.scales[0].bicubic.psnr == alone.bicubic.psnr
    assert "bicubic restores 1 images without an error" in report(summary)


def test_the_verb_finds_its_set_and_prints_what_to_compare(tmp_path, capsys):
    saved(tmp_path / "datasets" / "set 5" / "HR" / "a.png", made(1))
    (tmp_path / "datasets" / "set 5" / "HR" / "b.png").write_bytes(b"")
    arguments = ["--root", str(tmp_path), "benchmark", "--name", "SET5", "--scale", "2"]
    assert cmd_data.main(arguments) == 1
    assert "b.png is empty: zero bytes" in capsys.readouterr().err
    assert cmd_data.main([*arguments, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"x2  [0-9.]+ dB / [0-9.]+  known 33.68 dB / 0.9305  differs", said)
    assert re.search(r"X2/HR  [0-9a-f]{64}\n  X2/LR  [0-9a-f]{64}", said)
    assert "Set5 has 5 images, here are 1" in said


def test_sums_can_be_recomputed_by_their_description(tmp_path):
    source = source_of(tmp_path / "in")
    # as file names `p-1.png` comes before `p.png`, as names `p` before `p-1`
    for name in ("p", "p-1", "P", "p10"):
        saved(source / "HR" / f"{name}.png", made(ord(name[-1])))
    summary = build("made", source, tmp_path / "out")
    for each in summary.scales:
        assert each.sha256 == {part: sum_by_hand(each.folder / part) for part in ("HR", "LR")}
    image = tmp_path / "out" / "X2" / "HR" / "p.png"
    before = folder_sha256(image.parent)
    image.rename(image.with_name("q.png"))
    assert folder_sha256(image.parent) != before


def test_names_that_basicsr_cannot_take_are_written_safely(tmp_path):
    for name in ("night 1.bmp", "city/a.png", "ü.png"):
        saved(tmp_path / "in" / "HR" / name, made(1))
    build("made", tmp_path / "in", tmp_path / "out", [2])
    names = ["%C3%BC.png", "city+a.png", "night%201.png"]
    for part in ("HR", "LR"):
        assert sorted(os.listdir(tmp_path / "out" / "X2" / part)) == names


def test_worker_processes_make_the_same_and_few_images_need_none(tmp_path, monkeypatch):
    source = source_of(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(workers, "ProcessPoolExecutor", None)
        build("made", source, tmp_path / "one", [2], workers=8)
    monkeypatch.setattr(workers, "ITEMS_A_WORKER", 1)
    build("made", source, tmp_path / "two", [2], workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


# Names and places


def test_names_of_sets():
    spelled = ["set5", "Set 14", "BSD100", "BSDS100", "b100", "urban-100", "MANGA109", "My_set-2"]
    names = ["Set5", "Set14", "B100", "B100", "B100", "Urban100", "Manga109", "My_set-2"]
    assert [set_name(each) for each in spelled] == names
    for text in ("", "../x", "a b", "ü", "a/b", "a.b"):
        with pytest.raises(UserError, match="cannot be a test set's name"):
            set_name(text)


def test_a_set_is_found_in_both_places_by_any_spelling(tmp_path):
    inner = tmp_path / "datasets" / "benchmark" / "BSDS100"
    inner.mkdir(parents=True)
    assert find_source("b100", tmp_path) == inner
    outer = tmp_path / "datasets" / "b100"
    outer.mkdir()
    assert find_source("B100", tmp_path) == outer
    (tmp_path / "datasets" / "BSD100").mkdir()
    with pytest.raises(UserError, match=r"any of .*BSD100.*b100.*--hr"):
        find_source("B100", tmp_path)
    with pytest.raises(UserError, match=r"neither .*datasets/Set5 nor .*datasets/benchmark/Set5"):
        find_source("set5", tmp_path)


# Layouts

LAYOUTS = {
    "flat": "{}.png",
    "HR": "HR/{}.png",
    "lower case": "hr/{}.png",
    "GT": "GT/{}.png",
    "original": "original/{}.bmp",
    "with the set's name": "Set5_HR/{}.png",
    "BasicSR's": "GTmod12/{}.png",
    "SelfExSR": "image_SRF_4/{}_SRF_4_HR.png",
    "SelfExSR's files alone": "{}_SRF_4_HR.png",
    "ours": "X4/HR/{}.png",
    "ours in lower case": "x4/hr/{}.png",
}
NAMES = ("baby", "img_002")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found_by_looking(tmp_path, layout):
    source, further = tmp_path / "in", "Set5/" if len(layout) % 2 else ""
    for number, name in enumerate(NAMES):
        saved(source / (further + LAYOUTS[layout].format(name)), made(number))
    # beside them: what is not a HR
    for name in ("LR_bicubic/X4/babyx4.png", "image_SRF_4/baby_SRF_4_bicubic.png"):
        saved(source / further / name, made(7, (6, 8)))
    summary = build("Set5", source, tmp_path / "out", [4])
    written = {path.stem: read(path) for path in (tmp_path / "out" / "X4" / "HR").iterdir()}
    assert sorted(written) == sorted(NAMES)
    for number, name in enumerate(NAMES):
        assert np.array_equal(written[name], cropped(made(number), 4))
    notices = [text for text in summary.notices if "Set5 has 5 images" not in text]
    assert len(notices) == {"BasicSR's": 1, "flat": 1}.get(layout, 0)


def test_each_scale_takes_its_own_hr_of_selfexsr(tmp_path):
    for scale in (2, 4):
        name = f"image_SRF_{scale}/img_001_SRF_{scale}_HR.png"
        saved(tmp_path / "in" / name, made(scale))
    build("made", tmp_path / "in", tmp_path / "out", [2, 4])
    for scale in (2, 4):
        hr = read(tmp_path / "out" / f"X{scale}" / "HR" / "img_001.png")
        assert np.array_equal(hr, cropped(made(scale), scale))
    refused("no HR images for x3.*--scale 2 4", "made", tmp_path / "in", tmp_path / "out", [2, 3])
    assert not (tmp_path / "out" / "X3").exists()
    # without a wish, the scales that are there: Urban100 as it circulates has no x3
    alone = build("made", tmp_path / "in", tmp_path / "alone")
    assert [each.scale for each in alone.scales] == [2, 4]
    assert "no HR images for x3, which are not made" in report(alone)
    saved(tmp_path / "in" / "HR" / "img_001.png", made(9))
    build("made", tmp_path / "in", tmp_path / "out", [3])
    hr = read(tmp_path / "out" / "X3" / "HR" / "img_001.png")
    assert np.array_equal(hr, cropped(made(9), 3))


def test_uncropped_originals_go_before_cropped_ones(tmp_path):
    saved(tmp_path / "in" / "original" / "baby.png", made(1))
    saved(tmp_path / "in" / "GTmod12" / "baby.png", cropped(made(1), 12))
    summary = build("made", tmp_path / "in", tmp_path / "out", [2])
    assert summary.source == tmp_path / "in" / "original"
    assert read(tmp_path / "out" / "X2" / "HR" / "baby.png").shape[:2] == (26, 34)


def test_two_candidates_are_refused_by_name(tmp_path):
    for folder in ("HR", "original"):
        saved(tmp_path / "in" / folder / "baby.png", made(1))
    said = refused("more than one place", "made", tmp_path / "in", tmp_path / "out")
    assert all(str(tmp_path / "in" / name) in said for name in ("HR", "original"))
    assert "--hr" in said
    build("made", tmp_path / "in" / "HR", tmp_path / "out", [2])


def test_of_several_sets_the_named_one_is_taken(tmp_path):
    for number, folder in enumerate(("Set5", "Set14")):
        saved(tmp_path / "in" / folder / "HR" / "baby.png", made(number))
    summary = build("Set14", tmp_path / "in", tmp_path / "out", [2])
    assert summary.source == tmp_path / "in" / "Set14" / "HR"
    refused("more than one place", "made", tmp_path / "in", tmp_path / "other")


def test_images_in_folders_of_a_flat_set_are_missed_aloud(tmp_path):
    saved(tmp_path / "in" / "a.png", made(1))
    saved(tmp_path / "in" / "more" / "b.png", made(2))
    summary = build("made", tmp_path / "in", tmp_path / "out", [2])
    assert summary.count == 1
    assert "left out: more;" in summary.notices[0]


def test_a_folder_without_hr_is_refused(tmp_path):
    saved(tmp_path / "in" / "a" / "b" / "c.png", made(1))
    refused("no HR images of made", "made", tmp_path / "in", tmp_path / "out")
    refused("does not exist", "made", tmp_path / "missing", tmp_path / "out")


def test_images_of_one_name_are_refused(tmp_path):
    for folder in ("image_SRF_2", "."):
        saved(tmp_path / "in" / folder / "a_SRF_2_HR.png", made(1))
    refused("have one name", "made", tmp_path / "in", tmp_path / "out", [2])


# Bad images


def test_all_bad_images_are_named_before_anything_is_written(tmp_path):
    source = source_of(tmp_path / "in")
    whole = (source / "HR" / "p0.png").read_bytes()
    (source / "HR" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "HR" / "empty.jpg").write_bytes(b"")
    saved(source / "HR" / "small.png", made(1, (16, 19)))
    said = refused("3 of 5 images cannot be used", "made", source, tmp_path / "out")
    reasons = {"cut": "is cut short", "empty": "zero bytes", "small": "too small"}
    for name, reason in reasons.items():
        assert [reason in line for line in said.splitlines() if f"{name}." in line] == [True]
    assert not (tmp_path / "out").exists()
    summary = build("made", source, tmp_path / "out", skip_bad=True)
    assert (summary.count, len(summary.skipped)) == (2, 3)
    assert sorted(os.listdir(tmp_path / "out" / "X4" / "LR")) == ["p0.png", "p1.png"]
    assert "left out (3):" in report(summary)
    assert "cut.png is cut short" in report(summary)


def test_a_set_of_bad_images_alone_is_refused(tmp_path):
    saved(tmp_path / "in" / "a.png", made(1, (8, 8)))
    refused(
        "1 of 1 images cannot be used.*nothing is left",
        "made",
        tmp_path / "in",
        tmp_path / "out",
        skip_bad=True,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scale", "least"), [(2, 16), (3, 18), (4, 20)])
def test_the_border_leaves_a_window_of_ssim(tmp_path, scale, least):
    assert least - 2 * scale >= 11 > least - scale - 2 * scale
    saved(tmp_path / "in" / "a.png", made(1, (least, 40)))
    summary = build("made", tmp_path / "in", tmp_path / "out", [scale])
    assert 0 < summary.scales[0].bicubic.ssim < 1
    saved(tmp_path / "small" / "a.png", made(1, (40, least - 1)))
    refused("too small", "made", tmp_path / "small", tmp_path / "other", [scale])


def test_scales_that_are_not_made_are_refused(tmp_path):
    for scales in ([], [1], [2, 8]):
        with pytest.raises(ValueError, match="scales must be"):
            build("made", source_of(tmp_path), tmp_path / "out", scales)


# Whole or absent


def test_finished_scales_are_left_alone(tmp_path):
    source = source_of(tmp_path / "in")
    first = build("made", source, tmp_path / "out", [2])
    before = (tmp_path / "out" / "X2").stat().st_ino
    shutil.copytree(source, tmp_path / "moved")  # the same images
    for overwrite in (False, True):
        again = build("made", tmp_path / "moved", tmp_path / "out", [2, 3], overwrite=overwrite)
        assert (tmp_path / "out" / "X2").stat().st_ino == before
        assert not again.scales[0].written
        assert again.scales[0].bicubic == first.scales[0].bicubic
        assert again.scales[0].sha256 == first.scales[0].sha256
        assert again.scales[1].written is not overwrite
    assert "was finished, left alone" in report(again)


@pytest.mark.parametrize("change", ["pixels", "renamed", "fewer"])
def test_a_scale_of_other_images_is_replaced_on_demand_only(tmp_path, change):
    source = source_of(tmp_path / "in")
    build("made", source, tmp_path / "out", [2])
    before = tree(tmp_path / "out")
    image = source / "HR" / "p0.png"
    if change == "pixels":
        saved(image, made(5))
    elif change == "renamed":
        image.rename(image.with_name("q.png"))
    else:
        image.unlink()
    refused(
        "X2 is another data set: of other images.*--overwrite",
        "made",
        source,
        tmp_path / "out",
        [2],
    )
    assert tree(tmp_path / "out") == before
    summary = build("made", source, tmp_path / "out", [2], overwrite=True)
    assert summary.scales[0].written
    build("made", source, tmp_path / "fresh", [2])
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["pixels", "missing", "cut"])
def test_a_scale_that_was_changed_is_noticed(tmp_path, change):
    source = source_of(tmp_path / "in")
    build("made", source, tmp_path / "out", [2])
    before = tree(tmp_path / "out")
    image = tmp_path / "out" / "X2" / "LR" / "p0.png"
    if change == "pixels":
        saved(image, read(image) ^ 1)
    elif change == "missing":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:-30])
    refused("X2 was changed after it was made", "made", source, tmp_path / "out", [2])
    build("made", source, tmp_path / "out", [2], overwrite=True)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("recipe", [None, b"{", b"[]", b'{"scale": 2, "train": []}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_made_is_never_touched(tmp_path, recipe, overwrite):
    source = source_of(tmp_path / "in")
    saved(tmp_path / "out" / "X3" / "HR" / "theirs.png", made(1))
    if recipe is not None:
        (tmp_path / "out" / "X3" / "recipe.json").write_bytes(recipe)
    before = tree(tmp_path / "out")
    options = {"overwrite": overwrite}
    refused("X3 .*not made by this command", "made", source, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == before  # X2 was not begun either


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    source = source_of(tmp_path / "in")
    make, calls = benchmark._make, []

    def interrupted(source, scale, folder):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(scale)
        return make(source, scale, folder)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "_make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build("made", source, tmp_path / "out")
    assert calls == [2, 2, 3]
    folders = [path.name for path in sorted((tmp_path / "out").iterdir()) if path.name[0] != "."]
    assert folders == ["X2", "X3.unfinished"]
    saved(tmp_path / "out" / "X3.unfinished" / "HR" / "stray.png", made(5))
    summary = build("made", source, tmp_path / "out")
    assert [each.written for each in summary.scales] == [False, True, True]
    build("made", source, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_full_disk_is_named_and_leaves_nothing_half_made(tmp_path, monkeypatch):
    source = source_of(tmp_path / "in")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        refused("disk is full", "made", source, tmp_path / "out")
    assert not any((tmp_path / "out" / f"X{scale}").exists() for scale in (2, 3, 4))
    build("made", source, tmp_path / "out")


def test_the_set_may_lie_where_the_tree_goes(tmp_path):
    source_of(tmp_path)
    first = build("made", tmp_path, tmp_path, [2])
    both = build("made", tmp_path, tmp_path, [4, 2, 4])
    assert [each.scale for each in both.scales] == [2, 4]
    assert [each.written for each in both.scales] == [False, True]
    assert both.source == tmp_path / "HR"
    # what was made is enough to find it finished, and for nothing else
    shutil.rmtree(tmp_path / "HR")
    (tmp_path / "X3.unfinished").mkdir()
    shutil.copytree(tmp_path / "X2", tmp_path / "X2.old")
    alone = build("made", tmp_path, tmp_path, [2, 4])
    assert [each.written for each in alone.scales] == [False, False]
    assert alone.scales[0].sha256 == first.scales[0].sha256
    refused("no HR images for x3.*--scale 2 4", "made", tmp_path, tmp_path, [2, 3, 4])
    saved(tmp_path / "X2" / "HR" / "p0.png", made(5))
    refused("X2 was changed .*move it away", "made", tmp_path, tmp_path, [2])


# The report


@pytest.mark.parametrize(
    ("psnr", "ssim", "agrees"),
    [(0.009, -0.0004, True), (-0.009, 0.0004, True), (0.011, 0, False), (0, -0.0006, False)],
)
def test_figures_agree_within_the_tolerance(tmp_path, monkeypatch, psnr, ssim, agrees):
    source = source_of(tmp_path / "in")
    measured = build("made", source, tmp_path / "out", [2]).scales[0].bicubic
    known = Scores(measured.psnr + psnr, measured.ssim + ssim)
    paper = KnownSet(2, {2: known}, KNOWN["Set5"].tolerance)
    monkeypatch.setitem(KNOWN, "made", paper)
    text = report(build("made", source, tmp_path / "out", [2]))
    assert ("  agrees\n" in text, "  differs: other images" in text) == (agrees, not agrees)
    assert f"known {known.psnr:.2f} dB / {known.ssim:.4f}" in text


def test_sets_that_papers_do_not_know_have_no_known_figures(tmp_path):
    summary = build("made", source_of(tmp_path / "in"), tmp_path / "out", [2])
    assert (summary.scales[0].known, summary.scales[0].agrees) == (None, None)
    assert "known" not in report(summary)
    assert "notices" not in report(summary)


def test_equal_notices_are_one_line(tmp_path):
    deep = np.zeros((*SIZE, 3), np.uint16)
    for number in range(7):
        saved(tmp_path / "in" / f"p{number}.png", deep)
    (notice,) = build("made", tmp_path / "in", tmp_path / "out", [2]).notices
    assert notice.startswith("7 x holds 16 bits")
    assert notice.endswith(": p0.png, p1.png, p2.png, p3.png, p4.png, and 2 more")
