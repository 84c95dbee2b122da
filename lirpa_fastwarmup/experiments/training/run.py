"""A training run from its settings to its files, at once or resumed."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lirpa_fastwarmup import distributed, storage, version
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.graph import is_used
from lirpa_fastwarmup.experiments.training import checkpoint, interrupt, network
from lirpa_fastwarmup.experiments.training.build import Run, build_run
from lirpa_fastwarmup.experiments.training.checkpoint import CHECKPOINT, CURVES, HISTORY, MODEL, SUMMARY
from lirpa_fastwarmup.experiments.training.choices import choose
from lirpa_fastwarmup.experiments.training.loop import ADVERSARIAL, EpochMeans, Position, Progress, train_epoch
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.experiments.training.summary import history_row, summarise
from lirpa_fastwarmup.inspection.plots import save_training_curves
from lirpa_fastwarmup.recipe.losses import MTLIBP
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError
from lirpa_fastwarmup.verification.folder import WRITTEN as CERTIFICATES

logger = logging.getLogger(__name__)

_Device = str | torch.device
_SELECTED_BY = {"validation": "validation_verified_error", "test": "verified_error"}


def train(
    settings: Settings, out: Path, *, overwrite: bool = False, device: _Device = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Train and evaluate one network; write its files, and return the content of ``summary.json``.

    Every epoch rewrites ``model.pt``, ``history.csv`` and ``checkpoint.pt``, from which :func:`resume` continues. On
    SIGINT or SIGTERM, the run finishes the step, writes the checkpoint and raises :class:`TrainingInterrupted`.

    Args:
        out: folder of these files, ``summary.json`` and ``curves.png``; made if absent.
        overwrite: replace an earlier run in ``out``.

    Raises:
        OutputExistsError: ``out`` is not empty, and ``overwrite`` is off.
        OSError: data files are missing or unreadable, or ``out`` cannot be written to.
        ValueError, TypeError, ImportError, NotImplementedError: a setting is unknown, or contradicts others.
        NonFiniteLossError: the loss became NaN or infinite; ``model.pt`` holds the last whole epoch.
        TrainingInterrupted: a signal stopped the run.
    """
    started = time.perf_counter()
    with checkpoint.claimed(out, overwrite=overwrite):
        run = build_run(settings, torch.device(device))
        join_ranks(run)
        choose(run)
        ramp_end = settings.ramp_start + settings.ramp_length - 1
        if ramp_end > settings.epochs:
            text = "eps reaches %g only after %d epochs, and training ends after %d: the network is never trained at it"
            logger.warning(text, run.objective.schedule.max_eps, ramp_end, settings.epochs)
        return _run_to_end(run, Position(_no_means(run)), out, progress or Progress(), started, fresh=True)


def resume(
    out: Path,
    *,
    data_dir: Path | None = None,
    device: _Device = "cpu",
    progress: Progress | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Resume the run in ``out`` from its checkpoint; a finished run stays as it is. Returns what :func:`train` does.

    On the CPU, with the same number of threads, weights and history equal those of an uninterrupted run bit for bit.

    Args:
        data_dir: folder of the dataset's files, if they were moved.
        trust: import and call the factories of network and dataset that the checkpoint names.

    Raises:
        FileNotFoundError: ``out`` holds no checkpoint.
        UntrustedError: the checkpoint names a factory, and ``trust`` is off.
        ValueError: the checkpoint is damaged, from another version, or does not fit the current network or data.
        Exception: as :func:`train`.
    """
    started, path = time.perf_counter(), out / CHECKPOINT
    with checkpoint.claimed(out, overwrite=True):
        found: Any = None
        if distributed.world().is_rank_zero:
            found = checkpoint.read(path), storage.read_json(out / SUMMARY) if (out / SUMMARY).is_file() else None
        content, summary = distributed.broadcast(found)
        if summary is not None:
            return dict(summary)
        settings: Settings = content["settings"]
        network.require_trust(path, settings.model, settings.dataset, trust=trust)
        run = build_run(settings if data_dir is None else settings.replace(data_dir=data_dir), torch.device(device))
        join_ranks(run)
        position = Position(_no_means(run))
        checkpoint.restore(content, run, position, path)
        _write_results(run, position, out)  # The run may have been killed right after its checkpoint.
        return _run_to_end(run, position, out, progress or Progress(), started, fresh=False)


def settings_of_run(out: Path) -> Settings:
    """Return the settings of the run in ``out``, from its checkpoint; raises FileNotFoundError or ValueError."""
    return checkpoint.read(out / CHECKPOINT)["settings"]


def join_ranks(run: Run) -> None:
    """Average gradients over all processes from now on; raise ValueError, on all of them, if they differ in a run."""
    if distributed.world().size == 1:
        return
    samples = run.train_batches.split
    own = {
        "versions": f"{version.__version__}, auto_LiRPA {ENGINE_VERSION}, torch {torch.__version__}",
        "settings": json.dumps({**run.settings.as_dict(), "data_dir": None}),
        "data": f"{run.dataset_name}, {len(samples)} training samples, digest {samples.digest}",
        "network": str({name: tuple(value.shape) for name, value in run.objective.model.state_dict().items()}),
    }
    first, *others = distributed.all_gather(own)
    for rank, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                problem = f"rank {rank} has other {name} than rank 0 ({value}; rank 0: {first[name]})"
                raise ValueError(f"{problem}: to compute one run, give all machines the same code and data")
    unused = not all(is_used(run.objective.bounded, one) for one in run.objective.parameters() if one.requires_grad)
    devices = None if run.device.type == "cpu" else [run.device]
    run.trained = DistributedDataParallel(run.objective, device_ids=devices, find_unused_parameters=unused)


def _no_means(run: Run) -> EpochMeans:
    adversarial = ADVERSARIAL if isinstance(run.objective.loss, MTLIBP) else ()
    return EpochMeans(run.device, (*run.objective.penalties, *adversarial))


def _run_to_end(
    run: Run, position: Position, out: Path, progress: Progress, started: float, *, fresh: bool
) -> dict[str, Any]:
    started -= position.elapsed
    stop = interrupt.StopRequest(out)
    with interrupt.handled_by(stop.defer):
        while position.epoch <= run.settings.epochs:
            try:
                train_epoch(run, position, progress, stop)
            except NonFiniteLossError as error:
                kept = position.epoch - 1 if position.best is None else position.best[1]
                saved = f"{out / MODEL} holds epoch {kept}" if kept else "no epoch had been finished"
                raise NonFiniteLossError(f"training stopped in epoch {position.epoch}: {error}. {saved}") from error
            if position.batches_done == len(run.train_batches):
                _close_epoch(run, position, progress)
            position.elapsed = time.perf_counter() - started
            checkpoint.save(out, run, position, fresh=fresh)
            _write_results(run, position, out)
            fresh = False
            if stop.signal_number:
                stop.interrupt(stop.signal_number)
    with interrupt.handled_by(stop.interrupt):  # The checkpoint holds all that the summary is computed from.
        summary = summarise(run, position, out, started)
        if distributed.world().is_rank_zero:
            title = "{preset}, method {method}, ε = {eps:g}, seed {seed}".format_map(summary)
            try:
                save_training_curves(position.history, out / CURVES, title=title)
            except ImportError as error:  # Without matplotlib.
                logger.warning("%s was not drawn: %s", CURVES, error)
            summary["files"] = {HISTORY: storage.file_sum(out / HISTORY)}
            storage.write_json(out / SUMMARY, summary)  # Last: a run with a summary is complete.
    return summary


def _close_epoch(run: Run, position: Position, progress: Progress) -> None:
    row = history_row(run, position)
    position.history.append(row)
    position.epoch_seconds.append(position.seconds)
    column = _SELECTED_BY.get(run.settings.select)
    if column is not None and (position.best is None or row[column] < position.best[0]):
        position.best = (row[column], position.epoch)
    progress.epoch_done(row, position.seconds)
    position.epoch, position.batches_done, position.seconds = position.epoch + 1, 0, 0.0
    position.means = _no_means(run)


def _write_results(run: Run, position: Position, out: Path) -> None:
    """Write the history, and the network if it is kept, after the checkpoint at the end of an epoch."""
    epoch = position.epoch - 1
    if epoch == 0 or position.batches_done or not distributed.world().is_rank_zero:
        return
    if position.best is None or position.best[1] == epoch:
        checkpoint.remove(out, *CERTIFICATES)
        network.save_model(out / MODEL, run.evaluated.wrapped, run.architecture, run.settings, epoch)
    storage.write_atomically(out / HISTORY, storage.csv_text(position.history).encode())
