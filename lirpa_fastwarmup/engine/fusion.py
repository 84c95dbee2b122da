"""Loss fusion: CROWN-IBP bounds on the cross-entropy itself, at a cost that does not grow with the classes.

The cross-entropy of label y is log Σ_j exp(t_j) with t_j = z_j − z_y. IBP gives l_j ≤ t_j ≤ u_j; over that interval
the convex exp lies below its chord, exp(t) ≤ exp(u_j) + k_j (t − u_j), and the sum of the chords is one linear
function of the logits, so that one backward pass bounds it whatever the number of classes (Xu et al., NeurIPS
2020, section 3.3). auto_LiRPA reaches the same numbers through a graph with exp and gather in it, which not every
network converts to; here the network stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import crown_upper, other_classes


def log_sum_exp(upper: Tensor) -> Tensor:
    """log(1 + Σ_j exp(u_j)): the largest cross-entropy under ``upper`` bounds (batch, classes − 1) on z_j − z_y."""
    return torch.nn.functional.pad(upper, (1, 0)).logsumexp(1)


def fused_crown_loss(bounded: Any, lower: Tensor, upper: Tensor, labels: Tensor, classes: int) -> Tensor:
    """CROWN's upper bound on the cross-entropy over the box of the last IBP pass, shape (batch,).

    Args:
        bounded: a BoundedModule whose last pass was an IBP pass over the box; that pass's intermediate bounds are used.
        lower, upper: IBP bounds on z_j − z_y for j ≠ y, shape (batch, classes − 1).
        labels: classes y (batch,).
        classes: outputs of the network.
    """
    # A constant that keeps exp finite; the result does not depend on it, so it carries no gradient.
    shift = upper.detach().amax(1, keepdim=True).clamp(min=0)
    at_upper = (upper - shift).exp()
    slope = at_upper * _chord(upper - lower)
    linear = crown_upper(bounded, _direction(slope, labels, classes)).squeeze(1)
    own = (-shift).exp().squeeze(1)  # The summand of j = y.
    total = own + (at_upper - slope * upper).sum(1) + linear
    # Where rounding decides, the bound is raised: to the error of such a sum, and to what the loss is at least.
    terms = (own + at_upper.sum(1) + (slope * upper).abs().sum(1) + linear.abs()).detach()
    loss = torch.maximum(total, torch.finfo(total.dtype).eps * terms).log() + shift.squeeze(1)
    return torch.maximum(loss, log_sum_exp(lower))


def _direction(slope: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Σ_j k_j (e_j − e_y), shape (batch, 1, classes)."""
    rows = slope.new_zeros(len(labels), classes).scatter(1, other_classes(labels, classes), slope)
    return rows.scatter(1, labels.unsqueeze(1), -slope.sum(1, keepdim=True)).unsqueeze(1)


def _chord(width: Tensor) -> Tensor:
    """(1 − exp(−width))/width: the slope of exp's chord over an interval, relative to exp at its upper end."""
    small = width < 1e-3
    safe = torch.where(small, torch.ones_like(width), width)
    return torch.where(small, 1 - width / 2 + width.square() / 6, -torch.expm1(-safe) / safe)


def mixed_log(one: Tensor, other: Tensor, weight: float | Tensor) -> Tensor:
    """log(weight·exp(one) + (1 − weight)·exp(other)), for 0 < weight ≤ 1, without overflow."""
    weight = torch.as_tensor(weight, dtype=one.dtype, device=one.device)
    return torch.logaddexp(one + weight.log(), other + torch.log1p(-weight))
