"""A run tried before anything of it is created: one sample, one step, each metric once.

Whatever is raised is one message that names the option and the fix. Afterwards the model and the
generators are as they were.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dlgsanet_arch.averaging import bare
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import evaluation, randomness
from dlgsanet_arch.pipeline.adapter import networks_of
from dlgsanet_arch.pipeline.images import Images
from dlgsanet_arch.pipeline.samples import Draw, Sample, Samples, collate


class TrialError(UserError):
    """What a run would fail at in its first iteration or validation."""


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield function and variables of each frame of a traceback, the outermost first."""
    while trace is not None:
        yield trace.tb_frame.f_code.co_name, trace.tb_frame.f_locals
        trace = trace.tb_next


def _section_of(section: Mapping[str, Any], kind: object) -> str | None:
    """Return the key of the entry that has this `type`."""
    entries = ((key, each) for key, each in section.items() if isinstance(each, Mapping))
    return next((key for key, each in entries if each.get("type") == kind), None)


def _option_at_fault(error: Exception, options: Mapping[str, Any], model: Any) -> str:
    """Find the option that an error of BasicSR's comes from, by where it was raised.

    Args:
        error: It was raised while a model was built, or took a step.
        options: As given.
        model: The model, None while it is built.
    """
    train = options.get("train") or {}
    parts = {id(value): name for name, value in vars(model).items()} if model is not None else {}
    found = "model_type"
    for function, variables in _frames(error.__traceback__):
        me = variables.get("self")
        if function == "build_network":
            return _section_of(options, variables.get("network_type")) or "network_g"
        if function == "build_loss":
            return f"train:{_section_of(train, variables.get('loss_type')) or 'pixel_opt'}"
        if function == "setup_optimizers":
            found = "train:optim_d" if getattr(me, "optimizers", ()) else "train:optim_g"
        elif function == "setup_schedulers":
            return "train:scheduler"
        name = parts.get(id(me), "") if isinstance(me, nn.Module | torch.optim.Optimizer) else ""
        kind, _, label = name.partition("_")
        if kind == "net":
            return f"network_{label.partition('_')[0]}"
        if kind == "cri":
            return f"train:{'pixel' if label == 'pix' else label}_opt"
        if kind == "optimizer":
            return f"train:optim_{label}"
    return found


@contextmanager
def explained(
    doing: str, options: Mapping[str, Any], model: Any = None, option: str = ""
) -> Iterator[None]:
    """Turn whatever the block raises into one message.

    Args:
        doing: What is tried, such as "a step on a sample of datasets:train".
        options: As given.
        model: The model, where it is built.
        option: The option at fault, where that is known.

    Raises:
        TrialError: Names the option and the fix.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # BasicSR and third parties may raise anything
        fault = option or _option_at_fault(error, options, model)
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise TrialError(
            f"{fault}: {doing} fails ({type(error).__name__}: {said}); correct it, or the data "
            "that it is given"
        ) from error


# ---- put back


class _Kept:
    """What a step changes in a model, and how it is put back."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._attributes = dict(vars(model))
        modules = {
            id(module): module
            for network in vars(model).values()
            if isinstance(network, nn.Module)
            for module in network.modules()
        }.values()
        self._modules = [(vars(module), dict(vars(module))) for module in modules]
        self._dicts = [
            (kept, dict(kept)) for each in modules for kept in (each._parameters, each._buffers)
        ]
        tensors = {id(x): x for _, kept in self._dicts for x in kept.values() if x is not None}
        self._tensors = [
            (tensor, tensor.detach().clone(), tensor.requires_grad) for tensor in tensors.values()
        ]
        self._others = [
            (vars(each), copy.deepcopy(vars(each)))
            for each in vars(model).values()
            if isinstance(each, torch.amp.GradScaler)
        ]
        for optimizer in model.optimizers:
            groups = [(group, dict(group)) for group in optimizer.param_groups]
            self._others += [(vars(optimizer), dict(vars(optimizer))), *groups]
            optimizer.state = defaultdict(dict)  # the step's own; the old one comes back

    def put_back(self) -> None:
        """Make the model what it was."""
        vars(self._model).clear()
        vars(self._model).update(self._attributes)
        for target, content in (*self._modules, *self._dicts, *self._others):
            target.clear()
            target.update(content)
        with torch.no_grad():
            for tensor, content, requires_grad in self._tensors:
                tensor.copy_(content)
                tensor.requires_grad_(requires_grad)
                tensor.grad = None


@contextmanager
def _put_back(model: Any) -> Iterator[None]:
    """Let a block use a model uncompiled and by itself; then put it and all generators back."""
    kept, is_distributed = _Kept(model), model.opt["dist"]
    networks = networks_of(model)
    compiled = any(bare(each)._compiled_call_impl is not None for each in networks.values())
    vars(model).update({name: bare(network) for name, network in networks.items()})
    model.opt["dist"] = False  # no process waits for another: one of them may fail
    try:
        with (
            randomness.preserved(),
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        ):
            yield
    finally:
        model.opt["dist"] = is_distributed
        kept.put_back()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# ---- tried


def _good(sample: Sample) -> dict[str, Any]:
    if sample.content is None:
        raise TrialError(f"{sample.bad[-1]}; fix it, see `dlgsanet data verify`")
    return sample.content


def _iteration(train: Mapping[str, Any]) -> int:
    """Return the number of an iteration in which a GAN trains both networks."""
    every = int(train.get("net_d_iters", 1))
    return every * (int(train.get("net_d_init_iters", 0)) // every + 1)


def step(model: Any, samples: Samples, draws: Sequence[Draw], options: Mapping[str, Any]) -> None:
    """Take one step on a real sample, at the true patch size.

    Args:
        model: As built; it is put back.
        samples: The training set.
        draws: The first samples that the run will draw.
        options: As given.

    Raises:
        TrialError: A sample cannot be read, or the step cannot be taken.
    """
    normed = any(
        isinstance(module, _BatchNorm)
        for network in networks_of(model).values()
        for module in network.modules()
    )
    with _put_back(model):
        with explained("a sample of the training set", options, option="datasets:train"):
            count = 2 if normed else 1  # a batch norm cannot train on one value
            contents = [_good(samples[draw]) for draw in draws[:count]]
            drawn = [Sample(content) for content in (contents * count)[:count]]
            batch, bad = collate(drawn)
            if batch is None:
                raise TrialError(f"datasets:train: {bad[-1]}")
        with explained("a step on a sample of the training set", options, model):
            model.feed_data(batch)
            model.optimize_parameters(_iteration(options["train"]))


def measurements(
    images: Images, smallest: tuple[int, int] | None, options: Mapping[str, Any]
) -> None:
    """Draw one sample of a validation or test set, and call each metric once.

    Args:
        images: The set.
        smallest: Height and width of its smallest HR image, None where they are not known.
        options: As given.

    Raises:
        TrialError: The sample cannot be read, or a metric cannot be called.
    """
    name = images.dataset.opt["name"]
    with randomness.preserved(), explained(f"a sample of {name}", options, option="datasets"):
        content = _good(images.dataset[0])
        lq, gt = content.get("lq"), content.get("gt")
        if lq is None:
            return
        output, target = _pair(lq, gt, options.get("scale", 1), smallest)
        wanted = (options.get("val") or {}).get("metrics") or {}
        possible = {
            key: metric
            for key, metric in wanted.items()
            if target is not None or not evaluation.needs_target(metric)
        }
        evaluation.measure(output, target, possible, f"the smallest image of the data set {name},")


def _pair(
    lq: Tensor, gt: Tensor | None, scale: int, smallest: tuple[int, int] | None
) -> tuple[Tensor, Tensor | None]:
    """Return an output and a ground truth (1, C, H, W) of the smallest size."""
    size = smallest or tuple(scale * side for side in lq.shape[-2:])
    output = F.interpolate(lq[None].float(), size=size)
    return output, None if gt is None else F.interpolate(gt[None].float(), size=size)
