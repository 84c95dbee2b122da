"""What a run comes to: the network that is kept, its errors, and the figures of ``summary.json``."""

from __future__ import annotations

import logging
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import update_bn

from lirpa_fastwarmup.distributed import broadcast, broadcast_buffers
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training import files
from lirpa_fastwarmup.experiments.training.build import Run
from lirpa_fastwarmup.experiments.training.loop import Position
from lirpa_fastwarmup.experiments.training.network import load_kept_weights, save_model
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.inspection.plots import save_training_curves
from lirpa_fastwarmup.storage import weights_sum
from lirpa_fastwarmup.verification import evaluate
from lirpa_fastwarmup.version import __version__

logger = logging.getLogger(__name__)

_PRECISE_BATCH = 1000
_SELECTION = {
    "last": "the last epoch",
    "validation": "the best epoch by verified error on the held-out part of the training set",
    "test": "the best epoch by verified error on the test set itself: these errors are optimistic",
}


def _finish_network(run: Run, position: Position, out: Path) -> int:
    """Put the weights that are kept into the evaluated network; return the epoch that they are of."""
    epoch = len(position.history) if position.best is None else position.best[1]
    network = run.evaluated.wrapped
    if run.settings.select != "last":
        if run.world.is_rank_zero:
            load_kept_weights(network, out / files.MODEL)
        network.load_state_dict(broadcast(network.state_dict()))
    if run.settings.precise_bn:
        update_bn(data.Batches(run.train, _PRECISE_BATCH, drop_single=True, device=run.device), network)
        if run.world.is_rank_zero:
            save_model(out / files.MODEL, network, run.architecture, run.settings, epoch)
    return epoch


def summarise(run: Run, position: Position, out: Path, started: float) -> dict[str, Any]:
    """Finish the network, take its errors, and return what ``summary.json`` holds."""
    settings = run.settings
    epoch = _finish_network(run, position, out)
    network = run.evaluated.wrapped
    broadcast_buffers(network)
    errors = evaluate(
        run.evaluated,
        run.test_batches,
        settings.eps,
        pgd_steps=settings.pgd_steps,
        restarts=settings.pgd_restarts,
        seed=settings.seed,
        over_ranks=True,
    )
    attacked = errors.pgd_error
    return {
        "preset": settings.preset,
        "method": settings.method,
        "model": settings.model,
        "dataset": run.dataset_name,
        "train_samples": len(run.train),
        "validation_samples": settings.validation,
        "test_samples": len(run.test_batches.split),
        "processes": run.world.size,
        "seed": settings.seed,
        "eps": settings.eps,
        "epochs": settings.epochs,
        "selected_epoch": epoch,
        "selected_by": _SELECTION[settings.select],
        "standard_error": errors.standard_error.value,
        "pgd_error": None if attacked is None else attacked.value,
        "verified_error": errors.verified_error.value,
        "seconds": time.perf_counter() - started,
        "train_seconds_per_epoch": sum(position.epoch_seconds) / len(position.epoch_seconds),
        "device": str(run.device),
        "package": __version__,
        "engine": f"auto_LiRPA {ENGINE_VERSION}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "git": _commit(),
        "untested": list(run.evaluated.untested),
        "weights": weights_sum(network.state_dict()),
        "settings": settings.as_dict(),
    }


def _commit() -> str:
    """The commit of the checkout that this package runs from, or "unknown" for an installed one."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def draw_curves(history: list[dict[str, float]], settings: Settings, path: Path) -> None:
    """Draw the curves of a run, where matplotlib is installed."""
    title = f"{settings.preset}, method {settings.method}, ε = {settings.eps:g}, seed {settings.seed}"
    try:
        save_training_curves(history, path, title=title)
    except ImportError as error:
        logger.warning("%s was not drawn: %s", path.name, error)
