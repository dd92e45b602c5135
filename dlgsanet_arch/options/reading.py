"""Option files and overriding entries, read: YAML in which 5e-4 is a number."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dlgsanet_arch.hints import suggest
from dlgsanet_arch.options.context import Context, OptionsError
from dlgsanet_arch.options.schema import FREE, known_in, read_by


class _Loader(yaml.SafeLoader):
    """YAML with the floats that YAML 1.1 takes for text, and without keys written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dict, as the parent does; YAML lets the last of equal keys win in silence."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is written twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants both a dot and a signed exponent: 5.0e-4. These are 5e-4, 1E3, 1.e3 and -.5.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$|[-+]\.[0-9]+$"),
    list("-+.0123456789"),
)


def load(path: Path) -> dict[str, Any]:
    """Read an option file.

    Args:
        path: A YAML file whose top level is a mapping. ``5e-4`` is a number in it, as is
            ``!!float 5e-4``, which BasicSR's own reader needs.

    Returns:
        The options as plain dicts, lists and scalars, nothing added.

    Raises:
        OptionsError: If there is no such file (a near name is suggested), it cannot be read, or it
            is not YAML (the message has file, line and column), no mapping, or has a key twice.
    """
    try:
        options = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        others = [entry.name for entry in path.parent.glob("*.y*ml")]
        raise OptionsError(
            f"option file {path} does not exist{suggest(path.name, others)}"
        ) from None
    except OSError as error:
        raise OptionsError(f"the option file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionsError(
            f"{path} is not an option file: it is not UTF-8 text ({error})"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise OptionsError(
            f"{place}: this is not YAML: {said}; fix this line or the one above"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: `!!float` before no number
        raise OptionsError(f"{path}: this is not YAML: {error}") from error
    if not isinstance(options, dict):
        found = "nothing" if options is None else f"a {type(options).__name__}"
        raise OptionsError(
            f"{path} holds {found}; an option file has lines such as `name: tiny_x4`; "
            "options/ has complete ones"
        )
    return options


def parse_value(text: str) -> Any:
    """Read one value as an option file would: ``1e-4``, ``[1, 2]``, ``~``, ``true``, ``'a'``.

    ``None`` is ``~``, as BasicSR reads it there. What is not YAML, such as ``{}x4``, is text.

    Args:
        text: The value.
    """
    if text.strip().lower() == "none":
        return None
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text


def _fault_of_new(context: Context, section: str, key: str) -> str:
    """Say why a key cannot be added to a section, or nothing."""
    above = section or "the option file"
    if section in FREE:
        return f"{above} has no key {key!r}{suggest(key, context.section(section))}"
    known = known_in(context, section)
    if section in ("", "train") and read_by(key):
        return ""  # another model may be meant: `problems` looks at the whole
    meant = None if known is None else known.misspelt(key)
    if meant is None:
        return ""
    hint = f"; did you mean {meant!r}?" if meant else ", and nothing reads one of that name"
    return f"{above} has no key {key!r}{hint}"


def _set(options: dict[str, Any], path: str, value: Any) -> str:
    """Set the key at a path, sections above it made where they are absent or empty.

    Returns:
        Why it cannot be set, or nothing.
    """
    context = Context(options, True, Path(), None)
    keys = path.split(":")
    node: Any = options
    for depth, key in enumerate(keys, 1):
        above = ":".join(keys[: depth - 1])
        if not isinstance(node, dict):
            return f"{above} is not a section of keys; it is {node!r}"
        if key not in node and (fault := _fault_of_new(context, above, key)):
            return fault
        if depth == len(keys):
            node[key] = value
        elif node.get(key) is None:
            node[key] = {}
        node = node[key]
    return ""


def override(options: dict[str, Any], entries: Sequence[str]) -> None:
    """Set keys of `options` in place, and add keys that are known and absent.

    Args:
        options: As `load` returns them. Unchanged if an entry is wrong.
        entries: Texts "a:b=value": the path of a key, then its new value as `parse_value` reads it.

    Raises:
        OptionsError: Lists every entry that is not an assignment or whose key is not known.
    """
    trial = copy.deepcopy(options)
    problems = []
    for entry in entries:
        path, assigned, text = (part.strip() for part in entry.partition("="))
        if not (path and assigned):
            problems.append(f"{entry!r}: write KEY=VALUE, for example train:total_iter=1000")
        elif fault := _set(trial, path, parse_value(text)):
            problems.append(f"{entry!r}: {fault}")
    if problems:
        raise OptionsError("\n  ".join(["these options cannot be overridden:", *problems]))
    options.update(trial)
