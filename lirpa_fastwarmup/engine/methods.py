"""The engine's bounding methods, by the field's names, asked for lower bounds on margins."""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.bounds import class_count, crown_lower, ibp_margins, margin_matrix
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.module import BoundedModule

logger = logging.getLogger(__name__)

Intermediate = dict[str, tuple[Tensor, Tensor]]

# 0.7 calls so what 0.3 called intermediate_layer_bounds.
_COMPUTE_BOUNDS = inspect.signature(engine.BoundedModule.compute_bounds).parameters
_INTERMEDIATE = "interm_bounds" if "interm_bounds" in _COMPUTE_BOUNDS else "intermediate_layer_bounds"


def _ibp(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    return ibp_margins(bounded, box, labels, classes)


def _crown_ibp(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    bounded.compute_bounds(x=(box,), method="IBP")
    return crown_lower(bounded, margin_matrix(labels, classes, box.dtype))


def _crown(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    matrix = margin_matrix(labels, classes, box.dtype)
    return bounded.compute_bounds(x=(box,), C=matrix, method="CROWN", bound_upper=False)[0]


def _alpha_crown(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    """Slopes are optimised for the margins alone, over intermediate bounds that IBP and CROWN have agreed on.

    Slopes of their own for every intermediate neuron, as the engine would have them, took 15 s and 2 GB a sample on a
    CNN-7 of width 8, where this takes half a second, and gave margins larger by 0.1 %.
    """
    with torch.no_grad():
        bounded.compute_bounds(x=(box,), method="IBP")
        first = _intermediate_bounds(bounded)
        crown = _crown(bounded, box, labels, classes)
        if not bounded.optimizable_activations:  # A linear network: there is no slope to be optimised.
            return crown
        both = {name: _intersection(bounds, first[name]) for name, bounds in _intermediate_bounds(bounded).items()}
    matrix = margin_matrix(labels, classes, box.dtype)
    with torch.enable_grad(), redirect_stdout(io.StringIO()):  # 0.7 prints.
        options: dict[str, Any] = {"method": "alpha-CROWN", "bound_upper": False, _INTERMEDIATE: both}
        optimized = bounded.compute_bounds(x=(box,), C=matrix, **options)[0]
    _forget_slopes(bounded)
    # Tighter intermediate bounds may lead products to other relaxations, and to looser bounds in the end.
    return torch.maximum(optimized, crown)


_METHODS: dict[str, Callable[[Any, Any, Tensor, int], Tensor]] = {
    "IBP": _ibp,
    "CROWN-IBP": _crown_ibp,
    "CROWN": _crown,
    "alpha-CROWN": _alpha_crown,
}
METHODS: tuple[str, ...] = tuple(_METHODS)  # Cheapest first.


class MarginBounds:
    """Lower bounds on the margins of a classifier, by any of :data:`METHODS`, on copies of it in ``dtype``.

    The engine keeps CROWN's coefficients of convolutions as patches, which is lean, and knows fewer operators than it
    does with matrices. A method that fails with patches is tried with matrices, from then on.

    Args:
        bounded: the network; it stays as it is, and later changes of it are not seen.
        dtype: precision of the bounds.
        live: use the network itself, which must be in evaluation mode and of this dtype, and not copies of it; only IBP
            is certain to work then, and leaves its bounds at the network's nodes.
    """

    def __init__(self, bounded: BoundedModule, dtype: torch.dtype, *, live: bool = False) -> None:
        self.dtype = dtype
        self.classes = class_count(bounded)
        self._lean = bounded if live else bounded.rebuilt(dtype)
        self._networks = dict.fromkeys(METHODS, self._lean)

    @property
    def model(self) -> nn.Module:
        """The plain network whose margins are bounded, in evaluation mode."""
        return self._lean.wrapped

    def bounded(self, method: str) -> BoundedModule:
        """The bounded copy that ``method`` uses; it holds the intermediate bounds of its last pass."""
        return self._networks[method]

    @torch.no_grad()
    def lower(self, box: Any, labels: Tensor, method: str) -> Tensor:
        """Lower bounds on z_y − z_j for every class j ≠ y over ``box``.

        Args:
            box: what :func:`lirpa_fastwarmup.input_box` returns, in this dtype.
            labels: (batch,), int64.
            method: IBP (Gowal et al. 2018), CROWN-IBP (Zhang et al. 2020), CROWN (Zhang et al. 2018) or alpha-CROWN
                (Xu et al. 2021; slopes of the margins' own pass are optimised, intermediate bounds are those of IBP
                and CROWN).

        Returns:
            Shape (batch, classes − 1).

        Raises:
            NotImplementedError: the engine has no such bounds for an operator of the network.
        """
        try:
            return self._bounds(box, labels, method)
        except NotImplementedError as error:
            if self._networks[method] is not self._lean or self._lean.conv_mode != "patches":
                raise
            logger.info("%s fails on this network with patches (%s): trying matrices", method, error)
        self._networks[method] = self._lean.rebuilt(self.dtype, conv_mode="matrix")
        return self.lower(box, labels, method)

    def _bounds(self, box: Any, labels: Tensor, method: str) -> Tensor:
        return _METHODS[method](self._networks[method], box, labels, self.classes).detach()


def _forget_slopes(bounded: Any) -> None:
    """Leave nothing of an optimisation behind, by which later CROWN passes choose what neurons they bound."""
    for node in bounded._modules.values():
        if hasattr(node, "alpha_lookup_idx"):
            node.alpha_lookup_idx = {}


def bounded_inputs(bounded: Any) -> Iterator[Any]:
    """The nodes whose bounds the relaxation of another one is made from, after a pass of any method."""
    for node in bounded._modules.values():
        for position in getattr(node, "requires_input_bounds", ()):
            source = node.inputs[position]
            if source.perturbed and isinstance(source.lower, Tensor):
                yield source


def _intermediate_bounds(bounded: Any) -> Intermediate:
    """The bounds that the last pass left at the inputs of nonlinear nodes, by node."""
    return {source.name: (source.lower.detach(), source.upper.detach()) for source in bounded_inputs(bounded)}


def _intersection(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lower, upper = (end.view_as(like) for end, like in zip(other, one, strict=True))
    # Rounding may part two intervals that touch.
    low = torch.maximum(one[0], lower)
    return low, torch.maximum(low, torch.minimum(one[1], upper))
