"""The table of keys: where a key stands, what it may be, when it must be there, and who reads it.

BasicSR 1.4.2 reads keys where it needs them and never looks at the others. Its single-image models
and data sets are in the table, with the keys of this package's pipeline; what networks, losses,
metrics and optimizers take is asked of their signatures. A key that is new is one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dlgsanet_arch.options.context import Context, comes_from
from dlgsanet_arch.options.values import (
    Kind,
    Named,
    anything,
    choice,
    count,
    either,
    listed,
    name,
    number,
    part_of_name,
    path,
    section,
    template,
    text,
    weights,
    whole,
    yes_no,
)

# Who reads keys that others do not: models by `model_type`, the rest by the section's `type`.
OURS = ("DLGSANetModel",)  # the one that takes every optimizer of PyTorch
GAN = ("SRGANModel", "ESRGANModel", "RealESRGANModel")  # train a discriminator
REAL = ("RealESRNetModel", "RealESRGANModel")  # make LR images from HR ones while they train
MODELS = ("SRModel", "SwinIRModel", *OURS, *GAN, "RealESRNetModel")
_PAIRED = ("PairedImageDataset", "RealESRGANPairedDataset")
_SINGLE, _REAL_SET, _FFHQ = ("SingleImageDataset",), ("RealESRGANDataset",), ("FFHQDataset",)
DATASETS = (*_PAIRED, *_SINGLE, *_REAL_SET, *_FFHQ)
_STEPS = ("MultiStepLR", "MultiStepRestartLR")
SCHEDULERS = (*_STEPS, "CosineAnnealingRestartLR")


# When a key must be there. Each is asked only where the section is one of the key's readers.
Condition = Callable[[Context, str], bool]


def _always(context: Context, section: str) -> bool:
    return True


def _train(context: Context, section: str) -> bool:
    return context.train


def _test(context: Context, section: str) -> bool:
    return not context.train


def _gan(context: Context, section: str) -> bool:
    return context.train and context.options.get("model_type") in GAN


def _synthetic(context: Context, section: str) -> bool:
    return context.train and context.options.get("high_order_degradation") is not False


def _training_set(context: Context, section: str) -> bool:
    return context.train and section == "datasets:train"


def _of_type(*names: str) -> Condition:
    return lambda context, section: context.section(section).get("type") in names


def _of_known_set(context: Context, section: str) -> bool:
    kind = context.section(section.removesuffix(":io_backend")).get("type")
    return kind in DATASETS


def _augmented(context: Context, section: str) -> bool:
    return _training_set(context, section) or _of_type(*_REAL_SET, *_FFHQ)(context, section)


def _cut(context: Context, section: str) -> bool:
    return _training_set(context, section) and _of_type(*_PAIRED)(context, section)


def _with_suffix(context: Context, section: str) -> bool:
    return not context.train and bool(context.section("val").get("save_img"))


def _with_border(context: Context, section: str) -> bool:
    kind = str(context.section(section).get("type"))
    return kind.startswith(("calculate_psnr", "calculate_ssim", "calculate_niqe"))


def _listed_set(context: Context, section: str) -> bool:
    in_lmdb = context.section(f"{section}:io_backend").get("type") == "lmdb"
    return _of_type(*_REAL_SET)(context, section) and not in_lmdb


@dataclass(frozen=True)
class Key:
    """A row of the table.

    Args:
        path: Where it stands, "section:key"; * stands for any text, a|b for both keys.
        kind: What its value may be.
        example: What to write where it is missing; $scale stands for that of the file.
        needed: When it must be there, None for never.
        by: Who reads it; () for all.
        empty: Whether it may be ~.
    """

    path: str
    kind: Kind
    example: str = ""
    needed: Condition | None = None
    by: tuple[str, ...] = ()
    empty: bool = False

    @property
    def section(self) -> str:
        """The pattern of the section that it stands in."""
        return self.path.rpartition(":")[0]

    @property
    def names(self) -> list[str]:
        """The patterns of its own name."""
        return self.path.rpartition(":")[2].split("|")


_share = number("[0, 1]")
_size = whole("[1, 65536]")
_steps = count("(0, 1e9]")
_real: dict[str, Any] = {"needed": _synthetic, "by": REAL}
_blur: dict[str, Any] = {"needed": _always, "by": _REAL_SET}


def _pair(example: str) -> Kind:
    return listed(number("[0, 1e6]"), example, 2)


def _degradations(end: str, resize: str, span: str, noise: str, poisson: str) -> tuple[Key, ...]:
    """Return what the models of Real-ESRGAN read, with the published values."""
    return (
        Key(f"resize_prob{end}", weights(resize, 3), resize, **_real),
        Key(f"resize_range{end}", listed(number("(0, 1e3]"), span, 2), span, **_real),
        Key(f"gaussian_noise_prob{end}", _share, "0.5", **_real),
        Key(f"noise_range{end}", _pair(noise), noise, **_real),
        Key(f"poisson_scale_range{end}", _pair(poisson), poisson, **_real),
        Key(f"gray_noise_prob{end}", _share, "0.4", **_real),
        Key(f"jpeg_range{end}", listed(number("[0, 100]"), "[30, 95]", 2), "[30, 95]", **_real),
    )


def _blurs(end: str) -> tuple[Key, ...]:
    """Return what the data set of Real-ESRGAN reads."""
    shapes = choice(*(a + b for a in ("", "generalized_", "plateau_") for b in ("iso", "aniso")))
    at = "datasets:*:"
    return (
        Key(f"{at}blur_kernel_size{end}", whole("[1, 21]"), "21", **_blur),
        Key(f"{at}kernel_list{end}", listed(shapes, "[iso, aniso]"), "[iso, aniso]", **_blur),
        Key(f"{at}kernel_prob{end}", weights("[0.5, 0.5]"), "[0.5, 0.5]", **_blur),
        Key(f"{at}sinc_prob{end}", _share, "0.1", **_blur),
        Key(f"{at}blur_sigma{end}", _pair("[0.2, 3]"), "[0.2, 3]", **_blur),
        Key(f"{at}betag_range{end}", _pair("[0.5, 4]"), "[0.5, 4]", **_blur),
        Key(f"{at}betap_range{end}", _pair("[1, 2]"), "[1, 2]", **_blur),
    )


_FOLDER = "datasets/benchmark/Set5/X4/"
_WEIGHTS = "experiments/tiny_x4/models/net_g_latest.pth"
_numbers = listed(number(), "[0.5, 0.5, 0.5]")

KEYS = (
    # the run
    Key("name", name, "tiny_x4", _always),
    Key("model_type", Named("model"), "SRModel", _always),
    Key("scale", whole("[1, 100]"), "4", _always),
    Key("num_gpu", either(whole("[0, 1024]"), choice("auto")), "auto", _always),
    Key("manual_seed", whole("[0, 4294900000]"), empty=True),  # the rank is added; NumPy: 2^32
    Key("find_unused_parameters", yes_no, empty=True),
    Key("x_*|x-*", anything, empty=True),  # whatever holds anchors
    Key("gt_size", _size, "256", **_real),
    *_degradations("", "[0.2, 0.7, 0.1]", "[0.15, 1.5]", "[1, 30]", "[0.05, 3]"),
    Key("second_blur_prob", _share, "0.8", **_real),
    *_degradations("2", "[0.3, 0.4, 0.3]", "[0.3, 1.2]", "[1, 25]", "[0.05, 2.5]"),
    Key("queue_size", whole("[1, 1e6]"), by=REAL),
    Key("high_order_degradation", yes_no, by=REAL),
    Key("gt_usm", yes_no, "true", _synthetic, ("RealESRNetModel",)),
    Key("l1_gt_usm|percep_gt_usm", yes_no, "true", _train, ("RealESRGANModel",)),
    Key("gan_gt_usm", yes_no, "false", _train, ("RealESRGANModel",)),
    # data
    Key("datasets", section, "{test_1: …}", _always),
    Key("datasets:train", section, needed=_train),
    Key("datasets:*", section),
    Key("datasets:train:name", text, "DIV2K", _always),
    Key("datasets:*:name", name, "Set5", _always),
    Key("datasets:*:type", Named("dataset"), "PairedImageDataset", _always),
    Key("datasets:*:batch_size_per_gpu", _size, "16", _training_set),
    Key("datasets:*:num_worker_per_gpu", whole("[0, 256]"), "6", _training_set),
    Key("datasets:*:dataset_enlarge_ratio", number("(0, 1e9]")),
    Key("datasets:*:phase|scale|use_shuffle", anything, empty=True),  # set by BasicSR; never read
    Key("datasets:*:pin_memory|persistent_workers", yes_no, empty=True),
    Key("datasets:*:prefetch_mode", choice("cuda", "cpu"), empty=True),
    Key("datasets:*:num_prefetch_queue", whole("[1, 65536]")),
    Key("datasets:train:skip_bad_samples", whole("[0, 1e9]"), empty=True),
    Key(
        "datasets:train:multiprocessing_context",
        choice("fork", "spawn", "forkserver"),
        empty=True,
    ),
    Key("datasets:train:prefetch_factor", whole("[1, 65536]"), empty=True),
    Key(
        "datasets:*:dataroot_gt",
        path,
        f"{_FOLDER}HR",
        _of_known_set,
        (*_PAIRED, *_REAL_SET, *_FFHQ),
    ),
    Key("datasets:*:dataroot_lq", path, f"{_FOLDER}LR", _of_known_set, (*_PAIRED, *_SINGLE)),
    Key("datasets:*:meta_info_file", path, by=_PAIRED[:1], empty=True),
    Key("datasets:*:meta_info_file", path, by=_SINGLE),  # fails on ~
    Key("datasets:*:meta_info", path, "datasets/DF2K/meta_info.txt", _listed_set, _REAL_SET),
    Key("datasets:*:meta_info", path, by=_PAIRED[1:], empty=True),
    Key("datasets:*:filename_tmpl", template, by=_PAIRED),
    Key("datasets:*:color", choice("y"), by=(*_PAIRED[:1], *_SINGLE), empty=True),
    Key("datasets:*:gt_size", _size, "192", _cut, (*_PAIRED, *_REAL_SET)),
    Key("datasets:*:use_hflip", yes_no, "true", _augmented, (*_PAIRED, *_REAL_SET, *_FFHQ)),
    Key("datasets:*:use_rot", yes_no, "true", _augmented, (*_PAIRED, *_REAL_SET)),
    Key("datasets:*:mean|std", _numbers, "[0.5, 0.5, 0.5]", _always, _FFHQ),
    Key("datasets:*:mean|std", _numbers, by=(*_PAIRED, *_SINGLE), empty=True),
    *_blurs(""),
    *_blurs("2"),
    Key("datasets:*:final_sinc_prob", _share, "0.8", **_blur),
    Key("datasets:*:io_backend", section, needed=_of_known_set),
    Key("datasets:*:io_backend:type", choice("disk", "lmdb", "memcached"), "disk", _of_known_set),
    Key("datasets:*:io_backend:readonly|lock|readahead|meminit|subdir", yes_no, by=("lmdb",)),
    Key(
        "datasets:*:io_backend:map_size|max_readers|max_dbs|max_spare_txns|mode",
        whole("[0, 1e15]"),
        by=("lmdb",),
    ),
    Key("datasets:*:io_backend:server_list_cfg|client_cfg|sys_path", path, by=("memcached",)),
    # networks, and the files that they start from
    Key("network_g", section, needed=_always),
    Key("network_d", section, needed=_gan),
    Key("network_*", section, empty=True),
    Key("network_*:type", Named("arch"), "DLGSANet", _always),
    Key("path", section, "{}", _always),
    Key("path:pretrain_network_*|resume_state", path, empty=True),
    Key("path:pretrain_network_g", path, _WEIGHTS, _test),
    Key("path:strict_load_*", yes_no, empty=True),
    Key("path:param_key_*", text, empty=True),
    Key("path:ignore_resume_networks", either(listed(text, "[network_g]"), text), empty=True),
    Key("path:root|experiments_root|results_root|models", path, empty=True),  # set by BasicSR
    Key("path:training_states|log|visualization", path, empty=True),
    # training
    Key("train", section, needed=_train),
    Key("train:total_iter", _steps, "500000", _train),
    Key("train:warmup_iter", count("[-1, 1e9]")),
    Key("train:ema_decay", number("[0, 1)")),
    Key("train:optim_g", section, needed=_train),
    Key("train:optim_d", section, needed=_gan, by=GAN),
    Key("train:optim_*:type", text, "Adam", _train),
    Key("train:optim_*:lr", number("[0, 1e6]"), "!!float 5e-4", _train),
    Key("train:optim_*:betas", listed(number("[0, 1)"), "[0.9, 0.99]", 2)),
    Key("train:optim_*:eps|weight_decay", number("[0, 1e6]")),
    Key("train:scheduler", section, needed=_train),
    Key("train:scheduler:type", text, "MultiStepLR", _train),
    Key(
        "train:scheduler:milestones",
        listed(count("[0, 1e9]"), "[250000]"),
        "[250000]",
        _always,
        _STEPS,
    ),
    Key("train:scheduler:gamma", number("[0, 1e6]"), by=_STEPS),
    Key("train:scheduler:restarts", listed(count("[0, 1e9]"), "[0]"), by=_STEPS),
    Key("train:scheduler:periods", listed(_steps, "[500000]"), "[500000]", _always, SCHEDULERS[2:]),
    Key("train:scheduler:restart_weights", listed(number("[0, 1e6]"), "[1]"), by=SCHEDULERS),
    Key("train:scheduler:eta_min", number("[0, 1e6]"), by=SCHEDULERS[2:]),
    Key("train:scheduler:last_epoch", whole("[-1, 1e9]"), by=SCHEDULERS),
    Key("train:pixel_opt|perceptual_opt", section, empty=True),
    Key("train:gan_opt", section, needed=_gan, by=GAN),
    Key("train:ldl_opt", section, by=GAN, empty=True),
    Key("train:*_opt:type", Named("loss"), "L1Loss", _train),
    Key("train:*_opt:reduction", choice("mean", "sum")),  # `none` is not a loss to be minimised
    Key("train:*_opt:gan_type", choice("vanilla", "lsgan", "wgan", "wgan_softplus", "hinge")),
    Key("train:*_opt:criterion", choice("l1", "fro")),  # BasicSR fails on `l2`
    Key("train:*_opt:layer_weights", section),
    Key("train:net_d_iters", _steps, by=GAN),
    Key("train:net_d_init_iters", count("[0, 1e9]"), by=GAN),
    Key("train:amp", choice("bf16", "fp16", False), by=OURS, empty=True),
    Key("train:channels_last", yes_no, by=OURS, empty=True),
    Key("train:compile", either(yes_no, text), by=OURS, empty=True),  # a backend
    Key("train:clip_grad_norm", either(number("(0, inf]"), choice(False)), by=OURS, empty=True),
    Key("train:accumulation", _size, by=OURS, empty=True),
    # validation
    Key("val", section, needed=_test, empty=True),
    Key("val:val_freq", _steps, "5000", _train),
    Key("val:save_img", yes_no, "false", _train),
    Key("val:save_img", yes_no, "true", _test),
    Key("val:suffix", part_of_name, "~", _with_suffix, empty=True),
    Key("val:pbar|self_ensemble", yes_no, empty=True),
    Key("val:tile", whole("[0, 1e9]"), empty=True),
    Key("val:tile_overlap", whole("[0, 1e9]"), empty=True),
    Key("val:metrics", section, empty=True),
    Key("val:metrics:*", section),
    Key("val:metrics:*:type", Named("metric"), "calculate_psnr", _always),
    Key("val:metrics:*:better", choice("higher", "lower")),
    Key("val:metrics:*:crop_border", whole("[0, 65536]"), "$scale", _with_border),
    Key("val:metrics:*:input_order", choice("HWC", "CHW")),
    Key("val:metrics:*:convert_to", choice("y", "gray")),
    # reports, checkpoints, several processes
    Key("logger", section, needed=_train),
    Key("logger:print_freq", _steps, "100", _train),
    Key("logger:save_checkpoint_freq", _steps, "5000", _train),
    Key("logger:use_tb_logger", yes_no, "true", _train, empty=True),
    Key("logger:keep_last", whole("(0, 1e9]"), empty=True),
    Key("logger:save_best", text, empty=True),
    Key("logger:wandb", section, empty=True),
    Key("logger:wandb:project|resume_id", text, empty=True),
    Key("dist_params", section, empty=True),
    Key("dist_params:backend", choice("nccl", "gloo", "mpi", "ucc"), empty=True),
    Key("dist_params:port", whole("[1, 65535]"), empty=True),
    Key("dist_params:timeout", number("(0, 1e6]"), empty=True),
)
# Sections whose keys are names of the user's own.
FREE = ("datasets", "val:metrics")


@dataclass(frozen=True)
class DatasetKeys:
    """Which keys of a type of data sets are folders or LMDBs, HR first, and which is a list."""

    folders: tuple[str, ...]
    listing: str | None


def known_model(context: Context) -> str | None:
    """Return the model's name, None where it is not a model of BasicSR's or this package's."""
    name = context.options.get("model_type")
    model = context.registered_as("model", name)
    ours = model is None or comes_from(model, "basicsr", "dlgsanet_arch")
    return name if ours and name in MODELS else None


def known_dataset(context: Context, kind: Any) -> DatasetKeys | None:
    """Return the keys of a type of data sets that name files, None where it is not BasicSR's."""
    dataset = context.registered_as("dataset", kind)
    if kind not in DATASETS or not (dataset is None or comes_from(dataset, "basicsr")):
        return None
    paths = [key.names[0] for key in KEYS if key.kind is path and kind in key.by]
    listing = next((entry for entry in paths if entry.startswith("meta_info")), None)
    return DatasetKeys(tuple(entry for entry in paths if entry.startswith("dataroot")), listing)
