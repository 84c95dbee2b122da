"""Everything that determines a training run, in one typed, printable object."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run.

    Attributes:
        preset: name of the preset that the others were taken from.
        dataset: name of the dataset.
        data_dir: folder of its files; ``None`` for the default.
        data_limit: samples drawn from the training set; ``None`` for all.
        eps: target radius, in units of the input (pixels from 0 to 1).
        batch_size, epochs: samples in a batch, passes over the training set.
        ramp_start: epoch, counted from 1, at whose start ε begins to grow.
        ramp_length: epochs that it grows for.
        lr, lr_milestones, lr_factor: Adam's learning rate, multiplied after so many finished epochs.
        grad_clip: largest norm of the gradient.
        reg_weight, tol: λ and τ of the regularisers.
        width, hidden: size of the CNN-7.
        init, batchnorm, regularizers: the three remedies.
        pgd_steps, pgd_restarts: the attack after training.
        seed: of weights, order of samples and attack.
    """

    preset: str
    dataset: str
    eps: float
    batch_size: int
    epochs: int
    ramp_start: int
    ramp_length: int
    lr_milestones: tuple[int, ...]
    width: int
    hidden: int
    data_dir: Path | None = None
    data_limit: int | None = None
    lr: float = 5e-4
    lr_factor: float = 0.2
    grad_clip: float = 10.0
    reg_weight: float = 0.5
    tol: float = 0.5
    init: bool = True
    batchnorm: bool = True
    regularizers: bool = True
    pgd_steps: int = 50
    pgd_restarts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and 0 < self.eps <= 1):
            raise ValueError(
                f"eps must be above 0 and at most 1, the width of the input range [0, 1]; found {self.eps}"
            )
        for name in ("batch_size", "epochs", "width", "hidden", "ramp_start"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("ramp_length", "pgd_steps", "pgd_restarts", "reg_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, found {getattr(self, name)}")
        for name in ("lr", "lr_factor", "grad_clip", "tol"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 − 1, found {self.seed}")

    def replace(self, **changes: Any) -> Settings:
        """The same with some values changed."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON and for checkpoints."""
        values = dataclasses.asdict(self)
        values["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        values["lr_milestones"] = list(self.lr_milestones)
        return values

    def __str__(self) -> str:
        values = self.as_dict()
        width = max(map(len, values))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())
