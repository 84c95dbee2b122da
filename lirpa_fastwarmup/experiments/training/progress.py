"""Progress of a run: its interface, the metrics averaged over an epoch, and logs for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.distributed import all_reduce, world
from lirpa_fastwarmup.recipe.objective import StepLoss

_FIELDS = ("loss", "clean_loss", "robust_loss", "clean_error", "verified_error")
_TERMS = ("tightness", "relu_balance")


class Progress:
    """Shows the progress of a run; this one shows nothing."""

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        """Epoch ``epoch``, counted from 1, starts, or resumes after ``done`` of its ``batches``."""

    def step_done(self, means: Mapping[str, float]) -> None:
        """A step is done; ``means`` over the epoch so far, empty if they were not read."""

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        """An epoch is done, with this row of the history, after ``seconds`` of training."""


class TensorBoard(Progress):
    """Logs the history of a run to ``folder``, made at the end of the first epoch: a scalar per column and epoch."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard logs need the tensorboard package: pip install 'lirpa_fastwarmup[tensorboard]'"
            ) from error
        self._make_writer = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        epoch = int(row["epoch"])
        if self._writer is None:
            # A resumed run logs this epoch and later ones again.
            self._writer = self._make_writer(self._folder, purge_step=epoch)
        for name, value in {**row, "seconds": seconds}.items():
            if name != "epoch" and math.isfinite(value):
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class EpochMeans:
    """Means of the metrics of a step over an epoch, weighted by batch size, on the device until read.

    A metric that a step did not compute (NaN) does not count; one that no step computed is NaN. The paper's two terms
    of the objective always have a place, next to ``terms``.
    """

    def __init__(self, device: torch.device, terms: Sequence[str] = ()) -> None:
        self._terms = (*_TERMS, *(name for name in terms if name not in _TERMS))
        self._sums = torch.zeros(len(_FIELDS) + len(self._terms), device=device, dtype=torch.float64)
        self._counts = torch.zeros_like(self._sums)

    def add(self, step: StepLoss, count: int) -> None:
        """Add a step over ``count`` samples."""
        nan = torch.full_like(step.loss, torch.nan)
        metrics = [getattr(step, name) for name in _FIELDS] + [step.terms.get(name, nan) for name in self._terms]
        values = torch.stack([metric.detach() for metric in metrics]).double()
        known = ~values.isnan()
        self._sums += torch.where(known, values * count, 0.0)
        self._counts += known * count

    def read(self) -> dict[str, float]:
        """The means so far, over all processes. Waits for the device and the other processes."""
        state = self.state_dict()
        means = state["sums"] / state["counts"]
        return dict(zip((*_FIELDS, *self._terms), means.tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far, over all processes."""
        sums, counts = all_reduce(torch.stack([self._sums, self._counts]))
        return {"sums": sums, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the sums in ``state``, which rank 0 takes over."""
        weight = 1.0 if world().is_rank_zero else 0.0
        self._sums.copy_(state["sums"] * weight)
        self._counts.copy_(state["counts"] * weight)
