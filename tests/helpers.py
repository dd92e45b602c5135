"""What several test modules need: running a command, made images, small option files."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

# A network that builds, trains and evaluates in milliseconds and still has every part.
SMALL_NETWORK = {
    "type": "DLGSANet",
    "dim": 12,
    "groups": 1,
    "blocks": 1,
    "buildblock_type": "sparseedge",
    "window_size": 3,
    "idynamic_num_heads": 6,
    "restormer_num_heads": 6,
    "tlc_kernel": 8,
    "upscale": 2,
    "upsampler": "pixelshuffledirect",
}


SMALL_ARGUMENTS = {name: value for name, value in SMALL_NETWORK.items() if name != "type"}


def small_checkpoint(iteration: int | None = None, **changes: Any) -> Any:
    """A Checkpoint of the small network with random weights, its arguments changed."""
    from dlgsanet_arch.checkpoint import Checkpoint, infer_config
    from dlgsanet_arch.network import DLGSANet

    config = {**SMALL_ARGUMENTS, **changes}
    weights = DLGSANet(**config).state_dict()
    return Checkpoint(weights, {**infer_config(weights), **config}, True, iteration)


def run(
    arguments: Sequence[object],
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    path: Sequence[object] = (),
) -> subprocess.CompletedProcess[str]:
    """Run this Python with `arguments` in `cwd`; stdout and stderr come back as text.

    The folders of `path` stand before others where modules are looked for.
    """
    path = os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            **{"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            **(env or {}),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def write_pairs(folder: Path, count: int, hr_size: tuple[int, int] = (48, 64), scale: int = 2):
    """Write `count` PNG pairs of smooth made images to folder/HR and folder/LR, equal names.

    HR is hr_size (height, width), LR is HR averaged over scale x scale pixels.
    """
    height, width = hr_size
    rng = np.random.default_rng(0)
    for part in ("HR", "LR"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        coarse = rng.uniform(0, 255, (6, 8, 3)).astype(np.float32)
        hr = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        lr = hr.reshape(height // scale, scale, width // scale, scale, 3).mean((1, 3))
        for part, image in (("HR", hr), ("LR", lr)):
            name = str(folder / part / f"image{index}.png")
            assert cv2.imwrite(name, image.clip(0, 255).round().astype(np.uint8)), name


def noisy_image(seed: Any, size: tuple[int, int]) -> np.ndarray:
    """Smooth colours and some noise of a size (height, width), other ones for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (7, 9, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    return (smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8)


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def small_train_options(data: Path, **changes: Any) -> dict[str, Any]:
    """A complete option file for a 4-iteration CPU run on write_pairs' folders under `data`."""
    pairs = {
        "type": "PairedImageDataset",
        "dataroot_gt": str(data / "HR"),
        "dataroot_lq": str(data / "LR"),
        "io_backend": {"type": "disk"},
    }
    options = {
        "name": "small",
        "model_type": "SRModel",
        "scale": 2,
        "num_gpu": "auto",
        "manual_seed": 0,
        "datasets": {
            "train": {
                "name": "made",
                **pairs,
                "gt_size": 32,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 2,
                "dataset_enlarge_ratio": 1,
                "prefetch_mode": None,
            },
            "val": {"name": "made_val", **pairs},
        },
        "network_g": dict(SMALL_NETWORK),
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0.999,
            "optim_g": {"type": "Adam", "lr": 1e-3, "weight_decay": 0, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 0.5},
            "total_iter": 4,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 2,
            "save_img": False,
            "metrics": {
                "psnr": {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}
            },
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 2, "use_tb_logger": False},
    }
    return {**options, **changes}


def small_test_options(data: Path, weights: Path, **changes: Any) -> dict[str, Any]:
    """A complete option file that tests `weights` on write_pairs' folders under `data`."""
    training = small_train_options(data)
    options = {
        **{key: training[key] for key in ("name", "model_type", "scale", "num_gpu", "network_g")},
        "manual_seed": 0,
        "datasets": {"test_1": training["datasets"]["val"]},
        "path": {
            "pretrain_network_g": str(weights),
            "strict_load_g": True,
            "param_key_g": "params_ema",
        },
        "val": {"save_img": True, "suffix": None, "metrics": training["val"]["metrics"]},
    }
    return {**options, **changes}


def write_options(path: Path, options: Mapping[str, Any]) -> Path:
    """Write an option file, whole at any time: another process may be reading the one before."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(yaml.safe_dump(dict(options), sort_keys=False))
    return unfinished.replace(path)


def decoded(data: bytes) -> np.ndarray:
    """Decode an image of three channels."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def entries(path: Path) -> dict[str, bytes]:
    """Read all entries of an LMDB."""
    import lmdb

    with (
        lmdb.open(str(path), readonly=True, lock=False) as environment,
        environment.begin() as read,
    ):
        return {key.decode(): data for key, data in read.cursor()}


def decoded_entries(path: Path) -> dict[str, np.ndarray]:
    """Read all images of an LMDB."""
    return {key: decoded(data) for key, data in entries(path).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder, by their paths from there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def zipped(members: Iterable[tuple[Any, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of pairs of a name, or a ZipInfo, and its content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for member, content in members:
            archive.writestr(member, content)
    return file.getvalue()


def tarred(members: Iterable[tuple[Any, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar archive of pairs of a name, or a TarInfo, and its content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for member, content in members:
            info = member
            if isinstance(member, str):
                info = tarfile.TarInfo(member.rstrip("/"))
                info.type = tarfile.DIRTYPE if member.endswith("/") else tarfile.REGTYPE
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()
