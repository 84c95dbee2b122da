"""Regularisers, from the bounds that the last IBP pass left at every ReLU's input.

The paper's two for the warmup, :func:`tightness` and :func:`relu_balance`, and others of the literature to compare
with. Notation of Shi et al. (NeurIPS 2021), section 3.3: [l, u] bounds a ReLU layer's input on a batch,
c = (l + u)/2, Δ is the mean of (u − l)/2 over batch and neurons, Δ_0 that of what the first affine
layer reads, m the number of ReLU layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.distributed import all_reduce
from lirpa_fastwarmup.engine.graph import affine_weights
from lirpa_fastwarmup.engine.layers import LayerBounds, input_half_width, relu_bounds
from lirpa_fastwarmup.recipe.moments import Moments, means_over_ranks, moments_over_ranks, over_ranks, state_moments

Regularizer = Callable[[Any], Tensor]

_SMALLEST_WIDTH = 1e-12


def tightness(bounded: Any, tol: float = 0.5) -> Tensor:
    """Bound tightness: (1/m) Σ_i max(0, tol − Δ_0/Δ_i)/tol.

    Args:
        bounded: a BoundedModule whose last pass was a bound pass.
        tol: the ratio Δ_0/Δ_i above which a layer is tight enough.

    Returns:
        A 0-dim tensor with gradient.

    Raises:
        RuntimeError: no bounds have been computed since the last forward pass.
        StructureError: the network has no ReLU.
    """
    layers = relu_bounds(bounded)
    widths = torch.stack([(layer.upper - layer.lower).mean() for layer in layers]) / 2
    at_input = input_half_width(bounded)
    if over_ranks(bounded):
        means = means_over_ranks(torch.cat([widths, at_input.view(1)]), len(layers[0].lower))
        widths, at_input = means[:-1], means[-1]
    ratio = at_input / widths.clamp(min=_SMALLEST_WIDTH)
    return (tol - ratio).clamp(min=0).mean() / tol


def relu_balance(bounded: Any, tol: float = 0.5) -> Tensor:
    """ReLU balance: (1/m) Σ_i [max(0, tol − min(ρ_i, 1/ρ_i)) + max(0, tol − min(s_i, 1/s_i))]/tol.

    ρ_i compares the mean, s_i the variance of c over always-active (l > 0) and always-inactive (u < 0)
    neurons. A layer without always-inactive neurons adds 0 for that batch, with zero gradient; one
    with them but without always-active ones adds 2, with zero gradient.

    Args:
        bounded: a BoundedModule whose last pass was a bound pass.
        tol: the ratio above which a layer is balanced enough.

    Returns:
        A 0-dim tensor with gradient.

    Raises:
        RuntimeError: no bounds have been computed since the last forward pass.
        StructureError: the network has no ReLU.
    """
    return _imbalance(relu_bounds(bounded), tol, across_ranks=over_ranks(bounded)).mean() / tol


def _imbalance(layers: Sequence[LayerBounds], tol: float, *, across_ranks: bool = False) -> Tensor:
    """For each layer max(0, tol − min(ρ, 1/ρ)) + max(0, tol − min(s, 1/s)), or 0; shape (layers,)."""
    has_inactive = torch.stack([layer.upper.detach().amin() for layer in layers]) < 0
    if across_ranks:
        moments = moments_over_ranks([(layer.lower, layer.upper) for layer in layers])
        has_inactive = all_reduce(has_inactive.int()) > 0
    else:
        # One row a layer, so that what follows costs the same for any depth.
        moments = torch.stack([_row(*state_moments(layer.lower, layer.upper)) for layer in layers])
    active, inactive = moments[:, :2], moments[:, 2:]
    balance = _balance(active, torch.stack([-inactive[:, 0], inactive[:, 1]], 1))
    imbalance = (tol - balance).clamp(min=0).sum(1)
    # Selected on the device, so that nothing waits for the value.
    return torch.where(has_inactive, imbalance, torch.zeros_like(imbalance))


def _row(active: Moments, inactive: Moments) -> Tensor:
    return torch.stack([*active, *inactive])


def _balance(active: Tensor, inactive: Tensor) -> Tensor:
    """min(r, 1/r) for r = active/inactive, both at least 0, with a gradient that is always finite."""
    smaller, larger = torch.minimum(active, inactive), torch.maximum(active, inactive)
    return smaller / torch.where(larger > 0, larger, torch.ones_like(larger))


def relu_stability(bounded: Any) -> Tensor:
    """ReLU stability: −Σ_i mean over the batch of Σ over neurons of tanh(1 + l·u) (Xiao et al., ICLR 2019).

    It is small where few neurons change their state within the box. Arguments and errors as :func:`tightness`.
    """
    return -torch.stack(
        [(1 + layer.lower * layer.upper).tanh().flatten(1).sum(1).mean() for layer in relu_bounds(bounded)]
    ).sum()


def volume(bounded: Any) -> Tensor:
    """Relaxation volume: Σ_i mean of max(0, −l)·max(0, u) (Balunović and Vechev, ICLR 2020).

    Twice the mean area of the triangle that relaxes each ReLU. Arguments and errors as :func:`tightness`.
    """
    layers = relu_bounds(bounded)
    return torch.stack([((-layer.lower).clamp(min=0) * layer.upper.clamp(min=0)).mean() for layer in layers]).sum()


def weight_l1(bounded: Any) -> Tensor:
    """The sum of the absolute values of all affine weights (used by Xiao et al., ICLR 2019)."""
    return torch.stack([weight.abs().sum() for weight in affine_weights(bounded)]).sum()


BUILT_IN: dict[str, Regularizer] = {
    function.__name__: function for function in (tightness, relu_balance, relu_stability, volume, weight_l1)
}
