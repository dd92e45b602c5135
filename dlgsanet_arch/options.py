"""What an option file may say: read, overridden and checked before anything is created.

`check` runs every function of `CHECKS` and raises one error that lists all they found. A check is a
generator: it takes a `Subject` and yields one line a problem, "datasets:train:gt_size: what is
wrong; the fix". To add a check, write it above `CHECKS` and name it there. A check must bear any
YAML: a section may be absent, empty or no section at all, which `_required_keys` alone reports.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import yaml

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.network import DLGSANet

# Paths of keys that BasicSR reads without a default, each with an example of what to write there;
# an example in braces stands for a section.
_ALWAYS_REQUIRED = {
    "name": "tiny_x4",
    "model_type": "SRModel",
    "scale": "4",
    "num_gpu": "auto",
    "path": "{}",
    "network_g:type": "DLGSANet",
}
_TRAIN_REQUIRED = {
    "datasets:train:batch_size_per_gpu": "16",
    "datasets:train:num_worker_per_gpu": "6",
    "train:total_iter": "500000",
    "train:optim_g:type": "Adam",
    "train:optim_g:lr": "!!float 5e-4",
    "train:scheduler:type": "MultiStepLR",
    "logger:print_freq": "100",
    "logger:save_checkpoint_freq": "5000",
    "logger:use_tb_logger": "true",
}
_TEST_REQUIRED = {
    "datasets": "{test_1: …}",
    "path:pretrain_network_g": "experiments/tiny_x4/models/net_g_latest.pth",
    "val:save_img": "true",
}
# BasicSR reads these two, but takes an empty value.
_MAY_BE_EMPTY = ("val:suffix", "logger:use_tb_logger")

# What BasicSR's data sets of pictures read, and which of it are folders.
_DATASET_KEYS = {
    "PairedImageDataset": {
        "dataroot_gt": "datasets/benchmark/Set5/X4/HR",
        "dataroot_lq": "datasets/benchmark/Set5/X4/LR",
        "io_backend:type": "disk",
    },
    "SingleImageDataset": {
        "dataroot_lq": "datasets/benchmark/Set5/X4/LR",
        "io_backend:type": "disk",
    },
}
_TRAIN_PAIRS_KEYS = {"gt_size": "192", "use_hflip": "true", "use_rot": "true"}
_ROLES = {"train": "training", "val": "validation", "test": "test"}
_CONTENTS = {"dataroot_gt": "HR", "dataroot_lq": "LR"}
_PICTURE_SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_HOW_TO_GET_DATA = "correct the path, or get the data as datasets/README.md says"

_BORDERED_METRICS = ("calculate_psnr", "calculate_ssim", "calculate_niqe")

# Keys, wherever they stand, whose value BasicSR computes with.
_NUMBERS = frozenset(
    (
        *("scale", "num_gpu", "manual_seed", "gt_size", "crop_border"),
        *("batch_size_per_gpu", "num_worker_per_gpu", "dataset_enlarge_ratio"),
        *("total_iter", "warmup_iter", "ema_decay", "lr", "weight_decay", "betas", "eps"),
        *("milestones", "gamma", "periods", "restarts", "restart_weights", "eta_min"),
        *("loss_weight", "val_freq", "print_freq", "save_checkpoint_freq"),
    )
)
_ABOVE_ZERO = frozenset(
    (
        *("scale", "gt_size", "batch_size_per_gpu", "dataset_enlarge_ratio", "total_iter"),
        *("val_freq", "print_freq", "save_checkpoint_freq"),
    )
)
_WHOLE = frozenset(("scale", "num_gpu", "gt_size", "batch_size_per_gpu", "num_worker_per_gpu"))

_CHOICES = {
    "datasets:*:io_backend:type": ("disk", "lmdb", "memcached"),
    "datasets:*:prefetch_mode": ("cuda", "cpu"),
    "val:metrics:*:better": ("higher", "lower"),
}
_SR_MODEL_CHOICES = {
    "train:optim_*:type": ("Adam",),
    "train:scheduler:type": ("MultiStepLR", "MultiStepRestartLR", "CosineAnnealingRestartLR"),
}

# Where an option file names what is registered, and in which registry.
_TYPES = {
    "model_type": "model",
    "network_*:type": "arch",
    "datasets:*:type": "dataset",
    "val:metrics:*:type": "metric",
    "train:*_opt:type": "loss",
}

# BasicSR makes a folder of every other key of `path` that has a value.
_PATH_KEYS = (
    "pretrain_network_*",
    "strict_load_*",
    "param_key_*",
    "resume_state",
    "ignore_resume*",
)
_PATH_FOLDERS = ("root", "experiments_root", "results_root", "models", "training_states")
_PATH_FOLDERS += ("log", "visualization")


class OptionsError(UserError):
    """An option file, or an entry given beside it, that cannot be used; the message says why."""


@dataclass(frozen=True)
class Subject:
    """What a check looks at: the arguments of `check`, and ways through the options."""

    options: Mapping[str, Any]
    train: bool
    root: Path
    registered: Mapping[str, Collection[str]] | None

    def section(self, path: str) -> Mapping[str, Any]:
        """Return the section at "a:b", empty where there is none."""
        node: Any = self.options
        for key in path.split(":"):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node if isinstance(node, Mapping) else {}

    def datasets(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the phase ("train", "val", "test_1", …) and the options of each data set."""
        for phase in self.section("datasets"):
            yield str(phase), self.section(f"datasets:{phase}")

    def values(self) -> Iterator[tuple[str, Any]]:
        """Yield path and value of everything that is no section, a list's elements one by one."""
        yield from _values(self.options)

    def resolve(self, path: object) -> Path:
        """Return `path` of an option file as BasicSR will find it."""
        return self.root / Path(str(path)).expanduser()


def _values(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{key}:")
        else:
            for element in value if isinstance(value, list) else [value]:
                yield f"{prefix}{key}", element


def _near(name: object, known: Iterable[object]) -> str:
    """Return "; did you mean …?" with the nearest known name, letter case aside, or nothing."""
    lowered = {str(entry).lower(): entry for entry in known}
    near = difflib.get_close_matches(str(name).lower(), lowered, n=1)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def _choose(name: object, choices: Iterable[str]) -> str:
    """Return the nearest choice as `_near` does, or all of them."""
    return _near(name, choices) or f"; there are: {', '.join(map(repr, choices))}"


@functools.cache
def _network_arguments() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(DLGSANet).parameters


def _networks(subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield key and arguments of each DLGSANet in the option file."""
    for key in subject.options:
        network = subject.section(str(key)) if str(key).startswith("network_") else {}
        if network.get("type") == "DLGSANet":
            yield str(key), {name: value for name, value in network.items() if name != "type"}


def _required(subject: Subject) -> dict[str, str]:
    """Return the paths that this option file must fill, each with an example of its value."""
    required = {**_ALWAYS_REQUIRED, **(_TRAIN_REQUIRED if subject.train else _TEST_REQUIRED)}
    for phase, dataset in subject.datasets():
        keys = {"name": "Set5", "type": "PairedImageDataset"}
        keys |= _DATASET_KEYS.get(str(dataset.get("type")), {})
        if phase == "train" and dataset.get("type") == "PairedImageDataset":
            keys |= _TRAIN_PAIRS_KEYS
        required |= {f"datasets:{phase}:{key}": example for key, example in keys.items()}
    validation = subject.section("val")
    if subject.train and subject.options.get("val") is not None:
        required |= {"val:val_freq": "5000", "val:save_img": "false"}
    if not subject.train and validation.get("save_img"):
        required["val:suffix"] = "~"
    for metric in subject.section("val:metrics"):
        path = f"val:metrics:{metric}"
        required[f"{path}:type"] = "calculate_psnr"
        if str(subject.section(path).get("type")).startswith(_BORDERED_METRICS):
            required[f"{path}:crop_border"] = str(subject.options.get("scale", 4))
    return required


def _how_to_fill(path: str, siblings: Mapping[str, Any], required: Mapping[str, str]) -> str:
    """Say what to write at an unfilled path, and which of its siblings may be meant for it."""
    section, _, key = path.rpartition(":")
    prefix = f"{path}:"
    below = [entry.removeprefix(prefix) for entry in required if entry.startswith(prefix)]
    if below:
        names = dict.fromkeys(entry.split(":")[0] for entry in below)
        fix = f"write a section with {', '.join(names)}"
    else:
        fix = f"write `{key}: {required[path]}`"
    if key in siblings:
        return f"empty; {fix}"
    spare = (name for name in siblings if f"{section}:{name}".lstrip(":") not in required)
    return f"missing; {fix}{_near(key, spare)}"


def _required_keys(subject: Subject) -> Iterator[str]:
    """BasicSR fails on a missing key, for some of them hours after the start."""
    required = _required(subject)
    faults: dict[str, str] = {}
    for path, example in required.items():
        node: Any = subject.options
        keys = path.split(":")
        for depth, key in enumerate(keys, 1):
            here = ":".join(keys[:depth])
            value = node.get(key)
            if value is None and not (here in _MAY_BE_EMPTY and key in node):
                faults.setdefault(here, _how_to_fill(here, node, required))
                break
            is_section = depth < len(keys) or example.startswith("{")
            if is_section and not isinstance(value, Mapping):
                faults.setdefault(here, f"must be a section of keys; got {value!r}")
                break
            node = value
    for path, fault in faults.items():
        yield f"{path}: {fault}"


def _phases(subject: Subject) -> Iterator[str]:
    """BasicSR knows a data set's phase by its key up to the underscore."""
    if not subject.train and subject.options.get("datasets") == {}:
        yield "datasets: there is nothing to test on; write a section test_1"
    for phase, _ in subject.datasets():
        kind = phase.split("_")[0]
        known = phase == "train" or kind == "val" if subject.train else kind in ("val", "test")
        if not known:
            examples = "train, val, val_2" if subject.train else "test_1, test_2"
            yield (
                f"datasets:{phase}: no name for a data set when "
                f"{'training' if subject.train else 'testing'}; use names such as {examples}"
            )


def _number_for(text: str) -> str:
    if re.fullmatch(r"[+-]?\d+", text):
        return f"; write {text} without quotes"
    try:
        float(text)
    except ValueError:
        return ""
    return f"; write !!float {text}"


def _numbers(subject: Subject) -> Iterator[str]:
    """YAML 1.1 reads 5e-4 as text; BasicSR fails on it only when it computes."""
    numeric_arguments = {
        f"{key}:{name}"
        for key, arguments in _networks(subject)
        for name in arguments
        if name in _network_arguments() and _network_arguments()[name].annotation in (int, float)
    }
    for path, value in subject.values():
        key = path.rpartition(":")[2]
        if key not in _NUMBERS and path not in numeric_arguments:
            continue
        if isinstance(value, str) and not (key == "num_gpu" and value == "auto"):
            yield f"{path}: is the text {value!r}, not a number{_number_for(value)}"
        elif key in _WHOLE and isinstance(value, float):
            yield f"{path}: must be a whole number; got {value!r}"
        elif key in _ABOVE_ZERO and isinstance(value, int | float) and value <= 0:
            yield f"{path}: must be above 0; got {value!r}"


def _names(subject: Subject) -> Iterator[str]:
    """BasicSR makes paths of names; YAML reads a name such as 291 as a number."""
    names = {"name": subject.options.get("name")}
    names |= {
        f"datasets:{phase}:name": dataset.get("name") for phase, dataset in subject.datasets()
    }
    for path, name in names.items():
        if name is not None and not isinstance(name, str):
            yield f"{path}: must be text; got {name!r}; write it in quotes: '{name}'"


def _matching(subject: Subject, patterns: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value and the pattern's entry for each value whose path matches a pattern."""
    for path, value in subject.values():
        for pattern, entry in patterns.items():
            if path.count(":") == pattern.count(":") and fnmatchcase(path, pattern):
                yield path, value, entry


def _choices(subject: Subject) -> Iterator[str]:
    """BasicSR takes any other `better` for "lower", and refuses the rest after the run began."""
    patterns = dict(_CHOICES)
    if subject.options.get("model_type") == "SRModel":
        patterns |= _SR_MODEL_CHOICES
    for path, value, choices in _matching(subject, patterns):
        if value is not None and value not in choices:
            yield f"{path}: {value!r} is not known{_choose(value, choices)}"


def _registered_types(subject: Subject) -> Iterator[str]:
    """BasicSR looks a name up after it renamed the old run; a metric at the first validation."""
    if subject.registered is None:
        return
    for path, value, registry in _matching(subject, _TYPES):
        known = subject.registered.get(registry)
        if known is None or value is None:
            continue
        # Where a name is not registered, BasicSR looks for it with this suffix.
        names = [*known, *(name.removesuffix("_basicsr") for name in known)]
        if value not in names:
            hint = _near(value, names) or "; is the package that registers it imported?"
            yield f"{path}: no {registry} is registered as {value!r}{hint}"


def _losses(subject: Subject) -> Iterator[str]:
    """SRModel refuses to train without a loss after it built everything else."""
    train = subject.section("train")
    if not (subject.train and train and subject.options.get("model_type") == "SRModel"):
        return
    if not (train.get("pixel_opt") or train.get("perceptual_opt")):
        others = set(train) - {"optim_g"}
        yield (
            "train:pixel_opt: missing; write "
            "`pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}`"
            f"{_near('pixel_opt', others)}"
        )


def _network_values(subject: Subject) -> Iterator[str]:
    """Compare a DLGSANet's arguments with its signature, then build it without memory."""
    known = _network_arguments()
    for key, arguments in _networks(subject):
        valid = {}
        texts = False
        for name, value in arguments.items():
            if name not in known:
                yield f"{key}:{name}: DLGSANet has no such argument{_choose(name, known)}"
                continue
            annotation = known[name].annotation
            choices = get_args(annotation) if get_origin(annotation) is Literal else ()
            if choices and value not in choices:
                yield f"{key}:{name}: {value!r} is not known{_choose(value, choices)}"
                continue
            texts |= isinstance(value, str) and annotation in (int, float)
            valid[name] = value
        if texts:
            continue  # reported by _numbers
        try:
            with torch.device("meta"):
                DLGSANet(**valid)
        except (TypeError, ValueError, RuntimeError) as error:
            yield f"{key}: {error}"


def _sizes(subject: Subject) -> Iterator[str]:
    """The network must enlarge by `scale`, and patches must have whole LR pixels."""
    scale = subject.options.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        return  # missing and text are reported elsewhere
    for key, arguments in _networks(subject):
        if key != "network_g":
            continue
        values = {name: entry.default for name, entry in _network_arguments().items()} | arguments
        upscale = values["upscale"] if values["upsampler"] else 1
        if isinstance(upscale, int) and upscale != scale:
            reason = "" if values["upsampler"] else ", as without an upsampler"
            yield f"scale: is {scale}, but network_g enlarges by {upscale}{reason}; make them equal"
    gt_size = subject.section("datasets:train").get("gt_size")
    if subject.train and isinstance(gt_size, int) and gt_size % scale:
        yield (
            f"datasets:train:gt_size: {gt_size} is not a multiple of scale {scale}; "
            f"write {max(gt_size // scale, 1) * scale}"
        )


def _folder_fault(folder: Path) -> str:
    """Say what keeps `folder` from being a folder of pictures, or return nothing."""
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is no folder"
    if (folder / "data.mdb").exists():
        return "is an LMDB: write `io_backend: {type: lmdb}`"
    if not any(entry.suffix.lower() in _PICTURE_SUFFIXES for entry in folder.iterdir()):
        return "holds no pictures (sub-folders are not searched)"
    return ""


def _lmdb_fault(folder: Path) -> str:
    """Say what keeps `folder` from being an LMDB as BasicSR reads it, or return nothing."""
    if folder.suffix != ".lmdb":
        return "is no LMDB by its name, which must end in .lmdb; for pictures write `type: disk`"
    if not folder.exists():
        return "does not exist"
    for name in ("data.mdb", "meta_info.txt"):
        if not (folder / name).is_file():
            return f"has no {name}"
        if not (folder / name).stat().st_size:
            return f"is empty: its {name} has no content"
    return ""


def _list_fault(listing: Path) -> str:
    """Say what keeps `listing` from being a list of pictures' names, or return nothing."""
    if not listing.is_file():
        return "does not exist"
    return "" if listing.stat().st_size else "is empty"


def _pictures(subject: Subject) -> Iterator[str]:
    """Training and test sets must be there, with something in them."""
    for phase, dataset in subject.datasets():
        backend = subject.section(f"datasets:{phase}:io_backend").get("type")
        if backend not in ("disk", "lmdb"):
            continue
        listed = backend == "disk" and dataset.get("meta_info_file") is not None
        role = _ROLES.get(phase.split("_")[0], phase)
        owner = f"of the {role} set {dataset.get('name')}"
        if listed:
            listing = subject.resolve(dataset["meta_info_file"])
            if fault := _list_fault(listing):
                path = f"datasets:{phase}:meta_info_file"
                yield f"{path}: the list {owner}: {listing} {fault}; correct the path"
        for key in _DATASET_KEYS.get(str(dataset.get("type")), ()):
            if key not in _CONTENTS or dataset.get(key) is None:
                continue
            folder = subject.resolve(dataset[key])
            try:
                if backend == "lmdb":
                    fault = _lmdb_fault(folder)
                elif listed:
                    fault = "" if folder.is_dir() else "is no folder"
                else:
                    fault = _folder_fault(folder)
            except OSError as error:
                fault = f"cannot be read ({error.strerror})"
            if fault:
                what = f"the {_CONTENTS[key]} pictures {owner}"
                yield f"datasets:{phase}:{key}: {what}: {folder} {fault}; {_HOW_TO_GET_DATA}"


def _paths(subject: Subject) -> Iterator[str]:
    """BasicSR makes a folder of a misspelt key of `path`, and trains from random weights."""
    for key, value in subject.section("path").items():
        known = any(fnmatchcase(str(key), pattern) for pattern in _PATH_KEYS)
        if value is not None and not known and key not in _PATH_FOLDERS:
            names = [pattern.replace("_*", "_g") for pattern in _PATH_KEYS]
            yield f"path:{key}: not known; BasicSR would make a folder {value!r}{_near(key, names)}"


def _weights(subject: Subject) -> Iterator[str]:
    """Files to start from must be there; a resumed run takes its weights from its own folder."""
    paths = subject.section("path")
    resumed = subject.train and paths.get("resume_state")
    keys = ["resume_state"] if resumed else [key for key in paths if "pretrain_network" in str(key)]
    for key in keys:
        if paths[key] and not (file := subject.resolve(paths[key])).is_file():
            fix = "correct the path"
            if not subject.train:
                fix += " (training writes weights to experiments/<name>/models)"
            yield f"path:{key}: there is no file {file}; {fix}"


def _loggers(subject: Subject) -> Iterator[str]:
    """BasicSR imports what writes its logs after it renamed the old run."""
    if not subject.train:
        return
    logger = subject.section("logger")
    tensorboard = logger.get("use_tb_logger")
    if tensorboard and find_spec("tensorboard") is None:
        yield (
            "logger:use_tb_logger: TensorBoard is not installed; "
            "pip install tensorboard, or write false"
        )
    if subject.section("logger:wandb").get("project") is not None:
        if find_spec("wandb") is None:
            yield "logger:wandb:project: wandb is not installed; pip install wandb, or write ~"
        if not tensorboard:
            yield "logger:use_tb_logger: must be true for wandb; write true, or ~ for wandb:project"


CHECKS: tuple[Callable[[Subject], Iterator[str]], ...] = (
    _required_keys,
    _names,
    _phases,
    _numbers,
    _choices,
    _registered_types,
    _losses,
    _network_values,
    _sizes,
    _pictures,
    _paths,
    _weights,
    _loggers,
)


def load(path: Path) -> dict[str, Any]:
    """Read an option file.

    Args:
        path: A YAML file whose top level is a mapping.

    Returns:
        The options as plain dicts, lists and scalars, nothing added.

    Raises:
        OptionsError: If there is no such file (a near name is suggested), it cannot be read, or it
            is no YAML (the message has file, line and column) or no mapping.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = [entry.name for entry in path.parent.glob("*.y*ml")]
        raise OptionsError(f"there is no option file {path}{_near(path.name, others)}") from None
    except OSError as error:
        raise OptionsError(f"the option file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionsError(f"{path} is no option file: it is no UTF-8 text ({error})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise OptionsError(
            f"{place}: this is no YAML: {said}; mend this line or the one above"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: `!!float` before no number
        raise OptionsError(f"{path}: this is no YAML: {error}") from error
    if not isinstance(options, dict):
        found = "nothing" if options is None else f"a {type(options).__name__}"
        raise OptionsError(
            f"{path} holds {found}; an option file has lines such as `name: tiny_x4`; "
            "options/ has complete ones"
        )
    return options


def override(options: dict[str, Any], entries: Sequence[str], parse: Callable[[str], Any]) -> None:
    """Set keys of `options` in place.

    Args:
        options: As `load` returns them. Unchanged if an entry is wrong.
        entries: Texts "a:b=value": the path of a key that exists, then its new value.
        parse: Makes the value of the text behind the first "=".

    Raises:
        OptionsError: Lists every entry that is no assignment or whose key does not exist.
    """
    problems = []
    changes: list[tuple[dict[str, Any], str, Any]] = []
    for entry in entries:
        path, assigned, text = (part.strip() for part in entry.partition("="))
        if not (path and assigned):
            problems.append(f"{entry!r}: write KEY=VALUE, for example train:total_iter=1000")
            continue
        node: Any = options
        *parents, last = path.split(":")
        for depth, key in enumerate([*parents, last]):
            if not isinstance(node, dict) or key not in node:
                above = ":".join(parents[:depth]) or "the option file"
                known = node if isinstance(node, dict) else ()
                hint = _near(key, known) or "; add the key to the option file first"
                problems.append(f"{entry!r}: {above} has no key {key!r}{hint}")
                break
            if depth < len(parents):
                node = node[key]
        else:
            changes.append((node, last, parse(text)))
    if problems:
        raise OptionsError("\n  ".join(["these options cannot be overridden:", *problems]))
    for node, key, value in changes:
        node[key] = value


def check(
    options: Mapping[str, Any],
    *,
    train: bool,
    root: Path,
    registered: Mapping[str, Collection[str]] | None,
) -> None:
    """Refuse options that BasicSR could not run as they are meant; nothing is read into memory.

    Args:
        options: As `load` returns them.
        train: Whether they are to train, else to test.
        root: The folder that relative paths start from.
        registered: The names in each of BasicSR's registries, under "arch", "model", "dataset",
            "metric" and "loss"; a registry that is absent, or None for all, is not checked.

    Raises:
        OptionsError: Lists every problem, one a line: the key's path, what is wrong, the fix.
    """
    subject = Subject(options, train, root, registered)
    problems = [problem for find in CHECKS for problem in find(subject)]
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise OptionsError("\n  ".join([f"the options have {count}:", *problems]))
