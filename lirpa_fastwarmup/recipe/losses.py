"""The robust cross-entropy: an upper bound on the worst-case loss over the box, by IBP or CROWN-IBP.

CE(−m, y) with lower bounds m_j on the margins z_y − z_j and m_y = 0. CROWN-IBP (Zhang et al., ICLR 2020) mixes the
bounds of both methods, w·CROWN-IBP + (1 − w)·IBP with w = 1 − ε/ε_max: CROWN's tight ones carry the beginning of
the ramp, IBP's cheap ones its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import crown_lower, ibp_margin_bounds, ibp_margins, margin_matrix, proved
from lirpa_fastwarmup.engine.fusion import fused_crown_loss, log_sum_exp, mixed_log


@dataclass(frozen=True)
class Robust:
    """The robust loss (0-dim), and for each sample whether its margins were proved positive."""

    loss: Tensor
    proved: Tensor


class RobustLoss(Protocol):
    """Bounds a classifier over a box, after a clean pass of the same batch."""

    def __call__(self, bounded: Any, box: Any, labels: Tensor, classes: int, fraction: float | Tensor) -> Robust:
        """The robust loss at the share ``fraction`` of the largest radius, from 0 to less than 1."""
        ...


def ibp(bounded: Any, box: Any, labels: Tensor, classes: int, fraction: float | Tensor) -> Robust:
    """Over IBP bounds."""
    lower = ibp_margins(bounded, box, labels, classes, reuse_statistics=True)
    return Robust(log_sum_exp(-lower).mean(), proved(lower))


def crown_ibp(bounded: Any, box: Any, labels: Tensor, classes: int, fraction: float | Tensor) -> Robust:
    """Over mixed margins: one backward pass of CROWN with classes − 1 rows."""
    lower = ibp_margins(bounded, box, labels, classes, reuse_statistics=True)
    crown = crown_lower(bounded, margin_matrix(labels, classes, lower.dtype))
    mixed = (1 - fraction) * crown + fraction * lower
    return Robust(log_sum_exp(-mixed).mean(), proved(torch.maximum(crown, lower)))


def fused_crown_ibp(bounded: Any, box: Any, labels: Tensor, classes: int, fraction: float | Tensor) -> Robust:
    """With loss fusion: bounds on Σ_j exp(z_j − z_y) are mixed, and CROWN's backward pass has one row.

    What is proved is told by the IBP margins, as CROWN's are not computed.
    """
    lower, upper = ibp_margin_bounds(bounded, box, labels, classes, reuse_statistics=True)
    loss = fused_crown_loss(bounded, -upper, -lower, labels, classes)
    loss = mixed_log(loss, log_sum_exp(-lower), 1 - fraction)
    return Robust(loss.mean(), proved(lower))


LOSSES: dict[str, RobustLoss] = {"ibp": ibp, "crown-ibp": crown_ibp, "crown-ibp-fused": fused_crown_ibp}
