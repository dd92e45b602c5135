"""Wrong values and values that do not fit together, of every kind and for every model."""

import math

import pytest
from option_cases import ESRGAN, GAN, REAL, SWINIR, SYNTHETIC, changed, train_options

from dlgsanet_arch import options as option_files

pytestmark = pytest.mark.usefixtures("vgg")
OURS = {"model_type": "DLGSANetModel"}


@pytest.fixture
def problems(option_root, registered):
    """Return the lines of the report on options that train."""

    def problems(options):
        return option_files.problems(options, train=True, root=option_root, registered=registered)

    return problems


@pytest.mark.parametrize(
    "changes",
    [
        {}, ESRGAN, SWINIR, SYNTHETIC, REAL,
        {"x_common": {"a": {"b": 1}}, "x-more": [1], "x_empty": None},
        {"datasets:train:color": "y", "datasets:val:color": "y", "network_g:in_chans": 1},
        {**OURS, "train:compile": "inductor"}, {**OURS, "train:compile": False},
        {**OURS, "train:clip_grad_norm": math.inf}, {**OURS, "train:clip_grad_norm": 1e-3},
        {**OURS, "train:amp": None, "train:accumulation": None},
        {"train:total_iter": 4e0, "val:val_freq": 5e3, "logger:print_freq": 1e2},
        {"manual_seed": None}, {"manual_seed": 0}, {"num_gpu": 0}, {"train:ema_decay": 0},
        {"datasets:train:name": "DF2K/OST"}, {"name": "a b.c-d_é"}, {"name": "a" * 200},
        {"val": None}, {"dist_params": None}, {"train:perceptual_opt": None},
        {"model_type": "SRGANModel", **GAN,
         "network_d": {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 8},
         "datasets:train:gt_size": 128},
    ],
    ids=str,
)  # fmt: skip
def test_good_values_pass(problems, changes):
    assert problems(train_options(changes)) == []


# Path, value, and a part of the one line that must be reported.
WRONG = [
    # names of folders
    *[("name", name, "") for name in ("../mine", ".", "", "..", "a/b", "/a", "a" * 260, "a\0b")],
    *[("name", name, "") for name in ("a\nb", "é" * 101, True, ["a"], {"a": 1}, math.nan)],
    *[("datasets:val:name", name, "") for name in ("../a", "", "a/b", 291, [])],
    # numbers
    ("manual_seed", 2**32, "at most 4,294,900,000"), ("manual_seed", -1, "0 or above"),
    ("scale", 10**400, ""), ("scale", 1e400, ""), ("num_gpu", "all", "not a number"),
    *[("train:total_iter", value, "") for value in (math.inf, math.nan, 0.5, 10**300, [4])],
    *[("val:val_freq", value, "") for value in (math.nan, math.inf, 0.5, {}, True)],
    *[("logger:print_freq", value, "") for value in ([1], math.nan, "100", None)],
    *[("datasets:train:dataset_enlarge_ratio", value, "") for value in (math.nan, math.inf, 0)],
    *[("train:ema_decay", value, "") for value in ([0.9], None, math.nan, -0.1, 1.5)],
    ("train:warmup_iter", None, "is empty"), ("train:warmup_iter", 0.5, "whole number"),
    ("datasets:train:num_worker_per_gpu", 100_000, "at most 256"),
    ("datasets:val:num_worker_per_gpu", 100_000, "at most 256"),
    ("datasets:train:batch_size_per_gpu", 10**9, "at most 65,536"),
    ("train:optim_g:betas", 0.9, "must be a list such as [0.9, 0.99]"),
    ("train:optim_g:betas", [0.9], "must have 2 values"),
    ("train:optim_g:betas", [0.9, 1], "less than 1"),
    ("train:optim_g:weight_decay", -1, "0 or above"), ("train:optim_g:lr", [1e-3], "a number"),
    ("train:scheduler:milestones", 200, "must be a list such as"),
    ("train:scheduler:milestones", [math.nan], "whole number"),
    ("train:scheduler:gamma", {}, "must be a number"),
    ("val:metrics:psnr:crop_border", [], "whole number"),
    ("val:metrics:psnr:crop_border", -1, "0 or above"),
    ("dist_params:port", 70_000, "at most 65,535"),
    # true and false, choices, text, sections
    ("train:pixel_opt:reduction", "avg", "there are: 'mean', 'sum'"),
    ("train:pixel_opt:reduction", "none", "is not known"),
    ("train:pixel_opt:loss_weight", None, "is empty"),
    ("train:pixel_opt:loss_weight", math.nan, "must be a number"),
    ("val:metrics:psnr:test_y_channel", 1, "true or false"),
    ("val:metrics:psnr:input_order", "CWH", "is not known"),
    ("val:suffix", "../x", "must have no /"), ("datasets:train:filename_tmpl", "{", "{}"),
    ("dist_params", 3, "must be a section"), ("val:tile", {}, "whole number"),
    ("val:metrics:psnr", 3, "must be a section"), ("datasets:val", None, "is empty"),
    ("model_type", {}, "must be text"), ("network_g:type", {"a": 1}, "must be text"),
    ("datasets:val:type", ["a"], "must be text"), ("train:pixel_opt:type", {}, "must be text"),
    ("datasets:train:dataroot_gt", ["a"], "must be text"),
    ("path:pretrain_network_g", "~nobody-of-that-name/x.pth", "no such user"),
    ("path:strict_load_g", "yes", "true or false"),
    (1, 2, "a key must be text"), ("train:1", 2, ""), ("a", 1, "not read it"),
    # networks
    ("network_g:groups", 1_000_000, "at most 1,000"), ("network_g:dim", 10**9, "at most"),
    ("network_g:in_chans", 10**9, "at most 1,000"), ("network_g:img_range", math.inf, "finite"),
    ("network_g:tlc_flag", "yes", "true or false"), ("network_g:window_size", math.nan, ""),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "said"), WRONG, ids=lambda each: repr(each)[:40])
def test_a_wrong_value_is_reported_once_by_its_key(problems, path, value, said):
    options = train_options({"dist_params": {}})
    changed(options, {path: value}) if isinstance(path, str) else options.update({path: value})
    reported = problems(options)
    assert len(reported) == 1, reported
    assert reported[0].startswith(f"{path}: ")
    assert said in reported[0]


# Base, changes, and the path and a part of the one line that must be reported.
UNFIT = [
    ({}, {"network_g:in_chans": 1}, "network_g:in_chans: is 1, but images of datasets:train", 2),
    ({}, {"datasets:train:color": "y"}, "network_g:in_chans: is 3, but images of datasets:train "
     "have 1 channel (by `color: y`)", 1),
    ({}, {"datasets:val:color": "y"}, "network_g:in_chans: is 3, but images of datasets:val", 1),
    ({}, {"datasets:train:mean": [0.5]}, "datasets:train:mean: must have a value for each of 3", 1),
    (ESRGAN, {"network_g:num_out_ch": 1}, "network_g:num_out_ch: is 1, but images", 2),
    (ESRGAN, {"network_d:num_in_ch": 1}, "network_d:num_in_ch: is 1, but images", 2),
    (ESRGAN, {"datasets:train:gt_size": 256}, "network_d:input_size: is 128, but datasets:train:gt_"
     "size is 256", 1),
    (ESRGAN, {"network_d:input_size": 192}, "network_d:input_size: must be 128 or 256", 1),
    (ESRGAN, {"train:gan_opt:gan_type": "gan"}, "train:gan_opt:gan_type: 'gan' is", 1),
    (ESRGAN, {"train:gan_opt:real_label_val": [1]}, "train:gan_opt:real_label_val: must", 1),
    (ESRGAN, {"train:optim_d:betas": 1}, "train:optim_d:betas: must be a list", 1),
    (ESRGAN, {"train:optim_d:lr": None}, "train:optim_d:lr: empty; write", 1),
    (ESRGAN, {"network_d": {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 10**6}},
     "network_d:num_feat: must be at most 1,000", 1),
    (ESRGAN, {"train:net_d_iters": 0}, "train:net_d_iters: must be above 0", 1),
    (ESRGAN, {"train:perceptual_opt:vgg_type": "vgg18"}, "train:perceptual_opt:vgg_type: 'vgg", 1),
    (ESRGAN, {"train:perceptual_opt:layer_weights": {"conv5_5": 1}},
     "train:perceptual_opt:layer_weights:conv5_5: vgg19 has no such layer", 1),
    (ESRGAN, {"train:perceptual_opt:layer_weights": {"conv5_4": "a"}},
     "train:perceptual_opt:layer_weights:conv5_4: must be a number", 1),
    (ESRGAN, {"train:perceptual_opt:criterion": "l2"}, "train:perceptual_opt:criterion: 'l2'", 1),
    (SYNTHETIC, {"gt_size": 402}, "gt_size: is 402, but BasicSR cuts images to 400", 1),
    (SYNTHETIC, {"datasets:train:kernel_prob": [1]}, "datasets:train:kernel_prob: has 1 for 2", 1),
    (SYNTHETIC, {"resize_prob": [0, 0, 0]}, "resize_prob: must not all be 0", 1),
    (SYNTHETIC, {"jpeg_range2": [30, 950]}, "jpeg_range2: must be at most 100", 1),
    (SYNTHETIC, {"noise_range": 3}, "noise_range: must be a list such as [1, 30]", 1),
    (SWINIR, {"network_g": {"type": "SwinIR", "upscale": 2}}, "network_g:window_size: missing", 1),
    (SWINIR, {"network_g:embed_dim": 10**6}, "network_g:embed_dim: must be at most 9,600", 1),
    (SWINIR, {"network_g:depths": 6.5}, "", 0),
    ({}, {"network_g:dim": 600, "network_g:blocks": 900,
          "network_g:groups": 900}, "network_g: a", 1),
    (OURS, {"train:optim_g": {"type": "SGD", "lr": 1e-3, "nesterov": True}},
     "train:optim_g: SGD cannot be built with these arguments: Nesterov", 1),
    ({}, {"datasets:val_2": {"name": "made_val", "type": "PairedImageDataset",
      "dataroot_gt": "data/HR", "dataroot_lq": "data/LR", "io_backend": {"type": "disk"}}},
     "datasets:val_2:name: datasets:val is named 'made_val' too", 1),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "said", "lines"), UNFIT, ids=lambda v: str(v)[:40])
def test_what_does_not_fit_together_is_reported(problems, base, changes, said, lines):
    reported = problems(changed(train_options(base), changes))
    assert len(reported) == lines, reported
    assert all(line.startswith(said[:8]) for line in reported)
    assert not lines or reported[0].startswith(said)


def test_weights_of_vgg_that_cannot_be_had_are_asked_for(problems, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dlgsanet_arch.options.paths._answers", lambda url: False)
    (reported,) = problems(train_options(ESRGAN))
    assert reported.startswith("train:perceptual_opt: needs vgg19-dcbb9e9d.pth, and https://")
    assert f"put it at {tmp_path}/hub/checkpoints/vgg19-dcbb9e9d.pth" in reported
    own = tmp_path / "experiments/pretrained_models/vgg19-dcbb9e9d.pth"
    own.parent.mkdir(parents=True)
    own.touch()
    assert problems(train_options(ESRGAN)) == []
