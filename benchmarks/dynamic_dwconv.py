"""Time and memory of the dynamic convolution alone, from hidden features to its output.

All forms compute `ops.projected_dwconv`: by its definition through unfold, with the filters' map
in memory by a naive kernel or PyTorch, and with the filters projected where they are used, by
PyTorch or by our operator: in C on a CPU, in Triton on a GPU.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable

import contestants
import limits
import measuring
import published_kernels
import torch
import torch.nn.functional as F
from contestants import DEFINITION, OURS, PUBLISHED, PYTORCH, PYTORCH_MAP
from measuring import DTYPES, Cell, Record, Section, Setting
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dlgsanet_arch import ops
from dlgsanet_arch.ops import reference

GEOMETRIES = {"Tiny": (48, 8, 12, 7), "Large": (90, 15, 22, 7), "quick": (6, 2, 3, 3)}  # C G D K
SIZES = ((1, 180, 320), (16, 48, 48))  # batch, height, width
WORKS = ("forward", "forward and backward")
CPU_SECONDS = 1.0  # a cell: there are many
CHANNELS_LAST = "channels_last"
# A GPU's inputs are taken in turn from sets that together are larger than its L2 cache.
ROTATED_BYTES = 256 * measuring.MIB
MOST_SETS = 16

Form = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _with_map(convolve: Callable[[Tensor, Tensor], Tensor]) -> Form:
    """Return a form with the filters' map (B, G, K, K, H, W) in memory."""

    def form(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
        filters = F.conv2d(hidden, weight[:, :, None, None], bias)
        return convolve(x, filters.unflatten(1, (-1, kernel, kernel)))

    return form


FORMS: dict[str, Form] = {
    DEFINITION: reference.projected_dwconv_reference,
    PUBLISHED: _with_map(published_kernels.dynamic_dwconv_naive),
    PYTORCH_MAP: _with_map(ops.dynamic_dwconv),
    PYTORCH: ops.projected_dwconv,
    OURS: ops.projected_dwconv,
}


def make_inputs(cell: Cell, device: str) -> tuple[Tensor, ...]:
    """Make random x, hidden, weight and bias, which want gradients where the work has any."""
    channels, groups, hidden, kernel = GEOMETRIES[cell["geometry"]]
    batch, height, width = cell["size"]
    made, taps = [], groups * kernel**2
    maps = ((batch, each, height, width) for each in (channels, hidden))
    for shape in (*maps, (taps, hidden), (taps,)):
        each = torch.randn(shape, device=device).to(DTYPES[cell["dtype"]])
        if len(shape) == 4 and cell["layout"] == CHANNELS_LAST:
            each = each.to(memory_format=torch.channels_last)
        made.append(each.requires_grad_(cell["work"] != WORKS[0]))
    return tuple(made)


def _work(cell: Cell, inputs: tuple[Tensor, ...], grad: Tensor | None) -> tuple[Tensor, ...]:
    kernel = GEOMETRIES[cell["geometry"]][3]
    if grad is None:
        with torch.no_grad():
            return (FORMS[cell["form"]](*inputs, kernel),)
    out = FORMS[cell["form"]](*inputs, kernel)
    return torch.autograd.grad(out, inputs, grad.to(out.dtype))


def least(cell: Cell) -> Record:
    """Return floating-point operations of our form, and bytes of inputs and outputs of a pass."""
    inputs = make_inputs(cell, "meta")
    grad = None if cell["work"] == WORKS[0] else torch.empty_like(inputs[0])
    with FlopCounterMode(display=False) as counter:
        _work({**cell, "form": OURS}, inputs, grad)
    given, made = sum(each.numel() for each in inputs), inputs[0].numel()
    values = given + made if grad is None else 3 * given + 2 * made
    return {
        "operations": counter.get_total_flops(),
        "bytes": inputs[0].element_size() * values,
    }


def convolve(cell: Cell, setting: Setting) -> Record:
    """Time one form of the operator."""
    device = setting.device
    inputs = make_inputs(cell, device)
    sets = 1
    if device == "cuda":
        size = sum(each.nbytes for each in inputs)
        sets = min(MOST_SETS, max(1, ROTATED_BYTES // size))
    turns = itertools.cycle([*(make_inputs(cell, device) for _ in range(sets - 1)), inputs])
    grad = None if cell["work"] == WORKS[0] else torch.randn_like(inputs[0])
    with measuring.numerics(cell["dtype"], device), contestants.operators(cell["form"]):
        measured = measuring.measure(lambda: lambda: _work(cell, next(turns), grad), setting)
    return {**measured, **least(cell)}


def _rows(record: Record, records: list[Record]) -> list[list[str]]:
    """Put the two works of a form into one row."""
    cell = record["cell"]
    if cell["work"] != WORKS[0]:
        return []
    size = f"{cell['size'][0]}x{cell['size'][2]}x{cell['size'][1]}"
    row = [cell["geometry"], size, cell["form"], cell["dtype"], cell["layout"]]
    for work in WORKS:
        cell = {**cell, "work": work}
        found = next((each for each in records if each["cell"] == cell), {"cell": cell})
        row += [
            *measuring.milliseconds(found),
            measuring.times(measuring.median(found) / limits.Limits(records).seconds(found), ".1f"),
            measuring.mebibytes(found),
        ]
    return [row]


def _forms(device: str) -> list[tuple[str, str, str]]:
    """Return forms with their dtypes and layouts: float32 in C, and else as the network has it."""
    if device == "cpu":
        # In half precision even a product of matrices takes minutes on most CPUs.
        forms = [(form, "fp32", "NCHW") for form in (DEFINITION, PYTORCH_MAP, PYTORCH, OURS)]
    else:
        forms = [
            (DEFINITION, "fp32", "NCHW"),
            (PUBLISHED, "fp32", "NCHW"),
            (PYTORCH_MAP, "bf16", CHANNELS_LAST),
            *((OURS, dtype, CHANNELS_LAST) for dtype in ("bf16", "tf32", "fp32")),
            (OURS, "bf16", "NCHW"),
        ]
    return contestants.taking_part(device, forms)


def _works(asked: argparse.Namespace) -> list[tuple[str, tuple[int, int, int]]]:
    """Return geometries with their sizes."""
    if asked.quick:
        return [("quick", (2, 6, 9))]
    if asked.device == "cuda":
        return [("Tiny", SIZES[0]), ("Tiny", SIZES[1]), ("Large", SIZES[0])]
    return [(geometry, size) for size in SIZES for geometry in ("Tiny", "Large")]


def _sections(asked: argparse.Namespace) -> list[Section]:
    cells = [
        {
            "measure": "dynamic_dwconv:convolve",
            "geometry": geometry,
            "size": list(size),
            "form": form,
            "dtype": dtype,
            "layout": layout,
            "work": work,
        }
        for geometry, size in _works(asked)
        for form, dtype, layout in _forms(asked.device)
        for work in WORKS
    ]
    return [
        Section(
            name="dynamic_dwconv",
            title="The dynamic convolution, from hidden features to its output",
            cells=[*limits.cells(asked.device, cells, asked.quick), *cells],
            columns="geometry | input | form | dtype | layout | forward, ms | range | of limit"
            " | MiB | with backward, ms | range | of limit | MiB",
            rows=_rows,
            notes=lambda records: [
                "Filters 7x7; C, G and D are 48, 8 and 12 for Tiny, 90, 15 and 22 for Large. MiB",
                "is the peak beyond the inputs, output included. 'of limit' is the time over the",
                "larger of operations / product rate and bytes / bandwidth, with our",
                "operator's operations, and bytes of inputs and outputs.",
                limits.Limits(records).note(),
                *contestants.absence_notes(asked.device, [PUBLISHED]),
            ],
            group=lambda cell: (cell.get("geometry"), str(cell.get("size")), cell["measure"]),
            rounds=1,
            runs=5 if asked.device == "cpu" else None,
            seconds=CPU_SECONDS if asked.device == "cpu" else math.inf,
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure all forms."""
    return measuring.run(_sections, argparse.ArgumentParser(description=__doc__), arguments)


if __name__ == "__main__":
    sys.exit(main())
