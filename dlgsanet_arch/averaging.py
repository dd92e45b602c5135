"""The average of weights and the learning rate, for any model of BasicSR's.

`AveragesWeights` and `FollowsSchedule` are classes to derive a model from: DLGSANetModel does, and
`pipeline.adapter` adds them to the others.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler


def bare(network: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(network, (DataParallel, DistributedDataParallel)):
            network = network.module
        elif hasattr(network, "_orig_mod"):
            network = network._orig_mod
        else:
            return network


def networks_of(model: Any) -> Mapping[str, nn.Module]:
    """Return a model's networks by the names of their attributes ("net_g", "net_g_ema", …)."""
    return {
        name: value
        for name, value in vars(model).items()
        if name.startswith("net_") and isinstance(value, nn.Module)
    }


@torch.no_grad()
def average(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """Take one step of the exponential moving average of a network's weights, in place.

    Parameters p of `ema` become decay · p + (1 - decay) · q, with q the network's, which may be in
    DataParallel, DistributedDataParallel or torch.compile. Buffers that a checkpoint holds are
    copied, as the running statistics of a BatchNorm are averages already.
    """
    ema, network = bare(ema), bare(network)
    trained = dict(network.named_parameters())
    averaged = dict(ema.named_parameters())
    torch._foreach_lerp_(list(averaged.values()), [trained[name] for name in averaged], 1 - decay)
    # Not by state_dict(), which takes three times as long, at every iteration.
    modules = dict(network.named_modules())
    for name, module in ema.named_modules():
        for key in module._buffers.keys() - module._non_persistent_buffers_set:
            if module._buffers[key] is not None:
                module._buffers[key].copy_(modules[name]._buffers[key])


class AveragesWeights:
    """`model_ema` of a model with `net_g` and `net_g_ema`: buffers are averaged as well."""

    def model_ema(self, decay: float = 0.999) -> None:
        """Take one step of the weights' average."""
        average(self.net_g_ema, self.net_g, decay)


def _set_rates(scheduler: LRScheduler, rates: Sequence[float]) -> None:
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def replay(scheduler: LRScheduler, steps: int) -> None:
    """Put a schedule, and its optimizer's rates, where `steps` steps from the start lead."""
    _set_rates(scheduler, [group["initial_lr"] for group in scheduler.optimizer.param_groups])
    scheduler.last_epoch = -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer did not step in between
        for _ in range(steps + 1):
            scheduler.step()


class FollowsSchedule:
    """`update_learning_rate` of a model with `schedulers`, whose warm-up reaches the full rate.

    BasicSR's leaves MultiStepLR at (warmup_iter - 1) / warmup_iter of the rate for good.
    """

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Set the learning rate of iteration `it`, from 1: schedule(it) · min(1, it / warmup_iter).

        The state of optimizer and scheduler resumes it at any iteration. Iterations may be left
        out, but not come again: the schedule takes every step on the way, and none back.
        """
        factor = min(1.0, current_iter / warmup_iter) if warmup_iter > 0 else 1.0
        for scheduler in self.schedulers:
            # A schedule may work on the rate of the step before: it must see it as scheduled.
            _set_rates(scheduler, scheduler.get_last_lr())
            while scheduler.last_epoch < current_iter - 1:
                scheduler.step()
            _set_rates(scheduler, [rate * factor for rate in scheduler.get_last_lr()])

    def resume_training(self, resume_state: Mapping[str, Any]) -> None:
        """Restore optimizers and schedules, also from within the warm-up of BasicSR's own loop.

        Such a state holds other rates, as that warm-up feeds back into the schedule.
        """
        super().resume_training(resume_state)
        warmup_iter = self.opt["train"].get("warmup_iter") or -1
        if "progress" not in resume_state and resume_state["iter"] < warmup_iter:
            for scheduler in self.schedulers:
                replay(scheduler, scheduler.last_epoch)
