"""The option files that come with the package, found by name.

In a checkout, and so in an editable install, they are options/{train,test}/*.yml beside the
package; the build of a wheel copies them to option_files/ within it.
"""

from pathlib import Path

from dlgsanet_arch.hints import suggest
from dlgsanet_arch.options.context import OptionsError

_PACKAGE = Path(__file__).resolve().parents[1]


def _folder(*, train: bool) -> Path:
    installed = _PACKAGE / "option_files"
    top = installed if installed.is_dir() else _PACKAGE.parent / "options"
    return top / ("train" if train else "test")


def names(*, train: bool) -> list[str]:
    """Return the names of the shipped option files, such as "tiny_x4", sorted."""
    return sorted(path.stem for path in _folder(train=train).glob("*.yml"))


def find(given: Path | str, *, train: bool) -> Path:
    """Return the option file that a path or a name such as ``tiny_x4`` stands for.

    A file that exists is taken as it is; so is what has a folder or a suffix, whether it exists or
    not. Anything else is the name of a shipped file to train, or else to test.

    Raises:
        OptionsError: No shipped file has the name; the message lists those that are.
    """
    path, name, known = Path(given), str(given), names(train=train)
    if path.is_file() or path.suffix or path.name != name:
        return path
    if name not in known:
        raise OptionsError(
            f"{name!r} is neither a file nor the name of a shipped option file"
            f"{suggest(name, known)}; shipped to {'train' if train else 'test'}: {', '.join(known)}"
        )
    return _folder(train=train) / f"{name}.yml"
