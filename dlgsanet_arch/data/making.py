"""What the makers of training sets and of test sets share: scales, recipes, bad images, notices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.data import SCALES
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import RECIPE, read_json
from dlgsanet_arch.hints import named

Recipe = Mapping[str, Any]


def checked_scales(scales: Iterable[int]) -> list[int]:
    """Return scales in ascending order, each once.

    Raises:
        ValueError: There is none, or one that is not of `SCALES`.
    """
    result = sorted(set(scales))
    if not result or not set(result) <= set(SCALES):
        raise ValueError(f"scales must be from {SCALES}, got {scales=}")
    return result


def fits(stored: Recipe | None, wanted: Recipe) -> bool:
    """Whether a folder was made by a recipe; what is stored may hold further facts."""
    return stored is not None and all(stored.get(name) == wanted[name] for name in wanted)


def _differences(stored: Recipe, wanted: Recipe) -> str:
    said = [
        f"{name.replace('_', ' ')} {stored[name]}, not {value}"
        for name, value in wanted.items()
        if name in stored
        and stored[name] != value
        and len(str(stored[name])) < 40 > len(str(value))
    ]
    return ", ".join(said) or "of other images"


def made_before(
    path: Path,
    recipe: Recipe,
    change: Callable[[Recipe], str],
    *,
    overwrite: bool,
    remedy: str = "move it away, or make it again with --overwrite",
) -> dict[str, Any] | None:
    """Read the recipe of a finished folder, None where the folder is absent.

    Args:
        path: The folder.
        recipe: What it is to be made from.
        change: Says of the stored recipe how the folder was changed since, "" where it was not.
        overwrite: What was made otherwise, or changed since, counts as absent, to be replaced.
        remedy: What a user can do about such a folder.

    Raises:
        UserError: Something else has that name.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    stored = read_json(path / RECIPE)
    if stored is None or stored.get("kind") != recipe.get("kind"):
        raise UserError(
            f"{path} exists and was not made by this command: its {RECIPE} is missing or of "
            "something else; move it away, then run the command again"
        )
    if not fits(stored, recipe):
        how = f"is another data set: {_differences(stored, recipe)}"
    elif changed := change(stored):
        how = f"was changed after it was made: {changed}"
    else:
        return stored
    if overwrite:
        return None
    raise UserError(f"{path} {how}; {remedy}")


def refuse_bad(faults: Sequence[str], bad: int, total: int, *, skip: bool) -> None:
    """Raise a UserError for images that cannot be used, unless they are skipped and some remain."""
    if faults and not (skip and bad < total):
        how = "nothing is left" if skip else "--skip-bad leaves them out"
        head = f"{bad} of {total} images cannot be used, nothing was written; fix or remove them; "
        raise UserError("\n  ".join([f"{head}{how}:", *faults]))


def notice_lines(notices: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines for the terminal of what was changed on reading: files by notice."""
    return [f"{len(files)} x {notice}: {named(files)}" for notice, files in notices.items()]
