"""`train:max_minutes`: a schedule that ends with the run's time, by a clock that tests set."""

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from basicsr.utils.registry import MODEL_REGISTRY
from test_distributed import complete
from training_runs import assert_equal, events, make_root, small_options, train, weights

from dlgsanet_arch import pipeline
from dlgsanet_arch.errors import Interrupted, UserError
from dlgsanet_arch.pipeline import budget, loop

TOTAL, WARM_UP, MINUTES = 1000, 200, 10
RATE, LEAST = 1e-3, 1e-5
SECONDS = [0.25, 90, 45, 0.25, 150, 30, 0.25, 0.25, 120, 170]  # of the steps
COSINE = {"type": "CosineAnnealingRestartLR", "periods": [TOTAL], "restart_weights": [1]}
COSINE |= {"eta_min": LEAST}
STEPS = {"type": "MultiStepLR", "milestones": [150, 300, 600], "gamma": 0.5}


class Clock:
    """Stands for `time.monotonic` where the budget reads it; `now` is set by hand."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """A clock that each step moves on."""
    clock, step = Clock(), loop.Training._step
    for module in (pipeline, budget):
        monkeypatch.setattr(module, "monotonic", clock)

    def timed(self, iteration, batch):
        step(self, iteration, batch)
        clock.now += SECONDS[(iteration - 1) % len(SECONDS)]

    monkeypatch.setattr(loop.Training, "_step", timed)
    return clock


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_root(tmp_path_factory.mktemp("budget"))


def timed_options(name: str, scheduler=COSINE, minutes=MINUTES, **more) -> dict:
    options = small_options(name, total=TOTAL, **more)
    options["train"] |= {"scheduler": dict(scheduler), "max_minutes": minutes}
    options["train"]["warmup_iter"] = WARM_UP
    return options


def positions() -> list[int]:
    """Where each iteration of a run of `SECONDS` stands in the schedule, by definition."""
    before = itertools.accumulate([0, *SECONDS[:-1]])
    return [max(n, math.floor(TOTAL * s / (60 * MINUTES))) for n, s in enumerate(before, 1)]


def cosine(position: int) -> float:
    half = (1 + math.cos(math.pi * (position - 1) / TOTAL)) / 2
    return LEAST + (RATE - LEAST) * half


def steps(position: int) -> float:
    return RATE * 0.5 ** sum(milestone <= position - 1 for milestone in STEPS["milestones"])


@pytest.mark.parametrize(("scheduler", "formula"), [(COSINE, cosine), (STEPS, steps)])
@pytest.mark.parametrize("model", ["SRModel", "DLGSANetModel"])
@pytest.mark.usefixtures("clock")
def test_schedule_and_warm_up_end_with_the_budget(root, monkeypatch, model, scheduler, formula):
    take = loop.Pace.take
    monkeypatch.setattr(loop.Pace, "take", lambda *given: take(*given) | {"eta": 1e9})
    name = f"{model}_{scheduler['type']}"
    train(root, timed_options(name, scheduler) | {"model_type": model})
    lines = events(root, name, "train")
    expected = [formula(p) * min(1, p / WARM_UP) for p in positions()]
    assert [line["lr"][0] for line in lines] == pytest.approx(expected, rel=1e-9)
    left = [60 * MINUTES - s for s in itertools.accumulate([0, *SECONDS[:-1]])]
    assert [line["eta"] for line in lines] == pytest.approx(left)
    assert [entry["iter"] for entry in events(root, name, "validation")] == [4, 8, 10]
    assert events(root, name, "end")[-1]["iter"] == 10
    (log,) = (root / "experiments" / name).glob("*.log")
    said = f"End of training at iteration 10 of {TOTAL}: the 10 minutes of train:max_minutes are us"
    assert said in log.read_text()
    state = torch.load(root / f"experiments/{name}/training_states/10.state")
    assert state["progress"]["seconds"] == pytest.approx(sum(SECONDS))


def test_a_resumed_run_continues_its_time_and_ends_with_the_same_weights(root, clock, monkeypatch):
    train(root, timed_options("whole"))
    at, step = [3, 6], loop.Training._step

    def stopped(self, iteration, batch):
        step(self, iteration, batch)
        if at and iteration == at[0]:
            os.kill(os.getpid(), signal.SIGTERM)
            at.pop(0)

    monkeypatch.setattr(loop.Training, "_step", stopped)
    for _ in range(2):
        with pytest.raises(Interrupted):
            train(root, timed_options("cut"), "--auto_resume")
        clock.now += 90_000  # in the queue
    train(root, timed_options("cut"), "--auto_resume")
    assert_equal(weights(root, "cut"), weights(root, "whole"))
    rates = [[line["lr"] for line in events(root, name, "train")] for name in ("cut", "whole")]
    assert rates[0] == rates[1]

    folder = root / "experiments/cut"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")}
    train(root, timed_options("cut"), "--auto_resume")  # has no time left
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")} == before
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    assert f"complete: 10 of {TOTAL} iterations, and the 10 minutes of train:max_minutes" in logs


@pytest.mark.usefixtures("clock")
def test_the_last_state_says_that_the_time_is_used_up(root):
    for _ in range(2):  # its last iteration is saved before the clock is read
        train(root, timed_options("saved", validates=False), "--auto_resume")
    assert events(root, "saved", "train")[-1]["iter"] == 10
    more = timed_options("saved", minutes=2 * MINUTES, validates=False)
    train(root, more, "--auto_resume", "--apply_edits")
    position = math.floor(TOTAL * sum(SECONDS) / (2 * 60 * MINUTES))
    assert events(root, "saved", "train")[10]["lr"] == pytest.approx([cosine(position)])


def test_a_run_that_is_faster_than_its_budget_ends_as_without_one(root, clock, monkeypatch):
    monkeypatch.setitem(globals(), "SECONDS", [0.001] * 12)
    for name, minutes in (("fast", 10), ("free", None)):
        options = small_options(name)
        options["train"]["max_minutes"] = minutes
        train(root, options)
    assert_equal(weights(root, "fast"), weights(root, "free"))
    state = torch.load(root / "experiments/free/training_states/12.state")
    assert "seconds" not in state["progress"]  # no clock in the state of a run without a budget


def test_processes_have_one_rate_and_one_end(root):
    def own_clock():
        rank, clock, step = os.environ["RANK"], Clock(), loop.Training._step

        def timed(self, iteration, batch):
            step(self, iteration, batch)
            with (root / f"rates{rank}").open("a") as file:
                file.write(f"{json.dumps(self.model.get_current_learning_rate())}\n")
            clock.now += (50, 70)[int(rank)]  # the second is ahead

        pipeline.monotonic = budget.monotonic = clock
        loop.Training._step = timed

    complete(root, timed_options("two", validates=False), before=own_clock)
    rates = [(root / f"rates{rank}").read_text().splitlines() for rank in range(2)]
    assert rates[0] == rates[1]
    assert len(rates[0]) == math.ceil(60 * MINUTES / 70)


def test_a_budget_that_no_iteration_fits_in_is_refused(root, clock, monkeypatch):
    build = loop.Training._build_data

    def slow(self, options):
        clock.now += 61
        build(self, options)

    monkeypatch.setattr(loop.Training, "_build_data", slow)
    with pytest.raises(UserError, match=r"the 1 minutes .* used up before the first iteration"):
        train(root, timed_options("late", minutes=1))
    assert not (root / "experiments/late").exists()


def test_a_model_that_sets_its_rate_itself_is_refused(root):
    class OwnRate(MODEL_REGISTRY.get("SRModel")):
        def update_learning_rate(self, current_iter, warmup_iter=-1):
            pass

    MODEL_REGISTRY._obj_map["OwnRate"] = OwnRate
    try:
        with pytest.raises(UserError, match="train:max_minutes: OwnRate sets its learning rate"):
            train(root, timed_options("own") | {"model_type": "OwnRate"})
    finally:
        del MODEL_REGISTRY._obj_map["OwnRate"]
