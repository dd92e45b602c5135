"""The exceptions that reach users as a plain message instead of a traceback."""

from dlgsanet_arch.hints import cut

LONGEST_LINE = 4000


class UserError(Exception):
    """Something the user can fix: the message names the thing that is wrong and the fix.

    The command line prints the message and exits with status 1; library callers catch it or one
    of its subclasses, which live beside the code that raises them.
    """

    def __str__(self) -> str:
        # What it quotes may come from a file, of any length.
        return "\n".join(cut(line, LONGEST_LINE) for line in super().__str__().split("\n"))


class Interrupted(BaseException):
    """A signal ended the work, and what was done is saved.

    Like KeyboardInterrupt it is not an Exception, so that what handles errors does not swallow it.

    Args:
        message: What happened and how to continue.
        status: The exit status for it: 130 after Ctrl-C, 143 after any other signal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ResumeError(UserError):
    """A training state that cannot be resumed from; the message names the file."""
