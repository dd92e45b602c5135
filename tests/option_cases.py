"""Option files of several models on small folders, and changes of them."""

import copy
import json
from pathlib import Path
from typing import Any

from helpers import small_train_options

ABSENT = "<absent>"  # a key to delete

ADAM = {"type": "Adam", "lr": 1e-4, "weight_decay": 0, "betas": [0.9, 0.99]}
# What a model with a discriminator reads beside what every model does.
GAN = {
    "network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "skip_connection": True},
    "train:optim_d": ADAM,
    "train:gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 0.1},
    "train:net_d_iters": 1,
}
REAL = {
    "model_type": "RealESRGANModel", **GAN, "high_order_degradation": False,
    "l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False,
}  # fmt: skip
ESRGAN = {
    "model_type": "ESRGANModel", **GAN, "scale": 4, "datasets:train:gt_size": 128,
    "network_g": {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64,
                  "num_block": 23},
    "network_d": {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 64},
    "train:perceptual_opt": {
        "type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}, "vgg_type": "vgg19",
        "use_input_norm": True, "range_norm": False, "perceptual_weight": 1.0, "style_weight": 0,
        "criterion": "l1"},
    "train:gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "real_label_val": 1.0,
                      "fake_label_val": 0.0, "loss_weight": 5e-3},
    "train:net_d_init_iters": 0, "val:val_freq": 5e3, "logger:save_checkpoint_freq": 5e3,
    "dist_params": {"backend": "nccl", "port": 29500},
}  # fmt: skip
SWINIR = {
    "model_type": "SwinIRModel",
    "network_g": {"type": "SwinIR", "upscale": 2, "in_chans": 3, "img_size": 48, "window_size": 8,
                  "img_range": 1.0, "depths": [6, 6], "embed_dim": 60, "num_heads": [6, 6],
                  "mlp_ratio": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv"},
    "val:val_freq": 5e3,
}  # fmt: skip
_DEGRADATIONS = {
    "resize_prob": [0.2, 0.7, 0.1], "resize_range": [0.15, 1.5], "gaussian_noise_prob": 0.5,
    "noise_range": [1, 30], "poisson_scale_range": [0.05, 3], "gray_noise_prob": 0.4,
    "jpeg_range": [30, 95],
}  # fmt: skip
_BLURS = {
    "blur_kernel_size": 21, "kernel_list": ["iso", "plateau_aniso"], "kernel_prob": [0.4, 0.6],
    "sinc_prob": 0.1, "blur_sigma": [0.2, 3], "betag_range": [0.5, 4], "betap_range": [1, 2],
}  # fmt: skip
SYNTHETIC = {
    **REAL, "high_order_degradation": True, "gt_size": 256, "queue_size": 180,
    "second_blur_prob": 0.8, **_DEGRADATIONS, **{f"{k}2": v for k, v in _DEGRADATIONS.items()},
    "datasets:train": {
        "name": "made", "type": "RealESRGANDataset", "dataroot_gt": "data/HR",
        "meta_info": "names.txt", "io_backend": {"type": "disk"}, "gt_size": 256,
        "use_hflip": True, "use_rot": False, **_BLURS, **{f"{k}2": v for k, v in _BLURS.items()},
        "final_sinc_prob": 0.8, "num_worker_per_gpu": 0, "batch_size_per_gpu": 2,
    },
}  # fmt: skip


def changed(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set or delete the values at some paths, in place."""
    for path, value in changes.items():
        *sections, key = path.split(":")
        node = options
        for section in sections:
            node = node[section]
        if isinstance(value, str) and value == ABSENT:
            del node[key]
        else:
            node[key] = copy.deepcopy(value)
    return options


def train_options(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Options that train on the folder of the fixture `option_root`, with some changes."""
    options = json.loads(json.dumps(small_train_options(Path("data"))))  # no section is shared
    return changed(options, changes or {})
