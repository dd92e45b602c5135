"""The table of keys: where a key stands, what it may be, when it must be there, and who reads it.

BasicSR 1.4.2 reads keys where it needs them and never looks at the others. Its single-image models
and data sets are in the table, with the keys of this package's pipeline; what networks, losses,
metrics and optimizers take is asked of their signatures. A key that is new is one row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dlgsanet_arch.options.context import Context, comes_from, join
from dlgsanet_arch.options.values import (
    Kind,
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
_PIXEL_MODELS = ("SRModel", "SwinIRModel", *OURS, "RealESRNetModel")
MODELS = (*_PIXEL_MODELS, *GAN)
_PAIRED = ("PairedImageDataset", "RealESRGANPairedDataset")
_SINGLE, _REAL_SET, _FFHQ = ("SingleImageDataset",), ("RealESRGANDataset",), ("FFHQDataset",)
_WITH_HR = (*_PAIRED, *_REAL_SET, *_FFHQ)
DATASETS = (*_PAIRED, *_SINGLE, *_REAL_SET, *_FFHQ)
_WITH_BORDER = ("calculate_psnr", "calculate_ssim", "calculate_niqe")
_STEPS = ("MultiStepLR", "MultiStepRestartLR")
SCHEDULERS = (*_STEPS, "CosineAnnealingRestartLR")


def _type(context: Context, at: str) -> Any:
    return context.section(at).get("type")


# When a key must be there, asked of a context and a section of a type that reads the key.
WHEN: dict[str, Callable[[Context, str], bool]] = {
    "": lambda c, at: False,
    "always": lambda c, at: True,
    "train": lambda c, at: c.train,
    "test": lambda c, at: not c.train,
    "gan": lambda c, at: c.train and c.options.get("model_type") in GAN,
    "synthetic": lambda c, at: c.train and c.options.get("high_order_degradation") is not False,
    "training set": lambda c, at: c.train and at == "datasets:train",
    "cropped": lambda c, at: c.train and at == "datasets:train" and _type(c, at) in _PAIRED,
    "augmented": lambda c, at: (
        (c.train and at == "datasets:train") or _type(c, at) in (*_REAL_SET, *_FFHQ)
    ),
    "known set": lambda c, at: _type(c, at.removesuffix(":io_backend")) in DATASETS,
    "listed": lambda c, at: _type(c, at) in _REAL_SET and _type(c, f"{at}:io_backend") != "lmdb",
    "no other loss": lambda c, at: (
        c.train
        and c.options.get("model_type") in _PIXEL_MODELS
        and not c.value("train:perceptual_opt")
    ),
    "images saved": lambda c, at: not c.train and bool(c.section("val").get("save_img")),
    "border": lambda c, at: str(_type(c, at)).startswith(_WITH_BORDER),
}


@dataclass(frozen=True)
class Key:
    """A row of the table."""

    path: str  # where it stands, "section:key"; * stands for any text
    kind: Kind  # what its value may be
    example: str = ""  # what to write where it is missing, $scale for that of the file
    needed: str = ""  # when it must be there, a key of WHEN
    by: tuple[str, ...] = ()  # who reads it; () for all
    empty: bool = False  # whether it may be ~
    registry: str = ""  # whose names it may have: BasicSR's "arch", ..., or "optimizer"

    @property
    def section(self) -> str:
        """The pattern of the section that it stands in."""
        return self.path.rpartition(":")[0]

    @property
    def name(self) -> str:
        """The pattern of its own name."""
        return self.path.rpartition(":")[2]


_share = number("[0, 1]")
_size, _large = whole("[1, 65536]"), whole("[0, 1e15]")
_context = choice("fork", "spawn", "forkserver")
_steps, _from_0 = count("(0, 1e9]"), count("[0, 1e9]")
_real: dict[str, Any] = {"needed": "synthetic", "by": REAL}
_blur: dict[str, Any] = {"needed": "always", "by": _REAL_SET}
_shapes = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
_pair, _range = listed(number("[0, 1e6]"), 2), listed(number("(0, 1e3]"), 2)
_percents = listed(number("[0, 100]"), 2)
_LOSS = "{type: L1Loss, loss_weight: 1.0, reduction: mean}"
_ADAM = "{type: Adam, lr: !!float 5e-4}"
_FOLDER = "datasets/benchmark/Set5/X4/"
_WEIGHTS = "experiments/tiny_x4/models/net_g_latest.pth"
_numbers, _spreads = listed(number()), listed(number("(0, 3e38]"))

_ROWS = (
    # the run
    Key("name", name, "tiny_x4", "always"),
    Key("model_type", text, "SRModel", "always", registry="model"),
    Key("scale", whole("[1, 100]"), "4", "always"),
    Key("num_gpu", either(whole("[0, 1024]"), choice("auto")), "auto", "always"),
    Key("manual_seed", whole("[0, 4294900000]"), empty=True),  # the rank is added; NumPy: 2^32
    Key("find_unused_parameters", yes_no, empty=True),
    Key("x_*|x-*", anything, empty=True),  # whatever holds anchors
    Key("gt_size", _size, "256", **_real),
    # of the models of Real-ESRGAN, with the published values; a 2 is of the second degradation
    Key("resize_prob|resize_prob2", weights(3), "[0.2, 0.7, 0.1]", **_real),
    Key("resize_range|resize_range2", _range, "[0.15, 1.5]", **_real),
    Key("gaussian_noise_prob|gaussian_noise_prob2", _share, "0.5", **_real),
    Key("noise_range|noise_range2", _pair, "[1, 30]", **_real),
    Key("poisson_scale_range|poisson_scale_range2", _pair, "[0.05, 3]", **_real),
    Key("gray_noise_prob|gray_noise_prob2", _share, "0.4", **_real),
    Key("jpeg_range|jpeg_range2", _percents, "[30, 95]", **_real),
    Key("second_blur_prob", _share, "0.8", **_real),
    Key("queue_size", whole("[1, 1e6]"), by=REAL),
    Key("high_order_degradation", yes_no, by=REAL),
    Key("gt_usm", yes_no, "true", "synthetic", ("RealESRNetModel",)),
    Key("l1_gt_usm|percep_gt_usm", yes_no, "true", "train", ("RealESRGANModel",)),
    Key("gan_gt_usm", yes_no, "false", "train", ("RealESRGANModel",)),
    # data
    Key("datasets", section, "{test_1: …}", "always"),
    Key("datasets:train", section, "{name: …, type: …}", "train"),
    Key("datasets:*", section),
    Key("datasets:train:name", text, "DIV2K", "always"),
    Key("datasets:*:name", name, "Set5", "always"),
    Key("datasets:*:type", text, "PairedImageDataset", "always", registry="dataset"),
    Key("datasets:*:batch_size_per_gpu", _size, "16", "training set"),
    Key("datasets:*:num_worker_per_gpu", whole("[0, 256]"), "6", "training set"),
    Key("datasets:*:dataset_enlarge_ratio", number("(0, 1e9]")),
    Key("datasets:*:phase|scale|use_shuffle", anything, empty=True),  # set by BasicSR; never read
    Key("datasets:*:pin_memory|persistent_workers", yes_no, empty=True),
    Key("datasets:*:prefetch_mode", choice("cuda", "cpu"), empty=True),
    Key("datasets:*:num_prefetch_queue", whole("[1, 65536]")),
    Key("datasets:train:skip_bad_samples", whole("[0, 1e9]"), empty=True),
    Key("datasets:train:multiprocessing_context", _context, empty=True),
    Key("datasets:train:prefetch_factor", whole("[1, 65536]"), empty=True),
    Key("datasets:*:dataroot_gt", path, f"{_FOLDER}HR", "known set", _WITH_HR),
    Key("datasets:*:dataroot_lq", path, f"{_FOLDER}LR", "known set", (*_PAIRED, *_SINGLE)),
    Key("datasets:*:meta_info_file", path, by=_PAIRED[:1], empty=True),
    Key("datasets:*:meta_info_file", path, by=_SINGLE),  # fails on ~
    Key("datasets:*:meta_info", path, "datasets/DF2K/meta_info.txt", "listed", _REAL_SET),
    Key("datasets:*:meta_info", path, by=_PAIRED[1:], empty=True),
    Key("datasets:*:filename_tmpl", template, by=_PAIRED),
    Key("datasets:*:color", choice("y"), by=(*_PAIRED[:1], *_SINGLE), empty=True),
    Key("datasets:*:gt_size", _size, "192", "cropped", (*_PAIRED, *_REAL_SET)),
    Key("datasets:*:use_hflip", yes_no, "true", "augmented", _WITH_HR),
    Key("datasets:*:use_rot", yes_no, "true", "augmented", (*_PAIRED, *_REAL_SET)),
    Key("datasets:*:mean", _numbers, "[0.5, 0.5, 0.5]", "always", _FFHQ),
    Key("datasets:*:std", _spreads, "[0.5, 0.5, 0.5]", "always", _FFHQ),
    Key("datasets:*:mean", _numbers, by=(*_PAIRED, *_SINGLE), empty=True),
    Key("datasets:*:std", _spreads, by=(*_PAIRED, *_SINGLE), empty=True),
    Key("datasets:*:blur_kernel_size|blur_kernel_size2", whole("[1, 21]"), "21", **_blur),
    Key("datasets:*:kernel_list|kernel_list2", listed(choice(*_shapes)), "[iso, aniso]", **_blur),
    Key("datasets:*:kernel_prob|kernel_prob2", weights(), "[0.5, 0.5]", **_blur),
    Key("datasets:*:sinc_prob|sinc_prob2", _share, "0.1", **_blur),
    Key("datasets:*:blur_sigma|blur_sigma2", _pair, "[0.2, 3]", **_blur),
    Key("datasets:*:betag_range|betag_range2", _pair, "[0.5, 4]", **_blur),
    Key("datasets:*:betap_range|betap_range2", _pair, "[1, 2]", **_blur),
    Key("datasets:*:final_sinc_prob", _share, "0.8", **_blur),
    Key("datasets:*:io_backend", section, "{type: disk}", "known set"),
    Key("datasets:*:io_backend:type", choice("disk", "lmdb", "memcached"), "disk", "known set"),
    Key("datasets:*:io_backend:readonly|lock|readahead|meminit|subdir", yes_no, by=("lmdb",)),
    Key("datasets:*:io_backend:map_size|max_readers|max_dbs|mode", _large, by=("lmdb",)),
    Key("datasets:*:io_backend:max_spare_txns", _large, by=("lmdb",)),
    Key("datasets:*:io_backend:server_list_cfg|client_cfg|sys_path", path, by=("memcached",)),
    # networks, and the files that they start from
    Key("network_g", section, "{type: DLGSANet, …}", "always"),
    Key("network_d", section, "{type: UNetDiscriminatorSN, …}", "gan"),
    Key("network_*", section, empty=True),
    Key("network_*:type", text, "DLGSANet", "always", registry="arch"),
    Key("path", section, "{}", "always"),
    Key("path:pretrain_network_*|resume_state", path, empty=True),
    Key("path:pretrain_network_g", path, _WEIGHTS, "test"),
    Key("path:strict_load_*", yes_no, empty=True),
    Key("path:param_key_*", text, empty=True),
    Key("path:ignore_resume_networks", either(listed(text), text), empty=True),
    Key("path:root|experiments_root|results_root|models", path, empty=True),  # set by BasicSR
    Key("path:training_states|log|visualization", path, empty=True),
    # training
    Key("train", section, "{total_iter: 500000, …}", "train"),
    Key("train:total_iter", _steps, "500000", "train"),
    Key("train:warmup_iter", count("[-1, 1e9]")),
    Key("train:max_minutes", number("(0, 1e7]"), empty=True),
    Key("train:ema_decay", number("[0, 1)")),
    Key("train:optim_g", section, _ADAM, "train"),
    Key("train:optim_d", section, _ADAM, "gan", GAN),
    Key("train:optim_*:type", text, "Adam", "train", registry="optimizer"),
    Key("train:optim_*:lr", number("[0, 1e6]"), "!!float 5e-4", "train"),
    Key("train:optim_*:betas", listed(number("[0, 1)"), 2)),
    Key("train:optim_*:eps|weight_decay", number("[0, 1e6]")),
    Key("train:scheduler", section, "{type: MultiStepLR, milestones: …}", "train"),
    Key("train:scheduler:type", text, "MultiStepLR", "train"),
    Key("train:scheduler:milestones", listed(_from_0), "[250000]", "always", _STEPS),
    Key("train:scheduler:gamma", number("[0, 1e6]"), by=_STEPS),
    Key("train:scheduler:restarts", listed(_from_0), by=_STEPS),
    Key("train:scheduler:periods", listed(_steps), "[500000]", "always", SCHEDULERS[2:]),
    Key("train:scheduler:restart_weights", listed(number("[0, 1e6]")), by=SCHEDULERS),
    Key("train:scheduler:eta_min", number("[0, 1e6]"), by=SCHEDULERS[2:]),
    Key("train:scheduler:last_epoch", whole("[-1, 1e9]"), by=SCHEDULERS),
    Key("train:pixel_opt", section, _LOSS, "no other loss", empty=True),
    Key("train:perceptual_opt", section, empty=True),
    Key("train:gan_opt", section, "{type: GANLoss, …}", "gan", GAN),
    Key("train:ldl_opt", section, by=GAN, empty=True),
    Key("train:*_opt:type", text, "L1Loss", "train", registry="loss"),
    Key("train:*_opt:reduction", choice("mean", "sum")),  # `none` is not a loss to be minimised
    Key("train:*_opt:gan_type", choice("vanilla", "lsgan", "wgan", "wgan_softplus", "hinge")),
    Key("train:*_opt:criterion", choice("l1", "fro")),  # BasicSR fails on `l2`
    Key("train:*_opt:layer_weights", section),
    Key("train:net_d_iters", _steps, by=GAN),
    Key("train:net_d_init_iters", _from_0, by=GAN),
    Key("train:amp", choice("bf16", "fp16", False), by=OURS, empty=True),
    Key("train:channels_last", yes_no, by=OURS, empty=True),
    Key("train:compile", either(yes_no, text), by=OURS, empty=True),  # a backend
    Key("train:clip_grad_norm", either(number("(0, inf]"), choice(False)), by=OURS, empty=True),
    Key("train:accumulation", _size, by=OURS, empty=True),
    # validation
    Key("val", section, "{save_img: true, …}", "test", empty=True),
    Key("val:val_freq", _steps, "5000", "train"),
    Key("val:save_img", yes_no, "false", "always"),
    Key("val:suffix", part_of_name, "~", "images saved", empty=True),
    Key("val:pbar|self_ensemble", yes_no, empty=True),
    Key("val:tile|tile_overlap", whole("[0, 1e9]"), empty=True),
    Key("val:metrics", section, empty=True),
    Key("val:metrics:*", section),
    Key("val:metrics:*:type", text, "calculate_psnr", "always", registry="metric"),
    Key("val:metrics:*:better", choice("higher", "lower")),
    Key("val:metrics:*:crop_border", whole("[0, 65536]"), "$scale", "border"),
    Key("val:metrics:*:input_order", choice("HWC", "CHW")),
    Key("val:metrics:*:convert_to", choice("y", "gray")),
    # reports, checkpoints, several processes
    Key("logger", section, "{print_freq: 100, …}", "train"),
    Key("logger:print_freq", _steps, "100", "train"),
    Key("logger:save_checkpoint_freq", _steps, "5000", "train"),
    Key("logger:use_tb_logger", yes_no, "true", "train", empty=True),
    Key("logger:keep_last", whole("(0, 1e9]"), empty=True),
    Key("logger:save_best", text, empty=True),
    Key("logger:wandb", section, empty=True),
    Key("logger:wandb:project|resume_id", text, empty=True),
    Key("dist_params", section, empty=True),
    Key("dist_params:backend", choice("nccl", "gloo", "mpi", "ucc"), empty=True),
    Key("dist_params:port", whole("[1, 65535]"), empty=True),
    Key("dist_params:timeout", number("(0, 1e6]"), empty=True),
)
KEYS = tuple(  # "section:a|b" is a row for each name
    replace(row, path=join(row.section, name)) for row in _ROWS for name in row.name.split("|")
)


class DatasetKeys(NamedTuple):
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
    paths = [key.name for key in KEYS if key.kind is path and kind in key.by]
    listing = next((entry for entry in paths if entry.startswith("meta_info")), None)
    return DatasetKeys(tuple(entry for entry in paths if entry.startswith("dataroot")), listing)
