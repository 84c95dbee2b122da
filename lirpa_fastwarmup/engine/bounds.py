"""The box around a batch, and the bounds that the engine gives on a classifier's margins over it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.compat import engine

Epsilon = float | Tensor
InputRange = tuple[float | Tensor, float | Tensor]


def broadcast_to_batch(value: float | Tensor, x: Tensor, what: str) -> float | Tensor:
    """``value`` in a shape that broadcasts over the batch ``x`` of shape (batch, *input).

    A vector as long as the first input dimension is one value per channel (or per feature).

    Raises:
        ValueError: a tensor of a shape that fits neither.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    value = value.to(x)
    if value.ndim == 1 and x.ndim > 2 and len(value) == x.shape[1]:
        return value.view(-1, *[1] * (x.ndim - 2))
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}, which does not broadcast over inputs of shape "
            f"{tuple(x.shape[1:])}: give a number, one value per channel, or a tensor of the input's shape"
        )
    return value


def check_eps(eps: Epsilon) -> None:
    """Refuse a radius that no box can have.

    Raises:
        ValueError: ``eps`` is negative, infinite or NaN.
    """
    value = float(eps.detach().min()) if isinstance(eps, Tensor) else float(eps)
    highest = float(eps.detach().max()) if isinstance(eps, Tensor) else value
    if not (value >= 0 and math.isfinite(highest)):
        raise ValueError(f"eps must be finite and at least 0, in units of the input; found {eps}")


def input_box(x: Tensor, eps: Epsilon, input_range: InputRange | None = (0.0, 1.0)) -> Any:
    """The box {x' : |x' − x| ≤ eps, elementwise} ∩ input_range, as a BoundedTensor.

    Args:
        x: clean inputs (batch, *input).
        eps: radius in units of the input: a number, one per channel, or a tensor of the input's shape.
        input_range: lowest and highest valid input, numbers or tensors; ``None`` for unclipped data.
    """
    eps = broadcast_to_batch(eps, x, "eps")
    lower, upper = x - eps, x + eps
    if input_range is not None:
        low, high = (broadcast_to_batch(end, x, "input_range") for end in input_range)
        lower, upper = lower.clamp(min=low), upper.clamp(max=high)
    perturbation = engine.PerturbationLpNorm(norm=math.inf, eps=eps, x_L=lower, x_U=upper)
    return engine.BoundedTensor(x, perturbation)


def margin_matrix(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows e_y − e_j for every class j ≠ y, shape (batch, classes − 1, classes)."""
    eye = torch.eye(classes, dtype=dtype, device=labels.device)
    # Row k of the table for label y is class k, shifted past y: every j ≠ y, in order.
    others = torch.arange(classes - 1, device=labels.device)
    others = others + (others >= labels.unsqueeze(1)).long()
    return eye[labels].unsqueeze(1) - eye[others]


def ibp_margins(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    """IBP lower bounds on z_y − z_j for j ≠ y over the box, shape (batch, classes − 1)."""
    matrix = margin_matrix(labels, classes, box.dtype)
    lower, _ = bounded.compute_bounds(x=(box,), C=matrix, method="IBP", bound_upper=False)
    return lower
