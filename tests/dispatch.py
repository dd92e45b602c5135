"""Which operators of PyTorch run, and how large their results are."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Count the operators that run."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    @property
    def ours(self):
        """The names of this package's operators that ran."""
        return {each.name() for each in self.calls if each.namespace == "dlgsanet"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements that any operator returned in new memory."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                size = each.untyped_storage().nbytes() // each.element_size()
                self.elements = max(self.elements, size)
        return result
