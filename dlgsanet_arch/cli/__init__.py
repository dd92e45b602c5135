"""The command line: `dlgsanet <verb> …`, the same as `python -m dlgsanet_arch <verb> …`.

A verb is a line of `VERBS` and a module `cmd_<verb>.py` in this folder, underscores for dashes:

    def build_parser() -> argparse.ArgumentParser: ...

    @exit_status
    def main(argv: Sequence[str] | None = None) -> int: ...

At its top such a module imports the standard library, `cli` and `errors` alone, so that help
answers at once. A script can call one verb: `sys.exit(cmd_train.main())`. Errors become messages
and exit statuses in `exit_status` alone.
"""

import argparse
import functools
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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


# Options of several verbs, by name.
_COMMON: dict[str, dict[str, Any]] = {
    "param-key": {"metavar": "KEY", "help": "in a .pth (default: params_ema, else params)"},
    "device": {"metavar": "NAME", "help": "cpu, cuda, cuda:1, mps (default: a GPU, else the CPU)"},
    "dtype": {"choices": ("fp32", "bf16", "fp16"), "default": "fp32", "help": "default: fp32"},
    "ensemble": {
        "action": "store_true",
        "help": "the mean over 8 flips and rotations; 8x the time",
    },
}


def add_common(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options that several verbs have."""
    for name in names:
        parser.add_argument(f"--{name}", **_COMMON[name])


def clean_up_on_sigterm() -> None:
    """Let SIGTERM end the process by an exception, so that unfinished files are removed."""

    def stop(number: int, frame: object) -> NoReturn:
        raise Interrupted("stopped by SIGTERM", 143)

    signal.signal(signal.SIGTERM, stop)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from dlgsanet_arch.memory import is_out_of_memory

    return is_out_of_memory(error)


def exit_status(
    main: Callable[[Sequence[str] | None], int],
) -> Callable[[Sequence[str] | None], int]:
    """Decorate a verb's `main` so that what a user can fix ends as a message, not a traceback.

    The status is 1 after a UserError or a fault of a file, 130 after an interrupt from the
    keyboard, as shells have it, and 143 after another signal that ended a run. Every other
    exception is a fault of the program.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(printable(f"dlgsanet: {error}"), file=sys.stderr)
            return 1
        except OSError as error:  # a name that is too long, a folder that cannot be entered
            if error.filename is None:
                raise
            print(printable(f"dlgsanet: {error.filename}: {error.strerror}"), file=sys.stderr)
            return 1
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or "the system gave none"
            fix = "ask for smaller images, patches, tiles or batches, or for fewer workers"
            print(
                printable(f"dlgsanet: memory does not suffice ({reason}); {fix}"), file=sys.stderr
            )
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
    """Run a verb; the exit status is its own, or 2 where the verb is missing or unknown.

    It is 141, as shells have it, where what reads the output ended first, such as `head`.
    `argv` begins with the verb; None takes it from sys.argv.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    try:
        status = _run(verb, rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if verb == "train":  # which has pipes of its own
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 141


def _run(verb: str, rest: list[str]) -> int:
    if verb in ("", "-h", "--help"):
        print(_help(), file=sys.stdout if verb else sys.stderr)
        return 0 if verb else 2
    if verb == "--version":
        print(f"dlgsanet {__version__}")
        return 0
    if verb not in VERBS:
        hint = f"; use `{MOVED[verb]}`" if verb in MOVED else suggest_or_list(verb, VERBS)
        print(f"dlgsanet: unknown verb {verb!r}{hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"{__name__}.cmd_{verb.replace('-', '_')}").main(rest)
