"""A training run from its settings to its files, in one go or in several."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from lirpa_fastwarmup.distributed import from_leader, present
from lirpa_fastwarmup.inspection.figures import history_columns
from lirpa_fastwarmup.inspection.inspect import inspect
from lirpa_fastwarmup.inspection.records import HISTORY, SUMMARY
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError
from lirpa_fastwarmup.storage import write_csv, write_json
from lirpa_fastwarmup.training import checkpoint, files
from lirpa_fastwarmup.training.build import Run, build_run
from lirpa_fastwarmup.training.interrupt import deferred_signals, raising_signals
from lirpa_fastwarmup.training.loop import Position, learning_rate, train_epoch
from lirpa_fastwarmup.training.network import save_model
from lirpa_fastwarmup.training.progress import EpochMeans, Listeners, Progress
from lirpa_fastwarmup.training.ranks import join_ranks, over_ranks
from lirpa_fastwarmup.training.settings import Settings
from lirpa_fastwarmup.training.summary import draw_curves, summarise
from lirpa_fastwarmup.verification import check_ibp, standard_error, verified_error

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
    if present().leads:
        files.prepare(out, overwrite=overwrite)
    started = time.perf_counter()
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
) -> dict[str, Any]:
    """Go on with the run in ``out`` from its checkpoint, to the same end that it would have come to unbroken.

    On the CPU with the same number of threads, weights and history are those of the unbroken run bit for bit. A run
    that is finished already is left as it is.

    Args:
        out: the run's folder.
        data_dir: where its data is now, if it was moved.
        device, progress: as of :func:`train`.

    Returns:
        The content of ``summary.json``.

    Raises:
        FileNotFoundError: ``out`` holds no checkpoint.
        ValueError: the checkpoint is damaged, of another version, or of another network or data than its settings
            give now.
        Exception: as :func:`train`.
    """
    path = out / files.CHECKPOINT
    left: Any = from_leader(_left_in(out) if present().leads else None)
    content, summary = left
    if summary is not None:
        return dict(summary)
    started = time.perf_counter()
    settings: Settings = content["settings"]
    run = build_run(settings if data_dir is None else settings.replace(data_dir=data_dir), torch.device(device))
    join_ranks(run)
    position = Position(_no_means(run))
    checkpoint.restore(content, run, position, path)
    return _to_the_end(run, position, out, progress or Listeners(), started, fresh=False)


def _left_in(out: Path) -> Any:
    """The checkpoint in ``out``, and the summary if the run is finished."""
    content = checkpoint.read(out / files.CHECKPOINT)
    if (out / SUMMARY).is_file():
        return content, json.loads((out / SUMMARY).read_text())
    files.prepare(out, overwrite=True)
    return content, None


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
            if fresh and run.ranks.leads:
                files.remove_earlier_run(out)  # Not before there is something to put in its place.
            fresh = False
            if position.batches_done == len(run.train_batches):
                _close_epoch(run, position, out, progress)
            position.elapsed = time.perf_counter() - started
            checkpoint.save(path, run, position)
            stop.raise_if_asked()
    with raising_signals(out):
        summary = summarise(run, position, out, started)
    if run.ranks.leads:
        write_json(out / SUMMARY, summary)
        draw_curves(position.history, run.settings, out / files.CURVES)
    return summary


def _diverged(error: NonFiniteLossError, position: Position, out: Path) -> NonFiniteLossError:
    kept = position.epoch - 1 if position.best is None else position.best[1]
    there = f"{out / files.MODEL} holds epoch {kept}" if kept else "no epoch had been finished"
    return NonFiniteLossError(f"training stopped in epoch {position.epoch}: {error}. {there}")


def _close_epoch(run: Run, position: Position, out: Path, progress: Progress) -> None:
    """Evaluate, keep the network if it is to be kept, write the history, and move on to the next epoch."""
    row = _history_row(run, position)
    position.history.append(row)
    position.epoch_seconds.append(position.seconds)
    column = _CHOSEN_BY.get(run.settings.select)
    if column is None or position.best is None or row[column] < position.best[0]:
        position.best = None if column is None else (row[column], position.epoch)
        if run.ranks.leads:
            files.remove_certificates(out)
            save_model(out / files.MODEL, run.evaluated.wrapped, run.architecture, run.settings, position.epoch)
    if run.ranks.leads:
        write_csv(out / HISTORY, position.history)
    progress.epoch_done(row, position.seconds)
    position.epoch, position.batches_done, position.seconds = position.epoch + 1, 0, 0.0
    position.means = _no_means(run)


def _history_row(run: Run, position: Position) -> dict[str, float]:
    eps = run.settings.eps
    if position.epoch == 1:
        check_ibp(run.evaluated, run.test_batches, eps)
    means = position.means.read()
    row = {
        "epoch": position.epoch,
        "eps": position.eps,
        "lr": learning_rate(run.settings, position.epoch),
        **{f"train_{name}" if name.endswith("error") else name: value for name, value in means.items()},
        "standard_error": over_ranks(standard_error(run.plain, run.test_batches), run.test_batches),
        "verified_error": over_ranks(verified_error(run.evaluated, run.test_batches, eps), run.test_batches),
    }
    held_out = run.validation_batches
    if held_out is not None:
        row["validation_standard_error"] = over_ranks(standard_error(run.plain, held_out), held_out)
        row["validation_verified_error"] = over_ranks(verified_error(run.evaluated, held_out, eps), held_out)
    return row | _layer_figures(run)


def _layer_figures(run: Run) -> dict[str, float]:
    """Every ReLU layer's figures at the target ε, over some of the test samples."""
    found = inspect(run.evaluated.eval(), run.inspected, run.settings.eps)
    return {"dead": found.dead, "input_half_width": found.input_half_width, **history_columns(found.relus)}
