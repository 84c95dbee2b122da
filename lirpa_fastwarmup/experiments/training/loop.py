"""The training loop: an epoch's steps, from wherever the epoch stands."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lirpa_fastwarmup.distributed import all_reduce
from lirpa_fastwarmup.engine.precision import products_in_tf32
from lirpa_fastwarmup.experiments.training.build import Run
from lirpa_fastwarmup.experiments.training.interrupt import StopRequest
from lirpa_fastwarmup.experiments.training.progress import EpochMeans, Progress
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError, StepLoss


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        means: over the steps of the present epoch.
        epoch: the present epoch, counted from 1.
        batches_done: of the present epoch.
        eps: radius of the latest step.
        seconds: that the present epoch's steps have taken.
        history: a row for each finished epoch.
        epoch_seconds: that the steps of each finished epoch took.
        best: where epochs are chosen by an error, the smallest one so far and its epoch.
        elapsed: seconds that the run has taken in all, up to its latest checkpoint.
    """

    means: EpochMeans
    epoch: int = 1
    batches_done: int = 0
    eps: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    best: tuple[float, int] | None = None
    elapsed: float = 0.0


def learning_rate(settings: Settings, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1."""
    rate = settings.lr
    for milestone in settings.lr_milestones:
        if epoch > milestone:
            rate *= settings.lr_factor
    return rate


def train_epoch(run: Run, position: Position, progress: Progress, stop: StopRequest) -> None:
    """Take the steps that are left of the present epoch, or as many as it takes until a stop is asked for.

    Raises:
        NonFiniteLossError: the loss or, after the last step, the network is NaN or infinite.
    """
    started = time.perf_counter() - position.seconds
    run.objective.train()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.settings, position.epoch)
    batches = len(run.train_batches)
    # Reading a figure waits for a GPU; on the CPU it costs nothing.
    interval = 1 if run.device.type == "cpu" else 20
    progress.epoch_started(position.epoch, batches, position.batches_done)
    if position.batches_done < batches:
        for x, y in run.train_batches:
            with products_in_tf32(run.settings.precision != "float32"):
                step = _take_step(run, position, x, y)
            position.batches_done += 1
            position.seconds = time.perf_counter() - started
            told: dict[str, float] = {}
            stopping = bool(stop)
            if run.world.size > 1:  # All of them, or none; asked where they wait for one another anyway.
                due = position.batches_done % interval == 0
                stopping = due and bool(all_reduce(torch.tensor(float(bool(stop)), device=run.device)) > 0)
            if position.batches_done % interval == 0 or position.batches_done == batches or stopping:
                run.objective.raise_pending_errors()
                position.eps = float(step.eps)
                told = {"eps": position.eps, **position.means.read()}
            progress.step_done(told)
            if stopping:
                stop.agree()
                break
    if position.batches_done == batches:
        _require_finite(run)


def _take_step(run: Run, position: Position, x: Tensor, y: Tensor) -> StepLoss:
    """One optimiser's step; its batch is computed in parts, whose gradients add up to that of the mean loss."""
    parts = _parts(run.settings, x, y)
    # Gradients are averaged over the processes, whose shares of the last batch may differ by a sample.
    share = run.train_batches.samples_in(position.batches_done) / run.world.size
    for part_x, part_y in parts:
        last = part_y is parts[-1][1]
        with _without_averaging(run) if not last else nullcontext():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"):
                step: StepLoss = run.trained(part_x, part_y)
            (step.loss * (len(part_y) / share)).backward()
        position.means.add(step, len(part_y))
    if run.settings.grad_clip:
        nn.utils.clip_grad_norm_(run.objective.parameters(), run.settings.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.objective.step()
    if run.average is not None:
        run.average.update_parameters(run.objective.model)
    return step


def _without_averaging(run: Run) -> AbstractContextManager[None]:
    """Gradients of a part that others follow stay where they are."""
    return run.trained.no_sync() if isinstance(run.trained, DistributedDataParallel) else nullcontext()


def _parts(settings: Settings, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    # Every part keeps two samples, which BatchNorm needs.
    count = max(1, min(settings.accumulate, len(y) // 2 if settings.batchnorm else len(y)))
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


@torch.no_grad()
def _require_finite(run: Run) -> None:
    """See that the last step of an epoch, after which no loss was taken, left a network to be kept."""
    bounded = run.objective.bounded.eval()
    x, _ = next(iter(run.test_batches))
    if not all(bool(value.isfinite().all()) for value in (*bounded.state_dict().values(), bounded(x))):
        raise NonFiniteLossError("the network's weights or outputs are no longer finite: lower the learning rate")
