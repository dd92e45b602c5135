"""What must fit together: sizes and scale, schedule and length, losses, data and loaders.

Checks see options in which every value has passed the table; a wrong one is None, and an absent key
is absent. Each yields one line a problem: "path: what is wrong; the fix". What only building and a
step can show, such as arguments that a loss refuses, is found when the pipeline tries the run.
"""

from collections.abc import Iterator

from dlgsanet_arch.arguments import check_arguments
from dlgsanet_arch.configs import DEFAULTS
from dlgsanet_arch.hints import shown, suggest_or_list
from dlgsanet_arch.options.context import Context, optimizers
from dlgsanet_arch.options.schema import OURS, REAL, SCHEDULERS, known_dataset, known_model

_REAL_ESRGAN_PATCH = 400  # to which RealESRGANDataset cuts and pads its images


def _network(context: Context) -> Iterator[str]:
    """The network can be built and enlarges by `scale`; SwinIRModel pads images by its window."""
    scale, network = context.options.get("scale"), context.section("network_g")
    found = {**network}
    if network.get("type") == "DLGSANet":
        found = {**DEFAULTS, **network}
        try:
            if None not in network.values():  # else a wrong one is reported already
                check_arguments(found)
        except ValueError as error:
            yield f"network_g:{str(error).split()[0]}: {error}"
            return
        found["upscale"] = 1 if found["upsampler"] == "" else found["upscale"]
    for name in ("upscale", "scale"):
        if scale is not None and found.get(name) not in (None, scale):
            yield (
                f"network_g:{name}: network_g enlarges by {found[name]}, but scale is {scale}; "
                "make them equal"
            )
    swinir = known_model(context) == "SwinIRModel"
    if swinir and network.get("type") and "window_size" not in network:
        yield "network_g:window_size: missing; SwinIRModel pads images by it; write 8"


def _training(context: Context) -> Iterator[str]:
    """BasicSR knows Adam and three schedulers, and fails at the step behind the last period."""
    model, path = known_model(context), "train:scheduler"
    if model is None or not context.train:
        return
    known = optimizers() if model in OURS else ("Adam",)
    for name, section in context.section("train").items():
        kind = section.get("type") if name.startswith("optim_") and section else None
        if kind is not None and kind not in known:
            hint = suggest_or_list(kind, known)
            if kind in optimizers():
                hint = f" to this model; write Adam, or model_type: {OURS[0]}"
            yield f"train:{name}:type: {shown(kind)} is not known{hint}"
    scheduler, total = context.section(path), context.value("train:total_iter")
    kind = scheduler.get("type")
    if kind not in SCHEDULERS:
        if kind is not None:
            yield f"{path}:type: {shown(kind)} is not known{suggest_or_list(kind, SCHEDULERS)}"
        return
    name = "periods" if kind == SCHEDULERS[-1] else "restarts"
    starts = scheduler.get(name, [0] if name == "restarts" else None)
    weights = scheduler.get("restart_weights", [1])
    if name == "periods" and None not in (starts, total) and sum(starts) < total:
        yield (
            f"{path}:periods: their sum, {sum(starts)}, is less than train:total_iter {total}"
            ", where BasicSR's schedule fails; make the last period longer"
        )
    for milestone in sorted({*(scheduler.get("milestones") or ())} & {*(starts or ())}):
        yield (
            f"{path}:milestones: {milestone} is a restart too, and BasicSR then passes over "
            "the milestone; remove one of them"
        )
    if None not in (starts, weights) and len(starts) != len(weights):
        yield (
            f"{path}:restart_weights: has {len(weights)} values for {len(starts)} {name}; "
            "write one for each"
        )


def _numbers(context: Context) -> Iterator[str]:
    """Numbers must fit each other; BasicSR cuts patches of whole LR pixels, and queues batches."""
    for path, other in (
        ("train:warmup_iter", "train:total_iter"),
        ("val:tile_overlap", "val:tile"),
    ):
        value, limit = context.value(path), context.value(other)
        if value and limit and value >= limit:
            yield f"{path}: must be less than {other} {limit}; got {value}"
    if not context.train:
        return
    # Whether a model of Real-ESRGAN makes LR images and cuts the patches itself.
    synthetic = context.options.get("high_order_degradation", True) is not False
    synthetic = synthetic and known_model(context) in REAL
    batch = "datasets:train:batch_size_per_gpu"
    multiples = (("gt_size", "scale"), ("queue_size", batch)) if synthetic else ()
    for path, other in (("datasets:train:gt_size", "scale"), *multiples):
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
    if synthetic and (context.options.get("gt_size") or 0) > _REAL_ESRGAN_PATCH:
        yield f"gt_size: BasicSR cuts images to {_REAL_ESRGAN_PATCH}; write that or less"
    batch, parts = context.value(batch), context.value("train:accumulation")
    if batch and parts and parts > batch:
        yield f"train:accumulation: a batch of {batch} has no {parts} parts; write {batch} or less"


def _phases(context: Context) -> Iterator[str]:
    """BasicSR knows a data set's phase by its key up to the underscore."""
    if not context.train and context.options.get("datasets") == {}:
        yield "datasets: there is nothing to test on; write a section test_1"
    what = "train, val, val_2" if context.train else "test_1, test_2"
    kinds = {phase: phase.split("_")[0] for phase, _ in context.datasets()}
    for phase, kind in kinds.items():
        if not (phase == "train" or kind == "val" if context.train else kind in ("val", "test")):
            yield f"datasets:{phase}: not the name of a data set here; use names such as {what}"
    if context.train and context.section("val") and kinds and "val" not in kinds.values():
        yield "val: the file names no validation set; add datasets:val, or remove val"


def _loggers(context: Context) -> Iterator[str]:
    """What `save_best` names must be measured; Weights & Biases is sent what TensorBoard gets."""
    if not context.train:
        return
    best, metrics = context.value("logger:save_best"), list(context.section("val:metrics"))
    dataset, _, metric = str(best).rpartition("/")
    if best is not None and metric not in metrics:
        hint = suggest_or_list(metric, metrics) if metrics else "; add it there"
        yield f"logger:save_best: val:metrics has no {shown(metric)}{hint}"
    names = [each.get("name") for phase, each in context.datasets() if phase[:3] == "val"]
    if dataset and names and None not in names and dataset not in names:
        hint = suggest_or_list(dataset, names)
        yield f"logger:save_best: no validation set is named {shown(dataset)}{hint}"
    if context.value("logger:wandb:project") and not context.value("logger:use_tb_logger"):
        yield "logger:use_tb_logger: must be true for wandb; write true, or ~ for wandb:project"


def _loaders(context: Context) -> Iterator[str]:
    """Ways of loading that hang, or that need another key."""
    for phase, dataset in context.datasets():
        path = f"datasets:{phase}"
        given = [key for key in ("mean", "std") if dataset.get(key) is not None]
        if given and known_dataset(context, dataset.get("type")):
            counts, channels = {len(dataset[key]) for key in given}, dataset.get("color") != "y"
            if len(given) == 1 or not counts <= {1, 1 + 2 * channels}:
                many = "3 numbers" if channels else "1 number"
                yield f"{path}:{given[0]}: needs mean and std, each of {many}; write both"
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


CHECKS = (_network, _training, _numbers, _phases, _loggers, _loaders)
