"""Steps a second and memory of training: forward, L1 loss, backward and Adam, batches of 16."""

import argparse
import math
import sys

import contestants
import limits
import measuring
import torch
import torch.nn.functional as F
from contestants import DEFINITION, OURS, OURS_CHANNELS_LAST, PUBLISHED
from measuring import DTYPES, Cell, Record, Run, Section, Setting

BATCH = 16
SCALE = 4
CPU_SECONDS = 1.0  # a step takes seconds: one is timed a process


def step(cell: Cell, setting: Setting) -> Record:
    """Time steps; half precision is autocast, with weights and optimizer in float32."""
    device, contestant = setting.device, cell["contestant"]
    net = contestants.build(contestant, cell["variant"], SCALE).train().to(device)
    batch, side = cell["batch"], cell["patch"]
    x = contestants.picture(contestant, batch, side, side, device, torch.float32)
    target = torch.rand(batch, 3, SCALE * side, SCALE * side, device=device)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4, betas=(0.9, 0.99))
    half = DTYPES[cell["dtype"]] != torch.float32
    autocast_dtype = DTYPES[cell["dtype"]] if half else torch.bfloat16

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, autocast_dtype, enabled=half):
            out = net(x)
        F.l1_loss(out.float(), target).backward()
        optimizer.step()

    def prepare() -> Run:
        return run

    with measuring.numerics(cell["dtype"], device):
        measured = measuring.measure(prepare, setting)
    parameters = sum(each.numel() for each in net.parameters())
    return {
        **measured,
        "operations": contestants.operations(
            contestant, cell["variant"], SCALE, (batch, side, side), training=True
        ),
        # Pictures once; weights, gradients and Adam's two moments read and written, in float32.
        "bytes": 4 * (x.numel() + target.numel() + 8 * parameters),
    }


def _rows(records: list[Record]) -> list[list[str]]:
    machine = limits.Limits(records)
    measured = [record for record in records if not limits.is_limit(record)]
    rows = []
    for record in measured:
        cell, seconds = record["cell"], measuring.median(record)
        wanted = {**cell, "contestant": OURS, "dtype": "fp32"}
        ours = measuring.median(next((r for r in measured if r["cell"] == wanted), None))
        least = machine.seconds(
            record.get("operations", math.nan), record.get("bytes", math.nan), cell["dtype"]
        )
        rows.append(
            [
                f"{cell['variant'].capitalize()} x{SCALE}",
                f"{cell['batch']}x{cell['patch']}x{cell['patch']}",
                cell["contestant"],
                cell["dtype"],
                measuring.times(1 / seconds, ".3g"),
                *measuring.milliseconds(record),
                measuring.times(seconds / ours),
                measuring.times(seconds / least),
                measuring.mebibytes(record),
            ]
        )
    return rows


def _contestants(device: str) -> list[tuple[str, str]]:
    names = [
        (DEFINITION, "fp32"),
        (OURS, "fp32"),
        (OURS_CHANNELS_LAST, "fp32"),
        (OURS_CHANNELS_LAST, "bf16"),
    ]
    if device == "cuda":
        names = [
            (OURS, "bf16"),
            (OURS, "tf32"),
            (OURS, "fp32"),
            (OURS_CHANNELS_LAST, "bf16"),
            (OURS_CHANNELS_LAST, "tf32"),
            (PUBLISHED, "tf32"),
            (PUBLISHED, "fp32"),
            (DEFINITION, "fp32"),
        ]
    return [(name, dtype) for name, dtype in names if name not in contestants.absent(device)]


def _sections(asked: argparse.Namespace) -> list[Section]:
    works = [("tiny", 48)]
    if asked.device == "cuda" or asked.all:
        works.append(("tiny", 64))
    if asked.device == "cuda":
        works.append(("large", 64))
    cells = [
        {
            "measure": "training_step:step",
            "contestant": name,
            "variant": variant,
            "batch": 2 if asked.quick else BATCH,
            "patch": patch,
            "dtype": dtype,
        }
        for variant, patch in ([(contestants.QUICK, 12)] if asked.quick else works)
        for name, dtype in _contestants(asked.device)
    ]
    dtypes = [cell["dtype"] for cell in cells]
    return [
        Section(
            name="training_step",
            title="Training steps",
            cells=[*limits.cells(asked.device, dtypes, asked.quick), *cells],
            columns=[
                "network",
                "input",
                "contestant",
                "dtype",
                "steps a second",
                "ms",
                "range",
                "ratio",
                "of limit",
                "MiB",
            ],
            rows=_rows,
            notes=lambda records: [
                "Forward, L1 loss, backward and a step of Adam; bf16 is autocast. MiB is the peak",
                "beyond the loaded process with weights and pictures. 'ratio' is to ours in fp32;",
                "'of limit' to the larger of operations / product rate and bytes / bandwidth, with",
                "three times the operations of our forward.",
                limits.Limits(records).note(),
                *contestants.absence_notes(asked.device, [PUBLISHED]),
            ],
            group=lambda cell: (cell.get("variant"), cell.get("patch"), cell["measure"]),
            seconds=CPU_SECONDS if asked.device == "cpu" else math.inf,
            options=["--all"] if asked.all else [],
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure training steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="on a CPU, patches of 64 as well")
    return measuring.run(_sections, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
