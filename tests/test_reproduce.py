"""The paper's table, measured: figures, what is missing, and resuming after an interruption."""

import csv
import json
import math

import cv2
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from helpers import SMALL_ARGUMENTS

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.checkpoint import published_configs, read_checkpoint
from dlgsanet_arch.cli import main
from dlgsanet_arch.tools import reproduction
from dlgsanet_arch.tools.published import DATASETS, PUBLISHED, RETRAINED

SCALE = 2
SCORES = {network: published.scores for network, published in PUBLISHED.items()}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net_g_10.pth"
    torch.save({"params": DLGSANet(**SMALL_ARGUMENTS).state_dict()}, path)
    return path


@pytest.fixture
def datasets(tmp_path):
    folder = tmp_path / "benchmark"
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 48), (36, 30)]):
        lr = random.integers(0, 256, (height // SCALE, width // SCALE, 3), np.uint8)
        hr = cv2.resize(lr, (width, height), interpolation=cv2.INTER_CUBIC)
        for part, image in (("HR", hr), ("LR", lr)):
            path = folder / "Set5" / f"X{SCALE}" / part / f"image{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)
    return folder


def call(weights, datasets, out, *more):
    named = ["-m", str(weights), "--datasets", str(datasets), "-o", str(out)]
    return main(["reproduce", *named, "--device", "cpu", *more])


def by_basicsr(weights, datasets):
    """PSNR and SSIM of each image, from 8-bit files."""
    network = read_checkpoint(weights).network()
    figures = []
    for path in sorted((datasets / "Set5" / f"X{SCALE}" / "LR").iterdir()):
        lr = cv2.imread(str(path))
        given = torch.from_numpy(lr[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            made = network(given)[0].clamp(0, 1).permute(1, 2, 0).numpy()[..., ::-1]
        made = (made * 255).round().astype(np.uint8)
        hr = cv2.imread(str(path.parent.parent / "HR" / path.name))
        how = {"crop_border": SCALE, "test_y_channel": True}
        figures.append((calculate_psnr(made, hr, **how), calculate_ssim(made, hr, **how)))
    return np.array(figures)


def test_the_figures_are_those_of_basicsr(weights, datasets, tmp_path):
    out = tmp_path / "out"
    assert call(weights, datasets, out, "--sets", "set5", "Set 5") == 0
    expected = by_basicsr(weights, datasets)
    with (out / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["image0", "image1"]
    found = np.array([[float(row[n]) for n in ("psnr", "ssim")] for row in rows])
    assert found == pytest.approx(expected, abs=2e-5)
    table = json.loads((out / "table.json").read_text())
    cell = next(each for each in table["cells"] if each["psnr"] is not None)
    means = [cell["psnr"], cell["ssim"]]
    assert means == pytest.approx(expected.mean(0), abs=2e-5)
    assert cell["images"] == 2
    assert cell["difference"][0] == pytest.approx(means[0] - 38.16)
    assert set(table["sets"]) == {"Set5 x2"}


def test_the_table_says_what_is_missing(weights, datasets, tmp_path, capsys):
    assert call(weights, datasets, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "| DLGSANet Tiny x2* | Set5 | 38.16 / 0.9611 | 38.16 / 0.9615 |" in text
    assert "weights of another configuration" in text
    assert "Urban100 --hr FOLDER --scale 2 makes it" in text
    assert "no weights of DLGSANet Light x4 are given" in text
    assert call(weights, datasets, tmp_path / "out", "--measured-only") == 0
    text = capsys.readouterr().out
    assert "missing" not in text.lower()
    assert text.count("| DLGSANet") == 1


def test_what_was_measured_is_not_computed_again(weights, datasets, tmp_path, monkeypatch):
    out = tmp_path / "out"
    computed = []
    enlarge = reproduction.Upscaler.__call__

    def counting(self, image, progress=None):
        if len(computed) == allowed:
            raise KeyboardInterrupt
        computed.append(image.shape)
        return enlarge(self, image, progress)

    monkeypatch.setattr(reproduction.Upscaler, "__call__", counting)
    allowed = 1
    assert call(weights, datasets, out) == 130
    allowed = 10
    assert call(weights, datasets, out) == 0
    assert len(computed) == 2
    assert call(weights, datasets, out, "--ensemble") == 0  # another way to compute
    assert len(computed) == 4
    hr = datasets / "Set5/X2/HR/image1.png"
    assert cv2.imwrite(str(hr), 255 - cv2.imread(str(hr)))
    assert call(weights, datasets, out) == 0
    assert len(computed) == 5
    other = tmp_path / "other.pth"
    torch.manual_seed(1)
    torch.save({"params": DLGSANet(**SMALL_ARGUMENTS).state_dict()}, other)
    assert call(other, datasets, out) == 0
    assert len(computed) == 7


@pytest.mark.parametrize(
    ("network", "psnr", "verdict"),
    [
        ("Tiny", 38.16, "reproduced"),
        ("Tiny", 38.12, "reproduced"),
        ("Tiny", 38.0, "below"),
        ("Tiny", 38.3, "above"),
        ("Large", 38.3, "nothing published"),
    ],
)
def test_verdicts_and_identical_images_which_are_left_out(network, psnr, verdict):
    network = f"DLGSANet {network}"
    rows = [{"psnr": each, "ssim": 1.0} for each in (math.inf, psnr)]
    cell = reproduction.make_cell(network, 2, "Set5", rows)
    assert (cell["psnr"], cell["identical"], cell["images"]) == (psnr, 1, 2)
    assert cell["verdict"] == verdict


def test_published_figures_are_complete():
    for name in published_configs():
        network, scale = name.rsplit(" x", 1)
        if network.endswith("Large"):
            continue
        published, retrained = (each[network, int(scale)] for each in (SCORES, RETRAINED))
        assert tuple(published) == tuple(retrained) == DATASETS
        # slips of the pen would be larger
        difference = np.array([*retrained.values()]) - np.array([*published.values()])
        assert (abs(difference) < (0.21, 0.003)).all()
    assert SCORES["DLGSANet Tiny", 4]["Set14"] == (28.79, 0.7861)


def test_what_cannot_be_measured_is_said(weights, datasets, tmp_path, capsys):
    out = tmp_path / "out"
    for given in (weights, "tiny_x4"):  # bundled weights go by name
        assert call(given, tmp_path / "nothing", out) == 1
        assert "no cell could be measured" in capsys.readouterr().err
    lr = datasets / "Set5/X2/LR/image0.png"
    whole = lr.read_bytes()
    cv2.imwrite(str(lr), np.zeros((9, 9, 3), np.uint8))
    assert call(weights, datasets, out) == 1
    assert "image0.png" in capsys.readouterr().err
    lr.write_bytes(whole[:60])
    assert call(weights, datasets, out) == 1
    assert "image0.png" in capsys.readouterr().err
    lr.unlink()
    assert call(weights, datasets, out) == 1
    assert "image0 is in one of HR and LR alone" in capsys.readouterr().out
    (out / "images.csv").write_text("a,b\n1,2\n")
    assert call(weights, datasets, out) == 1
    assert "was not written by this verb" in capsys.readouterr().err
    assert call(weights, datasets, out, "--tolerance", "-1") == 1
