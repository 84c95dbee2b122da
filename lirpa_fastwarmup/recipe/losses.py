"""Robust cross-entropy losses: upper bounds on the worst-case loss over a box, by IBP or CROWN-IBP.

The loss is CE(−m, y), with lower bounds m_j on the margins z_y − z_j and m_y = 0. CROWN-IBP (Zhang et al., ICLR 2020)
mixes the bounds of both methods, w·CROWN-IBP + (1 − w)·IBP with w = 1 − ε/ε_max: tight bounds early in the ramp, cheap
ones late. Call a loss after the clean forward pass of the same batch, whose BatchNorm statistics it uses:

Example:
    >>> logits = bounded(x)
    >>> robust = fw.losses.ibp(bounded, fw.input_box(x, 8 / 255), y, classes=10)
    >>> robust.loss.backward()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine import bounds


@dataclass(frozen=True)
class RobustLoss:
    """A robust loss: its mean over the batch (0-dim), and which samples are certified (batch,)."""

    loss: Tensor
    certified: Tensor


# (bounded, box, labels, classes, fraction) -> RobustLoss: over the BoundedTensor ``box``, at ``fraction`` = ε/ε_max.
LossFunction = Callable[[Any, Any, Tensor, int, float | Tensor], RobustLoss]


def ibp(bounded: Any, box: Any, labels: Tensor, classes: int, fraction: float | Tensor = 1.0) -> RobustLoss:
    """The loss from IBP bounds, whatever the ``fraction``."""
    lower = bounds.ibp_margins(bounded, box, labels, classes, reuse_statistics=True)
    return RobustLoss(bounds.log_sum_exp(-lower).mean(), bounds.proved(lower))


def crown_ibp(bounded: Any, box: Any, labels: Tensor, classes: int, fraction: float | Tensor) -> RobustLoss:
    """The loss from mixed margins; CROWN's backward pass has classes − 1 rows."""
    lower = bounds.ibp_margins(bounded, box, labels, classes, reuse_statistics=True)
    crown = bounds.crown_lower(bounded, bounds.margin_matrix(labels, classes, lower.dtype))
    mixed = (1 - fraction) * crown + fraction * lower
    return RobustLoss(bounds.log_sum_exp(-mixed).mean(), bounds.proved(torch.maximum(crown, lower)))


def crown_ibp_fused(bounded: Any, box: Any, labels: Tensor, classes: int, fraction: float | Tensor) -> RobustLoss:
    """CROWN-IBP with loss fusion: bounds on Σ_j exp(z_j − z_y) are mixed, and CROWN's backward pass has one row.

    Samples are certified by their IBP margins alone, because CROWN's margins are not computed.
    """
    lower, upper = bounds.ibp_margin_bounds(bounded, box, labels, classes, reuse_statistics=True)
    loss = bounds.fused_crown_loss(bounded, -upper, -lower, labels, classes)
    loss = bounds.mixed_log(loss, bounds.log_sum_exp(-lower), 1 - fraction)
    return RobustLoss(loss.mean(), bounds.proved(lower))


LOSSES: dict[str, LossFunction] = {"ibp": ibp, "crown-ibp": crown_ibp, "crown-ibp-fused": crown_ibp_fused}
