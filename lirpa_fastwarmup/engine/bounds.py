"""The box around a batch, and the bounds that the engine gives on a classifier's margins over it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends, check_eps, check_pair, inputs_error, inputs_fit
from lirpa_fastwarmup.engine.compat import engine


def input_box(x: Tensor, eps: Epsilon, input_range: InputRange | None = (0.0, 1.0)) -> Any:
    """The box ``{x' : |x' − x| ≤ eps, elementwise} ∩ input_range``, as a BoundedTensor.

    Args:
        x: clean inputs ``(batch, *input)``, within ``input_range``.
        eps: radius in units of the input: a number, one per channel, or a tensor of the input's shape.
        input_range: lowest and highest valid input, numbers or tensors; ``None`` for unclipped data.

    Raises:
        TypeError: ``eps`` is neither a number nor a tensor.
        ValueError: ``eps`` is negative or not finite, or of a shape that does not fit; on the CPU also where
            ``x`` lies outside its range (elsewhere the check would wait for the device).
    """
    check_pair(input_range)
    if not isinstance(eps, Tensor) or eps.device.type == "cpu":
        check_eps(eps)
    if x.device.type == "cpu" and not bool(inputs_fit(x, input_range)):
        raise inputs_error(x, input_range)
    lower, upper = box_ends(x, eps, input_range)
    perturbation = engine.PerturbationLpNorm(norm=math.inf, eps=eps, x_L=lower, x_U=upper)
    # As the engine's own constructor makes it, which fails while the bytes of tensors are counted (see `memory`).
    box: Any = Tensor._make_subclass(engine.BoundedTensor, x, x.requires_grad)
    box.ptb = perturbation
    return box


def class_count(bounded: Any) -> int:
    """The number of classes that a BoundedModule tells apart.

    Raises:
        ValueError: its output is not (batch, classes) with two classes or more, so that there are no margins.
    """
    shape = tuple(bounded.final_shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"expected a classifier whose output is (batch, classes ≥ 2); this network's is {shape}, without margins "
            "between classes. Give it one output per class (for a single score s, the two outputs 0 and s)"
        )
    return int(shape[1])


def other_classes(labels: Tensor, classes: int) -> Tensor:
    """Every class j ≠ y, in order, shape (batch, classes − 1)."""
    others = torch.arange(classes - 1, device=labels.device)
    return others + (others >= labels.unsqueeze(1)).long()  # Shifted past y.


def margin_matrix(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows e_y − e_j for every class j ≠ y, shape (batch, classes − 1, classes)."""
    eye = torch.eye(classes, dtype=dtype, device=labels.device)
    return eye[labels].unsqueeze(1) - eye[other_classes(labels, classes)]


class _Margins(Tensor):
    """The rows e_y − e_j for every class j, as the engine multiplies a layer's weight with them.

    A product with them is a difference of two rows. Multiplying it out, as with any matrix, takes time that grows with
    the square of the number of classes.
    """

    # Everything else than `matmul` is done on the plain tensor, and gives one.
    __torch_function__: Any = torch._C._disabled_torch_function_impl
    labels: Tensor

    @staticmethod
    def of(labels: Tensor, classes: int, dtype: torch.dtype) -> _Margins:
        eye = torch.eye(classes, dtype=dtype, device=labels.device)
        margins = (eye[labels].unsqueeze(1) - eye).as_subclass(_Margins)
        margins.labels = labels
        return margins

    def matmul(self, weight: Tensor) -> Tensor:
        """Differences of the rows of ``weight`` (classes, …), shape (batch, classes, …)."""
        if weight.ndim > 2:  # Not a layer's weight or bias, but (batch, classes, 1): there is no such layer to merge.
            return self.as_subclass(Tensor).matmul(weight)
        return weight.index_select(0, self.labels).unsqueeze(1) - weight


def ibp_margin_bounds(
    bounded: Any, box: Any, labels: Tensor, classes: int, *, reuse_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """IBP lower and upper bounds on z_y − z_j for j ≠ y over the box, each of shape (batch, classes − 1).

    ``reuse_statistics`` as in :meth:`lirpa_fastwarmup.BoundedModule.compute_bounds`.
    """
    matrix = _Margins.of(labels, classes, box.dtype)
    lower, upper = bounded.compute_bounds(x=(box,), C=matrix, method="IBP", reuse_statistics=reuse_statistics)
    others = other_classes(labels, classes)
    return lower.gather(1, others), upper.gather(1, others)


def ibp_margins(bounded: Any, box: Any, labels: Tensor, classes: int, *, reuse_statistics: bool = False) -> Tensor:
    """The lower bounds of :func:`ibp_margin_bounds`."""
    return ibp_margin_bounds(bounded, box, labels, classes, reuse_statistics=reuse_statistics)[0]


def crown_lower(bounded: Any, directions: Tensor) -> Tensor:
    """CROWN's lower bounds on ``directions`` @ logits, from the last IBP pass: its box, its intermediate bounds.

    Args:
        bounded: a BoundedModule whose last pass was an IBP pass.
        directions: (batch, rows, classes).

    Returns:
        Shape (batch, rows).
    """
    return bounded.compute_bounds(x=None, C=directions, IBP=False, method="CROWN", bound_upper=False)[0]


def crown_upper(bounded: Any, directions: Tensor) -> Tensor:
    """As :func:`crown_lower`, upper bounds."""
    return bounded.compute_bounds(x=None, C=directions, IBP=False, method="CROWN", bound_lower=False)[1]


def proved(margins: Tensor) -> Tensor:
    """For each sample, whether all its margins are proved positive. NaN proves nothing."""
    return (margins > 0).all(1)
