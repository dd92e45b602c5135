"""Lets BasicSR's setup.py read its version on Python 3.13 and newer.

It calls `exec(code)` and then `locals()["__version__"]`. Since PEP 667 such an exec writes to a
snapshot of the function's variables, which is thrown away. Here exec writes to the function's
frame again, as it did before. Python imports this file at its start when this folder is on
PYTHONPATH, as `installing.build_paths` says. It can go when BasicSR's sdist builds without it.
"""

import builtins
import sys

_exec = builtins.exec


def _exec_into_caller(source, globals=None, locals=None, /, **options):
    if globals is None and locals is None:
        caller = sys._getframe(1)
        globals, locals = caller.f_globals, caller.f_locals
    return _exec(source, globals, locals, **options)


builtins.exec = _exec_into_caller
