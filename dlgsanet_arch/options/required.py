"""Keys that must be there: BasicSR fails on a missing one, on some hours after the start."""

from collections.abc import Iterator, Mapping
from typing import Any

from dlgsanet_arch.hints import nearest, suggest
from dlgsanet_arch.options.context import Context
from dlgsanet_arch.options.schema import (
    DATASETS,
    DEGRADATIONS,
    arguments,
    known_dataset,
    known_in,
    known_model,
    parameters_of,
)

# Paths of keys that BasicSR reads without a default, each with an example of what to write there;
# an example in braces stands for a section.
_ALWAYS = {
    "name": "tiny_x4",
    "model_type": "SRModel",
    "scale": "4",
    "num_gpu": "auto",
    "path": "{}",
    "network_g:type": "DLGSANet",
}
_TO_TRAIN = {
    "datasets:train:batch_size_per_gpu": "16",
    "datasets:train:num_worker_per_gpu": "6",
    "train:total_iter": "500000",
    "train:optim_g:type": "Adam",
    "train:optim_g:lr": "!!float 5e-4",
    "train:scheduler:type": "MultiStepLR",
    "logger:print_freq": "100",
    "logger:save_checkpoint_freq": "5000",
    "logger:use_tb_logger": "true",
}
_TO_TRAIN_GAN = {
    "network_d:type": "UNetDiscriminatorSN",
    "train:optim_d:type": "Adam",
    "train:optim_d:lr": "!!float 1e-4",
    "train:gan_opt:type": "GANLoss",
}
_TO_TEST = {
    "datasets": "{test_1: …}",
    "path:pretrain_network_g": "experiments/tiny_x4/models/net_g_latest.pth",
    "val:save_img": "true",
}
# BasicSR reads these two, but takes an empty value.
_MAY_BE_EMPTY = ("val:suffix", "logger:use_tb_logger")
_SHARPENED = {"l1_gt_usm": "true", "percep_gt_usm": "true", "gan_gt_usm": "false"}

_BLURS = {
    "blur_kernel_size": "21",
    "kernel_list": "[iso, aniso]",
    "kernel_prob": "[0.5, 0.5]",
    "sinc_prob": "0.1",
    "blur_sigma": "[0.2, 3]",
    "betag_range": "[0.5, 4]",
    "betap_range": "[1, 2]",
}
_FLIPS = {"use_hflip": "true", "use_rot": "true"}
_FOLDERS = {
    "dataroot_gt": "datasets/benchmark/Set5/X4/HR",
    "dataroot_lq": "datasets/benchmark/Set5/X4/LR",
}
_MEAN = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
# What BasicSR's data sets read beside their folders: always, and of a training set.
_DATASETS = {
    "FFHQDataset": {"use_hflip": "true", **_MEAN},
    "RealESRGANDataset": {
        **_FLIPS,
        **_BLURS,
        **{f"{key}2": example for key, example in _BLURS.items()},
        "final_sinc_prob": "0.8",
    },
}
_TRAINING_SETS = {
    kind: {"gt_size": "192", **_FLIPS} for kind in ("PairedImageDataset", "RealESRGANPairedDataset")
}


def _of_dataset(context: Context, phase: str, dataset: Mapping[str, Any]) -> dict[str, str]:
    required = {"name": "Set5", "type": "PairedImageDataset"}
    kind = dataset.get("type")
    if known_dataset(context, kind) is not None:
        required |= {key: _FOLDERS[key] for key in DATASETS[kind].folders}
        required |= {"io_backend:type": "disk", **_DATASETS.get(kind, {})}
        if phase == "train":
            required |= _TRAINING_SETS.get(kind, {})
        backend = context.section(f"datasets:{phase}:io_backend").get("type")
        if kind == "RealESRGANDataset" and backend != "lmdb":
            required["meta_info"] = "datasets/DF2K/meta_info.txt"
    return {f"datasets:{phase}:{key}": example for key, example in required.items()}


def _of_training(context: Context) -> dict[str, str]:
    required = dict(_TO_TRAIN)
    model = known_model(context)
    if model is not None:
        required |= _TO_TRAIN_GAN if model.gan else {}
        if model.real and context.options.get("high_order_degradation") is not False:
            required |= DEGRADATIONS
        if model.real and model.gan:
            required |= _SHARPENED
    for key, value in context.section("train").items():
        if str(key).endswith("_opt") and isinstance(value, Mapping):
            required[f"train:{key}:type"] = "L1Loss"
    if context.options.get("val") is not None:
        required |= {"val:val_freq": "5000", "val:save_img": "false"}
    return required


def required(context: Context) -> dict[str, str]:
    """Return the paths that an option file must fill, each with an example of its value."""
    paths = {**_ALWAYS, **(_of_training(context) if context.train else _TO_TEST)}
    for phase, dataset in context.datasets():
        paths |= _of_dataset(context, phase, dataset)
    if not context.train and context.section("val").get("save_img"):
        paths["val:suffix"] = "~"
    for metric in context.section("val:metrics"):
        path = f"val:metrics:{metric}"
        paths[f"{path}:type"] = "calculate_psnr"
        kind = str(context.section(path).get("type"))
        if kind.startswith(("calculate_psnr", "calculate_ssim", "calculate_niqe")):
            paths[f"{path}:crop_border"] = str(context.options.get("scale", 4))
    return paths


def _how_to_fill(path: str, required: Mapping[str, str]) -> str:
    """Say what to write at an unfilled path."""
    prefix = f"{path}:"
    below = [entry.removeprefix(prefix) for entry in required if entry.startswith(prefix)]
    if below:
        names = dict.fromkeys(entry.split(":")[0] for entry in below)
        return f"write a section with {', '.join(names)}"
    return f"write `{path.rpartition(':')[2]}: {required[path]}`"


def _unfilled(context: Context, required: Mapping[str, str]) -> dict[str, str]:
    """Return what is wrong with the paths that are missing, empty or no section."""
    faults: dict[str, str] = {}
    for path, example in required.items():
        node: Any = context.options
        keys = path.split(":")
        for depth, key in enumerate(keys, 1):
            here = ":".join(keys[:depth])
            value = node.get(key)
            if value is None and not (here in _MAY_BE_EMPTY and key in node):
                what = "empty" if key in node else "missing"
                faults.setdefault(here, f"{what}; {_how_to_fill(here, required)}")
                break
            is_section = depth < len(keys) or example.startswith("{")
            if is_section and not isinstance(value, Mapping):
                faults.setdefault(here, f"must be a section of keys; got {value!r}")
                break
            node = value
    return faults


def meant_for_missing(context: Context) -> dict[str, str]:
    """Return the paths of missing keys, each with the unknown key beside it that looks like it."""
    paths = required(context)
    meant = {}
    for path, fault in _unfilled(context, paths).items():
        section, _, key = path.rpartition(":")
        known = known_in(context, section)
        spare = (
            name
            for name in map(str, context.section(section))
            if f"{section}:{name}".lstrip(":") not in paths
            and (known is None or known.misspelt(name) is not None)
        )
        found = nearest(key, spare) if fault.startswith("missing") else None
        if found is not None:
            meant[path] = found
    return meant


def _required_keys(context: Context) -> Iterator[str]:
    meant = meant_for_missing(context)
    for path, fault in _unfilled(context, required(context)).items():
        yield f"{path}: {fault}{suggest(meant[path], [meant[path]]) if path in meant else ''}"


def _arguments(context: Context) -> Iterator[str]:
    """Networks, losses and metrics must get what they have no default for."""
    paths = required(context)
    for path, section in context.sections():
        found, known = arguments(context, path), known_in(context, path)
        if found is None or known is None:
            continue
        misspelt = {known.misspelt(str(key)) for key in section}
        for name, entry in parameters_of(found[0]).items():
            here = f"{path}:{name}"
            needed = entry.default is entry.empty and name not in found[1]
            if needed and name not in section and name not in misspelt and here not in paths:
                yield f"{here}: missing; {section['type']} has no default for it"


def _losses(context: Context) -> Iterator[str]:
    """BasicSR's models refuse to train without a loss after they built everything else."""
    train = context.section("train")
    model = known_model(context)
    if not (context.train and train and model is not None) or model.gan:
        return
    if not (train.get("pixel_opt") or train.get("perceptual_opt")):
        spare = [key for key in train if key not in ("optim_g", "perceptual_opt")]
        yield (
            "train:pixel_opt: missing; write "
            "`pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}`"
            f"{suggest('pixel_opt', spare)}"
        )


def _phases(context: Context) -> Iterator[str]:
    """BasicSR knows a data set's phase by its key up to the underscore."""
    if not context.train and context.options.get("datasets") == {}:
        yield "datasets: there is nothing to test on; write a section test_1"
    for phase, _ in context.datasets():
        kind = phase.split("_")[0]
        known = phase == "train" or kind == "val" if context.train else kind in ("val", "test")
        if not known:
            examples = "train, val, val_2" if context.train else "test_1, test_2"
            yield (
                f"datasets:{phase}: no name for a data set when "
                f"{'training' if context.train else 'testing'}; use names such as {examples}"
            )


CHECKS = (_required_keys, _arguments, _losses, _phases)
