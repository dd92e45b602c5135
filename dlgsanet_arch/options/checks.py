"""What must fit together: sizes and scale, schedule and length, losses, data and loaders.

Checks see options in which every value has passed the table; a wrong one is None, and an absent key
is absent. Each yields one line a problem: "path: what is wrong; the fix". What only building and a
step can show, such as arguments that a loss refuses, is found when the pipeline tries the run.
"""

from collections.abc import Iterator

from dlgsanet_arch.hints import suggest_or_list
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.options.context import Context, optimizers
from dlgsanet_arch.options.readers import matches, parameters_of
from dlgsanet_arch.options.schema import OURS, REAL, SCHEDULERS, known_model

_REAL_ESRGAN_PATCH = 400  # to which RealESRGANDataset cuts and pads its images


def _sizes(context: Context) -> Iterator[str]:
    """The network must enlarge by `scale`."""
    scale, network = context.options.get("scale"), context.section("network_g")
    if scale is None:
        return
    if network.get("type") == "DLGSANet":
        parameters = parameters_of(DLGSANet)
        upsampler, upscale = (
            network.get(name, parameters[name].default) for name in ("upsampler", "upscale")
        )
        upscale = 1 if upsampler == "" else upscale
        if None not in (upsampler, upscale) and upscale != scale:
            reason = " (its upscale)" if upsampler else ", as without an upsampler"
            yield f"scale: is {scale}, but network_g enlarges by {upscale}{reason}; make them equal"
    for name in ("upscale", "scale") if network.get("type") != "DLGSANet" else ():
        if network.get(name) not in (None, scale):
            yield f"network_g:{name}: is {network[name]}, but scale is {scale}; make them equal"


def _optimizers(context: Context) -> Iterator[str]:
    """BasicSR knows Adam and three schedulers, and refuses others after the run began."""
    model = known_model(context)
    if model is None or not context.train:
        return
    for path, section in context.sections():
        if matches(path, "train:optim_*") and section.get("type") is not None:
            kind, known = section["type"], optimizers() if model in OURS else ("Adam",)
            if kind not in known:
                hint = suggest_or_list(kind, known)
                if kind in optimizers():
                    hint = f" to this model; write Adam, or model_type: {OURS[0]}"
                yield f"{path}:type: {kind!r} is not known{hint}"
    kind = context.value("train:scheduler:type")
    if kind is not None and kind not in SCHEDULERS:
        yield f"train:scheduler:type: {kind!r} is not known{suggest_or_list(kind, SCHEDULERS)}"


def _schedule(context: Context) -> Iterator[str]:
    """BasicSR fails at the step behind the last period, and passes over what does not fit."""
    path, total = "train:scheduler", context.value("train:total_iter")
    scheduler = context.section(path)
    weights, name = scheduler.get("restart_weights", [1]), "restarts"
    starts = scheduler.get("restarts", [0])
    if scheduler.get("type") == SCHEDULERS[-1]:
        name = "periods"
        starts = scheduler.get(name)
        if starts is not None and total is not None and sum(starts) < total:
            yield (
                f"{path}:periods: their sum, {sum(starts)}, is less than train:total_iter {total}"
                ", where BasicSR's schedule fails; make the last period longer"
            )
    elif scheduler.get("type") not in SCHEDULERS:
        return
    for milestone in sorted({*(scheduler.get("milestones") or ())} & {*(starts or ())}):
        yield (
            f"{path}:milestones: {milestone} is a restart too, and BasicSR then passes over "
            "the milestone; remove one of them"
        )
    if None not in (starts, weights) and len(starts) != len(weights):
        yield (
            f"{path}:restart_weights: there are {len(weights)} for {len(starts)} {name}; "
            "write one for each"
        )


def _is_synthetic(context: Context) -> bool:
    """Whether a model of Real-ESRGAN makes LR images and cuts the patches itself."""
    synthetic = context.options.get("high_order_degradation", True) is not False
    return context.train and known_model(context) in REAL and synthetic


# A value that must be less than another, or a multiple of it.
_LESS = (
    ("train:warmup_iter", "train:total_iter", ", or the learning rate is never reached"),
    ("val:tile_overlap", "val:tile", ""),
)
_MULTIPLES = (("datasets:train:gt_size", "scale"),)
_SYNTHETIC_MULTIPLES = (("gt_size", "scale"), ("queue_size", "datasets:train:batch_size_per_gpu"))


def _numbers(context: Context) -> Iterator[str]:
    """Numbers must fit each other; BasicSR cuts patches of whole LR pixels, and queues batches."""
    for path, other, why in _LESS:
        value, limit = context.value(path), context.value(other)
        if value and limit and value >= limit:
            yield f"{path}: must be less than {other} {limit}{why}; got {value}"
    multiples = _MULTIPLES if context.train else ()
    for path, other in (*multiples, *(_SYNTHETIC_MULTIPLES if _is_synthetic(context) else ())):
        value, unit = context.value(path), context.value(other)
        if path == "queue_size" and path not in context.options:
            value = 180  # BasicSR's own
        if value and unit and value % unit:
            nearest = max(value // unit, 1) * unit
            yield f"{path}: {value} is not a multiple of {other} {unit}; write {nearest}"
    for end in ("", "2"):
        path, other = (f"datasets:train:kernel_{part}{end}" for part in ("prob", "list"))
        value, kernels = context.value(path), context.value(other)
        if value and kernels and len(value) != len(kernels):
            yield f"{path}: has {len(value)} for {len(kernels)} of {other}; write as many"
    gt_size = context.options.get("gt_size")
    if _is_synthetic(context) and gt_size and gt_size > _REAL_ESRGAN_PATCH:
        yield f"gt_size: is {gt_size}, but BasicSR cuts images to {_REAL_ESRGAN_PATCH}; write less"
    batch = context.value("datasets:train:batch_size_per_gpu")
    parts = context.value("train:accumulation")
    if batch and parts and parts > batch:
        yield f"train:accumulation: a batch of {batch} has no {parts} parts; write {batch} or less"


def _window(context: Context) -> Iterator[str]:
    """SwinIRModel pads images to whole windows, whatever the network."""
    network = context.section("network_g")
    swinir = known_model(context) == "SwinIRModel"
    if swinir and network.get("type") and "window_size" not in network:
        yield "network_g:window_size: missing; SwinIRModel pads images by it; write 8"


def _phases(context: Context) -> Iterator[str]:
    """BasicSR knows a data set's phase by its key up to the underscore; results go by its name."""
    if not context.train and context.options.get("datasets") == {}:
        yield "datasets: there is nothing to test on; write a section test_1"
    names: dict[str, str] = {}
    for phase, dataset in context.datasets():
        kind = phase.split("_")[0]
        known = phase == "train" or kind == "val" if context.train else kind in ("val", "test")
        if not known:
            what = "training" if context.train else "testing"
            examples = "train, val, val_2" if context.train else "test_1, test_2"
            fault = f"no name for a data set when {what}; use names such as {examples}"
            yield f"datasets:{phase}: {fault}"
        name = dataset.get("name")
        if phase != "train" and name is not None and names.setdefault(name, phase) != phase:
            yield (
                f"datasets:{phase}:name: datasets:{names[name]} is named {name!r} too, and the "
                "results of one would be lost; write another name"
            )
    validates = context.train and context.section("val") and context.section("datasets")
    if validates and not any(phase.split("_")[0] == "val" for phase, _ in context.datasets()):
        yield "val: the file names no validation set; add datasets:val, or remove val"


def _best(context: Context) -> Iterator[str]:
    """What `save_best` names must be measured."""
    best = context.value("logger:save_best")
    if not context.train or best is None:
        return
    metrics = list(context.section("val:metrics"))
    dataset, _, metric = best.rpartition("/")
    if not metrics:
        yield "logger:save_best: val:metrics measures nothing; add a metric there, or write ~"
    elif metric not in metrics:
        yield f"logger:save_best: val:metrics has no {metric!r}{suggest_or_list(metric, metrics)}"
    names = [each.get("name") for phase, each in context.datasets() if phase[:3] == "val"]
    if dataset and None not in names and names and dataset not in names:
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
        if dataset.get("num_worker_per_gpu") == 0:
            for key in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
                if dataset.get(key):
                    yield f"{path}:{key}: needs workers; leave it out, or raise num_worker_per_gpu"


def _loggers(context: Context) -> Iterator[str]:
    """Weights & Biases is sent what TensorBoard gets."""
    tensorboard = context.value("logger:use_tb_logger")
    if context.train and context.value("logger:wandb:project") and not tensorboard:
        yield "logger:use_tb_logger: must be true for wandb; write true, or ~ for wandb:project"


CHECKS = (
    *(_sizes, _optimizers, _schedule, _numbers),
    *(_window, _phases, _best, _loaders, _loggers),
)
