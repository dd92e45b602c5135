"""The figure of crops: what is measured, where the box goes, and that crops keep their pixels."""

import re

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils.matlab_functions import imresize
from helpers import SMALL_NETWORK

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.checkpoint import Checkpoint, save_checkpoint
from dlgsanet_arch.cli import main
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.inference import Upscaler
from dlgsanet_arch.tools import crop_figure, figures
from dlgsanet_arch.tools.crop_figure import Box, Panel


@pytest.fixture
def hr():
    coarse = np.random.default_rng(0).uniform(0, 255, (9, 13, 3)).astype(np.float32)
    return (
        cv2.resize(coarse, (104, 72), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    )


@pytest.fixture
def weights(tmp_path):
    config = {name: value for name, value in SMALL_NETWORK.items() if name != "type"}
    path = tmp_path / "small.safetensors"
    save_checkpoint(Checkpoint(DLGSANet(**config).state_dict(), config), path)
    return path


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


def test_figures_are_those_of_basicsr(hr):
    result = noisy(hr, 1)
    first, last = crop_figure.panels(hr, {"A": result}, 4)
    pair = [image[..., ::-1] for image in (result, hr)]
    assert first.psnr == pytest.approx(calculate_psnr(*pair, 4, test_y_channel=True), abs=1e-4)
    assert first.ssim == pytest.approx(calculate_ssim(*pair, 4, test_y_channel=True), abs=1e-4)
    assert first.figures == f"{first.psnr:.2f} / {first.ssim:.4f}"
    assert (last.label, last.figures) == ("HR", "PSNR / SSIM")


def test_result_of_uncropped_hr_is_cut_and_others_are_refused(hr):
    larger = np.pad(hr, ((0, 3), (0, 1), (0, 0)))
    assert crop_figure.panels(hr, {"A": larger}, 4)[0].psnr == float("inf")
    for wrong in (np.pad(hr, ((0, 4), (0, 0), (0, 0))), hr[1:]):
        with pytest.raises(UserError, match=r"A is .* and HR is 104x72"):
            crop_figure.panels(hr, {"A": wrong}, 4)
    with pytest.raises(UserError, match="A cannot be measured"):
        crop_figure.panels(hr[:16, :16], {"A": hr[:16, :16]}, 4)
    with pytest.raises(UserError, match="2 to 8 crops"):
        crop_figure.panels(hr, {str(i): hr for i in range(8)}, 4)


def test_box_goes_where_methods_differ_and_not_where_hr_does(hr):
    one, other = hr.copy(), hr.copy()
    one[20:36, 60:76] = 0
    other[20:36, 60:76] = 255
    one[50:66, 5:21] = other[50:66, 5:21] = 0  # both are wrong, and alike
    made = crop_figure.panels(hr, {"bicubic": hr, "A": one, "B": other}, 2)
    assert crop_figure.most_different_crop(made, 16) == Box(60, 20, 16)
    # One method: it is held against bicubic. None: bicubic against HR.
    assert crop_figure.most_different_crop(
        crop_figure.panels(hr, {"bicubic": other, "A": one}, 2), 16
    ) == Box(60, 20, 16)
    assert (
        crop_figure.most_different_crop(crop_figure.panels(hr, {"bicubic": other}, 2), 16).side
        == 16
    )


def test_bicubic_has_no_say_beside_two_methods(hr):
    one, bicubic = hr.copy(), hr.copy()
    one[20:36, 60:76] ^= 16
    bicubic[40:56, 10:26] ^= 128  # by far the larger difference
    made = crop_figure.panels(hr, {"bicubic": bicubic, "A": one, "B": hr}, 2)
    assert crop_figure.most_different_crop(made, 16) == Box(60, 20, 16)


def test_box_of_methods_that_do_not_differ_and_of_the_whole(hr):
    made = crop_figure.panels(hr, {"bicubic": hr, "A": hr, "B": hr}, 2)
    assert crop_figure.most_different_crop(made, 16) == Box(0, 0, 16)
    assert crop_figure.most_different_crop(made, 72).side == 72
    for side in (73, 0, -5):
        with pytest.raises(UserError, match="box"):
            crop_figure.most_different_crop(made, side)


@pytest.mark.parametrize("box", [Box(-1, 0, 8), Box(0, 65, 8), Box(97, 0, 8), Box(0, 0, 3)])
def test_boxes_outside_are_refused(hr, box):
    with pytest.raises(UserError, match="box"):
        crop_figure.check_box(box, hr)


@pytest.mark.parametrize("count", range(2, 9))
def test_crops_keep_their_pixels(hr, tmp_path, count):
    """Each is in the file once, each pixel a square of whole pixels, in the order given."""
    made = crop_figure.panels(hr, {f"method {i}": noisy(hr, i) for i in range(count - 1)}, 2)
    box = Box(31, 17, 26)
    figures.save_figure(crop_figure.draw(made, box, name="image", scale=2), tmp_path / "a.png")
    drawn = cv2.imread(str(tmp_path / "a.png"))[..., ::-1]
    places = []
    for panel in made:
        crop = panel.image[17:43, 31:57].repeat(10, 0).repeat(10, 1)
        (place,) = find_block(drawn, crop)
        places.append(place)
    assert places == sorted(places)
    assert len({y for y, _ in places}) == (1 if count <= 3 else 2)


def test_long_names_wrap_and_are_no_formulas(hr):
    name = "a_method_with_a_name_that_has_no_end_and no spaces $x^2$ for " + 40 * "W"
    made = [Panel(name, hr, 30.0, 0.9), Panel("HR", hr)]
    drawn = crop_figure.draw(made, Box(0, 0, 26), name=3 * name, scale=2)
    texts = [text.get_text() for text in drawn.texts]
    assert max(map(len, texts)) < 100
    assert "a_method_with_a_name_that_" in texts
    assert "".join(texts).replace(" ", "").count("nospaces$x^2$for") == 4
    assert not any(text.get_parse_math() for text in drawn.texts)


def test_results_are_found_by_name(tmp_path):
    for name in ("img_1_EDSR.png", "img_10_EDSR.png", "babyx4.png", "babyxyz.png", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "a_more.png").touch()
    (tmp_path / "img_1.txt").touch()
    for name, file in (("img_1", "img_1_EDSR.png"), ("baby", "babyx4.png"), ("a", "a.png")):
        assert crop_figure.find_result(tmp_path, name).name == file
    assert crop_figure.find_result(tmp_path / "a.png", "other") == tmp_path / "a.png"
    with pytest.raises(UserError, match=r"several results of img.*img_1_EDSR.*name one file"):
        crop_figure.find_result(tmp_path, "img")
    with pytest.raises(UserError, match="no result of nothing"):
        crop_figure.find_result(tmp_path, "nothing")
    with pytest.raises(UserError, match="does not exist"):
        crop_figure.find_result(tmp_path / "absent", "a")


def test_scale_of_a_pair(hr):
    assert crop_figure.scale_between(hr[:71], hr[:35, :52]) == 2
    for lr in (hr[:36, :51], np.pad(hr, ((0, 1), (0, 0), (0, 0)))):
        with pytest.raises(UserError, match="not a small version"):
            crop_figure.scale_between(hr, lr)


def test_command(hr, weights, tmp_path, capsys):
    uncropped = np.pad(hr, ((0, 1), (0, 1), (0, 0)), mode="edge")
    image = write(tmp_path / "bird.png", uncropped)
    write(tmp_path / "edsr" / "bird_x2.png", noisy(hr, 3))
    arguments = ["compare", "--hr", image, "--weights", weights, "--weights", f"Old={weights}"]
    arguments += ["--result", f"EDSR={tmp_path / 'edsr'}", "-o", tmp_path / "a.pdf"]
    assert main([*map(str, arguments), "--device", "cpu", "--box", "40", "20", "32"]) == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    lines = capsys.readouterr().out.splitlines()

    def line(label, rgb):
        pair = [rgb[..., ::-1], hr[..., ::-1]]
        psnr, ssim = (f(*pair, 2, test_y_channel=True) for f in (calculate_psnr, calculate_ssim))
        return f"{label}: {psnr:.2f} / {ssim:.4f}"

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
        (["--scale", "2", "--box", "0", "0", "16", "--size", "9"], "leave out --size"),
        (["--scale", "2", "--size", "0"], "4 pixels or more"),
        (["--scale", "2", "-o", "figure.txt"], r"\.png"),
        (["--scale", "2", *(7 * ["--result", "A=b"])], "8 crops at most"),
        (["--weights", "{text}"], "image.txt|weights"),
    ],
)
def test_faults_are_named_and_nothing_is_written(
    hr, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    places = {"hr": write(tmp_path / "hr.png", hr), "lr4": write(tmp_path / "lr.png", hr[::4, ::4])}
    places["text"] = tmp_path / "image.txt"
    places["text"].write_text("no image")
    before = sorted(tmp_path.iterdir())
    given = [each.format(**places) for each in arguments]
    assert main(["compare", "--hr", str(places["hr"]), *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dlgsanet: ")
    assert re.search(message, error), error
    assert sorted(tmp_path.iterdir()) == before
