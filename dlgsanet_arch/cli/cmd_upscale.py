"""`dlgsanet upscale`: an image or a folder of images, enlarged."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.cli import VERBS, add_common, clean_up_on_sigterm, exit_status
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import printable

# Options of `Upscaler` by the same names.
_OPTIONS = ("device", "dtype", "tile", "overlap", "ensemble", "batch", "scale")


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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet upscale",
        description=VERBS["upscale"],
        epilog="PNG, JPEG, WebP, TIFF and BMP are read. Depth, gray, transparency, colour profile "
        "and EXIF data are kept; EXIF orientation is applied. Bad images are named, the rest is "
        "done, and the exit status is then 1.",
    )
    add = parser.add_argument
    how: dict[str, Any] = {"required": True, "type": Path, "metavar": "PATH"}
    add("-i", "--input", **how, help="an image or a folder")
    text = "a folder, which gets the tree of the input; or a file, for an image"
    add("-o", "--output", **how, help=text)
    add("--suffix", default="", metavar="TEXT", help="put behind the names, such as _x4")
    text = "of results (default: the image's, or PNG where that cannot hold the result)"
    add("--format", choices=("png", "jpeg", "webp", "tiff"), help=text)
    text = "of JPEG and WebP (default: 95); WebP without loss stays so"
    add("--quality", type=_quality, default=95, metavar="N", help=text)
    add("--skip-existing", action="store_true", help="skip images whose results are there")
    text = ".pth or .safetensors, or the name of bundled weights (default: bundled weights)"
    add("-m", "--weights", metavar="WEIGHTS", help=text)
    text = "2, 3 and 4 have bundled weights (default: 4, or the network's); else by bicubic"
    add("--scale", type=float, help=text)
    add_common(parser, "param-key", "ensemble", "dtype", "device")
    text = "tiles, or images of one size, that are computed together (default: 1)"
    add("--batch", type=int, default=1, metavar="N", help=text)
    text = "the I-th of N parts of a folder, to divide it among GPUs and machines"
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help=text)
    text = "side of the tiles, in pixels of the input; 0: without tiles; auto: by the free memory"
    add("--tile", type=_tile, default="auto", metavar="auto|N|0", help=text)
    text = "what neighbouring tiles share, in pixels of the input (default: 32)"
    add("--overlap", type=int, default=32, metavar="N", help=text)
    text = "print how far tiles are from the whole image; computes both, writes nothing"
    add("--check-tiles", action="store_true", help=text)
    return parser


class _Screen:
    """Shows a bar over images, and says what happened to them."""

    def __init__(self, total: int) -> None:
        from dlgsanet_arch.progress import progress_bar

        self.counts: Counter[str] = Counter()
        self.last = ""  # what was written
        self.bar = progress_bar("upscale", total, "image")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(printable(text), file=sys.stderr)

    def progress(self, done: int, total: int) -> None:
        """Show the tiles of an image."""
        self.bar.set_postfix_str(f"tile {done}/{total}" if total > 1 else "")

    def tell(self, kind: str, path: Path, text: str) -> None:
        """Show what happened to an image; see `files.run`."""
        if kind == "notice":
            self.say(f"{path}: {text}")
            return
        self.counts[kind] += 1
        if kind == "written":
            self.last = text
        if kind == "bad":
            self.say(f"FAILED {'' if text.startswith(str(path)) else f'{path}: '}{text}")
        self.bar.update()

    def summary(self, scale: float, output: Path, weights: str) -> str:
        """Say what was written, where, how much larger, and by which weights."""
        counts, written = self.counts, self.counts["written"]
        said = f"{written} image{'s' * (written != 1)} upscaled x{scale:g}"
        if written:
            said += f" into {self.last if written == 1 else output} by {weights}"
        if counts["skipped"]:
            said += f", {counts['skipped']} skipped, as their results are there"
        return printable(said + (f", {counts['bad']} FAILED" if counts["bad"] else ""))


def _check_tiles(upscaler, jobs) -> int:
    from dlgsanet_arch.data.images import read_stored

    failed = 0
    for job in jobs:
        try:
            pixels = read_stored(job.source).pixels
            found = upscaler.tiling_error(pixels)
        except UserError as error:
            print(printable(f"FAILED {error}"), file=sys.stderr)
            failed = 1
            continue
        said = "computed whole, no tiles"
        if found is not None:
            said = (
                f"tiles of {upscaler.choose_tile(*pixels.shape[:2])} differ from the whole image "
                f"by at most {found[0]:.3g} of 255 levels, {found[1]:.3g} on average"
            )
        print(printable(f"{job.source}: {said}"))
    return failed


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Enlarge images; 1 where one could not be done."""
    args = build_parser().parse_args(argv)
    clean_up_on_sigterm()
    try:
        import PIL  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        text = f"upscaling files needs Pillow and tqdm ({error}): pip install '.[tools]'"
        raise UserError(text) from error
    from dlgsanet_arch.checkpoint import find_weights, read_checkpoint
    from dlgsanet_arch.data.finding import left_out
    from dlgsanet_arch.inference import Upscaler, files
    from dlgsanet_arch.inference.upscaler import default_weights

    jobs, left = files.plan(args.input, args.output, suffix=args.suffix, format=args.format)
    index, count = args.shard
    jobs = jobs[index - 1 :: count]
    path = find_weights(args.weights) if args.weights else default_weights(args.scale)
    options = {name: getattr(args, name) for name in _OPTIONS}
    checkpoint = read_checkpoint(path, args.param_key)
    if args.check_tiles:
        return _check_tiles(Upscaler(checkpoint, **options, notice=print), jobs)
    screen = _Screen(len(jobs))
    with screen.bar:
        upscaler = Upscaler(checkpoint, **options, notice=screen.say)
        how = {"skip_existing": args.skip_existing, "quality": args.quality}
        files.run(upscaler, jobs, screen.tell, screen.progress, **how)
    weights = f"{checkpoint.name} ({args.weights or f'bundled {path.stem}'})"
    print(screen.summary(upscaler.scale, args.output, weights))
    if left:
        print(left_out(left))
    return int(screen.counts["bad"] > 0)
