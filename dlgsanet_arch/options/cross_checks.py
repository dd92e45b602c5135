"""What must fit together: sizes and the scale, the schedule and its length, data and loaders."""

from collections.abc import Iterator, Mapping
from typing import Any

from dlgsanet_arch.hints import suggest_or_list
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.options.context import Context, is_number, is_whole
from dlgsanet_arch.options.schema import known_model, parameters_of


def _sizes(context: Context) -> Iterator[str]:
    """The network must enlarge by `scale`, and patches must have whole LR pixels."""
    scale = context.options.get("scale")
    if not is_whole(scale) or scale < 1:
        return  # missing and text are reported elsewhere
    network = context.section("network_g")
    if network.get("type") == "DLGSANet":
        parameters = parameters_of(DLGSANet)
        values = {name: entry.default for name, entry in parameters.items()} | dict(network)
        upscale = values["upscale"] if values["upsampler"] else 1
        if isinstance(upscale, int) and upscale != scale:
            reason = "" if values["upsampler"] else ", as without an upsampler"
            yield f"scale: is {scale}, but network_g enlarges by {upscale}{reason}; make them equal"
    gt_size = context.section("datasets:train").get("gt_size")
    if context.train and is_whole(gt_size) and gt_size % scale:
        yield (
            f"datasets:train:gt_size: {gt_size} is not a multiple of scale {scale}; "
            f"write {max(gt_size // scale, 1) * scale}"
        )


def _other_scales(context: Context) -> Iterator[str]:
    """Networks that are not ours say their scale as an argument, and fail in the first loss."""
    scale = context.options.get("scale")
    network = context.section("network_g")
    if network.get("type") == "DLGSANet":
        return
    for name in ("upscale", "scale"):
        value = network.get(name)
        if is_whole(scale) and is_whole(value) and value != scale:
            yield f"network_g:{name}: is {value}, but scale is {scale}; make them equal"


def _total(context: Context) -> float | None:
    total = context.section("train").get("total_iter")
    return total if context.train and is_number(total) else None


def _numbers_in(section: Mapping[str, Any], key: str, default: list[int]) -> list[Any] | None:
    """Return a list of numbers, None where it is something else."""
    value = section.get(key, default)
    return value if isinstance(value, list) and all(map(is_number, value)) else None


def _schedule(context: Context) -> Iterator[str]:
    """BasicSR fails at the step behind the last period, and passes over what does not fit."""
    total = _total(context)
    if total is None:
        return
    path = "train:scheduler"
    scheduler = context.section(path)
    weights = _numbers_in(scheduler, "restart_weights", [1])
    if scheduler.get("type") == "CosineAnnealingRestartLR":
        if "periods" not in scheduler:
            yield f"{path}:periods: missing; write `periods: [{int(total)}]`"
        periods = _numbers_in(scheduler, "periods", [])
        starts = periods or None  # missing, or wrong by itself
        if periods and sum(periods) < total:
            yield (
                f"{path}:periods: their sum, {sum(periods)}, is less than train:total_iter {total}"
                ", where BasicSR's schedule fails; make the last period longer"
            )
        name = "periods"
    elif scheduler.get("type") in ("MultiStepLR", "MultiStepRestartLR"):
        if "milestones" not in scheduler:
            yield f"{path}:milestones: missing; write `milestones: [{int(total // 2)}]`"
        starts = _numbers_in(scheduler, "restarts", [0])
        milestones = _numbers_in(scheduler, "milestones", [])
        for milestone in sorted(set(milestones or ()) & set(starts or ())):
            yield (
                f"{path}:milestones: {milestone} is a restart too, and BasicSR then passes over "
                "the milestone; remove one of them"
            )
        name = "restarts"
    else:
        return
    if starts is not None and weights is not None and len(starts) != len(weights):
        yield (
            f"{path}:restart_weights: there are {len(weights)} for {len(starts)} {name}; "
            "write one for each"
        )


def _warm_up(context: Context) -> Iterator[str]:
    total, warm_up = _total(context), context.section("train").get("warmup_iter")
    if total is not None and is_number(warm_up) and warm_up >= total:
        yield (
            f"train:warmup_iter: {warm_up} is not less than train:total_iter {total}: the learning "
            "rate would never be reached; write -1 for none"
        )


def _decay(context: Context) -> Iterator[str]:
    decay = context.section("train").get("ema_decay")
    if is_number(decay) and decay >= 1:
        yield f"train:ema_decay: must be less than 1, such as 0.999; got {decay!r}"


def _validation(context: Context) -> Iterator[str]:
    """BasicSR fails at the first validation without a data set."""
    phases = [phase for phase, _ in context.datasets()]
    validates = context.train and context.section("val")
    if validates and phases and not any(phase.split("_")[0] == "val" for phase in phases):
        yield "val: there is no data set to validate on; add datasets:val, or remove val"


def _best(context: Context) -> Iterator[str]:
    """What `save_best` names must be measured."""
    best = context.section("logger").get("save_best")
    if not context.train or best is None:
        return
    metrics = [str(name) for name in context.section("val:metrics")]
    dataset, _, metric = str(best).rpartition("/")
    if not metrics:
        yield "logger:save_best: val:metrics measures nothing; add a metric there, or write ~"
    elif metric not in metrics:
        yield f"logger:save_best: val:metrics has no {metric!r}{suggest_or_list(metric, metrics)}"
    names = [
        str(entry.get("name"))
        for phase, entry in context.datasets()
        if phase.split("_")[0] == "val"
    ]
    if dataset and names and dataset not in names:
        hint = suggest_or_list(dataset, names)
        yield f"logger:save_best: no validation set is named {dataset!r}{hint}"


def _loaders(context: Context) -> Iterator[str]:
    """Ways of loading that hang, or that need another key."""
    for phase, dataset in context.datasets():
        path = f"datasets:{phase}"
        mode = dataset.get("prefetch_mode")
        if mode == "cpu":
            yield (
                f"{path}:prefetch_mode: with cpu, one image that cannot be read makes BasicSR "
                "wait for ever; leave it out: workers read ahead without it"
            )
        elif mode == "cuda" and dataset.get("pin_memory") is not True:
            yield f"{path}:pin_memory: must be true for prefetch_mode: cuda; write true"
        elif mode not in (None, "cuda"):
            yield f"{path}:prefetch_mode: {mode!r} is not known; leave it out, or write cuda"
        if dataset.get("num_worker_per_gpu") == 0:
            for key in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
                if dataset.get(key):
                    yield f"{path}:{key}: needs workers; leave it out, or raise num_worker_per_gpu"


def _parts(context: Context) -> Iterator[str]:
    """A batch is worked on in parts, a large image in tiles."""
    batch = context.section("datasets:train").get("batch_size_per_gpu")
    parts = context.section("train").get("accumulation")
    if is_whole(batch) and is_whole(parts) and parts > batch:
        yield (
            f"train:accumulation: a batch of {batch} cannot be worked on in {parts} parts; "
            f"write {batch} or less"
        )
    validation = context.section("val")
    tile, overlap = validation.get("tile"), validation.get("tile_overlap")
    if is_whole(tile) and is_whole(overlap) and tile and overlap >= tile:
        yield f"val:tile_overlap: {overlap} must be less than val:tile {tile}"


def _queue(context: Context) -> Iterator[str]:
    """The models of Real-ESRGAN keep a queue of whole batches."""
    model = known_model(context)
    if not context.train or model is None or not model.real:
        return
    if context.options.get("high_order_degradation") is False:
        return
    batch = context.section("datasets:train").get("batch_size_per_gpu")
    size = context.options.get("queue_size", 180)
    if is_whole(batch) and is_whole(size) and batch > 0 and size % batch:
        yield (
            f"queue_size: {size} is not a multiple of batch_size_per_gpu {batch}; "
            f"write {max(size // batch, 1) * batch}"
        )


def _loggers(context: Context) -> Iterator[str]:
    """Weights & Biases is sent what TensorBoard gets."""
    logger = context.section("logger")
    project = context.section("logger:wandb").get("project")
    if context.train and project is not None and not logger.get("use_tb_logger"):
        yield "logger:use_tb_logger: must be true for wandb; write true, or ~ for wandb:project"


CHECKS = (
    _sizes,
    _other_scales,
    _schedule,
    _warm_up,
    _decay,
    _validation,
    _best,
    _loaders,
    _parts,
    _queue,
    _loggers,
)
