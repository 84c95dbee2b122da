"""What a run tells while it goes on, and the means over an epoch that it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lirpa_fastwarmup.distributed import all_reduce, world
from lirpa_fastwarmup.recipe.objective import StepLoss


class Progress(Protocol):
    """Told what happens in a run."""

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        """Epoch ``epoch``, counted from 1, begins, or goes on after ``done`` of its ``batches``."""

    def step_done(self, means: Mapping[str, float]) -> None:
        """A batch is done; ``means`` over the epoch so far, empty where they were not read."""

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        """An epoch is done, with this row of the history; its training took ``seconds``."""


class Listeners:
    """Several :class:`Progress` as one; with none, silence."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        for listener in self._listeners:
            listener.epoch_started(epoch, batches, done)

    def step_done(self, means: Mapping[str, float]) -> None:
        for listener in self._listeners:
            listener.step_done(means)

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        for listener in self._listeners:
            listener.epoch_done(row, seconds)


_FIELDS = ("loss", "clean_loss", "robust_loss", "clean_error", "verified_error")
_TERMS = ("tightness", "relu_balance")


class EpochMeans:
    """Means of a step's figures over an epoch, weighted by batch size, kept on the device until read.

    A figure that was not computed in a step (NaN) counts in no mean; one that never was stays NaN.

    Args:
        device: where the steps are computed.
        terms: names of the objective's terms besides the paper's two, which always have a place.
    """

    def __init__(self, device: torch.device, terms: Sequence[str] = ()) -> None:
        self._terms = (*_TERMS, *(name for name in terms if name not in _TERMS))
        self._sums = torch.zeros(len(_FIELDS) + len(self._terms), device=device, dtype=torch.float64)
        self._counts = torch.zeros_like(self._sums)

    def add(self, step: StepLoss, count: int) -> None:
        """Take in a step over ``count`` samples."""
        nan = torch.full_like(step.loss, torch.nan)
        figures = [getattr(step, name) for name in _FIELDS] + [step.terms.get(name, nan) for name in self._terms]
        values = torch.stack([figure.detach() for figure in figures]).double()
        known = ~values.isnan()
        self._sums += torch.where(known, values * count, 0.0)
        self._counts += known * count

    def read(self) -> dict[str, float]:
        """The means so far, over all processes; this waits for the device, and for the other processes."""
        sums, counts = all_reduce(torch.stack([self._sums, self._counts]))
        means: Tensor = sums / counts
        return dict(zip((*_FIELDS, *self._terms), means.tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far, over all processes."""
        sums, counts = all_reduce(torch.stack([self._sums, self._counts]))
        return {"sums": sums, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave, which the first of the processes takes over."""
        share = 1.0 if world().is_rank_zero else 0.0
        self._sums.copy_(state["sums"] * share)
        self._counts.copy_(state["counts"] * share)
