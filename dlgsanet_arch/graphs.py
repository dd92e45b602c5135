"""CUDA graphs: a network recorded for a size of images, and replayed for the next images of it.

A forward of DLGSANet Tiny is hundreds of kernels, many of which run for less time than the host
takes to launch them; a recorded graph of them is one launch. Not measured on a GPU yet.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dlgsanet_arch import precision
from dlgsanet_arch.network import DLGSANet

_DEVICE = "cuda"
_MOST_KEPT = 4  # kinds of calls
_MOST_PIXELS = 1 << 18  # of a batch; larger ones keep a GPU busy, and their memory would be kept
_PLAIN = frozenset((bool, int, float, str, tuple, torch.dtype, type(None)))


def _state(network: nn.Module) -> tuple[Hashable, ...] | None:
    """Return what a recording depends on: modules, their settings, where their tensors are.

    None where something happens at each call that a graph would not repeat, as with hooks.
    """
    if torch_module._has_any_global_hook():
        return None
    found, waiting = [], [network]
    while waiting:
        module = waiting.pop()
        own = module.__dict__
        hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
        if hooks or module.training or "forward" in own or own.get("_compiled_call_impl"):
            return None
        tensors = (*own["_parameters"].values(), *own["_buffers"].values())
        found.append(type(module))
        found += [each.data_ptr() for each in tensors if each is not None]
        found += [each for each in own.values() if type(each) in _PLAIN]
        waiting += [each for each in own["_modules"].values() if each is not None]
    return tuple(found)


def _key(network: nn.Module, x: Tensor) -> tuple[Hashable, ...] | None:
    """Return the kind of a call; None for one that is not recorded."""
    pixels = x.numel() // max(1, x.shape[1]) if x.dim() == 4 else 0
    on_gpu = x.device.type == _DEVICE and 0 < pixels <= _MOST_PIXELS
    if not on_gpu or torch.is_grad_enabled() or type(network) is not DLGSANet:
        return None
    if torch.cuda.current_stream(x.device) != torch.cuda.default_stream(x.device):
        return None  # where somebody else may be recording
    if (state := _state(network)) is None:
        return None
    half = precision.is_autocast(_DEVICE) and torch.get_autocast_dtype(_DEVICE)
    cudnn = torch.backends.cudnn
    backends = getattr(cudnn, "conv", cudnn), torch.backends.cuda.matmul
    # From PyTorch 2.9 on, fp32_precision decides; once it is set, reading allow_tf32 raises.
    tf32 = [getattr(each, "fp32_precision", None) or each.allow_tf32 for each in backends]
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled()
    return (x.shape, x.stride(), x.dtype, x.device, half, *tf32, *modes, state)


class _Recording:
    """A call of a network with the memory of its input and its output."""

    def __init__(self, network: nn.Module, x: Tensor, side: torch.cuda.Stream) -> None:
        self._graph, self._given = torch.cuda.CUDAGraph(), x.clone()
        stream = torch.cuda.current_stream()
        half = torch.get_autocast_dtype(_DEVICE)
        # Casts of weights that autocast keeps go when it ends, and a graph would read them still.
        casts = torch.autocast(
            _DEVICE, half, enabled=precision.is_autocast(_DEVICE), cache_enabled=False
        )
        # The outer stream is set again where a recording fails, which leaves its own.
        with torch.cuda.stream(stream), casts:
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                network(self._given)  # what is compiled or chosen at a first call is then there
            stream.wait_stream(side)
            # Threads that pin the memory of samples may go on.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._made = network(self._given)

    def replay(self, x: Tensor) -> Tensor:
        """Return the output for an input of the same kind."""
        self._given.copy_(x)
        self._graph.replay()
        return self._made.clone()


class Graphs:
    """Calls networks; on a GPU, a call of a kind that came before is recorded and then replayed.

    The kind is shape, layout, dtype, device, autocast and other settings of precision, and a
    DLGSANet in evaluation mode, without gradients, of the same modules with the same settings and
    tensors; values that are changed in place take effect. All other calls, those of networks with
    hooks among them, run as without this. Recordings of the last few kinds keep their memory until
    `clear`. Threads may share one.

    Args:
        notice: Takes a sentence where recording fails; calls then run as without this.
    """

    def __init__(self, notice: Callable[[str], object] = warnings.warn) -> None:
        self._notice = notice
        self._kept: OrderedDict[tuple, _Recording | None] = OrderedDict()  # None: came once
        self._lock = threading.Lock()
        # One for all recordings: libraries keep memory for each stream.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._works = True

    def __reduce__(self) -> tuple:
        return Graphs, (self._notice,)  # recordings are of this process

    def __call__(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return network(x)."""
        if not self._works or (key := _key(network, x)) is None:
            return network(x)
        with self._lock, torch.cuda.device(x.device):
            came, recording = key in self._kept, self._kept.pop(key, None)
            if came and recording is None:
                recording = self._record(network, x)
            if self._works:
                self._kept[key] = recording
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            if recording is not None:
                return recording.replay(x)
        return network(x)

    def _record(self, network: nn.Module, x: Tensor) -> _Recording | None:
        try:
            side = self._streams.setdefault(x.device, torch.cuda.Stream())
            return _Recording(network, x, side)
        except Exception as error:  # drivers, kernels and memory fail in many ways
            self._works = False
            self._kept.clear()
            reason = str(error).partition("\n")[0]
            self._notice(f"CUDA graphs are not used: recording fails ({reason})")
            return None

    def clear(self, *, for_good: bool = False) -> bool:
        """Free the memory of all recordings, and return whether there were any.

        After `for_good`, nothing is recorded any more.
        """
        with self._lock:
            found = any(self._kept.values())
            self._kept.clear()
            self._works = self._works and not for_good
            return found
