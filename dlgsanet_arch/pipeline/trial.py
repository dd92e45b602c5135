"""A run tried before anything of it is created: one sample, one step, each metric once.

Whatever is raised is one message that names the option and the fix. The model and the generators
stay as they were.
"""

import copy
import linecache
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dlgsanet_arch.averaging import bare, networks_of
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import evaluation
from dlgsanet_arch.pipeline.evaluation import Images
from dlgsanet_arch.pipeline.samples import Draw, Sample, Samples, collate, preserved_generators

_CORNER = 64  # LR pixels on either side that the model is tried on

# Which option an attribute of a model comes from.
_OPTION_OF = (
    (r"net_([a-z]+).*", r"network_\1"),
    (r"cri_pix", r"train:pixel_opt"),
    (r"cri_(.+)", r"train:\1_opt"),
    (r"optimizer_(.+)", r"train:optim_\1"),
)


class TrialError(UserError):
    """What a run would fail at in its first iteration or validation."""


def _key_of(section: Mapping[str, Any], kind: object) -> str | None:
    """Return the key of the entry that has this `type`."""
    entries = ((key, each) for key, each in section.items() if isinstance(each, Mapping))
    return next((key for key, each in entries if each.get("type") == kind), None)


def _option_at_fault(error: Exception, options: Mapping[str, Any], model: Any) -> str:
    """Find the option that an error comes from by where it was raised; `model` if it is built."""
    parts = {id(part): name for name, part in vars(model or object).items() if part is not None}
    found = "model_type"

    def option_of(part_name: str) -> str | None:
        matches = ((re.fullmatch(pattern, part_name), option) for pattern, option in _OPTION_OF)
        return next((match.expand(option) for match, option in matches if match), None)

    for frame, line in traceback.walk_tb(error.__traceback__):
        function, variables = frame.f_code.co_name, frame.f_locals
        me = variables.get("self")
        if function == "build_network":
            return _key_of(options, variables.get("network_type")) or "network_g"
        if function == "build_loss":
            return f"train:{_key_of(options['train'], variables.get('loss_type')) or 'pixel_opt'}"
        if function == "setup_optimizers":
            found = "train:optim_d" if getattr(me, "optimizers", ()) else "train:optim_g"
        elif function == "setup_schedulers":
            return "train:scheduler"
        if option := option_of(parts.get(id(me), "")):
            return option
        if me is model:  # as where it unpacks what a loss of another kind returns
            names = re.findall(r"self\.(\w+)", linecache.getline(frame.f_code.co_filename, line))
            found = next(filter(None, map(option_of, names)), found)
    return found


def _fix(error: Exception) -> str:
    """Say what helps: a file by hand where torch.hub could not download it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if {"url", "cached_file"} <= frame.f_locals.keys():
            return "download {url} by hand and put it at {cached_file}".format(**frame.f_locals)
    return "correct it, or the data that it is given"


@contextmanager
def explained(
    doing: str, options: Mapping[str, Any], model: Any = None, option: str = ""
) -> Iterator[None]:
    """Turn what the block raises while `doing` something into a TrialError that names an option.

    That is `option`, or the one found to be at fault with a `model` that is built.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # BasicSR and third parties may raise anything
        fault = option or _option_at_fault(error, options, model)
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise TrialError(
            f"{fault}: {doing} fails ({type(error).__name__}: {said}); {_fix(error)}"
        ) from error


def _copy(model: Any) -> Any:
    """Copy a model, its networks uncompiled and by themselves: no process waits for another."""
    alone = copy.copy(model)
    vars(alone).update({name: bare(network) for name, network in networks_of(model).items()})
    tensors = (
        value
        for network in networks_of(alone).values()
        for module in network.modules()
        for value in vars(module).values()
        if torch.is_tensor(value)
    )  # a weight norm's product has a history, which cannot be copied, and is computed again
    memo = {id(value): value.detach().clone() for value in tensors if not value.is_leaf}
    tried = copy.deepcopy(alone, memo)
    tried.opt["dist"] = False
    return tried


def _good(sample: Sample) -> dict[str, Any]:
    if sample.content is None:
        raise TrialError(f"{sample.bad[-1]}; fix it, see `dlgsanet data verify`")
    return sample.content


def step(model: Any, samples: Samples, draws: Sequence[Draw], options: Mapping[str, Any]) -> None:
    """Take one step of a copy of the model on the first samples that the run will draw."""
    modules = (each for network in networks_of(model).values() for each in network.modules())
    count = 2 if any(isinstance(each, _BatchNorm) for each in modules) else 1  # for its variance
    with preserved_generators():
        with explained("a sample of the training set", options, option="datasets:train"):
            contents = [_good(samples[draw]) for draw in draws[:count]]
            batch, bad = collate([Sample(content) for content in (contents * count)[:count]])
            if batch is None:
                raise TrialError(f"datasets:train: {bad[-1]}")
        with explained("a copy of the model (not needed with --no_trial)", options, model):
            tried = _copy(model)
        with explained("a step on a sample of the training set", options, tried):
            tried.feed_data(batch)
            train = options["train"]
            every, alone = int(train.get("net_d_iters", 1)), int(train.get("net_d_init_iters", 0))
            tried.optimize_parameters(every * (alone // every + 1))  # a GAN trains both networks
        doing = "computing the next learning rate, with the state if the run resumes,"
        with explained(doing, options, option="train:scheduler"):
            done = max((each.last_epoch for each in tried.schedulers), default=0)
            tried.update_learning_rate(done + 2, int(train.get("warmup_iter") or -1))
    if model.device.type == "cuda":
        del tried
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _corner(content: Mapping[str, Any], scale: int) -> dict[str, Any]:
    """Cut the first pixels of an image's LR and HR, as the complete one may take minutes."""
    cut = {name: content[name][..., :_CORNER, :_CORNER] for name in ("lq",) if name in content}
    if "gt" in content:
        cut["gt"] = content["gt"][..., : scale * _CORNER, : scale * _CORNER]
    return {**content, **cut}


def measurements(
    model: Any, images: Images, smallest: tuple[int, int] | None, options: Mapping[str, Any]
) -> None:
    """Run the model on a corner of a validation or test set's first image, and call each metric.

    `smallest` is height and width of the set's smallest HR image, None where they are not known.
    """
    name, scale = images.dataset.opt["name"], options.get("scale", 1)
    with preserved_generators(), explained(f"a sample of {name}", options, option="datasets"):
        content = _good(images.dataset[0])
        lq, gt = content.get("lq"), content.get("gt")
        if lq is None:
            return
        batch, _ = collate([Sample(_corner(content, scale))])
    if not model.foreign:  # else its class validates complete sets
        doing = f"enlarging the first image of {name}"
        with evaluation.undisturbed(model), explained(doing, options, model):
            evaluation.result(model, batch)
    size = smallest or tuple(scale * side for side in lq.shape[-2:])
    output = F.interpolate(lq[None].float(), size=size)
    target = None if gt is None else F.interpolate(gt[None].float(), size=size)
    wanted = (options.get("val") or {}).get("metrics") or {}
    with preserved_generators():
        wanted = evaluation.measurable(wanted, target)
        evaluation.measure(output, target, wanted, f"the smallest image of the data set {name},")
