"""What one step of the objective computes, as a function of tensors alone.

loss = L_robust + λ·(1 − ε/ε_max)·(L_tight + L_relu)    (Shi et al., NeurIPS 2021, section 3.3)

Before the ramp, at ε = 0, the clean cross-entropy takes the place of L_robust.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.recipe.losses import Robust, RobustLoss, ibp
from lirpa_fastwarmup.recipe.regularizers import Regularizer


class Phase(Enum):
    """Where training stands: what a step computes is the same throughout each phase, up to numbers."""

    START = "before the ramp"
    RAMP = "in the ramp"
    FULL = "at full ε"

    @classmethod
    def at(cls, fraction: float) -> Phase:
        """The phase at the share ``fraction`` of the largest radius."""
        return cls.START if fraction == 0 else cls.RAMP if fraction < 1 else cls.FULL


@dataclass(frozen=True)
class Terms:
    """The terms of the loss in one phase, and their weights.

    Attributes:
        phase: of training.
        robust_loss: what bounds the cross-entropy in the ramp; before and after it is IBP.
        kappa: weight of the clean loss at the end of the ramp; ``None`` for the robust loss alone.
        reg_weight: λ.
        fading: regularisers with the weight λ·(1 − ε/ε_max).
        constant: penalties with weights of their own.
    """

    phase: Phase
    robust_loss: RobustLoss
    kappa: float | None = None
    reg_weight: float = 0.0
    fading: Mapping[str, Regularizer] = field(default_factory=dict)
    constant: Mapping[str, tuple[Regularizer, float]] = field(default_factory=dict)

    @property
    def need_bounds(self) -> bool:
        """Whether anything is computed from bounds."""
        return bool(self.fading or self.constant) or self.phase is not Phase.START


@dataclass(frozen=True)
class StepValues:
    """What one step computed: 0-dim tensors; ``None`` for what was not computed.

    Attributes:
        loss: the objective.
        clean_loss: cross-entropy of the clean batch.
        clean_error: share of the batch misclassified.
        robust_loss: upper bound on the cross-entropy over the box.
        verified_error: share of the batch not verified over the box.
        terms: regularisers and penalties by name, before their weights.
    """

    loss: Tensor
    clean_loss: Tensor
    clean_error: Tensor
    robust_loss: Tensor | None
    verified_error: Tensor | None
    terms: Mapping[str, Tensor]


def compute_step(
    terms: Terms, bounded: BoundedModule, x: Tensor, y: Tensor, box: Callable[[], Any], fraction: float | Tensor
) -> StepValues:
    """One step's loss and what it is made of, on the batch ``x``, ``y`` and the ``box`` around it, at ε/ε_max."""
    logits = bounded(x)
    clean_loss = F.cross_entropy(logits, y)
    clean_error = (logits.detach().argmax(1) != y).to(clean_loss.dtype).mean()
    # Autocast would round bounds more coarsely than they are apart.
    with torch.autocast(x.device.type, enabled=False):
        robust = _robust(terms, bounded, box(), y, logits.shape[1], fraction) if terms.need_bounds else None
        values = {name: term(bounded) for name, term in terms.fading.items()}
        values |= {name: term(bounded) for name, (term, _) in terms.constant.items()}
    loss = clean_loss
    if robust is not None and terms.phase is not Phase.START:
        loss = _mixed(clean_loss, robust.loss, terms.kappa, fraction)
    if terms.fading:
        loss = loss + terms.reg_weight * (1 - fraction) * sum(values[name] for name in terms.fading)
    for name, (_, weight) in terms.constant.items():
        loss = loss + weight * values[name]
    return StepValues(
        loss=loss,
        clean_loss=clean_loss,
        clean_error=clean_error,
        robust_loss=None if robust is None else robust.loss,
        verified_error=None if robust is None else 1 - robust.proved.to(clean_loss.dtype).mean(),
        terms=values,
    )


def _robust(
    terms: Terms, bounded: BoundedModule, box: Any, y: Tensor, classes: int, fraction: float | Tensor
) -> Robust:
    bound = terms.robust_loss if terms.phase is Phase.RAMP else ibp
    return bound(bounded, box, y, classes, fraction)


def _mixed(clean: Tensor, robust: Tensor, kappa: float | None, fraction: float | Tensor) -> Tensor:
    if kappa is None:
        return robust
    weight = 1 - (1 - kappa) * fraction
    return weight * clean + (1 - weight) * robust
