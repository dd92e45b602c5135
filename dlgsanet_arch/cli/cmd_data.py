"""`dlgsanet data <verb>`: also behind datasets/prepare.py."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlgsanet_arch.cli import exit_status
from dlgsanet_arch.data import SCALES
from dlgsanet_arch.data.workers import usable_cores
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import printable, suggest_or_list


def _demo(arguments: argparse.Namespace) -> int:
    from dlgsanet_arch.data import demo
    from dlgsanet_arch.data.training_sets import report

    made = demo.prepare(arguments.root / "datasets" / "demo", workers=arguments.workers)
    print(printable(report(made)))
    return 0


def _print(report: str, *folders: Path | None) -> None:
    """Print what was made of the images below some folders, and which of them were left out."""
    from dlgsanet_arch.data.finding import left_out_of

    print(printable("\n".join([report, *left_out_of(*folders)])))


def _making(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("workers", "skip_bad", "overwrite")}


# The sets that a verb joins, and the folder they go into.
OFFICIAL = {"div2k": (("DIV2K",), "DIV2K"), "df2k": (("DIV2K", "FLICKR2K"), "DF2K")}


def _train(arguments: argparse.Namespace) -> int:
    from dlgsanet_arch.data import training_sets

    out, scales = arguments.output, arguments.scale
    if arguments.verb == "train":
        sources = training_sets.find_sources(arguments.hr, arguments.lr, scales)
    else:
        from dlgsanet_arch.data import official

        names, target = OFFICIAL[arguments.verb]
        datasets, sources = arguments.root / "datasets", []
        out = out or datasets / target
        for each in (getattr(official, name) for name in names):
            places = [datasets / each.name, datasets]
            if arguments.archives:
                places.insert(0, arguments.archives)
            sources += official.sources(each, scales, places, arguments.mirror)
    cutting = training_sets.Cutting(arguments.crop, arguments.step, arguments.patch)
    made = training_sets.build(sources, scales, out, cutting=cutting, **_making(arguments))
    given = (arguments.hr, arguments.lr) if arguments.verb == "train" else ()
    _print(training_sets.report(made), *given)
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    from dlgsanet_arch.data import benchmark, discovery

    name = discovery.set_name(arguments.name)
    source = arguments.hr or discovery.find_source(name, arguments.root)
    target = arguments.root / "datasets" / "benchmark" / name
    made = benchmark.build(name, source, target, arguments.scale, **_making(arguments))
    _print(benchmark.report(made), source)
    return 0


def _sets_of_options(arguments: argparse.Namespace) -> list:
    from dlgsanet_arch.data.check import sets_of_options
    from dlgsanet_arch.options import load, shipped

    file = shipped.find(Path(arguments.opt).expanduser(), train=True)
    options = load(file)
    sets = sets_of_options(options, arguments.root)
    by_name = {options["datasets"][phase].get("name"): each for phase, each in sets.items()} | sets
    for name in arguments.sets or ():
        if name not in by_name:
            raise UserError(f"--sets: {file} has no set {name}{suggest_or_list(name, by_name)}")
    return [by_name[name] for name in arguments.sets or sets]


def _verify(arguments: argparse.Namespace) -> int:
    from dlgsanet_arch.data import verify

    if bool(arguments.opt) == bool(arguments.paths):
        raise UserError("verify takes either PATHs or -opt FILE")
    sets = _sets_of_options(arguments) if arguments.opt else verify.sets_of_paths(arguments.paths)
    verified = verify.verify(sets, arguments.workers)
    print(printable(verify.report(verified)))
    if arguments.fix:
        for path in verify.fix(verified):
            print(printable(f"written without what was bad: {path}"))
    return int(not all(each.is_good for each in verified))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


FOLDER = {"type": Path, "metavar": "FOLDER"}
NUMBER = {"type": _count, "metavar": "N"}
# Of each verb what it runs and makes: the first line is its line in `--help`.
VERBS = {
    "demo": (
        _demo,
        """a small set from the photographs in scikit-image's wheel

        Made below datasets/demo, for options/train/demo.yml. Nothing is downloaded.""",
    ),
    "train": (
        _train,
        """a training set from any folder of images

        HR is cut to a multiple of 12, LR is made by MATLAB's bicubic or taken from --lr, both are
        cut into matching sub-images, and these go into LMDBs with equal keys. Every image is
        opened before anything is written.""",
    ),
    "div2k": (
        _train,
        """DIV2K's 800 training images with their official LR

        Archives and unpacked folders that are there are used, what is missing is downloaded:
        about 5 GB with all scales, and as much again unpacked. Then the same is made as by
        `train`.""",
    ),
    "df2k": (
        _train,
        """DIV2K and Flickr2K's 2650 images together, with their official LR

        As `div2k`, with Flickr2K's one archive of about 20 GB, and as much again unpacked.""",
    ),
    "benchmark": (
        _benchmark,
        """a test set, with bicubic's figures beside known ones

        HR is cropped for each scale and LR is made of it by MATLAB's bicubic, below
        datasets/benchmark/NAME. --hr may be a folder of images or the set as it circulates, such
        as HR/ beside LR_bicubic/, GTmod12/, or image_SRF_4/.""",
    ),
    "verify": (
        _verify,
        """open everything that data sets hold, say what is wrong

        Lists of keys, sizes and names of HR and LR, every image, LR that is not the bicubic of HR,
        images below gt_size, equal ones, and test images among training images. The exit status
        is 1 if anything is wrong.""",
    ),
}


def _add_making(add: Any, scale: str, default: Sequence[int] | None) -> None:
    """Add the flags of the verbs that make a data set of images."""
    text = f"HR side over LR side, one or more of 2, 3 and 4 (default: {scale})"
    add("--scale", type=int, nargs="+", choices=SCALES, default=default, help=text)
    text = "leave out images that cannot be used, instead of writing nothing"
    add("--skip-bad", action="store_true", help=text)
    add("--overwrite", action="store_true", help="replace what was made from other images")


def _add_flags(verb: str, add: Any) -> None:
    """Add the flags of a verb."""
    if verb in ("train", "div2k", "df2k"):
        _add_making(add, "all", [*SCALES])
        patch = "side of the patches to be trained on in LR pixels: smaller is refused"
        for name, default, text in (
            ("--crop", 480, "side of a sub-image in HR pixels"),
            ("--step", 240, "distance between two sub-images in HR pixels"),
            ("--patch", 48, patch),
        ):
            add(name, **NUMBER, default=default, help=f"{text} (default: {default})")
    if verb == "train":
        add("--hr", **FOLDER, required=True, help="HR images, sub-folders too")
        text = "LR images of the same names, for several scales in X2, X3, X4 (default: made by "
        add("--lr", **FOLDER, help=f"{text}MATLAB's bicubic)")
        add("-o", "--output", **FOLDER, required=True, help="such as datasets/NAME")
    if verb in OFFICIAL:
        text = "where archives or their folders are, or are downloaded to (default: datasets/<SET>,"
        add("--archives", **FOLDER, help=f"{text} then datasets)")
        add("--mirror", metavar="URL", help="download from here, not the official server")
        add("-o", "--output", **FOLDER, help="default: datasets/DIV2K or datasets/DF2K")
    if verb == "benchmark":
        _add_making(add, "those that the set has HR images for", None)
        text = "Set5, Set14, B100, Urban100, Manga109, or your own"
        add("--name", required=True, help=text)
        text = "the set as it was downloaded (default: looked for in datasets)"
        add("--hr", **FOLDER, help=text)
    if verb == "verify":
        text = "LMDBs, folders of images, or folders that hold such"
        add("paths", nargs="*", type=Path, metavar="PATH", help=text)
        text = "the sets of an option file, or of a shipped one by its name"
        add("-opt", metavar="FILE", help=text)
        text = "of an option file, the sets with these names"
        add("--sets", nargs="+", metavar="NAME", help=text)
        text = "copy LMDBs without the bad pairs to *_fixed.lmdb"
        add("--fix", action="store_true", help=text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb: a sub-command for each data set it can build."""
    parser = argparse.ArgumentParser(
        prog="dlgsanet data",
        description="Prepare and verify data sets.",
        epilog="`VERB --help` says what a verb takes. Interrupted or killed, a command continues "
        "where it was when it is run again.",
    )
    root = "the folder that holds datasets/ (default: the current folder)"
    parser.add_argument("--root", default=Path(), **FOLDER, help=root)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    cores = usable_cores()
    for verb, (run, described) in VERBS.items():
        line, _, rest = described.partition("\n\n")
        text = f"{line[0].upper()}{line[1:]}. {textwrap.dedent(rest)}"
        added = verbs.add_parser(verb, help=line, description=text)
        added.set_defaults(run=run, verb=verb)
        # A default here would replace the value given before the verb.
        added.add_argument("--root", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        workers = f"processes (default: one a core, {cores} here)"
        added.add_argument("--workers", **NUMBER, default=cores, help=workers)
        _add_flags(verb, added.add_argument)
    return parser


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` names."""
    arguments = build_parser().parse_args(argv)
    try:
        import dlgsanet_arch.data.training_sets  # noqa: F401
    except ImportError as error:
        raise UserError(
            "preparing data needs OpenCV, lmdb and Pillow, and an import fails "
            f"({error}); `dlgsanet doctor` says what to do"
        ) from error
    return arguments.run(arguments)
