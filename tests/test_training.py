import json
import math
import re
import sys
from types import SimpleNamespace

import helpers
import pytest
import torch
import training_runs
from basicsr.models import build_model
from basicsr.models.base_model import BaseModel
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dlgsanet_arch import training
from dlgsanet_arch.averaging import FollowsSchedule, average
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import losses as loss_module
from dlgsanet_arch.pipeline.adapter import adapt
from dlgsanet_arch.pipeline.losses import FiniteLosses
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.training import DLGSANetModel

EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1}
EDSR |= {"upscale": 2}


class NormedNet(nn.Module):
    """A network with each kind of tensor: parameters, running statistics, a count, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, lq):
        return F.pixel_shuffle(self.norm(self.conv(lq)), 2)


if "NormedNet" not in ARCH_REGISTRY:
    ARCH_REGISTRY.register(NormedNet)


def build(tmp_path, network=EDSR, model_type="DLGSANetModel", top=(), **train):
    """A model as BasicSR builds it, on the CPU, from the same weights at each call."""
    options = helpers.small_train_options(tmp_path, model_type=model_type, num_gpu=0)
    options["network_g"] = dict(network)
    options["train"] |= train
    options |= {"dist": False, "rank": 0, "world_size": 1, "is_train": True, **dict(top)}
    torch.manual_seed(0)
    return build_model(options)


def batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        gt = torch.rand(size, 3, 24, 20, generator=generator)
        yield {"lq": F.avg_pool2d(gt, 2), "gt": gt}


def train(model, iterations=3, size=4):
    logs = []
    for iteration, data in enumerate(batches(iterations, size), 1):
        model.update_learning_rate(iteration, model.opt["train"].get("warmup_iter", -1))
        model.feed_data(data)
        model.optimize_parameters(iteration)
        logs.append(dict(model.get_current_log()))
    return logs


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def gradients(model):
    return [parameter.grad.clone() for parameter in model.net_g.parameters()]


def assert_equal(ours, theirs, atol=0.0):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=name)


SGD = {"type": "SGD", "lr": 0.1}


@pytest.mark.parametrize("network", [EDSR, helpers.SMALL_NETWORK])
def test_with_everything_off_it_trains_what_srmodel_trains(tmp_path, network):
    ours, theirs = (build(tmp_path, network, name) for name in ("DLGSANetModel", "SRModel"))
    assert type(ours) is DLGSANetModel
    assert train(ours, 5) == train(theirs, 5)
    assert_equal(weights(ours.net_g), weights(theirs.net_g))
    assert_equal(weights(ours.net_g_ema), weights(theirs.net_g_ema), atol=1e-6)
    assert_equal({"output": ours.output}, {"output": theirs.output.detach()})


def test_basicsrs_own_pipeline_trains_it(tmp_path, monkeypatch, logged):
    from basicsr.train import train_pipeline

    helpers.write_pairs(tmp_path / "data", 4)
    options = helpers.small_train_options(tmp_path / "data", model_type="DLGSANetModel")
    options["train"] |= {"amp": "bf16", "channels_last": True, "clip_grad_norm": 0.5}
    options["train"] |= {"accumulation": 2, "warmup_iter": 3}
    options["train"]["optim_g"] |= {"type": "AdamW", "fused": True}
    path = helpers.write_options(tmp_path / "train.yml", options)
    monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(path)])
    train_pipeline(str(tmp_path))
    run = tmp_path / "experiments/small"
    state = torch.load(run / "training_states/4.state", weights_only=True)
    assert state["iter"] == 4
    # Without the warm-up's factor: 1e-3, halved at the milestone of 3 steps.
    assert state["schedulers"][0]["_last_lr"] == [5e-4]
    assert sum(" grad_norm: " in message for message in logged) == 4
    saved = torch.load(run / "models/net_g_4.pth", weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in saved["params"].values())


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_amp_trains_nearly_the_same_in_half_and_validates_in_full_precision(tmp_path, amp, dtype):
    full, half = build(tmp_path), build(tmp_path, amp=amp)
    for model in (full, half):
        model.feed_data(next(batches(1)))
        model.test()
    assert torch.equal(full.output, half.output)
    seen = []
    half.net_g.conv_first.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    losses, half_losses = train(full), train(half)
    assert set(seen) == {dtype}
    assert half.output.dtype == torch.float32
    assert {value.dtype for value in weights(half.net_g).values()} == {torch.float32}
    for one, other in zip(losses, half_losses, strict=True):
        assert one["l_pix"] != other["l_pix"]
        assert one["l_pix"] == pytest.approx(other["l_pix"], rel=2e-2)
    assert half.scaler.is_enabled() == (amp == "fp16")


def norm_of(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def test_gradients_are_unscaled_and_clipped_and_their_norm_is_logged(tmp_path):
    free, clipped, half = (
        build(tmp_path, optim_g=SGD, **more)
        for more in ({}, {"clip_grad_norm": 0.01}, {"clip_grad_norm": 0.01, "amp": "fp16"})
    )
    assert clipped.get_current_log() == {}
    train(free, 1)
    (log,), (half_log,) = train(clipped, 1), train(half, 1)
    assert clipped.log_dict.keys() == {"l_pix", "grad_norm"}
    for value in clipped.log_dict.values():  # on the device until they are printed
        assert isinstance(value, torch.Tensor)
        assert not value.requires_grad
    norm = norm_of(gradients(free))
    assert norm > 0.01
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert half_log["grad_norm"] == pytest.approx(norm, rel=1e-2)
    assert norm_of(gradients(clipped)) == pytest.approx(0.01, rel=1e-4)
    for one, other in zip(gradients(clipped), gradients(half), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-4)


def test_an_overflow_passes_the_step_over_and_is_no_bad_loss(tmp_path):
    model = build(tmp_path, amp="fp16", clip_grad_norm=1.0)
    model.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(model.net_g)
    (log,) = train(model, 1)
    assert not math.isfinite(log["grad_norm"])
    assert_equal(weights(model.net_g), before)
    assert model.scaler.get_scale() == 2.0**39
    watch = watcher(tmp_path)
    watch.watch(1, ["a"], model.log_dict)
    watch.check()


def test_channels_last_changes_the_layout_alone(tmp_path):
    plain, model = build(tmp_path), build(tmp_path, channels_last=True)
    logs, last_logs = train(plain), train(model)
    layout = torch.channels_last
    assert model.lq.is_contiguous(memory_format=layout)
    for network in (model.net_g, model.net_g_ema):
        weight = network.body[0].conv1.weight
        assert weight.is_contiguous(memory_format=layout)
        assert not weight.is_contiguous()
    assert [log["l_pix"] for log in last_logs] == pytest.approx(
        [log["l_pix"] for log in logs], rel=1e-5
    )
    assert_equal(weights(model.net_g), weights(plain.net_g), atol=1e-4)


@pytest.fixture
def backend():
    """Call it to add a backend of torch.compile, which compiles a graph by the function given."""
    registry = torch._dynamo.backends.registry
    before = list(torch._dynamo.list_backends(exclude_tags=()))
    torch._dynamo.reset()
    yield lambda name, function: torch._dynamo.register_backend(function, name=name)
    torch._dynamo.reset()
    for name in set(torch._dynamo.list_backends(exclude_tags=())) - set(before):
        del registry._BACKENDS[name], registry._COMPILER_FNS[name]


def test_compile_works_in_place_and_not_in_validation(tmp_path, backend):
    graphs = []

    def as_it_is(graph, _):
        graphs.append(graph)
        return graph.forward

    backend("counting", as_it_is)
    plain, model = build(tmp_path), build(tmp_path, compile="counting")
    graphs.clear()  # the check's
    assert train(model) == train(plain)
    trained = len(graphs)
    assert trained > 0
    model.feed_data(next(batches(1, size=1)))
    model.test()
    assert len(graphs) == trained
    assert_equal(weights(model.net_g), weights(plain.net_g))
    assert_equal(weights(model.net_g_ema), weights(plain.net_g_ema))


def test_modes_of_compile_with_cuda_graphs(tmp_path, monkeypatch):
    options = {"num_gpu": 1, "dist": False, "train": {"compile": "max-autotune"}}
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        training._check(options)
        for changes, said in (
            ({"train": {"compile": "max-autotune", "accumulation": 2}}, "with train:accumulation;"),
            ({"find_unused_parameters": True}, "needs find_unused_parameters: false;"),
            ({"num_gpu": 0}, "needs a GPU;"),
        ):
            with pytest.raises(UserError, match=f"^train:compile: max-autotune .*{said} write `c"):
                training._check(options | changes)
    given, begun = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: given.append(how))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    for name in ("_check", "_check_compiler"):
        monkeypatch.setattr(training, name, lambda *_: None)
    for chosen in ("reduce-overhead", "eager", True):
        train(build(tmp_path, compile=chosen))
    assert given == [{"mode": "reduce-overhead"}, {"backend": "eager"}, {"backend": "inductor"}]
    assert len(begun) == 3  # iterations of the first


def test_any_optimizer_of_torch_takes_its_own_arguments(tmp_path):
    optim = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.5, "fused": True}
    model = build(tmp_path, optim_g=optim)
    (group,) = model.optimizer_g.param_groups
    assert type(model.optimizer_g) is torch.optim.AdamW
    assert (group["fused"], group["weight_decay"], group["lr"]) == (True, 0.5, 1e-3)
    train(model)


class Features(nn.Module):
    """Stands for VGG, whose weights would be downloaded: features of an image by name."""

    def __init__(self, layer_name_list, **_):
        super().__init__()
        self.names = layer_name_list

    def forward(self, x):
        return {name: x * (index + 2) for index, name in enumerate(self.names)}


@pytest.fixture
def features(monkeypatch):
    monkeypatch.setattr("basicsr.losses.basic_loss.VGGFeatureExtractor", Features)
    return {"type": "PerceptualLoss", "layer_weights": {"a": 1.0, "b": 0.5}, "style_weight": 1.0}


REFUSED = [
    ({"amp": "half"}, r"^train:amp: 'half' is not known"),
    ({"amp": True}, r"^train:amp: true is not known"),
    ({"channels_last": "yes"}, r"^train:channels_last: .*yes"),
    ({"compile": 3}, r"^train:compile: .*3"),
    ({"clip_grad_norm": 0}, r"^train:clip_grad_norm: must be a number .*; got 0"),
    ({"clip_grad_norm": True}, r"^train:clip_grad_norm: .*true"),
    ({"clip_grad_norm": math.nan}, r"^train:clip_grad_norm: .*nan"),
    ({"accumulation": 0}, r"^train:accumulation: must be a whole number"),
    ({"accumulation": 1.5}, r"^train:accumulation: must be a whole number"),
    ({"num_gpu": 2, "amp": "bf16"}, "a process for each GPU"),
    ({"num_gpu": 2, "compile": True}, "a process for each GPU"),
    ({"compile": "broken"}, r"train:compile.*'broken' \(.*No working C\+\+ compiler"),
    ({"compile": "reduce-overhead"}, "reduce-overhead replays CUDA graphs and needs a GPU; write"),
    ({"compile": "indutcor"}, r"'indutcor'.*backends: .*inductor"),
    ({"optim_g": {"type": "AdmaW"}}, "no optimizer 'AdmaW' for a loop; did you mean 'AdamW'"),
    ({"optim_g": {"type": "lr_scheduler"}}, "no optimizer 'lr_scheduler'"),
    ({"optim_g": {"type": "LBFGS"}}, "no optimizer 'LBFGS' for a loop"),
    ({"optim_g": {"type": "Rprop", "fused": True}}, "Rprop does not take these .*fused"),
    ({"optim_g": {"type": "Adam", "betas": [2, 0]}}, "Adam does not take these .*beta"),
    ({"perceptual_opt": {"criterion": "fro"}, "accumulation": 2}, "criterion: fro .*accumulation"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_trained_is_refused(tmp_path, features, backend, options, message):
    def without_compiler(graph, _):
        raise RuntimeError("No working C++ compiler found")

    backend("broken", without_compiler)
    top = {"num_gpu": options.get("num_gpu", 0)}
    options = {key: value for key, value in options.items() if key != "num_gpu"}
    for key, defaults in (("optim_g", {"lr": 1e-3}), ("perceptual_opt", features)):
        if key in options:
            options[key] = defaults | options[key]
    with pytest.raises(UserError, match=message):
        build(tmp_path, top=top, **options)


def test_amp_on_a_device_without_it_is_refused(tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise RuntimeError("Current CUDA Device does not support bfloat16")

    monkeypatch.setattr(torch, "autocast", unsupported)
    with pytest.raises(UserError, match=r"train:amp cannot .* not support bfloat16"):
        build(tmp_path, amp="bf16")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_in_parts_gives_the_whole_batchs_gradients(tmp_path, features, reduction):
    losses = {"type": "CharbonnierLoss", "reduction": reduction}
    options = {"optim_g": SGD | {"lr": 1e-9}, "pixel_opt": losses, "perceptual_opt": features}
    whole, parts = (build(tmp_path, **options, accumulation=count) for count in (1, 3))
    calls = []
    parts.net_g.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    (log,), (log_of_parts,) = train(whole, 1, size=4), train(parts, 1, size=4)
    assert calls == [2, 1, 1]
    for one, other in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * one.abs().max().item())
    assert log.keys() == {"l_pix", "l_percep", "l_style"}
    assert log_of_parts == pytest.approx(log, rel=1e-5)
    torch.testing.assert_close(parts.output, whole.output, rtol=1e-5, atol=1e-6)
    calls.clear()
    train(parts, 1, size=2)  # more parts than samples
    assert calls == [1, 1]


def test_parts_of_a_batch_share_gradients_once(tmp_path, group):
    model, lone = (build(tmp_path, accumulation=3, ema_decay=0.9) for _ in range(2))
    shared = []

    def hook(_, bucket):
        shared.append(bucket.is_last())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.net_g = DistributedDataParallel(model.net_g)
    model.net_g.register_comm_hook(None, hook)
    assert train(model, 2) == train(lone, 2)
    assert shared.count(True) == 2
    assert_equal(weights(model.net_g.module), weights(lone.net_g))
    assert_equal(weights(model.net_g_ema), weights(lone.net_g_ema))


BASE = (1e-3, 2e-4)  # of two groups of parameters
MULTI_STEP = {
    "milestones": [2, 4, 11, 14, 14, 18],
    "gamma": 0.5,
    "restarts": [0, 12],
    "restart_weights": [1, 0.7],
}
COSINE = {"periods": [8, 13], "restart_weights": [1, 0.5], "eta_min": 1e-7}


def multi_step(base, step):
    restart, weight = max(
        pair
        for pair in zip(MULTI_STEP["restarts"], MULTI_STEP["restart_weights"], strict=True)
        if pair[0] <= step
    )
    drops = sum(restart < milestone <= step for milestone in MULTI_STEP["milestones"])
    return base * weight * MULTI_STEP["gamma"] ** drops


def cosine(base, step):
    start, period, weight = (0, 8, 1) if step <= 8 else (8, 13, 0.5)
    half = 0.5 * (1 + math.cos(math.pi * (step - start) / period))
    return COSINE["eta_min"] + weight * half * (base - COSINE["eta_min"])


SCHEDULES = [
    (MultiStepRestartLR, MULTI_STEP, multi_step),
    (CosineAnnealingRestartLR, COSINE, cosine),
]


class Scheduled(FollowsSchedule, BaseModel):
    """A model with a schedule, and a state that it resumes from if one is given."""

    def __init__(self, scheduler, arguments, warmup=-1, state=None):
        self.opt = {"train": {"warmup_iter": warmup}}
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": base} for base in BASE]
        self.optimizers = [torch.optim.Adam(groups)]
        self.schedulers = [scheduler(self.optimizers[0], **arguments)]
        if state is not None:
            self.resume_training(state)

    def rates(self, iteration, update=FollowsSchedule.update_learning_rate):
        """The rates of an iteration, set by `update`."""
        self.optimizers[0].step()  # schedulers warn of a step before the first one
        update(self, iteration, self.opt["train"]["warmup_iter"])
        return [group["lr"] for group in self.optimizers[0].param_groups]

    def state(self, iteration):
        optimizers, schedulers = (
            [each.state_dict() for each in part] for part in (self.optimizers, self.schedulers)
        )
        return {"iter": iteration, "optimizers": optimizers, "schedulers": schedulers}


def expected_rates(formula, iteration, warmup):
    factor = min(1, iteration / warmup) if warmup > 0 else 1
    return pytest.approx([formula(base, iteration - 1) * factor for base in BASE], rel=1e-12)


@pytest.mark.parametrize("warmup", [-1, 0, 1, 5, 16])
@pytest.mark.parametrize(("scheduler", "arguments", "formula"), SCHEDULES)
def test_every_learning_rate_is_the_closed_form_also_through_resumes(
    scheduler, arguments, formula, warmup
):
    through = stopped = Scheduled(scheduler, arguments, warmup)
    for iteration in range(1, 22):
        said = {"progress": {}} if iteration % 2 else {}  # of this package's loop or BasicSR's
        state = stopped.state(iteration - 1) | said
        stopped = Scheduled(scheduler, arguments, warmup, state)
        for model in (through, stopped):
            assert model.rates(iteration) == expected_rates(formula, iteration, warmup), iteration


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize(("scheduler", "arguments", "formula"), SCHEDULES)
def test_a_run_of_basicsrs_own_loop_is_resumed_in_its_warm_up(scheduler, arguments, formula, stop):
    model = Scheduled(scheduler, arguments, 9)
    for iteration in range(1, stop + 1):
        model.rates(iteration, BaseModel.update_learning_rate)
    model = Scheduled(scheduler, arguments, 9, model.state(stop))
    for iteration in range(stop + 1, 22):
        assert model.rates(iteration) == expected_rates(formula, iteration, 9), iteration


@pytest.mark.parametrize(
    "wrap", [lambda n: n, DataParallel, lambda n: torch.compile(n, backend="eager")]
)
def test_the_average_of_a_wrapped_network_is_basicsrs(wrap):
    ours, theirs, network = NormedNet(), NormedNet(), NormedNet()
    theirs.load_state_dict(ours.state_dict())
    network.scratch = torch.ones(7)  # is in no checkpoint, and may have any size
    network.norm.running_mean += 3
    bare = SimpleNamespace(net_g=network, net_g_ema=theirs, get_bare_model=lambda n: n)
    wrapped = wrap(network)
    for decay in (0.9, 0, 0.999):
        average(ours, wrapped, decay)
        BaseModel.model_ema(bare, decay)
        assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()), atol=1e-6)
        nn.init.normal_(network.conv.weight)
    assert torch.equal(ours.norm.running_mean, network.norm.running_mean)
    assert ours.scratch.shape == (1,)


def test_a_shared_parameter_is_averaged_once_and_a_new_one_is_met():
    def tied():
        network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        network[1].weight = network[0].weight
        return network

    ema, network = tied(), tied()
    start = ema[0].weight.detach().clone()
    average(ema, network, 0.5)
    torch.testing.assert_close(ema[0].weight, (start + network[0].weight) / 2)
    network[0].weight = nn.Parameter(torch.full((2, 2), 7.0))
    average(ema, network, 0)
    assert torch.equal(ema[0].weight, torch.full((2, 2), 7.0))


def test_any_model_is_adapted_as_a_subclass_of_its_own(tmp_path, logged):
    model = build(tmp_path, {"type": "NormedNet"}, "SRModel", ema_decay=0.9)
    kind, before = type(model), dict(vars(model))
    adapt(model, Processes())
    assert isinstance(model, kind)
    assert type(model).__name__ == "SRModel"
    assert vars(model) == before  # nothing is replaced on the instance
    train(model)
    model.model_ema(decay=0)
    assert_equal(weights(model.net_g_ema), weights(model.net_g))
    model.update_learning_rate(4, 8)
    assert model.get_current_learning_rate() == [5e-4 * 4 / 8]

    class OwnAverage(kind):
        def model_ema(self, decay=0.999):
            self.averaged = decay

    model.__class__ = OwnAverage
    adapt(model, Processes())
    model.model_ema(0.5)
    assert model.averaged == 0.5
    assert logged[-1] == "OwnAverage has a method model_ema of its own: which stays"


class OnDevice(torch.Tensor):
    """A tensor that passes for one on a GPU, and counts how often the host waits for one."""

    waits = 0
    is_cpu = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("item", "tolist", "__float__", "__bool__", "cpu"):
            OnDevice.waits += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def on_device(value):
    return torch.tensor(value).as_subclass(OnDevice)


def watcher(folder, processes=None):
    watch = FiniteLosses(processes or Processes())
    watch.folder = folder
    return watch


def report(folder):
    """The one report that was written."""
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", [float, torch.tensor, on_device])
def test_a_bad_loss_stops_at_once_and_on_a_gpu_when_it_is_asked_for(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(loss_module, "_KEPT", 6)  # what is kept on a GPU is bounded
    monkeypatch.setattr(OnDevice, "waits", 0)
    watch = watcher(tmp_path)
    begun = []

    def iterate():
        for iteration in range(1, 7):
            assert OnDevice.waits == 0
            begun.append(iteration)
            bad = {3: math.inf, 4: math.nan}.get(iteration, 0.1)
            losses = {"l_pix": kind(0.5), "l_style": kind(bad)}
            watch.watch(iteration, [f"{iteration}a.png", f"{iteration}b.png"], losses)

    message = r"iteration 3 .*\(l_pix 0\.5, l_style inf\).*samples: 3a\.png, 3b\.png.*_3\.json"
    with pytest.raises(UserError, match=message):
        iterate()
    assert (len(begun), OnDevice.waits) == ((6, 1) if kind is on_device else (3, 0))
    losses = {"l_pix": 0.5, "l_style": "inf"}
    assert report(tmp_path) == {"iteration": 3, "losses": losses, "samples": ["3a.png", "3b.png"]}


def test_several_processes_stop_together_at_the_first_bad_batch(tmp_path):
    losses = {0: [0.1, 0.1, math.nan], 1: [0.1, math.inf, math.nan], 2: [0.1, math.inf, 0.1]}

    def run(processes):
        watch = watcher(tmp_path, processes)
        for iteration, value in enumerate(losses[processes.rank], 1):
            watch.watch(iteration, [f"{processes.rank}-{iteration}"], {"l": value})
        watch.check()

    (message,) = {str(error) for error in training_runs.in_ranks(3, run)}
    assert re.search(r"iteration 2 .*l inf", message)
    expected = {"iteration": 2, "losses": {"l": "inf"}, "samples": ["1-2", "2-2"]}
    assert report(tmp_path) == expected
