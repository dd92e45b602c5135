"""A plugin for pytest: the C library is that of SANITISED_KERNELS, and nothing else."""

import ctypes
import functools
import os

from dlgsanet_arch.cpu import library


@functools.cache
def _library():
    return library._Library(ctypes.CDLL(os.environ["SANITISED_KERNELS"]), "")


library._library = _library
