"""Validation and test of BasicSR's models for single images, of any class.

`install` puts it on the model that `build_model` returned. Images are loaded by workers and
divided among the processes; PSNR and SSIM are taken where the output is; and all processes get the
figures of all images, whose means do not depend on how they were divided. File names, the log's
lines and what the model keeps are BasicSR's.
"""

import csv
import inspect
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from basicsr.data import build_dataset
from basicsr.metrics import calculate_metric
from basicsr.models.base_model import BaseModel
from basicsr.models.realesrgan_model import RealESRGANModel
from basicsr.models.realesrnet_model import RealESRNetModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dlgsanet_arch import metrics
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, write_atomically, write_json
from dlgsanet_arch.pipeline.logs import progress_bar
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import Samples, collate, preserved_randomness, start_worker
from dlgsanet_arch.pipeline.saving import bare
from dlgsanet_arch.tiles import Run, run_in_tiles, self_ensemble

DEFAULT_OVERLAP = 32  # of tiles, in LR pixels; at most half a tile
REPORT = "evaluation.json"

# What a validation's images are shown as in TensorBoard: few, and their middle.
_SHOWN_IMAGES, _SHOWN_SIDE = 4, 512

_ON_DEVICE: dict[str, Callable[[metrics.Compared], Tensor]] = {
    "calculate_psnr": metrics.Compared.psnr,
    "calculate_ssim": metrics.Compared.ssim,
}

# The Real-ESRGAN models' own method sets is_train to False around SRModel's, and so do we.
_WITHOUT_SYNTHESIS = (RealESRGANModel.nondist_validation, RealESRNetModel.nondist_validation)
_REPLACED = {
    "validation": (BaseModel.validation,),
    "dist_validation": (SRModel.dist_validation,),
    "nondist_validation": (SRModel.nondist_validation, *_WITHOUT_SYNTHESIS),
}


class EvaluationError(UserError):
    """An image that cannot be read, run, measured or written; the message names it."""


class Row(NamedTuple):
    """One image.

    Args:
        name: Its file's name without suffix.
        values: The figure of each metric: inf for the PSNR of identical images, nan where the
            network's output was not finite.
    """

    name: str
    values: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What a validation or a test found.

    Args:
        dataset: Name of the data set.
        iteration: The iteration validated, or in a test the name of the run.
        rows: All images in the order of their paths; none where a model has a validation of
            its own.
        means: Of each metric, over all images but the identical ones; inf where all are.
        identical: Number of images that equal the ground truth, so that their PSNR is inf.
    """

    dataset: str
    iteration: int | str
    rows: tuple[Row, ...]
    means: dict[str, float]
    identical: int = 0


class Images:
    """A data set's images in the order of their paths, one at a time; made by `build_loader`.

    Iterated over, it gives all of them, as BasicSR's own validations want; `share` gives those of
    this process.

    Args:
        dataset: What is read.
        processes: The processes of the run.
        workers: Number of processes that read for this one; 0 reads in this one.
        pin_memory: As for a DataLoader.
    """

    def __init__(
        self, dataset: Samples, processes: Processes, *, workers: int, pin_memory: bool
    ) -> None:
        self.dataset = dataset
        self.shared = range(processes.rank, len(dataset), processes.world)
        self._workers = workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (batch for _, batch in self._read(range(len(self))))

    def share(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Give number and content of each image of this process: every world-th from its rank.

        Raises:
            EvaluationError: An image cannot be read.
        """
        return self._read(self.shared)

    def _read(self, numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
        loader = DataLoader(
            self.dataset,
            sampler=numbers,
            num_workers=min(self._workers, len(numbers)),
            collate_fn=collate,
            worker_init_fn=start_worker,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # or starting to read would draw from the global one
        )
        for number, (batch, bad) in zip(numbers, loader, strict=True):
            if batch is None:
                raise EvaluationError(
                    f"{bad[0]}; fix the file or take it out (`dlgsanet data verify` names all)"
                )
            yield number, batch


def build_loader(dataset_opt: Mapping[str, Any], processes: Processes) -> Images:
    """Build a data set of an option file and what reads its images.

    Args:
        dataset_opt: A `val` or `test` entry of `datasets`; `num_worker_per_gpu` (default 1) says
            how many workers read.
        processes: The processes of the run, among which the images are divided.

    Raises:
        EvaluationError: The data set has no image.
    """
    dataset = build_dataset(dataset_opt)
    if len(dataset) == 0:
        raise EvaluationError(f"the data set {dataset_opt['name']} has no image")
    workers = dataset_opt.get("num_worker_per_gpu")
    return Images(
        Samples(dataset),
        processes,
        workers=1 if workers is None else int(workers),
        pin_memory=bool(dataset_opt.get("pin_memory")) and torch.cuda.is_available(),
    )


def _run_otherwise(model: Any) -> None:
    """Do what `model.test()` does, with the ensemble and the tiles that the options ask for."""
    wanted = model.opt["val"]
    tile = int(wanted.get("tile") or 0)
    if not wanted.get("self_ensemble") and not tile:
        model.test()
        return

    def run(image: Tensor) -> Tensor:
        model.lq = image
        model.test()
        return _tensor_of(model, "output")

    given = _tensor_of(model, "lq")
    whole: Run = partial(self_ensemble, run) if wanted.get("self_ensemble") else run
    if tile:
        overlap = wanted.get("tile_overlap")
        overlap = min(DEFAULT_OVERLAP, tile // 2) if overlap is None else int(overlap)
        output = run_in_tiles(whole, given, model.opt.get("scale", 1), tile, overlap)
    else:
        output = whole(given)
    model.lq, model.output = given, output


def _tensor_of(model: Any, name: str) -> Tensor:
    value = getattr(model, name, None)
    if not torch.is_tensor(value):
        raise EvaluationError(
            f"val:self_ensemble and val:tile give images as `lq` to a model's test() and take "
            f"`output` from it; {type(model).__name__} has no `{name}`: leave them out"
        )
    return value


def _result(model: Any) -> tuple[Tensor, Tensor | None]:
    """Return output and ground truth of the image at hand, on the device where they can be."""
    if type(model).get_current_visuals is SRModel.get_current_visuals:
        return model.output.detach(), getattr(model, "gt", None)
    visuals = model.get_current_visuals()
    return visuals["result"], visuals.get("gt")


def _forget_image(model: Any) -> None:
    """Free the image at hand; a set without ground truth would be given the last one's."""
    for name in ("lq", "gt", "output"):
        vars(model).pop(name, None)


def _needs_target(metric: Mapping[str, Any]) -> bool:
    if metric["type"] in _ON_DEVICE:
        return True
    parameters = inspect.signature(METRIC_REGISTRY.get(metric["type"])).parameters
    return "img2" in parameters and parameters["img2"].default is inspect.Parameter.empty


def _measure(
    output: Tensor, target: Tensor | None, wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor | float]:
    """Return the figures of one image, PSNR and SSIM as tensors where the output is.

    Raises:
        ValueError: The two cannot be compared.
    """
    figures: dict[str, Tensor | float] = {}
    compared: dict[tuple[int, bool], metrics.Compared] = {}
    images: dict[str, np.ndarray] = {}
    for name, metric in wanted.items():
        if metric["type"] in _ON_DEVICE:
            key = int(metric["crop_border"]), bool(metric.get("test_y_channel", False))
            if key not in compared:
                crop_border, y_channel = key
                compared[key] = metrics.compare(
                    output, target, crop_border=crop_border, y_channel=y_channel
                )
            figures[name] = _ON_DEVICE[metric["type"]](compared[key])[0]
            continue
        if not images:
            images["img"] = tensor2img([output])
            if target is not None:
                images["img2"] = tensor2img([target])
        figures[name] = float(calculate_metric(images, metric))
    return figures


def _file(opt: Mapping[str, Any], dataset: str, name: str, iteration: int | str) -> Path:
    """Where BasicSR saves an image of a validation or test."""
    folder = Path(opt["path"]["visualization"])
    if opt["is_train"]:
        return folder / name / f"{name}_{iteration}.png"
    return folder / dataset / f"{name}_{opt['val'].get('suffix') or opt['name']}.png"


def _save(image: Tensor, path: Path) -> None:
    with disk_faults_named(f"the image {path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, cv2.imencode(".png", tensor2img([image]))[1].tobytes())


def _shown(image: Tensor) -> np.ndarray:
    """Return the middle of an image (1, C, H, W) as TensorBoard takes it, (C, H, W) uint8."""
    image = image[0]
    for axis in (1, 2):
        size = min(image.shape[axis], _SHOWN_SIDE)
        image = image.narrow(axis, (image.shape[axis] - size) // 2, size)
    return metrics.to_8_bits(image).nan_to_num().to(torch.uint8).cpu().numpy()


class _Measured(NamedTuple):
    """An image's place in the data set, its row, and what TensorBoard is to show of it."""

    number: int
    row: Row
    shown: np.ndarray | None


def _fetch(figures: Sequence[dict[str, Tensor | float]]) -> list[dict[str, float]]:
    """Return figures as numbers; those on a device come in one piece."""
    on_device = [value for each in figures for value in each.values() if torch.is_tensor(value)]
    numbers = iter(torch.stack([each.double() for each in on_device]).tolist() if on_device else ())
    return [
        {name: next(numbers) if torch.is_tensor(value) else value for name, value in each.items()}
        for each in figures
    ]


_FINITE = "output is finite"  # beside the metrics, until the figures are fetched


def _measure_share(
    model: Any,
    images: Images,
    iteration: int | str,
    processes: Processes,
    *,
    save_img: bool,
    shown: int,
) -> list[_Measured]:
    """Run, measure and save the images of this process.

    Args:
        model: Of any class that BasicSR's validation works with.
        images: What is read.
        iteration: In names of files.
        processes: The processes of the run.
        save_img: Whether images are saved.
        shown: Number of images of the data set that TensorBoard shows.

    Raises:
        EvaluationError: An image cannot be read or measured.
        UserError: An image cannot be written.
    """
    opt, dataset = model.opt, images.dataset.opt["name"]
    wanted = dict(opt["val"].get("metrics") or {})
    numbers, names, figures, thumbnails = [], [], [], []
    with_bar = opt["val"].get("pbar", True)
    with (
        progress_bar(processes, len(images.shared), 0, "image")
        if with_bar
        else nullcontext() as bar
    ):
        for number, batch in images.share():
            name = Path(batch["lq_path"][0]).stem
            _forget_image(model)
            model.feed_data(batch)
            _run_otherwise(model)
            output, target = _result(model)
            _forget_image(model)
            if target is None:
                wanted = _without_target(wanted, dataset)
            finite = output.isfinite().all()  # before tensor2img, which clamps in place on a CPU
            try:
                found = _measure(output, target, wanted)
            except ValueError as error:
                raise EvaluationError(f"{name} of the data set {dataset}: {error}") from error
            figures.append({_FINITE: finite, **found})
            numbers.append(number)
            names.append(name)
            thumbnails.append(_shown(output) if number < shown else None)
            if save_img:
                _save(output, _file(opt, dataset, name, iteration))
            if bar is not None:
                bar.set_postfix_str(name)
                bar.update()
    rows = [
        _row(name, values, dataset) for name, values in zip(names, _fetch(figures), strict=True)
    ]
    return [_Measured(*each) for each in zip(numbers, rows, thumbnails, strict=True)]


def _without_target(
    wanted: dict[str, Mapping[str, Any]], dataset: str
) -> dict[str, Mapping[str, Any]]:
    """Leave out the metrics that compare, with a warning the first time."""
    possible = {name: metric for name, metric in wanted.items() if not _needs_target(metric)}
    if left_out := [name for name in wanted if name not in possible]:
        get_root_logger().warning(
            f"the data set {dataset} has no ground truth: {', '.join(left_out)} of val:metrics "
            "cannot be measured on it"
        )
    return possible


def _row(name: str, values: dict[str, float], dataset: str) -> Row:
    if not values.pop(_FINITE):
        get_root_logger().warning(
            f"the output of {name} of the data set {dataset} is not finite (nan or inf): its "
            "figures are nan, and so are the means"
        )
        return Row(name, dict.fromkeys(values, math.nan))
    return Row(name, values)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Leave a model's networks and this process's random numbers as they are.

    In the block, networks are without DistributedDataParallel: it sends buffers in each forward,
    and processes with one image less would be waited for.
    """
    networks = {
        name: value
        for name, value in vars(model).items()
        if name.startswith("net_") and isinstance(value, nn.Module)
    }
    modes = [(each, each.training) for net in networks.values() for each in net.modules()]
    on_cuda = torch.device(model.device).type == "cuda"
    devices = [torch.cuda.current_device()] if on_cuda else []
    vars(model).update({name: bare(network) for name, network in networks.items()})
    try:
        with preserved_randomness(), torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        vars(model).update(networks)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _without_synthesis(model: Any) -> Iterator[None]:
    """Let the Real-ESRGAN models take images as they are."""
    if type(model).nondist_validation not in _WITHOUT_SYNTHESIS:
        yield
        return
    before, model.is_train = model.is_train, False
    try:
        yield
    finally:
        model.is_train = before


def _mean(values: Sequence[float], *, higher_is_better: bool) -> float:
    """Return the mean of all but the identical images' figures, the same in whatever order."""
    counted = [value for value in values if not (higher_is_better and value == math.inf)]
    return math.fsum(counted) / len(counted) if counted else math.inf


def _higher_is_better(metric: Mapping[str, Any]) -> bool:
    return metric.get("better", "higher") == "higher"


def _summary(
    dataset: str,
    iteration: int | str,
    rows: Sequence[Row],
    wanted: Mapping[str, Mapping[str, Any]],
) -> Evaluation:
    means = {
        name: _mean([row.values[name] for row in rows], higher_is_better=_higher_is_better(metric))
        for name, metric in wanted.items()
        if all(name in row.values for row in rows)
    }
    identical = [
        sum(row.values[name] == math.inf for row in rows)
        for name in means
        if _higher_is_better(wanted[name])
    ]
    return Evaluation(dataset, iteration, tuple(rows), means, max(identical, default=0))


def _keep(model: Any, found: Evaluation) -> None:
    """Note means and bests on the model, as BasicSR does."""
    model.metric_results = dict(found.means)
    if not hasattr(model, "best_metric_results"):
        model.best_metric_results = {}
    record = model.best_metric_results.setdefault(found.dataset, {})
    for name, metric in (model.opt["val"].get("metrics") or {}).items():
        rises = _higher_is_better(metric)
        worst = -math.inf if rises else math.inf
        best = record.setdefault(
            name, {"better": metric.get("better", "higher"), "val": worst, "iter": -1}
        )
        value = found.means.get(name, math.nan)
        if value >= best["val"] if rises else value <= best["val"]:
            best["val"], best["iter"] = value, found.iteration


def _report(model: Any, found: Evaluation, tb_logger: Any) -> None:
    """Write BasicSR's lines to the log and its scalars to TensorBoard."""
    if not found.means:
        return
    lines = [f"Validation {found.dataset}\n"]
    for name, value in found.means.items():
        best = model.best_metric_results[found.dataset][name]
        line = f"\t # {name}: {value:.4f}\tBest: {best['val']:.4f} @ {best['iter']} iter"
        if found.identical and any(row.values[name] == math.inf for row in found.rows):
            line += f"\tidentical (inf, not in the mean): {found.identical} of {len(found.rows)}"
        lines.append(f"{line}\n")
        if tb_logger is not None:
            tb_logger.add_scalar(f"metrics/{found.dataset}/{name}", value, found.iteration)
    get_root_logger().info("".join(lines))


def _validate(
    model: Any,
    processes: Processes,
    dataloader: Images,
    current_iter: int | str,
    tb_logger: Any,
    save_img: bool = False,
) -> Evaluation:
    """Stand in for a model's `validation`; every process calls, and each gets the whole result.

    Raises:
        UserError: An image cannot be read, measured or written.
    """
    dataset = dataloader.dataset.opt["name"]
    shows = processes.share(tb_logger is not None and model.opt["is_train"])
    measured: list[_Measured] = []
    error: Exception | None = None
    try:
        with _undisturbed(model), _without_synthesis(model):
            measured = _measure_share(
                model,
                dataloader,
                current_iter,
                processes,
                save_img=save_img,
                shown=_SHOWN_IMAGES if shows else 0,
            )
    except Exception as caught:  # the others wait for this process, and are to learn of it
        error = caught
    processes.agree(error)
    everything = [each for share in processes.gather(measured) for each in share]
    everything.sort(key=lambda each: each.number)
    wanted = model.opt["val"].get("metrics") or {}
    found = _summary(dataset, current_iter, [each.row for each in everything], wanted)
    if wanted:
        _keep(model, found)
    if processes.is_main:
        _report(model, found, tb_logger)
        for _, row, shown in everything:
            if shown is not None:
                tb_logger.add_image(f"validation/{dataset}/{row.name}", shown, current_iter)
    return found


def _validate_by_its_own(
    model: Any,
    processes: Processes,
    validation: Callable[..., None],
    dataloader: Images,
    current_iter: int | str,
    tb_logger: Any,
    save_img: bool = False,
) -> Evaluation:
    """Call the validation that a model's class brings, which works on the main process alone."""
    error: Exception | None = None
    try:
        with _undisturbed(model):
            validation(dataloader, current_iter, tb_logger, save_img)
    except Exception as caught:  # as in _validate
        error = caught
    processes.agree(error)
    results = getattr(model, "metric_results", None) or {}
    means = processes.share({name: float(value) for name, value in results.items()})
    return Evaluation(dataloader.dataset.opt["name"], current_iter, (), means)


def install(model: Any, processes: Processes) -> None:
    """Make `model.validation` this module's, for a loader that `build_loader` made.

    It returns an `Evaluation` on every process, all of which call it. A model whose class brings a
    validation of its own keeps it, for the whole set on the main process, and the log says so; its
    `Evaluation` has no rows.

    Args:
        model: Of BasicSR's or a third party's, as `build_model` returned it.
        processes: The processes of the run.
    """
    for name, known in _REPLACED.items():
        if getattr(type(model), name, None) not in known:
            get_root_logger().info(
                f"{type(model).__name__} has a method {name} of its own: it validates and tests as "
                "that says, on the main process"
            )
            model.validation = partial(_validate_by_its_own, model, processes, model.validation)
            return
    model.validation = partial(_validate, model, processes)


def _readable(values: Mapping[str, float]) -> dict[str, float | str]:
    """Return figures for JSON, which has no inf and nan, as numbers or words."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def write_reports(evaluations: Sequence[Evaluation], folder: Path) -> None:
    """Write all figures of a test: `<data set>.csv` by image, and `evaluation.json` with means.

    Infinite figures are written as ``inf``, and undefined ones as ``nan``.

    Args:
        evaluations: Of different data sets.
        folder: Is made where it is missing; earlier reports are replaced.

    Raises:
        UserError: A file cannot be written.
    """
    with disk_faults_named(f"the reports in {folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        for each in evaluations:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["image", *each.means])
            table.writerows(
                [row.name, *(row.values[name] for name in each.means)] for row in each.rows
            )
            write_atomically(folder / f"{each.dataset}.csv", text.getvalue().encode())
        write_json(
            folder / REPORT,
            {
                each.dataset: {
                    "iteration": each.iteration,
                    "means": _readable(each.means),
                    "identical": each.identical,
                    "images": [{"image": row.name, **_readable(row.values)} for row in each.rows],
                }
                for each in evaluations
            },
        )
