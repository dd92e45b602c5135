"""Validation and test of BasicSR's models for single images, of any class.

Images are loaded by workers and divided among the processes; PSNR and SSIM are taken where the
output is; and all processes get the figures of all images, whose means do not depend on how they
were divided. File names, the log's lines and what the model keeps are BasicSR's.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

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
from torch import Tensor
from torch.nn import functional as F

from dlgsanet_arch import metrics
from dlgsanet_arch.averaging import bare, networks_of
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named, write_atomically
from dlgsanet_arch.pipeline import reports
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.reports import Evaluation, Row
from dlgsanet_arch.pipeline.samples import Samples, load, preserved_generators
from dlgsanet_arch.progress import progress_bar
from dlgsanet_arch.tiles import Run, run_in_tiles, self_ensemble

DEFAULT_OVERLAP = 32  # of tiles, in LR pixels; at most half a tile

# What a validation's images are shown as in TensorBoard: few, and their middle.
_SHOWN_IMAGES, _SHOWN_SIDE = 4, 512

_ON_DEVICE: dict[str, Callable[[metrics.Compared], Tensor]] = {
    "calculate_psnr": metrics.Compared.psnr,
    "calculate_ssim": metrics.Compared.ssim,
}
Wanted = Mapping[str, Mapping[str, Any]]  # `val:metrics`
Figures = dict[str, float]  # by metric

# The Real-ESRGAN models' own method sets is_train to False around SRModel's, and so do we.
_WITHOUT_SYNTHESIS = (RealESRGANModel.nondist_validation, RealESRNetModel.nondist_validation)
_REPLACED = {
    "validation": (BaseModel.validation,),
    "dist_validation": (SRModel.dist_validation,),
    "nondist_validation": (SRModel.nondist_validation, *_WITHOUT_SYNTHESIS),
}


class EvaluationError(UserError):
    """An image that cannot be read, run, measured or written; the message names it."""


class Images:
    """A validation or test set's images in the order of their paths, one at a time.

    Iterated over, it gives all of them, as BasicSR's own validations want. `shared` has the numbers
    of this process's: every world-th from its rank. `num_worker_per_gpu` (default 1) workers read.
    """

    def __init__(self, dataset_opt: Mapping[str, Any], processes: Processes) -> None:
        self.dataset = Samples(build_dataset(dataset_opt))
        if len(self) == 0:
            raise EvaluationError(f"the data set {dataset_opt['name']} has no image")
        self.shared = range(processes.rank, len(self), processes.world)
        workers = dataset_opt.get("num_worker_per_gpu")
        self._workers = 1 if workers is None else int(workers)
        self._pin_memory = bool(dataset_opt.get("pin_memory")) and torch.cuda.is_available()

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (batch for _, batch in self.read(range(len(self))))

    def read(self, numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and content of each of these images."""
        workers = min(self._workers, len(numbers))
        each_alone = [[number] for number in numbers]
        read = load(self.dataset, each_alone, workers, pin_memory=self._pin_memory)
        for number, (batch, bad) in zip(numbers, read, strict=True):
            if batch is None:
                fix = "; fix the file or take it out (`dlgsanet data verify` names all)"
                raise EvaluationError(f"{bad[0]}{fix if bad[0].sample else ''}")
            yield number, batch


def _test(model: Any) -> None:
    """Do what `model.test()` does, with the ensemble and the tiles that the options ask for."""
    wanted = model.opt["val"]
    tile = int(wanted.get("tile") or 0)
    if not wanted.get("self_ensemble") and not tile:
        model.test()
        return

    def tensor(name: str) -> Tensor:
        if not torch.is_tensor(value := getattr(model, name, None)):
            raise EvaluationError(
                "val:self_ensemble and val:tile give images as `lq` to a model's test() and take "
                f"`output` from it; {type(model).__name__} has no `{name}`: leave them out"
            )
        return value

    def run(image: Tensor) -> Tensor:
        model.lq = image
        model.test()
        return tensor("output")

    given = tensor("lq")
    compute: Run = partial(self_ensemble, run) if wanted.get("self_ensemble") else run
    if tile:
        overlap = wanted.get("tile_overlap")
        overlap = min(DEFAULT_OVERLAP, tile // 2) if overlap is None else int(overlap)
        output = run_in_tiles(compute, given, model.opt.get("scale", 1), tile, overlap)
    else:
        output = compute(given)
    model.lq, model.output = given, output


def _forget_image(model: Any) -> None:
    """Free the current image; a set without ground truth would be given the last one's."""
    for name in ("lq", "gt", "output"):
        vars(model).pop(name, None)


def result(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return output, ground truth and LR of an image, on the device where they can be."""
    _forget_image(model)
    model.feed_data(batch)
    _test(model)
    if type(model).get_current_visuals is SRModel.get_current_visuals:
        output, target = model.output.detach(), getattr(model, "gt", None)
    else:
        visuals = model.get_current_visuals()
        output, target = visuals["result"], visuals.get("gt")
    lq = getattr(model, "lq", None)
    _forget_image(model)
    return output, target, lq


def _needs_target(metric: Mapping[str, Any]) -> bool:
    """Whether a metric of `val:metrics` compares with a ground truth."""
    if metric["type"] in _ON_DEVICE:
        return True
    parameters = inspect.signature(METRIC_REGISTRY.get(metric["type"])).parameters
    return "img2" in parameters and parameters["img2"].default is inspect.Parameter.empty


def measurable(wanted: Wanted, target: Tensor | None) -> Wanted:
    """Return the metrics that can be measured, with a ground truth or without."""
    return {n: each for n, each in wanted.items() if target is not None or not _needs_target(each)}


def measure(output: Tensor, target: Tensor | None, wanted: Wanted, image: str) -> Figures:
    """Return the figures of one image; one that cannot be computed is an EvaluationError.

    Output and ground truth are (1, C, H, W), RGB in [0, 1]; `image` names them in messages.
    """

    @cache
    def compared(crop_border: int, y_channel: bool) -> metrics.Compared:
        return metrics.compare(output, target, crop_border=crop_border, y_channel=y_channel)

    @cache
    def images() -> dict[str, np.ndarray]:
        pair = {"img": output} if target is None else {"img": output, "img2": target}
        return {name: tensor2img([tensor]) for name, tensor in pair.items()}

    figures: Figures = {}
    for name, metric in wanted.items():
        try:
            if metric["type"] in _ON_DEVICE:
                settings = int(metric["crop_border"]), bool(metric.get("test_y_channel", False))
                figures[name] = _ON_DEVICE[metric["type"]](compared(*settings)).item()
            else:
                figures[name] = float(calculate_metric(images(), metric))
        except Exception as error:  # a metric may raise anything on an image that it cannot take
            height, width = output.shape[-2:]
            raise EvaluationError(
                f"val:metrics:{name}: {image} of {width}x{height} pixels cannot be measured by "
                f"{metric['type']} ({type(error).__name__}: {error}); take the image out, or leave "
                "the metric out"
            ) from error
    return figures


def _bicubic(lq: Tensor | None, target: Tensor | None, wanted: Wanted) -> Figures:
    """Return PSNR and SSIM of LR enlarged by bicubic interpolation, for comparison."""
    if lq is None or target is None or lq.shape[1] != target.shape[1]:
        return {}
    # With antialias PyTorch's kernel is the usual one (a = -0.5); enlarging, nothing is smoothed.
    enlarged = F.interpolate(
        lq.float(), size=target.shape[-2:], mode="bicubic", antialias=True, align_corners=False
    )
    wanted = {name: metric for name, metric in wanted.items() if metric["type"] in _ON_DEVICE}
    return measure(enlarged, target, wanted, "the bicubic enlargement")


def _save(image: Tensor, opt: Mapping[str, Any], dataset: str, name: str, label: object) -> None:
    """Save an image of a validation or test where BasicSR does."""
    folder = Path(opt["path"]["visualization"])
    if opt["is_train"]:
        path = folder / name / f"{name}_{label}.png"
    else:
        path = folder / dataset / f"{name}_{opt['val'].get('suffix') or opt['name']}.png"
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


def _measure_share(
    model: Any, images: Images, label: int | str, processes: Processes, save_img: bool, shown: int
) -> list[tuple[int, Row, np.ndarray | None]]:
    """Run, measure and save the images of this process.

    Returns for each image its number in the data set, its figures, and what TensorBoard shows, for
    the set's first `shown` images.
    """
    opt, dataset, found = model.opt, images.dataset.opt["name"], []
    asked = opt["val"].get("metrics") or {}
    first = opt["is_train"] and dataset not in getattr(model, "best_metric_results", {})
    hidden = not opt["val"].get("pbar", True) or not processes.is_main
    with progress_bar("", len(images.shared), "image", transient=True, hidden=hidden) as bar:
        for number, batch in images.read(images.shared):
            name = Path(batch["lq_path"][0]).stem
            output, target, lq = result(model, batch)
            wanted = measurable(asked, target)
            if output.isfinite().all():
                figures = measure(output, target, wanted, f"{name} of the data set {dataset}")
            else:
                figures = dict.fromkeys(wanted, math.nan)
                get_root_logger().warning(
                    f"the output of {name} of the data set {dataset} is not finite (nan or inf): "
                    "its figures are nan, and so are the means"
                )
            row = Row(name, figures, _bicubic(lq, target, wanted) if first else {})
            found.append((number, row, _shown(output) if number < shown else None))
            if save_img:
                _save(output, opt, dataset, name, label)
            bar.set_postfix_str(name)
            bar.update()
    return found


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Leave a model's networks and this process's random numbers as they are.

    In the block, networks are without DistributedDataParallel: it sends buffers in each forward,
    and processes with one image less would be waited for.
    """
    networks = networks_of(model)
    modes = [(each, each.training) for net in networks.values() for each in net.modules()]
    is_train = model.is_train
    if type(model).nondist_validation in _WITHOUT_SYNTHESIS:
        model.is_train = False
    vars(model).update({name: bare(network) for name, network in networks.items()})
    try:
        with preserved_generators(), torch.no_grad():
            yield
    finally:
        model.is_train = is_train
        vars(model).update(networks)
        for module, mode in modes:
            module.training = mode


def validate(
    model: Any,
    processes: Processes,
    images: Images,
    iteration: int | str,
    tb_logger: Any,
    save_img: bool,
) -> Evaluation:
    """Validate a model; every process calls, and each gets the complete result."""
    shows = processes.share(tb_logger is not None and model.opt["is_train"])
    shown = _SHOWN_IMAGES if shows else 0
    with processes.agreed(), undisturbed(model):
        measured = _measure_share(model, images, iteration, processes, save_img, shown)
    everything = sorted(chain(*processes.gather(measured)), key=lambda each: each[0])
    dataset, wanted = images.dataset.opt["name"], model.opt["val"].get("metrics") or {}
    found = reports.summarise(dataset, iteration, [row for _, row, _ in everything], wanted)
    if wanted:
        reports.keep(model, found)
    if processes.is_main:
        if left_out := [name for name in wanted if name not in found.means]:
            get_root_logger().warning(
                f"the data set {dataset} has no ground truth: {', '.join(left_out)} of val:metrics "
                "cannot be measured on it"
            )
        reports.log(model, found, tb_logger)
        for _, row, image in everything:
            if image is not None:
                tb_logger.add_image(f"validation/{dataset}/{row.name}", image, iteration)
    return found


def validate_by(own: Callable, model: Any, processes: Processes, *arguments: Any) -> Evaluation:
    """Call the validation that a model's class brings, which works on the main process alone."""
    images, iteration, *_ = arguments
    with processes.agreed(), undisturbed(model):
        own(*arguments)
    results = getattr(model, "metric_results", None) or {}
    means = processes.share({name: float(value) for name, value in results.items()})
    return Evaluation(images.dataset.opt["name"], iteration, (), means)


def foreign_method(kind: type) -> str | None:
    """Name the method by which a class of models validates in its own way, if it has one."""
    replaced = (name for name, known in _REPLACED.items() if getattr(kind, name, None) not in known)
    return next(replaced, None)
