"""Option files and overriding entries, read: YAML in which 5e-4 is a number."""

import copy
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from dlgsanet_arch.hints import suggest
from dlgsanet_arch.options.context import OptionsError

_LARGEST = 1 << 18  # bytes of an option file; those of BasicSR have 4,000
_DEEPEST = 50  # sections within sections
_MOST = 20_000  # values, each anchor counted where it is used


class _Loader(yaml.SafeLoader):
    """YAML with the floats that YAML 1.1 takes for text, and without keys written twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value, as the parent does, with one kind of error for what cannot be made."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            tag = node.tag.rpartition(":")[2]
            raise _error(f"{str(node.value)[:40]!r} is not of the type {tag}", node) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dict, as the parent does; YAML lets the last of equal keys win in silence."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _error(f"the key {key.value!r} is written twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _error(what: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


# YAML 1.1 wants both a dot and a signed exponent: 5.0e-4. These are 5e-4, 1E3, 1.e3 and -.5.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$|[-+]\.[0-9]+$"),
    list("-+.0123456789"),
)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        near = suggest(path.name, [entry.name for entry in path.parent.glob("*.y*ml")])
        raise OptionsError(f"option file {path} does not exist{near}") from None
    except OSError as error:
        raise OptionsError(f"the option file {path} cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST:
        raise OptionsError(f"{path} is not an option file: it is larger than {_LARGEST:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        fault = f"{path} is not an option file: it is not UTF-8 text ({error})"
        raise OptionsError(fault) from error


def _expanded(value: Any, path: Path, depth: int = 0) -> Iterator[Any]:
    """Yield every value of a file, and those of an anchor wherever it is used."""
    if depth > _DEEPEST:
        raise OptionsError(f"{path}: it is nested too deeply, or an anchor refers to itself")
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from _expanded(each, path, depth + 1)


def load(path: Path) -> dict[str, Any]:
    """Read an option file: YAML whose top level is a mapping.

    ``5e-4`` is a number in it, as is ``!!float 5e-4``, which BasicSR's own reader needs.

    Raises:
        OptionsError: The file does not exist (a near name is suggested), cannot be read or is too
            large, it is not YAML or has a key twice (with line and column), or is not a mapping.
    """
    text = _read(path)
    try:
        options = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        parts = (getattr(error, part, None) for part in ("context", "problem"))
        said = ", ".join(filter(None, parts)) or str(error)
        fault = f"{place}: this is not YAML: {said}; fix this line or the one above"
        raise OptionsError(fault) from error
    if not isinstance(options, dict):
        found = "nothing" if options is None else f"a {type(options).__name__}"
        raise OptionsError(
            f"{path} holds {found}; an option file has lines such as `name: tiny_x4`; "
            "options/ has complete ones"
        )
    if next(islice(_expanded(options, path), _MOST, None), None) is not None:
        raise OptionsError(f"{path}: its anchors expand to more than {_MOST:,} values")
    return options


def parse_value(text: str) -> Any:
    """Read one value as an option file would: ``1e-4``, ``[1, 2]``, ``~``, ``true``, ``'a'``.

    ``None`` is ``~``, as BasicSR reads it there. What is not YAML, such as ``{}x4``, is text.
    """
    if text.strip().lower() == "none":
        return None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def override(options: dict[str, Any], entries: Sequence[str]) -> None:
    """Set keys of `options` in place; `problems` reports those that nothing reads.

    Args:
        options: As `load` returns them. Unchanged if an entry is wrong.
        entries: Texts "a:b=value": the path of a key, then its new value as `parse_value` reads it.
            Sections above it are made where they are absent or empty.

    Raises:
        OptionsError: Lists every entry that is not an assignment, or is below a value.
    """
    trial = copy.deepcopy(options)
    faults = []
    for entry in entries:
        path, assigned, text = (part.strip() for part in entry.partition("="))
        *sections, key = path.split(":")
        node: Any = trial
        for depth, section in enumerate(sections, 1):
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                above = ":".join(sections[:depth])
                faults.append(f"{entry!r}: {above} is not a section of keys; it is {node!r}")
                break
        else:
            node[key] = parse_value(text)
        if not (path and assigned):
            faults.append(f"{entry!r}: write KEY=VALUE, for example train:total_iter=1000")
    if faults:
        raise OptionsError("\n  ".join(["these options cannot be overridden:", *faults]))
    options.update(trial)
