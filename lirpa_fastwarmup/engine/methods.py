"""The engine's bounding methods, by the field's names, asked for lower bounds on margins."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import crown_lower, ibp_margins, margin_matrix
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine

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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """0.3 makes the tensors that it keeps optimised bounds in without a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    with torch.enable_grad(), _default_dtype(box.dtype), redirect_stdout(io.StringIO()):  # 0.7 prints.
        options: dict[str, Any] = {"method": "alpha-CROWN", "bound_upper": False, _INTERMEDIATE: both}
        return bounded.compute_bounds(x=(box,), C=matrix, **options)[0]


_METHODS: dict[str, Callable[[Any, Any, Tensor, int], Tensor]] = {
    "IBP": _ibp,
    "CROWN-IBP": _crown_ibp,
    "CROWN": _crown,
    "alpha-CROWN": _alpha_crown,
}
METHODS: tuple[str, ...] = tuple(_METHODS)  # Cheapest first.

# How the engine fails on what it has no rule for.
_REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError)


@torch.no_grad()
def margin_lower_bounds(bounded: Any, box: Any, labels: Tensor, classes: int, method: str) -> Tensor:
    """Lower bounds on z_y − z_j for every class j ≠ y over ``box``, by one of :data:`METHODS`.

    Args:
        bounded: a BoundedModule in evaluation mode; for alpha-CROWN, one that :meth:`BoundedModule.rebuilt` made.
        box: what :func:`lirpa_fastwarmup.input_box` returns.
        labels: (batch,), int64.
        classes: outputs of the network.
        method: IBP (Gowal et al. 2018), CROWN-IBP (Zhang et al. 2020), CROWN (Zhang et al. 2018) or alpha-CROWN (Xu
            et al. 2021; slopes of the margins' own pass are optimised, intermediate bounds are those of IBP and CROWN).

    Returns:
        Shape (batch, classes − 1).

    Raises:
        NotImplementedError: the engine has no such bounds for an operator of the network.
    """
    try:
        return _METHODS[method](bounded, box, labels, classes).detach()
    except _REFUSALS as error:
        raise NotImplementedError(
            f"auto_LiRPA {ENGINE_VERSION} failed in {method} on this network ({type(error).__name__}: {error}): leave "
            "the method out, or write the network with other operators"
        ) from error


def _read_over_bounds(bounded: Any) -> Iterator[Any]:
    """The nodes whose bounds the relaxation of another one is made from."""
    for node in bounded._modules.values():
        for position in getattr(node, "requires_input_bounds", ()):
            source = node.inputs[position]
            if source.perturbed and isinstance(source.lower, Tensor):
                yield source


def _intermediate_bounds(bounded: Any) -> Intermediate:
    """The bounds that the last pass left at the inputs of nonlinear nodes, by node."""
    return {source.name: (source.lower.detach(), source.upper.detach()) for source in _read_over_bounds(bounded)}


def _intersection(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lower, upper = (end.view_as(like) for end, like in zip(other, one, strict=True))
    # Rounding may part two intervals that touch.
    low = torch.maximum(one[0], lower)
    return low, torch.maximum(low, torch.minimum(one[1], upper))
