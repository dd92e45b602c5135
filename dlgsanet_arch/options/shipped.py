"""The option files that come with the package, found by name.

In a checkout, and so in an editable install, they are options/{train,test}/*.yml beside the
package; the build of a wheel copies them to option_files/ within it.
"""

from pathlib import Path

from dlgsanet_arch.hints import suggest
from dlgsanet_arch.options.context import OptionsError

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "option_files"
_SUFFIX = ".yml"


def folder(*, train: bool) -> Path:
    """Return the folder that the shipped option files of training, or of testing, are in."""
    top = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "options"
    return top / ("train" if train else "test")


def names(*, train: bool) -> list[str]:
    """Return the names of the shipped option files, such as "tiny_x4", sorted."""
    return sorted(path.stem for path in folder(train=train).glob(f"*{_SUFFIX}"))


def path_of(name: str, *, train: bool) -> Path:
    """Return the path of a shipped option file.

    Args:
        name: Such as "tiny_x4".
        train: Whether it is to train, else to test.

    Raises:
        OptionsError: There is none of that name; those that there are are listed.
    """
    known = names(train=train)
    if name not in known:
        verb = "train" if train else "test"
        listed = (
            f"shipped to {verb}: {', '.join(known) or 'none, the installation is not complete'}"
        )
        raise OptionsError(
            f"there is no file {name!r}, and no shipped option file of that name"
            f"{suggest(name, known)}; {listed}"
        )
    return folder(train=train) / f"{name}{_SUFFIX}"


def find(given: Path, *, train: bool) -> Path:
    """Return the option file that a path or a name stands for.

    A file that is there is taken as it is. What else has neither folder nor suffix is the name of
    a shipped one.

    Args:
        given: Such as ``options/train/tiny_x4.yml`` or ``tiny_x4``.
        train: Whether to look among those to train, else among those to test.

    Returns:
        A path; there may be no file where `given` has a folder or a suffix.

    Raises:
        OptionsError: No shipped one has the name.
    """
    if given.is_file() or given.suffix or given.name != str(given):
        return given
    return path_of(str(given), train=train)
