"""Images packed for a machine without a network, unpacked there, and trained on by its recipe."""

import runpy
import sys
import tarfile

import cv2
import numpy as np
import pytest
from helpers import decoded, noisy_image, save_image
from training_runs import events, weights

from dlgsanet_arch import cli


@pytest.fixture
def pack(repository, tmp_path, monkeypatch):
    """A function that runs the script in `tmp_path`, and returns its error message or None."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pack", *map(str, arguments)])
        try:
            script = repository / "scripts/pack_training_data.py"
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    return call


@pytest.fixture
def images(tmp_path):
    """Two folders to train on, one image a small JPEG, and a test set: by path in the archive."""
    found = {}
    for number, path in enumerate(("A/a.png", "A/deep/b.png", "B/a.png", "Set14/c.png")):
        found[path] = noisy_image(number, (120, 130) if "Set14" in path else (360, 330))
        save_image(tmp_path / path, found[path])
    cv2.imwrite(str(tmp_path / "B/d.jpg"), found["A/a.png"], [cv2.IMWRITE_JPEG_QUALITY, 5])
    return found


def unpacked(archive):
    with tarfile.open(archive) as opened:
        return {each.name: opened.extractfile(each).read() for each in opened}


HR = ("--hr", "A", "B", "--test", "Set14")


def test_quality_follows_from_the_size_and_the_test_set_keeps_every_pixel(pack, images, tmp_path):
    assert pack(*HR, "--most", 100, "-o", "best.tar") is None
    best, size = unpacked("best.tar"), (tmp_path / "best.tar").stat().st_size
    assert pack(*HR, "--most", (size - 15_000) / 1e6, "-o", "less.tar") is None
    less = unpacked("less.tar")
    names = {"train/A/a.webp", "train/A/deep/b.webp", "train/B/a.webp", "train/B/d.jpg"}
    assert best.keys() == less.keys() == names | {"test/Set14/c.webp"}
    assert (tmp_path / "less.tar").stat().st_size <= size - 15_000
    for found, least in ((best, 33), (less, 31)):
        assert found["train/B/d.jpg"] == (tmp_path / "B/d.jpg").read_bytes()
        assert np.array_equal(decoded(found["test/Set14/c.webp"]), images["Set14/c.png"])
        for name in ("A/a", "A/deep/b", "B/a"):
            made = decoded(found[f"train/{name}.webp"])
            assert cv2.PSNR(made, images[f"{name}.png"]) > least, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*HR, "--most", 0.02), "more is needed even at quality 90; raise it"),
        (("--hr", "A", "--test", "Set14", "--most", 0.0101), "more is needed"),
        (("--hr", "A", "deeper/A", "--most", 9), "different names; got A, A"),
        (("--hr", "none", "--most", 9), "none"),
    ],
)
def test_what_cannot_be_packed_is_refused(pack, images, tmp_path, arguments, said):
    save_image(tmp_path / "deeper/A/a.png", images["A/a.png"])
    assert said in pack(*arguments, "-o", "none.tar")
    assert not (tmp_path / "none.tar").exists()


@pytest.mark.usefixtures("images")
def test_the_recipe_for_a_gpu_trains_on_what_was_unpacked(pack, tmp_path):
    assert pack(*HR, "--most", 9, "-o", "images.tar") is None
    with tarfile.open("images.tar") as opened:
        opened.extractall("packed", filter="data")
    root, small = ["--root", str(tmp_path)], ["--crop", "60", "--step", "60", "--patch", "15"]
    train = ["data", "train", "--hr", "packed/train", "--output", "datasets/MIX", "--scale", "4"]
    test = ["data", "benchmark", "--name", "Set14", "--hr", "packed/test/Set14", "--scale", "4"]
    assert cli.main([*train, *small, "--workers", "1"]) == 0
    assert cli.main([*test, *root, "--workers", "1"]) == 0
    edits = "path:pretrain_network_g=tiny_x4 train:max_minutes=10 train:total_iter=2"
    edits += " datasets:train:gt_size=60 datasets:train:batch_size_per_gpu=2 logger:print_freq=1"
    edits += " train:warmup_iter=1 datasets:train:num_worker_per_gpu=1"
    assert cli.main(["train", "-opt", "tiny_x4_gpu", *root, "--force_yml", *edits.split()]) == 0
    assert [line["iter"] for line in events(tmp_path, "tiny_x4_gpu", "train")] == [1, 2]
    (validation,) = events(tmp_path, "tiny_x4_gpu", "validation")
    assert validation["metrics"]["psnr"] > 30
    assert weights(tmp_path, "tiny_x4_gpu")
