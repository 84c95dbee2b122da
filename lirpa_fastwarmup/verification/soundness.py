"""A bound is only believed as far as no point contradicts it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import margin_matrix

# Rounding that bounds may be off by, as a share of the largest margin's size.
_SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}


class UnsoundBoundError(Exception):
    """A point of a box contradicts a bound over it: the engine is wrong, and none of its certificates can be believed.

    Attributes:
        contradictions: what was found, one sentence each.
        result: all that was computed nevertheless.
    """

    def __init__(self, contradictions: Sequence[str], result: object = None) -> None:
        more = f" (and {len(contradictions) - 1} more)" if len(contradictions) > 1 else ""
        super().__init__(
            f"the bounds are not sound, and no certificate of this verification can be believed: {contradictions[0]}"
            f"{more}. Compare with the other release of auto_LiRPA; lirpa-fastwarmup info names the one in use"
        )
        self.contradictions = list(contradictions)
        self.result = result


def class_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − z_j for every class j ≠ y, shape (batch, classes − 1)."""
    return (margin_matrix(labels, logits.shape[1], logits.dtype) @ logits.unsqueeze(2)).squeeze(2)


def contradicted(lower: Tensor, attained: Tensor) -> Tensor:
    """Which samples have a margin, attained at a point of the box, below its lower bound; shape (batch,).

    Args:
        lower: lower bounds on the margins, shape (batch, classes − 1).
        attained: margins at a point of each box, same shape.
    """
    slack = _SLACK[lower.dtype] * (1 + torch.maximum(lower.abs(), attained.abs()).amax(1, keepdim=True))
    return (attained < lower - slack).any(1)
