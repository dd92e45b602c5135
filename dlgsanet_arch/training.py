"""DLGSANetModel, a training step with more options than SRModel's, and what serves every model.

`update_average`, `update_learning_rate` and `FiniteLosses` need only what BasicSR's models have, so
that a loop can use them with any of them. Importing this module imports basicsr.models.
"""

import copy
import inspect
import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.hints import suggest_or_list


class TrainingError(UserError):
    """An option of the training step is wrong or cannot work here."""


class NonFiniteError(UserError):
    """A loss became infinite or no number."""


def _bare(network: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(network, (DataParallel, DistributedDataParallel)):
            network = network.module
        elif hasattr(network, "_orig_mod"):
            network = network._orig_mod
        else:
            return network


# Where a module keeps a tensor: the dict that holds it, and its name there.
_Place = tuple[dict[str, Tensor | None], str]


def _places(network: nn.Module) -> dict[str, _Place]:
    """Return where every parameter and every buffer that a checkpoint holds is, by its name."""
    places: dict[str, _Place] = {}
    for prefix, module in network.named_modules():
        saved = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        for kept, names in (
            (module._parameters, list(module._parameters)),
            (module._buffers, saved),
        ):
            for name in names:
                if kept[name] is not None:
                    places[f"{prefix}.{name}" if prefix else name] = (kept, name)
    return places


class _Pairs:
    """The tensors of an averaged network beside those of the trained one.

    Walking through the modules of a large network takes longer than averaging it, so the places
    are found once. The tensors are looked up each time: a parameter may be replaced by another.
    """

    def __init__(self, ema: nn.Module, network: nn.Module) -> None:
        self.network = weakref.ref(network)
        theirs = _places(network)
        self.averaged: list[tuple[_Place, _Place]] = []
        self.copied: dict[torch.dtype, list[tuple[_Place, _Place]]] = {}
        seen = set()  # a tensor that two modules share is averaged once
        for name, place in _places(ema).items():
            kept, key = place
            tensor = kept[key]
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                self.averaged.append((place, theirs[name]))
            else:
                self.copied.setdefault(tensor.dtype, []).append((place, theirs[name]))


_pairs: weakref.WeakKeyDictionary[nn.Module, _Pairs] = weakref.WeakKeyDictionary()


def _tensors(pairs: list[tuple[_Place, _Place]]) -> tuple[list[Tensor], list[Tensor]]:
    ours = [kept[name] for (kept, name), _ in pairs]
    theirs = [kept[name] for _, (kept, name) in pairs]
    return ours, theirs


def _lerp(ours: list[Tensor], theirs: list[Tensor], weight: float) -> None:
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(ours, theirs, weight)
        return
    for our, their in zip(ours, theirs, strict=True):
        our.lerp_(their, weight)


def _copy(ours: list[Tensor], theirs: list[Tensor]) -> None:
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(ours, theirs)
        return
    for our, their in zip(ours, theirs, strict=True):
        our.copy_(their)


@torch.no_grad()
def average(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """Take one step of the exponential moving average of a network's weights, in place.

    Parameters p become decay · p + (1 - decay) · q, with q the network's. Buffers that a checkpoint
    holds are copied, as the running statistics of a BatchNorm are averages already.

    Args:
        ema: The averaged network, of the same modules as `network`; these may not change later.
        network: The trained network; it may be in DataParallel, DistributedDataParallel or
            torch.compile.
        decay: From 0, which copies, to 1, which leaves the parameters as they are.

    Raises:
        KeyError: `network` lacks a tensor that `ema` has.
    """
    ema, network = _bare(ema), _bare(network)
    pairs = _pairs.get(ema)
    if pairs is None or pairs.network() is not network:
        pairs = _pairs[ema] = _Pairs(ema, network)
    if pairs.averaged:
        _lerp(*_tensors(pairs.averaged), 1 - decay)
    for copied in pairs.copied.values():  # tensors of one type are copied together
        _copy(*_tensors(copied))


def update_average(model: Any, decay: float = 0.999) -> None:
    """Stand in for `BaseModel.model_ema` of any model with `net_g` and `net_g_ema`."""
    average(model.net_g_ema, model.net_g, decay)


def _factor(iteration: int, warmup_iter: int) -> float:
    return min(1.0, iteration / warmup_iter) if warmup_iter > 0 else 1.0


def _replayed(scheduler: Any) -> list[float]:
    """Return the rates of the scheduler's present step, found from the initial ones."""
    groups = [
        {"lr": group["initial_lr"], "initial_lr": group["initial_lr"]}
        for group in scheduler.optimizer.param_groups
    ]
    twin = copy.copy(scheduler)
    twin.optimizer = SimpleNamespace(param_groups=groups)
    for step in range(scheduler.last_epoch + 1):
        twin.last_epoch = step
        for group, rate in zip(groups, twin.get_lr(), strict=True):
            group["lr"] = rate
    return [group["lr"] for group in groups]


def _scheduled(scheduler: Any, factor: float) -> list[float]:
    """Return the scheduler's present rates without the warm-up's factor.

    The scheduler keeps them. Only a state that BasicSR's own loop saved during a warm-up holds
    others, as its warm-up feeds back into the schedule.
    """
    rates = scheduler.get_last_lr()
    groups = scheduler.optimizer.param_groups
    if factor < 1 and any(
        not math.isclose(group["lr"], rate * factor)
        for group, rate in zip(groups, rates, strict=True)
    ):
        return _replayed(scheduler)
    return rates


def update_learning_rate(model: Any, current_iter: int, warmup_iter: int = -1) -> None:
    """Set the learning rate of an iteration: schedule(it) · min(1, it / warmup_iter).

    It replaces `BaseModel.update_learning_rate`, whose warm-up leaves MultiStepLR at
    (warmup_iter - 1) / warmup_iter of the rate for good. The state of optimizer and scheduler
    resumes it at any iteration.

    Args:
        model: Any model with `schedulers`; their rates are those of the iteration before.
        current_iter: The iteration about to be trained, from 1.
        warmup_iter: Iterations until the full rate; 0 or less for no warm-up.
    """
    for scheduler in model.schedulers:
        groups = scheduler.optimizer.param_groups
        if current_iter > 1:
            # A schedule may work on the rate of the step before: it must see it as scheduled.
            rates = _scheduled(scheduler, _factor(current_iter - 1, warmup_iter))
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            scheduler.step()
        factor = _factor(current_iter, warmup_iter)
        for group, rate in zip(groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * factor


_KEPT = 1000  # iterations after which losses on a device are fetched at the latest


@dataclass(frozen=True)
class _Batch:
    iteration: int
    samples: tuple[str, ...]
    losses: dict[str, float | Tensor]

    def fetched(self, values: Mapping[str, float]) -> "_Batch":
        return _Batch(self.iteration, self.samples, {**self.losses, **values})

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in self.losses.values())


def _on_device(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and not value.is_cpu


def _readable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON knows no NaN


class FiniteLosses:
    """Watches the losses of a run, and stops it at the first that is infinite or no number.

    Losses on a GPU are kept there until `check`, so that no iteration waits for them; others are
    checked when they come.

    Args:
        folder: The run's folder, for `non_finite_<iteration>.json`.
        gather: With several processes, what returns the objects of all of them, in order, to each.
            Then nothing is raised before `check`, which all processes must call together.
        writes: Whether this process writes the file.
    """

    def __init__(
        self,
        folder: str | Path,
        gather: Callable[[Any], list[Any]] | None = None,
        writes: bool = True,
    ) -> None:
        self._folder = Path(folder)
        self._gather = gather
        self._writes = writes
        self._kept: list[_Batch] = []
        self._first: _Batch | None = None

    def watch(
        self, iteration: int, samples: Sequence[str], losses: Mapping[str, float | Tensor]
    ) -> None:
        """Take in an iteration.

        Args:
            iteration: Its number.
            samples: The names of its samples.
            losses: Its losses by name: numbers, or tensors on one device.

        Raises:
            NonFiniteError: As `check`, where a loss is a number or on the CPU, in a single process.
        """
        values = {
            name: value.detach() if _on_device(value) else float(value)
            for name, value in losses.items()
        }
        self._kept.append(_Batch(iteration, tuple(samples), values))
        if not any(map(_on_device, values.values())) or len(self._kept) >= _KEPT:
            self._fetch()
        if self._gather is None and self._first is not None:
            self.check()

    def check(self) -> None:
        """Look at all losses so far; to be called before anything is printed, saved or validated.

        Raises:
            NonFiniteError: A loss is not finite. Iteration, losses and the names of the samples of
                the first such batch, with several processes of all that met it, are in the file.
        """
        self._fetch()
        batches = [self._first] if self._gather is None else self._gather(self._first)
        batches = [batch for batch in batches if batch is not None]
        if not batches:
            return
        iteration = min(batch.iteration for batch in batches)
        raise self._report([batch for batch in batches if batch.iteration == iteration])

    def _fetch(self) -> None:
        """Bring the losses that are kept to the host, all at once, and look at them."""
        kept, self._kept = self._kept, []
        tensors = [
            value.float().mean()
            for batch in kept
            for value in batch.losses.values()
            if _on_device(value)
        ]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())
        for batch in kept:
            names = [name for name, value in batch.losses.items() if _on_device(value)]
            fetched = batch.fetched({name: next(numbers) for name in names})
            if self._first is None and not fetched.finite:
                self._first = fetched

    def _report(self, batches: list[_Batch]) -> NonFiniteError:
        iteration = batches[0].iteration
        losses = {name: _readable(value) for name, value in batches[0].losses.items()}
        samples = [name for batch in batches for name in batch.samples]
        path = self._folder / f"non_finite_{iteration}.json"
        where = f"the batch's samples are named in {path}"
        if self._writes:
            text = json.dumps(
                {"iteration": iteration, "losses": losses, "samples": samples}, indent=2
            )
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                path.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                where = f"{path} cannot be written ({error}); the batch's samples: {samples}"
        values = ", ".join(f"{name} {value}" for name, value in losses.items())
        return NonFiniteError(
            f"iteration {iteration} gave a value that is not finite ({values}); {where}. Look at "
            "them, lower the learning rate or clip the gradients (train:clip_grad_norm), and "
            "resume from the last checkpoint"
        )


_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Settings:
    """The keys of `train:` that SRModel does not know, checked."""

    amp: torch.dtype | None
    channels_last: bool
    backend: str | None  # of torch.compile
    clip_grad_norm: float | None
    accumulation: int

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "_Settings":
        """Read the whole option file.

        Raises:
            TrainingError: A value is not one of those that its key takes.
        """
        train = options.get("train") or {}

        def value(key: str, valid: Callable[[Any], bool], takes: str) -> Any:
            given = train.get(key)
            if given is None or given is False or valid(given):
                return given
            raise TrainingError(f"train:{key} is {given!r}; it takes {takes}")

        def is_number(given: Any) -> bool:
            return isinstance(given, (int, float)) and not isinstance(given, bool)

        amp = value("amp", lambda v: isinstance(v, str) and v in _AMP, "bf16, fp16 or ~")
        channels_last = value("channels_last", lambda v: v is True, "true or false")
        backend = value(
            "compile",
            lambda v: v is True or (isinstance(v, str) and v),
            "true, false or the name of a backend of torch.compile",
        )
        clip = value("clip_grad_norm", lambda v: is_number(v) and v > 0, "a number above 0, or ~")
        accumulation = value(
            "accumulation",
            lambda v: is_number(v) and isinstance(v, int) and v >= 1,
            "the number of parts of a batch, from 1",
        )
        settings = cls(
            amp=_AMP.get(amp),
            channels_last=bool(channels_last),
            backend="inductor" if backend is True else backend or None,
            clip_grad_norm=clip or None,
            accumulation=int(accumulation or 1),
        )
        # DataParallel's threads do not inherit autocast's type, and its replicas would run the
        # compiled form of the first one.
        if options["num_gpu"] > 1 and not options["dist"] and (amp or backend):
            raise TrainingError(
                "train:amp and train:compile need a process for each GPU: start with `torchrun "
                "--nproc_per_node=N train.py ... --launcher pytorch`, or set num_gpu: 1"
            )
        return settings


def _check_compiler(backend: str, device: torch.device) -> None:
    """Compile one addition: what is missing shows now, with its cause, not within the network."""
    if not hasattr(torch.compiler, "set_stance"):
        raise TrainingError(f"train:compile needs PyTorch 2.6, and this is {torch.__version__}")
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # compilers are many, and so are their errors
        cause = getattr(error, "inner_exception", error)  # what the backend itself raised
        lines = str(cause).strip().splitlines() or [""]
        raise TrainingError(
            f"train:compile: torch.compile does not run here with the backend {backend!r} "
            f"({type(cause).__name__}: {lines[0]}). Its inductor needs a C++ compiler for a CPU "
            f"and Triton for a GPU; backends: {', '.join(torch.compiler.list_backends())}; or "
            "leave train:compile out"
        ) from error


def problems(options: Mapping[str, Any]) -> list[str]:
    """Say what keeps a DLGSANetModel from being trained with these options, before it is built.

    Args:
        options: The whole option file's, `num_gpu` a number and `dist` as BasicSR sets it.

    Returns:
        One line a problem; none for another model, and for a test.
    """
    if options.get("model_type") != "DLGSANetModel" or "train" not in options:
        return []
    try:
        settings = _Settings.read(options)
        if settings.backend:
            device = torch.device("cuda" if options["num_gpu"] else "cpu")
            _check_compiler(settings.backend, device)
    except TrainingError as error:
        return [str(error)]
    return []


def _to_channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out with channels last; shapes and values stay."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    base = torch.optim.Optimizer
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }
    if name not in classes:
        hint = suggest_or_list(name, sorted(classes))
        raise TrainingError(f"torch.optim has no optimizer {name!r}{hint}")
    if (
        inspect.signature(classes[name].step).parameters["closure"].default
        is inspect.Parameter.empty
    ):
        raise TrainingError(f"{name} evaluates the loss several times a step, which no loop does")
    return classes[name]


class DLGSANetModel(SRModel):
    """SRModel for any network, with more options for the training step; docs/training.md has them.

    With all of them off it trains what SRModel trains, bit for bit.

    Attributes:
        scaler: The torch.amp.GradScaler of `amp: fp16`, else None. Its state belongs to a
            resume's; nothing else does that SRModel does not have.
        log_dict: The losses of the last iteration, as tensors on the device, of this process; and
            `grad_norm` where gradients are clipped. All finite, where all is well.

    Raises:
        TrainingError: An option has a wrong value, or cannot work here.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.settings = _Settings.read(opt)
        self.scaler: torch.amp.GradScaler | None = None
        self.log_dict: dict[str, Tensor] = {}
        # Gradients that overflow in float16 are the scaler's business: it passes the step over.
        self._may_overflow: dict[str, Tensor] = {}
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move a network to the device, prepared as the options say before it is wrapped."""
        net = net.to(self.device)
        if self.settings.channels_last:
            _to_channels_last(net)
        if self.settings.backend and self.is_train:
            _check_compiler(self.settings.backend, self.device)
            net.compile(backend=self.settings.backend)  # in place: names in checkpoints stay
        return super().model_to_device(net)

    def init_training_settings(self) -> None:
        """Add to SRModel's the gradients' scaler, and the layout of the averaged network."""
        try:
            self._autocast()
        except RuntimeError as error:
            raise TrainingError(f"train:amp cannot be used on this device: {error}") from error
        if self.settings.amp is torch.float16:
            self.scaler = torch.amp.GradScaler(self.device.type)
        super().init_training_settings()
        if self.settings.channels_last and self.ema_decay > 0:
            _to_channels_last(self.net_g_ema)
        self._check_losses()

    def _check_losses(self) -> None:
        # The norm of a whole batch's difference is not a sum over its samples.
        frobenius = getattr(self.cri_perceptual, "criterion_type", None) == "fro"
        if self.settings.accumulation > 1 and frobenius:
            raise TrainingError(
                "train:perceptual_opt:criterion: fro cannot be computed from parts of a batch; "
                "use l1, or leave train:accumulation out"
            )

    def get_optimizer(
        self, optim_type: str, params: Sequence[nn.Parameter], lr: float, **arguments: Any
    ) -> torch.optim.Optimizer:
        """Build the optimizer of torch.optim that has this name, with the option file's arguments.

        Raises:
            TrainingError: There is none, or it does not take the arguments.
        """
        optimizer = _optimizer_class(optim_type)
        try:
            return optimizer(params, lr=lr, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{optim_type} does not take these arguments: {error}") from error

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Set the learning rate of an iteration, as the module's function of this name."""
        update_learning_rate(self, current_iter, warmup_iter)

    def model_ema(self, decay: float = 0.999) -> None:
        """Take one step of the weights' average, buffers included."""
        update_average(self, decay)

    def feed_data(self, data: Mapping[str, Any]) -> None:
        """Move a batch to the device; from pinned memory nothing waits for it.

        Args:
            data: `lq` (B, C, H, W) and, except where there is none, `gt`.
        """
        layout = torch.channels_last if self.settings.channels_last else torch.preserve_format
        moved = {
            key: data[key].to(self.device, non_blocking=True, memory_format=layout)
            for key in ("lq", "gt")
            if key in data
        }
        super().feed_data(moved)

    def optimize_parameters(self, current_iter: int) -> None:
        """Train one iteration on the batch of `feed_data`; `output` is the whole batch's."""
        self.optimizer_g.zero_grad()
        count = min(self.settings.accumulation, len(self.lq))
        parts = zip(self.lq.tensor_split(count), self.gt.tensor_split(count), strict=True)
        outputs, logs = [], []
        for index, (lq, gt) in enumerate(parts, 1):
            with self._gradients_shared(index == count):
                output = self._forward(lq)
                losses = self._losses(output, gt, len(lq) / len(self.lq))
                self._backward(sum(losses.values()))
            outputs.append(output.detach())
            logs.append({name: loss.detach() for name, loss in losses.items()})
        self.output = outputs[0] if count == 1 else torch.cat(outputs)
        self.log_dict = {name: sum(log[name] for log in logs) for name in logs[0]}
        self._step()
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.settings.amp)

    def _gradients_shared(self, last: bool) -> AbstractContextManager[object]:
        """Have gradients averaged over the processes in the last part of a batch alone."""
        if last or not isinstance(self.net_g, DistributedDataParallel):
            return nullcontext()
        return self.net_g.no_sync()

    def _forward(self, lq: Tensor) -> Tensor:
        with self._autocast():
            output = self.net_g(lq)
        return output if self.settings.amp is None else output.float()

    def _losses(self, output: Tensor, gt: Tensor, share: float) -> dict[str, Tensor]:
        """Return a part's losses by name, such that those of all parts add up to the batch's."""
        losses = {}
        if self.cri_pix:
            # A sum over pixels adds up as it is, a mean by the part's share of the batch.
            weight = 1 if getattr(self.cri_pix, "reduction", "mean") == "sum" else share
            losses["l_pix"] = self.cri_pix(output, gt) * weight
        if self.cri_perceptual:
            for name, loss in zip(
                ("l_percep", "l_style"), self.cri_perceptual(output, gt), strict=True
            ):
                if loss is not None:
                    losses[name] = loss * share
        return losses

    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _step(self) -> None:
        scaler, optimizer = self.scaler, self.optimizer_g
        if self.settings.clip_grad_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad_norm)
            log = self.log_dict if scaler is None else self._may_overflow
            log["grad_norm"] = norm.detach()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def get_current_log(self) -> dict[str, float]:
        """Return the last iteration's losses, the mean over all processes; all must call it."""
        values = {**self.log_dict, **self._may_overflow}
        if not values:
            return {}
        numbers = torch.stack([value.float() for value in values.values()])
        if self.opt["dist"]:
            torch.distributed.all_reduce(numbers)
            numbers /= self.opt["world_size"]
        return dict(zip(values, numbers.tolist(), strict=True))

    def test(self) -> None:
        """Compute `output` of `lq` as testing does: in full precision, and without compiling."""
        compiled = self.settings.backend is not None
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            super().test()
