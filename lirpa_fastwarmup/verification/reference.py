"""The engine's IBP bounds against interval arithmetic that shares nothing with it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import Epsilon, InputRange
from lirpa_fastwarmup.engine.bounds import input_box
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.soundness import corners_of, tolerance
from lirpa_fastwarmup.verification.intervals import interval_bounds

logger = logging.getLogger(__name__)


@torch.no_grad()
def beyond_intervals(
    bounded: BoundedModule, x: Tensor, eps: Epsilon, input_range: InputRange | None
) -> list[tuple[int, str]]:
    """Samples whose IBP bounds on the outputs are tighter than those of interval arithmetic in double precision.

    IBP is interval arithmetic, operator by operator, and has no way to be tighter.

    Args:
        bounded: the network, in evaluation mode.
        x: samples ``(batch, *input)``, in the network's dtype.
        eps: radius of the boxes.
        input_range: lowest and highest valid input.

    Returns:
        Pairs of a sample's place and what was found; none where the reference lacks an operator of the network.
    """
    try:
        reference = interval_bounds(bounded.wrapped, corners_of(x, eps, input_range))
    except (NotImplementedError, RuntimeError, ValueError, ArithmeticError) as error:
        logger.info("IBP is not compared with interval arithmetic on this network: %s", error)
        return []
    found = bounded.compute_bounds(x=(input_box(x, eps, input_range),), method="IBP")
    above = found[0] > reference[0].to(x) + tolerance(found[0], reference[0].to(x))
    below = found[1] < reference[1].to(x) - tolerance(found[1], reference[1].to(x))
    tighter = (above | below).flatten(1).any(1).nonzero().flatten().tolist()
    return [(place, "has tighter IBP bounds on its outputs than interval arithmetic") for place in tighter]
