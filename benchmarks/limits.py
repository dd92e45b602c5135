"""This machine's own limits: how fast it multiplies matrices and copies memory.

Every benchmark measures them in the same run and says how many times longer it took than the
larger of operations / product rate and bytes / copy bandwidth.
"""

import argparse
import math
import sys

import measuring
import torch
from measuring import DTYPES, Cell, Record, Section, Setting

_PRODUCT_SIDES = {"cpu": 2048, "cuda": 8192}
_COPY_MEBIBYTES = {"cpu": 512, "cuda": 4096}
_LEAST_SAMPLES = 5  # products and copies are short beside what they are compared with


def cells(device: str, measured: list[Cell], quick: bool = False) -> list[Cell]:
    """Return what a section measures beside `measured`: for each of their dtypes and threads."""
    side = 64 if quick else _PRODUCT_SIDES[device]
    size = 1 if quick else _COPY_MEBIBYTES[device]
    made = []
    for threads in dict.fromkeys(cell.get("threads") for cell in measured):
        shared = {"threads": threads} if threads else {}
        dtypes = dict.fromkeys(c["dtype"] for c in measured if c.get("threads") == threads)
        made += [{"measure": "limits:product", "dtype": d, "side": side, **shared} for d in dtypes]
        made.append({"measure": "limits:copy", "mebibytes": size, **shared})
    return made


def _measure(run: measuring.Run, setting: Setting) -> Record:
    longer = Setting(setting.device, max(_LEAST_SAMPLES, setting.runs))
    return measuring.measure(lambda: run, longer)


def product(cell: Cell, setting: Setting) -> Record:
    """Time a product of two random square matrices; `work` is its floating-point operations."""
    side, dtype = cell["side"], DTYPES[cell["dtype"]]
    a, b = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with measuring.numerics(cell["dtype"], setting.device):
        measured = _measure(lambda: torch.mm(a, b, out=out), setting)
    return {**measured, "work": 2 * side**3}


def copy(cell: Cell, setting: Setting) -> Record:
    """Time a copy of random memory; `work` is the bytes read and written."""
    count = cell["mebibytes"] * measuring.MIB // 4
    source = torch.randn(count, device=setting.device)
    target = torch.empty_like(source)
    return {**_measure(lambda: target.copy_(source), setting), "work": 2 * 4 * count}


class Limits:
    """What the records of a run tell of the machine: medians over all rounds."""

    def __init__(self, records: list[Record]) -> None:
        self._rates: dict[tuple[str, int | None], float] = {}
        self._bandwidths: dict[int | None, float] = {}
        for record in records:
            cell, rate = record["cell"], record.get("work", math.nan) / measuring.median(record)
            if cell["measure"] == "limits:product":
                self._rates[cell["dtype"], cell.get("threads")] = rate
            elif cell["measure"] == "limits:copy":
                self._bandwidths[cell.get("threads")] = rate

    def seconds(self, record: Record) -> float:
        """Return the least time for the operations and bytes of a record; NaN if unknown."""
        threads = record["cell"].get("threads")
        rate = self._rates.get((record["cell"]["dtype"], threads), math.nan)
        by_rate = record.get("operations", math.nan) / rate
        by_bandwidth = record.get("bytes", math.nan) / self._bandwidths.get(threads, math.nan)
        return max(by_rate, by_bandwidth) if by_rate == by_rate else math.nan

    def note(self) -> str:
        """Say what the limits are."""
        rates = [
            f"{rate / 1e9:.4g} GFLOP/s in {dtype}{_with(threads)}"
            for (dtype, threads), rate in self._rates.items()
        ]
        copies = [
            f"{rate / 1e9:.4g} GB/s{_with(threads)}" for threads, rate in self._bandwidths.items()
        ]
        return (
            f"The machine's limits in this run: matrix products {', '.join(rates)}; "
            f"copies {', '.join(copies)}, read and written."
        )


def _with(threads: int | None) -> str:
    return f" with {threads} thread{'s' * (threads > 1)}" if threads else ""


def _rows(record: Record, _: list[Record]) -> list[list[str]]:
    cell = record["cell"]
    is_product = cell["measure"] == "limits:product"
    rate = record.get("work", math.nan) / measuring.median(record) / 1e9
    spread = [record["work"] / s / 1e9 for s in record.get("seconds", [])]
    row = [
        f"product of {cell['side']}²" if is_product else f"copy of {cell['mebibytes']} MiB",
        cell.get("dtype", "–"),
        measuring.times(rate, ".4g"),
        f"{min(spread):.4g} to {max(spread):.4g}" if spread else record["error"],
        "GFLOP/s" if is_product else "GB/s",
        str(len(spread)),
    ]
    return [row]


def served_dtypes(device: str) -> list[str]:
    """Return the names of the dtypes that are measured on `device`."""
    return ["fp32", "tf32", "bf16", "fp16"] if device == "cuda" else ["fp32", "bf16"]


def _sections(asked: argparse.Namespace) -> list[Section]:
    dtypes = [{"dtype": name} for name in served_dtypes(asked.device)]
    section = Section(
        name="limits",
        title="The machine's limits",
        cells=cells(asked.device, dtypes, asked.quick),
        columns="what | dtype | rate | range | unit | samples",
        rows=_rows,
        notes=lambda _: ["Medians; copies count bytes read and written."],
    )
    return [section]


def main(arguments: list[str] | None = None) -> int:
    """Measure the limits by themselves."""
    return measuring.run(_sections, argparse.ArgumentParser(description=__doc__), arguments)


if __name__ == "__main__":
    sys.exit(main())
