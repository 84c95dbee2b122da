"""What a run reports: the rows of its history, and the summary of the network that it keeps."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lirpa_fastwarmup import distributed, storage, version
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.precision import temporarily
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training.build import Run
from lirpa_fastwarmup.experiments.training.checkpoint import MODEL
from lirpa_fastwarmup.experiments.training.loop import Position, learning_rate
from lirpa_fastwarmup.experiments.training.network import load_weights, read_model
from lirpa_fastwarmup.inspection.layers import inspect
from lirpa_fastwarmup.inspection.statistics import history_columns
from lirpa_fastwarmup.verification import evaluate

_PRECISE_BATCH = 1000
_SELECTION = {
    "last": "the last epoch",
    "validation": "the best epoch by verified error on the held-out part of the training set",
    "test": "the best epoch by verified error on the test set itself: these errors are optimistic",
}


def history_row(run: Run, position: Position) -> dict[str, float]:
    """The row of ``history.csv`` for the epoch that just ended, with errors on test and held-out samples.

    Bounds are checked in the first epoch, and before the summary.
    """
    row = {"epoch": position.epoch, "eps": position.eps, "lr": learning_rate(run.settings, position.epoch)}
    for name, mean in position.means.read().items():
        row[f"train_{name}" if name.endswith("error") else name] = mean
    row |= {"standard_error": math.nan, "verified_error": math.nan}
    _recompute_statistics(run)
    check, eps = position.epoch == 1, run.settings.eps
    options: dict[str, Any] = {"restarts": 0, "input_range": run.input_range}
    if run.settings.evaluate_test == "every-epoch":
        found = evaluate(run.evaluated, run.test_batches, eps, **options, check=check, over_ranks=True)
        row |= {"standard_error": found.standard_error.value, "verified_error": found.verified_error.value}
    elif check:
        evaluate(run.evaluated, next(iter(run.test_batches)), eps, **options)
    if run.validation_batches is not None:
        found = evaluate(run.evaluated, run.validation_batches, eps, **options, check=False, over_ranks=True)
        row["validation_standard_error"] = found.standard_error.value
        row["validation_verified_error"] = found.verified_error.value
    layers = inspect(run.evaluated.eval(), run.inspected, eps, input_range=run.input_range)
    return {**row, "dead": layers.dead, "input_half_width": layers.input_half_width, **history_columns(layers.relus)}


@torch.no_grad()
def _recompute_statistics(run: Run) -> None:
    """Replace running statistics by means over the training set; other modules, as Dropout, do not train meanwhile."""
    network, seen = run.evaluated.wrapped, 0
    if run.settings.precise_bn or run.settings.swa_start is not None:  # A mean of weights has no statistics of its own.
        network.train()  # Which may leave BatchNorm alone that the network keeps frozen.
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
        network.eval()
        with temporarily(norms, "momentum", None):
            for norm in norms:
                norm.reset_running_stats()
                norm.training = True
            batches = data.Batches(run.train_batches.split, _PRECISE_BATCH, drop_single=True, device=run.device)
            for x, _ in batches if norms else ():
                seen += len(x)
                for norm in norms:
                    norm.momentum = len(x) / seen
                network(x)
        network.eval()
    distributed.broadcast_buffers(network)


def summarise(run: Run, position: Position, out: Path, started: float) -> dict[str, Any]:
    """Select the weights, compute their errors, and return the content of ``summary.json``."""
    settings, network = run.settings, run.evaluated.wrapped
    if settings.select != "last":
        if distributed.world().is_rank_zero:
            load_weights(network, read_model(out / MODEL)["state_dict"], out / MODEL)
        network.load_state_dict(distributed.broadcast(network.state_dict()))
    options: dict[str, Any] = {"pgd_steps": settings.pgd_steps, "restarts": settings.pgd_restarts}
    options |= {"input_range": run.input_range, "seed": settings.seed, "over_ranks": True}
    errors = evaluate(run.evaluated, run.test_batches, settings.eps, **options)
    return {
        **{name: getattr(settings, name) for name in ("preset", "method", "model", "seed", "eps", "epochs")},
        "dataset": run.dataset_name,
        "train_samples": len(run.train_batches.split),
        "validation_samples": settings.validation,
        "test_samples": len(run.test_batches.split),
        "processes": distributed.world().size,
        "selected_epoch": len(position.history) if position.best is None else position.best[1],
        "selected_by": _SELECTION[settings.select],
        "standard_error": errors.standard_error.value,
        "pgd_error": None if errors.pgd_error is None else errors.pgd_error.value,
        "verified_error": errors.verified_error.value,
        "seconds": time.perf_counter() - started,
        "train_seconds_per_epoch": sum(position.epoch_seconds) / len(position.epoch_seconds),
        "device": str(run.device),
        "package": version.__version__,
        "engine": f"auto_LiRPA {ENGINE_VERSION}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "untested": list(run.evaluated.untested),
        "weights": storage.weights_sum(network.state_dict()),
        "settings": settings.as_dict(),
    }
