"""The host's time for a call of the dynamic convolution: what PyTorch and we spend before a kernel.

On a GPU a network of small kernels is as fast as the host calls them. Here the kernels are replaced
by functions that return empty tensors, and beside it stands an operator of the same signature, with
the same functions, declared by torch.library.custom_op.
"""

import argparse
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import dynamic_dwconv
import measuring
import torch
from contestants import OURS
from measuring import Cell, Record, Section, Setting
from torch import Tensor

from dlgsanet_arch import ops
from dlgsanet_arch.ops import dynamic

EMPTY = "empty operator by custom_op"
WORKS = ("forward without gradients", "forward", "backward")
CALLS = 200  # of a sample
SIZE = (1, 4, 16)  # batch, height and width: nothing to compute


def _forward(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    return torch.empty_like(x)


def _backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(each) for each in (x, hidden, weight, bias))


def _custom_op() -> Callable[..., Tensor]:
    forward = torch.library.custom_op("dlgsanet_benchmark::forward", _forward, mutates_args=())
    backward = torch.library.custom_op("dlgsanet_benchmark::backward", _backward, mutates_args=())

    def save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.kernel = inputs[-1]

    def gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        return *backward(grad, *ctx.saved_tensors, ctx.kernel), None

    forward.register_autograd(gradients, setup_context=save)
    return forward


def call(cell: Cell, setting: Setting) -> Record:
    """Time calls of one operator."""
    form, work = cell["form"], cell["work"]
    kernel = dynamic_dwconv.GEOMETRIES["Tiny"][3]
    described = {"geometry": "Tiny", "size": list(SIZE), "dtype": "fp32", "layout": "NCHW"}
    inputs = dynamic_dwconv.make_inputs({**described, "work": work}, "cpu")
    inputs = tuple(each.detach().requires_grad_(work != WORKS[0]) for each in inputs)
    operator = ops.projected_dwconv if form == OURS else _custom_op()
    backend = SimpleNamespace(projected_forward=_forward, projected_backward=_backward)

    def choose(*_: object) -> SimpleNamespace:  # quicker than a mock
        return backend

    grad = torch.zeros_like(inputs[0])

    def forwards() -> list[Tensor]:
        return [operator(*inputs, kernel) for _ in range(CALLS)]

    def backwards(outs: list[Tensor]) -> None:
        for out in outs:
            torch.autograd.grad(out, inputs, grad, retain_graph=True)

    with (
        mock.patch.object(dynamic, "choose_backend", choose),
        torch.set_grad_enabled(work != WORKS[0]),
    ):
        if work != WORKS[2]:
            return measuring.measure(lambda: forwards, setting)
        outs = forwards()
        return measuring.measure(lambda: lambda: backwards(outs), setting)


def _rows(record: Record, records: list[Record]) -> list[list[str]]:
    """Put the works of a form into one row."""
    cell = record["cell"]
    if cell["work"] != WORKS[0]:
        return []
    row = [cell["form"]]
    for work in WORKS:
        own = measuring.median_of(records, {**cell, "work": work})
        least = measuring.median_of(records, {**cell, "work": work, "form": EMPTY})
        row += [measuring.times(own / CALLS * 1e6, ".1f"), measuring.times(own / least)]
    return [row]


def _sections(asked: argparse.Namespace) -> list[Section]:
    return [
        Section(
            name="host_cost",
            title="The host's time for a call of the dynamic convolution",
            cells=[
                {"measure": "host_cost:call", "form": form, "work": work, "threads": 1}
                for work in WORKS
                for form in (EMPTY, OURS)
            ],
            columns="operator | without gradients, µs | ratio | forward, µs | ratio"
            " | backward, µs | ratio",
            rows=_rows,
            notes=lambda _: [
                "Kernels are replaced by functions that return empty tensors, in both rows; for",
                "ours, the check of shapes and the way to the kernel are in it. Ratios are to the",
                f"first row. Medians of samples of {CALLS} calls.",
            ],
            rounds=1 if asked.quick else 5,
            runs=None if asked.quick else 10,
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure both operators."""
    return measuring.run(_sections, argparse.ArgumentParser(description=__doc__), arguments)


if __name__ == "__main__":
    sys.exit(main())
