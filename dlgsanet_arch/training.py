"""DLGSANetModel, a training step with more options than SRModel's.

Importing this module imports basicsr.models.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dlgsanet_arch.averaging import AveragesWeights, FollowsSchedule
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.graphs import Graphs
from dlgsanet_arch.hints import suggest_or_list
from dlgsanet_arch.options import schema
from dlgsanet_arch.options.context import optimizers


class TrainingError(UserError):
    """An option of the training step is wrong or cannot work here."""


_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Modes of torch.compile that replay CUDA graphs.
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def _check(options: Mapping[str, Any]) -> None:
    """Raise a TrainingError for a value of `train:` that its key cannot have, or not here."""
    train = options.get("train") or {}
    for key in schema.KEYS:
        given = train.get(key.path.removeprefix("train:"))
        if key.by == schema.OURS and given is not None and (fault := key.kind(given)):
            raise TrainingError(f"{key.path}: {fault}")
    # DataParallel's threads do not inherit autocast's type, and its replicas would run the
    # compiled form of the first one.
    parallel = options["num_gpu"] > 1 and not options["dist"]
    if parallel and (train.get("amp") or train.get("compile")):
        raise TrainingError(
            "train:amp and train:compile need a process for each GPU: start with `torchrun "
            "--nproc_per_node=N train.py ... --launcher pytorch`, or set num_gpu: 1"
        )
    if (mode := train.get("compile")) in _GRAPH_MODES:
        _check_graphs(mode, options)


def _check_graphs(mode: str, options: Mapping[str, Any]) -> None:
    """Raise a TrainingError where the step cannot be replayed from CUDA graphs."""
    train, fix = options["train"], "; write `compile: true`, which uses no CUDA graphs"
    if not options["num_gpu"] or not torch.cuda.is_available():
        raise TrainingError(f"train:compile: {mode} replays CUDA graphs and needs a GPU{fix}")
    if (train.get("accumulation") or 1) > 1:  # gradients of a part stay in the graph's memory
        raise TrainingError(f"train:compile: {mode} does not work with train:accumulation{fix}")
    if options.get("find_unused_parameters"):
        raise TrainingError(f"train:compile: {mode} needs find_unused_parameters: false{fix}")


def _check_compiler(arguments: Mapping[str, Any], device: torch.device) -> None:
    """Compile one addition: what is missing shows now, with its cause, not within the network."""
    if not hasattr(torch.compiler, "set_stance"):
        raise TrainingError(f"train:compile needs PyTorch 2.6, and this is {torch.__version__}")
    try:
        torch.compile(lambda x: x + 1, **arguments)(torch.ones(2, device=device))
    except Exception as error:  # compilers are many, and so are their errors
        kind, name = next(iter(arguments.items()))
        cause = getattr(error, "inner_exception", error)  # what the backend itself raised
        raise TrainingError(
            f"train:compile: torch.compile does not run here with the {kind} {name!r} "
            f"({type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}). Its inductor "
            "needs a C++ compiler for a CPU and Triton for a GPU; backends: "
            f"{', '.join(torch.compiler.list_backends())}; modes with CUDA graphs: "
            f"{', '.join(_GRAPH_MODES)}; or leave train:compile out"
        ) from error


def _to_channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out with channels last; shapes and values stay."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


class DLGSANetModel(AveragesWeights, FollowsSchedule, SRModel):
    """SRModel for any network, with more options for the training step; docs/training.md has them.

    With all of them off it trains what SRModel trains, bit for bit. An option with a wrong value,
    or that cannot work here, is a TrainingError.

    Attributes:
        scaler: A torch.amp.GradScaler, enabled by `amp: fp16`; a resume then needs its state.
        log_dict: The losses of the last iteration, as tensors on the device, of this process; and
            `grad_norm` where gradients are clipped. All finite, where all is well.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        _check(opt)
        train = opt.get("train") or {}
        chosen = train.get("compile") or None
        self._amp = _AMP.get(train.get("amp"))
        self._channels_last = bool(train.get("channels_last"))
        kind = "mode" if chosen in _GRAPH_MODES else "backend"
        # What torch.compile is given; None does not compile.
        self._compile = chosen and {kind: "inductor" if chosen is True else chosen}
        self._clip_grad_norm = train.get("clip_grad_norm") or None
        self._accumulation = train.get("accumulation") or 1
        self._graphs = Graphs()
        self.log_dict: dict[str, Tensor] = {}
        # Gradients that overflow in float16 are the scaler's business: it passes the step over.
        self._may_overflow: dict[str, Tensor] = {}
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move a network to the device, prepared as the options say before it is wrapped."""
        net = net.to(self.device)
        if self._channels_last:
            _to_channels_last(net)
        if self._compile and self.is_train:
            _check_compiler(self._compile, self.device)
            net.compile(**self._compile)  # in place: names in checkpoints stay
        return super().model_to_device(net)

    def init_training_settings(self) -> None:
        """Add to SRModel's the gradients' scaler, and the layout of the averaged network."""
        try:
            self._autocast()
        except RuntimeError as error:
            raise TrainingError(f"train:amp cannot be used on this device: {error}") from error
        is_half = self._amp is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_half)
        super().init_training_settings()
        if self._channels_last and self.ema_decay > 0:
            _to_channels_last(self.net_g_ema)
        # The norm of a whole batch's difference is not a sum over its samples.
        frobenius = getattr(self.cri_perceptual, "criterion_type", None) == "fro"
        if self._accumulation > 1 and frobenius:
            raise TrainingError(
                "train:perceptual_opt:criterion: fro cannot be computed from parts of a batch; "
                "use l1, or leave train:accumulation out"
            )

    def get_optimizer(
        self, optim_type: str, params: Sequence[nn.Parameter], lr: float, **arguments: Any
    ) -> torch.optim.Optimizer:
        """Build the optimizer of torch.optim that has this name, with the options' arguments."""
        if optim_type not in optimizers():
            raise TrainingError(
                f"torch.optim has no optimizer {optim_type!r} for a loop"
                + suggest_or_list(optim_type, optimizers())
            )
        try:
            return getattr(torch.optim, optim_type)(params, lr=lr, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{optim_type} does not take these arguments: {error}") from error

    def feed_data(self, data: Mapping[str, Any]) -> None:
        """Move `lq` (B, C, H, W) and any `gt` to the device; with pinned memory nothing waits."""
        layout = torch.channels_last if self._channels_last else torch.preserve_format
        moved = {
            key: data[key].to(self.device, non_blocking=True, memory_format=layout)
            for key in ("lq", "gt")
            if key in data
        }
        super().feed_data(moved)

    def optimize_parameters(self, current_iter: int) -> None:
        """Train one iteration on the batch of `feed_data`; `output` is the whole batch's."""
        self._graphs.clear()  # of a validation
        if self._compile and "mode" in self._compile:
            torch.compiler.cudagraph_mark_step_begin()  # outputs of the last step may go
        self.optimizer_g.zero_grad()
        count = min(self._accumulation, len(self.lq))
        parts = zip(self.lq.tensor_split(count), self.gt.tensor_split(count), strict=True)
        outputs, logs = [], []
        in_parallel = isinstance(self.net_g, DistributedDataParallel)
        for index, (lq, gt) in enumerate(parts, 1):
            # processes average gradients in the last part of a batch alone
            with self.net_g.no_sync() if in_parallel and index < count else nullcontext():
                with self._autocast():
                    output = self.net_g(lq)
                output = output if self._amp is None else output.float()
                losses = self._losses(output, gt, len(lq) / len(self.lq))
                loss = sum(losses.values())
                self.scaler.scale(loss).backward()
            outputs.append(output.detach())
            logs.append({name: loss.detach() for name, loss in losses.items()})
        self.output = outputs[0] if count == 1 else torch.cat(outputs)
        self.log_dict = {name: sum(log[name] for log in logs) for name in logs[0]}
        self._step()
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._amp)

    def _losses(self, output: Tensor, gt: Tensor, share: float) -> dict[str, Tensor]:
        """Return a part's losses by name, such that those of all parts add up to the batch's."""
        losses = {}
        if self.cri_pix:
            # A sum over pixels adds up as it is, a mean by the part's share of the batch.
            weight = 1 if getattr(self.cri_pix, "reduction", "mean") == "sum" else share
            losses["l_pix"] = self.cri_pix(output, gt) * weight
        if self.cri_perceptual:
            content, style = self.cri_perceptual(output, gt)
            found = {"l_percep": content, "l_style": style}
            losses |= {name: loss * share for name, loss in found.items() if loss is not None}
        return losses

    def _step(self) -> None:
        scaler, optimizer = self.scaler, self.optimizer_g
        if self._clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self._clip_grad_norm)
            log = self._may_overflow if scaler.is_enabled() else self.log_dict
            log["grad_norm"] = norm.detach()
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
        network = getattr(self, "net_g_ema", self.net_g)
        mode, compiled = network.training, self._compile is not None
        network.eval()
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with stance, torch.no_grad():
            self.output = self._graphs(network, self.lq)
        network.train(mode)
