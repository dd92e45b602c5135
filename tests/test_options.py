"""Every mistake in an option file is reported at once, by its path, before anything is created."""

import copy

import pytest
from helpers import small_test_options
from option_cases import ABSENT, GAN, REAL, changed, train_options

from dlgsanet_arch import options as option_files
from dlgsanet_arch.options import OptionsError, refuse


@pytest.fixture(scope="module")
def root(option_root):
    return option_root


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


def problems(options, root, registered, train=True):
    """Return the lines of the report."""
    before = copy.deepcopy(options)
    found = option_files.problems(options, train=train, root=root, registered=registered)
    assert options == before
    return found


def test_good_options_pass(root, registered):
    assert problems(train_options(), root, registered) == []
    testing = small_test_options(root / "data", root / "weights.pth")
    assert problems(testing, root, registered, train=False) == []
    changed(testing, {"path:pretrain_network_g": "weights.pth"})
    assert problems(testing, root, registered, train=False) == []


PSNR = {"type": "calculate_psnr", "crop_border": 2}


def gan_without(key):
    return {"model_type": "SRGANModel"} | {name: GAN[name] for name in GAN if name != key}


GOOD_CHANGES = [
    {"val": ABSENT, "datasets:val": ABSENT},
    {"model_type": "ESRGANModel", **GAN, "train:ldl_opt": {"type": "L1Loss"}},
    {"network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "upscale": 2}},
    {"network_g": {"type": "SwinIR", "upscale": 2, "mlp_ratio": 2, "upsampler": "pixelshuffle"}},
    {"network_g": {"type": "denoiser", "channels": 3, "channel": 3, "anything": 1}},
    {"datasets:train:dataroot_gt": "pairs.lmdb", "datasets:train:dataroot_lq": "pairs.lmdb"}
    | {"datasets:train:io_backend": {"type": "lmdb", "readahead": True}},
    {"datasets:val:meta_info_file": "names.txt"},
    {"datasets:val": {"name": "a", "type": "SingleImageDataset", "dataroot_lq": "data/LR"}
     | {"io_backend": {"type": "disk"}}},
    {"path:resume_state": "weights.pth", "path:pretrain_network_g": "gone.pth"},
    {"network_g:upsampler": "", "scale": 1},
    {"datasets:train:use_shuffle": True, "val:pbar": False, "find_unused_parameters": True},
    {"datasets:train:skip_bad_samples": 3, "datasets:train:multiprocessing_context": None,
     "datasets:train:prefetch_factor": 4, "datasets:train:num_worker_per_gpu": 1,
     "datasets:val:num_worker_per_gpu": 2, "logger:keep_last": 3, "logger:save_best": "psnr",
     "val:self_ensemble": True, "val:tile": 32, "val:tile_overlap": 8,
     "dist_params": {"backend": "gloo", "port": 29500, "timeout": 30}},
    {"logger:save_best": "made_val/psnr", "logger:keep_last": None, "val:tile": None},
    {"model_type": "DLGSANetModel", "train:amp": "bf16", "train:channels_last": True,
     "train:compile": False, "train:clip_grad_norm": 1, "train:accumulation": 2,
     "train:optim_g": {"type": "AdamW", "lr": 1e-4, "fused": True}},
    {"model_type": "TwoStepModel", "train:step": 3, "train:total_iters": 4, "steps": {"a": 1},
     "train:optim_g": {"type": "Lion", "lr": 1e-4, "anything": 1}},
    {"model_type": "TwoStepModel", "train:optim_g:anything": 1},
    {"datasets:train": {"name": "a", "type": "Frames", "dataroot_lr": "data", "frames": 7,
                        "batch_size_per_gpu": 1, "num_worker_per_gpu": 0}},
    {"train:scheduler": {"type": "CosineAnnealingRestartLR", "periods": [2, 2],
                         "restart_weights": [1, 0.5], "eta_min": 1e-7}},
    {"datasets:train:prefetch_mode": "cuda", "datasets:train:pin_memory": True},
    {"val:metrics": {"mine": PSNR | {"better": "higher", "input_order": "HWC"}}},
]  # fmt: skip


@pytest.mark.parametrize("changes", GOOD_CHANGES, ids=str)
def test_other_good_options_pass(root, registered, changes):
    assert problems(train_options(changes), root, registered) == []


# What is changed, and the one line that must then be reported: its path, and a part of the rest.
TRAIN_FAULTS = [
    # required keys
    ({"name": ABSENT}, "name: missing; write `name: tiny_x4`"),
    ({"scale": None}, "scale: empty; write `scale: 4`"),
    ({"num_gpu": ABSENT}, "num_gpu: missing"),
    ({"path": None}, "path: empty; write `path: {}`"),
    ({"path": ["a"]}, "path: must be a section of keys; got ['a']"),
    ({"logger": ABSENT, "loger": {}}, "logger: missing", "print_freq", "did you mean 'loger'?"),
    ({"logger:use_tb_logger": ABSENT}, "logger:use_tb_logger: missing"),
    ({"train:total_iter": ABSENT, "train:total_iters": 9}, "train:total_iter: missing",
     "did you mean 'total_iters'?"),
    ({"datasets:train:use_hflip": ABSENT, "datasets:train:use_flip": True},
     "datasets:train:use_hflip: missing; write `use_hflip: true`; did you mean 'use_flip'?"),
    ({"path": {"pretrain_model_g": None}}, "path:pretrain_model_g: SRModel does not read it; did "
     "you mean 'pretrain_network_g'?"),
    ({"train:pixel_opt": ABSENT}, "train:pixel_opt: missing; write `pixel_opt: {type: L1Loss"),
    ({"val:save_img": ABSENT}, "val:save_img: missing; write `save_img: false`"),
    ({"val:val_freq": ABSENT}, "val:val_freq: missing"),
    ({"val:metrics:psnr:crop_border": ABSENT, "val:metrics:psnr:crop_bordr": 2},
     "val:metrics:psnr:crop_border: missing; write `crop_border: 2`; did you mean 'crop_bordr'?"),
    ({"datasets:train": ABSENT}, "datasets:train: missing; write a section with name, type, batch"),
    ({"datasets:train:use_hflip": ABSENT}, "datasets:train:use_hflip: missing"),
    ({"datasets:train:gt_size": ABSENT}, "datasets:train:gt_size: missing; write `gt_size: 192`"),
    ({"datasets:val:io_backend": ABSENT}, "datasets:val:io_backend: missing", "type"),
    ({"datasets:test_1": {"name": "a", "type": "Frames"}}, "datasets:test_1: no name for a data"),
    # values
    ({"train:optim_g:lr": "5e-4"},
     "train:optim_g:lr: is the text '5e-4', not a number; write 5e-4 without quotes"),
    ({"train:optim_g:betas": [0.9, "0.99"]}, "train:optim_g:betas: is the text '0.99'"),
    ({"train:warmup_iter": "-1"}, "train:warmup_iter: is the text '-1'", "write -1 without quo"),
    ({"datasets:train:gt_size": 32.0}, "datasets:train:gt_size: must be a whole number; got 32.0"),
    ({"name": 4}, "name: must be text; got 4; write it in quotes: '4'"),
    ({"datasets:val:name": 291}, "datasets:val:name: must be text; got 291"),
    ({"val:val_freq": 0}, "val:val_freq: must be above 0; got 0"),
    ({"val:metrics:psnr:better": "Higher"}, "val:metrics:psnr:better: 'Higher' is not known; did "
     "you mean 'higher'?"),
    ({"datasets:val:io_backend:type": "file"}, "datasets:val:io_backend:type: 'file' is not known",
     "'disk', 'lmdb', 'memcached'"),
    ({"train:optim_g:type": "AdamW"}, "train:optim_g:type: 'AdamW' is not known to this model; "
     "write Adam, or model_type: DLGSANetModel"),
    ({"train:optim_g:type": "adam"}, "train:optim_g:type: 'adam' is not known; did you mean"),
    ({"train:ema_decay": True}, "train:ema_decay: must be a number; got true"),
    ({"train:ema_decay": 1}, "train:ema_decay: must be less than 1"),
    ({"datasets:train:use_rot": "no"}, "datasets:train:use_rot: must be true or false; got the"),
    ({"datasets:val:filename_tmpl": {}}, "datasets:val:filename_tmpl: must be text; got {}; write "
     "it in quotes: '{}'"),
    ({"logger:keep_last": 0}, "logger:keep_last: must be above 0"),
    ({"datasets:val:num_worker_per_gpu": -1}, "datasets:val:num_worker_per_gpu: must be 0 or abo"),
    ({"model_type": "DLGSANetModel", "train:amp": "bf-16"}, "train:amp: 'bf-16' is not known; did "
     "you mean 'bf16'?"),
    ({"model_type": "DLGSANetModel", "train:accumulation": 3}, "train:accumulation: a batch of 2 "
     "cannot be worked on in 3 parts; write 2 or less"),
    ({"val:tile": 16, "val:tile_overlap": 16}, "val:tile_overlap: 16 must be less than val:tile"),
    # keys that nothing reads
    ({"nmae": "a"}, "nmae: SRModel does not read it; did you mean 'name'?"),
    ({"netowrk_d": {"type": "EDSR"}}, "netowrk_d: ", "did you mean 'network_d'?"),
    ({"train:ema_deacy": 0.9}, "train:ema_deacy: SRModel does not read it; did you mean 'ema_dec"),
    ({"train:amp": "bf16"}, "train:amp: SRModel does not read it, DLGSANetModel would; delete it"),
    ({"train:gan_opt": {"type": "GANLoss", "gan_type": "vanilla"}}, "train:gan_opt: SRModel does "
     "not read it, SRGANModel, ESRGANModel, RealESRGANModel would"),
    ({"queue_size": 180}, "queue_size: SRModel does not read it, RealESRNetModel, RealESRGANModel"),
    ({"train:optim_g:wieght_decay": 0}, "train:optim_g:wieght_decay: Adam has no such argument; "
     "did you mean 'weight_decay'?"),
    ({"train:scheduler:gama": 0.5}, "train:scheduler:gama: MultiStepLR has no such argument; did "
     "you mean 'gamma'?"),
    ({"train:pixel_opt:loss_wight": 1}, "train:pixel_opt:loss_wight: L1Loss has no such argument"),
    ({"val:metrics:psnr:crop_bordr": 2}, "val:metrics:psnr:crop_bordr: calculate_psnr has no such "
     "argument; did you mean 'crop_border'?"),
    ({"val:metrics:psnr:colour": 2}, "val:metrics:psnr:colour: calculate_psnr has no such", "'cro"),
    ({"val:val_frequency": 2}, "val:val_frequency: SRModel does not read it; did you mean 'val_fr"),
    ({"logger:keep_lats": 2}, "logger:keep_lats: not known; did you mean 'keep_last'?"),
    ({"logger:wandb": {"projekt": None}}, "logger:wandb:projekt: not known; did you mean 'projec"),
    ({"dist_params": {"timeuot": 5}}, "dist_params:timeuot: not known; did you mean 'timeout'?"),
    ({"datasets:train:use_flip": True}, "datasets:train:use_flip: PairedImageDataset does not read "
     "it; did you mean 'use_hflip'?"),
    ({"datasets:val:skip_bad_samples": 1}, "datasets:val:skip_bad_samples: PairedImageDataset doe"),
    ({"datasets:val:io_backend:readahead": True}, "datasets:val:io_backend:readahead: the backend "
     "disk does not read it"),
    ({"model_type": "TwoStepModel", "train:total_itres": 4}, "train:total_itres: TwoStepModel does "
     "not read it; did you mean 'total_iter'?"),
    ({"datasets:val": {"name": "a", "type": "Frames", "dataroot_" "lqq": "x"}},
     "datasets:val:dataroot_lqq: Frames does not read it; did you mean 'dataroot_lq'?"),
    ({"network_g": {"type": "SwinIR", "mlp_ratoi": 2, "upscale": 2}}, "network_g:mlp_ratoi: SwinIR "
     "has no such argument; did you mean 'mlp_ratio'?"),
    ({"network_g": {"type": "SwinIR", "colour": 2, "upscale": 2}}, "network_g:colour: SwinIR has "),
    ({"network_g": {"type": "denoiser", "channels": 3, "chan" "els": 3}}, "network_g:chanels: ",
     "did you mean 'channels'?"),
    ({"network_g": {"type": "EDSR", "num_in_ch": 3, "upscale": 2}}, "network_g:num_out_ch: missing;"
     " EDSR has no default for it"),
    ({"network_g": {"type": "EDSR", "num_in_ch": 3, "num_outch": 3}}, "network_g:num_outch: EDSR "
     "has no such argument; did you mean 'num_out_ch'?"),
    ({"network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": "3"}},
     "network_g:num_feat: is the text '3'"),
    ({"network_g": {"type": "SwinIR", "embed_dim": "60"}}, "network_g:embed_dim: is the text '60'"),
    ({"network_g": {"type": "SwinIR", "upscale": 4}}, "network_g:upscale: is 4, but scale is 2"),
    # what must fit together
    ({"train:scheduler": {"type": "CosineAnnealingRestartLR", "periods": [2, 1],
                          "restart_weights": [1, 1]}}, "train:scheduler:periods: their sum, 3, is "
     "less than train:total_iter 4"),
    ({"train:scheduler": {"type": "CosineAnnealingRestartLR", "periods": [2, 2]}},
     "train:scheduler:restart_weights: there are 1 for 2 periods"),
    ({"train:scheduler": {"type": "CosineAnnealingRestartLR"}}, "train:scheduler:periods: missing"),
    ({"train:scheduler:restarts": [0, 2]}, "train:scheduler:restart_weights: there are 1 for 2 re"),
    ({"train:scheduler:restarts": [0, 3], "train:scheduler:restart_weights": [1, 1]},
     "train:scheduler:milestones: 3 is a restart too"),
    ({"train:scheduler:milestones": ABSENT}, "train:scheduler:milestones: missing"),
    ({"train:warmup_iter": 4}, "train:warmup_iter: 4 is not less than train:total_iter 4"),
    ({"datasets:val": ABSENT}, "val: the file names no validation set; add datasets:val"),
    ({"logger:save_best": "ssim"}, "logger:save_best: val:metrics has no 'ssim'"),
    ({"logger:save_best": "Set5/psnr"}, "logger:save_best: no validation set is named 'Set5'",
     "'made_val'"),
    ({"logger:save_best": "psnr", "val": ABSENT}, "logger:save_best: val:metrics measures nothing"),
    ({"datasets:train:prefetch_mode": "cpu"}, "datasets:train:prefetch_mode: with cpu, ", "wait "
     "for ever; leave it out"),
    ({"datasets:train:prefetch_mode": "gpu"}, "datasets:train:prefetch_mode: 'gpu' is not known"),
    ({"datasets:train:prefetch_mode": "cuda"}, "datasets:train:pin_memory: must be true for pref"),
    ({"datasets:train:prefetch_factor": 2}, "datasets:train:prefetch_factor: needs workers"),
    (gan_without("train:gan_opt"), "train:gan_opt: missing; write "
     "a section with type"),
    (gan_without("train:optim_d"), "train:optim_d: missing; write "
     "a section with type, lr"),
    (gan_without("network_d"), "network_d: missing"),
    ({"train:pixel_opt": {"loss_weight": 1}}, "train:pixel_opt:type: missing"),
    ({"datasets:train:gt_size": 33}, "datasets:train:gt_size: 33 is not a multiple of scale 2; "
     "write 32"),
    ({"scale": 4, "datasets:train:gt_size": 32}, "scale: is 4, but network_g enlarges by 2"),
    ({"network_g:upsampler": ""}, "scale: is 2, but network_g enlarges by 1, as without an"),
    # the network
    ({"network_g:windowsize": 7}, "network_g:windowsize: DLGSANet has no such argument; did you "
     "mean 'window_size'?"),
    ({"network_g:buildblock_type": "sparsedge"}, "network_g:buildblock_type: 'sparsedge' is not "
     "known; did you mean 'sparseedge'?"),
    ({"network_g:activation": 1}, "network_g:activation: 1 is not known; there are: 'relu'"),
    ({"network_g:dim": 50}, "network_g: ", "dim", "50"),
    ({"network_g:dim": "12"}, "network_g:dim: is the text '12', not a number; write 12 without"),
    # names that BasicSR looks up
    ({"model_type": "SrModel"}, "model_type: no model is registered as 'SrModel'; did you mean "
     "'SRModel'?"),
    ({"network_g:type": "DLGSAnet"}, "network_g:type: no arch is registered as 'DLGSAnet'; did "
     "you mean 'DLGSANet'?"),
    ({"datasets:train:type": "PairedDataset"}, "datasets:train:type: no dataset is registered"),
    ({"val:metrics:psnr:type": "calculate_psrn"}, "val:metrics:psnr:type: no metric is registered "
     "as 'calculate_psrn'; did you mean 'calculate_psnr'?"),
    ({"train:pixel_opt:type": "L1loss"}, "train:pixel_opt:type: no loss is", "'L1Loss'?"),
    # images
    ({"datasets:train:dataroot_gt": "gone"}, "datasets:train:dataroot_gt: the HR images of the "
     "training set made: ", "gone does not exist; ", "datasets/README.md"),
    ({"datasets:val:dataroot_lq": "empty"}, "datasets:val:dataroot_lq: the LR images of the "
     "validation set made_val: ", "empty holds no images"),
    ({"datasets:val:dataroot_lq": "weights.pth"}, "datasets:val:dataroot_lq: ", "is not a folder"),
    ({"datasets:val:dataroot_lq": "pairs.lmdb"}, "datasets:val:dataroot_lq: ", "is an LMDB"),
    ({"datasets:val:io_backend": {"type": "lmdb"}, "datasets:val:dataroot_gt": "pairs.lmdb",
      "datasets:val:dataroot_lq": "empty.lmdb"}, "datasets:val:dataroot_lq: ", "no data.mdb"),
    ({"datasets:val:io_backend": {"type": "lmdb"}, "datasets:val:dataroot_gt": "pairs.lmdb"},
     "datasets:val:dataroot_lq: ", "LR is not an LMDB by its name", "`type: disk`"),
    ({"datasets:val": {"name": "a", "type": "SingleImageDataset", "dataroot_lq": "data/LR"}
      | {"io_backend": {"type": "disk"}, "meta_info_file": None}},
     "datasets:val:meta_info_file: is empty (~); write a value, or leave it out"),
    ({"datasets:val:meta_info_file": "gone.txt"}, "datasets:val:meta_info_file: the list of the "
     "validation set made_val: ", "gone.txt does not exist"),
    # paths
    ({"path:pretrain_network_g": "gone.pth"}, "path:pretrain_network_g: there is no file ",
     "gone.pth; correct the path"),
    ({"path:resume_state": "gone.state"}, "path:resume_state: there is no file "),
    ({"path:pretrained_network_g": "weights.pth"}, "path:pretrained_network_g: not known", "make a "
     "folder 'weights.pth'; did you mean 'pretrain_network_g'?"),
    ({"logger:use_tb_logger": False, "logger:wandb": {"project": "a"}},
     "logger:use_tb_logger: must be true for wandb"),
]  # fmt: skip
TEST_FAULTS = [
    ({"datasets": ABSENT}, "datasets: missing; write `datasets: {test_1: …}`"),
    ({"datasets": {}}, "datasets: there is nothing to test on"),
    ({"datasets:train": {"name": "a", "type": "Frames"}}, "datasets:train: no name for a data set"),
    ({"path:pretrain_network_g": None}, "path:pretrain_network_g: empty; write `pretrain_"),
    ({"path:pretrain_network_g": ABSENT, "path:pretrained_network_g": None},
     "path:pretrain_network_g: missing", "did you mean 'pretrained_network_g'?"),
    ({"path:pretrain_network_g": "gone.pth"}, "path:pretrain_network_g: there is no file ",
     "experiments/<name>/models"),
    ({"val:suffix": ABSENT}, "val:suffix: missing; write `suffix: ~`"),
    ({"val": ABSENT}, "val: missing; write a section with save_img"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), [(c, e) for c, *e in TRAIN_FAULTS], ids=str)
def test_each_fault_in_training_options_is_reported_once(root, registered, changes, expected):
    reported = problems(train_options(changes), root, registered)
    assert len(reported) == 1, reported
    assert reported[0].startswith(expected[0])
    assert all(part in reported[0] for part in expected), reported


@pytest.mark.parametrize(("changes", "expected"), [(c, e) for c, *e in TEST_FAULTS], ids=str)
def test_each_fault_in_test_options_is_reported_once(root, registered, changes, expected):
    options = changed(small_test_options(root / "data", root / "weights.pth"), changes)
    reported = problems(options, root, registered, train=False)
    assert len(reported) == 1, reported
    assert reported[0].startswith(expected[0])
    assert all(part in reported[0] for part in expected), reported


def test_a_key_that_is_needed_itself_is_no_misspelling_of_another(root, registered):
    options = train_options({"datasets:val:dataroot_lq": ABSENT})
    (reported,) = problems(options, root, registered)
    assert reported == (
        "datasets:val:dataroot_lq: missing; write `dataroot_lq: datasets/benchmark/Set5/X4/LR`"
    )


def test_paths_may_start_from_the_home_folder(root, registered, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    changes = {"path:pretrain_network_g": "~/weights.pth", "datasets:val:dataroot_gt": "~/data/HR"}
    assert problems(train_options(changes), root, registered) == []


def test_problems_are_raised_as_one_error():
    refuse([])
    with pytest.raises(OptionsError, match=r"^the options have a problem:\n  a: b$"):
        refuse(["a: b"])
    with pytest.raises(OptionsError, match=r"^the options have 2 problems:\n  a\n  b$"):
        refuse(["a", "b"])


def test_all_faults_come_in_one_report(root, registered):
    changes = {
        "name": ABSENT,
        "network_g:dmi": 48,
        "network_g:activation": "rellu",
        "network_g:window_size": 4,
        "train:optim_g:lr": "1e-4",
        "model_type": "SRModle",
        "datasets:val:dataroot_gt": "gone",
    }
    reported = problems(train_options(changes), root, registered)
    paths = {line.split(": ")[0] for line in reported}
    assert paths == {
        *(
            "name",
            "network_g:dmi",
            "network_g:activation",
            "network_g",
            "train:optim_g:lr",
            "model_type",
        ),
        "datasets:val:dataroot_gt",
    }


def test_keys_that_basicsr_accepts_in_silence_are_all_reported(root, registered):
    """Fault 13: each of these changes what is trained, and BasicSR says nothing."""
    changes = {
        "model_type": "SwinIRModel",
        "network_g": {"type": "SwinIR", "upscale": 2, "window_size": 8, "mlp_ratoi": 2},
        "train:ema_deacy": 0.999,
        "datasets:train:use_flip": True,
        "val:metrics:psnr:crop_bordr": 4,
        "val:metrics:psnr:better": "Higher",
        "path:pretrained_network_g": "x.pth",
    }
    reported = problems(train_options(changes), root, registered)
    assert {line.split(": ")[0] for line in reported} == {
        "network_g:mlp_ratoi",
        *(path for path in changes if path.count(":") and not path.startswith("network")),
    }
    assert all("did you mean" in line for line in reported)


def test_what_real_esrgan_reads_is_asked_for(root, registered):
    assert problems(train_options(REAL), root, registered) == []
    synthetic = {**REAL, "high_order_degradation": True, "queue_size": 181, "gt_size": 32}
    reported = problems(train_options(synthetic), root, registered)
    assert "resize_prob: missing; write `resize_prob: [0.2, 0.7, 0.1]`" in reported
    assert "queue_size: 181 is not a multiple of batch_size_per_gpu 2; write 180" in reported
    assert len(reported) == 16
