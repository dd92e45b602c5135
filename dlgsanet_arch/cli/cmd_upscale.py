"""`dlgsanet upscale`: an image or a folder of images, enlarged."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import clean_up_on_sigterm, exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import printable


def _tile(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _quality(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"--quality must be 1 to 100; got {text}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]+)/([0-9]+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 2/8, the second of eight")
    return index, count


def _device(text: str) -> str:
    names = text.split(",")
    if len(names) > 1:
        each = "; ".join(
            f"dlgsanet upscale … --device {name} --shard {index}/{len(names)}"
            for index, name in enumerate(names, 1)
        )
        raise argparse.ArgumentTypeError(
            f"{text!r} names several devices: start one process for each of them, here {each}"
        )
    return text


def _add_results(add) -> None:
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder, which gets the tree of the input; or a file, for an image",
    )
    add("--suffix", default="", metavar="TEXT", help="put behind the names, such as _x4")
    add(
        "--format",
        choices=("png", "jpeg", "webp", "tiff"),
        help="of results (default: the image's, or PNG where that cannot hold the result)",
    )
    add(
        "--quality",
        type=_quality,
        default=95,
        metavar="N",
        help="of JPEG and WebP (default: 95); WebP without loss stays so",
    )
    add("--skip-existing", action="store_true", help="skip images whose results are there")


def _add_tiles(add) -> None:
    add(
        "--tile",
        type=_tile,
        default="auto",
        metavar="auto|N|0",
        help="side of the tiles, in pixels of the input; 0: none; auto: by the free memory",
    )
    add(
        "--overlap",
        type=int,
        default=32,
        metavar="N",
        help="what neighbouring tiles share, in pixels of the input (default: 32)",
    )
    add(
        "--check-tiles",
        action="store_true",
        help="print how far tiles are from the whole image; computes both, writes nothing",
    )


def _add_computation(add) -> None:
    add(
        "-m",
        "--weights",
        metavar="WEIGHTS",
        help=".pth or .safetensors, or the name of bundled weights; the network is detected from "
        "it (default: bundled weights)",
    )
    add("--param-key", metavar="KEY", help="in a .pth (default: params_ema, else params)")
    add("--scale", type=float, help="other than the network's: resized by bicubic at the end")
    add("--ensemble", action="store_true", help="the mean over 8 flips and rotations; 8x the time")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    add(
        "--device",
        type=_device,
        metavar="NAME",
        help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one, else the CPU)",
    )
    add(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="tiles, or images of one size, that are computed together (default: 1)",
    )
    add(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N parts of a folder, to divide it among GPUs and machines",
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet upscale",
        description="Enlarge an image, or all images of a folder.",
        epilog="PNG, JPEG, WebP, TIFF and BMP are read. Depth, gray, transparency, colour profile "
        "and EXIF data are kept; EXIF orientation is applied. Bad images are named, the rest is "
        "done, and the exit status is then 1.",
    )
    add = parser.add_argument
    add("-i", "--input", type=Path, required=True, metavar="PATH", help="an image or a folder")
    _add_results(add)
    _add_computation(add)
    _add_tiles(add)
    return parser


class _Screen:
    """Shows a bar over images, or over the tiles of one, and says what happened.

    Args:
        total: How many images there are.
    """

    def __init__(self, total: int) -> None:
        from dlgsanet_arch.progress import progress_bar

        self.counts: Counter[str] = Counter()
        self.last = ""  # what was written
        self._single = total == 1
        self._bar = progress_bar("upscale", total, "image" if total > 1 else "tile")

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(printable(text), file=sys.stderr)

    def progress(self, path: Path, done: int, total: int) -> None:
        """Show the tiles of an image."""
        if self._single:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif total > 1:
            self._bar.set_postfix_str(f"tile {done}/{total}")

    def tell(self, kind: str, path: Path, text: str) -> None:
        """Show what happened to an image; see `files.Run`."""
        if kind == "notice":
            self.say(f"{path}: {text}")
            return
        self.counts[kind] += 1
        if kind == "written":
            self.last = text
        if kind == "bad":
            self.say(f"FAILED {'' if text.startswith(str(path)) else f'{path}: '}{text}")
        if not self._single:
            self._bar.update()
            self._bar.set_postfix_str("")

    def summary(self, upscaler, output: Path, weights: str) -> str:
        """Say what was written, where, how much larger, and by which weights."""
        counts = self.counts
        images = "1 image" if counts["written"] == 1 else f"{counts['written']} images"
        where = self.last if counts["written"] == 1 else output
        said = f"{images} upscaled x{upscaler.scale:g}"
        if counts["written"]:
            said += f" into {where} by {upscaler.checkpoint.name} ({weights})"
        if counts["skipped"]:
            said += f", {counts['skipped']} skipped, as their results are there"
        return printable(said + (f", {counts['bad']} FAILED" if counts["bad"] else ""))


def _check_imports() -> None:
    for module, package in (("PIL", "pillow"), ("tqdm", "tqdm")):
        try:
            __import__(module)
        except ImportError as error:
            raise UserError(
                f"upscaling files needs {package}, and its import fails ({error}): pip install "
                f"{package}, or this package with all its tools: pip install '.[tools]'"
            ) from error


def _check_tiles(upscaler, jobs) -> int:
    from dlgsanet_arch.data.images import read_stored

    failed = 0
    for job in jobs:
        try:
            pixels = read_stored(job.source).pixels
            found = upscaler.tiling_error(pixels)
        except UserError as error:
            print(printable(f"FAILED {error}"), file=sys.stderr)
            failed += 1
            continue
        said = "computed whole, no tiles"
        if found is not None:
            said = (
                f"tiles of {upscaler.choose_tile(*pixels.shape[:2])} differ from the whole image "
                f"by at most {found[0]:.3g} of 255 levels, {found[1]:.3g} on average"
            )
        print(printable(f"{job.source}: {said}"))
    return int(failed > 0)


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Enlarge images.

    Returns:
        0, or 1 where an image could not be done.
    """
    args = build_parser().parse_args(argv)
    _check_imports()
    clean_up_on_sigterm()
    from dlgsanet_arch.checkpoint import find_weights, read_checkpoint
    from dlgsanet_arch.inference import Upscaler, files
    from dlgsanet_arch.inference.upscaler import default_weights

    jobs, left = files.plan(args.input, args.output, suffix=args.suffix, format=args.format)
    index, count = args.shard
    jobs = jobs[index - 1 :: count]
    path = find_weights(args.weights) if args.weights else default_weights(args.scale)
    names = ("device", "dtype", "tile", "overlap", "ensemble", "batch", "scale")
    options = {name: getattr(args, name) for name in names}
    checkpoint = read_checkpoint(path, args.param_key)
    if args.check_tiles:
        return _check_tiles(Upscaler(checkpoint, **options, notice=print), jobs)
    with _Screen(len(jobs)) as screen:
        upscaler = Upscaler(checkpoint, **options, notice=screen.say)
        how = {"skip_existing": args.skip_existing, "quality": args.quality}
        files.Run(upscaler, screen.tell, screen.progress, **how)(jobs)
    print(screen.summary(upscaler, args.output, args.weights or f"bundled {path.stem}"))
    if left:
        print(f"left out, as these are not read: {files.listed(left)}; convert them to PNG first")
    return int(screen.counts["bad"] > 0)
