"""Time and memory of training: forward, L1 loss, backward and Adam, batches of 16.

With --agreement, whether training by our operators ends where training by PyTorch's own does.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import contestants
import limits
import measuring
import network
import reporting
import torch
import torch.nn.functional as F
from contestants import (
    DEFINITION,
    EDSR,
    OURS,
    OURS_CHANNELS_LAST,
    PUBLISHED,
    PYTORCH,
    PYTORCH_MAP,
    SWINIR,
)
from measuring import DTYPES, Cell, Record, Run, Section, Setting
from torch import Tensor, nn

BATCH = 16
SCALE = 4
THREADS = (2, 1)  # on a CPU
CPU_SECONDS = 6.0  # begin no further sample after this
SLOW = (DEFINITION, SWINIR)  # a CPU takes tens of seconds for a step
TRAINED_ON = 20  # images
TOLERANCE = 0.02  # dB, between two trainings that differ in rounding


def _step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    cast: AbstractContextManager[object],
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    with cast:
        out = net(x)
    loss = F.l1_loss(out.float(), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=5e-4, betas=(0.9, 0.99), fused=True)


def step(cell: Cell, setting: Setting) -> Record:
    """Time steps; half precision is autocast, with weights and optimizer in float32."""
    device, contestant = setting.device, cell["contestant"]
    net = contestants.build(contestant, cell["variant"], cell["scale"]).train().to(device)
    batch, side = cell["batch"], cell["patch"]
    x = contestants.images(contestant, batch, side, side, device, torch.float32)
    target = torch.rand(batch, 3, SCALE * side, SCALE * side, device=device)
    optimizer = _adam(net)
    half = DTYPES[cell["dtype"]] != torch.float32
    cast = torch.autocast(device, DTYPES[cell["dtype"]]) if half else nullcontext()
    once = device == "cpu" and contestant in SLOW

    def prepare() -> Run:
        if once:
            _step(net, optimizer, x[:1], target[:1], cast)
        return functools.partial(_step, net, optimizer, x, target, cast)

    with measuring.numerics(cell["dtype"], device), contestants.operators(contestant):
        measured = measuring.measure(
            prepare, Setting(device, 1) if once else setting, warm_ups=0 if once else None
        )
    parameters = sum(each.numel() for each in net.parameters())
    return {
        **measured,
        "operations": contestants.operations(
            contestant, cell["variant"], cell["scale"], (batch, side, side), training=True
        ),
        # Images once; weights, gradients and Adam's two moments read and written, in float32.
        "bytes": 4 * (x.numel() + target.numel() + 8 * parameters),
    }


def _rows(record: Record, records: list[Record]) -> list[list[str]]:
    cell, seconds = record["cell"], measuring.median(record)
    ours = measuring.median_of(records, {**cell, "contestant": OURS, "dtype": "fp32"})
    row = [
        contestants.title(cell),
        f"{cell['batch']}x{cell['patch']}x{cell['patch']}",
        cell["dtype"],
        str(cell.get("threads", "–")),
        measuring.times(1 / seconds, ".3g"),
        *measuring.milliseconds(record),
        measuring.times(seconds / ours),
        measuring.times(seconds / limits.Limits(records).seconds(record)),
        measuring.mebibytes(record),
    ]
    return [row]


def _threads_note(records: list[Record]) -> str:
    most, gains = max(THREADS), []
    for record in records:
        cell = record["cell"]
        if cell["threads"] == most and not measuring.is_limit(record):
            gain = measuring.median_of(records, {**cell, "threads": 1}) / measuring.median(record)
            gains.append(f"{contestants.title(cell)} {measuring.times(gain)}")
    return f"Time with one thread over time with {most}: {'; '.join(gains)}."


def _contestants(device: str) -> list[tuple[str, str]]:
    names = [(name, "fp32") for name in (OURS, PYTORCH, PYTORCH_MAP, DEFINITION, SWINIR, EDSR)]
    if device == "cuda":
        names = [
            *((OURS, dtype) for dtype in ("bf16", "tf32", "fp32")),
            *((OURS_CHANNELS_LAST, dtype) for dtype in ("bf16", "tf32")),
            *((PUBLISHED, dtype) for dtype in ("tf32", "fp32")),
            (DEFINITION, "fp32"),
        ]
    return contestants.taking_part(device, names)


def step_section(asked: argparse.Namespace) -> Section:
    """Steps a second."""
    on_cpu = asked.device == "cpu"
    works = [("tiny", 48, _contestants(asked.device))]
    if not on_cpu:
        ours = [(OURS, "bf16"), (OURS, "tf32")]
        works += [("tiny", 64, ours), ("large", 64, ours)]
    if asked.quick:
        works = [(contestants.QUICK, 16, works[0][2])]
    threads = (None,) if not on_cpu else THREADS[-1:] if asked.quick else THREADS
    cells = [
        {
            "measure": "training_step:step",
            "contestant": name,
            "variant": variant,
            "scale": SCALE,
            "batch": 2 if asked.quick else BATCH,
            "patch": patch,
            "dtype": dtype,
            **({"threads": count} if count else {}),
        }
        for variant, patch, taking_part in works
        for name, dtype in taking_part
        for count in threads
    ]
    slow = f"{' and '.join(SLOW)}: one step a process, after one with a single patch."
    return Section(
        name="training_step",
        title="Training steps",
        cells=[*limits.cells(asked.device, cells, asked.quick), *cells],
        columns="network | input | dtype | threads | steps a second | ms | range | ratio | of limit"
        " | MiB",
        rows=_rows,
        notes=lambda records: [
            "Forward, L1 loss, backward and a step of Adam (fused); bf16 is autocast. MiB is the",
            "peak beyond the loaded process with weights and images. 'ratio' is to ours in fp32",
            "with as many threads; 'of limit' to the larger of operations / product rate and bytes",
            "/ bandwidth, with three times the operations of the forward, that of the formula for",
            "all forms of Tiny: what a backward computes once more is not counted.",
            *([slow, _threads_note(records)] if on_cpu else []),
            limits.Limits(records).note(),
            *contestants.absence_notes(asked.device, [PUBLISHED, *contestants.PEERS]),
        ],
        group=lambda cell: (cell.get("variant"), cell.get("patch"), cell["measure"]),
        rounds=1 if on_cpu else measuring.ROUNDS,
        seconds=CPU_SECONDS if on_cpu else math.inf,
    )


def _photographs() -> tuple[list[Path], list[Path]]:
    """Return images to train on and to hold out: of the shared data, else scikit-image's."""
    trained = sorted((reporting.shared_folder() / "data" / "BSDS400").glob("*.jpg"))[:TRAINED_ON]
    if trained and network.set14():
        return trained, network.set14()
    from dlgsanet_arch.data import demo  # needs lmdb, which a machine with a GPU may not have

    names = (demo.TRAIN_IMAGES, demo.VALIDATION_IMAGES)
    return tuple([demo.images_folder() / name for name in each] for each in names)


def _batches(cell: Cell, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each iteration's patches, cut at random from one seed."""
    side, draws = cell["patch"], torch.Generator().manual_seed(0)
    for _ in range(cell["iterations"]):
        cut = []
        for index in torch.randint(len(pairs), (cell["batch"],), generator=draws):
            room = (length - side + 1 for length in pairs[index][0].shape[1:])
            top, left = (int(torch.randint(most, (), generator=draws)) for most in room)
            for each, k in zip(pairs[index], (1, SCALE), strict=True):
                cut.append(each[:, k * top : k * (top + side), k * left : k * (left + side)])
        yield torch.stack(cut[::2]), torch.stack(cut[1::2])


def agreement(cell: Cell, setting: Setting) -> Record:
    """Train with the operators of each contestant in turn; PSNR on images held out."""
    if cell["variant"] == contestants.QUICK:
        trained = held_out = [(torch.rand(3, 20, 28), torch.rand(3, 20 * SCALE, 28 * SCALE))]
    else:
        trained, held_out = (list(network.pairs(paths, SCALE)) for paths in _photographs())
    found = {}
    for contestant in cell["contestants"]:
        net = contestants.build(contestant, cell["variant"], SCALE).train()
        optimizer, start = _adam(net), time.perf_counter()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cell["iterations"])
        with contestants.operators(contestant):
            for x, target in _batches(cell, trained):
                loss = _step(net, optimizer, x, target, nullcontext())
                schedule.step()
            seconds = time.perf_counter() - start
            net.eval()
            with torch.no_grad():
                psnr = [network.psnr(net(x[None])[0], high, SCALE) for x, high in held_out]
        found[contestant] = {"took": seconds, "loss": loss.item(), "psnr": psnr}
    ours, plain = (statistics.mean(found[name]["psnr"]) for name in (OURS, PYTORCH))
    return {"found": found, **({} if abs(ours - plain) <= TOLERANCE else {"broken": True})}


def _agreement_rows(record: Record, _: list[Record]) -> list[list[str]]:
    if "found" not in record:
        return [[record["error"]]]
    rows = []
    for name, each in record["found"].items():
        base = record["found"][PYTORCH]["psnr"]
        apart = [a - b for a, b in zip(each["psnr"], base, strict=True)]
        row = [name, f"{each['took']:.0f}", f"{each['loss']:.5f}"]
        row += [f"{statistics.mean(each['psnr']):.3f}", f"{statistics.mean(apart):+.4f}"]
        rows.append([*row, f"{max(apart, key=abs):+.4f}"])
    return rows


def agreement_section(asked: argparse.Namespace) -> Section:
    """Whether a training by our operators ends where one by PyTorch's own does."""
    cell = {
        "measure": "training_step:agreement",
        "contestants": [OURS, PYTORCH],
        "variant": contestants.tiny(asked.quick),
        "iterations": 2 if asked.quick else 300,
        "batch": 2 if asked.quick else BATCH,
        "patch": 12 if asked.quick else 24,
    }
    return Section(
        name="agreement",
        title="Training by our operators and by PyTorch's",
        cells=[cell],
        columns="operators | s | last loss | Y-PSNR | minus PyTorch's | on the worst image",
        rows=_agreement_rows,
        notes=lambda records: [
            f"Tiny x{SCALE} from one seed, {cell['iterations']} iterations of the same batches of",
            f"{cell['batch']} patches of {cell['patch']}x{cell['patch']}, by L1 and Adam, from",
            f"{TRAINED_ON} images of BSDS400. PSNR in dB of Y, unrounded, is the mean over Set14",
            "(where these are not at hand, scikit-image's photographs are taken). Rounding differs",
            "between any two forms, those of PyTorch among them;",
            f"where ours is more than {TOLERANCE} dB from PyTorch's the benchmark fails.",
            *["**It failed: the trainings do not agree.**" for r in records if "broken" in r],
        ],
        rounds=1,
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure training steps, or compare trainings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agreement", action="store_true", help=agreement_section.__doc__)

    def sections(asked: argparse.Namespace) -> list[Section]:
        return [agreement_section(asked) if asked.agreement else step_section(asked)]

    return measuring.run(sections, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
