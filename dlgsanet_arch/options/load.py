"""Option files and overriding entries, read: YAML in which 5e-4 is a number."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dlgsanet_arch.hints import shown, suggest
from dlgsanet_arch.options.context import OptionsError

# What PyYAML raises on text that is not YAML, and on tags that do not fit their values.
_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
_MOST_BYTES = 1 << 17  # shipped files have 4 thousand; PyYAML takes 10 s for a million
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML with the floats that YAML 1.1 takes for text, and without keys written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dict, as the parent does; YAML lets the last of equal keys win in silence."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    fault = f"the key {shown(key.value)} is written twice"
                    raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants both a dot and a signed exponent: 5.0e-4. These are 5e-4, 1E3, 1.e3 and -.5.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$|[-+]\.[0-9]+$"),
    list("-+.0123456789"),
)


def _has_too_many_values(options: Any) -> bool:
    """Detect anchors that hold themselves, or that multiply one another."""
    left, count = [options], 0
    while left and count <= _MOST_VALUES:
        each = left.pop()
        left.extend(each.values() if isinstance(each, dict) else each if type(each) is list else ())
        count += 1
    return count > _MOST_VALUES


def load(path: Path) -> dict[str, Any]:
    """Read an option file: YAML whose top level is a mapping.

    ``5e-4`` is a number in it, as is ``!!float 5e-4``, which BasicSR's own reader needs.

    Raises:
        OptionsError: The file does not exist (a near name is suggested) or cannot be read, it is
            not YAML or has a key twice (with line and column), or is not a mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
        options = yaml.load(text, Loader=_Loader) if len(text) <= _MOST_BYTES else None
    except FileNotFoundError:
        near = suggest(path.name, [entry.name for entry in path.parent.glob("*.y*ml")])
        raise OptionsError(f"option file {path} does not exist{near}") from None
    except OSError as error:
        raise OptionsError(f"the option file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionsError(f"{path} is not an option file: it is not UTF-8 text") from error
    except (*_FAULTS, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = getattr(error, "problem", None) or error
        fault = f"{place}: this is not YAML: {said}; fix this line or the one above"
        raise OptionsError(fault) from error
    if len(text) > _MOST_BYTES:
        fault = f"has more than {_MOST_BYTES:,} characters; an option file has a few thousand"
    elif _has_too_many_values(options):
        fault = f"has more than {_MOST_VALUES:,} values, by anchors within anchors; write fewer"
    elif not isinstance(options, dict):
        found = "nothing" if options is None else f"a {type(options).__name__}"
        fault = f"holds {found}; an option file has lines such as `name: tiny_x4`, see options/"
    else:
        return options
    raise OptionsError(f"{path} {fault}")


def parse_value(text: str) -> Any:
    """Read one value as an option file would: ``1e-4``, ``[1, 2]``, ``~``, ``true``, ``'a'``.

    ``None`` is ``~``, as BasicSR reads it there. What is not YAML, such as ``{}x4``, is text, and
    so are anchors that multiply one another.
    """
    if text.strip().lower() == "none":
        return None
    try:
        value = yaml.load(text, Loader=_Loader)
    except (*_FAULTS, RecursionError):
        return text
    return text if _has_too_many_values(value) else value


def override(options: dict[str, Any], entries: Sequence[str]) -> None:
    """Set keys of `options` in place; `problems` reports those that nothing reads.

    An entry "a:b=value" has the path of a key, then its value as `parse_value` reads it; sections
    above it are made where they are absent or empty. Where an entry is not an assignment, or is
    below a value, an OptionsError leaves the options unchanged.
    """
    changed = copy.deepcopy(options)
    for entry in entries:
        path, assigned, text = (part.strip() for part in entry.partition("="))
        if not (path and assigned):
            raise OptionsError(f"{entry!r}: write KEY=VALUE, for example train:total_iter=1000")
        *sections, key = path.split(":")
        node: Any = changed
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                fault = f"{section} is not a section of keys; it is {shown(node)}"
                raise OptionsError(f"{entry!r}: {fault}")
        node[key] = parse_value(text)
    options.update(changed)
