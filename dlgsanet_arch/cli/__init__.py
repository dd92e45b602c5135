"""The command line: `dlgsanet <verb> …`, the same as `python -m dlgsanet_arch <verb> …`.

A verb is a module `cmd_<verb>.py` in this folder; dropping the file in adds the verb, in whose name
underscores become dashes. It holds

    def build_parser() -> argparse.ArgumentParser: ...

    @exit_status
    def main(argv: Sequence[str] | None = None) -> int: ...

The first line of the parser's description is the verb's line in `dlgsanet --help`. That help
imports every verb, so what is slow to import, or may be absent, is imported inside `main`.
`main` returns the exit status and takes its arguments from sys.argv where `argv` is None, so that
a script can be a door to one verb: `sys.exit(cmd_train.main())`. Errors become messages and exit
statuses in `exit_status` alone.
"""

import difflib
import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence

from dlgsanet_arch.errors import Interrupted, UserError
from dlgsanet_arch.version import __version__

PREFIX = "cmd_"


def exit_status(
    main: Callable[[Sequence[str] | None], int],
) -> Callable[[Sequence[str] | None], int]:
    """Decorate a verb's `main` so that what a user can mend ends as a message, not a traceback.

    Returns:
        A function that returns what `main` returns; 1 after a UserError, whose message goes to
        stderr; 130 after an interrupt from the keyboard, as shells have it, and 143 after another
        signal that ended a run. Every other exception passes: it is a fault of the program, and its
        traceback is wanted.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"dlgsanet: {error}", file=sys.stderr)
            return 1
        except Interrupted as stop:
            print(f"dlgsanet: {stop}", file=sys.stderr)
            return stop.status
        except KeyboardInterrupt:
            print("dlgsanet: interrupted", file=sys.stderr)
            return 130

    return guarded


def verbs() -> list[str]:
    """Return the names of all verbs, sorted, without importing any."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    modules = (name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX))
    return sorted(name.replace("_", "-") for name in modules)


def _verb_module(verb: str):
    return importlib.import_module(f"{__name__}.{PREFIX}{verb.replace('-', '_')}")


def _help() -> str:
    lines = ["usage: dlgsanet [--help] [--version] VERB ...", "", "verbs:"]
    known = verbs()
    width = max(map(len, known))
    for verb in known:
        description = (_verb_module(verb).build_parser().description or "").strip()
        lines.append(f"  {verb:<{width}} {description.partition(chr(10))[0]}".rstrip())
    return "\n".join([*lines, "", "`dlgsanet VERB --help` says what a verb takes."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that the first argument names with the arguments that follow it.

    Args:
        argv: The arguments; None takes them from sys.argv.

    Returns:
        The exit status: the verb's own, or 2 where the verb is missing or unknown.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    verb, *rest = arguments
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"dlgsanet {__version__}")
        return 0
    known = verbs()
    if verb not in known:
        near = difflib.get_close_matches(verb, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        print(f"dlgsanet: unknown verb {verb!r}; {hint}", file=sys.stderr)
        return 2
    return _verb_module(verb).main(rest)
