import os
import re
import shutil
import sys
from pathlib import Path

import cv2
import helpers
import pytest
import torch

from dlgsanet_arch import DLGSANet, cli, pipeline
from dlgsanet_arch.cli import cmd_train
from dlgsanet_arch.errors import UserError

SAMPLES = 5


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def printed_psnr(text: str) -> list[str]:
    return re.findall(r"# psnr: ([\d.]+)", text)


def small_weights(**changes) -> dict:
    arguments = {**helpers.SMALL_NETWORK, **changes}
    del arguments["type"]
    return DLGSANet(**arguments).state_dict()


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with images, and a current folder that is another one."""
    folder = tmp_path / "root"
    helpers.write_pairs(folder / "data", SAMPLES)
    return folder


@pytest.fixture
def options() -> dict:
    return helpers.small_train_options(Path("data"))


@pytest.fixture(scope="module")
def runs(repository, tmp_path_factory):
    """Real runs of train.py and test.py, in a copy of the checkout, from another folder."""
    folder = tmp_path_factory.mktemp("runs")
    checkout, elsewhere = folder / "checkout", folder / "elsewhere"
    elsewhere.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "dlgsanet_arch", checkout / "dlgsanet_arch", ignore=ignored)
    for door in ("train.py", "test.py"):
        shutil.copy(repository / door, checkout)
    helpers.write_pairs(checkout / "data", SAMPLES)
    weights = Path("experiments/small/models/net_g_latest.pth")
    data = Path("data")
    helpers.write_options(elsewhere / "train.yml", helpers.small_train_options(data))
    helpers.write_options(elsewhere / "test.yml", helpers.small_test_options(data, weights))

    def run(door, *arguments):
        result = helpers.run([checkout / door, *arguments], cwd=elsewhere)
        assert result.returncode == 0, result.stderr
        return result.stderr

    halfway = run("train.py", "-opt", "train.yml", "--force_yml", "train:total_iter=2")
    resumed = run("train.py", "-opt", "train.yml", "--auto_resume")
    tested = run("test.py", "-opt", "test.yml")
    return checkout, elsewhere, halfway, resumed, tested


def test_resumes_where_it_stopped(runs):
    checkout, _, halfway, resumed, _ = runs
    assert "iter:       2," in halfway
    assert "Resuming training from epoch: 0, iter: 2." in resumed
    assert "iter:       3," in resumed
    assert "iter:       2," not in resumed
    state = torch.load(checkout / "experiments/small/training_states/4.state")
    assert state["iter"] == 4


def test_everything_is_below_the_folder_of_train_py(runs):
    checkout, elsewhere, *_ = runs
    assert listing(elsewhere) == ["test.yml", "train.yml"]
    assert [path.name for path in (checkout / "experiments").glob("[!.]*")] == ["small"]


def test_the_figure_tested_is_the_figure_validated(runs):
    checkout, _, _, resumed, tested = runs
    assert printed_psnr(tested) == printed_psnr(resumed)[-1:]
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


TRAIN_FAULTS = [
    ("datasets:train:dataroot_gt=nowhere", r"(?s)dataroot_gt.*training set made.*nowhere"),
    ("num_gpu=64", r"^the options have a problem:\n  num_gpu: is 64.*`num_gpu: auto`"),
    ("datasets:train:batch_size_per_gpu=6", r"5 samples .* less than one batch of 6 .*ratio to 2"),
    ("path:pretrain_network_g=other.pth", r"(?s)dim: 24.*dim: 12"),
    ("path:pretrain_network_g=cut.pth", r"cut\.pth is truncated"),
    ("path:pretrain_network_g=text.pth", r"text\.pth is not a checkpoint"),
    ("path:pretrain_network_g=bare.pth", r"neither the key params"),
    ("model_type=DLGSANetModel train:compile=fastest", r"train:compile.*'fastest'"),
    ("path:resume_state=10.state", r"10\.state"),
    ("path:resume_state=cut.pth", r"cut\.pth is truncated or damaged"),
]


@pytest.fixture
def bad_root(root):
    """The root with weights of all kinds that cannot be used."""
    torch.save({"params": small_weights(dim=24)}, root / "other.pth")
    torch.save(small_weights(), root / "bare.pth")
    whole = (root / "other.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "text.pth").write_text("not weights\n")
    return root


@pytest.mark.parametrize(("changes", "message"), TRAIN_FAULTS)
def test_training_refuses_before_anything_is_created(bad_root, options, tmp_path, changes, message):
    file = helpers.write_options(tmp_path / "train.yml", options)
    before = listing(bad_root)
    with pytest.raises(UserError, match=message):
        pipeline.train(bad_root, ["-opt", str(file), "--force_yml", *changes.split()])
    assert listing(bad_root) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--force_yml", "train:total_itre=8"], "total_itre.*total_iter"),
        (["--launcher", "pytorch"], "torchrun, which sets RANK"),
        (["--root", "nowhere"], "folder .*nowhere does not exist"),
    ],
)
def test_training_refuses_wrong_flags(root, options, tmp_path, monkeypatch, argv, message):
    monkeypatch.delenv("RANK", raising=False)
    file = helpers.write_options(tmp_path / "train.yml", options)
    with pytest.raises(UserError, match=message):
        pipeline.train(root, ["-opt", str(file), *argv])
    assert listing(root) == [path for path in listing(root) if path.startswith("data")]


def test_testing_refuses_before_anything_is_created(bad_root, tmp_path):
    options = helpers.small_test_options(Path("data"), Path("cut.pth"))
    file = helpers.write_options(tmp_path / "test.yml", options)
    before = listing(bad_root)
    with pytest.raises(UserError, match=r"cut\.pth is truncated"):
        pipeline.test(bad_root, ["-opt", str(file)])
    assert listing(bad_root) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["models/net_g_2.pth"], r"no complete pair of state and weights in .*small"),
        (["training_states/2.state"], r"net_g_2\.pth cannot be read: it does not exist"),
        (["training_states/2.state", "models/net_g_2.pth"], r"(?s)net_g_2\.pth.*dim: 24"),
    ],
)
def test_auto_resume_never_starts_over_in_silence(root, options, tmp_path, files, message):
    run = root / "experiments" / "small"
    for name in files:
        (run / name).parent.mkdir(parents=True)
        content = {"epoch": 0, "iter": 2, "optimizers": [], "schedulers": []}
        content["params"] = small_weights(dim=24)
        torch.save(content, run / name)
    file = helpers.write_options(tmp_path / "train.yml", options)
    before = listing(root)
    with pytest.raises(UserError, match=message):
        pipeline.train(root, ["-opt", str(file), "--auto_resume"])
    assert listing(root) == before


def test_a_refusal_is_a_message_and_an_exit_status(root, options, tmp_path, capsys, monkeypatch):
    options["network_g"]["dimm"] = 24
    file = helpers.write_options(tmp_path / "train.yml", options)
    assert cmd_train.main(["--root", str(root), "-opt", str(file)]) == 1
    assert "dimm" in capsys.readouterr().err
    monkeypatch.setattr("dlgsanet_arch._basicsr.basicsr_installed", lambda: False)
    assert cmd_train.main(["--root", str(root), "-opt", str(file)]) == 1
    assert "run `dlgsanet doctor --fix`" in capsys.readouterr().err
