import functools
import importlib.util
import signal
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.matlab_functions import imresize

from dlgsanet_arch import cli, data, options
from dlgsanet_arch.data import demo
from dlgsanet_arch.data.training_sets import Summary
from dlgsanet_arch.errors import UserError

TRAIN = ("left.png", "wide.png")
VALIDATION = ("face.png",)


def image(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth made image with some noise on it."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (5, 7, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).round().astype(np.uint8)


@pytest.fixture
def source(tmp_path) -> Path:
    """Stand-ins for the photographs: sides that are not multiples of anything."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    sizes = {"left.png": (145, 200), "wide.png": (121, 330), "face.png": (51, 63)}
    for seed, (name, size) in enumerate(sizes.items()):
        assert cv2.imwrite(str(folder / name), image(*size, seed))
    return folder


def prepare(folder: Path, source: Path, **changes) -> Summary:
    arguments = {"source": source, "train": TRAIN, "validation": VALIDATION, **changes}
    return demo.prepare(folder, **arguments)


def read_lmdb(path: Path) -> dict[str, np.ndarray]:
    with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin() as reader:
        return {
            bytes(key).decode(): cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_UNCHANGED)
            for key, value in reader.cursor()
        }


def matlab_lr(hr: np.ndarray, scale: int) -> np.ndarray:
    lr = imresize(hr.astype(np.float32) / 255, 1 / scale) * 255
    return np.clip(np.round(lr), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_lr_is_matlabs_bicubic_of_hr_at_the_same_place(tmp_path, source, scale):
    folder = tmp_path / "demo"
    prepare(folder, source, scale=scale)
    hr = read_lmdb(folder / "train_HR_sub.lmdb")
    lr = read_lmdb(folder / f"train_LR_bicubic_X{scale}_sub.lmdb")
    assert hr.keys() == lr.keys()
    meta = [
        (folder / name / "meta_info.txt").read_text().splitlines()
        for name in ("train_HR_sub.lmdb", f"train_LR_bicubic_X{scale}_sub.lmdb")
    ]
    assert [line.split(".")[0] for line in meta[0]] == [line.split(".")[0] for line in meta[1]]
    assert len(meta[0]) == len(hr)

    # left.png is cropped to 144x192; its sub-images start at 0, 24 down and 0, 60, 72 across.
    original = cv2.imread(str(source / "left.png"))[:144, :192]
    small = matlab_lr(original, scale)
    corners = [(top, left) for top in (0, 24) for left in (0, 60, 72)]
    keys = sorted(key for key in hr if key.startswith("left"))
    assert len(keys) == len(corners)
    for key, (top, left) in zip(keys, corners, strict=True):
        assert np.array_equal(hr[key], original[top : top + 120, left : left + 120])
        rows, columns = (slice(start // scale, (start + 120) // scale) for start in (top, left))
        assert np.array_equal(lr[key], small[rows, columns])

    face = cv2.imread(str(source / "face.png"))
    face = face[: 51 // scale * scale, : 63 // scale * scale]
    validation = folder / "val" / f"X{scale}"
    assert np.array_equal(cv2.imread(str(validation / "HR" / "face.png")), face)
    assert np.array_equal(cv2.imread(str(validation / "LR" / "face.png")), matlab_lr(face, scale))


def test_basicsr_reads_the_pairs(tmp_path, source, repository):
    folder = tmp_path / "demo"
    prepare(folder, source)
    file = options.load(repository / "options" / "train" / "demo.yml")
    training, scale = file["datasets"], file["scale"]
    for phase, count in (("train", 11), ("val", 1)):
        dataset = {**training[phase], "phase": phase, "scale": scale}
        for key in ("dataroot_gt", "dataroot_lq"):
            dataset[key] = dataset[key].replace("datasets/demo", str(folder))
        pairs = PairedImageDataset(dataset)
        assert len(pairs) == count
        pair = pairs[0]
        assert [scale * side for side in pair["lq"].shape[1:]] == list(pair["gt"].shape[1:])


def test_no_photograph_is_on_both_sides():
    train, validation = (
        {name.split(".")[0] for name in names}
        for names in (demo.TRAIN_IMAGES, demo.VALIDATION_IMAGES)
    )
    assert not train & validation
    assert len({"motorcycle_left", "motorcycle_right"} & train) in (0, 2)
    available = {path.name for path in demo.images_folder().iterdir()}
    assert available.issuperset({*demo.TRAIN_IMAGES, *demo.VALIDATION_IMAGES})


def test_a_complete_preparation_is_reused_and_what_is_missing_is_made(tmp_path, source):
    folder = tmp_path / "demo"
    assert prepare(folder, source).cut == 2
    assert prepare(folder, source).cut == 0
    lr = folder / "val" / "X4" / "LR" / "face.png"
    whole = lr.read_bytes()
    lr.unlink()
    assert prepare(folder, source).cut == 0
    assert lr.read_bytes() == whole
    assert prepare(folder, source, scale=2).databases.keys() == {
        folder / "train_HR_sub.lmdb",
        folder / "train_LR_bicubic_X2_sub.lmdb",
    }


def test_other_photographs_replace_what_was_made_from_the_first(tmp_path, source):
    folder = tmp_path / "demo"
    prepare(folder, source)
    assert cv2.imwrite(str(source / "left.png"), image(145, 200, 7))
    assert prepare(folder, source).cut == 2
    first = read_lmdb(folder / "train_HR_sub.lmdb")["left_s001"]
    assert np.array_equal(first, image(145, 200, 7)[:120, :120])


def test_an_interrupted_preparation_is_completed(tmp_path, source, monkeypatch):
    folder = tmp_path / "demo"

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "_write_validation", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, source)
    assert prepare(folder, source).cut == 0
    assert (folder / "val" / "X4" / "HR" / "face.png").is_file()
    assert not list(folder.rglob("*.unfinished"))


def test_what_is_not_ours_is_left_alone(tmp_path, source):
    database = tmp_path / "demo" / "train_HR_sub.lmdb"
    database.mkdir(parents=True)
    (database / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        prepare(tmp_path / "demo", source)
    assert (database / "thesis.txt").read_text() == "mine"


def test_a_missing_photograph_is_named(tmp_path, source):
    (source / "face.png").unlink()
    with pytest.raises(UserError, match=r"face\.png cannot be opened.*scikit-image"):
        prepare(tmp_path / "demo", source)


def test_the_verb_prepares_below_its_root(tmp_path, source, monkeypatch):
    images = {"source": source, "train": TRAIN, "validation": VALIDATION}
    monkeypatch.setattr(demo, "prepare", functools.partial(demo.prepare, **images))
    assert cli.main(["data", "--root", str(tmp_path), "demo"]) == 0
    assert cli.main(["data", "demo", "--root", str(tmp_path / "other")]) == 0
    for root in (tmp_path, tmp_path / "other"):
        assert len(read_lmdb(root / "datasets" / "demo" / "train_HR_sub.lmdb")) == 11


def test_the_verb_says_what_is_missing(monkeypatch, capsys):
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
