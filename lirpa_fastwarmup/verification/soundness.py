"""A bound is only believed as far as no point contradicts it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import input_box, margin_matrix
from lirpa_fastwarmup.engine.inputs import InputRange
from lirpa_fastwarmup.engine.methods import MarginBounds

PROBED = 16  # Samples on which a method shows once that it is exact at radius 0.
# Rounding that bounds may be off by, as a share of the largest margin's size.
_SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}
# The same where there is no box to be bounded, and the bounds are the network's own arithmetic.
_POINT_SLACK = {torch.float32: 1e-5, torch.float64: 1e-12}


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
    return (attained < lower - _SLACK[lower.dtype] * _scale(lower, attained)).any(1)


@torch.no_grad()
def misses_the_point(
    network: MarginBounds, x: Tensor, y: Tensor, method: str, input_range: InputRange | None
) -> Tensor:
    """Which samples' bounds over a box of radius 0 are not the margins of the sample itself; shape (batch,).

    Every method is exact there. A wrong sign in one weight of thousands, which the slack of a real box hides, shows.

    Args:
        network: computes the bounds.
        x, y: samples, in the network's dtype, and their labels.
        method: the bounding method.
        input_range: lowest and highest valid input.
    """
    margins = class_margins(network.model(x), y)
    lower = network.lower(input_box(x, 0.0, input_range), y, method)
    return ((lower - margins).abs() > _POINT_SLACK[lower.dtype] * _scale(lower, margins)).any(1)


def spread_out(samples: Tensor, most: int) -> Tensor:
    """At most ``most`` of ``samples``, evenly spaced, and at most :data:`PROBED`."""
    return samples[:: -(-len(samples) // min(most, PROBED))]


def _scale(lower: Tensor, margins: Tensor) -> Tensor:
    return 1 + torch.maximum(lower.abs(), margins.abs()).amax(1, keepdim=True)
