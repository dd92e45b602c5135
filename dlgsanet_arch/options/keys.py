"""Keys that may be there: BasicSR never looks at one that it does not know."""

from collections.abc import Iterator
from typing import Any

from dlgsanet_arch.hints import suggest, suggest_or_list
from dlgsanet_arch.options.context import Context
from dlgsanet_arch.options.required import meant_for_missing
from dlgsanet_arch.options.schema import Known, arguments, known_in, read_by
from dlgsanet_arch.options.values import matching

# Where an option file names what is registered, and in which registry.
_TYPES = {
    "model_type": "model",
    "network_*:type": "arch",
    "datasets:*:type": "dataset",
    "val:metrics:*:type": "metric",
    "train:*_opt:type": "loss",
}
_MADE_FOLDERS = "path"  # BasicSR makes a folder of every key of `path` that it does not know


def _what_is_wrong(context: Context, section: str, key: str, value: Any, known: Known) -> str:
    """Say what an unknown key is taken for."""
    meant = known.misspelt(key)
    hint = f"; did you mean {meant!r}?" if meant else ""
    if arguments(context, section) is not None or section.startswith("train:"):
        return f"{known.reader} has no such argument{hint or suggest_or_list(key, known.patterns)}"
    if section == _MADE_FOLDERS and value is not None:
        return f"not known; BasicSR would make a folder {value!r}{hint}"
    readers = read_by(key) if section in ("", "train") else []
    if readers:
        return f"{known.reader} does not read it, {', '.join(readers)} would; delete it"
    who = f"{known.reader} does not read it" if known.reader else "not known"
    return f"{who}{hint or '; delete it'}"


def _unknown_keys(context: Context) -> Iterator[str]:
    offered = {
        f"{path.rpartition(':')[0]}:{name}".lstrip(":")
        for path, name in meant_for_missing(context).items()
    }
    for section, content in context.sections():
        known = known_in(context, section)
        if known is None:
            continue
        for key, value in content.items():
            path = f"{section}:{key}".lstrip(":")
            if path not in offered and known.misspelt(str(key)) is not None:
                yield f"{path}: {_what_is_wrong(context, section, str(key), value, known)}"


def _registered_types(context: Context) -> Iterator[str]:
    """BasicSR looks a name up after it renamed the old run; a metric at the first validation."""
    for path, value, registry in matching(context, _TYPES):
        names = context.names_in(registry)
        if names is not None and value is not None and value not in names:
            hint = suggest(value, names) or "; is the package that registers it imported?"
            yield f"{path}: no {registry} is registered as {value!r}{hint}"


CHECKS = (_unknown_keys, _registered_types)
