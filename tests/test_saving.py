import errno
import io
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.models.sr_model import SRModel
from torch import nn

from dlgsanet_arch import files
from dlgsanet_arch.checkpoint import CheckpointError, check_complete, save_whole
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import BadSample
from dlgsanet_arch.pipeline.sampling import Place
from dlgsanet_arch.pipeline.saving import (
    Progress,
    Saver,
    numbered,
    progress_of,
    randomness,
    restore,
    restore_randomness,
)

NETWORK = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}


def write(path: Path, size: int = 1000) -> dict:
    content = {"params": {"weight": torch.rand(size)}}
    save_whole(content, path)
    return content


def test_what_is_saved_is_what_torch_loads(tmp_path):
    path = tmp_path / "net_g_1.pth"
    content = {"params": {"weight": torch.rand(3, 4)}, "iter": 7, "names": ["a", "b"]}
    checksum = save_whole(content, path)
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["params"]["weight"], content["params"]["weight"])
    assert (loaded["iter"], loaded["names"]) == (7, ["a", "b"])
    assert check_complete(path) == checksum
    assert save_whole({"params": {"weight": torch.rand(3, 4)}}, path) != checksum
    assert [entry.name for entry in tmp_path.iterdir()] == ["net_g_1.pth"]


@pytest.mark.parametrize("cut", ["half", "directory", "record", "flipped", "nothing"])
def test_a_damaged_file_is_found_by_reading_all_of_it(tmp_path, cut):
    path = tmp_path / "net_g_1.pth"
    write(path)
    data = bytearray(path.read_bytes())
    if cut == "half":
        data = data[: len(data) // 2]
    elif cut == "directory":
        data = data[:-20]
    elif cut == "nothing":
        data = bytearray()
    elif cut == "record":  # what an interrupted save of BasicSR's leaves: fault 21
        start = data.index(b"archive/data/0")
        data[start + 64 : start + 264] = bytes(200)
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        check_complete(path)


class FullDisk(io.RawIOBase):
    """A file on a disk with room for `space` bytes."""

    def __init__(self, path, space):
        self.file, self.space = open(path, "wb"), space  # noqa: SIM115 - closed in close()

    def writable(self):
        return True

    def write(self, data):
        data = bytes(data)
        if len(data) > self.space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.space -= len(data)
        return self.file.write(data)

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()
        super().close()


@pytest.mark.parametrize("space", [0, 100, 2000])
def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path, monkeypatch, space):
    path = tmp_path / "net_g_latest.pth"
    content = write(path)
    monkeypatch.setattr(Path, "open", lambda self, mode="r": FullDisk(self, space))
    with pytest.raises(CheckpointError, match=r"net_g_latest.pth cannot be written .*disk is full"):
        save_whole({"params": {"weight": torch.rand(5000)}}, path)
    monkeypatch.undo()
    kept = torch.load(path, weights_only=True)["params"]["weight"]
    assert torch.equal(kept, content["params"]["weight"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["net_g_latest.pth"]


def test_a_moment_s_fault_of_the_file_system_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dlgsanet_arch.storage._SECONDS_BETWEEN", 0)
    real, faults = os.fsync, iter([OSError(errno.EIO, "gone"), OSError(errno.ESTALE, "stale")])

    def fsync(file):
        if (fault := next(faults, None)) is not None:
            raise fault
        real(file)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write(tmp_path / "a.pth")
    check_complete(tmp_path / "a.pth")


def test_what_was_written_is_read_again_before_it_takes_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr("dlgsanet_arch.storage._SECONDS_BETWEEN", 0)
    path = tmp_path / "net_g_latest.pth"
    content = write(path)
    real = os.fsync

    def lose_bytes(file):  # a disk that says it wrote
        os.ftruncate(file, 300)
        real(file)

    monkeypatch.setattr(files.os, "fsync", lose_bytes)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_whole({"params": {"weight": torch.rand(5000)}}, path)
    kept = torch.load(path, weights_only=True)["params"]["weight"]
    assert torch.equal(kept, content["params"]["weight"])


def test_the_generators_go_on_from_a_state_that_weights_only_loads(tmp_path):
    random.random(), np.random.randn(), torch.rand(2)
    save_whole({"randomness": randomness()}, tmp_path / "1.state")
    drawn = [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()]
    state = torch.load(tmp_path / "1.state", weights_only=True)
    restore_randomness(state["randomness"])
    assert [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()] == drawn


@pytest.fixture
def model(tmp_path) -> SRModel:
    """A real SRModel of another network, with everything a state holds."""
    run = tmp_path / "experiments" / "small"
    paths = {"models": run / "models", "training_states": run / "training_states"}
    for folder in paths.values():
        folder.mkdir(parents=True)
    return SRModel(
        {
            "num_gpu": 0,
            "is_train": True,
            "dist": False,
            "network_g": {"type": "EDSR", **NETWORK},
            "path": {"experiments_root": str(run), **{k: str(v) for k, v in paths.items()}},
            "train": {
                "ema_decay": 0.9,
                "optim_g": {"type": "Adam", "lr": 1e-3},
                "scheduler": {"type": "MultiStepLR", "milestones": [2, 2, 5], "gamma": 0.5},
                "pixel_opt": {"type": "L1Loss"},
            },
        }
    )


def progress(iteration: int, **changes) -> Progress:
    values = {"place": Place(1, 4), "epoch_length": 9, "seed": 3, "options": {"name": "small"}}
    return Progress(iteration, **{**values, **changes})


def test_a_pair_holds_all_that_a_run_is(model, tmp_path):
    saver = Saver(model, Processes())
    model.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    model.queue_lr, model.queue_ptr = torch.rand(2, 3), 5
    # metrics of third parties may be numpy's: torch.load(weights_only=True) must still take them
    model.best_metric_results = {"Set5": {"psnr": {"val": np.float64(30.5), "iter": 4}}}
    saver.best = {"value": 30.5, "iter": 4}
    bad = [BadSample("made", "a.png", "is empty")]
    saver.save(progress(7, validate=True, bad_samples=bad))
    state = torch.load(tmp_path / "experiments/small/training_states/7.state", weights_only=True)
    assert (state["epoch"], state["iter"]) == (1, 7)
    assert progress_of(state) == progress(7, validate=True, bad_samples=bad)
    found = check_complete(tmp_path / "experiments/small/models/net_g_7.pth")
    assert state["networks"] == {"net_g_7.pth": found}
    other = type(model)(model.opt | {"train": {**model.opt["train"]}, **retyped()})
    other.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    other_saver = Saver(other, Processes())
    other.resume_training(state)
    restore(other, other_saver, state)
    assert other.scaler.get_scale() == 128.0
    assert torch.equal(other.queue_lr, model.queue_lr)
    assert other.queue_ptr == 5
    assert other.best_metric_results == {"Set5": {"psnr": {"val": 30.5, "iter": 4}}}
    assert other_saver.best == {"value": 30.5, "iter": 4}


def retyped() -> dict:
    """Options whose `type` a model has not yet taken out."""
    return {
        "train": {
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [2, 2, 5], "gamma": 0.5},
            "pixel_opt": {"type": "L1Loss"},
        }
    }


def test_networks_are_saved_as_basicsr_saves_them(model, tmp_path):
    models = tmp_path / "experiments/small/models"
    model.save(0, 3)  # BasicSR's own
    Saver(model, Processes()).save(progress(4))
    theirs, ours = (torch.load(models / f"net_g_{n}.pth", weights_only=True) for n in (3, 4))
    assert theirs.keys() == ours.keys() == {"params", "params_ema"}
    for key, weights in theirs.items():
        assert weights.keys() == ours[key].keys()
        assert all(torch.equal(value, ours[key][name]) for name, value in weights.items())
    strict = EDSR(**NETWORK)
    strict.load_state_dict(ours["params"], strict=True)
    model.load_network(strict, str(models / "net_g_4.pth"))


def test_names_of_parallel_networks_are_bare(model, tmp_path):
    model.net_g = nn.DataParallel(model.net_g)
    Saver(model, Processes()).save(progress(4))
    weights = torch.load(tmp_path / "experiments/small/models/net_g_4.pth", weights_only=True)
    EDSR(**NETWORK).load_state_dict(weights["params"], strict=True)


def test_latest_and_best_are_no_pairs(model, tmp_path):
    saver = Saver(model, Processes())
    save = model.save

    def with_a_discriminator(epoch, iteration):
        save(epoch, iteration)
        model.save_network(model.net_g, "net_d", iteration)

    model.save = with_a_discriminator
    saver.save_latest()
    saver.save_best(31.25, 9)
    folder = tmp_path / "experiments/small"
    found = sorted(path.name for path in folder.rglob("*.*"))
    assert found == ["net_d_latest.pth", "net_g_best.pth", "net_g_latest.pth"]
    assert saver.best == {"value": 31.25, "iter": 9}
    assert numbered(folder) == {}


def test_only_the_last_pairs_are_kept(model, tmp_path):
    saver = Saver(model, Processes(), keep_last=2)
    saver.save_best(1.0, 1)
    for iteration in (5, 10, 15, 100):
        saver.save(progress(iteration))
    run = tmp_path / "experiments/small"
    assert sorted(numbered(run)) == [15, 100]
    assert all(len(paths) == 2 for paths in numbered(run).values())
    assert (run / "models/net_g_best.pth").is_file()


def test_a_failed_save_names_the_file_and_leaves_the_pairs(model, tmp_path, monkeypatch):
    saver = Saver(model, Processes(), keep_last=1)
    saver.save(progress(5))
    monkeypatch.setattr(Path, "open", lambda self, mode="r": FullDisk(self, 500))
    with pytest.raises(CheckpointError, match=r"net_g_10\.pth cannot be written"):
        saver.save(progress(10))
    monkeypatch.undo()
    assert sorted(numbered(tmp_path / "experiments/small")) == [5]


def test_a_full_disk_for_real(tmp_path):
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        path = tmp_path / "net_g_latest.pth"
        content = write(path, 10_000)
        with pytest.raises(CheckpointError, match="the disk is full"):
            write(path, 100_000)
        kept = torch.load(path, weights_only=True)["params"]["weight"]
        assert torch.equal(kept, content["params"]["weight"])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
