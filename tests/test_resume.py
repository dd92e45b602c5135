from pathlib import Path

import pytest
import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR

from dlgsanet_arch.checkpoint import save_whole
from dlgsanet_arch.errors import ResumeError
from dlgsanet_arch.pipeline.resume import AsEdited, Start, edits, find_start, is_kept_by_state, use


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "experiments" / "small"
    for name in ("models", "training_states"):
        (folder / name).mkdir(parents=True)
    return folder


def save_pair(run: Path, iteration: int, *, labels=("net_g",), checksums=True) -> None:
    networks = {}
    for label in labels:
        path = run / "models" / f"{label}_{iteration}.pth"
        networks[path.name] = save_whole({"params": {"weight": torch.rand(50)}}, path)
    state = {"epoch": 0, "iter": iteration, "optimizers": [], "schedulers": []}
    if checksums:
        state["networks"] = networks
    save_whole(state, run / "training_states" / f"{iteration}.state")


def options(**path) -> dict:
    return {"name": "small", "network_g": {}, "path": {"resume_state": None, **path}}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_pair_is_taken_by_number(run, tmp_path):
    for iteration in (5, 20, 100):
        save_pair(run, iteration)
    (run / "training_states/latest.state").write_bytes(b"stray")  # fault 22
    (run / "models/net_g_latest.pth").write_bytes(b"stray")
    start = find_start(options(), tmp_path, auto_resume=True)
    assert start == Start(
        run / "training_states/100.state", 100, {"network_g": run / "models/net_g_100.pth"}
    )


DAMAGE = {
    "truncated state": ("training_states/20.state", truncate, "20.state is truncated"),
    "truncated weights": ("models/net_g_20.pth", truncate, "net_g_20.pth is truncated"),
    "no weights": ("models/net_g_20.pth", Path.unlink, "net_g_20.pth, which are not there"),
    "no state": ("training_states/20.state", Path.unlink, "20.state is not there"),
    "empty state": ("training_states/20.state", lambda p: p.write_bytes(b""), "is empty"),
    "other weights": (
        "models/net_g_20.pth",
        lambda path: save_whole({"params": {"weight": torch.rand(50)}}, path),
        "is not the file that was saved with 20.state",
    ),
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


def test_every_network_of_a_pair_counts(run, tmp_path):
    for iteration in (10, 20):
        save_pair(run, iteration, labels=("net_g", "net_d"))
    truncate(run / "models/net_d_20.pth")
    wanted = {**options(), "network_d": {}}
    start = find_start(wanted, tmp_path, auto_resume=True)
    assert start.iteration == 10
    assert start.networks == {f"network_{x}": run / f"models/net_{x}_10.pth" for x in "gd"}
    ignoring = {**wanted, "path": {"ignore_resume_networks": ["network_d"]}}
    assert find_start(ignoring, tmp_path, auto_resume=True).networks == {
        "network_g": run / "models/net_g_10.pth"
    }


def test_no_whole_pair_is_an_error_and_no_new_start(run, tmp_path):
    save_pair(run, 10)
    truncate(run / "training_states/10.state")
    with pytest.raises(
        ResumeError, match=r"(?s)no complete pair.*drop the flag.*10.state is trunc"
    ):
        find_start(options(), tmp_path, auto_resume=True)


def test_a_run_that_has_nothing_starts_at_0(tmp_path):
    assert find_start(options(), tmp_path, auto_resume=True) == Start()
    assert find_start(options(), tmp_path, auto_resume=False) == Start()


def test_a_named_state_finds_its_weights_beside_it_in_any_run(run, tmp_path):
    save_pair(run, 10, checksums=False)  # as BasicSR saves it
    named = {**options(resume_state="experiments/small/training_states/10.state"), "name": "new"}
    start = find_start(named, tmp_path, auto_resume=False)
    assert start.networks == {"network_g": run / "models/net_g_10.pth"}
    truncate(run / "models/net_g_10.pth")
    with pytest.raises(ResumeError, match=r"net_g_10\.pth is truncated"):
        find_start(named, tmp_path, auto_resume=False)


def test_a_model_loads_the_weights_of_the_pair_and_not_those_of_the_options(run):
    opt = {"path": {"pretrain_network_g": "a.pth", "param_key_g": "params_ema"}}
    use(Start(run / "10.state", 10, {"network_g": run / "net_g_10.pth"}), opt)
    assert opt["path"] == {
        "resume_state": str(run / "10.state"),
        "pretrain_network_g": str(run / "net_g_10.pth"),
        "param_key_g": "params",
        "strict_load_g": True,
    }


def test_edits_are_found_wherever_they_are():
    before = {"train": {"optim_g": {"lr": 1e-3}, "total_iter": 10}, "scale": 2, "gone": 1}
    now = {"train": {"optim_g": {"lr": 1e-2}, "total_iter": 20}, "scale": 2, "new": [1, 2]}
    found = edits(now, before)
    assert found == {
        "train:optim_g:lr": (1e-3, 1e-2),
        "train:total_iter": (10, 20),
        "gone": (1, None),
        "new": (None, [1, 2]),
    }
    assert [path for path in found if is_kept_by_state(path)] == ["train:optim_g:lr"]


class Model:
    """As much of a model as has optimizers and schedulers."""

    def __init__(self, lr, make):
        weight = torch.nn.Parameter(torch.ones(2))
        self.optimizers = [torch.optim.Adam([weight], lr, betas=(0.9, 0.99 if lr < 1 else 0.5))]
        self.schedulers = [make(self.optimizers[0])]

    def step(self, iteration):
        if iteration > 1:
            self.schedulers[0].step()
        self.optimizers[0].param_groups[0]["params"][0].grad = torch.ones(2)
        self.optimizers[0].step()
        return self.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("iteration", [1, 3, 4, 7])
@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: MultiStepRestartLR(optimizer, milestones=[4, 6], gamma=0.5),
        lambda optimizer: CosineAnnealingRestartLR(
            optimizer, periods=[5, 10], restart_weights=[1, 0.5]
        ),
    ],
    ids=["steps", "cosine"],
)
def test_applied_edits_hold_as_if_they_had_always_done(make, iteration):
    old = Model(0.5, lambda optimizer: MultiStepRestartLR(optimizer, milestones=[2], gamma=0.1))
    for at in range(1, iteration + 1):
        old.step(at)
    always, resumed = Model(2.0, make), Model(2.0, make)
    expected = [always.step(at) for at in range(1, 13)]
    as_edited = AsEdited(resumed)
    resumed.optimizers[0].load_state_dict(old.optimizers[0].state_dict())
    resumed.schedulers[0].load_state_dict(old.schedulers[0].state_dict())
    as_edited.apply(resumed, iteration)
    found = [resumed.step(at) for at in range(iteration + 1, 13)]
    assert found == pytest.approx(expected[iteration:], rel=1e-12)
    assert resumed.optimizers[0].param_groups[0]["betas"] == (0.9, 0.5)
    moments = resumed.optimizers[0].state_dict()["state"][0]["step"]
    assert moments == 12  # what the optimizer has learned stays
