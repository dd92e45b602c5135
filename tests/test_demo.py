import importlib.util
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.matlab_functions import imresize
from helpers import decoded_entries, noisy_image, tree

from dlgsanet_arch import cli, data, options
from dlgsanet_arch.data import demo
from dlgsanet_arch.errors import UserError


def image(height: int, width: int, seed: int) -> np.ndarray:
    return noisy_image(seed, (height, width))


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """Stand-ins for the photographs: sides that are not multiples of anything."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    sizes = {"left.png": (145, 200), "wide.png": (121, 330), "face.png": (51, 63)}
    for seed, (name, size) in enumerate(sizes.items()):
        assert cv2.imwrite(str(folder / name), image(*size, seed))
    monkeypatch.setattr(demo, "images_folder", lambda: folder)
    monkeypatch.setattr(demo, "TRAIN_IMAGES", ("left.png", "wide.png"))
    monkeypatch.setattr(demo, "VALIDATION_IMAGES", ("face.png",))
    return folder


def test_lr_of_validation_is_matlabs_bicubic_of_hr(tmp_path, source):
    demo.prepare(tmp_path)
    face = cv2.imread(str(source / "face.png"))[:48, :60]
    small = np.round(imresize(face.astype(np.float32) / 255, 1 / 4) * 255).clip(0, 255)
    for part, expected in (("HR", face), ("LR", small)):
        written = cv2.imread(str(tmp_path / "val" / "X4" / part / "face.png"))
        assert np.array_equal(written, expected)


def test_basicsr_reads_the_pairs(tmp_path, source, repository):
    folder = tmp_path / "demo"
    demo.prepare(folder)
    file = options.load(repository / "options" / "train" / "demo.yml")
    for phase, count in (("train", 11), ("val", 1)):
        dataset = {**file["datasets"][phase], "phase": phase, "scale": file["scale"]}
        for key in ("dataroot_gt", "dataroot_lq"):
            dataset[key] = dataset[key].replace("datasets/demo", str(folder))
        pairs = PairedImageDataset(dataset)
        assert len(pairs) == count
        pair = pairs[0]
        assert [4 * side for side in pair["lq"].shape[1:]] == list(pair["gt"].shape[1:])


def test_no_photograph_is_on_both_sides():
    train, validation = (
        {name.split(".")[0] for name in names}
        for names in (demo.TRAIN_IMAGES, demo.VALIDATION_IMAGES)
    )
    assert not train & validation
    assert len({"motorcycle_left", "motorcycle_right"} & train) in (0, 2)
    available = {path.name for path in demo.images_folder().iterdir()}
    assert available.issuperset({*demo.TRAIN_IMAGES, *demo.VALIDATION_IMAGES})


def test_what_is_missing_or_of_other_photographs_is_made(tmp_path, source):
    folder = tmp_path / "demo"
    assert demo.prepare(folder).cut == 2
    lr = folder / "val" / "X4" / "LR" / "face.png"
    whole = lr.read_bytes()
    lr.unlink()
    assert demo.prepare(folder).cut == 0
    assert lr.read_bytes() == whole
    assert cv2.imwrite(str(source / "left.png"), image(145, 200, 7))
    assert demo.prepare(folder).cut == 2
    first = decoded_entries(folder / "train_HR_sub.lmdb")["left_s001"]
    assert np.array_equal(first, image(145, 200, 7)[:120, :120])
    (source / "face.png").unlink()
    with pytest.raises(UserError, match=r"face\.png cannot be opened.*scikit-image"):
        demo.prepare(folder)
    (folder / "train_HR_sub.lmdb" / "recipe.json").unlink()  # not ours
    before = tree(folder)
    with pytest.raises(UserError, match="move it away"):
        demo.prepare(folder)
    assert tree(folder) == before


def test_the_verb_prepares_below_its_root_or_says_what_is_missing(
    tmp_path, source, monkeypatch, capsys
):
    assert cli.main(["data", "--root", str(tmp_path), "demo"]) == 0
    assert cli.main(["data", "demo", "--root", str(tmp_path / "other")]) == 0
    for root in (tmp_path, tmp_path / "other"):
        assert len(decoded_entries(root / "datasets" / "demo" / "train_HR_sub.lmdb")) == 11
    monkeypatch.delattr(data, "training_sets")
    monkeypatch.setitem(sys.modules, "dlgsanet_arch.data.training_sets", None)
    assert cli.main(["data", "demo"]) == 1
    assert "dlgsanet doctor" in capsys.readouterr().err


@pytest.fixture
def driver(repository, monkeypatch, tmp_path):
    """scripts/demo.py as a module, with a temporary folder as its root."""
    spec = importlib.util.spec_from_file_location("demo_driver", repository / "scripts/demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "EXPERIMENT", tmp_path / "experiments" / "demo")
    return module


LOOP = """
import time

print("total_iter: 1500", flush=True)
try:
    for i in range(1000, 1500):
        print(f"2026-01-01 00:00:00,000 INFO: [epoch:  0, iter:   {i:8,d}, lr]", flush=True)
        time.sleep(0.01)
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def test_the_driver_interrupts_a_command_past_an_iteration(driver, tmp_path, capsys):
    (tmp_path / "loop.py").write_text(LOOP)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job
    try:
        driver.run("loop.py", stop_when=driver.past(1010), expect=128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, ignored)
    shown = capsys.readouterr().out
    assert "   [epoch:  0, iter:      1,011, lr]" in shown
    assert "2026-01-01" not in shown
    assert "total_iter" not in shown


def test_the_driver_fails_with_the_step_that_fails(driver, tmp_path, capsys):
    (tmp_path / "fails.py").write_text("raise SystemExit('the disk is full')\n")
    with pytest.raises(driver.StepFailed, match=r"fails\.py` ended with status 1"):
        driver.run("fails.py")
    assert "the disk is full" in capsys.readouterr().err


def test_the_driver_fails_where_training_ended_early(driver):
    import torch

    states = driver.EXPERIMENT / "training_states"
    states.mkdir(parents=True)
    torch.save({"iter": 30}, states / "30.state")
    driver.check_saved(30)
    with pytest.raises(driver.StepFailed, match="did not reach iteration 40"):
        driver.check_saved(40)


def test_the_demos_option_files_belong_together(repository):
    train, test = (
        options.load(repository / "options" / kind / "demo.yml") for kind in ("train", "test")
    )
    assert train["network_g"] == test["network_g"]
    assert train["val"]["metrics"] == test["val"]["metrics"]
    total, saved = train["train"]["total_iter"], train["logger"]["save_checkpoint_freq"]
    assert total == 2 * saved
    assert sum(train["train"]["scheduler"]["periods"]) == total
    # The driver interrupts at the first line after the checkpoint: it must come before the end.
    assert saved % train["logger"]["print_freq"] == 0
    assert saved > train["logger"]["print_freq"]
