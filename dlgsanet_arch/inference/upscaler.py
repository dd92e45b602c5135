"""An image or a batch enlarged: split into tiles that fit the memory, run, put together."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlgsanet_arch import cpu, memory
from dlgsanet_arch.checkpoint import Checkpoint, bundled_weights, read_checkpoint
from dlgsanet_arch.graphs import Graphs
from dlgsanet_arch.inference import arrays
from dlgsanet_arch.inference.arrays import DEEP, Depth
from dlgsanet_arch.memory import LEAST_TILE, UpscaleError
from dlgsanet_arch.tiles import rows_in_tiles, self_ensemble

Progress = Callable[[int, int], None]
Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")

DEFAULT_OVERLAP = 32
LARGEST_TILE = 2048  # chosen by itself; larger ones make nothing better
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_LUMA = (0.299, 0.587, 0.114)  # BT.601, the Y that super-resolution is measured on


def default_weights(scale: float | None = None) -> Path:
    """Return the bundled weights of the next scale from `scale` (default 4) up, or the largest."""
    paths = {int(path.stem.rpartition("x")[2]): path for path in bundled_weights().values()}
    if not paths:
        raise UpscaleError(
            "weights are needed, and this package has no bundled ones: name a file, "
            "`dlgsanet upscale -m net_g_latest.pth …` or Upscaler('net_g_latest.pth')"
        )
    return paths[min((each for each in paths if each >= (scale or 4)), default=max(paths))]


def _find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of a name; None takes CUDA if available, else MPS, else the CPU."""
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


def _part(progress: Progress | None, index: int, parts: int) -> Progress | None:
    """Return what counts the tiles of one of several parts of equal cost in one count."""
    return progress and (lambda done, tiles: progress(index * tiles + done, parts * tiles))


class Upscaler:
    """Loads a network once and enlarges images by it.

    Args:
        weights: A file of weights, the name of bundled ones, or a checkpoint that was read. None
            takes the bundled ones. A network for colour sees gray as three equal channels, one for
            gray sees each channel alone.
        device: None takes CUDA where it is available, else MPS, else the CPU.
        dtype: "fp32", or "bf16" or "fp16" by autocast: faster on GPUs.
        tile: Side of the tiles that an image is computed in, in its own pixels; 0 computes it
            whole, "auto" does so where memory suffices.
        overlap: What neighbouring tiles share, in pixels of the image; half a tile at most.
        ensemble: Whether the mean over eight flips and rotations is taken.
        batch: How many tiles, or images of one size, are computed together at most.
        scale: None takes the network's; to reach another, its result is resized.
        config: Arguments of the network that are known better than the file states them.
        notice: Takes a sentence on what was done otherwise than requested; None warns.

    Raises:
        UpscaleError: An argument is out of range, or the device cannot do what is requested.
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
        if dtype not in tuple(_DTYPES):
            raise UpscaleError(f"dtype must be fp32, bf16 or fp16; got {dtype!r}")
        if tile not in ("auto", 0) and not (isinstance(tile, int) and tile >= LEAST_TILE):
            raise UpscaleError(f"tile must be 'auto', 0 or {LEAST_TILE} or more; got {tile!r}")
        counts = isinstance(overlap, Integral) and isinstance(batch, Integral)
        if not counts or overlap < 0 or batch < 1:
            raise UpscaleError(f"overlap must be 0 or more, batch 1 or more; {overlap=}, {batch=}")
        if scale is not None and not (isinstance(scale, Real) and 0 < scale <= 64):
            raise UpscaleError(f"scale must be more than 0 and at most 64; got {scale!r}")
        if not isinstance(weights, Checkpoint):
            path = default_weights(scale) if weights is None else weights
            weights = read_checkpoint(path, config=config)
        self.checkpoint = weights
        self.scale = float(scale or weights.scale)
        self.device = _find_device(device)
        self.tile, self.overlap, self.batch = tile, overlap, batch
        self._dtype, self._ensemble = dtype, ensemble
        self._notice = notice or partial(warnings.warn, category=RuntimeWarning, stacklevel=2)
        self._graphs = Graphs(self._notice)
        self._most: int | None = None  # pixels that memory sufficed for, once it did not
        self._channels = weights.config["in_chans"]
        if self._channels not in (1, 3):
            raise UpscaleError(f"these weights take {self._channels} channels, not gray or RGB")
        self.network = weights.network().to(self.device)
        if dtype != "fp32":
            self._check_precision()

    def _precision(self) -> AbstractContextManager[object]:
        dtype = _DTYPES[self._dtype]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _check_precision(self) -> None:
        """Refuse what the device cannot compute, which shows in many ways."""
        try:
            with torch.no_grad(), self._precision():
                self.network(torch.zeros(1, self._channels, 8, 8, device=self.device))
        except Exception as error:
            raise UpscaleError(
                f"{self.device} cannot compute this network in {self._dtype} "
                f"({str(error).splitlines()[0]}): use fp32"
            ) from error
        if self.device.type == "cpu":
            self._notice(f"{self._dtype} is slower than fp32 on a CPU and needs more memory")

    def __call__(self, image: Any, progress: Progress | None = None) -> Any:
        """Enlarge an image, or a batch as a tensor, and return the same kind of thing.

        Args:
            image: An array (H, W) or (H, W, C), uint8 or uint16, of gray, gray and alpha, RGB, or
                RGB and alpha; a tensor (B, 3, H, W) or (B, 1, H, W), floats in [0, 1]; a Pillow
                image; or the path of an image's file, for which an array is returned.
            progress: Called with the number of tiles done and of all.

        Raises:
            UpscaleError: `image` is of another shape, dtype or range, memory does not suffice, or
                the results are not finite.
            ImageError: The file cannot be read.
        """
        if isinstance(image, Tensor):
            return self._tensor(image, progress)
        if isinstance(image, str | Path):
            from dlgsanet_arch.data.images import read_stored

            pixels = read_stored(Path(image)).pixels
            return self.many([pixels[..., 0] if pixels.shape[2] == 1 else pixels], progress)[0]
        if hasattr(image, "getbands"):
            from PIL import Image

            made = Image.fromarray(self.many([arrays.from_pillow(image)], progress)[0])
            if image.info.get("icc_profile"):
                made.info["icc_profile"] = image.info["icc_profile"]
            return made
        return self.many([image], progress)[0]

    def many(
        self, images: Sequence[NDArray[Depth]], progress: Progress | None = None
    ) -> list[NDArray[Depth]]:
        """Enlarge arrays of one shape and depth together; see `__call__`."""
        checked = [arrays.checked(each) for each in images]
        if len({(each.shape, each.dtype) for each in checked}) > 1:
            raise UpscaleError("images of one shape and dtype are taken together")
        stack = np.stack(checked)
        made = self._fitted(lambda tile: self._images(stack, tile, progress), stack.shape[:3])
        return [each[..., 0] if images[0].ndim == 2 else each for each in made]

    def _images(
        self, images: NDArray[Depth], tile: int, progress: Progress | None
    ) -> NDArray[Depth]:
        """Enlarge (B, H, W, C), C 1 to 4: gray or colour, and alpha by itself."""
        if images.shape[3] in (1, 3):
            return self._planes(images, tile, progress)
        alpha = images[..., -1:]
        filled = map(arrays.fill_transparent, images[..., :-1], alpha)
        parts = [
            self._planes(each, tile, _part(progress, index, 2))
            for index, each in enumerate((np.stack(list(filled)), alpha))
        ]
        for each, before in zip(parts[1], alpha, strict=True):
            arrays.keep_flat(each, before)
        return np.concatenate(parts, 3)

    def _planes(
        self, images: NDArray[Depth], tile: int, progress: Progress | None
    ) -> NDArray[Depth]:
        """Enlarge (B, H, W, C), C 1 or 3, and resize where another scale is requested."""
        count, height, width, channels = images.shape
        peak = np.iinfo(images.dtype).max
        times = self.checkpoint.scale
        resizes = self.scale != times
        # Between the two steps, 16 bits: rounded to 8 once.
        levels, depth = (DEEP, np.dtype(np.uint16)) if resizes else (peak, images.dtype)
        memory.check_room(count * channels * times**2 * height * width * depth.itemsize)
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
        return np.stack([arrays.resized(each, self._size(height, width), peak) for each in made])

    def _tensor(self, images: Tensor, progress: Progress | None) -> Tensor:
        arrays.check_tensor(images)
        chunks = images.split(self.batch)

        def work(chunk: Tensor, step: Progress | None, tile: int) -> Tensor:
            return torch.cat([each.to(images) for each in self._rows(chunk, 1.0, tile, step)], 2)

        made = []
        for index, chunk in enumerate(chunks):
            step = _part(progress, index, len(chunks))
            made.append(self._fitted(partial(work, chunk, step), chunk[:, 0].shape))
        whole = torch.cat(made)
        if self.scale == self.checkpoint.scale:
            return whole
        return arrays.bicubic(whole.float(), self._size(*images.shape[2:])).clamp_(0, 1).to(images)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def _rows(
        self, images: Tensor, peak: float, tile: int, progress: Progress | None
    ) -> Iterator[Tensor]:
        """Return finished rows (B, C, n, W'), float32 in [0, 1] on the device."""
        side = tile or max(images.shape[2:])
        overlap = min(self.overlap, side // 2)
        # Images that are computed together leave less room for tiles that are.
        batch = max(1, self.batch // len(images))
        run = partial(self._forward, peak=peak)
        return rows_in_tiles(run, images, self.checkpoint.scale, side, overlap, progress, batch)

    def _forward(self, images: Tensor, peak: float) -> Tensor:
        """Compute images (B, 1 or 3, h, w) with values from 0 to `peak`, of any dtype."""
        given = images.to(self.device).float() / peak
        count, channels = given.shape[:2]
        if self._channels > channels:
            given = given.expand(-1, self._channels, -1, -1)
        elif self._channels < channels:
            given = given.reshape(-1, 1, *given.shape[2:])
        given = given.contiguous()
        with torch.no_grad(), self._precision():
            run = partial(self._graphs, self.network)
            run = partial(self_ensemble, run) if self._ensemble else run
            result = run(given).float()
        if self._channels > channels:
            weights = torch.tensor(_LUMA, device=result.device).view(1, -1, 1, 1)
            result = (result * weights).sum(1, keepdim=True)
        elif self._channels < channels:
            result = result.reshape(count, channels, *result.shape[2:])
        if not bool(result.isfinite().all()):
            why = "its weights are too large" if self._dtype == "fp32" else "use fp32"
            if not all(bool(each.isfinite().all()) for each in self.checkpoint.weights.values()):
                why = "the weights are damaged, which `dlgsanet weights inspect` shows"
            raise UpscaleError(f"the network's results are not numbers in {self._dtype}: {why}")
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

    def _fitted(self, work: Callable[[int], T], shape: Sequence[int]) -> T:
        """Return work(tile) for images (B, H, W), the tile halved as long as memory lacks.

        What sufficed is remembered for the next images.
        """
        count, height, width = shape
        tile, side = self.choose_tile(height, width, count), max(height, width)
        while True:
            try:
                return work(tile)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Out of the handler: the error held the frames that held the memory.
            had_recordings = self._graphs.clear(for_good=True)
            memory.empty_cache(self.device)
            if had_recordings:
                continue
            tried = tile or side
            if tried <= LEAST_TILE:
                raise UpscaleError(
                    f"memory on {self.device} does not suffice even for tiles of {tried} pixels "
                    f"({reason}): close other programs, or use --device cpu"
                )
            tile = max(LEAST_TILE, tried // 2)
            self._most = tile**2 * count
            what = f"tiles of {tried}" if tried < side else "the whole image"
            self._notice(f"out of memory on {self.device} with {what}; again with tiles of {tile}")

    def tiling_error(self, image: NDArray[Depth]) -> tuple[float, float] | None:
        """Compute an image, as `many` takes it, in tiles and whole, and compare; without alpha.

        Returns:
            The largest and the mean difference in levels of 0 to 255; None where it is computed
            whole anyway.
        """
        array = arrays.checked(image)
        colour = array[..., :-1] if array.shape[2] in (2, 4) else array
        tile = self.choose_tile(*colour.shape[:2])
        if not tile:
            return None
        peak = np.iinfo(array.dtype).max
        given = torch.from_numpy(colour.astype(np.int32)).permute(2, 0, 1)[None]
        try:
            (whole,) = self._rows(given, peak, 0, None)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            raise UpscaleError(
                f"memory on {self.device} does not suffice for the whole image, which tiles are to "
                "be compared with: take a smaller one"
            ) from error
        tiled = torch.cat(list(self._rows(given, peak, tile, None)), 2)
        apart = (tiled - whole).abs_() * 255
        return float(apart.max()), float(apart.mean())


def upscale(
    image: Any,
    weights: Path | str | Checkpoint | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Any:
    """Enlarge one image as `Upscaler(weights, **options)(image, progress)`, which see."""
    return Upscaler(weights, **options)(image, progress)
