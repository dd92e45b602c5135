"""Pairs of state and weights: written complete, found again, read once, restored."""

import builtins
import copy
import errno
import io
import os
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.models.sr_model import SRModel
from torch import nn

from dlgsanet_arch import files
from dlgsanet_arch.errors import ResumeError, UserError
from dlgsanet_arch.pipeline import adapter, runs
from dlgsanet_arch.pipeline.checkpoints import (
    Checkpoints,
    Progress,
    Start,
    find_start,
    numbered,
)
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import BadSample, Place
from dlgsanet_arch.storage import CheckpointError, check_complete, save_complete

EDSR_OF_4 = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}
STEPS = {"type": "MultiStepLR", "milestones": [2, 2, 5], "gamma": 0.5}


def write(path: Path, size: int = 1000) -> dict:
    content = {"params": {"weight": torch.rand(size)}}
    save_complete(content, path)
    return content


def zeroed(data: bytes) -> bytes:
    """What an interrupted save of BasicSR's leaves: fault 21."""
    start = data.index(b"archive/data/0") + 64
    return data[:start] + bytes(200) + data[start + 200 :]


SPOILT = {
    "half": lambda data: data[: len(data) // 2],
    "end": lambda data: data[:-20],
    "all": lambda data: b"",
    "bit": lambda data: data[:1500] + bytes([data[1500] ^ 1]) + data[1501:],
    "zeros": zeroed,
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_damaged_file_is_found_by_reading_all_of_it(tmp_path, spoil):
    path = tmp_path / "net_g_1.pth"
    write(path)
    path.write_bytes(SPOILT[spoil](path.read_bytes()))
    with pytest.raises(CheckpointError, match=str(path)):
        check_complete(path)


@pytest.fixture
def full_disk(monkeypatch):
    """Call it to let every file that is opened be on a full disk."""
    real = open
    return lambda: monkeypatch.setattr(Path, "open", lambda path, mode="r": real("/dev/full", mode))


def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path, monkeypatch, full_disk):
    path = tmp_path / "net_g_latest.pth"
    content = write(path)
    full_disk()
    with pytest.raises(CheckpointError, match=r"net_g_latest.pth cannot be written .*disk is full"):
        write(path, 5000)
    monkeypatch.undo()
    kept = torch.load(path, weights_only=True)["params"]["weight"]
    assert torch.equal(kept, content["params"]["weight"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["net_g_latest.pth"]


@pytest.mark.parametrize("lost", [0, 300])
def test_a_moment_s_fault_of_the_file_system_is_tried_again(tmp_path, monkeypatch, lost):
    monkeypatch.setattr("dlgsanet_arch.storage._SECONDS_BETWEEN", 0)
    path = tmp_path / "net_g_latest.pth"
    content = write(path)
    real, faults = os.fsync, iter([OSError(errno.EIO, "gone"), OSError(errno.ESTALE, "stale")])

    def fsync(file):
        if lost:  # a disk that says it wrote; what was written is read again
            os.ftruncate(file, lost)
        elif (fault := next(faults, None)) is not None:
            raise fault
        real(file)

    monkeypatch.setattr(files.os, "fsync", fsync)
    if lost:
        with pytest.raises(CheckpointError, match="cannot be written"):
            write(path)
    else:
        content = write(path)
    kept = torch.load(path, weights_only=True)["params"]["weight"]
    assert torch.equal(kept, content["params"]["weight"])
    check_complete(path)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "experiments" / "small"
    for name in ("models", "training_states"):
        (folder / name).mkdir(parents=True)
    return folder


def built(run: Path, train=(), kind=SRModel, **network) -> SRModel:
    """Build a real SRModel of another network, adapted, with everything a state holds."""
    network_g = {"type": "EDSR", **EDSR_OF_4, **network}
    opt = helpers.small_train_options(Path("data"), network_g=network_g, num_gpu=0)
    opt |= {"is_train": True, "dist": False}
    folders = {"experiments_root": run, "models": run / "models"}
    opt["path"] |= {name: str(folder) for name, folder in folders.items()}
    opt["train"] |= {"total_iter": 10, "scheduler": dict(STEPS), **copy.deepcopy(dict(train))}
    model = kind(opt)
    model.basicsr_save = model.save_network
    adapter.adapt(model, Processes())
    return model


@pytest.fixture
def model(run) -> SRModel:
    return built(run)


def saver(model: SRModel, keep_last: int | None = None) -> Checkpoints:
    return Checkpoints(model, Processes(), keep_last)


def progress(iteration: int, **changes) -> Progress:
    values = {"place": Place(1, 4), "epoch_length": 9, "seed": 3, "options": {"name": "small"}}
    return Progress(iteration, **{**values, **changes})


def test_a_pair_holds_all_that_a_run_is(model, run):
    checkpoints = saver(model)
    model.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    model.queue_lr, model.queue_ptr = torch.rand(2, 3), 5
    # metrics of third parties may be numpy's: torch.load(weights_only=True) must still take them
    model.best_metric_results = {"Set5": {"psnr": {"val": np.float64(30.5), "iter": 4}}}
    checkpoints.best = {"value": 30.5, "iter": 4}
    said = progress(
        7, seconds=8.5, validate=True, bad_samples=[BadSample("made", "a.png", "is empty")]
    )
    checkpoints.save(said)
    drawn = torch.rand(3)
    start = find_start(options(), run.parent.parent, auto_resume=True)
    assert (start.state["epoch"], start.iteration) == (1, 7)
    assert Progress.from_state(start.state) == said
    assert start.state["networks"] == {"net_g_7.pth": check_complete(run / "models/net_g_7.pth")}
    other = built(run)
    other.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    others = saver(other)
    assert others.restore(start, apply_edits=False) == ""
    assert torch.equal(torch.rand(3), drawn)
    assert other.scaler.get_scale() == 128.0
    assert torch.equal(other.queue_lr, model.queue_lr)
    assert other.queue_ptr == 5
    assert other.best_metric_results == {"Set5": {"psnr": {"val": 30.5, "iter": 4}}}
    assert others.best == {"value": 30.5, "iter": 4}
    other.optimizers.append(other.optimizers[0])
    with pytest.raises(ResumeError, match="has 1 optimizers and this SRModel has 2"):
        others.restore(start, apply_edits=False)


def test_networks_are_saved_as_basicsr_saves_them(model, run):
    networks = [model.net_g, model.net_g_ema]
    model.basicsr_save(networks, "net_g", 3, param_key=["params", "params_ema"])
    model.net_g = nn.DataParallel(model.net_g)
    saver(model).save(progress(4))
    theirs, ours = (torch.load(run / f"models/net_g_{n}.pth", weights_only=True) for n in (3, 4))
    assert theirs.keys() == ours.keys() == {"params", "params_ema"}
    for key, weights in theirs.items():
        assert weights.keys() == ours[key].keys()
        assert all(torch.equal(value, ours[key][name]) for name, value in weights.items())
    EDSR(**EDSR_OF_4).load_state_dict(ours["params"], strict=True)


class WithDiscriminator(SRModel):
    """A third party's, which also saves when it likes."""

    def save(self, epoch, current_iter):
        super().save(epoch, current_iter)
        self.save_network(self.net_g, "net_d", current_iter)


def test_latest_and_best_are_not_pairs(run):
    model = built(run, kind=WithDiscriminator)
    checkpoints = saver(model)
    checkpoints.save_latest()
    checkpoints.save_best(31.25, 9)
    found = sorted(path.name for path in run.rglob("*.*"))
    assert found == ["net_d_latest.pth", "net_g_best.pth", "net_g_latest.pth"]
    assert checkpoints.best == {"value": 31.25, "iter": 9}
    assert numbered(run) == {}
    model.save(0, 5)  # by itself
    assert {path.name for path in numbered(run)[5]} == {"net_d_5.pth", "net_g_5.pth"}


def test_only_the_last_pairs_are_kept(model, run, monkeypatch, full_disk):
    checkpoints = saver(model, keep_last=2)
    checkpoints.save_best(1.0, 1)
    orphan = run / "models/net_g_200.pth"  # which a kill left, and which pushes nothing out
    orphan.touch()
    for iteration in (5, 10, 15, 100):
        checkpoints.save(progress(iteration))
    orphan.unlink()
    full_disk()
    with pytest.raises(CheckpointError, match=r"net_g_110\.pth cannot be written"):
        checkpoints.save(progress(110))
    monkeypatch.undo()
    assert sorted(numbered(run)) == [15, 100]
    assert all(len(paths) == 2 for paths in numbered(run).values())
    assert (run / "models/net_g_best.pth").is_file()


def test_a_second_save_of_an_iteration_writes_the_state_alone(model, run):
    checkpoints, written = saver(model), run / "models/net_g_5.pth"
    inodes = []
    for validate in (True, False):
        checkpoints.save(progress(5, validate=validate))
        inodes.append(written.stat().st_ino)
        start = find_start(options(), run.parent.parent, auto_resume=True)
        assert Progress.from_state(start.state).validate is validate
    assert inodes[0] == inodes[1]


def save_pair(run: Path, iteration: int, *, labels=("net_g",), checksums=True) -> None:
    networks = {}
    for label in labels:
        path = run / "models" / f"{label}_{iteration}.pth"
        networks[path.name] = save_complete({"params": {"weight": torch.rand(50)}}, path)
    state = {"epoch": 0, "iter": iteration, "optimizers": [], "schedulers": []}
    if checksums:
        state["networks"] = networks
    save_complete(state, run / "training_states" / f"{iteration}.state")


def options(**path) -> dict:
    return {"name": "small", "network_g": {}, "path": {"resume_state": None, **path}}


def files_of(start: Start) -> dict:
    return {key: path for key, (path, _) in start.networks.items()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def edited(**changes):
    return lambda path: save_complete({**torch.load(path, weights_only=True), **changes}, path)


def other(path: Path) -> None:
    save_complete({"params": {"weight": torch.rand(50)}}, path)


STATE, WEIGHTS = "training_states/20.state", "models/net_g_20.pth"
DAMAGE = {
    "truncated state": (STATE, truncate, "20.state is truncated"),
    "truncated weights": (WEIGHTS, truncate, "net_g_20.pth is truncated"),
    "no weights": (WEIGHTS, Path.unlink, "net_g_20.pth cannot be read: it does not exist"),
    "no state": (STATE, Path.unlink, "20.state cannot be read: it does not exist"),
    "empty state": (STATE, lambda path: path.write_bytes(b""), "is empty"),
    "edited state": (STATE, edited(iter="20", optimizers=3), "is not a training state"),
    "edited progress": (STATE, edited(progress={"place": "far"}), "is not a training state"),
    "edited schedule": (STATE, edited(schedulers=[{"last_epoch": "x"}]), "is not a training"),
    "edited best": (STATE, edited(best_metric_results={"a": 3}), "is not a training state"),
    "list": (STATE, lambda path: save_complete([1], path), "is not a training state"),
    "pipe": (STATE, piped, "is not a file"),
    "pipe for weights": (WEIGHTS, piped, "net_g_20.pth cannot be read: it does not exist"),
    "other weights": (WEIGHTS, other, "is not the file that was saved with 20.state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_pair_that_is_not_whole_is_passed_over_and_named(run, tmp_path, damage):
    for iteration in (10, 20):
        save_pair(run, iteration)
    name, spoil, reason = DAMAGE[damage]
    spoil(run / name)
    start = find_start(options(), tmp_path, auto_resume=True)
    assert start.iteration == 10
    (line,) = start.passed_over
    assert line.startswith("20: ")
    assert reason in line


def test_no_whole_pair_is_an_error_and_no_new_start(run, tmp_path):
    for auto_resume in (True, False):
        assert find_start(options(), tmp_path, auto_resume=auto_resume) == Start()
    assert Start().iteration == 0
    save_pair(run, 10)
    truncate(run / "training_states/10.state")
    with pytest.raises(
        ResumeError, match=r"(?s)no complete pair.*drop the flag.*10.state is trunc"
    ):
        find_start(options(), tmp_path, auto_resume=True)


def test_a_named_state_finds_its_weights_beside_it_in_any_run(run, tmp_path):
    save_pair(run, 10, checksums=False)  # as BasicSR saves it
    named = {**options(resume_state="experiments/small/training_states/10.state"), "name": "new"}
    start = find_start(named, tmp_path, auto_resume=False)
    assert files_of(start) == {"network_g": run / "models/net_g_10.pth"}
    truncate(run / "models/net_g_10.pth")
    with pytest.raises(UserError, match=r"net_g_10\.pth is truncated"):
        find_start(named, tmp_path, auto_resume=False)


def test_the_newest_pair_is_taken_by_number_and_each_file_is_read_once(run, tmp_path, monkeypatch):
    for iteration in (5, 20, 100):
        save_pair(run, iteration, labels=("net_g", "net_d"))
    (run / "training_states/latest.state").write_bytes(b"stray")  # fault 22
    (run / "models/net_g_latest.pth").write_bytes(b"stray")
    opened, real = [], io.open

    def counted(path, *arguments, **named):
        opened.append(Path(path).name)
        return real(path, *arguments, **named)

    def pair(iteration, nets="gd"):
        return {f"network_{x}": run / f"models/net_{x}_{iteration}.pth" for x in nets}

    wanted = {**options(), "network_d": {}}
    for module in (io, builtins):
        monkeypatch.setattr(module, "open", counted)
    start = find_start(wanted, tmp_path, auto_resume=True)
    monkeypatch.undo()
    assert (start.path, start.iteration) == (run / "training_states/100.state", 100)
    assert files_of(start) == pair(100)
    read = [name for name in opened if name.endswith((".pth", ".state"))]
    assert sorted(read) == ["100.state", "net_d_100.pth", "net_g_100.pth"]
    truncate(run / "models/net_d_100.pth")  # every network of a pair counts
    assert files_of(find_start(wanted, tmp_path, auto_resume=True)) == pair(20)
    wanted["path"]["ignore_resume_networks"] = ["network_d"]
    assert files_of(find_start(wanted, tmp_path, auto_resume=True)) == pair(20, "g")


def step(model: SRModel, iteration: int) -> float:
    model.update_learning_rate(iteration)
    model.feed_data({"lq": torch.rand(1, 3, 4, 4), "gt": torch.rand(1, 3, 8, 8)})
    model.optimize_parameters(iteration)
    return model.get_current_learning_rate()[0]


COSINE = {"type": "CosineAnnealingRestartLR", "periods": [5, 10], "restart_weights": [1, 0.5]}
LATER = STEPS | {"milestones": [4, 6]}


@pytest.mark.parametrize("iteration", [1, 3, 4, 7])
@pytest.mark.parametrize("schedule", [LATER, COSINE], ids=["steps", "cosine"])
def test_applied_edits_hold_as_if_they_had_always_done(run, schedule, iteration):
    old = built(run)
    for at in range(1, iteration + 1):
        step(old, at)
    saver(old).save(progress(iteration))
    edited = {"scheduler": schedule, "optim_g": {"type": "Adam", "lr": 2e-3, "betas": [0.9, 0.5]}}
    always, resumed = built(run, edited), built(run, edited)
    expected = [step(always, at) for at in range(1, 13)]
    start = find_start(options(), run.parent.parent, auto_resume=True)
    saver(resumed).restore(start, apply_edits=True)
    found = [step(resumed, at) for at in range(iteration + 1, 13)]
    assert found == pytest.approx(expected[iteration:], rel=1e-12)
    assert resumed.optimizers[0].param_groups[0]["betas"][1] == 0.5
    moments = resumed.optimizers[0].state_dict()["state"][0]["step"]
    assert moments == 12  # what the optimizer has learned stays


def test_the_room_for_checkpoints_is_estimated(run, monkeypatch):
    model = built(run, num_feat=64)
    model.net_g(torch.rand(1, 3, 8, 8)).mean().backward()
    model.optimizer_g.step()
    saver(model).save(progress(5))
    size = sum(path.stat().st_size for path in numbered(run)[5])

    def with_room_for(pairs):
        usage = shutil._ntuple_diskusage(0, 0, int(pairs * size))
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: usage)
        return runs.room_warning(model, model.opt)

    assert with_room_for(6.5) == ""
    assert "GB: they will not all fit" in with_room_for(5)
    with pytest.raises(UserError, match="make room for at least two"):
        with_room_for(1.5)
    model.opt["logger"]["keep_last"] = 2
    assert with_room_for(3.4) == ""


def test_folders_must_take_what_is_written(tmp_path, monkeypatch):
    runs.check_folder(tmp_path / "experiments/a")
    (tmp_path / "results").touch()
    with pytest.raises(UserError, match="results is not a folder, or"):
        runs.check_folder(tmp_path / "results/a")
    closed, allowed = tmp_path, os.access
    monkeypatch.setattr(runs.os, "access", lambda path, how: path != closed and allowed(path, how))
    with pytest.raises(UserError, match=f"{closed} is not a folder, or cannot be written to"):
        runs.check_folder(tmp_path / "experiments/a")
