"""The weights that come with the package: what they are, and what docs/results.md says of them."""

import re

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr

from dlgsanet_arch import Upscaler, upscale
from dlgsanet_arch.checkpoint import nearest_published, read_checkpoint
from dlgsanet_arch.data import demo
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.making import crop_to_multiple
from dlgsanet_arch.inference.upscaler import default_weights

SCALE = 4
BICUBIC = 26.09  # known, on Set14 x4


def by_both(hr):
    """PSNR on Y of bicubic and of the bundled weights."""
    hr = crop_to_multiple(hr, SCALE)
    lr = bicubic(hr, 1 / SCALE)
    made = upscale(np.ascontiguousarray(lr[..., ::-1]))[..., ::-1]
    how = {"crop_border": SCALE, "test_y_channel": True}
    return [calculate_psnr(each, hr, **how) for each in (bicubic(lr, SCALE), made)]


def test_they_are_the_published_configuration_and_say_what_they_are():
    checkpoint = read_checkpoint(default_weights())
    assert nearest_published(checkpoint.config) == ("DLGSANet Tiny x4", {})
    assert checkpoint.is_stated
    assert checkpoint.iteration > 0
    assert checkpoint.notes["licence"] == "Apache-2.0"
    assert "BSDS400" in checkpoint.notes["trained_on"]
    assert all(tensor.isfinite().all() for tensor in checkpoint.weights.values())
    assert default_weights().stat().st_size < 3e6
    assert Upscaler(device="cpu").scale == SCALE


def test_they_beat_bicubic_on_photographs_that_they_never_saw():
    for name in demo.VALIDATION_IMAGES:
        image = cv2.imread(str(demo.images_folder() / name))
        base, ours = by_both(image[:240, :280])
        assert ours > base + 0.4, name


def test_they_are_worth_what_the_documentation_says(repository, shared_data):
    folder = shared_data / "data" / "Set14"
    paths = sorted(folder.rglob("*.png"))
    if len(paths) != 14:
        pytest.skip(f"there is no Set14 in {folder}")
    base, ours = np.mean([by_both(cv2.imread(str(path))) for path in paths], axis=0)
    assert base == pytest.approx(BICUBIC, abs=0.006)
    assert ours > BICUBIC + 1.0
    text = (repository / "docs" / "results.md").read_text()
    row = re.search(r"\| DLGSANet Tiny x4 \| Set14 \| [^|]*\| [^|]*\| ([\d.]+) / ", text)
    assert ours == pytest.approx(float(row[1]), abs=0.011)
