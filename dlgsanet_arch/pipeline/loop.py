"""The training loop: it ends at `total_iter` or as its minutes are used up, and resumes anywhere.

A resumed run continues as if it had not stopped. The order of an iteration is the learning rate,
the step, the log, the checkpoint, the validation, the clock and the signals.
A state that is saved before its iteration's validation says so, and a resumed run validates first.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataset

from dlgsanet_arch.averaging import FollowsSchedule, bare, networks_of
from dlgsanet_arch.errors import Interrupted, UserError
from dlgsanet_arch.pipeline import trial
from dlgsanet_arch.pipeline.budget import Budget
from dlgsanet_arch.pipeline.checkpoints import Checkpoints, Progress, Start
from dlgsanet_arch.pipeline.evaluation import Images
from dlgsanet_arch.pipeline.logs import Pace, RunLog, training_line
from dlgsanet_arch.pipeline.losses import FiniteLosses
from dlgsanet_arch.pipeline.processes import LostProcessError, Processes, stop_on_signals
from dlgsanet_arch.pipeline.reports import Evaluation
from dlgsanet_arch.pipeline.samples import BadSample, ReadingError, Samples, Sampling, load
from dlgsanet_arch.progress import progress_bar

# What a state holds and the option file says too; the state's is what a resumed run uses.
_KEPT_BY_STATE = ("train:optim_", "train:scheduler", "manual_seed")
_MOST_POSITIONS = 100_000_000  # of an epoch: shuffling them takes seconds and a gigabyte


def _is_due(iteration: int, every: Any) -> bool:
    return every is not None and iteration % int(every) == 0


def _flat(node: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the values of nested options by their paths, such as "train:total_iter"."""
    if not isinstance(node, Mapping) or not node:
        return {":".join(path): node}
    parts = [_flat(value, (*path, str(key))) for key, value in node.items()]
    return {path: value for part in parts for path, value in part.items()}


class Training:
    """A training run from its start, or where an earlier process left it, to `total_iter`.

    Nothing is written before `run`. `build` builds the model, its networks with their weights.
    `began` is when this process began, by `time.monotonic`: `train:max_minutes` counts from there.
    With `apply_edits`, optimizer, schedule and seed are the options', even if the run had others.
    """

    def __init__(
        self,
        opt: dict[str, Any],
        processes: Processes,
        log: RunLog,
        start: Start,
        build: Callable[[], Any],
        *,
        began: float,
        apply_edits: bool = False,
    ) -> None:
        self._opt, self._processes, self._log = opt, processes, log
        self._total = int(opt["train"]["total_iter"])
        self._val = opt.get("val") if opt.get("val") is not None else {}
        said = Progress.from_state(start.state)
        if said is not None:
            self._report_edits(said, applied=apply_edits)
            if not apply_edits:
                opt["manual_seed"] = said.seed
        self._build_data(opt["datasets"]["train"])
        self._progress = self._progress_at(start.iteration, said)
        self._budget = Budget(opt["train"].get("max_minutes"), self._progress.seconds, began)
        self.model = build()
        if self._budget.is_limited and not isinstance(self.model, FollowsSchedule):
            raise UserError(
                f"train:max_minutes: {type(self.model).__name__} sets its learning rate by itself, "
                "and that counts iterations alone; leave max_minutes out"
            )
        self._checkpoints = Checkpoints(self.model, processes, opt["logger"].get("keep_last"))
        self._saved_at = start.iteration if start.path else None
        if start.path and (warning := self._checkpoints.restore(start, apply_edits=apply_edits)):
            log.warning(warning)
        self._losses = FiniteLosses(processes)
        at = f"from epoch: {self._progress.place.epoch}, iter: {start.iteration}"
        log.info(f"Resuming training {at}." if start.path else f"Start training {at}")

    def _report_edits(self, said: Progress, *, applied: bool) -> None:
        """Name the options that were edited since, and which of them a resume leaves out."""
        now = _flat(json.loads(json.dumps(self._opt["as_given"], default=str)))
        before = _flat(said.options)
        for path in sorted(now.keys() | before.keys()):
            if now.get(path) == before.get(path):
                continue
            is_kept = path.startswith(_KEPT_BY_STATE)
            ignored = is_kept and not applied
            if ignored and path.endswith(":type"):
                raise UserError(
                    f"{path}: was {before.get(path)!r} when the run began, and what its state "
                    "holds fits no other; write that, or add --apply_edits"
                )
            effect = ", and NOT used" if ignored else ", and applied" if is_kept else ""
            fix = "; the state's is used unless you add --apply_edits" if ignored else ""
            (self._log.warning if ignored else self._log.info)(
                f"edited since the run began{effect}: {path}: was {before.get(path)!r}, is "
                f"{now.get(path)!r} in the option file{fix}"
            )

    def _build_data(self, train_opt: Mapping[str, Any]) -> None:
        opt, processes = self._opt, self._processes
        copies = 1 if processes.distributed else max(1, opt["num_gpu"])
        with trial.explained("opening the data set", opt["as_given"], option="datasets:train"):
            dataset = build_dataset(train_opt)
        self._workers = int(train_opt["num_worker_per_gpu"]) * copies
        self._tolerated = int(train_opt.get("skip_bad_samples") or 0)
        self._samples = Samples(dataset, opt["manual_seed"], replace_bad=self._tolerated > 0)
        self._sampling = sampling = Sampling(
            samples=len(dataset),
            ratio=train_opt.get("dataset_enlarge_ratio", 1),
            batch=int(train_opt["batch_size_per_gpu"]) * copies,
            world=processes.world,
            rank=processes.rank,
            seed=opt["manual_seed"],
        )
        size = f"{len(dataset)} samples x dataset_enlarge_ratio {sampling.ratio}"
        if sampling.batches_an_epoch == 0:  # a third party's set, which is not scanned
            raise UserError(
                f"datasets:train has {size}, less than one batch of {sampling.taken} (all "
                "processes together): raise dataset_enlarge_ratio or take smaller batches"
            )
        if sampling.epoch_length > _MOST_POSITIONS:
            raise UserError(
                f"datasets:train:dataset_enlarge_ratio: {size} are more than {_MOST_POSITIONS:,}, "
                "which are drawn at once; write a smaller ratio"
            )
        self._log.info(
            f"Training set: {size}; batch {sampling.batch} x {processes.world} processes = "
            f"{sampling.taken}; {sampling.batches_an_epoch} iterations an epoch; {self._total} in "
            "all"
        )
        self.validations = [
            Images(dataset_opt, processes)
            for phase, dataset_opt in opt["datasets"].items()
            if phase.split("_")[0] == "val" and opt.get("val") is not None
        ]

    def _progress_at(self, iteration: int, said: Progress | None) -> Progress:
        """Return where a run continues: as its state says, or else as its iterations do."""
        length, place = self._sampling.epoch_length, self._sampling.place_of(iteration)
        now = {"seed": self._opt["manual_seed"], "options": self._opt["as_given"]}
        if said is None:
            return Progress(iteration, place, length, **now)
        place = said.place
        if said.epoch_length != length:
            self._log.warning(
                f"an epoch of the training set has {length} positions and had "
                f"{said.epoch_length}: the run continues with the next epoch"
            )
            place = place._replace(position=length)
        return replace(said, place=place, epoch_length=length, **now)

    def try_step(self) -> None:
        """Try a step on the first samples to come; see `trial.step`."""
        draws = next(self._sampling.batches(self._progress.place, 1))
        trial.step(self.model, self._samples, draws, self._opt["as_given"])

    def run(self, begin: Callable[[], None]) -> None:
        """Train.

        `begin` makes the run's folders and opens its logs. A new run calls it when the first
        iteration has worked, so that a run that fails there replaces nothing.

        Raises:
            Interrupted: A signal asked for the end; everything is saved.
            UserError: A sample, a loss or a file is bad; the message names it.
        """
        self._begin: Callable[[], None] | None = begin
        done = self._progress.iteration
        if self._saved_at is not None:
            self._begun()
        ended = done >= self._total or self._budget.is_spent
        if ended and not self._progress.validate:
            self._finish_again()
            return
        hidden = not self._processes.is_main
        bar = progress_bar("", self._total, "iter", done=done, transient=True, hidden=hidden)
        with warnings.catch_warnings(), stop_on_signals() as self._stop, bar as self._bar:
            # BasicSR steps the schedule before the optimizer, in a resumed run before any step
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self._pace = Pace(done, self._total, self._sampling.taken)
            try:
                if self._progress.validate:
                    self._validate()
                self._iterate(max(0, self._total - done))
                self._finish()
            except Interrupted as request:
                raise self._stopped(request) from None
            except (ReadingError, LostProcessError) as error:
                raise self._failed(error) from error

    def _begun(self) -> None:
        """Make the run's folders, once."""
        if self._begin is not None:
            self._begin()
            self._begin = None
            self._losses.folder = Path(self._opt["path"]["experiments_root"])

    def _iterate(self, count: int) -> None:
        progress, logger = self._progress, self._opt["logger"]
        self._agree()
        if self._budget.is_spent and progress.iteration == 0:
            raise UserError(f"{self._budget} are used up before the first iteration: raise them")
        if self._budget.is_spent:
            return
        for iteration, batch in enumerate(self._batches(count), progress.iteration + 1):
            self._step(iteration, batch)
            progress.iteration = iteration
            progress.place = self._sampling.after(progress.place)
            val_due = _is_due(iteration, self._val.get("val_freq"))
            progress.validate = val_due and bool(self.validations)
            self._bar.update()
            if _is_due(iteration, logger["print_freq"]):
                self._print()
            if _is_due(iteration, logger["save_checkpoint_freq"]):
                self._save()
            if progress.validate:
                self._validate()
            self._agree()
            if self._budget.is_spent:
                return

    def _agree(self) -> None:
        """Share the clock and any signal among the processes; end the run for a signal."""
        signalled, self._budget.seconds = self._processes.largest(
            self._stop.signal, self._budget.now()
        )
        self._progress.seconds = self._budget.seconds
        if signalled:
            self._stop.signal = int(signalled)
            raise self._stop.interrupted()

    def _batches(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of the iterations to come, and note how long each was waited for."""
        train_opt = self._opt["datasets"]["train"]
        batches = load(
            self._samples,
            self._sampling.batches(self._progress.place, count),
            self._workers,
            pin_memory=train_opt.get("pin_memory", self.model.device.type == "cuda"),
            multiprocessing_context=train_opt.get("multiprocessing_context"),
            prefetch_factor=train_opt.get("prefetch_factor") or 2,
        )
        since = time.perf_counter()
        for batch, bad in batches:
            self._note_bad(bad, replaced=batch is not None)
            self._pace.waited += time.perf_counter() - since
            yield batch
            since = time.perf_counter()

    def _note_bad(self, bad: Sequence[BadSample], *, replaced: bool = True) -> None:
        """Note bad samples; too many different ones, or one not `replaced`, is a ReadingError."""
        known = self._progress.bad_samples
        new = [each for each in dict.fromkeys(bad) if each not in known]
        if limit := next((each.reason for each in new if not each.sample), ""):
            raise ReadingError(f"{limit}; then resume with --auto_resume")
        if not replaced or len(known) + len(new) > self._tolerated:
            lines = "\n  ".join(map(str, [*known, *new]))
            raise ReadingError(
                "bad samples in the training set (datasets:train:skip_bad_samples tolerates "
                f"{self._tolerated}, if a good one can take its place; fix them, see `dlgsanet "
                f"data verify`, and resume with --auto_resume):\n  {lines}"
            )
        for number, each in enumerate(new, len(known) + 1):
            self._log.warning(
                f"bad sample {number} of {self._tolerated} tolerated, another takes its place: "
                f"{each}"
            )
            self._log.record("bad_sample", sample=each.sample, reason=each.reason)
        self._progress.bad_samples = [*known, *new]

    def _step(self, iteration: int, batch: Mapping[str, Any]) -> None:
        model, warmup = self.model, int(self._opt["train"].get("warmup_iter") or -1)
        position = self._budget.position(iteration, self._total)
        model.update_learning_rate(position, warmup_iter=warmup)
        with self._processes.answered():
            model.feed_data(batch)
            model.optimize_parameters(iteration)
        losses = {
            name: value
            for name, value in getattr(model, "log_dict", {}).items()
            if isinstance(value, int | float | torch.Tensor)
        }
        names = [str(name) for name in batch.get("lq_path", batch.get("gt_path", ()))]
        self._losses.watch(iteration, names, losses)
        self._begun()

    def _print(self) -> None:
        self._losses.check()
        iteration = self._progress.iteration
        losses = {name: float(value) for name, value in self.model.get_current_log().items()}
        rates, pace = self.model.get_current_learning_rate(), self._pace.take(iteration)
        pace["eta"] = min(pace["eta"], self._budget.left)
        found = {"iter": iteration, "epoch": self._progress.place.epoch, "lr": rates}
        found |= {"losses": losses, **pace}
        self._log.info(training_line(self._opt["name"], found))
        self._log.record("train", **found)
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in list(losses.items())[:2]})
        shown = {f"losses/{k}" if k.startswith("l_") else k: v for k, v in losses.items()}
        shown |= {"lr": rates[0], "samples_per_second": pace["samples_per_second"]}
        self._log.scalars(shown, iteration)

    def _save(self) -> None:
        self._losses.check()
        since = time.perf_counter()
        for share in self._processes.gather(self._progress.bad_samples):
            self._note_bad(share)
        self._log.info("Saving models and training states.")
        self._checkpoints.save(self._progress)
        self._saved()
        self._pace.paused += time.perf_counter() - since

    def _saved(self) -> None:
        self._saved_at = self._progress.iteration
        self._log.record("save", iter=self._saved_at)

    def _is_saved(self) -> bool:
        return self._progress.iteration in (0, self._saved_at)

    def _stopped(self, request: Interrupted) -> Interrupted:
        """Save, and return what to raise when a signal has asked for the end."""
        iteration = self._progress.iteration
        if iteration == 0:
            return Interrupted(f"{request} before the first iteration", request.status)
        if not self._is_saved():
            self._save()
        self._log.record("stop", iter=iteration, reason=str(request))
        return Interrupted(
            f"{request} at iteration {iteration}, which is saved; resume with --auto_resume",
            request.status,
        )

    def _failed(self, error: UserError) -> UserError:
        """Save the last iteration where it can be, and return the error with that added."""
        if isinstance(error, LostProcessError):
            # A step that failed in its backward pass has changed no weights; statistics that a
            # forward pass keeps, and a second optimizer's step, it may have changed.
            networks = map(bare, networks_of(self.model).values())
            exact = len(self.model.optimizers) == 1 and all(
                len(each.state_dict()) == len([*each.parameters()]) for each in networks
            )
            if exact and self._processes.is_main and not self._is_saved():
                self._checkpoints.save(self._progress, alone=True)
                self._saved()
        elif not self._processes.distributed and not self._is_saved():
            self._save()  # other processes would be in their next iteration
        at = self._saved_at
        note = f"; iteration {at} is saved, resume with --auto_resume" if at else ""
        return type(error)(f"{error}{note}")

    def _validate(self) -> None:
        """Validate on every set, and keep the weights if they are the best so far."""
        self._losses.check()
        since = time.perf_counter()
        with nullcontext() if self._processes.distributed else self._stop.at_once():
            results = self._evaluated()
        self._progress.validate = False
        for result in results:
            bicubic = {"bicubic": result.bicubic} if result.bicubic else {}
            found = {"dataset": result.dataset, "metrics": result.means, **bicubic}
            self._log.record("validation", iter=self._progress.iteration, **found)
        self._keep_best(results)
        self._pace.paused += time.perf_counter() - since

    def _evaluated(self) -> list[Evaluation]:
        iteration, writer = self._progress.iteration, self._log.tensorboard
        return [
            self.model.validation(images, iteration, writer, self._val["save_img"])
            for images in self.validations
        ]

    def _keep_best(self, results: Sequence[Evaluation]) -> None:
        dataset, _, metric = str(self._opt["logger"].get("save_best") or "").rpartition("/")
        found = [x for x in results if metric in x.means and dataset in ("", x.dataset)]
        if not found or math.isnan(found[0].means[metric]):
            return
        value, best = found[0].means[metric], self._checkpoints.best.get("value")
        lower = self._val["metrics"][metric].get("better", "higher") == "lower"
        if best is None or (value < best if lower else value > best):
            self._checkpoints.save_best(float(value), self._progress.iteration)
            self._log.info(
                f"net_g_best.pth has the weights of iteration {self._progress.iteration}: "
                f"{found[0].dataset} {metric} {value:.4f}"
            )

    def _finish(self) -> None:
        progress = self._progress
        early = progress.iteration < self._total
        why = f" of {self._total}: {self._budget} are used up" if early else ""
        self._log.info(f"End of training at iteration {progress.iteration}{why}.")
        if self.validations and not _is_due(progress.iteration, self._val.get("val_freq")):
            progress.validate = True
            self._validate()
        if self.validations or early or self._saved_at != progress.iteration:
            self._save()  # so that the state says that the minutes are used up
        self._log.info("Save the latest model.")
        self._checkpoints.save_latest()
        self._log.record("end", iter=progress.iteration)

    def _finish_again(self) -> None:
        """Leave a complete run as it is, and write its last file if that is missing."""
        why = f", and {self._budget} are used up" if self._budget.is_spent else ""
        self._log.info(
            f"This run is complete: {self._progress.iteration} of {self._total} iterations{why}; "
            "nothing to train"
        )
        models_folder = Path(self._opt["path"]["models"])
        if self._processes.share(not (models_folder / "net_g_latest.pth").is_file()):
            self._checkpoints.save_latest()
