"""Models of BasicSR and third parties, made to keep what a run relies on.

`adapt` gives a built model a subclass of its own class: that is where saving, averages, learning
rate and validation come from, whichever class it is.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from basicsr.models import build_model
from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from dlgsanet_arch.averaging import AveragesWeights, FollowsSchedule, bare
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.memory import free_memory
from dlgsanet_arch.pipeline import evaluation
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import preserved_generators
from dlgsanet_arch.storage import save_complete

_MOST_TENSORS = 20_000  # of a network: more is a slip of the pen, and takes minutes to build
# What BasicSR's models load while they are built, which `weights.load` does instead.
_LOADED_LATER = ("pretrain_network_g", "pretrain_network_d")


@contextmanager
def _bounded_size(context: str, copies: int = 1) -> Iterator[None]:
    """Stop the building of a network of which this machine cannot hold some copies."""
    memory = free_memory(torch.device("cpu"))
    tensors = size = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, size
        tensors += 1
        size += 0 if parameter is None else copies * parameter.nbytes
        if tensors > _MOST_TENSORS or size > memory:
            raise UserError(
                f"{context}: a network of {tensors:,} tensors or more, which take "
                f"{size / 1e9:.3g} GB or more; this machine has {memory / 1e9:.3g} GB of memory "
                "free; write a smaller one"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


class _WithoutMemory(TorchFunctionMode):
    """Make tensors of a given shape without memory; small tables keep the values asked of them."""

    _made = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), named: Any = None
    ) -> Any:
        device = {"device": "meta"} if function in self._made else {}
        return function(*arguments, **(named or {}) | device)


def _check_size(key: str, section: Mapping[str, Any], copies: int) -> None:
    """Build a network without memory; one that needs its values is bounded as it is built."""
    arguments = {name: value for name, value in section.items() if name != "type"}
    try:
        with _bounded_size(key, copies), preserved_generators(), _WithoutMemory():
            ARCH_REGISTRY.get(section["type"])(**copy.deepcopy(arguments))
    except UserError:
        raise
    except Exception:  # of the network's own: it is raised again where it is built
        return


def build(opt: dict[str, Any], processes: Processes) -> Any:
    """Build the model that complete options name, its networks with weights as initialised."""
    paths = opt["path"]
    later = {key: paths[key] for key in _LOADED_LATER if key in paths}
    paths |= dict.fromkeys(later)
    copies = 4 if opt["is_train"] else 1  # gradients, and Adam's two moments
    for key in opt:
        if key.startswith("network_") and opt[key]:
            _check_size(key, opt[key], copies)
    try:
        with _bounded_size("network_g"):
            model = build_model(opt)
    finally:
        paths |= later
    model.opt["path"] |= later  # build_model gave it a copy
    adapt(model, processes)
    return model


class _Adapted:
    """Saving and validation; a `foreign` class keeps a validation of its own."""

    run_processes: Processes
    foreign: bool
    gathered: dict[str, Any] | None = None

    def gathered_networks(self) -> dict[str, Any]:
        """Return by label ("net_g") what files of networks hold; empty but on the main process."""
        self.gathered = {}
        try:
            self.save(0, 0)
            return self.gathered
        finally:
            del self.gathered

    def save_network(
        self,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int | str,
        param_key: str | list[str] = "params",
    ) -> None:
        """Gather a network, or write it when a third party saves by itself."""
        if not self.run_processes.is_main:
            return
        networks = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        content = {
            key: {
                name.removeprefix("module."): tensor.detach().cpu()
                for name, tensor in bare(network).state_dict().items()
            }
            for network, key in zip(networks, keys, strict=True)
        }
        if self.gathered is not None:
            self.gathered[net_label] = content
            return
        file = f"{net_label}_{'latest' if current_iter == -1 else current_iter}.pth"
        save_complete(content, Path(self.opt["path"]["models"]) / file)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Do nothing: states hold more than a model knows, and `checkpoints` writes them."""

    def validation(
        self,
        dataloader: evaluation.Images,
        current_iter: int | str,
        tb_logger: Any,
        save_img: bool = False,
    ) -> evaluation.Evaluation:
        """Validate on all processes, or as the class does on the main one; every process calls."""
        arguments = dataloader, current_iter, tb_logger, save_img
        if self.foreign:
            own = super().validation
            return evaluation.validate_by(own, self, self.run_processes, *arguments)
        return evaluation.validate(self, self.run_processes, *arguments)


def adapt(model: Any, processes: Processes) -> None:
    """Give a model that `build_model` returned the methods that a run relies on.

    A class's own method for averages, learning rate or validation stays, and the log says so.
    """
    own = type(model)
    classes: list[type] = [_Adapted]
    warn = get_root_logger().warning
    for ours, name in ((AveragesWeights, "model_ema"), (FollowsSchedule, "update_learning_rate")):
        if getattr(own, name, None) is getattr(BaseModel, name):
            classes.append(ours)
        elif not issubclass(own, ours):
            warn(f"{own.__name__} has a method {name} of its own: which stays")
    if foreign := evaluation.foreign_method(own):
        warn(
            f"{own.__name__} has a method {foreign} of its own: it validates and tests as that "
            "says, on the main process"
        )
    contents = {"run_processes": processes, "foreign": bool(foreign), "__module__": own.__module__}
    model.__class__ = type(own.__name__, (*classes, own), contents)
