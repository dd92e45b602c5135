"""The figure of crops: what is measured, where the box goes, and that crops keep their pixels."""

import re

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils.matlab_functions import imresize
from helpers import small_checkpoint

from dlgsanet_arch.checkpoint import save_checkpoint
from dlgsanet_arch.cli import cmd_compare, main
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.inference import Upscaler
from dlgsanet_arch.tools import figure
from dlgsanet_arch.tools.figure import Box, Comparison, Panel


@pytest.fixture
def hr():
    coarse = np.random.default_rng(0).uniform(0, 255, (9, 13, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (104, 72), interpolation=cv2.INTER_CUBIC)
    return smooth.clip(0, 255).astype(np.uint8)


@pytest.fixture
def weights(tmp_path):
    save_checkpoint(small_checkpoint(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def write(path, rgb):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb[..., ::-1])
    return path


def noisy(image, seed, level=20):
    noise = np.random.default_rng(seed).normal(0, level, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def find_block(image, block):
    """Where an image holds a block, to the last pixel."""
    height, width = block.shape[:2]
    corner = (image[: -height + 1, : -width + 1] == block[0, 0]).all(2)
    places = zip(*np.nonzero(corner), strict=True)
    return [(y, x) for y, x in places if (image[y : y + height, x : x + width] == block).all()]


def score(result, hr, scale):
    pair = [image[..., ::-1] for image in (result, hr)]
    return [f(*pair, scale, test_y_channel=True) for f in (calculate_psnr, calculate_ssim)]


def test_scores_and_their_table_are_those_of_basicsr(hr):
    images = [hr, 255 - hr]
    results = [{"bicubic": noisy(image, 1), "A": noisy(image, 2, 5)} for image in images]
    made = [figure.compare(str(i), images[i], results[i], 4) for i in range(2)]
    expected = [[score(each, images[i], 4) for each in results[i].values()] for i in range(2)]
    for each, (first, second) in zip(made, expected, strict=True):
        *panels, last = each.panels
        assert [(p.psnr, p.ssim) for p in panels] == [pytest.approx(first), pytest.approx(second)]
        assert panels[0].scores == "{:.2f} / {:.4f}".format(*first)
        assert (last.label, last.scores) == ("HR", "PSNR / SSIM")
    rows = [line.strip("| ").split(" | ") for line in figure.table(made).splitlines()]
    assert rows[0] == ["image", "bicubic", "A", "gain"]
    for row, (base, ours) in zip(rows[2:], [*expected, np.mean(expected, axis=0)], strict=True):
        cells = ["{:.2f} dB / {:.4f}".format(*each) for each in (base, ours)]
        assert row[1:] == [*cells, f"{ours[0] - base[0]:+.2f} dB"]
    assert [row[0] for row in rows[2:]] == ["0", "1", "**mean**"]


def test_result_of_uncropped_hr_is_cut_and_others_are_refused(hr):
    larger = np.pad(hr, ((0, 3), (0, 1), (0, 0)))
    assert figure.compare("a", hr, {"A": larger}, 4).panels[0].psnr == float("inf")
    small = hr[:16, :16]
    for image, results, message in (
        (hr, {"A": np.pad(hr, ((0, 4), (0, 0), (0, 0)))}, "A is 104x76 and HR is 104x72"),
        (hr, {"A": hr[1:]}, "A is 104x71 and HR is 104x72"),
        (small, {"A": small}, "A cannot be measured"),
    ):
        with pytest.raises(UserError, match=message):
            figure.compare("a", image, results, 4)


def chosen(hr, results, side=16):
    return figure.compare("a", hr, results, 2, side).box


def test_box_goes_where_methods_differ_and_not_where_hr_does(hr):
    one, other, only = hr.copy(), hr.copy(), hr.copy()
    one[20:36, 60:76] = 0
    other[20:36, 60:76] = 255
    only[20:36, 60:76] ^= 128
    # A single method is compared with bicubic, and bicubic alone with HR.
    assert chosen(hr, {"bicubic": other, "A": one}) == Box(60, 20, 16)
    assert chosen(hr, {"bicubic": only}) == Box(60, 20, 16)
    assert chosen(hr, {"bicubic": only}, None).side == 32
    one[50:66, 5:21] = other[50:66, 5:21] = 0  # both are wrong, and alike
    bicubic = hr.copy()
    bicubic[40:56, 10:26] ^= 128  # has no say beside two methods
    assert chosen(hr, {"bicubic": bicubic, "A": one, "B": other}) == Box(60, 20, 16)


def test_boxes_of_equal_methods_of_the_whole_image_and_outside(hr):
    same = {"bicubic": hr, "A": hr, "B": hr}
    assert chosen(hr, same) == Box(0, 0, 16)
    assert chosen(hr, same, 72).side == 72
    outside = [Box(-1, 0, 8), Box(0, 65, 8), Box(97, 0, 8), Box(0, 0, 3)]
    for box in (73, 0, -5, *outside):
        with pytest.raises(UserError, match="box"):
            chosen(hr, same, box)


@pytest.mark.parametrize("count", range(2, 9))
def test_crops_keep_their_pixels(hr, tmp_path, count):
    """Each is in the file once, each pixel a square of whole pixels, in the order given."""
    results = {f"method {i}": noisy(hr, i) for i in range(count - 1)}
    others = {name: 255 - image for name, image in results.items()}
    made = [figure.compare("image", hr, each, 2, Box(31, 17, 26)) for each in (results, others)]
    figure.save(figure.draw(made), tmp_path / "a.png")
    drawn = cv2.imread(str(tmp_path / "a.png"))[..., ::-1]
    places = []
    for panel in (panel for each in made for panel in each.panels[:-1]):
        (place,) = find_block(drawn, panel.image[17:43, 31:57].repeat(10, 0).repeat(10, 1))
        places.append(place)
    assert places == sorted(places)
    assert len({y for y, _ in places}) == 2 * (1 if count <= 3 else 2)


def test_long_names_wrap_and_are_no_formulas(hr):
    name = "a_method_with_a_name_that_has_no_end_and no spaces $x^2$ for " + 40 * "W"
    panels = [Panel(name, hr, 30.0, 0.9), Panel("HR", hr)]
    drawn = figure.draw([Comparison(3 * name, 2, panels, Box(0, 0, 26))])
    captions = [text for axes in drawn.axes for text in axes.texts]
    texts = [line for text in captions for line in text.get_text().splitlines()]
    assert max(map(len, texts)) < 100
    assert "a_method_with_a_name_that_" in texts
    assert "".join(texts).replace(" ", "").count("nospaces$x^2$for") == 4
    assert not any(text.get_parse_math() for text in captions)


def test_results_are_found_by_name(tmp_path):
    names = ("img_1_EDSR.png", "img_10_EDSR.png", "babyx4.png", "babyxyz.png", "a.png")
    for name in (*names, "a_more.png", "img_1.txt"):
        (tmp_path / name).touch()
    for name, file in (("img_1", "img_1_EDSR.png"), ("baby", "babyx4.png"), ("a", "a.png")):
        assert cmd_compare.find_result(tmp_path, name).name == file
    assert cmd_compare.find_result(tmp_path / "a.png", "other") == tmp_path / "a.png"
    for place, name, message in (
        (tmp_path, "img", r"several results of img.*img_1_EDSR.*name one file"),
        (tmp_path, "nothing", "no result of nothing"),
        (tmp_path / "absent", "a", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            cmd_compare.find_result(place, name)


def test_command(hr, weights, tmp_path, capsys):
    uncropped = np.pad(hr, ((0, 1), (0, 1), (0, 0)), mode="edge")
    image = write(tmp_path / "bird.png", uncropped)
    write(tmp_path / "edsr" / "bird_x2.png", noisy(hr, 3))
    arguments = ["compare", "--hr", image, "-m", weights, "--weights", f"Old={weights}"]
    arguments += ["--result", f"EDSR={tmp_path / 'edsr'}", "-o", tmp_path / "a.pdf"]
    assert main([*map(str, arguments), "--device", "cpu", "--box", "40", "20", "32"]) == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    lines = capsys.readouterr().out.splitlines()

    def line(label, rgb):
        return f"{label}: " + "{:.2f} / {:.4f}".format(*score(rgb, hr, 2))

    def levels(image):
        return (np.asarray(image) * 255).round().clip(0, 255).astype(np.uint8)

    lr = levels(imresize(hr.astype(np.float32) / 255, 1 / 2))
    enlarged = levels(imresize(lr.astype(np.float32) / 255, 2))
    ours = Upscaler(weights, device="cpu")(lr)
    assert lines[0] == line("bicubic", enlarged)
    assert lines[1] == line("EDSR", noisy(hr, 3))
    assert lines[2].endswith(line("", ours))
    assert lines[3] == line("Old", ours)
    assert lines[4:] == ["box: 40 20 32", f"written: {tmp_path / 'a.pdf'}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "scale is not known"),
        (["--scale", "0"], "0 times smaller"),
        (["--scale", "500"], "500 times smaller"),
        (["--scale", "2", "--lr", "{lr4}"], "scales differ: --scale is 2; .*makes it x4"),
        (["--scale", "2", "--lr", "{hr}"], "scales differ"),
        (["--scale", "2", "--result", "A={lr4}"], "A is 26x18 and HR is 104x72"),
        (["--scale", "2", "--result", "HR={hr}"], "called 'HR'"),
        (["--scale", "2", "--result", "A={hr}", "--result", "A={hr}"], "called 'A'"),
        (["--scale", "2", "--result", "A={text}"], "no image|not an image|cannot be"),
        (["--scale", "2", "--box", "100", "0", "16"], "does not lie within"),
        (["--scale", "2", "--box", "0", "16"], "X Y SIDE, or SIDE alone; got 2"),
        (["--scale", "2", "--box", "0"], "4 pixels or more"),
        (["--scale", "2", "--lr", "{odd}"], "LR is 51x36, which is not a small version of HR"),
        (["--scale", "2", "-o", "figure.txt"], r"\.png"),
        (["--scale", "2", "-o", "{hr}"], r"hr\.png is also read"),
        (["--scale", "2", "-o", "/proc/figure.png"], "cannot be written"),
        (["--scale", "2", "-o", "n" * 300 + ".png"], "cannot be written: .*too long"),
        (["--scale", "2", *(7 * ["--result", "A=b"])], "8 crops at most"),
        (["--weights", "{text}"], "image.txt|weights"),
    ],
)
def test_faults_are_named_and_nothing_is_written(
    hr, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    images = {"hr": hr, "lr4": hr[::4, ::4], "odd": hr[:36, :51]}
    places = {name: write(tmp_path / f"{name}.png", image) for name, image in images.items()}
    places["text"] = tmp_path / "image.txt"
    places["text"].write_text("no image")
    before = sorted(tmp_path.iterdir())
    given = [each.format(**places) for each in arguments]
    assert main(["compare", "--hr", str(places["hr"]), *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dlgsanet: ")
    assert re.search(message, error), error
    assert sorted(tmp_path.iterdir()) == before
