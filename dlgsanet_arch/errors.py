"""The one exception that reaches users as a plain message instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: the message names the thing that is wrong and the fix.

    The command line prints the message and exits with status 1; library callers catch it or one
    of its subclasses, which live beside the code that raises them.
    """
