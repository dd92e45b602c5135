"""Which keys each section of an option file may have, and what reads them.

BasicSR 1.4.2 reads keys where it needs them and never looks at the others. What its single-image
models and data sets read is written out here, with the keys of this package's pipeline; what
networks, losses, metrics and optimizers take is asked of their signatures.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from dlgsanet_arch.hints import nearest
from dlgsanet_arch.options.context import MISSPELT, Context, comes_from, source_names

_TOP = (
    *("name", "model_type", "scale", "num_gpu", "manual_seed", "datasets", "network_*", "path"),
    *("train", "val", "logger", "dist_params", "find_unused_parameters"),
)
_PATH = (
    *("pretrain_network_*", "strict_load_*", "param_key_*", "resume_state"),
    "ignore_resume_networks",
    *("root", "experiments_root", "results_root", "models", "training_states", "log"),
    "visualization",
)
_VAL = (
    *("val_freq", "save_img", "suffix", "pbar", "metrics"),
    *("self_ensemble", "tile", "tile_overlap"),
)
_LOGGER = (
    *("print_freq", "save_checkpoint_freq", "use_tb_logger", "wandb"),
    *("keep_last", "save_best"),
)
_TRAIN = (
    *("total_iter", "warmup_iter", "ema_decay", "optim_g", "scheduler"),
    *("pixel_opt", "perceptual_opt"),
)
_GAN_TRAIN = ("optim_d", "gan_opt", "net_d_iters", "net_d_init_iters")
_FAST_TRAIN = ("amp", "channels_last", "compile", "clip_grad_norm", "accumulation")

# What RealESRNetModel and RealESRGANModel read beside the sections, with the published values:
# they make LR images from HR ones while they train.
DEGRADATIONS = {
    "gt_size": "256",
    "resize_prob": "[0.2, 0.7, 0.1]",
    "resize_range": "[0.15, 1.5]",
    "gaussian_noise_prob": "0.5",
    "noise_range": "[1, 30]",
    "poisson_scale_range": "[0.05, 3]",
    "gray_noise_prob": "0.4",
    "jpeg_range": "[30, 95]",
    "second_blur_prob": "0.8",
    "resize_prob2": "[0.3, 0.4, 0.3]",
    "resize_range2": "[0.3, 1.2]",
    "gaussian_noise_prob2": "0.5",
    "noise_range2": "[1, 25]",
    "poisson_scale_range2": "[0.05, 2.5]",
    "gray_noise_prob2": "0.4",
    "jpeg_range2": "[30, 95]",
}
_REAL_TOP = (*DEGRADATIONS, "queue_size", "high_order_degradation")


@dataclass(frozen=True)
class ModelKeys:
    """What a model reads beside what every model does.

    Args:
        train: In `train`.
        top: Beside the sections.
        gan: Whether it trains a discriminator.
        real: Whether it makes LR images itself.
    """

    train: tuple[str, ...] = ()
    top: tuple[str, ...] = ()
    gan: bool = False
    real: bool = False


MODELS = {
    "SRModel": ModelKeys(),
    "SwinIRModel": ModelKeys(),
    "DLGSANetModel": ModelKeys(_FAST_TRAIN),
    "SRGANModel": ModelKeys((*_GAN_TRAIN, "ldl_opt"), gan=True),
    "ESRGANModel": ModelKeys((*_GAN_TRAIN, "ldl_opt"), gan=True),
    "RealESRNetModel": ModelKeys((), (*_REAL_TOP, "gt_usm"), real=True),
    "RealESRGANModel": ModelKeys(
        (*_GAN_TRAIN, "ldl_opt"),
        (*_REAL_TOP, "l1_gt_usm", "percep_gt_usm", "gan_gt_usm"),
        gan=True,
        real=True,
    ),
}
# The one model that takes every optimizer of PyTorch; BasicSR's models know Adam.
ANY_OPTIMIZER = "DLGSANetModel"

# `use_shuffle` stands in nearly every option file of BasicSR's, and nothing reads it; `phase` and
# `scale` are set by BasicSR.
_DATASET = (
    *("name", "type", "phase", "scale", "io_backend"),
    *("num_worker_per_gpu", "batch_size_per_gpu", "dataset_enlarge_ratio", "use_shuffle"),
    *("pin_memory", "persistent_workers", "prefetch_mode", "num_prefetch_queue"),
)
_TRAINING_SET = ("skip_bad_samples", "multiprocessing_context", "prefetch_factor")
_AUGMENTED = ("gt_size", "use_hflip", "use_rot")
_NORMALISED = ("mean", "std")
_BLURS = ("blur_kernel_size", "kernel_list", "kernel_prob", "blur_sigma", "betag_range")
_BLURS += ("betap_range", "sinc_prob")


@dataclass(frozen=True)
class DatasetKeys:
    """What a type of data sets reads.

    Args:
        folders: Which of its keys are folders or LMDBs, HR first.
        listing: The key of its list of images.
        keys: The others, beside what every data set has.
        normalised: Whether it takes `mean` and `std`.
    """

    folders: tuple[str, ...]
    listing: str | None
    keys: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        """Return every key of its own."""
        return (*self.folders, *([self.listing] if self.listing else []), *self.keys)


_PAIRS = ("dataroot_gt", "dataroot_lq")
DATASETS = {
    "PairedImageDataset": DatasetKeys(
        _PAIRS, "meta_info_file", ("filename_tmpl", "color", *_AUGMENTED, *_NORMALISED)
    ),
    "SingleImageDataset": DatasetKeys(("dataroot_lq",), "meta_info_file", ("color", *_NORMALISED)),
    "RealESRGANPairedDataset": DatasetKeys(
        _PAIRS, "meta_info", ("filename_tmpl", *_AUGMENTED, *_NORMALISED)
    ),
    "RealESRGANDataset": DatasetKeys(
        ("dataroot_gt",),
        "meta_info",
        (*_AUGMENTED, *_BLURS, *(f"{key}2" for key in _BLURS), "final_sinc_prob"),
    ),
    "FFHQDataset": DatasetKeys(("dataroot_gt",), None, ("use_hflip", *_NORMALISED)),
}

# What else stands beside the type of a storage backend: lmdb.open's arguments for an LMDB.
_BACKENDS = {
    "disk": (),
    "lmdb": (
        *("readonly", "lock", "readahead", "map_size", "max_readers", "max_dbs", "max_spare_txns"),
        *("subdir", "meminit", "mode"),
    ),
    "memcached": ("server_list_cfg", "client_cfg", "sys_path"),
}
_MULTI_STEP = ("milestones", "gamma", "restarts", "restart_weights", "last_epoch")
SCHEDULERS = {
    "MultiStepLR": _MULTI_STEP,
    "MultiStepRestartLR": _MULTI_STEP,
    "CosineAnnealingRestartLR": ("periods", "restart_weights", "eta_min", "last_epoch"),
}
# Metrics are called with the images, and `better` is read by whoever compares their values.
_GIVEN_TO_METRICS = ("img", "img2")
_ARGUMENTS = {"network_*": "arch", "train:*_opt": "loss", "val:metrics:*": "metric"}

# Sections whose keys are names of the user's own.
FREE = ("datasets", "val:metrics")


@dataclass(frozen=True)
class Known:
    """The keys of a section.

    Args:
        patterns: Their names; "*" stands for any text.
        reader: What reads them, for messages; "" where it is BasicSR or the pipeline.
        open: Whether it may read others; only what looks like a misspelling is refused then.
        thing: The class or function that may read others, where it is known.
    """

    patterns: tuple[str, ...]
    reader: str = ""
    open: bool = False
    thing: Any = None

    def misspelt(self, key: str) -> str | None:
        """Return why a key is refused: the nearest name, "" without one; None where it is fine."""
        if any(fnmatchcase(key, pattern) for pattern in self.patterns):
            return None
        names = [pattern.replace("_*", "_g") for pattern in self.patterns]
        if not self.open:
            return nearest(key, names) or ""
        meant = nearest(key, names, MISSPELT)
        read = self.thing is not None and source_names(self.thing, key)
        return None if meant is None or read else meant


def is_torch_optimizer(name: object) -> bool:
    """Whether torch.optim has an optimizer of this name that steps without a closure."""
    optimizer = getattr(torch.optim, str(name), None)
    return (
        inspect.isclass(optimizer)
        and issubclass(optimizer, torch.optim.Optimizer)
        and name not in ("Optimizer", "LBFGS")
    )


@functools.cache
def torch_optimizers() -> tuple[str, ...]:
    """Return the names of PyTorch's optimizers that step without a closure."""
    return tuple(name for name in dir(torch.optim) if is_torch_optimizer(name))


def known_model(context: Context) -> ModelKeys | None:
    """Return what the model reads, None where it is not a model of BasicSR's or this package's."""
    name = context.options.get("model_type")
    model = context.registered_as("model", name)
    if model is not None and not comes_from(model, "basicsr", "dlgsanet_arch"):
        return None
    return MODELS.get(name) if isinstance(name, str) else None


def known_dataset(context: Context, kind: object) -> DatasetKeys | None:
    """Return what data sets of a type read, None where it is none of BasicSR's."""
    dataset = context.registered_as("dataset", kind)
    if dataset is not None and not comes_from(dataset, "basicsr"):
        return None
    return DATASETS.get(kind) if isinstance(kind, str) else None


@functools.cache
def _signature(thing: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(thing)
    except (TypeError, ValueError):  # some callables written in C tell nothing
        return None


def parameters_of(thing: Any) -> dict[str, inspect.Parameter]:
    """Return what a class or function takes by name; nothing where nothing tells."""
    signature = _signature(thing)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {} if signature is None else signature.parameters
    return {name: entry for name, entry in found.items() if entry.kind in by_name}


def _taken_by(thing: Any, name: object, *, given: Iterable[str] = ()) -> Known | None:
    """Return what a callable takes. BasicSR's own that take anything pass nothing on."""
    signature = _signature(thing)
    if signature is None:
        return None
    names = tuple(parameter for parameter in parameters_of(thing) if parameter not in given)
    kinds = {entry.kind for entry in signature.parameters.values()}
    is_open = inspect.Parameter.VAR_KEYWORD in kinds and not comes_from(thing, "basicsr")
    return Known(("type", *names), str(name), is_open, thing)


def arguments(context: Context, path: str) -> tuple[Any, tuple[str, ...]] | None:
    """Return what is built from a section, and which of its arguments are given to it.

    Args:
        context: The options.
        path: Of a section.

    Returns:
        The registered network, loss or metric; None where it is none, or not known.
    """
    for pattern, registry in _ARGUMENTS.items():
        if _matches(path, pattern):
            thing = context.registered_as(registry, context.section(path).get("type"))
            given = _GIVEN_TO_METRICS if registry == "metric" else ()
            return None if thing is None else (thing, given)
    return None


def _matches(path: str, pattern: str) -> bool:
    return path.count(":") == pattern.count(":") and fnmatchcase(path, pattern)


def _in_dataset(context: Context, path: str) -> Known:
    section = context.section(path)
    kind = section.get("type")
    common = _DATASET
    if path.split(":")[1].split("_")[0] == "train":
        common += _TRAINING_SET
    dataset = known_dataset(context, kind)
    if dataset is not None:
        return Known((*common, *dataset.all()), str(kind))
    every = tuple(key for each in DATASETS.values() for key in each.all())
    return Known((*common, *every), str(kind), True, context.registered_as("dataset", kind))


def _of_model(context: Context, base: tuple[str, ...], of: Callable[[ModelKeys], tuple]) -> Known:
    name = str(context.options.get("model_type"))
    model = known_model(context)
    if model is not None:
        return Known((*base, *of(model)), name)
    every = tuple(key for each in MODELS.values() for key in of(each))
    return Known((*base, *every), name, True, context.registered_as("model", name))


def _in_optimizer(context: Context, path: str) -> Known | None:
    kind = context.section(path).get("type")
    if not is_torch_optimizer(kind):
        return None
    optimizer = getattr(torch.optim, kind)
    known = _taken_by(optimizer, kind, given=("params",))
    if known is None or known_model(context) is not None:
        return known
    thing = context.registered_as("model", context.options.get("model_type"))
    return Known(known.patterns, known.reader, True, thing)


def _in_scheduler(context: Context, path: str) -> Known | None:
    kind = context.section(path).get("type")
    names = SCHEDULERS.get(kind) if isinstance(kind, str) else None
    return None if names is None else Known(("type", *names), kind)


def _in_backend(context: Context, path: str) -> Known | None:
    kind = context.section(path).get("type")
    names = _BACKENDS.get(kind) if isinstance(kind, str) else None
    return None if names is None else Known(("type", *names), f"the backend {kind}")


def _in_path(context: Context, path: str) -> Known:
    del path
    return _of_model(context, _PATH, lambda model: ())


def _in_train(context: Context, path: str) -> Known:
    del path
    return _of_model(context, _TRAIN, lambda model: model.train)


def _in_val(context: Context, path: str) -> Known:
    del path
    return _of_model(context, _VAL, lambda model: ())


def _in_top(context: Context, path: str) -> Known:
    del path
    return _of_model(context, _TOP, lambda model: model.top)


def _in_arguments(context: Context, path: str) -> Known | None:
    found = arguments(context, path)
    if found is None:
        return None
    thing, given = found
    known = _taken_by(thing, context.section(path).get("type"), given=given)
    if known is not None and given:
        return replace(known, patterns=(*known.patterns, "better"))
    return known


_SECTIONS: dict[str, Callable[[Context, str], Known | None]] = {
    "": _in_top,
    "path": _in_path,
    "train": _in_train,
    "val": _in_val,
    "logger": lambda context, path: Known(_LOGGER),
    "logger:wandb": lambda context, path: Known(("project", "resume_id")),
    "dist_params": lambda context, path: Known(("backend", "port", "timeout")),
    "datasets:*": _in_dataset,
    "datasets:*:io_backend": _in_backend,
    "train:optim_*": _in_optimizer,
    "train:scheduler": _in_scheduler,
    **dict.fromkeys(_ARGUMENTS, _in_arguments),
}


def known_in(context: Context, path: str) -> Known | None:
    """Return the keys that the section at `path` may have, None where nothing is known of it."""
    for pattern, find in _SECTIONS.items():
        if _matches(path, pattern):
            return find(context, path)
    return None


def read_by(key: str) -> list[str]:
    """Return the models that read a key which others do not."""
    return [name for name, model in MODELS.items() if key in (*model.train, *model.top)]
