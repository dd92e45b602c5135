"""What a key's value may be, checked by itself."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

import torch

from dlgsanet_arch.hints import suggest_or_list
from dlgsanet_arch.network import DLGSANet
from dlgsanet_arch.options.context import Context, is_number
from dlgsanet_arch.options.schema import (
    ANY_OPTIMIZER,
    SCHEDULERS,
    arguments,
    known_model,
    parameters_of,
    torch_optimizers,
)

# Keys, wherever they stand, whose value is computed with.
_ABOVE_ZERO = frozenset(
    (
        *("scale", "gt_size", "batch_size_per_gpu", "dataset_enlarge_ratio", "total_iter"),
        *("val_freq", "print_freq", "save_checkpoint_freq", "periods", "clip_grad_norm"),
        *("keep_last", "accumulation", "prefetch_factor", "timeout", "queue_size"),
    )
)
_NOT_BELOW_ZERO = frozenset(
    (
        *("num_gpu", "num_worker_per_gpu", "skip_bad_samples", "crop_border", "tile"),
        *("tile_overlap", "ema_decay", "lr", "weight_decay", "net_d_init_iters", "restarts"),
        "manual_seed",
    )
)
_WHOLE = frozenset(
    (
        *("scale", "num_gpu", "gt_size", "batch_size_per_gpu", "num_worker_per_gpu", "keep_last"),
        *("skip_bad_samples", "accumulation", "prefetch_factor", "tile", "tile_overlap"),
        *("crop_border", "queue_size", "manual_seed", "port"),
    )
)
_NUMBERS = (
    _ABOVE_ZERO
    | _NOT_BELOW_ZERO
    | _WHOLE
    | frozenset(
        (
            *("warmup_iter", "betas", "eps", "milestones", "gamma", "restart_weights"),
            *("eta_min", "loss_weight", "net_d_iters", "perceptual_weight", "style_weight"),
        )
    )
)
_YES_OR_NO = frozenset(
    (
        *("use_hflip", "use_rot", "pin_memory", "persistent_workers", "save_img", "pbar"),
        *("self_ensemble", "use_tb_logger", "channels_last", "compile", "test_y_channel"),
        *("strict_load_g", "strict_load_d", "find_unused_parameters", "high_order_degradation"),
        *("fused", "use_input_norm", "range_norm"),
    )
)

_CHOICES = {
    "datasets:*:io_backend:type": ("disk", "lmdb", "memcached"),
    "datasets:*:multiprocessing_context": ("fork", "spawn", "forkserver"),
    "val:metrics:*:better": ("higher", "lower"),
    "train:amp": ("bf16", "fp16"),
}


def matching(context: Context, patterns: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value and the pattern's entry for each value whose path matches a pattern."""
    for path, value in context.values():
        for pattern, entry in patterns.items():
            if path.count(":") == pattern.count(":") and fnmatchcase(path, pattern):
                yield path, value, entry


def _number_for(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return ""
    return f"; write {text} without quotes"


def _numeric_arguments(context: Context) -> frozenset[str]:
    """Return the paths of arguments whose annotation or default says that they are numbers."""
    paths = set()
    for path, _ in context.sections():
        found = arguments(context, path)
        for name, entry in (parameters_of(found[0]) if found else {}).items():
            if entry.annotation in (int, float) or is_number(entry.default):
                paths.add(f"{path}:{name}")
    return frozenset(paths)


def _numbers(context: Context) -> Iterator[str]:
    """BasicSR fails on text in place of a number only when it computes."""
    numeric_arguments = _numeric_arguments(context)
    for path, value in context.values():
        key = path.rpartition(":")[2]
        if key in _YES_OR_NO and isinstance(value, str):
            yield f"{path}: must be true or false; got the text {value!r}"
        if key not in _NUMBERS and path not in numeric_arguments:
            continue
        if isinstance(value, str) and not (key == "num_gpu" and value == "auto"):
            yield f"{path}: is the text {value!r}, not a number{_number_for(value)}"
        elif isinstance(value, bool):
            yield f"{path}: must be a number; got {str(value).lower()}"
        elif key in _WHOLE and isinstance(value, float):
            yield f"{path}: must be a whole number; got {value!r}"
        elif key in _ABOVE_ZERO and is_number(value) and value <= 0:
            yield f"{path}: must be above 0; got {value!r}"
        elif key in _NOT_BELOW_ZERO and is_number(value) and value < 0:
            yield f"{path}: must be 0 or above; got {value!r}"


def _names(context: Context) -> Iterator[str]:
    """BasicSR makes paths of names; YAML reads a name such as 291 as a number."""
    names = {"name": context.options.get("name")}
    for phase, dataset in context.datasets():
        names |= {f"datasets:{phase}:{key}": dataset.get(key) for key in ("name", "filename_tmpl")}
    for path, name in names.items():
        if name is not None and not isinstance(name, str):
            text = str(name) if not isinstance(name, Mapping) else "{}"
            yield f"{path}: must be text; got {name!r}; write it in quotes: '{text}'"


def _choices(context: Context) -> Iterator[str]:
    """BasicSR takes any other `better` for "lower", and refuses the rest after the run began."""
    patterns: dict[str, Any] = dict(_CHOICES)
    if known_model(context) is not None:
        any_optimizer = context.options["model_type"] == ANY_OPTIMIZER
        patterns["train:optim_*:type"] = torch_optimizers() if any_optimizer else ("Adam",)
        patterns["train:scheduler:type"] = tuple(SCHEDULERS)
    for path, value, choices in matching(context, patterns):
        if value is not None and value not in choices:
            hint = suggest_or_list(value, choices)
            if choices == ("Adam",) and value in torch_optimizers():
                hint = f" to this model; write Adam, or model_type: {ANY_OPTIMIZER}"
            yield f"{path}: {value!r} is not known{hint}"


def _networks(context: Context) -> Iterator[str]:
    """Compare a DLGSANet's arguments with what they may be, then build it without memory."""
    known = parameters_of(DLGSANet)
    for key in context.networks():
        network = context.section(key)
        if network.get("type") != "DLGSANet":
            continue
        valid = {}
        texts = False
        for name, value in network.items():
            if name not in known:
                continue
            annotation = known[name].annotation
            choices = get_args(annotation) if get_origin(annotation) is Literal else ()
            if choices and value not in choices:
                yield f"{key}:{name}: {value!r} is not known{suggest_or_list(value, choices)}"
                continue
            texts |= annotation in (int, float) and isinstance(value, str | bool)
            valid[name] = value
        if texts:
            continue  # reported by _numbers
        try:
            with torch.device("meta"):
                DLGSANet(**valid)
        except (TypeError, ValueError, RuntimeError) as error:
            yield f"{key}: {error}"


CHECKS = (_names, _numbers, _choices, _networks)
