"""Every mistake in an option file is reported at once, by its path, before anything is created."""

import math

import pytest
from helpers import small_test_options
from option_cases import ABSENT, ESRGAN, GAN, REAL, SWINIR, SYNTHETIC, changed, train_options

from dlgsanet_arch import options as option_files
from dlgsanet_arch.options import OptionsError, parse_value, refuse

OURS = {"model_type": "DLGSANetModel"}
TWO_STEP = {"model_type": "TwoStepModel"}
EDSR = {"network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3}}
VGG_DISCRIMINATOR = {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 8}
COSINE = {"type": "CosineAnnealingRestartLR", "periods": [2, 2], "restart_weights": [1, 1]}
LMDB = {"type": "lmdb"}
SINGLE = {"name": "a", "type": "SingleImageDataset", "dataroot_lq": "data/LR",
          "io_backend": {"type": "disk"}}  # fmt: skip


@pytest.fixture(scope="module", name="registered")
def _registered(registered):
    """What BasicSR's registries hold, and somebody else's data set, model and network."""
    from basicsr.models.sr_model import SRModel

    class Frames:
        def __init__(self, opt):
            self.folder = opt["dataroot_lr"]

    class TwoStepModel(SRModel):
        def optimize_parameters(self, current_iter):
            self.weight = self.opt["train"].get("total_iters")

    def denoiser(channels, **kwargs):
        return channels, kwargs.get("channel")

    found = {name: dict(entries) for name, entries in registered.items()}
    found["model"]["TwoStepModel"] = TwoStepModel
    found["dataset"]["Frames"] = Frames
    found["arch"]["denoiser"] = denoiser
    return found


@pytest.fixture
def problems(option_root, registered):
    """Return the lines of the report, for options that train or test."""

    def problems(options, train=True):
        before = repr(options)
        found = option_files.problems(options, train=train, root=option_root, registered=registered)
        assert repr(options) == before
        return found

    return problems


@pytest.fixture
def testing(option_root):
    return small_test_options(option_root / "data", option_root / "weights.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {}, ESRGAN, SWINIR, SYNTHETIC, REAL, EDSR | {"network_g:upscale": 2},
        ESRGAN | {"train:ldl_opt": {"type": "L1Loss"}},
        {"model_type": "SRGANModel", **GAN, "network_d": VGG_DISCRIMINATOR,
         "datasets:train:gt_size": 128},
        {"val": ABSENT, "datasets:val": ABSENT}, {"network_g:upsampler": "", "scale": 1},
        {"network_g": {"type": "denoiser", "channels": 3, "channel": 3, "anything": 1}},
        {"datasets:train:dataroot_gt": "pairs.lmdb", "datasets:train:dataroot_lq": "pairs.lmdb",
         "datasets:train:io_backend": LMDB | {"readahead": True}},
        {"datasets:val:meta_info_file": "names.txt"}, {"datasets:val": SINGLE},
        {"path:resume_state": "weights.pth", "path:pretrain_network_g": "gone.pth"},
        {"datasets:train:use_shuffle": True, "val:pbar": False, "find_unused_parameters": True},
        {"datasets:train:skip_bad_samples": 3, "datasets:train:multiprocessing_context": None,
         "datasets:train:prefetch_factor": 4, "datasets:train:num_worker_per_gpu": 1,
         "datasets:val:num_worker_per_gpu": 2, "logger:keep_last": 3, "logger:save_best": "psnr",
         "val:self_ensemble": True, "val:tile": 32, "val:tile_overlap": 8,
         "dist_params": {"backend": "gloo", "port": 29500, "timeout": 30}},
        {"logger:save_best": "made_val/psnr", "logger:keep_last": None, "val:tile": None},
        OURS | {"train:amp": "bf16", "train:channels_last": True, "train:compile": False,
                "train:clip_grad_norm": 1, "train:accumulation": 2,
                "train:optim_g": {"type": "AdamW", "lr": 1e-4, "fused": True}},
        OURS | {"train:compile": "inductor", "train:clip_grad_norm": math.inf, "train:amp": None,
                "train:accumulation": None},
        TWO_STEP | {"train:step": 3, "train:total_iters": 4, "steps": {"a": 1},
                    "train:optim_g": {"type": "Lion", "lr": 1e-4, "anything": 1}},
        TWO_STEP | {"train:optim_g:anything": 1},
        {"datasets:train": {"name": "a", "type": "Frames", "dataroot_lr": "data", "frames": 7,
                            "batch_size_per_gpu": 1, "num_worker_per_gpu": 0}},
        {"train:scheduler": COSINE | {"restart_weights": [1, 0.5], "eta_min": 1e-7}},
        {"datasets:train:prefetch_mode": "cuda", "datasets:train:pin_memory": True},
        {"val:metrics:psnr:better": "higher", "val:metrics:psnr:input_order": "HWC"},
        {"x_common": {"a": {"b": 1}}, "x-more": [1], "x_empty": None},
        {"datasets:train:color": "y", "datasets:val:color": "y", "network_g:in_chans": 1},
        {"train:total_iter": 4e0, "val:val_freq": 5e3, "logger:print_freq": 1e2, "num_gpu": 0},
        {"train:max_minutes": 0.5}, {"train:max_minutes": None},
        {"manual_seed": None, "val": None, "dist_params": None, "train:perceptual_opt": None},
        {"datasets:train:name": "DF2K/OST", "name": "a b.c-d_é"}, {"name": "a" * 200},
    ],
    ids=str,
)  # fmt: skip
def test_good_options_pass(problems, changes):
    assert problems(train_options(changes)) == []


def test_good_options_to_test_pass(problems, testing):
    assert problems(testing, train=False) == []


# Changes as `--force_yml` has them ("-" deletes), then the start of the one line that must be
# reported, and parts of the rest. Values are YAML.
FAULTS = """
name=- => name: missing; write `name: tiny_x4`
path=~ => path: empty; write `path: {}`
logger=- => logger: missing; write `logger: {print_freq
train:pixel_opt=- => train:pixel_opt: missing; write `pixel_opt: {type: L1Loss
val:metrics:psnr:crop_border=- => val:metrics:psnr:crop_border: missing; write `crop_border: 2`
datasets:train=- => datasets:train: missing; write `train: {name: …, type
datasets:val:dataroot_lq=- => datasets:val:dataroot_lq: missing; write `dataroot_lq: datasets/bench
datasets:test_1={name: a, type: Frames} => datasets:test_1: not the name of a data set
datasets:val=- => val: the file names no validation set; add datasets:val

name=4 => name: must be text; got 4; write it in quotes
name=../mine => name: must have no /
name=.. => name: must be the name of a folder
name="a\\0b" => name: must have no / and no control characters
manual_seed=4294967296 => manual_seed: must be a whole number in [0, 4294900000]
num_gpu=all => num_gpu: must be a number without quotes; got 'all'
train:optim_g:betas=0.9 => train:optim_g:betas: must be a list of 2 values; got 0.9
train:optim_g:betas=[0.9, 1] => train:optim_g:betas: must be a number in [0, 1); got 1
train:total_iter=.inf => train:total_iter: must be a whole number in (0, 1e9]; got inf
train:warmup_iter=~ => train:warmup_iter: is empty
train:max_minutes=0 => train:max_minutes: must be a number in (0, 1e7]; got 0
train:max_minutes=2h => train:max_minutes: must be a number without quotes; got '2h'
train:ema_decay=true => train:ema_decay: must be a number in [0, 1); got true
train:scheduler:milestones=200 => train:scheduler:milestones: must be a list
train:pixel_opt:reduction='none' => train:pixel_opt:reduction: 'none' is not … 'mean', 'sum'
train:optim_g:type=AdamW => train:optim_g:type: 'AdamW' is not known to this model; write Adam, or
datasets:train:num_worker_per_gpu=100000 => datasets:train:num_worker_per_gpu: … in [0, 256]; got
dist_params=3 => dist_params: must be a section of keys; got 3
model_type={} => model_type: must be text; got {}
val:val_freq=.nan => val:val_freq: must be a whole number in (0, 1e9]; got nan
datasets:train:gt_size=32.0 => datasets:train:gt_size: must be a whole number in [1, 65536]; got 32
datasets:train:filename_tmpl='{' => datasets:train:filename_tmpl: must have {} where
path:pretrain_network_g=~no-such-user/x => path:pretrain_network_g: names an unknown user … ./~no
network_g:activation=1 => network_g:activation: must be text
network_g:buildblock_type=sparsedge => network_g:buildblock_type: … one of 'sparseedge'

a=1 => a: SRModel does not read it; delete it
netowrk_d={type: EDSR} => netowrk_d: … did you mean 'network_d'?
queue_size=180 => queue_size: SRModel does not read it, RealESRNetModel, RealESRGANModel would
train:ema_deacy=0.9 => train:ema_deacy: SRModel does not read it; did you mean 'ema_decay'?
train:scheduler:gama=0.5 => train:scheduler:gama: MultiStepLR does not read it; did you mean
datasets:train:use_flip=true => datasets:train:use_flip: PairedImageDataset does not read it; did
datasets:val:io_backend:readahead=true => datasets:val:io_backend:readahead: disk does not read it
datasets:val={name: a, type: Frames, dataroot_lqq: x} => datasets:val:dataroot_lqq: Frames does not
network_g={type: SwinIR, mlp_ratoi: 2} => network_g:mlp_ratoi: SwinIR does not … 'mlp_ratio'?
network_g={type: denoiser, channels: 3, chanels: 3} => network_g:chanels: … did you mean 'channels'?
network_g={type: EDSR, num_in_ch: 3} => network_g:num_out_ch: missing; EDSR has no default for it

scale=4 & datasets:train:gt_size=32 => network_g:upscale: network_g enlarges by 2, but scale is 4
network_g:upsampler='' => network_g:upscale: network_g enlarges by 1, but scale is 2
datasets:train:gt_size=33 => datasets:train:gt_size: 33 is not a multiple of scale 2; write 32
train:scheduler:restarts=[0, 2] => train:scheduler:restart_weights: has 1 values for 2 restarts
train:warmup_iter=4 => train:warmup_iter: must be less than train:total_iter 4
val:tile=16 & val:tile_overlap=16 => val:tile_overlap: must be less than val:tile 16
logger:save_best=ssim => logger:save_best: val:metrics has no 'ssim'
logger:save_best=Set5/psnr => logger:save_best: no validation set is named 'Set5' … 'made_val'
logger:save_best=psnr & val=- => logger:save_best: val:metrics has no 'psnr'; add it there
logger:wandb={project: a} => logger:use_tb_logger: must be true for wandb
datasets:train:prefetch_mode=cpu => datasets:train:prefetch_mode: with cpu, … wait for ever
datasets:train:prefetch_mode=cuda => datasets:train:pin_memory: must be true for prefetch
datasets:train:prefetch_factor=2 => datasets:train:prefetch_factor: needs workers
datasets:train:mean=[0, 0, 0] => datasets:train:mean: needs mean and std, each of 3 numbers
datasets:val:mean=[0, 0] & datasets:val:std=[1, 1] => datasets:val:mean: needs mean and std
datasets:val:std=[0, 0, 0] => datasets:val:std: must be a number in (0, 3e38]; got 0

model_type=SrModel => model_type: no model is registered as 'SrModel'; did you mean 'SRModel'?
val:metrics:psnr:type=calculate_psrn => val:metrics:psnr:type: no metric is registered

datasets:train:dataroot_gt=gone => datasets:train:dataroot_gt: the HR images of the training set
datasets:val:dataroot_lq=empty => datasets:val:dataroot_lq: the LR … empty holds no images
datasets:val:dataroot_lq=weights.pth => datasets:val:dataroot_lq: … is not a folder
datasets:val:dataroot_lq=pairs.lmdb => datasets:val:dataroot_lq: … is an LMDB
datasets:val:meta_info_file=gone.txt => datasets:val:meta_info_file: the list … gone.txt does not
path:pretrain_network_g=gone.pth => path:pretrain_network_g: … gone.pth does not exist … models)
"""
WITH_BASE = [
    (OURS, """
train:amp=bf-16 => train:amp: 'bf-16' is not known; did you mean 'bf16'?
train:accumulation=3 => train:accumulation: a batch of 2 has no 3 parts; write 2
"""),
    (TWO_STEP, """
train:total_itres=4 => train:total_itres: TwoStepModel does not read it; did you mean 'total_iter'?
"""),
    ({"train:scheduler": COSINE}, """
train:scheduler:periods=[2, 1] => train:scheduler:periods: their sum, 3, is less than train:total_
train:scheduler:periods=- => train:scheduler:periods: missing
"""),
    ({"train:scheduler:restarts": [0, 3], "train:scheduler:restart_weights": [1, 1]}, """
val:tile=~ => train:scheduler:milestones: 3 is a restart too
"""),
    ({"datasets:val:io_backend": LMDB, "datasets:val:dataroot_gt": "pairs.lmdb"}, """
val:tile=~ => datasets:val:dataroot_lq: … LR is not an LMDB by its name … `type: disk`
datasets:val:dataroot_lq=empty.lmdb => datasets:val:dataroot_lq: … has no data.mdb
"""),
    ({"datasets:val": SINGLE}, """
datasets:val:meta_info_file=~ => datasets:val:meta_info_file: is empty (~)
"""),
    (ESRGAN, """
network_d=- => network_d: missing
train:gan_opt=- => train:gan_opt: missing; write `gan_opt: {type
train:optim_d:lr=~ => train:optim_d:lr: empty; write
"""),
    (SYNTHETIC, """
gt_size=402 => gt_size: BasicSR cuts images to 400
datasets:train:kernel_prob=[1] => datasets:train:kernel_prob: has 1 for 2
resize_prob=[0, 0, 0] => resize_prob: must not all be 0
queue_size=181 => queue_size: 181 is not a multiple of datasets:train:batch_size_per_gpu 2; write 18
resize_prob=- => resize_prob: missing; write `resize_prob: [0.2, 0.7, 0.1]`
"""),
    (SWINIR, """
network_g={type: SwinIR, upscale: 2} => network_g:window_size: missing
"""),
    ("testing", """
datasets=- => datasets: missing; write `datasets: {test_1: …}`
datasets={} => datasets: there is nothing to test on
datasets:train={name: a, type: Frames} => datasets:train: not the name of a data set
path:pretrain_network_g=~ => path:pretrain_network_g: empty; write `pretrain_network_g: exp
val=- => val: missing; write `val: {save_img
"""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "row"),
    [
        (base, row)
        for base, table in [({}, FAULTS), *WITH_BASE]
        for row in table.splitlines()
        if row
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_each_fault_is_reported_once(problems, testing, base, row):
    train = base != "testing"
    options = train_options(base) if train else testing
    changes, said = row.split(" => ")
    for change in changes.split(" & "):
        path, _, value = change.partition("=")
        changed(options, {path: ABSENT if value == "-" else parse_value(value)})
    reported = problems(options, train)
    assert len(reported) == 1, reported
    start, *parts = said.split(" … ")
    assert reported[0].startswith(start.rstrip()), reported
    assert all(part in reported[0] for part in parts), reported


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("name", "a" * 260, "200 bytes"), ("name", "a\nb", "control"),
        ("path", {"pretrain_network_g": "a" * 256}, "must be a path"), (1, 2, "a key must be text"),
    ],
)  # fmt: skip
def test_what_yaml_in_one_line_cannot_say_is_reported_too(problems, path, value, said):
    (reported,) = problems(train_options() | {path: value})
    assert reported.startswith(f"{path}:")
    assert said in reported


def test_a_misspelt_key_that_is_needed_is_missing_and_meant(problems):
    options = train_options()
    options["loger"] = options.pop("logger")
    missing, misspelt = problems(options)
    assert missing.startswith("logger: missing; write ")
    assert misspelt.startswith("loger: ")
    assert "did you mean 'logger'?" in misspelt


def test_paths_may_start_from_the_home_folder(problems, option_root, monkeypatch):
    monkeypatch.setenv("HOME", str(option_root))
    changes = {"path:pretrain_network_g": "~/weights.pth", "datasets:val:dataroot_gt": "~/data/HR"}
    assert problems(train_options(changes)) == []


def test_problems_are_raised_as_one_error():
    refuse([])
    with pytest.raises(OptionsError, match=r"^the options have a problem:\n  a: b$"):
        refuse(["a: b"])
    with pytest.raises(OptionsError, match=r"^the options have 2 problems:\n  a\n  b$"):
        refuse(["a", "b"])
