import os
import re
import shutil
import sys
from pathlib import Path

import cv2
import helpers
import pytest
import torch

from dlgsanet_arch import cli, pipeline
from dlgsanet_arch.cli import cmd_train
from dlgsanet_arch.errors import UserError

SAMPLES = 5


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with images, and a current folder that is another one."""
    folder = tmp_path / "root"
    helpers.write_pairs(folder / "data", SAMPLES)
    return folder


@pytest.fixture
def options() -> dict:
    return helpers.small_train_options(Path("data"))


def test_train_py_resumes_and_test_py_tests_from_any_folder(repository, tmp_path):
    """Real runs in a copy of the checkout, whose folder everything is below."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    elsewhere.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "dlgsanet_arch", checkout / "dlgsanet_arch", ignore=ignored)
    helpers.write_pairs(checkout / "data", SAMPLES)
    data, weights = Path("data"), Path("experiments/small/models/net_g_latest.pth")
    helpers.write_options(elsewhere / "train.yml", helpers.small_train_options(data))
    helpers.write_options(elsewhere / "test.yml", helpers.small_test_options(data, weights))

    def run(door, *arguments):
        shutil.copy(repository / door, checkout)
        result = helpers.run([checkout / door, *arguments], cwd=elsewhere)
        assert result.returncode == 0, result.stderr
        return result.stderr

    halfway = run("train.py", "-opt", "train.yml", "--force_yml", "train:total_iter=2")
    resumed = run("train.py", "-opt", "train.yml", "--auto_resume")
    tested = run("test.py", "-opt", "test.yml")
    assert "iter:       2," in halfway
    assert "Resuming training from epoch: 0, iter: 2." in resumed
    assert "iter:       3," in resumed
    assert "iter:       2," not in resumed
    assert torch.load(checkout / "experiments/small/training_states/4.state")["iter"] == 4
    assert listing(elsewhere) == ["test.yml", "train.yml"]
    assert [path.name for path in (checkout / "experiments").glob("[!.]*")] == ["small"]
    # the figure tested is the figure validated
    figures = [re.findall(r"# psnr: ([\d.]+)", text) for text in (tested, resumed)]
    assert figures[0] == figures[1][-1:]
    images = list((checkout / "results/small/visualization/made_val").glob("*.png"))
    assert len(images) == SAMPLES
    assert cv2.imread(str(images[0])).shape == (48, 64, 3)


def test_a_verb_trains_below_its_root_and_leaves_the_process_as_it_was(
    root, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    helpers.write_options(tmp_path / "train.yml", options)
    arguments = list(sys.argv)
    command = ["train", "-opt", "train.yml", "--root", "root", "--debug"]
    assert cli.main([*command, "--force_yml", "train:warmup_iter=-1", "train:total_iter=2"]) == 0
    assert (root / "experiments/debug_small/models/net_g_latest.pth").is_file()
    assert (os.getcwd(), sys.argv) == (str(tmp_path), arguments)


SET = "--force_yml "
REFUSED = [
    (SET + "datasets:train:dataroot_gt=nowhere", r"(?s)dataroot_gt.*training set made.*nowhere"),
    (SET + "num_gpu=64", r"^the options have a problem:\n  num_gpu: is 64.*`num_gpu: auto`"),
    (SET + "datasets:train:batch_size_per_gpu=6", r"5 samples .* less than one batch of 6 .*to 2"),
    (SET + "path:pretrain_network_g=other.pth", r"(?s)dim: 24.*dim: 12"),
    (SET + "path:pretrain_network_g=cut.pth", r"cut\.pth is truncated"),
    (SET + "path:pretrain_network_g=text.pth", r"text\.pth is not a checkpoint"),
    (SET + "model_type=DLGSANetModel train:compile=fastest", r"train:compile.*'fastest'"),
    (SET + "path:resume_state=10.state", r"10\.state"),
    (SET + "train:total_itre=8", "total_itre.*total_iter"),
    # values of another type meet no check behind that of their type
    (SET + "datasets:train:dataset_enlarge_ratio=.nan", r"have a problem:\n.*ratio: must be .*nan"),
    (SET + "path:resume_state=true", r"have a problem:\n.*resume_state: must be text"),
    (SET + "datasets:train:dataset_enlarge_ratio=1e9", r"5 samples x .* more than 100,000,000"),
    ("--launcher slurm " + SET + "dist_params=3", "dist_params: must be a section of keys; got 3"),
    ("test", r"cut\.pth is truncated"),
    ("--root nowhere", "folder .*nowhere does not exist"),
]


@pytest.fixture
def bad_root(root):
    """The root with weights of all kinds that cannot be used."""
    weights = helpers.small_checkpoint(dim=24).weights
    torch.save({"params": weights}, root / "other.pth")
    whole = (root / "other.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "text.pth").write_text("not weights\n")
    return root


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_training_refuses_before_anything_is_created(bad_root, options, tmp_path, flags, message):
    run = pipeline.train
    if flags == "test":
        run, options, flags = pipeline.test, helpers.small_test_options(Path("data"), "cut.pth"), ""
    file = helpers.write_options(tmp_path / "train.yml", options)
    before = listing(bad_root)
    with pytest.raises(UserError, match=message):
        run(bad_root, ["-opt", str(file), *flags.split()])
    assert listing(bad_root) == before


def test_a_refusal_is_a_message_and_an_exit_status(root, options, tmp_path, capsys, monkeypatch):
    options["network_g"]["dimm"] = 24
    file = helpers.write_options(tmp_path / "train.yml", options)
    assert cmd_train.main(["--root", str(root), "-opt", str(file)]) == 1
    assert "dimm" in capsys.readouterr().err
    monkeypatch.setattr("dlgsanet_arch._basicsr.basicsr_installed", lambda: False)
    assert cmd_train.main(["--root", str(root), "-opt", str(file)]) == 1
    assert "run `dlgsanet doctor --fix`" in capsys.readouterr().err
