"""Validation and test of BasicSR's models for single images, of any class.

Images are loaded by workers and divided among the processes; PSNR and SSIM are taken where the
output is; and all processes get the figures of all images, whose means do not depend on how they
were divided. File names, the log's lines and what the model keeps are BasicSR's.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from basicsr.metrics import calculate_metric
from basicsr.models.base_model import BaseModel
from basicsr.models.realesrgan_model import RealESRGANModel
from basicsr.models.realesrnet_model import RealESRNetModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from dlgsanet_arch import metrics
from dlgsanet_arch.averaging import bare
from dlgsanet_arch.files import disk_faults_named, write_atomically
from dlgsanet_arch.pipeline import randomness, reports
from dlgsanet_arch.pipeline.images import EvaluationError, Images
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.reports import Evaluation, Row
from dlgsanet_arch.progress import progress_bar
from dlgsanet_arch.tiles import Run, run_in_tiles, self_ensemble

DEFAULT_OVERLAP = 32  # of tiles, in LR pixels; at most half a tile

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


def needs_target(metric: Mapping[str, Any]) -> bool:
    """Return whether a metric of `val:metrics` compares with a ground truth."""
    if metric["type"] in _ON_DEVICE:
        return True
    parameters = inspect.signature(METRIC_REGISTRY.get(metric["type"])).parameters
    return "img2" in parameters and parameters["img2"].default is inspect.Parameter.empty


def measure(
    output: Tensor, target: Tensor | None, wanted: Mapping[str, Mapping[str, Any]], image: str
) -> dict[str, Tensor | float]:
    """Return the figures of one image, PSNR and SSIM as tensors where the output is.

    Args:
        output: (1, C, H, W), RGB in [0, 1].
        target: The ground truth, of the same shape, if there is one.
        wanted: `val:metrics`.
        image: What is measured, for the message.

    Raises:
        EvaluationError: A metric cannot be computed.
    """
    figures: dict[str, Tensor | float] = {}
    compared: dict[tuple[int, bool], metrics.Compared] = {}
    images: dict[str, np.ndarray] = {}
    for name, metric in wanted.items():
        try:
            if metric["type"] in _ON_DEVICE:
                key = int(metric["crop_border"]), bool(metric.get("test_y_channel", False))
                if key not in compared:
                    compared[key] = metrics.compare(
                        output, target, crop_border=key[0], y_channel=key[1]
                    )
                figures[name] = _ON_DEVICE[metric["type"]](compared[key])[0]
                continue
            if not images:
                images["img"] = tensor2img([output])
                if target is not None:
                    images["img2"] = tensor2img([target])
            figures[name] = float(calculate_metric(images, metric))
        except Exception as error:  # a metric may raise anything on an image that it cannot take
            height, width = output.shape[-2:]
            raise EvaluationError(
                f"val:metrics:{name}: {image} of {width}x{height} pixels cannot be measured by "
                f"{metric['type']} ({type(error).__name__}: {error}); take the image out, or leave "
                "the metric out"
            ) from error
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
    """An image: its place in the data set, its row, what TensorBoard is to show, and bicubic's."""

    number: int
    row: Row
    shown: np.ndarray | None
    bicubic: dict[str, float]


def _fetch(figures: Sequence[dict[str, Tensor | float]]) -> list[dict[str, float]]:
    """Return figures as numbers; those on a device come in one piece."""
    on_device = [value for each in figures for value in each.values() if torch.is_tensor(value)]
    numbers = iter(torch.stack([each.double() for each in on_device]).tolist() if on_device else ())
    return [
        {name: next(numbers) if torch.is_tensor(value) else value for name, value in each.items()}
        for each in figures
    ]


_FINITE = "output is finite"  # beside the metrics, until the figures are fetched


def _bicubic(
    lq: Tensor | None, target: Tensor, wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor | float]:
    """Return PSNR and SSIM of LR enlarged by bicubic interpolation, for comparison."""
    wanted = {name: metric for name, metric in wanted.items() if metric["type"] in _ON_DEVICE}
    if lq is None or lq.shape[1] != target.shape[1]:
        return {}
    # With antialias PyTorch's kernel is the usual one (a = -0.5); enlarging, nothing is smoothed.
    enlarged = F.interpolate(
        lq.float(), size=target.shape[-2:], mode="bicubic", antialias=True, align_corners=False
    )
    return measure(enlarged, target, wanted, "the bicubic enlargement")


def _measure_share(
    model: Any,
    images: Images,
    iteration: int | str,
    processes: Processes,
    *,
    save_img: bool,
    shown: int,
    first: bool,
) -> list[_Measured]:
    """Run, measure and save the images of this process.

    Args:
        model: Of any class that BasicSR's validation works with.
        images: What is read.
        iteration: In names of files.
        processes: The processes of the run.
        save_img: Whether images are saved.
        shown: Number of images of the data set that TensorBoard shows.
        first: Whether bicubic enlargement is measured as well.

    Raises:
        EvaluationError: An image cannot be read or measured.
        UserError: An image cannot be written.
    """
    opt, dataset = model.opt, images.dataset.opt["name"]
    wanted = dict(opt["val"].get("metrics") or {})
    names, figures, bicubic, thumbnails = [], [], [], []
    hidden = not opt["val"].get("pbar", True) or not processes.is_main
    with progress_bar("", len(images.shared), "image", transient=True, hidden=hidden) as bar:
        for number, batch in images.share():
            name = Path(batch["lq_path"][0]).stem
            _forget_image(model)
            model.feed_data(batch)
            _run_otherwise(model)
            output, target = _result(model)
            lq = getattr(model, "lq", None)
            _forget_image(model)
            if target is None:
                wanted = _without_target(wanted, dataset)
            finite = output.isfinite().all()  # before tensor2img, which clamps in place on a CPU
            what = f"{name} of the data set {dataset}"
            figures.append({_FINITE: finite, **measure(output, target, wanted, what)})
            compares = first and target is not None
            bicubic.append(_bicubic(lq, target, wanted) if compares else {})
            names.append(name)
            thumbnails.append(_shown(output) if number < shown else None)
            if save_img:
                _save(output, _file(opt, dataset, name, iteration))
            bar.set_postfix_str(name)
            bar.update()
    found = _fetch(figures)
    rows = [_row(name, values, dataset) for name, values in zip(names, found, strict=True)]
    parts = zip(images.shared, rows, thumbnails, _fetch(bicubic), strict=True)
    return [_Measured(*each) for each in parts]


def _without_target(
    wanted: dict[str, Mapping[str, Any]], dataset: str
) -> dict[str, Mapping[str, Any]]:
    """Leave out the metrics that compare, with a warning the first time."""
    possible = {name: metric for name, metric in wanted.items() if not needs_target(metric)}
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
    and processes with one image less would be waited for. The Real-ESRGAN models take images as
    they are.
    """
    networks = {
        name: value
        for name, value in vars(model).items()
        if name.startswith("net_") and isinstance(value, nn.Module)
    }
    modes = [(each, each.training) for net in networks.values() for each in net.modules()]
    is_train = model.is_train
    if type(model).nondist_validation in _WITHOUT_SYNTHESIS:
        model.is_train = False
    vars(model).update({name: bare(network) for name, network in networks.items()})
    try:
        with randomness.preserved(), torch.no_grad():
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
    """Validate a model; every process calls, and each gets the complete result.

    Raises:
        UserError: An image cannot be read, measured or written.
    """
    dataset = images.dataset.opt["name"]
    shows = processes.share(tb_logger is not None and model.opt["is_train"])
    first = model.opt["is_train"] and dataset not in getattr(model, "best_metric_results", {})
    measured: list[_Measured] = []
    error: Exception | None = None
    try:
        with _undisturbed(model):
            measured = _measure_share(
                model,
                images,
                iteration,
                processes,
                save_img=save_img,
                shown=_SHOWN_IMAGES if shows else 0,
                first=first,
            )
    except Exception as caught:  # the others wait for this process, and are to learn of it
        error = caught
    processes.agree(error)
    everything = [each for share in processes.gather(measured) for each in share]
    everything.sort(key=lambda each: each.number)
    wanted = model.opt["val"].get("metrics") or {}
    bicubic = [each.bicubic for each in everything]
    rows = [each.row for each in everything]
    found = reports.summarise(dataset, iteration, rows, wanted, bicubic)
    if wanted:
        reports.keep(model, found)
    if processes.is_main:
        reports.log(model, found, tb_logger)
        for each in everything:
            if each.shown is not None:
                tag = f"validation/{dataset}/{each.row.name}"
                tb_logger.add_image(tag, each.shown, iteration)
    return found


def validate_by(
    own: Callable[..., None],
    model: Any,
    processes: Processes,
    images: Images,
    iteration: int | str,
    tb_logger: Any,
    save_img: bool,
) -> Evaluation:
    """Call the validation that a model's class brings, which works on the main process alone."""
    error: Exception | None = None
    try:
        with _undisturbed(model):
            own(images, iteration, tb_logger, save_img)
    except Exception as caught:  # as in validate
        error = caught
    processes.agree(error)
    results = getattr(model, "metric_results", None) or {}
    means = processes.share({name: float(value) for name, value in results.items()})
    return Evaluation(images.dataset.opt["name"], iteration, (), means)


def foreign_method(kind: type) -> str | None:
    """Name the method by which a class of models validates in its own way, if it has one."""
    replaced = (name for name, known in _REPLACED.items() if getattr(kind, name, None) not in known)
    return next(replaced, None)
