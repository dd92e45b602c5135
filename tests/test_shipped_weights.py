"""The weights that come with the package: what they are, and what docs/results.md says of them."""

import itertools
import re

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr

from dlgsanet_arch import Upscaler, upscale
from dlgsanet_arch.checkpoint import bundled_weights, nearest_published, read_checkpoint, transfer
from dlgsanet_arch.data import demo
from dlgsanet_arch.data.bicubic import bicubic
from dlgsanet_arch.data.making import crop_to_multiple
from dlgsanet_arch.inference.upscaler import default_weights

BICUBIC = {2: 30.33, 3: 27.63, 4: 26.09}  # dB on Set14, Y, by BasicSR's metric
BUNDLED = {int(name[-1]): name for name in bundled_weights()}


def by_both(hr, scale, weights=None):
    """PSNR on Y of bicubic and of the bundled weights, or of others."""
    hr = crop_to_multiple(hr, scale)
    lr = bicubic(hr, 1 / scale)
    made = upscale(np.ascontiguousarray(lr[..., ::-1]), weights, scale=scale)[..., ::-1]
    how = {"crop_border": scale, "test_y_channel": True}
    return [calculate_psnr(each, hr, **how) for each in (bicubic(lr, scale), made)]


@pytest.mark.parametrize("scale", BUNDLED)
def test_they_are_the_published_configuration_and_say_what_they_are(scale):
    checkpoint = read_checkpoint(BUNDLED[scale])
    assert nearest_published(checkpoint.config) == (f"DLGSANet Tiny x{scale}", {})
    assert checkpoint.is_stated
    assert checkpoint.iteration > 0
    assert checkpoint.notes["licence"] == "Apache-2.0"
    assert "BSDS400" in checkpoint.notes["trained_on"]
    assert all(tensor.isfinite().all() for tensor in checkpoint.weights.values())
    assert default_weights(scale).stat().st_size < 3e6
    assert Upscaler(device="cpu", scale=scale).checkpoint.name == checkpoint.name


def test_a_scale_takes_the_network_of_the_next_one_up(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    for scale in (2, 3, 4):
        (folder / f"tiny_x{scale}.safetensors").touch()
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    asked = {None: 4, 1.5: 2, 2: 2, 2.5: 3, 3: 3, 4: 4, 8: 4}
    assert {each: default_weights(each).stem for each in asked} == {
        each: f"tiny_x{scale}" for each, scale in asked.items()
    }


@pytest.mark.parametrize(("source", "scale"), list(itertools.permutations(BUNDLED, 2)))
def test_transferred_to_another_scale_they_beat_bicubic_before_any_training(source, scale):
    image = cv2.imread(str(demo.images_folder() / demo.VALIDATION_IMAGES[0]))
    start = transfer(read_checkpoint(BUNDLED[source]), scale)
    base, ours = by_both(image[:240, :280], scale, start)
    assert ours > base + 0.4


@pytest.mark.parametrize("scale", BUNDLED)
def test_they_beat_bicubic_on_photographs_that_they_never_saw(scale):
    for name in demo.VALIDATION_IMAGES:
        image = cv2.imread(str(demo.images_folder() / name))
        base, ours = by_both(image[:240, :280], scale)
        assert ours > base + 0.4, name


@pytest.mark.parametrize("scale", BUNDLED)
def test_they_are_worth_what_the_documentation_says(repository, shared_data, scale):
    folder = shared_data / "data" / "Set14"
    paths = sorted(folder.rglob("*.png"))
    if len(paths) != 14:
        pytest.skip(f"there is no Set14 in {folder}")
    base, ours = np.mean([by_both(cv2.imread(str(path)), scale) for path in paths], axis=0)
    assert base == pytest.approx(BICUBIC[scale], abs=0.006)
    assert ours > BICUBIC[scale] + 1.0
    text = (repository / "docs" / "results.md").read_text()
    row = re.search(rf"\| DLGSANet Tiny x{scale} \| Set14 \| [^|]*\| [^|]*\| ([\d.]+) / ", text)
    assert ours == pytest.approx(float(row[1]), abs=0.011)
