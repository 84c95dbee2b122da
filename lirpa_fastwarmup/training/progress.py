"""What a run tells while it goes on, and the means over an epoch that it tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lirpa_fastwarmup.recipe.objective import StepLoss


class Progress(Protocol):
    """Told what happens in a run."""

    def epoch_started(self, epoch: int, batches: int) -> None:
        """Epoch ``epoch``, counted from 1, begins."""

    def step_done(self, means: Mapping[str, float]) -> None:
        """A batch is done; ``means`` over the epoch so far, empty where they were not read."""

    def epoch_done(self, row: Mapping[str, float]) -> None:
        """An epoch is done, with this row of the history."""


class Silent:
    """A :class:`Progress` that says nothing."""

    def epoch_started(self, epoch: int, batches: int) -> None: ...

    def step_done(self, means: Mapping[str, float]) -> None: ...

    def epoch_done(self, row: Mapping[str, float]) -> None: ...


_MEANS = ("loss", "clean_loss", "robust_loss", "tightness", "relu_balance", "clean_error", "verified_error")


class EpochMeans:
    """Means of a step's figures over an epoch, weighted by batch size, kept on the device until read.

    A figure that was not computed in a step (NaN) counts in no mean; one that never was stays NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_MEANS), device=device, dtype=torch.float64)
        self._counts = torch.zeros_like(self._sums)

    def add(self, step: StepLoss, count: int) -> None:
        """Take in a step over ``count`` samples."""
        values = torch.stack([getattr(step, name).detach() for name in _MEANS]).double()
        known = ~values.isnan()
        self._sums += torch.where(known, values * count, 0.0)
        self._counts += known * count

    def read(self) -> dict[str, float]:
        """The means so far; this waits for the device."""
        means: Tensor = self._sums / self._counts
        return dict(zip(_MEANS, means.tolist(), strict=True))
