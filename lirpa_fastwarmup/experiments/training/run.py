"""A training run from its settings to its files, in one go or in several."""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lirpa_fastwarmup.distributed import broadcast, broadcast_buffers, world
from lirpa_fastwarmup.experiments.training import checkpoint, files
from lirpa_fastwarmup.experiments.training.build import Run, build_run
from lirpa_fastwarmup.experiments.training.files import HISTORY, SUMMARY
from lirpa_fastwarmup.experiments.training.interrupt import deferred_signals, raising_signals
from lirpa_fastwarmup.experiments.training.loop import Position, learning_rate, train_epoch
from lirpa_fastwarmup.experiments.training.network import require_trust, save_model
from lirpa_fastwarmup.experiments.training.progress import EpochMeans, Listeners, Progress
from lirpa_fastwarmup.experiments.training.ranks import join_ranks
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.experiments.training.summary import draw_curves, summarise
from lirpa_fastwarmup.inspection.layers import inspect
from lirpa_fastwarmup.inspection.statistics import history_columns
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError
from lirpa_fastwarmup.storage import file_sum, read_json, write_csv, write_json
from lirpa_fastwarmup.verification import evaluate

logger = logging.getLogger(__name__)

_CHOSEN_BY = {"validation": "validation_verified_error", "test": "verified_error"}


def train(
    settings: Settings,
    out: Path,
    *,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and evaluate one network; leave ``summary.json``, ``history.csv``, ``model.pt``, ``curves.png``.

    ``model.pt``, ``history.csv`` and ``checkpoint.pt``, from which :func:`resume` goes on, are written anew after
    every epoch. SIGINT and SIGTERM finish the step, write the checkpoint and raise :class:`TrainingInterrupted`.

    Args:
        settings: what to run.
        out: folder for the files; made if absent.
        overwrite: replace an earlier run in ``out``.
        device: where to train.
        progress: told what happens.

    Returns:
        The content of ``summary.json``.

    Raises:
        OutputExistsError: ``out`` is not empty and ``overwrite`` is off.
        OSError: ``out`` cannot be written to, or a data file is missing.
        ValueError, TypeError, ImportError, NotImplementedError: the settings name what there is not, or what does
            not fit together.
        NonFiniteLossError: the loss became NaN or infinite; epoch, step and ε are in the text, and
            ``model.pt`` is that of the last whole epoch.
        TrainingInterrupted: a signal came.
    """
    started = time.perf_counter()
    with _claimed(out, overwrite=overwrite):
        run = build_run(settings, torch.device(device))
        join_ranks(run)
        ramp_end = settings.ramp_start + settings.ramp_length - 1
        if ramp_end > settings.epochs:
            logger.warning(
                "eps reaches %g only after %d epochs, and training ends after %d: the network is never trained at it",
                *(settings.eps, ramp_end, settings.epochs),
            )
        return _to_the_end(run, Position(_no_means(run)), out, progress or Listeners(), started, fresh=True)


def resume(
    out: Path,
    *,
    data_dir: Path | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Resume the run in ``out`` from its checkpoint, to the same end that it would have come to unbroken.

    On the CPU with the same number of threads, weights and history are those of the unbroken run bit for bit. A run
    that is finished already is left as it is.

    Args:
        out: the run's folder.
        data_dir: where its data is now, if it was moved.
        device, progress: as of :func:`train`.
        trust: import and call the factory of the network that the checkpoint names, where it is none of this package's.

    Returns:
        The content of ``summary.json``.

    Raises:
        FileNotFoundError: ``out`` holds no checkpoint.
        UntrustedError: the network is none of this package's, and ``trust`` is off.
        ValueError: the checkpoint is damaged, of another version, or of another network or data than its settings
            give now.
        Exception: as :func:`train`.
    """
    path = out / files.CHECKPOINT
    started = time.perf_counter()
    checkpoint.require(path)
    with _claimed(out, overwrite=True):
        left: Any = broadcast(_left_in(out) if world().is_rank_zero else None)
        content, summary = left
        if summary is not None:
            return dict(summary)
        settings: Settings = content["settings"]
        require_trust(settings.model, path, trust=trust)
        run = build_run(settings if data_dir is None else settings.replace(data_dir=data_dir), torch.device(device))
        join_ranks(run)
        position = Position(_no_means(run))
        checkpoint.restore(content, run, position, path)
        if run.world.is_rank_zero:
            _write_results(run, position, out)  # Which may have been killed right after its checkpoint.
        return _to_the_end(run, position, out, progress or Listeners(), started, fresh=False)


def _claimed(out: Path, *, overwrite: bool) -> AbstractContextManager[None]:
    return files.claimed(out, overwrite=overwrite) if world().is_rank_zero else nullcontext()


def _left_in(out: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The checkpoint in ``out``, and the summary if the run is finished."""
    content = checkpoint.read(out / files.CHECKPOINT)
    return content, read_json(out / SUMMARY) if (out / SUMMARY).is_file() else None


def settings_of_run(out: Path) -> Settings:
    """The settings of the run in ``out``, from its checkpoint. Errors as of :func:`resume`."""
    settings: Settings = checkpoint.read(out / files.CHECKPOINT)["settings"]
    return settings


def _no_means(run: Run) -> EpochMeans:
    return EpochMeans(run.device, tuple(run.objective.penalties))


def _to_the_end(
    run: Run, position: Position, out: Path, progress: Progress, started: float, *, fresh: bool
) -> dict[str, Any]:
    path = out / files.CHECKPOINT
    started -= position.elapsed
    with deferred_signals(out) as stop:
        while position.epoch <= run.settings.epochs:
            try:
                train_epoch(run, position, progress, stop)
            except NonFiniteLossError as error:
                raise _diverged(error, position, out) from error
            whole = position.batches_done == len(run.train_batches)
            if fresh and run.world.is_rank_zero:
                files.remove_events(out)  # Before this run's first ones.
            if whole:
                _close_epoch(run, position, progress)
            position.elapsed = time.perf_counter() - started
            if fresh and run.world.is_rank_zero:
                (out / SUMMARY).unlink(missing_ok=True)  # With the summary of an earlier run, this one would seem done.
            checkpoint.save(path, run, position)
            if run.world.is_rank_zero:
                if fresh:
                    files.remove_earlier_run(out)  # Not before there is something to put in its place.
                if whole:
                    _write_results(run, position, out)
            fresh = False
            stop.raise_if_asked()
    with raising_signals(out):
        summary = summarise(run, position, out, started)
        if run.world.is_rank_zero:
            draw_curves(position.history, run.settings, out / files.CURVES)
            summary["files"] = {HISTORY: file_sum(out / HISTORY)}
            write_json(out / SUMMARY, summary)  # Last: what a run with a summary has, it has whole.
    return summary


def _diverged(error: NonFiniteLossError, position: Position, out: Path) -> NonFiniteLossError:
    kept = position.epoch - 1 if position.best is None else position.best[1]
    there = f"{out / files.MODEL} holds epoch {kept}" if kept else "no epoch had been finished"
    return NonFiniteLossError(f"training stopped in epoch {position.epoch}: {error}. {there}")


def _close_epoch(run: Run, position: Position, progress: Progress) -> None:
    """Evaluate, choose the network if it is to be chosen, and move on to the next epoch."""
    row = _history_row(run, position)
    position.history.append(row)
    position.epoch_seconds.append(position.seconds)
    column = _CHOSEN_BY.get(run.settings.select)
    if column is not None and (position.best is None or row[column] < position.best[0]):
        position.best = (row[column], position.epoch)
    progress.epoch_done(row, position.seconds)
    position.epoch, position.batches_done, position.seconds = position.epoch + 1, 0, 0.0
    position.means = _no_means(run)


def _write_results(run: Run, position: Position, out: Path) -> None:
    """Write the files that belong to a checkpoint at the end of an epoch: the history, and the network if it is kept.

    They come after the checkpoint, and are written again when a run is resumed that was killed in between.
    """
    epoch = position.epoch - 1
    if epoch == 0 or position.batches_done:
        return
    if position.best is None or position.best[1] == epoch:
        files.remove_certificates(out)
        save_model(out / files.MODEL, run.evaluated.wrapped, run.architecture, run.settings, epoch)
    write_csv(out / HISTORY, position.history)


def _history_row(run: Run, position: Position) -> dict[str, float]:
    means = position.means.read()
    row = {
        "epoch": position.epoch,
        "eps": position.eps,
        "lr": learning_rate(run.settings, position.epoch),
        **{f"train_{name}" if name.endswith("error") else name: value for name, value in means.items()},
        **_errors(run, position),
    }
    return row | _layer_figures(run)


def _errors(run: Run, position: Position) -> dict[str, float]:
    """Errors on the test set and on samples held out; bounds are checked in the first epoch, and before the summary."""
    broadcast_buffers(run.evaluated.wrapped)
    nothing = math.nan
    row = {"standard_error": nothing, "verified_error": nothing}
    check, eps = position.epoch == 1, run.settings.eps
    if run.settings.evaluate_test == "every-epoch":
        found = evaluate(run.evaluated, run.test_batches, eps, restarts=0, check=check, over_ranks=True)
        row = {"standard_error": found.standard_error.value, "verified_error": found.verified_error.value}
    elif check:
        evaluate(run.evaluated, next(iter(run.test_batches)), eps, restarts=0)
    if run.validation_batches is not None:
        found = evaluate(run.evaluated, run.validation_batches, eps, restarts=0, check=False, over_ranks=True)
        row["validation_standard_error"] = found.standard_error.value
        row["validation_verified_error"] = found.verified_error.value
    return row


def _layer_figures(run: Run) -> dict[str, float]:
    """Every ReLU layer's figures at the target ε, over some of the test samples."""
    found = inspect(run.evaluated.eval(), run.inspected, run.settings.eps)
    return {"dead": found.dead, "input_half_width": found.input_half_width, **history_columns(found.relus)}
