"""Runs are tried before anything is created, and a trial changes nothing; older runs resume."""

import json
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY, METRIC_REGISTRY
from test_gan import options_of, root, small_sharpener  # noqa: F401 - fixtures
from torch import nn
from torchvision.models import VGG11_Weights
from training_runs import NoisyNet, events, small_options, train

from dlgsanet_arch import cli
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.pipeline import adapter

STEPS = 10


class Fragile(nn.Sequential):
    """Cannot take a batch of two, where a trial takes one."""

    def __init__(self, raises: bool = True):
        super().__init__(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
        self.raises = raises

    def forward(self, x):
        if self.training and len(x) > 1:
            if self.raises:
                raise RuntimeError("out of luck")
            x = x * float("nan")
        return super().forward(x)


class Demanding(nn.Conv2d):
    """A discriminator of images of one size."""

    def __init__(self):
        super().__init__(3, 1, 3)

    def forward(self, x):
        assert x.shape[-1] == 64, "images of 64x64"
        return super().forward(x)


for each in (Fragile, Demanding):
    if each.__name__ not in ARCH_REGISTRY:
        ARCH_REGISTRY.register(each)


@METRIC_REGISTRY.register()
def needs_much(img, **settings):
    assert img.shape[0] >= 96, "too small"
    return 1.0


def plain(node):
    """Return a state without tensors, so that it can be compared."""
    if torch.is_tensor(node):
        return node.dtype, node.tolist()
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key not in ("name", "options")}
    return [plain(each) for each in node] if isinstance(node, list | tuple) else node


def left(folder: Path, name: str, iteration: int) -> list:
    """Return all that a run's last pair holds."""
    run = folder / "experiments" / name
    files = [*run.glob(f"models/net_*_{iteration}.pth"), run / f"training_states/{iteration}.state"]
    contents = {path.name: torch.load(path, weights_only=True) for path in files}
    contents[f"{iteration}.state"].pop("networks")  # a checksum names the folder's pair
    return plain(contents)


KINDS = ("SRModel", "dropout", "fp16", "ESRGANModel", "RealESRNetModel", "RealESRGANModel")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_changes_nothing_of_a_run(root, repository, kind):  # noqa: F811
    found = []
    for name, flags in (("tried", []), ("untried", ["--no_trial"])):
        if kind in KINDS[3:]:
            options = options_of(kind, repository, f"{name}_{kind}")
        else:
            options = small_options(f"{name}_{kind}", num_worker_per_gpu=0)
        if kind != "SRModel" and kind in KINDS[:3]:
            options["network_g"] = {"type": "NoisyNet"}
        if kind == "fp16":
            options["model_type"], options["train"]["amp"] = "DLGSANetModel", "fp16"
        options["train"]["total_iter"] = STEPS
        options["logger"]["save_checkpoint_freq"] = STEPS
        train(root, options, *flags)
        found.append(left(root, options["name"], STEPS))
    assert found[0] == found[1]


def with_discriminator(options):
    options |= {"model_type": "ESRGANModel", "network_d": {"type": "Demanding"}}
    options["train"]["optim_d"] = dict(options["train"]["optim_g"])
    options["train"]["gan_opt"] = {"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 0.1}
    options["train"]["gan_opt"] |= {"real_label_val": 1.0, "fake_label_val": 0.0}


def with_metric(options):
    options["val"]["metrics"]["much"] = {"type": "needs_much"}


def with_network(**network):
    return lambda options: options.update(network_g=network)


def with_perceptual_loss(options):
    loss = {"type": "PerceptualLoss", "layer_weights": {"conv1_1": 1}, "vgg_type": "vgg11"}
    options["train"]["perceptual_opt"] = loss


FAULTS = {
    "discriminator": (with_discriminator, r"network_d: a step .*images of 64x64"),
    "metric": (with_metric, r"metrics:much: the smallest image of .*made_val, of 64x48 .*too sm"),
    "channels": (with_network(type="NoisyNet", channels=1), r"network_g: a step .*1 channels"),
    "building": (with_network(type="NoisyNet", channels=-1), r"network_g: building the model"),
    "size": (with_network(type="SwinIR"), r"network_g: a network of 21 tensors or more"),
    "memory": (with_network(type="NoisyNet"), r"network_g: .*GB of memory free; write a smaller"),
    "validation": (
        lambda options: options["datasets"]["val"].update(color="y"),
        r"network_g: enlarging the first image of made_val .*1, 24, 32",
    ),
    "download": (
        with_perceptual_loss,
        r"perceptual_opt: .*download http://0.0.0.0/vgg11.pth .* put it at /.*/vgg11.pth",
    ),
    "loss": (
        lambda options: options["train"].update(perceptual_opt={"type": "L1Loss"}),
        r"train:perceptual_opt: a step .*iteration over a 0-d tensor",
    ),
    "sample": (
        lambda options: options["datasets"]["train"].update(dataroot_lq="damaged"),
        r"damaged/image\d\.png of the data set made: cannot be decoded",
    ),
    "optimizer": (
        lambda options: options["train"]["optim_g"].update(betas=[0.9, 1.5]),
        r"(?s)optim_g.*beta",
    ),
}


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_work_is_named_before_anything_is_created(root, monkeypatch, capsys, fault):  # noqa: F811
    change, message = FAULTS[fault]
    options = small_options("earlier", total=2, num_worker_per_gpu=0)
    if not (root / "experiments/earlier").exists():
        train(root, options)
    change(options)

    (root / "damaged").mkdir(exist_ok=True)
    for image in (root / "data/LR").iterdir():
        (root / "damaged" / image.name).write_bytes(image.read_bytes()[:100])
    if fault == "memory":  # three quarters are for gradients and moments
        size = sum(each.nbytes for each in NoisyNet().parameters())
        monkeypatch.setattr(adapter, "free_memory", lambda device: 3 * size)
    if fault == "size":
        monkeypatch.setattr(adapter, "_MOST_TENSORS", 20)
    monkeypatch.setattr(VGG11_Weights.IMAGENET1K_V1.value, "url", "http://0.0.0.0/vgg11.pth")
    file = helpers.write_options(root / "earlier.yml", options)
    before = listing(root)
    with pytest.raises(UserError, match=message):
        train(root, options)
    assert cli.main(["train", "-opt", str(file), "--root", str(root)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert listing(root) == before


def test_a_run_that_fails_in_its_first_iteration_replaces_nothing(root):  # noqa: F811
    options = small_options("first", total=2, validates=False, num_worker_per_gpu=0)
    train(root, options)
    before = listing(root / "experiments")
    options["network_g"] = {"type": "Fragile"}
    for flags in ([], ["--no_trial"]):
        with pytest.raises(RuntimeError, match="out of luck"):
            train(root, options, *flags)
    options["network_g"] = {"type": "Fragile", "raises": False}
    with pytest.raises(UserError, match=r"iteration 1 .*not finite.*the batch's samples: data"):
        train(root, options)
    left_over = [path for path in listing(root / "experiments") if path.name != ".first.lock"]
    assert left_over == [path for path in before if path.name != ".first.lock"]


def test_a_network_is_built_once_and_once_for_its_average(root, monkeypatch):  # noqa: F811
    options = small_options("counted", total=2, num_worker_per_gpu=0)
    train(root, options)
    built, real = [], DLGSANet.__init__

    def counted(self, *arguments, **named):
        real(self, *arguments, **named)
        built.append(next(self.parameters()).device)

    monkeypatch.setattr(DLGSANet, "__init__", counted)
    options["train"]["total_iter"] = 3
    train(root, options, "--auto_resume")
    # "meta" is without memory: the checks of options and size
    assert [device.type for device in built if device.type != "meta"] == ["cpu", "cpu"]


def test_a_schedule_that_an_edited_state_breaks_is_named_before_the_run_resumes(root):  # noqa: F811
    options = small_options("edited_schedule", total=2, num_worker_per_gpu=0)
    train(root, options)
    path = root / "experiments/edited_schedule/training_states/2.state"
    state = torch.load(path, weights_only=True)
    state["schedulers"][0]["milestones"] = 3
    torch.save(state, path)
    options["train"]["total_iter"] = 3
    before = listing(root / "experiments")
    with pytest.raises(UserError, match=r"train:scheduler: .*next learning rate, with the state"):
        train(root, options, "--auto_resume")
    assert listing(root / "experiments") == before


OLD = Path(__file__).parent / "data/run_5cbbcc6"


def test_a_run_of_an_earlier_version_continues_as_it_would_have_there(tmp_path):
    """Commit 5cbbcc6 trained 4 iterations, and from there to 8; its kernels rounded otherwise."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    command = ["train", "-opt", str(tmp_path / "old.yml"), "--root", str(tmp_path)]
    assert cli.main([*command, "--auto_resume"]) == 0
    expected = json.loads((OLD / "expected/8.json").read_text())
    lines = events(tmp_path, "old", "train")
    assert [line["iter"] for line in lines] == [5, 6, 7, 8]
    assert [line["lr"] for line in lines] == expected["lr"]
    losses = [line["losses"]["l_pix"] for line in lines]
    assert losses == pytest.approx(expected["l_pix"], rel=1e-5)
    run = tmp_path / "experiments/old"
    state = torch.load(run / "training_states/8.state", weights_only=True)
    progress = {key: value for key, value in state["progress"].items() if key != "options"}
    schedule, adam = state["schedulers"][0], state["optimizers"][0]
    assert (
        expected.items()
        >= {
            "progress": progress,
            "last_epoch": schedule["last_epoch"],
            "last_lr": schedule["_last_lr"],
            "adam_step": adam["state"][0]["step"].item(),
            "param_lr": adam["param_groups"][0]["lr"],
        }.items()
    )
    found = torch.load(run / "models/net_g_8.pth", weights_only=True)
    theirs = torch.load(OLD / "expected/net_g_8.pth", weights_only=True)
    # Adam divides by the gradient's own size: where that is rounding, so is the step
    for key, weights in theirs.items():
        torch.testing.assert_close(dict(found[key]), dict(weights), rtol=1e-3, atol=2e-5)
    (validation,) = events(tmp_path, "old", "validation")
    assert validation["metrics"]["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)
