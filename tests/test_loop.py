"""Whole trainings: their length, their resumes, their ends, and what they leave behind."""

import json
import resource
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from basicsr.train import train_pipeline
from helpers import write_options
from training_runs import (
    SAMPLES,
    SWINIR,
    Forked,
    assert_equal,
    events,
    make_root,
    small_options,
    train,
    weights,
)

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import loop, runs
from dlgsanet_arch.pipeline.processes import LockedError
from dlgsanet_arch.pipeline.reports import Evaluation
from dlgsanet_arch.pipeline.samples import Sampling

KINDS = {
    "SRModel": {},
    "own": {"model_type": "DLGSANetModel"},
    "dropout": {"network_g": {"type": "NoisyNet"}},
    "SwinIRModel": {"model_type": "SwinIRModel", "network_g": SWINIR},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_root(tmp_path_factory.mktemp("loop"))


def options_of(kind: str, name: str, **train_set) -> dict:
    return {**small_options(name, **train_set), **KINDS[kind]}


@pytest.fixture(scope="module")
def undisturbed(root):
    """The weights of runs that nothing stopped, by kind; each is trained once."""
    done = {}

    def of(kind: str) -> dict:
        if kind not in done:
            train(root, options_of(kind, f"whole_{kind}"))
            done[kind] = weights(root, f"whole_{kind}")
        return done[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_weights(root, undisturbed, kind):
    name = f"cut_{kind}"
    for until, workers in ((2, 0), (3, 2), (8, 1), (12, 0)):
        options = options_of(kind, name, num_worker_per_gpu=workers)
        options["train"]["total_iter"] = until
        train(root, options, "--auto_resume")
    assert_equal(weights(root, name), undisturbed(kind))
    losses = [
        [entry["losses"] for entry in events(root, run, "train")] for run in (name, f"whole_{kind}")
    ]
    assert losses[0] == losses[1]


def test_averages_have_the_buffers_of_the_network(undisturbed):
    found = undisturbed("dropout")
    assert found["params/body.1.running_mean"].abs().max() > 0
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[f"params_ema/body.1.{name}"], found[f"params/body.1.{name}"])


def test_it_ends_at_total_iter_and_validates_there_whatever_the_epochs(root):
    options = small_options("length", total=10, batch_size_per_gpu=4)
    train(root, options)  # 7 samples: BasicSR would end earlier, see its fault 1
    assert [entry["iter"] for entry in events(root, "length", "train")] == list(range(1, 11))
    assert [entry["iter"] for entry in events(root, "length", "validation")] == [4, 8, 10]
    state = torch.load(root / "experiments/length/training_states/10.state")
    assert state["iter"] == 10


def test_gray_networks_train_on_y(root):
    options = small_options("gray", total=4, num_worker_per_gpu=0, color="y")
    options["datasets"]["val"]["color"] = "y"
    options["network_g"]["in_chans"] = 1
    train(root, options)
    assert weights(root, "gray")["params/overlap_embed.0.proj.weight"].shape[1] == 1
    (validation,) = events(root, "gray", "validation")
    assert 5 < validation["metrics"]["psnr"] < 60


def test_a_complete_run_is_left_as_it_is(root, undisturbed):
    undisturbed("SRModel")
    folder = root / "experiments/whole_SRModel"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.pth")}
    train(root, small_options("whole_SRModel"), "--auto_resume")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.pth")} == before
    (folder / "models/net_g_latest.pth").unlink()
    train(root, small_options("whole_SRModel"), "--auto_resume")
    assert_equal(weights(root, "whole_SRModel"), undisturbed("SRModel"))


def test_the_best_weights_are_kept_over_a_resume(root, monkeypatch):
    figures = iter([30.0, 32.0, 31.0, 29.0, 33.0, 28.0])

    def evaluated(self):
        iteration = self._progress.iteration
        return [Evaluation("made_val", iteration, (), {"psnr": next(figures)})]

    monkeypatch.setattr(loop.Training, "_evaluated", evaluated)
    options = small_options("best", total=8)  # validated at 2, 4, 6 and 8
    options["val"]["val_freq"] = 2
    options["logger"] |= {"save_best": "psnr", "keep_last": 1}
    train(root, options)
    fourth = weights(root, "best", "net_g_best")
    options["train"]["total_iter"] = 9  # 33.0 at 9, where the run ends
    train(root, options, "--auto_resume")
    assert_equal(weights(root, "best", "net_g_best"), weights(root, "best"))
    options["train"]["total_iter"] = 10
    train(root, options, "--auto_resume")
    state = torch.load(root / "experiments/best/training_states/10.state")
    assert state["best"] == {"value": 33.0, "iter": 9}
    kept = sorted(path.stem for path in (root / "experiments/best/models").iterdir())
    assert kept == ["net_g_10", "net_g_best", "net_g_latest"]
    assert any(not torch.equal(fourth[k], v) for k, v in weights(root, "best").items())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_iteration_and_the_run_goes_on(root, undisturbed, number, status):
    name = f"stopped_{status}"
    # long, so that its worker is at work when the signal comes
    run = Forked(root, small_options(name, total=300, save_every=1000))
    run.reaches(3)
    run.signal_all(number)
    assert run.wait() == status
    assert f"stopped by {number.name} at iteration" in run.said
    assert "Traceback" not in run.said
    train(root, small_options(name), "--auto_resume")
    assert_equal(weights(root, name), undisturbed("SRModel"))


def test_a_signal_in_a_validation_does_not_wait_for_it(root, undisturbed):
    options = small_options("in_validation")

    def slow():
        real = loop.Training._evaluated

        def evaluated(self):
            (root / "validating").touch()
            time.sleep(60)
            return real(self)

        loop.Training._evaluated = evaluated

    run = Forked(root, options, before=slow)
    run.reaches(4)
    while not (root / "validating").exists():
        pass
    run.signal(signal.SIGTERM)
    assert run.wait(20) == 143
    train(root, options, "--auto_resume")
    assert [entry["iter"] for entry in events(root, "in_validation", "validation")] == [4, 8, 12]
    assert_equal(weights(root, "in_validation"), undisturbed("SRModel"))


def test_a_killed_worker_ends_the_run_with_its_last_iteration_saved(root):
    options = small_options("orphaned", total=300, save_every=1000)
    options["val"]["val_freq"] = 1000  # its workers are not meant
    run = Forked(root, options)
    run.reaches(2)
    (worker,) = psutil.Process(run.pid).children()
    worker.kill()
    assert run.wait() == 1
    assert "Traceback" not in run.said
    at = events(root, "orphaned", "save")[-1]["iter"]
    assert at == events(root, "orphaned", "train")[-1]["iter"]
    assert "a worker that reads samples died" in run.said
    assert f"iteration {at} is saved, resume with --auto_resume" in run.said
    for name, flags in (("orphaned", ["--auto_resume"]), ("undisturbed", [])):
        train(root, small_options(name, total=at + 4), *flags)
    assert_equal(weights(root, "orphaned"), weights(root, "undisturbed"))


def test_the_limit_of_open_files_is_named_and_no_image(root):
    def limit():
        most = len(list(Path("/proc/self/fd").iterdir())) + 12
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    run = Forked(root, small_options("limited", num_worker_per_gpu=8), before=limit)
    assert run.wait() == 1
    assert "open files is reached: raise it (ulimit -n" in run.said
    assert "Traceback" not in run.said
    assert "bad sample" not in run.said


def test_a_killed_run_ends_with_the_same_weights(root, undisturbed):
    options = small_options("killed", save_every=2)
    for count in (3, 4):
        run = Forked(root, options, "--auto_resume")
        run.reaches(count)
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    left = root / "experiments/killed/models/net_g_99.pth.unfinished"
    left.write_bytes(b"what a killed save leaves")
    train(root, options, "--auto_resume")
    assert not left.exists()
    assert_equal(weights(root, "killed"), undisturbed("SRModel"))


def test_a_second_run_of_the_same_name_is_refused_and_changes_nothing(root):
    run = Forked(root, small_options("locked", total=10_000))
    run.reaches(2)
    try:
        short = small_options("locked", total=2)
        for flags in ([], ["--auto_resume"]):
            with pytest.raises(LockedError, match=f"the run locked .* process {run.pid} on "):
                train(root, short, *flags)
        assert sorted(p.name for p in (root / "experiments").glob("locked*")) == ["locked"]
    finally:
        run.signal(signal.SIGTERM)
        assert run.wait() == 143


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_named_and_the_iterations_before_it_are_saved(root, undisturbed, workers):
    made = make_root(root / f"bad_{workers}")
    options = small_options("bad", save_every=1000, validates=False, num_worker_per_gpu=workers)
    first = Sampling(SAMPLES, 1, 2, seed=0).shuffled(0)  # of which an epoch takes 3 x 2
    image = made / f"data/LR/image{first[4]}.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    with pytest.raises(UserError, match=rf"(?s)bad samples.*{image.name} of the data set made"):
        train(made, options)
    assert torch.load(made / "experiments/bad/training_states/2.state")["iter"] == 2
    image.write_bytes(whole)
    train(made, options, "--auto_resume")
    train(made, {**options, "name": "good"})
    assert_equal(weights(made, "bad"), weights(made, "good"))


def test_tolerated_bad_samples_are_replaced_and_counted_over_a_resume(root):
    made = make_root(root / "tolerated")
    spoilt = [made / f"data/LR/image{number}.png" for number in (3, 5)]
    for image in spoilt:
        image.write_bytes(image.read_bytes()[:100])
    options = small_options("tolerant", validates=False, skip_bad_samples=2)
    train(made, {**options, "name": "whole"})
    for until in (5, 12):
        options["train"]["total_iter"] = until
        train(made, options, "--auto_resume")
    assert_equal(weights(made, "tolerant"), weights(made, "whole"))
    state = torch.load(made / "experiments/tolerant/training_states/12.state")
    found = {Path(sample).name for _, sample, _ in state["progress"]["bad_samples"]}
    assert found == {"image3.png", "image5.png"}
    options["datasets"]["train"]["skip_bad_samples"] = 1
    with pytest.raises(UserError, match="tolerates 1"):
        train(made, {**options, "name": "strict"})


def test_a_loss_that_is_not_finite_ends_the_run_with_the_names_of_its_batch(root):
    options = small_options("diverged")
    options["train"]["optim_g"]["lr"] = 1e6
    with pytest.raises(UserError, match=r"not finite.*non_finite_\d+\.json"):
        train(root, options)
    (report,) = (root / "experiments/diverged").glob("non_finite_*.json")
    content = json.loads(report.read_text())
    assert len(content["samples"]) == 2
    assert all(Path(root / name).is_file() for name in content["samples"])
    saved = (root / "experiments/diverged").rglob("*.pth")
    for path in saved:
        for part in torch.load(path, weights_only=True).values():
            assert all(value.isfinite().all() for value in part.values()), path


def test_edits_that_a_resume_leaves_out_are_said_and_can_be_applied(root):
    options = small_options("edited", total=4)
    options["train"]["scheduler"]["milestones"] = [100]
    train(root, options)
    options["train"]["total_iter"] = 6
    options["train"]["optim_g"]["lr"] = 0.25
    train(root, options, "--auto_resume")
    log = "".join(path.read_text() for path in (root / "experiments/edited").glob("*.log"))
    assert "NOT used: train:optim_g:lr: was 0.001, is 0.25" in log
    assert "edited since the run began: train:total_iter: was 4, is 6" in log
    options["train"]["total_iter"] = 8
    cosine = {"type": "CosineAnnealingRestartLR", "periods": [8], "restart_weights": [1]}
    edited = options | {"train": options["train"] | {"scheduler": cosine}}
    with pytest.raises(UserError, match=r"train:scheduler:type: was 'MultiStepLR'.*--apply_edits"):
        train(root, edited, "--auto_resume")
    train(root, options, "--auto_resume", "--apply_edits")
    rates = [entry["lr"] for entry in events(root, "edited", "train")]
    assert rates == [[1e-3]] * 6 + [[0.25]] * 2


def test_basicsr_itself_goes_on_from_our_checkpoints(root, monkeypatch):
    options = small_options("handed_over")
    options["logger"]["save_best"] = "psnr"
    train(root, small_options("handed_over", total=6))
    file = write_options(root / "handed_over.yml", options)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(file), "--auto_resume"])
    train_pipeline(str(root))
    state = torch.load(root / "experiments/handed_over/training_states/10.state")
    assert state["iter"] == 10
    train(root, options, "--auto_resume")  # and ours from BasicSR's
    assert events(root, "handed_over", "train")[-1]["iter"] == 12


def test_a_name_that_was_used_is_renamed_and_nothing_of_it_is_lost(root, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda *_: "20300102_030405")
    options = small_options("again", total=2)
    kept = []
    for seed in range(3):  # two are renamed within a second
        train(root, {**options, "manual_seed": seed})
        kept.append(weights(root, "again"))
    assert_equal(weights(root, "again_archived_20300102_030405"), kept[0])
    assert_equal(weights(root, "again_archived_20300102_030405_2"), kept[1])
