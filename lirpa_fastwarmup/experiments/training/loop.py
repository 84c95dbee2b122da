"""The training loop: the steps of an epoch, from its start or from where a run stopped in it, and their progress."""

import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lirpa_fastwarmup.distributed import all_reduce, world
from lirpa_fastwarmup.engine.precision import products_in_tf32
from lirpa_fastwarmup.experiments.data.dataset import seed_of
from lirpa_fastwarmup.experiments.training import build, interrupt
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError, StepLoss

_ATTACK = 3  # The stream of random numbers for the loss's attack.
_SWA_INTERVAL = 10  # Steps, as in CTBench.
_ALWAYS = ("loss", "clean_loss", "robust_loss", "clean_error", "verified_error", "tightness", "relu_balance")
ADVERSARIAL = ("adversarial_loss", "adversarial_error")


class Progress:
    """Shows the progress of a run; this one shows nothing."""

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        """Epoch ``epoch``, counted from 1, starts, or resumes after ``done`` of its ``batches``."""

    def step_done(self, means: Mapping[str, float]) -> None:
        """A step is done; ``means`` over the epoch so far, empty if they were not read."""

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        """An epoch is done, with this row of the history, after ``seconds`` of training."""


class EpochMeans:
    """Means of a step's metrics over an epoch, weighted by batch size; NaN, which was not computed, does not count.

    ``terms`` are the names of terms of the loss, and of metrics, that not every run has.
    """

    def __init__(self, device: torch.device, terms: Sequence[str] = ()) -> None:
        self._names = list(dict.fromkeys((*_ALWAYS, *terms)))
        self._totals = torch.zeros(2, len(self._names), device=device, dtype=torch.float64)  # Sums and sample counts.

    def add(self, step: StepLoss, count: int) -> None:
        """Add a step over ``count`` samples."""
        metrics, nan = {**step.terms, **vars(step)}, torch.full_like(step.loss, torch.nan)
        values = torch.stack([metrics.get(name, nan).detach() for name in self._names]).double()
        known = ~values.isnan()
        self._totals += torch.stack([torch.where(known, values * count, 0.0), known * count])

    def read(self) -> dict[str, float]:
        """The means so far, over all processes. Waits for the device and the other processes."""
        sums, counts = self.state_dict().values()
        return dict(zip(self._names, (sums / counts).tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far, over all processes."""
        sums, counts = all_reduce(self._totals.clone())
        return {"sums": sums, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the sums in ``state``, which rank 0 takes over."""
        self._totals.copy_(torch.stack([state["sums"], state["counts"]]) * world().is_rank_zero)


@dataclass
class Position:
    """The position of a run: the current epoch, and what is known of the epochs before."""

    means: EpochMeans  # Of the current epoch.
    epoch: int = 1
    batches_done: int = 0  # In the current epoch.
    eps: float = 0.0  # Of the latest step.
    seconds: float = 0.0  # Training time of the current epoch.
    history: list[dict[str, float]] = field(default_factory=list)  # A row for each finished epoch.
    epoch_seconds: list[float] = field(default_factory=list)  # Training time of each finished epoch.
    best: tuple[float, int] | None = None  # The smallest error and its epoch, if the best epoch is kept.
    elapsed: float = 0.0  # Seconds of the run up to its latest checkpoint.


def learning_rate(settings: Settings, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1."""
    return math.prod((settings.lr_factor for passed in settings.lr_milestones if epoch > passed), start=settings.lr)


def train_epoch(run: build.Run, position: Position, progress: Progress, stop: interrupt.StopRequest) -> None:
    """Run the remaining steps of the current epoch, until a stop is asked for."""
    started = time.perf_counter() - position.seconds
    run.objective.train()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.settings, position.epoch)
    batches = len(run.train_batches)
    interval = 1 if run.device.type == "cpu" else 20  # Reading a metric waits for a GPU.
    progress.epoch_started(position.epoch, batches, position.batches_done)
    for x, y in run.train_batches:
        with products_in_tf32(run.settings.precision != "float32"):
            step = _take_step(run, position, x, y)
        position.batches_done += 1
        position.seconds = time.perf_counter() - started
        metrics: dict[str, float] = {}
        due = position.batches_done % interval == 0
        stopping = stop.signal_number > 0
        if world().size > 1:  # All processes stop or none, after a step that synchronises them anyway.
            stopping = due and bool(all_reduce(torch.tensor(float(stopping), device=run.device)) > 0)
        if due or position.batches_done == batches or stopping:
            run.objective.raise_pending_errors()
            position.eps = float(step.eps)
            metrics = {"eps": position.eps, **position.means.read()}
        progress.step_done(metrics)
        if stopping:
            stop.signal_number = stop.signal_number or signal.SIGTERM  # Another process may have been asked.
            break
    if position.batches_done == batches:
        _require_finite(run)


def _take_step(run: build.Run, position: Position, x: Tensor, y: Tensor) -> StepLoss:
    """Update the weights; the gradients of the micro-batches add up to that of the batch's mean loss."""
    # Gradients are averaged over the processes, whose parts of the last batch may differ by a sample.
    samples = run.train_batches.samples_in(position.batches_done)
    count, samples_each = run.micro_batches(samples), samples / world().size
    generator = run.objective.generator
    for number, (micro_x, micro_y) in enumerate(zip(x.tensor_split(count), y.tensor_split(count), strict=True), 1):
        last = number == count
        if generator is not None:  # A run that resumes draws the same.
            generator.manual_seed(seed_of(run.settings.seed, _ATTACK, run.objective.steps_done, number, world().rank))
        with run.trained.no_sync() if isinstance(run.trained, DistributedDataParallel) and not last else nullcontext():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"):
                step: StepLoss = run.trained(micro_x, micro_y)
            (step.loss * (len(micro_y) / samples_each)).backward()
        position.means.add(step, len(micro_y))
    if run.settings.grad_clip:
        nn.utils.clip_grad_norm_(run.objective.parameters(), run.settings.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.objective.step()
    if run.average is not None:
        first = run.settings.swa_start or 1
        early = position.epoch < first
        steps = run.objective.steps_done - (first - 1) * len(run.train_batches)  # From epoch `first` on.
        if early or run.settings.swa_start is None or steps % _SWA_INTERVAL == 1:
            run.average.update_parameters(run.objective.model)
        if early:
            run.average.n_averaged.zero_()  # Until then it is a copy.
    return step


@torch.no_grad()
def _require_finite(run: build.Run) -> None:
    bounded = run.objective.bounded.eval()
    x, _ = next(iter(run.test_batches))
    if not all(bool(value.isfinite().all()) for value in (*bounded.state_dict().values(), bounded(x))):
        raise NonFiniteLossError("the network's weights or outputs are no longer finite: lower the learning rate")
