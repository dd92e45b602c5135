"""Options that were edited since a run began."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

# What a state holds and the option file says too; the state's is what a resumed run uses.
_KEPT_BY_STATE = ("train:optim_", "train:scheduler", "manual_seed")


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}:{key}" if prefix else str(key))
    else:
        yield prefix, node


def find(options: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return path, value of the run so far and value now of each option that was edited."""
    now = dict(_flat(json.loads(json.dumps(options, default=str))))
    before = dict(_flat(saved))
    return {
        path: (before.get(path), now.get(path))
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    }


def is_kept_by_state(path: str) -> bool:
    """Whether a resumed run takes this option from its state."""
    return path.startswith(_KEPT_BY_STATE)
