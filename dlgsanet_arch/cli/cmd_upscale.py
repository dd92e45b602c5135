"""`dlgsanet upscale`: an image or a folder of images, enlarged."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.errors import UserError


def _tile(text: str) -> int | str:
    return text if text == "auto" else int(text)


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
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder, which gets the tree of the input; or a file, for an image",
    )
    add(
        "-m",
        "--weights",
        type=Path,
        metavar="WEIGHTS",
        help=".pth or .safetensors; the network is detected from it (default: bundled weights)",
    )
    add("--scale", type=float, help="other than the network's: resized by bicubic at the end")
    add("--suffix", default="", metavar="TEXT", help="put behind the names, such as _x4")
    add(
        "--format",
        choices=("png", "jpeg", "webp", "tiff"),
        help="of results (default: the image's, or PNG where that cannot hold the result)",
    )
    add("--quality", type=int, default=95, metavar="N", help="of JPEG and WebP (default: 95)")
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
    add("--skip-existing", action="store_true", help="pass over images whose results are there")
    add(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N parts of a folder, to divide it among GPUs and machines",
    )
    return parser


class _Screen:
    """Shows a bar over images, or over the tiles of one, and says what happened.

    Args:
        total: How many images there are.
    """

    def __init__(self, total: int) -> None:
        from dlgsanet_arch.progress import progress_bar

        self.counts: Counter[str] = Counter()
        self._single = total == 1
        self._bar = progress_bar("upscale", total, "image" if total > 1 else "tile")

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def tell(self, event) -> None:
        """Show an event of `folders`."""
        if event.kind == "tiles":
            if self._single:
                self._bar.total = event.total
                self._bar.update(event.done - self._bar.n)
            elif event.total > 1:
                self._bar.set_postfix_str(f"tile {event.done}/{event.total}")
            return
        if event.kind == "notice":
            self.say(f"{event.path}: {event.text}")
            return
        self.counts[event.kind] += 1
        if event.kind == "bad":
            named = event.text.startswith(str(event.path))
            self.say(f"FAILED {'' if named else f'{event.path}: '}{event.text}")
        if not self._single:
            self._bar.update()
            self._bar.set_postfix_str("")


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
            print(f"FAILED {error}", file=sys.stderr)
            failed += 1
            continue
        if found is None:
            print(f"{job.source}: computed whole, no tiles")
            continue
        tile = upscaler.choose_tile(*pixels.shape[:2])
        print(
            f"{job.source}: tiles of {tile} differ from the whole image by at most "
            f"{found[0]:.3g} of 255 levels, {found[1]:.3g} on average"
        )
    return int(failed > 0)


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Enlarge what is asked for.

    Returns:
        0, or 1 where an image could not be done.
    """
    arguments = build_parser().parse_args(argv)
    _check_imports()
    from dlgsanet_arch.inference import Upscaler, folders

    if not 1 <= arguments.quality <= 100:
        raise UserError(f"--quality must be 1 to 100; got {arguments.quality}")
    jobs = folders.plan(
        arguments.input, arguments.output, suffix=arguments.suffix, format=arguments.format
    )
    taken = frozenset(job.target for job in jobs)
    jobs = folders.shard(jobs, *arguments.shard)
    names = ("weights", "device", "dtype", "tile", "overlap", "ensemble", "batch", "scale")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.check_tiles:
        return _check_tiles(Upscaler(**options, notice=print), jobs)
    writing = folders.Writing(arguments.skip_existing, arguments.quality, taken)
    with _Screen(len(jobs)) as screen:
        folders.run(Upscaler(**options, notice=screen.say), jobs, writing, screen.tell)
    counts = screen.counts
    said = [f"{counts['written']} upscaled"]
    said += [f"{counts[kind]} {word}" for kind, word in _WORDS.items() if counts[kind]]
    print(", ".join(said))
    return int(counts["bad"] > 0)


_WORDS = {"skipped": "skipped, as their results are there", "bad": "FAILED"}
