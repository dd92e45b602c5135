"""Options to be checked, and how a report names what is near."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet

# For each of BasicSR's registries, what is registered, by name.
Registered = Mapping[str, Mapping[str, Any]]

# How near a name must be to be taken for a misspelling where any name may stand.
MISSPELT = 0.8

_BASICSR_SUFFIX = "_basicsr"  # BasicSR's registries look for a name with it, too


class OptionsError(UserError):
    """An option file, or an entry given beside it, that cannot be used; the message says why."""


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Context:
    """Options with what is needed to judge them, and ways through them.

    Args:
        options: As `load` returns them; any YAML mapping.
        train: Whether they are to train, else to test.
        root: The folder that relative paths start from.
        registered: What is registered, or None where that is not known.
    """

    options: Mapping[str, Any]
    train: bool
    root: Path
    registered: Registered | None

    def section(self, path: str) -> Mapping[str, Any]:
        """Return the section at "a:b" ("" is the whole), empty where there is none."""
        node: Any = self.options
        for key in path.split(":") if path else ():
            node = node.get(key) if isinstance(node, Mapping) else None
        return node if isinstance(node, Mapping) else {}

    def sections(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield path and content of every section, the whole with the path "" first."""
        yield from _sections(self.options)

    def datasets(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the phase ("train", "val", "test_1", …) and the options of each data set."""
        for phase in self.section("datasets"):
            yield str(phase), self.section(f"datasets:{phase}")

    def networks(self) -> Iterator[str]:
        """Yield the key of each network, such as "network_g"."""
        for key in self.options:
            if str(key).startswith("network_") and self.section(str(key)):
                yield str(key)

    def values(self) -> Iterator[tuple[str, Any]]:
        """Yield path and value of all that is not a section, a list's elements one by one."""
        for path, section in self.sections():
            for key, value in section.items():
                if not isinstance(value, Mapping):
                    for element in value if isinstance(value, list) else [value]:
                        yield f"{path}:{key}".lstrip(":"), element

    def resolve(self, path: object) -> Path:
        """Return `path` of an option file as BasicSR will find it."""
        return self.root / Path(str(path)).expanduser()

    def registered_as(self, registry: str, name: object) -> Any:
        """Return what "arch", "model", … has under `name`, None where that is not known."""
        entries = (self.registered or {}).get(registry, {})
        for candidate in (name, f"{name}{_BASICSR_SUFFIX}"):
            if isinstance(candidate, str) and entries.get(candidate) is not None:
                return entries[candidate]
        return DLGSANet if (registry, name) == ("arch", "DLGSANet") else None

    def names_in(self, registry: str) -> list[str] | None:
        """Return every name that finds something in a registry, None where that is not known."""
        entries = (self.registered or {}).get(registry)
        if entries is None:
            return None
        return list(dict.fromkeys([*entries, *(n.removesuffix(_BASICSR_SUFFIX) for n in entries)]))


def _sections(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, node
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _sections(value, f"{path}:{key}".lstrip(":"))


def comes_from(thing: Any, *packages: str) -> bool:
    """Whether a class or function is defined in one of some packages."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] in packages


def source_names(thing: Any, name: str) -> bool:
    """Whether the source of a class, its bases, or a function holds `name` in quotes.

    So a key that someone else's data set or model reads is known without their telling.
    """
    owners = inspect.getmro(thing) if inspect.isclass(thing) else (thing,)
    for owner in owners:
        if comes_from(owner, "builtins", "torch"):
            continue
        try:
            source = inspect.getsource(inspect.getmodule(owner))
        except (OSError, TypeError):  # defined where there is no file
            continue
        if f"'{name}'" in source or f'"{name}"' in source:
            return True
    return False
