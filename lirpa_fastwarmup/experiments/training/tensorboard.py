"""The history of a run for TensorBoard (needs the extra ``tensorboard``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """A :class:`~lirpa_fastwarmup.experiments.training.progress.Progress` that writes one scalar per column and epoch.

    Args:
        folder: where event files go; made at the first epoch's end.

    Raises:
        ImportError: tensorboard is not installed.
    """

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

    def epoch_started(self, epoch: int, batches: int, done: int) -> None: ...

    def step_done(self, means: Mapping[str, float]) -> None: ...

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        epoch = int(row["epoch"])
        if self._writer is None:
            # After a restart, what was logged of this epoch and later ones is void.
            self._writer = self._make_writer(self._folder, purge_step=epoch)
        for name, value in {**row, "seconds": seconds}.items():
            if name != "epoch" and math.isfinite(value):
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
