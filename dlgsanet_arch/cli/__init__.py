"""The command line: `dlgsanet <verb> …`, the same as `python -m dlgsanet_arch <verb> …`.

A verb is a line of `VERBS` and a module `cmd_<verb>.py` in this folder, underscores for dashes:

    def build_parser() -> argparse.ArgumentParser: ...

    @exit_status
    def main(argv: Sequence[str] | None = None) -> int: ...

At its top such a module imports the standard library, `cli` and `errors` alone, so that help
answers at once; everything else is imported inside `main`. `main` returns the exit status and
takes its arguments from sys.argv where `argv` is None, so that a script can call one verb:
`sys.exit(cmd_train.main())`. Errors become messages and exit statuses in `exit_status` alone.
"""

import argparse
import functools
import importlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dlgsanet_arch.errors import Interrupted, UserError
from dlgsanet_arch.hints import printable, suggest_or_list
from dlgsanet_arch.version import __version__

VERBS = {
    "compare": "Show a detail of an image beside what networks and bicubic make of it.",
    "complexity": "Parameters, operations, memory and time of the network, in a table.",
    "data": "Prepare and verify data sets.",
    "doctor": "Say what is installed, what is wrong and how to fix it.",
    "export": "Write the network as ONNX or .pt2, compared with the network first.",
    "new-options": "Write an option file for your data.",
    "options": "Print a shipped option file, or their names.",
    "reproduce": "Measure weights on the benchmark sets, beside the paper's figures.",
    "test": "Test trained weights as an option file says, through BasicSR.",
    "train": "Train a network as an option file says, through BasicSR.",
    "upscale": "Enlarge an image, or all images of a folder.",
    "weights": "Inspect, convert, average or transfer files of weights.",
}
# Earlier spellings, and what to use instead.
MOVED = {
    **{verb: f"dlgsanet weights {verb}" for verb in ("inspect", "convert", "average", "transfer")},
    **{verb: f"python examples/{verb}.py in a checkout" for verb in ("curves", "explain")},
}


def size(text: str) -> tuple[int, int]:
    """Read a size on the command line: height and width of 720x1280."""
    found = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH, such as 180x320; got {text!r}")
    return int(found[1]), int(found[2])


def clean_up_on_sigterm() -> None:
    """Let SIGTERM end the process by an exception, so that unfinished files are removed."""

    def stop(number: int, frame: object) -> NoReturn:
        raise Interrupted("stopped by SIGTERM", 143)

    signal.signal(signal.SIGTERM, stop)


def exit_status(
    main: Callable[[Sequence[str] | None], int],
) -> Callable[[Sequence[str] | None], int]:
    """Decorate a verb's `main` so that what a user can fix ends as a message, not a traceback.

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
            print(printable(f"dlgsanet: {error}"), file=sys.stderr)
            return 1
        except Interrupted as stop:
            print(f"dlgsanet: {stop}", file=sys.stderr)
            return stop.status
        except KeyboardInterrupt:
            print("dlgsanet: interrupted", file=sys.stderr)
            return 130

    return guarded


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}} {line}" for verb, line in VERBS.items()]
    head = ["usage: dlgsanet [--help] [--version] VERB ...", "", "verbs:"]
    return "\n".join([*head, *lines, "", "`dlgsanet VERB --help` says what a verb takes."])


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
    if verb not in VERBS:
        hint = f"; use `{MOVED[verb]}`" if verb in MOVED else suggest_or_list(verb, VERBS)
        print(f"dlgsanet: unknown verb {verb!r}{hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"{__name__}.cmd_{verb.replace('-', '_')}").main(rest)
