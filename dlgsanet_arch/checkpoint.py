"""Weights in and out: which key of a file holds them, which configuration they are, complete files.

`read_weights` and `check_compatible` serve the pipeline, whose files are BasicSR's; what follows
`read_checkpoint` serves whoever has a file of weights, `.pth` or `.safetensors`, and no options.
"""

import errno
import inspect
import json
import math
import re
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import written_atomically
from dlgsanet_arch.hints import named
from dlgsanet_arch.network import DLGSANet

_TRAINED_KEYS = ("params_ema", "params")  # where BasicSR keeps weights; the averaged ones first
_PARALLEL_PREFIX = "module."  # put before names by DataParallel and DistributedDataParallel
_ZIP_MAGIC = b"PK\x03\x04"  # what torch.save writes is a zip file
_ARCHITECTURE = "DLGSANet"  # as it stands beside the configuration
_BESIDE = ("architecture", "config", "iteration", "format")  # the last is safetensors' own

# Network file systems fail for a moment now and then.
_ATTEMPTS = 3
_SECONDS_BETWEEN = 1.0

_DEEP = "deep_feature_extraction"
_TLC_KERNELS = {2: 96, 3: 72, 4: 48}  # published, by scale

# What the three published networks share, and their (dim, groups, blocks).
_PUBLISHED = {
    "in_chans": 3,
    "buildblock_type": "sparseedge",
    "window_size": 7,
    "idynamic_num_heads": 6,
    "idynamic_ffn_type": "GDFN",
    "idynamic_ffn_expansion_factor": 2.0,
    "idynamic": True,
    "restormer_num_heads": 6,
    "restormer_ffn_type": "GDFN",
    "restormer_ffn_expansion_factor": 2.0,
    "upsampler": "pixelshuffledirect",
    "body_norm": False,
}
_VARIANTS = {(48, 3, 3): "Tiny", (48, 4, 3): "Light", (90, 6, 4): "Large"}

_LOCAL_ARGUMENTS = frozenset(name for name in _PUBLISHED if name.startswith("idynamic"))
_LOCAL_ARGUMENTS |= {"window_size"}
_GLOBAL_ARGUMENTS = frozenset(name for name in _PUBLISHED if name.startswith("restormer"))


class CheckpointError(UserError):
    """A file of weights that cannot be used; the message says why and what would help."""


def check_complete(path: Path) -> int:
    """Read all of a file of torch.save's and compare it with the checksums that it holds.

    Returns:
        A checksum of its content, by which two files can be told apart; 0 for a file in PyTorch's
        old format, which has no checksums and is loaded instead.

    Raises:
        CheckpointError: It is missing, truncated or damaged.
    """
    if not zipfile.is_zipfile(path):
        _load(path)
        return 0
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            records = [(entry.filename, entry.CRC) for entry in archive.infolist()]
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); get it again, or use an earlier checkpoint"
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged at its record {damaged}; get it again, or use an earlier checkpoint"
        )
    return zlib.crc32(repr(records).encode())


def save_whole(content: Any, path: Path) -> int:
    """Save as torch.save does, so that after a crash the file is the old one or the new one.

    The file is written beside, flushed to the disk, read again and checked before it takes its
    name.

    Returns:
        The checksum that `check_complete` returns for it.

    Raises:
        CheckpointError: It cannot be written; the old file is as it was.
    """
    checksums: list[int] = []
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with written_atomically(
                path, lambda beside: checksums.append(check_complete(beside))
            ) as file:
                torch.save(content, file)
            return checksums[-1]
        except (OSError, RuntimeError, CheckpointError) as error:
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            is_full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if is_full or attempt == _ATTEMPTS:
                reason = "the disk is full" if is_full else f"{type(cause).__name__}: {cause}"
                raise CheckpointError(
                    f"{path} cannot be written ({reason}); what was there before is untouched; "
                    "free space or fix the cause; a training run then resumes with --auto_resume"
                ) from error
            time.sleep(_SECONDS_BETWEEN)
    raise AssertionError("the last attempt returns or raises")


def _load(path: Path) -> Any:
    """Unpickle a checkpoint on the CPU without running code that it may hold."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(f"the weights {path} cannot be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} is empty: writing it was cut off; use an earlier checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has a dozen ways to fail on bytes that are not its own
        text = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)", text)
        if refused:
            raise CheckpointError(
                f"{path} holds a Python object ({refused[1]}) beside tensors; such files can run "
                "code when loaded and are refused; save the state dict alone and use that file"
            ) from error
        if "TorchScript" in text:
            raise CheckpointError(
                f"{path} is a TorchScript program, no checkpoint; use the .pth it was made from"
            ) from error
        if start == _ZIP_MAGIC or isinstance(error, EOFError) or "EOF" in text:
            raise CheckpointError(
                f"{path} is truncated or damaged; get it again, or use an earlier checkpoint"
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint of PyTorch's; weights are files such as "
            "experiments/<name>/models/net_g_latest.pth"
        ) from error


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(key, str) for key in content)
        and all(isinstance(value, Tensor) for value in content.values())
    )


def _contents(content: Mapping[Any, Any]) -> str:
    """Describe a checkpoint's top level in a few words."""
    keys = [str(key) for key in content]
    return f"it has the keys {named(keys, 6)}" if keys else "it has no keys"


def read_weights(path: Path, param_key: str | None = None) -> dict[str, Tensor]:
    """Read a network's state dict from a checkpoint file.

    Args:
        path: A file of torch.save: a dict with state dicts under `params_ema` or `params`, as
            BasicSR writes it, or a bare state dict.
        param_key: The key that holds the weights. None takes `params_ema`, else `params`, else
            the file as a bare state dict.

    Returns:
        The state dict, its tensors on the CPU, its names without a leading "module.".

    Raises:
        CheckpointError: If the file cannot be read, is truncated or no checkpoint, holds objects
            other than tensors, or has no weights under `param_key` (the keys there are listed).
    """
    return _weights_in(_load(path), path, param_key)


def _weights_in(content: Any, path: Path, param_key: str | None) -> dict[str, Tensor]:
    """Find the state dict in what a file holds; see `read_weights`."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, no network's weights (a state dict)"
        )
    if param_key is None:
        param_key = next((key for key in _TRAINED_KEYS if key in content), None)
    elif param_key not in content:
        if _is_state_dict(content):
            raise CheckpointError(
                f"{path} has no {param_key!r}: it is a bare state dict; write `param_key_g: ~`"
            )
        raise CheckpointError(f"{path} has no {param_key!r}: {_contents(content)}")
    weights = content if param_key is None else content[param_key]
    if not _is_state_dict(weights):
        where = f"{path} has no weights" + (f" under {param_key!r}" if param_key else "")
        if "optimizers" in content:
            raise CheckpointError(
                f"{where}: it is a training state; the weights are beside it in models/"
            )
        raise CheckpointError(f"{where}: {_contents(content)}")
    return {name.removeprefix(_PARALLEL_PREFIX): tensor for name, tensor in weights.items()}


class _Shapes:
    """Sizes of a state dict's tensors; a tensor that must be there and is not is an error."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._sizes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def size(self, name: str, axis: int) -> int:
        """Return one size of the tensor `name`."""
        sizes = self._sizes.get(name)
        if sizes is None or len(sizes) <= axis:
            found = "is absent" if sizes is None else f"has the shape {sizes}"
            raise CheckpointError(f"these are not weights of a DLGSANet: {name} {found}")
        return sizes[axis]

    def count(self, prefix: str) -> int:
        """Count the different entries that follow `prefix` in the names."""
        names = (name for name in self._sizes if name.startswith(prefix))
        return len({name.removeprefix(prefix).split(".")[0] for name in names})


def _root(number: int) -> int:
    """Return the side of a square of `number` things."""
    side = math.isqrt(number)
    if side * side != number:
        raise CheckpointError(
            f"these are not weights of a DLGSANet: {number} is not a square number"
        )
    return side


def _expansion(dim: int, hidden: int) -> float:
    """Return a factor with int(dim * factor) == hidden; the simplest, hidden / dim, may round."""
    factor = hidden / dim
    return factor if int(dim * factor) == hidden else (hidden + 0.5) / dim


def _feed_forward(shapes: _Shapes, dim: int, layer: str, kind: str) -> dict[str, Any]:
    """Read the type and the expansion of the feed-forward network at `layer`."""
    if f"{layer}.body.0.weight" in shapes:
        name, hidden = "BaseFFN", shapes.size(f"{layer}.body.0.weight", 0)
    else:
        name, hidden = "GDFN", shapes.size(f"{layer}.project_out.weight", 1)
    return {
        f"{kind}_ffn_type": name,
        f"{kind}_ffn_expansion_factor": _expansion(dim, hidden),
    }


def _local_layer(shapes: _Shapes, dim: int, layer: str) -> dict[str, Any]:
    """Read the arguments of a layer with MHDLSA."""
    mixer = f"{layer}.IDynamicDWConv.conv"
    dynamic = f"{mixer}.conv2.0.weight" in shapes
    if dynamic:
        window = shapes.size(f"{mixer}.conv1.1.weight", 3)
        filters = shapes.size(f"{mixer}.conv2.0.weight", 0) // window**2
        if not filters:
            raise CheckpointError(f"these are not weights of a DLGSANet: {mixer} makes no filters")
        shared = dim // filters
    else:
        window = shapes.size(f"{mixer}.weight", 3)
        shared = math.gcd(dim, 6)  # not in the weights; it must divide dim, and is 6 as published
    return {
        "window_size": window,
        "idynamic_num_heads": shared,
        "idynamic": dynamic,
        **_feed_forward(shapes, dim, f"{layer}.IDynamic_ffn", "idynamic"),
    }


def _global_layer(shapes: _Shapes, dim: int, layer: str) -> dict[str, Any]:
    """Read the arguments of a layer with global attention."""
    return {
        "restormer_num_heads": shapes.size(f"{layer}.restormer_attn.temperature", 0),
        **_feed_forward(shapes, dim, f"{layer}.restormer_ffn", "restormer"),
    }


def _reconstruction(shapes: _Shapes, in_chans: int) -> dict[str, Any]:
    """Read the upsampler and its scale; without one, `upscale` is 1."""
    if "conv_before_upsample.0.weight" in shapes:
        rows, columns = (shapes.size("upsample.0.weight", axis) for axis in (0, 1))
        stages = shapes.count("upsample.")  # pixel shuffles have no weights
        return {"upsampler": "pixelshuffle", "upscale": _root(rows // columns) ** stages}
    if "upsample.0.weight" in shapes:
        upscale = _root(shapes.size("upsample.0.weight", 0) // in_chans)
        return {"upsampler": "pixelshuffledirect", "upscale": upscale}
    return {"upsampler": "", "upscale": 1}


def infer_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tell the arguments of DLGSANet from its weights.

    What is not in the weights is as published: `activation` relu, `img_range` 1, `tlc_flag` true,
    `tlc_kernel` 96, 72 or 48 by scale (48 for other scales), and of "sparseedge" and "edge", which
    have equal names and sizes, "sparseedge". So are arguments of layers that the network lacks.

    Args:
        state_dict: As `read_weights` returns it.

    Returns:
        The arguments, all but `input_resolution`: DLGSANet(**arguments) takes the weights.

    Raises:
        CheckpointError: If the weights are not of a DLGSANet; the message says by which tensor.
    """
    shapes = _Shapes(state_dict)
    dim, in_chans = (shapes.size("overlap_embed.0.proj.weight", axis) for axis in (0, 1))
    body_norm = f"{_DEEP}.0.body.weight" in shapes
    first_group = f"{_DEEP}.{int(body_norm)}.body."
    groups = shapes.count(f"{_DEEP}.") - 1 - 2 * body_norm
    has_local = f"{first_group}0.IDynamicDWConv.conv0.weight" in shapes
    first_global = f"{first_group}{int(has_local)}"
    has_global = f"{first_global}.restormer_attn.temperature" in shapes
    if not (has_local or has_global):
        raise CheckpointError(f"these are not weights of a DLGSANet: no layer at {first_group}0")
    config = {
        **_PUBLISHED,
        "in_chans": in_chans,
        "dim": dim,
        "groups": groups,
        "blocks": (shapes.count(first_group) - 1) // (has_local + has_global),
        "body_norm": body_norm,
        "tlc_flag": True,
        "activation": "relu",
        "img_range": 1.0,
    }
    if has_local:
        config |= _local_layer(shapes, dim, f"{first_group}0")
    if has_global:
        config |= _global_layer(shapes, dim, first_global)
    if not (has_local and has_global):
        config["buildblock_type"] = "idynamic" if has_local else "restormer"
    config |= _reconstruction(shapes, in_chans)
    config["tlc_kernel"] = _TLC_KERNELS.get(config["upscale"], 48)
    return config


def _told_by_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the arguments that a state dict's names and sizes depend on, in one form for each."""
    dim = config["dim"]
    told = {name: config[name] for name in (*_PUBLISHED, "dim", "groups", "blocks", "upscale")}
    for name in ("idynamic_ffn_expansion_factor", "restormer_ffn_expansion_factor"):
        told[name] = int(dim * told[name]) / dim
    if not told["idynamic"]:
        del told["idynamic_num_heads"]
    if not told["upsampler"]:
        told["upscale"] = 1
    absent = {"idynamic": _GLOBAL_ARGUMENTS, "restormer": _LOCAL_ARGUMENTS}
    for name in absent.get(told["buildblock_type"], ()):
        told.pop(name, None)
    return told


def _differing(told: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the arguments by which weights differ from what is wanted."""
    names = [name for name in wanted if name in told and told[name] != wanted[name]]
    if {told["buildblock_type"], wanted["buildblock_type"]} == {"sparseedge", "edge"}:
        names.remove("buildblock_type")  # equal names and sizes
    return names


def _name(told: Mapping[str, Any]) -> str:
    """Return "DLGSANet", with the variant and scale where it is a published one."""
    variant = _VARIANTS.get((told["dim"], told["groups"], told["blocks"]))
    if variant and all(told.get(name) == value for name, value in _PUBLISHED.items()):
        return f"DLGSANet {variant} x{told['upscale']}"
    return "DLGSANet"


def _with(told: Mapping[str, Any], names: list[str]) -> str:
    """Name a network, with some of its arguments as an option file has them."""
    values = (told[name] for name in names)
    texts = (f"{value:.4g}" if isinstance(value, float) else json.dumps(value) for value in values)
    arguments = ", ".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))
    return f"{_name(told)} ({arguments})"


def check_compatible(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse weights that a DLGSANet of `config` does not take with strict=True.

    Args:
        state_dict: As `read_weights` returns it.
        config: Valid arguments of DLGSANet, as an option file's `network_g` has them; an entry
            `type` is passed over.

    Raises:
        CheckpointError: If the weights are of another configuration: the message names both (the
            published variant where it is one) by the arguments that differ. Or if they are of no
            DLGSANet, or of none that this package can build.
    """
    parameters = inspect.signature(DLGSANet).parameters
    asked = {name: entry.default for name, entry in parameters.items()}
    asked |= {name: value for name, value in config.items() if name != "type"}
    with torch.device("meta"):
        network = DLGSANet(**asked)
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state_dict.items()}
    if expected == found:
        return
    told, wanted = _told_by_weights(infer_config(state_dict)), _told_by_weights(asked)
    differing = _differing(told, wanted)
    if differing:
        raise CheckpointError(
            f"the weights are of another configuration: they are {_with(told, differing)}; "
            f"asked for is {_with(wanted, differing)}"
        )
    names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    raise CheckpointError(
        f"the weights do not fit {_name(wanted)}; absent, unknown or of another size: "
        f"{named(names, 3)}"
    )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network's weights and what is known about them.

    Args:
        weights: The state dict, its tensors on the CPU.
        config: Arguments of DLGSANet, which then takes the weights with strict=True.
        is_told: Whether the configuration was in the file. Otherwise it comes from the weights,
            and what these do not tell is as published; see `infer_config`.
        iteration: How many iterations it was trained for; None where that is not known.
        notes: What else the file says, such as its licence and what it was trained on.
    """

    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    is_told: bool = False
    iteration: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def scale(self) -> int:
        """How many times larger the sides become."""
        return self.config["upscale"] if self.config["upsampler"] else 1

    @property
    def name(self) -> str:
        """The published variant and scale where it is one, such as "DLGSANet Tiny x4"."""
        return _name(_told_by_weights(self.config))

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def network(self) -> DLGSANet:
        """Build the network with these weights, on the CPU in eval mode."""
        network = DLGSANet(**self.config)
        network.load_state_dict(self.weights, strict=True)
        return network.eval()


def _complete(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Complete a configuration by the weights, and hold it against them.

    Raises:
        CheckpointError: It has unknown or impossible arguments, or is of another network.
    """
    parameters = inspect.signature(DLGSANet).parameters
    unknown = [name for name in config if name not in parameters]
    if unknown:
        raise CheckpointError(
            f"DLGSANet has no argument {unknown[0]!r}, which the configuration of {path} names; "
            f"there are: {', '.join(parameters)}"
        )
    try:
        complete = {**infer_config(weights), **config}
        check_compatible(weights, complete)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration of {path} makes no DLGSANet: {error}") from error
    return complete


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            "files of .safetensors need a package that is not there: pip install safetensors"
        ) from error
    return safetensors


def _is_safetensors(path: Path) -> bool:
    """Tell the format by the content: the length of a JSON object, and the object."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False  # whoever reads the file says why it cannot be read
    return start[8:] == b"{" or path.suffix == ".safetensors"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata."""
    package = _safetensors()
    try:
        with package.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except OSError as error:
        raise CheckpointError(
            f"the weights {path} cannot be read: {error.strerror or error}"
        ) from error
    except package.SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no .safetensors file ({error}); get it again"
        ) from error
    return tensors, metadata


def _config_in(stated: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Take the configuration from what stands beside the weights; others' files have none."""
    if stated.get("architecture") != _ARCHITECTURE:
        return {}
    config = stated.get("config")
    try:
        config = json.loads(config) if isinstance(config, str) else config
    except ValueError as error:
        raise CheckpointError(f"the configuration in {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"the configuration in {path} is not an object of names and values")
    return config


def _iteration(path: Path, stated: object) -> int | None:
    """Take the iteration from what the file states, else from its name, net_g_5000.pth."""
    if isinstance(stated, int | str) and re.fullmatch("[0-9]+", str(stated)):
        return int(stated)
    named = re.fullmatch(r"net_\w+?_([0-9]+)", path.stem)
    return int(named[1]) if named else None


def _notes(beside: Mapping[Any, Any]) -> dict[str, str]:
    """Take the sentences that stand beside the weights, and leave what has a place of its own."""
    return {
        name: text
        for name, text in beside.items()
        if isinstance(name, str) and isinstance(text, str) and name not in _BESIDE
    }


def read_checkpoint(
    path: Path | str, param_key: str | None = None, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Read weights of a DLGSANet from any file, and tell which network they are of.

    Args:
        path: A `.pth` file as `read_weights` takes it, or a `.safetensors` file; the content
            decides which. Code in it is never run.
        param_key: As in `read_weights`; of no meaning for `.safetensors`.
        config: Arguments of DLGSANet that are known better than the file tells them.

    Raises:
        CheckpointError: The file cannot be read or holds no DLGSANet, or the configuration in it
            or in `config` is not that of its weights.
    """
    path = Path(path)
    if _is_safetensors(path):
        tensors, beside = _read_safetensors(path)
        weights = {name.removeprefix(_PARALLEL_PREFIX): each for name, each in tensors.items()}
    else:
        beside = _load(path)
        weights = _weights_in(beside, path, param_key)
    told = _config_in(beside, path)
    complete = _complete(weights, {**told, **(config or {})}, path)
    iteration = _iteration(path, beside.get("iteration"))
    return Checkpoint(weights, complete, bool(told), iteration, _notes(beside))


def save_checkpoint(checkpoint: Checkpoint, path: Path | str) -> None:
    """Write weights with their configuration: after a crash the file is the old or the new one.

    Args:
        checkpoint: What to write.
        path: `.pth` is written as BasicSR reads it, the weights under `params` and `params_ema`,
            once in the file; `.safetensors` has the configuration and the notes as metadata.

    Raises:
        CheckpointError: The suffix is another one, or the file cannot be written.
    """
    path = Path(path)
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    known = {"architecture": _ARCHITECTURE, "config": json.dumps(dict(checkpoint.config))}
    beside = {**checkpoint.notes, **known}
    if checkpoint.iteration is not None:
        beside["iteration"] = str(checkpoint.iteration)
    if path.suffix == ".pth":
        save_whole({"params": weights, "params_ema": weights, **beside}, path)
    elif path.suffix == ".safetensors":
        data = _safetensors().torch.save(weights, {"format": "pt", **beside})
        try:
            with written_atomically(path) as file:
                file.write(data)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}; what was there before is "
                "untouched"
            ) from error
    else:
        raise CheckpointError(f"{path} is to be written: its suffix must be .pth or .safetensors")


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return the mean of several checkpoints' weights; the iteration is the last of theirs.

    Raises:
        CheckpointError: There is none, or they are of different configurations.
    """
    if not checkpoints:
        raise CheckpointError("there are no checkpoints to average")
    first = checkpoints[0]
    for other in checkpoints[1:]:
        names = [name for name in first.config if first.config[name] != other.config[name]]
        if names:
            raise CheckpointError(
                "only checkpoints of one configuration have a mean: the first is "
                f"{_with(first.config, names)}, another is {_with(other.config, names)}"
            )
    weights = {}
    for name, tensor in first.weights.items():
        total = sum(each.weights[name].double() for each in checkpoints)
        weights[name] = (total / len(checkpoints)).to(tensor.dtype)
    known = [each.iteration for each in checkpoints if each.iteration is not None]
    return replace(first, weights=weights, iteration=max(known, default=None))


def transfer(checkpoint: Checkpoint, scale: int, seed: int = 0) -> Checkpoint:
    """Make a start for another scale: all weights but those of the upsampler, which start anew.

    Args:
        checkpoint: Trained weights, usually of x2.
        scale: The scale to be trained for.
        seed: For the new weights, drawn as a new network's are.

    Raises:
        CheckpointError: The network has no upsampler, or it cannot make this scale.
    """
    if not checkpoint.config["upsampler"]:
        raise CheckpointError("these weights have no upsampler: they keep the size of an image")
    kernel = _TLC_KERNELS.get(scale, checkpoint.config["tlc_kernel"])
    config = {**checkpoint.config, "upscale": scale, "tlc_kernel": kernel}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            weights = DLGSANet(**config).state_dict()
        except ValueError as error:
            raise CheckpointError(f"there is no such network: {error}") from error
    kept = {
        name: tensor
        for name, tensor in checkpoint.weights.items()
        if not name.startswith("upsample.")
    }
    return Checkpoint({**weights, **kept}, config, checkpoint.is_told)


def published_configs() -> dict[str, dict[str, Any]]:
    """Return the nine published configurations by name, such as "DLGSANet Tiny x4"."""
    return {
        f"DLGSANet {variant} x{scale}": {
            **_PUBLISHED,
            **{"dim": dim, "groups": groups, "blocks": blocks},
            **{"upscale": scale, "tlc_kernel": kernel, "tlc_flag": True},
            **{"activation": "relu", "img_range": 1},
        }
        for (dim, groups, blocks), variant in _VARIANTS.items()
        for scale, kernel in _TLC_KERNELS.items()
    }


def nearest_published(config: Mapping[str, Any]) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """Find the published network that a configuration is most like.

    Returns:
        Its name, and the arguments that differ: by name the configuration's value, and its own.
    """
    found = []
    for variant, published in published_configs().items():
        differing = {
            name: (config[name], value)
            for name, value in published.items()
            if config[name] != value
        }
        apart = sum(abs(config[name] - published[name]) for name in ("dim", "groups", "blocks"))
        found.append((len(differing), apart, variant, differing))
    return min(found, key=lambda each: each[:2])[2:]
