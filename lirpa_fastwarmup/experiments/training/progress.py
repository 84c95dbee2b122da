"""Progress of a run: its interface, and the metrics averaged over an epoch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lirpa_fastwarmup.distributed import all_reduce, world
from lirpa_fastwarmup.recipe.objective import StepLoss

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
