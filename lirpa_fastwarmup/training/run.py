"""A training run from its settings to its files."""

from __future__ import annotations

import logging
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR

import lirpa_fastwarmup
from lirpa_fastwarmup import data, models
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.recipe.initialization import ibp_init_
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError, ShortWarmup
from lirpa_fastwarmup.recipe.schedule import SmoothedEpsilon
from lirpa_fastwarmup.training import files
from lirpa_fastwarmup.training.progress import EpochMeans, Progress, Silent
from lirpa_fastwarmup.training.settings import Settings
from lirpa_fastwarmup.verification import evaluate, standard_error, verified_error

logger = logging.getLogger(__name__)

_FORMAT = 1
_EVALUATION_BATCH = 250


@dataclass
class _Run:
    """What a run is made of, on its device."""

    settings: Settings
    objective: ShortWarmup
    optimizer: Adam
    lr_schedule: MultiStepLR
    train_batches: data.Batches
    test_batches: data.Batches
    architecture: dict[str, Any]
    dataset_name: str

    @property
    def bounded(self) -> BoundedModule:
        return self.objective.bounded


def train(
    settings: Settings,
    out: Path,
    *,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and evaluate one network; write ``summary.json``, ``history.csv``, ``model.pt``, ``curves.png``.

    ``model.pt`` and ``history.csv`` are written anew after every epoch.

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
        NonFiniteLossError: the loss became NaN or infinite; epoch, step and ε are in the text, and
            ``model.pt`` is that of the last whole epoch.
    """
    progress = progress or Silent()
    files.prepare(out, overwrite=overwrite)
    started = time.perf_counter()
    device = torch.device(device)
    # Everything random hangs on the seed, and the caller's random state stays as it is.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        run = _build(settings, device)
    ramp_end = settings.ramp_start + settings.ramp_length - 1
    if ramp_end > settings.epochs:
        logger.warning(
            "eps reaches %g only after %d epochs, and training ends after %d: the network is never trained at it",
            *(settings.eps, ramp_end, settings.epochs),
        )
    history: list[dict[str, float]] = []
    for epoch in range(1, settings.epochs + 1):
        progress.epoch_started(epoch, len(run.train_batches))
        row = _train_epoch(run, epoch, progress, out)
        if epoch == 1:
            files.remove_earlier_run(out)  # Not before there is something to put in its place.
        history.append(row)
        files.write_history(out / files.HISTORY, history)
        _save(run, epoch, out / files.MODEL)
        progress.epoch_done(row)
    summary = _summarise(run, history, started)
    files.write_json(out / files.SUMMARY, summary)
    _plot(history, settings, out / files.CURVES)
    return summary


def _build(settings: Settings, device: torch.device) -> _Run:
    dataset = data.load(settings.dataset, settings.data_dir)
    samples = dataset.train
    if settings.data_limit is not None:
        samples = data.limited(samples, settings.data_limit, seed=settings.seed)
    shuffle = torch.Generator().manual_seed(settings.seed)
    train_batches = data.Batches(
        samples.to(device), settings.batch_size, generator=shuffle, drop_single=settings.batchnorm
    )
    architecture: dict[str, Any] = {
        "in_shape": dataset.in_shape,
        "classes": dataset.classes,
        "width": settings.width,
        "hidden": settings.hidden,
        "batchnorm": settings.batchnorm,
    }
    model = models.cnn7(**architecture).to(device)
    bounded = BoundedModule(model, torch.zeros(2, *dataset.in_shape, device=device))
    if settings.init:
        ibp_init_(bounded)
    schedule = SmoothedEpsilon(settings.eps, settings.ramp_start, settings.ramp_length, len(train_batches))
    objective = ShortWarmup(
        bounded,
        schedule,
        reg_weight=settings.reg_weight,
        tol=settings.tol,
        regularizers=("tightness", "relu_balance") if settings.regularizers else (),
    )
    optimizer = Adam(objective.parameters(), lr=settings.lr)
    return _Run(
        settings=settings,
        objective=objective,
        optimizer=optimizer,
        lr_schedule=MultiStepLR(optimizer, list(settings.lr_milestones), gamma=settings.lr_factor),
        train_batches=train_batches,
        test_batches=data.Batches(dataset.test.to(device), _EVALUATION_BATCH),
        architecture=architecture,
        dataset_name=dataset.name,
    )


def _train_epoch(run: _Run, epoch: int, progress: Progress, out: Path) -> dict[str, float]:
    """Train for an epoch; return its row of the history."""
    started = time.perf_counter()
    objective, optimizer = run.objective.train(), run.optimizer
    device = next(objective.parameters()).device
    # Reading a figure waits for a GPU; on the CPU it costs nothing.
    interval = 1 if device.type == "cpu" else 20
    means = EpochMeans(device)
    lr = optimizer.param_groups[0]["lr"]
    try:
        for batch, (x, y) in enumerate(run.train_batches, start=1):
            step = objective(x, y)
            step.loss.backward()
            nn.utils.clip_grad_norm_(objective.parameters(), run.settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            objective.step()
            means.add(step, len(y))
            if batch % interval == 0 or batch == len(run.train_batches):
                objective.raise_pending_errors()
                progress.step_done({"eps": float(step.eps), **means.read()})
            else:
                progress.step_done({})
        _require_finite(run)
    except NonFiniteLossError as error:
        kept = f"{out / files.MODEL} holds epoch {epoch - 1}" if epoch > 1 else "no epoch had been finished"
        raise NonFiniteLossError(f"training stopped in epoch {epoch}: {error}. {kept}") from error
    run.lr_schedule.step()
    seconds = time.perf_counter() - started
    train = {f"train_{name}" if name.endswith("error") else name: value for name, value in means.read().items()}
    return {
        "epoch": epoch,
        "eps": float(step.eps),
        "lr": lr,
        **train,
        "standard_error": standard_error(run.bounded.wrapped, run.test_batches),
        "verified_error": verified_error(run.bounded, run.test_batches, run.settings.eps),
        "seconds": seconds,
    }


@torch.no_grad()
def _require_finite(run: _Run) -> None:
    """See that the last step of an epoch, after which no loss was taken, left a network to be kept."""
    model = run.bounded.wrapped.eval()
    x, _ = next(iter(run.test_batches))
    if not all(bool(value.isfinite().all()) for value in (*model.state_dict().values(), model(x))):
        raise NonFiniteLossError("the network's weights or outputs are no longer finite: lower the learning rate")


def _save(run: _Run, epoch: int, path: Path) -> None:
    content = {
        "format": _FORMAT,
        "epoch": epoch,
        "architecture": {"model": "cnn7", **run.architecture},
        "settings": run.settings.as_dict(),
        "state_dict": {name: value.cpu() for name, value in run.bounded.wrapped.state_dict().items()},
    }
    files.write_checkpoint(path, content)


def load_model(path: Path) -> nn.Module:
    """The trained network of a run, in evaluation mode on the CPU, from its ``model.pt``.

    Raises:
        ValueError: the file is no such checkpoint, or of a format that this version does not know.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load fails in many ways on what is none of its files.
        raise ValueError(f"{path} is no model written by lirpa_fastwarmup, or a damaged one") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no model of format {_FORMAT} written by lirpa_fastwarmup; found {found}")
    architecture = dict(content["architecture"])
    architecture.pop("model")
    model = models.cnn7(**architecture)
    model.load_state_dict(content["state_dict"])
    return model.eval()


def _summarise(run: _Run, history: list[dict[str, float]], started: float) -> dict[str, Any]:
    settings = run.settings
    errors = evaluate(
        run.bounded,
        run.test_batches,
        settings.eps,
        pgd_steps=settings.pgd_steps,
        pgd_restarts=settings.pgd_restarts,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    return {
        "preset": settings.preset,
        "dataset": run.dataset_name,
        "train_samples": len(run.train_batches.split),
        "test_samples": len(run.test_batches.split),
        "seed": settings.seed,
        "eps": settings.eps,
        "epochs": settings.epochs,
        "standard_error": errors.standard,
        "pgd_error": errors.pgd,
        "verified_error": errors.verified,
        "seconds": time.perf_counter() - started,
        "train_seconds_per_epoch": sum(row["seconds"] for row in history) / len(history),
        "device": str(next(run.objective.parameters()).device),
        "package": lirpa_fastwarmup.__version__,
        "engine": f"auto_LiRPA {ENGINE_VERSION}",
        "torch": torch.__version__,
        "git": _commit(),
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


def _plot(history: list[dict[str, float]], settings: Settings, path: Path) -> None:
    try:
        from lirpa_fastwarmup.inspection.plots import save_training_curves
    except ImportError:
        logger.warning("%s was not drawn: matplotlib is missing (pip install 'lirpa_fastwarmup[plots]')", path.name)
        return
    save_training_curves(history, path, title=f"{settings.preset}, ε = {settings.eps:g}, seed {settings.seed}")
