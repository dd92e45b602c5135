"""A network that meets the same few sizes again and again, as tiles of pictures are."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

How = Literal["eager", "compile", "graph"]

# A graph keeps all memory of its forward: tiles come in few sizes, and older ones are let go.
MOST_GRAPHS = 4


class _Graphs:
    """CUDA graphs of a network's forward, one for each kind of input."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._graphs: OrderedDict[object, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = (
            OrderedDict()
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            raise ValueError(f"how='graph' needs CUDA tensors; got x on {x.device}")
        kind = (x.shape, x.dtype, x.device)
        if kind not in self._graphs:
            self._graphs[kind] = self._record(x)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(kind)
        graph, given, result = self._graphs[kind]
        given.copy_(x)
        graph.replay()
        return result.clone()

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = x.clone()
        # Kernels are compiled and chosen, and libraries set up, before anything is recorded.
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._net(given)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._net(given)
        return graph, given, result


def for_repeated_sizes(net: nn.Module, how: How = "eager") -> Callable[[Tensor], Tensor]:
    """Return a function that computes `net`, prepared for sizes that come again.

    The first picture of a size pays for the preparation. Weights may change in place between
    calls; `net` is used in the mode, dtype and place that it has then.

    Args:
        net: Maps (B, C, H, W) to (B, C', H', W').
        how: "eager" is the network itself, and on a CPU the fastest: it works in strips.
            "compile" compiles it for each size (torch.compile). "graph" records a CUDA graph of
            each size and replays it without gradients, which spares the launch of hundreds of
            kernels; results are equal, and the last four sizes are kept.

    Raises:
        ValueError: For another `how`; and, from the function, for "graph" with a tensor that is
            not on a CUDA device.
    """
    if how not in get_args(How):
        raise ValueError(f"how must be one of {', '.join(map(repr, get_args(How)))}; got {how!r}")
    if how == "graph":
        return _Graphs(net)
    return torch.compile(net, fullgraph=True, dynamic=False) if how == "compile" else net
