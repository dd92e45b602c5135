"""Arrays and tensors enlarged: channels, depth, alpha, tiles, memory, precision, another scale."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dlgsanet_arch import cpu
from dlgsanet_arch.checkpoint import Checkpoint, read_checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.inference import memory
from dlgsanet_arch.tiles import Run, rows_in_tiles, self_ensemble

Precision = Literal["fp32", "bf16", "fp16"]
Progress = Callable[[int, int], None]
Depth = TypeVar("Depth", np.uint8, np.uint16)

DEFAULT_OVERLAP = 32
LARGEST_TILE = 2048  # chosen by itself; larger ones make nothing better
LEAST_TILE = 16  # below it, memory is not what is lacking
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LUMA = (0.299, 0.587, 0.114)  # BT.601, the Y that super-resolution is measured on
_DEEP = np.iinfo(np.uint16).max


class UpscaleError(UserError):
    """An image or a wish that cannot be met; the message says why and what would help."""


def find_weights(scale: float | None = None) -> Path:
    """Return the weights that come with the package, those of `scale` where there are any.

    Raises:
        UpscaleError: None come with it.
    """
    folder = resources.files("dlgsanet_arch").joinpath("weights")
    shipped = sorted(folder.iterdir(), key=str) if folder.is_dir() else []
    paths = [Path(str(each)) for each in shipped if each.name.endswith(".safetensors")]
    if not paths:
        raise UpscaleError(
            "weights are needed, and none come with this package yet: name a file, "
            "`dlgsanet upscale -m net_g_latest.pth …` or Upscaler('net_g_latest.pth')"
        )
    return next((path for path in paths if path.stem.endswith(f"x{scale or 4:g}")), paths[0])


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of a name; None takes CUDA where there is it, else MPS, else the CPU.

    Raises:
        UpscaleError: There is no such device here.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each kind of device fails in its own way
        raise UpscaleError(
            f"the device {str(name)!r} cannot be used here ({str(error).splitlines()[0]}); "
            "`dlgsanet doctor` lists those that can"
        ) from error
    return device


def _fill(colour: Tensor, seen: Tensor) -> Tensor:
    """Continue colours into where nothing is seen: the mean of ever larger surroundings.

    Args:
        colour: (1, C, H, W).
        seen: (1, 1, H, W), the weight of each pixel's colour, not all zero.

    Returns:
        (1, C, H, W), equal to `colour` where `seen` is not zero.
    """
    if bool((seen > 0).all()):
        return colour
    coarse_seen = F.avg_pool2d(seen, 2, ceil_mode=True)
    sums = F.avg_pool2d(colour * seen, 2, ceil_mode=True)
    coarse = _fill(sums / coarse_seen.clamp_min(1e-12), coarse_seen)
    fine = F.interpolate(coarse, size=colour.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(seen > 0, colour, fine)


def _continued(colour: NDArray[Depth], alpha: NDArray[Depth]) -> NDArray[Depth]:
    """Give transparent pixels the colours around them.

    What a file holds there is not meant to be seen, often black; the network would draw it into
    the rim of what is seen. Colours of pixels with any opacity stay.

    Args:
        colour: (H, W, C), not multiplied by alpha.
        alpha: (H, W, 1).
    """
    if alpha.all() or not alpha.any():
        return colour
    planes = [torch.from_numpy(each.astype(np.float32)) for each in (colour, alpha)]
    filled = _fill(*(each.permute(2, 0, 1)[None] for each in planes))
    return filled[0].permute(1, 2, 0).round().numpy().astype(colour.dtype)


def _keep_flat(made: NDArray[Depth], alpha: NDArray[Depth]) -> None:
    """Write alpha where it is the same all around: opaque stays opaque, and clear stays clear.

    The network gives nearly that, and one level less shows what is behind.

    Args:
        made: (H', W', 1), enlarged alpha; is written to.
        alpha: (H, W, 1).
    """
    plane = torch.from_numpy(alpha.astype(np.float32)).permute(2, 0, 1)[None]
    most, least = (F.max_pool2d(sign * plane, 3, 1, 1) * sign for sign in (1, -1))
    flat = (most == least)[0, 0].numpy()
    rows, columns = (np.arange(made.shape[i]) * alpha.shape[i] // made.shape[i] for i in (0, 1))
    for new, old in enumerate(rows):  # a row at a time, for memory
        np.copyto(made[new, :, 0], alpha[old, columns, 0], where=flat[old, columns])


def _resized(image: NDArray[np.uint16], size: tuple[int, int], peak: int) -> NDArray:
    """Resize (H, W, C) by PyTorch's antialiased bicubic, and bring it to the depth of `peak`."""
    result = np.empty((*size, image.shape[2]), np.uint8 if peak < _DEEP else np.uint16)
    for channel in range(image.shape[2]):  # one at a time, for memory
        plane = torch.from_numpy(image[..., channel].astype(np.float32))[None, None]
        plane = F.interpolate(plane, size, mode="bicubic", antialias=True, align_corners=False)
        levels = (plane * (peak / _DEEP)).round_().clamp_(0, peak)
        result[..., channel] = levels[0, 0].numpy()
    return result


class Upscaler:
    """Loads a network once and enlarges images by it.

    Args:
        weights: A file of weights, `.pth` or `.safetensors`, or a checkpoint that was read. None
            takes those that come with the package.
        device: Where the network runs. None takes CUDA where there is it, else MPS, else the CPU.
        dtype: "fp32", or "bf16" or "fp16" by autocast: faster on GPUs.
        tile: Side of the tiles that an image is computed in, in its own pixels; 0 computes it
            whole, "auto" does so where memory suffices.
        overlap: What neighbouring tiles share, in pixels of the image; half a tile at most.
        ensemble: Whether the mean over eight flips and rotations is taken.
        batch: How many tiles, or images of one size, are computed together at most.
        scale: How many times larger the sides become. Other than the network's, its result is
            resized. None takes the network's.
        config: Arguments of the network that are known better than the file tells them.
        notice: Takes a sentence where something was done otherwise than asked, such as smaller
            tiles. None warns.

    Attributes:
        checkpoint: What was read.
        scale: How many times larger the sides become.
        device: Where the network is.

    Raises:
        UpscaleError: An argument is out of range, or the device cannot do what is asked.
        CheckpointError: The weights cannot be used.
    """

    def __init__(
        self,
        weights: Path | str | Checkpoint | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: Precision = "fp32",
        tile: int | Literal["auto"] = "auto",
        overlap: int = DEFAULT_OVERLAP,
        ensemble: bool = False,
        batch: int = 1,
        scale: float | None = None,
        config: Mapping[str, Any] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        if dtype not in get_args(Precision):
            raise UpscaleError(f"dtype must be fp32, bf16 or fp16; got {dtype!r}")
        if tile != "auto" and (not isinstance(tile, int) or tile < 0 or 0 < tile < LEAST_TILE):
            raise UpscaleError(f"tile must be 'auto', 0 or {LEAST_TILE} or more; got {tile!r}")
        if overlap < 0 or batch < 1:
            raise UpscaleError(
                f"overlap must be 0 or more and batch 1 or more; got {overlap=}, {batch=}"
            )
        if scale is not None and not 0 < scale <= 64:
            raise UpscaleError(f"scale must be more than 0 and at most 64; got {scale}")
        if not isinstance(weights, Checkpoint):
            path = find_weights(scale) if weights is None else weights
            weights = read_checkpoint(path, config=config)
        if weights.config["in_chans"] not in (1, 3):
            raise UpscaleError(
                f"these weights take {weights.config['in_chans']} channels, no gray or RGB images"
            )
        self.checkpoint = weights
        self.scale = float(scale or weights.scale)
        self.device = find_device(device)
        self.overlap = overlap
        self.tile = tile
        self.batch = batch
        self._ensemble = ensemble
        self._dtype = dtype
        self._notice = notice or partial(warnings.warn, category=RuntimeWarning, stacklevel=2)
        self._most: int | None = None  # pixels that memory sufficed for, once it did not
        self._net = weights.network().to(self.device)
        if dtype != "fp32":
            self._check_precision()

    def _precision(self) -> AbstractContextManager[object]:
        if self._dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self._dtype])

    def _check_precision(self) -> None:
        """Refuse what the device cannot compute, and say where it does not pay."""
        fault = None
        if self.device.type == "cuda" and self._dtype == "bf16":
            fault = None if torch.cuda.get_device_capability(self.device)[0] >= 8 else "too old"
        try:
            with torch.no_grad(), self._precision():
                self._net(torch.zeros(1, self.checkpoint.config["in_chans"], 8, 8).to(self.device))
        except Exception as error:  # what a device lacks shows in many ways
            fault = str(error).splitlines()[0]
        if fault:
            raise UpscaleError(
                f"{self.device} cannot compute this network in {self._dtype} ({fault}): use fp32"
            )
        if self.device.type == "cpu":
            self._notice(f"{self._dtype} is slower than fp32 on a CPU and needs more memory")

    def _run(self, tiles: Tensor, peak: float) -> Tensor:
        """Compute images (B, C, h, w) with values up to `peak`, to float32 in [0, 1]."""
        given = tiles.to(self.device).float() / peak
        count, channels = given.shape[:2]
        wanted = self.checkpoint.config["in_chans"]
        if wanted > channels:
            given = given.expand(-1, wanted, -1, -1)
        elif wanted < channels:  # a network for gray sees each channel by itself
            given = given.reshape(-1, 1, *given.shape[2:])
        net: Run = partial(self_ensemble, self._net) if self._ensemble else self._net
        with torch.no_grad(), self._precision():
            result = net(given.contiguous()).float()
        if wanted > channels:
            weights = torch.tensor(_LUMA, device=result.device).view(1, -1, 1, 1)
            result = (result * weights).sum(1, keepdim=True)
        elif wanted < channels:
            result = result.reshape(count, channels, *result.shape[2:])
        if not bool(result.isfinite().all()):
            raise UpscaleError(
                f"the network's results are not numbers in {self._dtype}: "
                + (
                    "the weights are damaged, which `dlgsanet weights inspect` shows"
                    if self._dtype == "fp32"
                    else "use fp32, or the weights are damaged"
                )
            )
        return result.clamp_(0, 1)

    def choose_tile(self, height: int, width: int, batch: int = 1) -> int:
        """Return the side of the tiles for an image of a size; 0 where it is computed whole."""
        tile = self.tile
        if tile == "auto":
            fused = self._dtype == "fp32" and not cpu.why_not()
            config = self.checkpoint.config
            pixels = memory.fitting_pixels(config, self.device, fused=fused) // batch
            # One window of TLC and what is shared stay together, however little memory there is.
            least = (config["tlc_kernel"] if config["tlc_flag"] else 48) + 2 * self.overlap
            largest = min(LARGEST_TILE, max(math.isqrt(pixels), least))
            tile = 0 if height * width <= pixels else largest
        side = max(height, width)
        if self._most is not None and height * width * batch > self._most:
            limit = max(LEAST_TILE, math.isqrt(self._most // batch))
            tile = min(tile or side, limit)
        return 0 if tile >= side else tile

    def _rows(
        self, images: Tensor, peak: float, tile: int, progress: Progress | None
    ) -> Iterator[Tensor]:
        """Yield finished rows (B, C, n, W'), float32 in [0, 1] on the device."""
        run = partial(self._run, peak=peak)
        side = tile or max(images.shape[2:])
        # Images that are computed together leave the fewer tiles to be.
        together = max(1, self.batch // len(images))
        overlap = min(self.overlap, side // 2)
        return rows_in_tiles(run, images, self.checkpoint.scale, side, overlap, progress, together)

    def _retry_on_oom(self, work: Callable[[int], Any], height: int, width: int, count: int) -> Any:
        """Return work(tile), with smaller tiles as long as memory does not suffice."""
        tile = self.choose_tile(height, width, count)
        while True:
            try:
                return work(tile)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Out of the handler: the error held the frames that held the memory.
            memory.empty_cache(self.device)
            side = tile or max(height, width)
            if side <= LEAST_TILE:
                raise UpscaleError(
                    f"memory on {self.device} does not suffice even for tiles of {side} pixels "
                    f"({reason}): close other programs, or use --device cpu"
                )
            tile = max(LEAST_TILE, side // 2)
            self._most = tile**2 * count
            self._notice(
                f"out of memory on {self.device} with "
                + (f"tiles of {side}" if side < max(height, width) else "the whole image")
                + f"; again with tiles of {tile}"
            )

    def _enlarge(
        self, images: NDArray[Depth], tile: int, progress: Progress | None
    ) -> NDArray[Depth]:
        """Enlarge (B, H, W, C), C 1 or 3, by the network's scale, and resize where that is asked.

        Returns:
            (B, H', W', C) of the same depth.
        """
        count, height, width, channels = images.shape
        peak = np.iinfo(images.dtype).max
        times = self.checkpoint.scale
        resizes = self.scale != times
        # Between the two steps, 16 bits: rounded to 8 once.
        levels, depth = (_DEEP, np.dtype(np.uint16)) if resizes else (peak, images.dtype)
        self._check_room(count * channels * times**2 * height * width * depth.itemsize)
        made = np.empty((count, times * height, times * width, channels), depth)
        # int32: PyTorch does little with its own uint16.
        wide = images if images.dtype == np.uint8 else images.astype(np.int32)
        given = torch.from_numpy(np.ascontiguousarray(wide)).permute(0, 3, 1, 2)
        top = 0
        for rows in self._rows(given, peak, tile, progress):
            whole = (rows * levels).round_().cpu().permute(0, 2, 3, 1).numpy()
            made[:, top : top + whole.shape[1]] = whole
            top += whole.shape[1]
            del rows, whole  # before the next ones are computed
        if not resizes:
            return made
        size = (max(1, round(height * self.scale)), max(1, round(width * self.scale)))
        return np.stack([_resized(each, size, peak) for each in made])

    @staticmethod
    def _check_room(needed: int) -> None:
        """Refuse a result that the machine's memory does not hold, before it is computed."""
        free = memory.free_memory(torch.device("cpu"))
        if needed > free:
            raise UpscaleError(
                f"the result needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB "
                "are free: cut the image into parts"
            )

    def _images(
        self, images: NDArray[Depth], tile: int, progress: Progress | None
    ) -> NDArray[Depth]:
        """Enlarge (B, H, W, C), C 1 to 4: gray or colour, and alpha by itself."""
        channels = images.shape[3]
        if channels in (1, 3):
            return self._enlarge(images, tile, progress)
        alpha = images[..., -1:]
        colour = np.stack([_continued(*each) for each in zip(images[..., :-1], alpha, strict=True)])
        steps = _Steps(progress, 2)
        parts = [self._enlarge(each, tile, steps.next()) for each in (colour, alpha)]
        for each, before in zip(parts[1], alpha, strict=True):
            _keep_flat(each, before)
        return np.concatenate(parts, 3)

    def many(
        self, images: Sequence[NDArray[Depth]], progress: Progress | None = None
    ) -> list[NDArray[Depth]]:
        """Enlarge images of one shape and depth together; see `__call__`.

        Raises:
            ValueError: They are of several shapes or depths, or are not images.
        """
        first = images[0]
        if any(each.shape != first.shape or each.dtype != first.dtype for each in images):
            raise ValueError("images of one shape and dtype are taken together")
        if first.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"images are of uint8 or uint16; got {first.dtype}")
        flat = first.ndim == 2
        if first.ndim not in (2, 3) or 0 in first.shape or (not flat and first.shape[2] > 4):
            raise ValueError(
                "images are (H, W) or (H, W, C): gray, gray and alpha, RGB, RGB and alpha; got "
                f"the shape {first.shape}"
            )
        stack = np.stack([each[..., None] if flat else each for each in images])
        height, width = first.shape[:2]
        made = self._retry_on_oom(
            lambda tile: self._images(stack, tile, progress), height, width, len(stack)
        )
        return [each[..., 0] if flat else each for each in made]

    def _tensor(self, images: Tensor, progress: Progress | None) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise ValueError(
                f"tensors are (B, 3, H, W) or (B, 1, H, W); got the shape {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(f"tensors are of floats in [0, 1]; got {images.dtype}")
        height, width = images.shape[2:]
        steps = _Steps(progress, -(-len(images) // self.batch))

        def work(chunk: Tensor, step: Progress | None, tile: int) -> Tensor:
            rows = self._rows(chunk, 1.0, tile, step)
            return torch.cat([each.to(images) for each in rows], 2)

        made = torch.cat(
            [
                self._retry_on_oom(partial(work, chunk, steps.next()), height, width, len(chunk))
                for chunk in images.split(self.batch)
            ]
        )
        if self.scale == self.checkpoint.scale:
            return made
        size = (max(1, round(height * self.scale)), max(1, round(width * self.scale)))
        resized = F.interpolate(
            made.float(), size, mode="bicubic", antialias=True, align_corners=False
        )
        return resized.clamp_(0, 1).to(made.dtype)

    @overload
    def __call__(self, image: NDArray[Depth], progress: Progress | None = None) -> NDArray: ...

    @overload
    def __call__(self, image: Tensor, progress: Progress | None = None) -> Tensor: ...

    def __call__(self, image, progress=None):
        """Enlarge an image, or a batch as a tensor.

        Args:
            image: An array (H, W) or (H, W, 1) of gray, (H, W, 2) of gray and alpha, (H, W, 3) of
                RGB or (H, W, 4) of RGB and alpha, uint8 or uint16; or a tensor (B, 3, H, W) or
                (B, 1, H, W), floats in [0, 1].
            progress: Called with the number of tiles done and of all.

        Returns:
            The same kind of thing, its sides `scale` times as long: gray stays gray, the dtype and
            a tensor's device stay, and values are clipped to the range.

        Raises:
            ValueError: `image` is of another shape or dtype.
            UpscaleError: Memory does not suffice, or the results are not finite.
        """
        if isinstance(image, Tensor):
            return self._tensor(image, progress)
        return self.many([image], progress)[0]

    def tiling_error(self, image: NDArray[Depth]) -> tuple[float, float] | None:
        """Compute an image in tiles and whole, and compare.

        Args:
            image: As `__call__` takes it; alpha is left out.

        Returns:
            The largest and the mean difference in levels of 0 to 255; None where it is computed
            whole anyway.

        Raises:
            UpscaleError: Memory does not suffice for the whole image.
        """
        array = image[..., None] if image.ndim == 2 else image
        colour = array[..., :-1] if array.shape[2] in (2, 4) else array
        height, width = colour.shape[:2]
        tile = self.choose_tile(height, width)
        if not tile:
            return None
        peak = np.iinfo(image.dtype).max
        given = torch.from_numpy(colour.astype(np.int32)).permute(2, 0, 1)[None]
        try:
            (whole,) = self._rows(given, peak, 0, None)
        except Exception as error:
            if memory.is_out_of_memory(error):
                raise UpscaleError(
                    f"memory on {self.device} does not suffice for the whole image, which tiles "
                    "are to be compared with: take a smaller one"
                ) from error
            raise
        largest, total, top = 0.0, 0.0, 0
        for rows in self._rows(given, peak, tile, None):
            apart = (rows - whole[:, :, top : top + rows.shape[2]]).abs_() * 255
            largest, total = max(largest, float(apart.max())), total + float(apart.sum())
            top += rows.shape[2]
        return largest, total / whole.numel()


class _Steps:
    """One count of tiles over several steps of equal cost.

    Args:
        progress: What is told, None for nothing.
        steps: How many there are.
    """

    def __init__(self, progress: Progress | None, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._begun = 0

    def next(self) -> Progress | None:
        """Return what is to be told of the next step's tiles."""
        before = self._begun
        self._begun += 1
        if self._progress is None:
            return None
        return lambda done, tiles: self._progress(before * tiles + done, self._steps * tiles)


def upscale(
    image: NDArray[Depth] | Tensor,
    weights: Path | str | Checkpoint | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: Precision = "fp32",
    tile: int | Literal["auto"] = "auto",
    overlap: int = DEFAULT_OVERLAP,
    ensemble: bool = False,
    scale: float | None = None,
    progress: Progress | None = None,
) -> NDArray[Depth] | Tensor:
    """Enlarge one image; `Upscaler`, whose arguments these are, loads once for many.

    Args:
        image: (H, W, 3) in RGB or (H, W), uint8 or uint16; what else, `Upscaler.__call__` says.
        weights: A file of weights; None takes those that come with the package.
        device: Where the network runs.
        dtype: "fp32", "bf16" or "fp16".
        tile: Side of the tiles, 0 or "auto".
        overlap: What tiles share.
        ensemble: Whether the mean over eight flips and rotations is taken.
        scale: How many times larger the sides become.
        progress: Called with the number of tiles done and of all.

    Returns:
        The same kind of thing, its sides `scale` times as long.
    """
    upscaler = Upscaler(
        weights,
        device=device,
        dtype=dtype,
        tile=tile,
        overlap=overlap,
        ensemble=ensemble,
        scale=scale,
    )
    return upscaler(image, progress)
