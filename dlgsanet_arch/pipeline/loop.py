"""The training loop: it ends at `total_iter`, and resumes from anywhere as if it had not stopped.

The order of an iteration is the learning rate, the step, the log, the checkpoint, the validation.
A state that is saved before its iteration's validation says so, and a resumed run validates first.
"""

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dlgsanet_arch._basicsr import read_state
from dlgsanet_arch.errors import Interrupted, UserError
from dlgsanet_arch.pipeline import evaluation, models, resume
from dlgsanet_arch.pipeline.logs import Pace, RunLog, progress_bar, training_line
from dlgsanet_arch.pipeline.processes import Processes
from dlgsanet_arch.pipeline.samples import BadSample, Samples, collate, start_worker
from dlgsanet_arch.pipeline.sampling import Batches, Sampling
from dlgsanet_arch.pipeline.saving import (
    Progress,
    Saver,
    progress_of,
    restore,
    restore_randomness,
)
from dlgsanet_arch.pipeline.signals import stop_on_signals
from dlgsanet_arch.training import FiniteLosses


class ReadingError(UserError):
    """The training set cannot be read on; the iterations so far are not touched by it."""


class _BadSamples:
    """Counts the different bad samples of a run, and refuses one too many.

    Args:
        known: Those of the run so far.
        tolerated: `skip_bad_samples`.
        log: Where each is named once.
    """

    def __init__(self, known: Sequence[BadSample], tolerated: int, log: RunLog) -> None:
        self.found = dict.fromkeys(known)
        self._tolerated = tolerated
        self._log = log

    def add(self, bad: Sequence[BadSample], *, replaced: bool = True) -> None:
        """Take in the bad samples of a batch.

        Raises:
            ReadingError: There are too many, or nothing could take the place of one.
        """
        new = [each for each in dict.fromkeys(bad) if each not in self.found]
        found = [*self.found, *new]
        if not replaced or len(found) > self._tolerated:
            why = f"datasets:train:skip_bad_samples tolerates {self._tolerated}"
            if len(found) <= self._tolerated:
                why = "no good sample could be found in their place"
            lines = "\n  ".join(map(str, found))
            raise ReadingError(
                f"bad samples in the training set ({why}; fix them, see `dlgsanet data verify`, "
                f"and resume with --auto_resume):\n  {lines}"
            )
        self.found = dict.fromkeys(found)
        for number, each in enumerate(new, len(found) - len(new) + 1):
            self._log.warning(
                f"bad sample {number} of {self._tolerated} tolerated, another takes its place: "
                f"{each}"
            )
            self._log.record("bad_sample", sample=each.sample, reason=each.reason)


def _names(batch: Mapping[str, Any]) -> list[str]:
    """Return what a batch says of where its samples come from."""
    names = batch.get("lq_path", batch.get("gt_path", ()))
    return [str(name) for name in names]


def _numbers(log: Mapping[str, Any]) -> dict[str, float | torch.Tensor]:
    """Return what of a model's log is a number, on whatever device."""
    return {
        name: value for name, value in log.items() if isinstance(value, int | float | torch.Tensor)
    }


def _is_due(iteration: int, every: Any) -> bool:
    return every is not None and iteration % int(every) == 0


class Training:
    """A training run from its start, or where an earlier process left it, to `total_iter`.

    Args:
        opt: The run's options, complete; its folders exist.
        processes: The processes of the run.
        log: Its logs.
        start: What it resumes from.
        apply_edits: Whether optimizer, schedule and seed are those of the options, where the run
            so far had others.
    """

    def __init__(
        self,
        opt: dict[str, Any],
        processes: Processes,
        log: RunLog,
        start: resume.Start,
        *,
        apply_edits: bool = False,
    ) -> None:
        self._opt, self._processes, self._log = opt, processes, log
        self._total = int(opt["train"]["total_iter"])
        self._validation_opt = opt.get("val") if opt.get("val") is not None else {}
        state = None
        if start.state is not None:
            state = read_state(start.state)
            resume.use(start, opt)
        said = progress_of(state) if state is not None else None
        if said is not None:
            self._report_edits(said, applied=apply_edits)
            if not apply_edits:
                opt["manual_seed"] = said.seed
        self._build_data(opt["datasets"]["train"])
        place = self._sampling.place_of(start.iteration)
        if said is not None:
            place = said.place
            if said.epoch_length != self._sampling.epoch_length:
                log.warning(
                    f"an epoch of the training set has {self._sampling.epoch_length} positions and "
                    f"had {said.epoch_length}: the run continues with the next epoch"
                )
                place = place._replace(position=self._sampling.epoch_length)
        self._progress = Progress(
            iteration=start.iteration,
            place=place,
            epoch_length=self._sampling.epoch_length,
            seed=opt["manual_seed"],
            validate=said.validate if said is not None else False,
            bad_samples=said.bad_samples if said is not None else (),
            options=opt["as_given"],
        )
        self._model = models.build(opt, log)
        self._saver = Saver(self._model, processes, opt["logger"].get("keep_last"))
        evaluation.install(self._model, processes)
        if state is not None:
            self._restore(state, start.iteration, apply_edits=apply_edits)
        self._bad = _BadSamples(
            self._progress.bad_samples,
            int(opt["datasets"]["train"].get("skip_bad_samples") or 0),
            log,
        )
        self._losses = FiniteLosses(
            opt["path"]["experiments_root"],
            processes.gather if processes.distributed else None,
            processes.is_main,
        )
        self._saved_at = start.iteration if state is not None else None
        self._log.info(f"Start training from epoch: {place.epoch}, iter: {start.iteration}")

    def _build_data(self, train_opt: Mapping[str, Any]) -> None:
        from basicsr.data import build_dataset

        opt, processes = self._opt, self._processes
        copies = 1 if processes.distributed else max(1, opt["num_gpu"])
        dataset = build_dataset(train_opt)
        self._workers = int(train_opt["num_worker_per_gpu"]) * copies
        self._samples = Samples(
            dataset,
            opt["manual_seed"],
            replace_bad=int(train_opt.get("skip_bad_samples") or 0) > 0,
        )
        self._sampling = Sampling(
            samples=len(dataset),
            ratio=train_opt.get("dataset_enlarge_ratio", 1),
            batch=int(train_opt["batch_size_per_gpu"]) * copies,
            world=processes.world,
            rank=processes.rank,
            seed=opt["manual_seed"],
        )
        if self._sampling.batches_an_epoch == 0:  # a third party's set, which is not scanned
            raise UserError(
                f"datasets:train has {len(dataset)} samples x dataset_enlarge_ratio "
                f"{self._sampling.ratio}, less than one batch of {self._sampling.taken} (all "
                "processes together): raise dataset_enlarge_ratio or take smaller batches"
            )
        self._log.info(
            "Training statistics:"
            f"\n\tNumber of train images: {len(dataset)}"
            f"\n\tDataset enlarge ratio: {self._sampling.ratio}"
            f"\n\tBatch size per process: {self._sampling.batch}"
            f"\n\tProcesses: {processes.world}; batch of an iteration: {self._sampling.taken}"
            f"\n\tIterations of an epoch: {self._sampling.batches_an_epoch}"
            f"\n\tTotal iters: {self._total}"
        )
        self._validations = [
            evaluation.build_loader(dataset_opt, processes)
            for phase, dataset_opt in opt["datasets"].items()
            if phase.split("_")[0] == "val" and opt.get("val") is not None
        ]

    def _restore(self, state: dict[str, Any], iteration: int, *, apply_edits: bool) -> None:
        model = self._model
        as_edited = resume.AsEdited(model) if apply_edits else None
        model.resume_training(state)
        if as_edited is not None:
            as_edited.apply(model, iteration)
        restore(model, self._saver, state)
        generators = state.get("randomness", ())
        if len(generators) == self._processes.world:
            restore_randomness(generators[self._processes.rank])
        elif generators:
            self._log.warning(
                f"the run continues with {self._processes.world} processes and had "
                f"{len(generators)}: what the network itself draws at random is drawn anew"
            )
        self._log.info(
            f"Resuming training from epoch: {self._progress.place.epoch}, iter: {iteration}."
        )

    def _report_edits(self, said: Progress, *, applied: bool) -> None:
        """Name the options that were edited since, and which of them a resume leaves out."""
        for path, (before, now) in resume.edits(self._opt["as_given"], said.options).items():
            change = f"{path}: was {before!r}, is {now!r} in the option file"
            if not resume.is_kept_by_state(path):
                self._log.info(f"edited since the run began: {change}")
            elif applied:
                self._log.info(f"edited since the run began, and applied: {change}")
            else:
                self._log.warning(
                    f"edited since the run began, and NOT used: {change}; the run continues with "
                    "what its state holds; --apply_edits puts the option file's in force"
                )

    def _loader(self, count: int) -> DataLoader:
        train_opt = self._opt["datasets"]["train"]
        with_workers = {}
        if self._workers:
            with_workers = {
                "multiprocessing_context": train_opt.get("multiprocessing_context"),
                "prefetch_factor": train_opt.get("prefetch_factor") or 2,
            }
        return DataLoader(
            self._samples,
            batch_sampler=Batches(self._sampling, self._progress.place, count),
            num_workers=self._workers,
            collate_fn=collate,
            worker_init_fn=start_worker,
            pin_memory=train_opt.get("pin_memory", self._model.device.type == "cuda"),
            generator=torch.Generator(),  # or starting to read would draw from the global one
            **with_workers,
        )

    def run(self) -> None:
        """Train.

        Raises:
            Interrupted: A signal asked for the end; everything is saved.
            UserError: A sample, a loss or a file is bad; the message names it.
        """
        done = self._progress.iteration
        if done >= self._total and not self._progress.validate:
            self._finish_again()
            return
        with (
            warnings.catch_warnings(),
            stop_on_signals() as self._stop,
            progress_bar(self._processes, self._total, done, "iter") as self._bar,
        ):
            # BasicSR steps the schedule before the optimizer, in a resumed run before any step
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self._pace = Pace(done, self._total, self._sampling.taken)
            try:
                if self._progress.validate:
                    self._validate()
                self._iterate(max(0, self._total - done))
                self._finish()
            except Interrupted as request:
                self._stopped(request)
            except ReadingError:
                if not self._processes.distributed:  # else the others are in their next iteration
                    self._save_unsaved()
                raise

    def _batches(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of the iterations to come, and note how long each was waited for."""
        since = time.perf_counter()
        loader = iter(self._loader(count))
        while True:
            try:
                batch, bad = next(loader)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error) or "exited" not in str(error):
                    raise
                raise ReadingError(
                    f"a worker that reads the training set died ({error}); where memory ran out, "
                    "lower datasets:train:num_worker_per_gpu; resume with --auto_resume"
                ) from error
            if bad or batch is None:
                self._bad.add(bad, replaced=batch is not None)
            self._pace.waited(time.perf_counter() - since)
            yield batch
            since = time.perf_counter()

    def _iterate(self, count: int) -> None:
        model, opt = self._model, self._opt
        warmup = int(opt["train"].get("warmup_iter") or -1)
        stop_flag = self._processes.flag()
        for iteration, batch in enumerate(self._batches(count), self._progress.iteration + 1):
            model.update_learning_rate(iteration, warmup_iter=warmup)
            model.feed_data(batch)
            model.optimize_parameters(iteration)
            self._losses.watch(iteration, _names(batch), _numbers(getattr(model, "log_dict", {})))
            validate = bool(self._validations) and _is_due(
                iteration, self._validation_opt.get("val_freq")
            )
            self._progress = replace(
                self._progress,
                iteration=iteration,
                place=self._sampling.after(self._progress.place),
                validate=validate,
            )
            self._bar.update()
            if _is_due(iteration, opt["logger"]["print_freq"]):
                self._print()
            if _is_due(iteration, opt["logger"]["save_checkpoint_freq"]):
                self._save()
            if validate:
                self._validate()
            signalled = stop_flag.exchange(self._stop.signal)
            if signalled:
                self._stop.signal = signalled
                stop_flag.settle()
                raise self._stop.interrupted()
        stop_flag.settle()

    def _print(self) -> None:
        self._losses.check()
        iteration, model = self._progress.iteration, self._model
        losses = {name: float(value) for name, value in model.get_current_log().items()}
        rates = model.get_current_learning_rate()
        pace = self._pace.take(iteration)
        epoch = self._progress.place.epoch
        self._log.info(training_line(self._opt["name"], epoch, iteration, rates, pace, losses))
        self._log.record(
            "train", iter=iteration, epoch=epoch, lr=list(rates), losses=losses, **pace
        )
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in list(losses.items())[:2]})
        writer = self._log.tensorboard
        if writer is None:
            return
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}" if name.startswith("l_") else name, value, iteration)
        writer.add_scalar("lr", rates[0], iteration)
        writer.add_scalar("samples_per_second", pace["samples_per_second"], iteration)

    def _save(self) -> None:
        self._losses.check()
        since = time.perf_counter()
        bad = dict.fromkeys(
            each for found in self._processes.gather(list(self._bad.found)) for each in found
        )
        self._bad.add(list(bad))
        self._progress = replace(self._progress, bad_samples=tuple(bad))
        self._log.info("Saving models and training states.")
        self._saver.save(self._progress)
        self._saved_at = self._progress.iteration
        self._log.record("save", iter=self._saved_at)
        self._pace.paused(time.perf_counter() - since)

    def _save_unsaved(self) -> None:
        """Save where the last checkpoint is older than the last iteration."""
        if self._progress.iteration not in (0, self._saved_at):
            self._save()

    def _validate(self) -> None:
        """Validate on every set, and keep the weights if they are the best so far."""
        self._losses.check()
        since, iteration = time.perf_counter(), self._progress.iteration
        if self._processes.distributed:
            results = self._evaluated()
        else:
            with self._stop.at_once():
                results = self._evaluated()
        self._progress = replace(self._progress, validate=False)
        for result in results:
            self._log.record(
                "validation", iter=iteration, dataset=result.dataset, metrics=result.means
            )
        self._keep_best(results)
        self._pace.paused(time.perf_counter() - since)

    def _evaluated(self) -> list[evaluation.Evaluation]:
        results = [
            self._model.validation(
                loader,
                self._progress.iteration,
                self._log.tensorboard,
                self._validation_opt["save_img"],
            )
            for loader in self._validations
        ]
        return [result for result in results if isinstance(result, evaluation.Evaluation)]

    def _keep_best(self, results: Sequence[evaluation.Evaluation]) -> None:
        wanted = self._opt["logger"].get("save_best")
        if not wanted or not results:
            return
        dataset, _, metric = str(wanted).rpartition("/")
        for result in results:
            if (not dataset or result.dataset == dataset) and metric in result.means:
                break
        else:
            return
        value, best = result.means[metric], self._saver.best.get("value")
        if math.isnan(value):
            return
        lower = self._validation_opt["metrics"][metric].get("better", "higher") == "lower"
        if best is None or (value < best if lower else value > best):
            self._saver.save_best(float(value), self._progress.iteration)
            self._log.info(
                f"net_g_best.pth has the weights of iteration {self._progress.iteration}: "
                f"{result.dataset} {metric} {value:.4f}"
            )

    def _finish(self) -> None:
        self._log.info(f"End of training at iteration {self._progress.iteration}.")
        validated = _is_due(self._progress.iteration, self._validation_opt.get("val_freq"))
        if self._validations and not validated:
            self._progress = replace(self._progress, validate=True)
            self._validate()
        self._save()
        self._log.info("Save the latest model.")
        self._saver.save_latest()
        self._log.record("end", iter=self._progress.iteration)

    def _finish_again(self) -> None:
        """A run that is complete is left as it is; only a missing last file is written."""
        self._log.info(
            f"This run is complete: {self._progress.iteration} of {self._total} iterations; "
            "nothing to train"
        )
        models_folder = Path(self._opt["path"]["models"])
        if self._processes.share(not (models_folder / "net_g_latest.pth").is_file()):
            self._saver.save_latest()

    def _stopped(self, request: Interrupted) -> None:
        iteration = self._progress.iteration
        if iteration == 0:
            raise Interrupted(f"{request} before the first iteration", request.status)
        self._save_unsaved()
        self._log.record("stop", iter=iteration, reason=str(request))
        raise Interrupted(
            f"{request} at iteration {iteration}, which is saved; resume with --auto_resume",
            request.status,
        )
