"""Option files and overriding entries, read: YAML in which 5e-4 is a number."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dlgsanet_arch.hints import suggest
from dlgsanet_arch.options.context import Context, OptionsError
from dlgsanet_arch.options.readers import known_in
from dlgsanet_arch.options.schema import FREE
from dlgsanet_arch.options.walk import read_by

_LARGEST = 1 << 18  # bytes of an option file; those of BasicSR have 4,000
_DEEPEST = 50  # sections within sections
_LONGEST = 1024  # bits of a number
_MOST = 20_000  # keys and values, each anchor counted where it is used


class _Loader(yaml.SafeLoader):
    """YAML with the floats that YAML 1.1 takes for text, and without keys written twice."""

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document, and refuse one that would take time or memory without end."""
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > _MOST:
            raise _error(f"anchors expand to more than {_MOST:,} values", node)
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, as the parent does, to a bounded depth."""
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value, as the parent does, with one kind of error for what cannot be made."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            tag = node.tag.rpartition(":")[2]
            raise _error(f"{str(node.value)[:40]!r} is not of the type {tag}", node) from error
        if isinstance(value, int) and value.bit_length() > _LONGEST:
            raise _error("the number is too large", node)
        return value

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


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return how many values a node holds when all of its anchors are written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if sizes.get(id(node)) == 0:
        raise _error("an anchor refers to itself", node)
    if id(node) not in sizes:
        sizes[id(node)] = 0
        within = (
            each
            for entry in node.value
            for each in (entry if isinstance(entry, tuple) else (entry,))
        )
        sizes[id(node)] = 1 + sum(_expanded(each, sizes) for each in within)
    return sizes[id(node)]


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
        others = [entry.name for entry in path.parent.glob("*.y*ml")]
        raise OptionsError(
            f"option file {path} does not exist{suggest(path.name, others)}"
        ) from None
    except OSError as error:
        raise OptionsError(f"the option file {path} cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST:
        raise OptionsError(f"{path} is not an option file: it is larger than {_LARGEST:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise OptionsError(
            f"{path} is not an option file: it is not UTF-8 text ({error})"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read an option file.

    Args:
        path: A YAML file whose top level is a mapping. ``5e-4`` is a number in it, as is
            ``!!float 5e-4``, which BasicSR's own reader needs.

    Returns:
        The options as plain dicts, lists and scalars, nothing added.

    Raises:
        OptionsError: If there is no such file (a near name is suggested), it cannot be read, it is
            larger or deeper than option files are, or it is not YAML (the message has file, line
            and column), not a mapping, or has a key twice.
    """
    text = _read(path)
    try:
        options = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise OptionsError(
            f"{place}: this is not YAML: {said}; fix this line or the one above"
        ) from error
    except yaml.YAMLError as error:
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
    except yaml.YAMLError:
        return text


def _fault_of_new(context: Context, section: str, key: str) -> str:
    """Say why a key cannot be added to a section, or nothing."""
    above = section or "the option file"
    if section in FREE:
        return f"{above} has no key {key!r}{suggest(key, context.section(section))}"
    known = known_in(context, section)
    if read_by(section, key):
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
