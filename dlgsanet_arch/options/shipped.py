"""The option files that come with the package, found by name.

In a checkout, and so in an editable install, they are options/{train,test}/*.yml beside the
package; the build of a wheel copies them to option_files/ within it.
"""

from pathlib import Path

from dlgsanet_arch.hints import suggest
from dlgsanet_arch.options.context import OptionsError

_PACKAGE = Path(__file__).resolve().parents[1]


def folder(*, train: bool) -> Path:
    """Return the folder that the shipped option files of training, or of testing, are in."""
    installed = _PACKAGE / "option_files"
    top = installed if installed.is_dir() else _PACKAGE.parent / "options"
    return top / ("train" if train else "test")


def names(*, train: bool) -> list[str]:
    """Return the names of the shipped option files, such as "tiny_x4", sorted."""
    return sorted(path.stem for path in folder(train=train).glob("*.yml"))


def path_of(name: str, *, train: bool) -> Path:
    """Return the path of a shipped option file such as "tiny_x4" to train, or else to test.

    Raises:
        OptionsError: The name is not known; the message lists those that are.
    """
    known = names(train=train)
    if name not in known:
        listed = ", ".join(known) or "none, the installation is not complete"
        raise OptionsError(
            f"{name!r} is neither a file nor the name of a shipped option file"
            f"{suggest(name, known)}; shipped to {'train' if train else 'test'}: {listed}"
        )
    return folder(train=train) / f"{name}.yml"


def find(given: Path, *, train: bool) -> Path:
    """Return the option file that a path or a name such as ``tiny_x4`` stands for.

    A file that exists is taken as it is; so is what has a folder or a suffix, whether it exists or
    not. Anything else is the name of a shipped file to train, or else to test.

    Raises:
        OptionsError: No shipped file has the name.
    """
    if given.is_file() or given.suffix or given.name != str(given):
        return given
    return path_of(str(given), train=train)
