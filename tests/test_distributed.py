"""Several processes on one machine, over gloo: what they compute together, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import small_test_options, write_options
from training_runs import (
    SAMPLES,
    Forked,
    assert_equal,
    events,
    make_root,
    small_options,
    train,
    weights,
)

from dlgsanet_arch import pipeline
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import loop
from dlgsanet_arch.pipeline.processes import started


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


VARIABLES = {
    "pytorch": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
}


def together(root: Path, options: dict, *flags: str, launcher="pytorch", world=2, **more: Any):
    """Run a verb in several processes, with the variables that torchrun or srun sets."""
    port = str(options.get("dist_params", {}).get("port") or free_port())
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if launcher == "slurm":
        meeting = {"SLURM_NODELIST": "127.0.0.1,other"}
    runs = []
    for rank in range(world):
        own = dict(zip(VARIABLES[launcher], map(str, (rank, rank, world)), strict=True))
        environment = meeting | own
        flags_of = ("--launcher", launcher, *flags)
        runs.append(Forked(root, options, *flags_of, environment=environment, **more))
    return runs


def statuses(runs: list[Forked], seconds: float = 100) -> list[int]:
    return [run.wait(seconds) for run in runs]


def said(runs: list[Forked]) -> str:
    return "\n".join(run.said for run in runs)


def complete(root: Path, options: dict, *flags: str, **more: Any) -> None:
    """Run several processes to their end."""
    runs = together(root, options, *flags, **more)
    assert statuses(runs) == [0] * len(runs), said(runs)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_root(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone(root) -> dict:
    """One process with batches of 4."""
    train(root, small_options("alone", total=6, batch_size_per_gpu=4))
    return weights(root, "alone")


def assert_close(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        # Adam divides by the gradient's own size: where that is rounding, so is the step
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("launcher", ["pytorch", "slurm"])
def test_two_processes_train_what_one_does_with_twice_the_batch(root, alone, launcher):
    options = small_options(launcher, total=6, batch_size_per_gpu=2)
    options["dist_params"] = {"backend": "nccl", "port": free_port()}  # as in the shipped files
    if launcher == "slurm":
        options["model_type"] = "DLGSANetModel"  # its log is the mean over processes, too
        options["train"]["accumulation"] = 2
    complete(root, options, launcher=launcher)
    assert_close(weights(root, launcher), alone)
    found, expected = (
        [entry["losses"]["l_pix"] for entry in events(root, name, "train")]
        + [entry["metrics"]["psnr"] for entry in events(root, name, "validation")]
        for name in (launcher, "alone")
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_stopped_run_of_two_goes_on_with_the_same_weights(root):
    complete(root, small_options("undisturbed"))
    options = small_options("stopped", save_every=1000)
    runs = together(root, options)
    runs[0].reaches(3)
    runs[1].signal(signal.SIGTERM)  # one process is told, both end at the same iteration
    assert statuses(runs) == [143, 143], said(runs)
    complete(root, options, "--auto_resume")
    assert_equal(weights(root, "stopped"), weights(root, "undisturbed"))


def test_a_run_of_two_can_go_on_alone(root, alone):
    complete(root, small_options("fewer", total=3, batch_size_per_gpu=2))
    train(root, small_options("fewer", total=6, batch_size_per_gpu=4), "--auto_resume")
    assert_close(weights(root, "fewer"), alone)


def test_what_is_wrong_ends_all_of_them_and_is_said_once(root):
    options = {**small_options("wrong"), "scael": 2}
    runs = together(root, options)
    assert statuses(runs) == [1, 1]
    assert said(runs[:1]).count("did you mean 'scale'") == 1
    assert "process 0 stopped" in said(runs[1:])
    assert not (root / "experiments/wrong").exists()


def test_a_validation_may_take_longer_than_a_collective_waits(root):
    def slow_in_one():
        real = loop.Training._evaluated

        def evaluated(self):
            if os.environ["RANK"] == "0":
                time.sleep(9)
            return real(self)

        loop.Training._evaluated = evaluated

    options = small_options("patient", total=5)
    options["dist_params"] = {"timeout": 0.1}  # 6 seconds
    complete(root, options, before=slow_in_one)


def test_a_process_that_dies_ends_the_other_with_the_last_iteration_saved(root):
    options = small_options("dying", total=100_000, save_every=90_000, validates=False)
    options["dist_params"] = {"timeout": 0.1}
    runs = together(root, options)
    runs[0].reaches(2)
    runs[1].signal(signal.SIGKILL)
    assert runs[1].wait() == -signal.SIGKILL
    assert runs[0].wait(60) == 1, said(runs)  # torchrun would end it at once
    assert "another process of the run has ended" in said(runs)
    assert "Traceback" not in said(runs[:1])
    at = events(root, "dying", "save")[-1]["iter"]
    # The line of an iteration needs the losses of both: the last one may have been made without.
    assert at - events(root, "dying", "train")[-1]["iter"] in (0, 1)
    assert f"iteration {at} is saved" in said(runs)
    options["train"]["total_iter"] = at + 2
    train(root, options, "--auto_resume")
    assert events(root, "dying", "train")[-1]["iter"] == at + 2


def test_a_bad_sample_of_one_process_is_named_and_ends_both(root):
    made = make_root(root / "bad")
    image = made / "data/LR/image3.png"
    image.write_bytes(image.read_bytes()[:100])  # its header is complete
    runs = together(made, small_options("bad"))
    assert 0 not in statuses(runs), said(runs)
    assert "image3.png of the data set made: cannot be decoded" in said(runs)


@pytest.mark.parametrize("world", [1, 3])
def test_uneven_shares_are_measured_once_each(root, alone, world):
    options = small_test_options(Path("data"), Path("experiments/alone/models/net_g_latest.pth"))
    found = []
    for name in (f"tested_{world}", "tested_alone"):
        options["name"] = name
        if name == "tested_alone":
            pipeline.test(root, ["-opt", str(write_options(root / "test.yml", options))])
        else:
            complete(root, options, verb="test", world=world)
        last = (root / "results" / name / "log.jsonl").read_text().splitlines()[-1]
        found.append(json.loads(last)["metrics"])
        images = list((root / "results" / name / "visualization/made_val").glob("*.png"))
        assert len(images) == SAMPLES
    assert found[0] == found[1]


@pytest.mark.parametrize("launcher", ["pytorch", "slurm"])
def test_a_launcher_that_did_not_start_it_is_named(launcher, monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    starter = {"pytorch": "torchrun", "slurm": "srun"}[launcher]
    with pytest.raises(UserError, match=f"needs to be started by {starter}"), started(launcher, {}):
        pass


FAKE_SRUN = """#!/bin/bash
# Two tasks on this machine, as srun starts them; its status is the largest of theirs.
shift  # --kill-on-bad-exit=1
pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
    pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
status=0
for pid in "${pids[@]}"; do
    wait "$pid"; one=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done
    [ $one -gt $status ] && status=$one
done
exit $status
"""


@pytest.mark.faults
def test_the_slurm_script_stops_with_its_work_saved_and_asks_to_be_queued_again(root, tmp_path):
    for name, text in (("srun", FAKE_SRUN), ("scontrol", '#!/bin/sh\necho "$@" > requeued\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    options = small_options("script", total=100_000, num_worker_per_gpu=0)
    options["dist_params"] = {"port": free_port()}
    file = write_options(tmp_path / "options.yml", options)
    repository = Path(__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(
            [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
        "SLURM_JOB_ID": "77",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
    }
    script = ["bash", str(repository / "scripts/train.slurm"), str(file), "--root", str(root)]
    for name in ("train.py", "dlgsanet_arch"):
        (tmp_path / name).symlink_to(repository / name)
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(script, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        until = time.monotonic() + 100
        while len(events(root, "script", "train")) < 2:
            assert time.monotonic() < until, (tmp_path / "out").read_text()[-3000:]
            assert job.poll() is None, (tmp_path / "out").read_text()[-3000:]
            time.sleep(0.05)
        # as Slurm does ahead of the limit, to the steps and not to the script
        for child in psutil.Process(job.pid).children():
            child.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 143, (tmp_path / "out").read_text()[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    stop = events(root, "script", "stop")[-1]["iter"]
    assert (root / f"experiments/script/training_states/{stop}.state").exists()
