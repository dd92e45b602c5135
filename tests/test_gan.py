"""ESRGAN and Real-ESRGAN with DLGSANet as generator, on a CPU, by the shipped option files."""

import functools
from pathlib import Path

import pytest
import torch
import training_runs
from basicsr.models import realesrgan_model, realesrnet_model
from basicsr.utils import USMSharp
from helpers import SMALL_NETWORK, small_test_options, write_options
from training_runs import assert_equal, events, train, weights

from dlgsanet_arch import pipeline
from dlgsanet_arch.options import load

GENERATOR = {**SMALL_NETWORK, "type": "DLGSANet"}
DISCRIMINATOR = {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4}
HR, META = "data/HR", "data/meta_info.txt"
STEPS = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = training_runs.make_root(tmp_path_factory.mktemp("gan"))
    names = sorted(path.name for path in (folder / HR).iterdir())
    (folder / META).write_text("".join(f"{name} (48,64,3)\n" for name in names))
    return folder


@pytest.fixture(autouse=True)
def small_sharpener(monkeypatch):
    """BasicSR sharpens HR by a filter of 51x51, which takes seconds an image on a CPU."""
    for module in (realesrgan_model, realesrnet_model):
        monkeypatch.setattr(module, "USMSharp", functools.partial(USMSharp, radius=4))


def options_of(model, repository, name):
    """The shipped file of a model, made small; ESRGANModel has none, and takes pairs."""
    net = model == "RealESRNetModel"
    file = "tiny_x4_realesrnet.yml" if net else "tiny_x4_realesrgan.yml"
    options = load(repository / "options" / "train" / file)
    small = training_runs.small_options(name)
    options |= {"name": name, "scale": 2, "network_g": GENERATOR, "gt_size": 32, "queue_size": 4}
    options |= {"model_type": model, "val": small["val"], "logger": small["logger"]}
    options["path"] = small["path"] | {"pretrain_network_g": None}
    options["train"] |= {"total_iter": STEPS, "warmup_iter": -1}
    options["train"].pop("perceptual_opt", None)
    if not net:
        options["network_d"] = DISCRIMINATOR
    reading = {"num_worker_per_gpu": 0, "batch_size_per_gpu": 2, "gt_size": 32}
    data = options["datasets"]["train"] | {"dataroot_gt": HR, "meta_info": META}
    data |= {"io_backend": {"type": "disk"}, **reading}
    if model == "ESRGANModel":
        data = small["datasets"]["train"] | reading
        # What makes LR from HR is read by Real-ESRGAN alone.
        kept = small.keys() | {"network_d"}
        options = {key: value for key, value in options.items() if key in kept}
    options["datasets"] = {"train": data, "val": small["datasets"]["val"]}
    options["logger"] |= {"save_checkpoint_freq": 3}
    return options


@pytest.mark.parametrize("model", ["RealESRNetModel", "RealESRGANModel", "ESRGANModel"])
def test_it_trains_validates_resumes_bit_equal_and_tests(root, repository, model):
    complete, cut = f"complete_{model}", f"cut_{model}"
    train(root, options_of(model, repository, complete))
    for until in (2, STEPS):
        options = options_of(model, repository, cut)
        options["train"]["total_iter"] = until
        train(root, options, "--auto_resume")
    networks = ["net_g_latest"] + ["net_d_latest"] * (model != "RealESRNetModel")
    for label in networks:
        assert_equal(weights(root, cut, label), weights(root, complete, label))
    losses = [entry["losses"] for entry in events(root, complete, "train")]
    assert len(losses) == STEPS
    assert losses == [entry["losses"] for entry in events(root, cut, "train")]
    first = weights(root, complete, "net_g_3")
    last = weights(root, complete)
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert len(moved) > 0.9 * len(first), "the weights hardly change"
    validated = [entry["metrics"]["psnr"] for entry in events(root, complete, "validation")]
    assert len(validated) == 2
    assert all(5 < value < 60 for value in validated)

    if model == "RealESRNetModel":  # its pool draws different pairs, on the CPU, in 8-bit steps
        state = root / "experiments" / complete / "training_states" / f"{STEPS}.state"
        pool = torch.load(state, weights_only=True)["pool"]
        assert pool["queue_lr"].shape == (4, 3, 16, 16)
        assert pool["queue_gt"].shape == (4, 3, 32, 32)
        levels = pool["queue_lr"] * 255
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        reduced = torch.nn.functional.avg_pool2d(pool["queue_gt"], 2)
        assert (reduced - pool["queue_lr"]).abs().mean() > 0.01

    trained = root / "experiments" / complete / "models" / "net_g_latest.pth"
    testing = small_test_options(Path("data"), trained, name=f"test_{model}", network_g=GENERATOR)
    testing["model_type"] = "SRModel"
    pipeline.test(root, ["-opt", str(write_options(root / "test.yml", testing))])
    assert (root / "results" / f"test_{model}" / "evaluation.json").exists()
