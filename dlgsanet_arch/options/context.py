"""Options to be checked, and ways through them."""

import functools
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlgsanet_arch.checkpoint import bundled_weights
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet

# For each of BasicSR's registries, what is registered, by name.
Registered = Mapping[str, Mapping[str, Any]]


class OptionsError(UserError):
    """An option file, or an entry given beside it, that cannot be used; the message says why."""


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Context:
    """Options with what is needed to judge them, and ways through them."""

    options: Mapping[str, Any]  # as `load` returns them; any YAML mapping
    train: bool  # whether they are to train, else to test
    root: Path  # the folder that relative paths start from
    registered: Registered | None  # None where it is not known

    def value(self, path: str) -> Any:
        """Return the value at "a:b" ("" is the complete file), None where it is absent."""
        node: Any = self.options
        for key in path.split(":") if path else ():
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def section(self, path: str) -> Mapping[str, Any]:
        """Return the section at "a:b", empty where it is absent."""
        node = self.value(path)
        return node if isinstance(node, Mapping) else {}

    def datasets(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the phase ("train", "val", "test_1", …) and the options of each data set."""
        for phase in self.section("datasets"):
            yield str(phase), self.section(f"datasets:{phase}")

    def networks(self) -> Iterator[str]:
        """Yield the key of each network, such as "network_g"."""
        for key in self.options:
            if str(key).startswith("network_") and self.section(str(key)):
                yield str(key)

    def resolve(self, path: object) -> Path:
        """Return `path` of an option file as BasicSR will find it."""
        return self.root / os.path.expanduser(str(path))

    def weights(self, given: object) -> Path:
        """Return the file of weights that a path or the name of bundled weights means."""
        path = self.resolve(given)
        return path if os.path.exists(path) else bundled_weights().get(str(given), path)

    def registered_as(self, registry: str, name: object) -> Any:
        """Return what "arch", "model", … has under `name`, None where that is not known."""
        if registry == "optimizer":
            return getattr(torch.optim, str(name)) if name in optimizers() else None
        own = {"DLGSANet": DLGSANet} if registry == "arch" else {}
        entries = own | dict((self.registered or {}).get(registry, {}))
        return entries.get(str(name), entries.get(f"{name}_basicsr"))  # as BasicSR's registries do

    def names_in(self, registry: str) -> list[str] | None:
        """Return every name that finds something in a registry, None where that is not known."""
        entries = (self.registered or {}).get(registry)
        bare = [each.removesuffix("_basicsr") for each in entries or ()]
        return None if entries is None else [*entries, *bare]


@functools.cache
def optimizers() -> tuple[str, ...]:
    """Return the names of PyTorch's optimizers that step without a closure."""
    base = torch.optim.Optimizer
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    found = {name for name, each in classes if issubclass(each, base)}
    return tuple(sorted(found - {"Optimizer", "LBFGS"}))


def join(section: str, key: object) -> str:
    """Return the path of a key in a section."""
    return f"{section}:{key}" if section else str(key)


def comes_from(thing: Any, *packages: str) -> bool:
    """Whether a class or function is defined in one of some packages."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] in packages
