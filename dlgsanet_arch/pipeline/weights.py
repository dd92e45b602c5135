"""Whether the weights that a run starts from are complete, and of the networks it asks for.

Nothing is loaded into a network here: names and sizes of tensors are compared. BasicSR finds out
when it loads, after the old run was renamed, or never: with a misspelt `param_key_g` it takes other
weights, and with `strict_load_g: false` it continues when no tensor fits.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlgsanet_arch.checkpoint import CheckpointError, check_compatible, read_weights
from dlgsanet_arch.hints import named
from dlgsanet_arch.options import Context, Registered
from dlgsanet_arch.options.context import is_number

# Where files keep weights, by what each kind of run wants first.
_KEYS_TO_TRAIN = ("params", "params_ema", "state_dict")
_KEYS_TO_TEST = ("params_ema", "params", "state_dict")


@dataclass(frozen=True)
class Network:
    """What a network holds.

    Args:
        shapes: Sizes of the tensors of its state dict, by name.
        trained: Number of values of its parameters.
        fault: Why it cannot be built; then it holds nothing.
    """

    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    trained: int = 0
    fault: str = ""

    @property
    def values(self) -> int:
        """Number of values of its state dict."""
        return sum(shape.numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class WeightsCheck:
    """What was found out about the weights.

    Args:
        problems: What is wrong, one a line.
        notes: Which weights are used and how many of them, one a line.
        changes: Values of options by path: which key of a file BasicSR must take.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)


@functools.lru_cache(maxsize=8)
def _built(thing: Any, arguments: str) -> Network:
    values = json.loads(arguments)
    try:
        # Without memory where that works; some constructors compute with tensors.
        with torch.device("meta"):
            network = thing(**values)
    except Exception:  # a constructor may raise anything; what it does off "meta" decides
        try:
            with torch.random.fork_rng(devices=[]):
                network = thing(**values)
        except Exception as error:
            return Network(fault=f"{type(error).__name__}: {error}")
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return Network(shapes, sum(parameter.numel() for parameter in network.parameters()))


def build(context: Context, key: str) -> Network | None:
    """Find out what the network of an option file's section holds.

    Args:
        context: The options.
        key: The section, such as "network_g".

    Returns:
        What it holds; None where its type or its arguments are wrong, which the check of the
        options reports.
    """
    arguments = {name: value for name, value in context.section(key).items() if name != "type"}
    thing = context.registered_as("arch", context.section(key).get("type"))
    try:
        inspect.signature(thing).bind(**arguments)
        text = json.dumps(arguments)
    except (TypeError, ValueError):
        return None
    return _built(thing, text)


def registered_networks() -> Registered:
    """Return the networks in BasicSR's registry."""
    importlib.import_module("basicsr.archs")
    registry = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY
    return {"arch": dict(iter(registry))}


def _differences(network: Network, weights: Mapping[str, Tensor]) -> str:
    """Name the first tensors that differ."""
    found = {name: tensor.shape for name, tensor in weights.items()}
    parts = []
    for what, names in (
        ("absent from the file", [name for name in network.shapes if name not in found]),
        ("unknown to the network", [name for name in found if name not in network.shapes]),
        (
            "of another size",
            [name for name, shape in network.shapes.items() if found.get(name, shape) != shape],
        ),
    ):
        if names:
            parts.append(f"{what}: {named(names, 3)}")
    return "; ".join(parts)


def _keys_of(file: Path) -> list[str]:
    """Return the top-level keys of a checkpoint, its tensors left on the disk where that works.

    Raises:
        CheckpointError: It cannot be read, or holds no mapping.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged, or of before PyTorch 1.6: then it cannot be mapped
        read_weights(file)  # says what is wrong with a damaged one
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        read_weights(file)  # says so
    return [str(key) for key in content]


class _Check:
    def __init__(self, context: Context) -> None:
        self.found = WeightsCheck()
        self._subject = context
        self._paths = context.section("path")

    def resumed(self, key: str, file: Path) -> None:
        """Check the weights that belong to the state that a run resumes from."""
        try:
            self._compare(key, read_weights(file, "params"), file, strict=True)
        except CheckpointError as error:
            self.found.problems.append(f"{key}: {error}")

    def started(self, key: str) -> None:
        """Check the weights that the options name for a network, if they name any."""
        named = self._paths.get(f"pretrain_{key}")
        if not isinstance(named, str) or not self._subject.resolve(named).is_file():
            return  # whether it is there is a question to the options
        file = self._subject.resolve(named)
        label = key.removeprefix("network_")
        strict = self._paths.get(f"strict_load_{label}", True)
        try:
            used = self._key_of(file, label)
            self._compare(key, read_weights(file, used), file, strict=bool(strict))
        except CheckpointError as error:
            self.found.problems.append(f"path:pretrain_{key}: {error}")
            return
        if f"param_key_{label}" not in self._paths:
            self.found.changes[f"path:param_key_{label}"] = used
        does = f"{key} starts from" if self._subject.train else "testing"
        self.found.notes.append(f"{does} {used or 'the weights'} of {file}")

    def _key_of(self, file: Path, label: str) -> str | None:
        """Return the key of a file that holds the weights to use, None for the file itself.

        Raises:
            CheckpointError: It is not a complete checkpoint, or what is asked for is not in it.
        """
        keys = _keys_of(file)
        average = self._subject.section("train").get("ema_decay", 0)
        averaged = self._subject.train and label == "g" and is_number(average) and average > 0
        if averaged and not {"params", "params_ema"} & set(keys):
            raise CheckpointError(
                f"{file} has neither the key params nor params_ema, one of which BasicSR needs to "
                "start the averaged weights of train:ema_decay; save the state dict under params"
            )
        wanted = _KEYS_TO_TRAIN if self._subject.train else _KEYS_TO_TEST
        there = next((key for key in wanted if key in keys), None)
        chosen = f"param_key_{label}"
        if chosen not in self._paths:
            return there
        asked = self._paths[chosen]
        if asked is None and there is not None:
            raise CheckpointError(
                f"{file} is not a bare state dict, as path:{chosen} ~ says; write {chosen}: {there}"
            )
        if asked is not None and asked not in keys:
            read_weights(file, str(asked))  # lists the keys that are there
        return asked

    def _compare(
        self, key: str, weights: Mapping[str, Tensor], file: Path, *, strict: bool
    ) -> None:
        """Compare weights with a network by the names and sizes of tensors.

        Raises:
            CheckpointError: They do not fit.
        """
        network = build(self._subject, key)
        if network is None or network.fault:
            return
        section = self._subject.section(key)
        if strict and section["type"] == "DLGSANet":
            try:
                check_compatible(weights, section)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from error
            return
        fitting = sum(
            name in weights and weights[name].shape == shape
            for name, shape in network.shapes.items()
        )
        if strict and (differing := _differences(network, weights)):
            raise CheckpointError(
                f"{file}: the weights are of another network than this {section['type']}; "
                f"{differing}"
            )
        strict_load = f"path:strict_load_{key.removeprefix('network_')}"
        if not fitting and network.shapes:
            raise CheckpointError(
                f"{file}: none of its {len(weights)} tensors fits {key}; with {strict_load} false "
                "BasicSR would continue with random weights"
            )
        if not strict:
            self.found.notes.append(
                f"{key}: loads {fitting} of {len(network.shapes)} tensors of {file}, as "
                f"{strict_load} is false"
            )


def check(
    options: Mapping[str, Any],
    root: Path,
    *,
    train: bool,
    registered: Registered,
    resumed: Mapping[str, Path],
) -> WeightsCheck:
    """Check the weights that a run starts from, and that its networks can be built.

    Where the options do not say which key of a file holds the weights, BasicSR always takes
    `params`; a test then takes the averaged weights `params_ema` where there are any, as the
    training's own validation does.

    Args:
        options: As `dlgsanet_arch.options.load` returns them; what is wrong with them by itself
            is passed over.
        root: Folder that relative paths are below.
        train: Whether the weights are to be trained further, else tested.
        registered: What is in BasicSR's registries.
        resumed: The files of the networks that come with a saved state, by "network_g".
    """
    context = Context(options, train, root, registered)
    checking = _Check(context)
    for key in context.networks():
        network = build(context, key)
        if network is not None and network.fault and context.section(key)["type"] != "DLGSANet":
            kind = context.section(key)["type"]
            checking.found.problems.append(f"{key}: {kind} cannot be built: {network.fault}")
        if key in resumed:
            checking.resumed(key, resumed[key])
        elif train or key == "network_g":
            checking.started(key)
    return checking.found
