"""Regularisers on the bounds that the last IBP pass left at the input of every activation.

:func:`tightness` and :func:`relu_balance` belong to the short warmup (Shi et al., NeurIPS 2021, section 3.3); the
others are from the literature, for comparison. Call them after any IBP pass:

Example:
    >>> bounded.compute_bounds(x=(fw.input_box(x, 8 / 255),), method="IBP")
    >>> loss = loss + 0.5 * (fw.regularizers.tightness(bounded) + fw.regularizers.relu_balance(bounded))

[l, u] bounds the input of one of m activations, c = (l + u)/2, Δ is the mean of (u − l)/2 over batch and neurons, and
Δ_0 is the same at the input of the first affine layer. :func:`tightness` takes every elementwise activation, the others
ReLUs alone. After :meth:`lirpa_fastwarmup.BoundedModule.join_ranks`, means and sums are over all processes' batches.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lirpa_fastwarmup.distributed import all_reduce, differentiable_all_reduce
from lirpa_fastwarmup.engine import graph
from lirpa_fastwarmup.engine.graph import LayerBounds, relu_bounds
from lirpa_fastwarmup.engine.products import require_first_derivative

Regularizer = Callable[[Any], Tensor]

_SMALLEST_WIDTH = 1e-12


class _Reduction(NamedTuple):
    """A differentiable sum over all processes, and the fraction of their samples that this process has."""

    sum: Callable[[Tensor], Tensor] = lambda values: values
    fraction: float | Tensor = 1.0


_ONE_PROCESS = _Reduction()


def _reduction(bounded: Any, batch: Tensor) -> _Reduction:
    if not (getattr(bounded, "over_ranks", False) and bounded.training):
        return _ONE_PROCESS
    samples = batch.new_full((), len(batch))
    return _Reduction(differentiable_all_reduce, samples / all_reduce(samples))


def tightness(bounded: Any, tol: float = 0.5) -> Tensor:
    """Bound tightness: (1/m) Σ_i max(0, tol − Δ_0/Δ_i)/tol; a 0-dim tensor with gradient.

    ``tol`` is the ratio Δ_0/Δ_i above which a layer is tight enough. Raises RuntimeError if no bounds were computed
    since the last forward pass of ``bounded``, a BoundedModule, and StructureError if the network has no activation.
    """
    layers = graph.activation_bounds(bounded)
    reduction = _reduction(bounded, layers[0].lower)
    widths = torch.stack([(layer.upper - layer.lower).mean() for layer in layers]) / 2
    widths = torch.cat([graph.input_half_width(bounded).view(1), widths])
    at_input, at_activations = reduction.sum(widths * reduction.fraction).split([1, len(layers)])
    ratio = at_input / at_activations.clamp(min=_SMALLEST_WIDTH)
    return (tol - ratio).clamp(min=0).mean() / tol


def relu_balance(bounded: Any, tol: float = 0.5) -> Tensor:
    """ReLU balance: (1/m) Σ_i [max(0, tol − min(ρ_i, 1/ρ_i)) + max(0, tol − min(s_i, 1/s_i))]/tol.

    ρ_i compares the mean and s_i the variance of c between always-active (l > 0) and always-inactive (u < 0) neurons;
    ``tol`` is the ratio above which a layer is balanced enough. A layer without always-inactive neurons adds 0 for that
    batch, one with them but without always-active neurons adds 2, both with zero gradient. Returns and raises as
    :func:`tightness`, and StructureError if the network has no ReLU.
    """
    layers = relu_bounds(bounded)
    return _imbalance(layers, tol, _reduction(bounded, layers[0].lower)).mean() / tol


def _imbalance(layers: Sequence[LayerBounds], tol: float, reduction: _Reduction = _ONE_PROCESS) -> Tensor:
    """For each layer max(0, tol − min(ρ, 1/ρ)) + max(0, tol − min(s, 1/s)), or 0; shape (layers,)."""
    moments = _StateMoments.apply(reduction, *(end for layer in layers for end in (layer.lower, layer.upper)))
    active, inactive = moments.unbind(1)
    inactive = torch.stack([-inactive[:, 0], inactive[:, 1]], 1)
    # min(r, 1/r) for r = active/inactive, both at least 0, with a gradient that is always finite.
    smaller, larger = torch.minimum(active, inactive), torch.maximum(active, inactive)
    balance = smaller / torch.where(larger > 0, larger, torch.ones_like(larger))
    imbalance = (tol - balance).clamp(min=0).sum(1)
    # −Σ c is positive where a neuron is always inactive. Selected on the device, so that nothing waits for the value.
    return torch.where(inactive[:, 0] <= 0, torch.zeros_like(imbalance), imbalance)


def state_moments(lower: Tensor, upper: Tensor) -> Tensor:
    """Σ c and Σ (c − μ)², with mean μ, of always-active and always-inactive neurons: (2, 2), differentiable once."""
    return _StateMoments.apply(_ONE_PROCESS, lower, upper)[0]


class _StateMoments(torch.autograd.Function):
    """:func:`state_moments` of every layer over all processes: shape (layers, 2 states, 2 sums).

    A chain of tensor operations reads and writes the bounds about twice as often, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, reduction: _Reduction, *bounds: Tensor) -> Tensor:
        layers = zip(bounds[::2], bounds[1::2], strict=True)
        means, sums = zip(*(_sums(*ends, reduction) for ends in layers), strict=True)
        moments = reduction.sum(torch.stack([value for values in sums for value in values])).view(-1, 2, 3)
        ctx.reduction = reduction
        ctx.save_for_backward(moments, *means, *bounds)
        return moments[..., :2].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        require_first_derivative()
        grads = ctx.reduction.sum(grad)
        moments, *saved = ctx.saved_tensors
        means, bounds = saved[: len(moments)], saved[len(moments) :]
        # Every neuron moves the spreads through μ.
        through_mean = -(grads[..., 1] * moments[..., 2]).sum(1) * ctx.reduction.fraction
        layers = zip(bounds[::2], bounds[1::2], means, grads, through_mean, strict=True)
        result = [_gradient(*layer) for layer in layers]
        return None, *(grad for grad in result for _ in ("lower", "upper"))


def _sums(lower: Tensor, upper: Tensor, reduction: _Reduction) -> tuple[Tensor, list[Tensor]]:
    """μ, and this process's Σ c, Σ (c − μ)² and Σ (c − μ) over either state."""
    centre = torch.lerp(lower, upper, 0.5)
    mean = reduction.sum(centre.mean() * reduction.fraction)
    deviation = centre - mean
    sums = []
    for condition in (lower, -upper):
        selected = _where_positive(deviation, condition).flatten()
        sums += [_where_positive(centre, condition).sum(), selected.dot(selected), selected.sum()]
    return mean, sums


def _gradient(lower: Tensor, upper: Tensor, mean: Tensor, grads: Tensor, through_mean: Tensor) -> Tensor:
    """The gradient of either bound, from ``grads`` of the layer's moments (2 states, 2 sums)."""
    deviation = torch.lerp(lower, upper, 0.5).sub_(mean)  # Computed again instead of kept.
    active, inactive = (
        _where_positive((deviation * spread).add_(total / 2), condition)
        for (total, spread), condition in zip(grads, (lower, -upper), strict=True)
    )
    return active.add_(inactive).add_(through_mean / deviation.numel())


def _where_positive(values: Tensor, condition: Tensor) -> Tensor:
    """``values`` where ``condition`` is above 0, and 0 elsewhere. Boolean masks are slow on the CPU."""
    return torch.ops.aten.threshold_backward(values, condition, 0)


def relu_stability(bounded: Any) -> Tensor:
    """ReLU stability: −Σ_i mean over the batch of Σ over neurons of tanh(1 + l·u) (Xiao et al., ICLR 2019).

    It is small where few neurons change their state within the box. Arguments and errors as :func:`tightness`.
    """
    layers = relu_bounds(bounded)
    return -torch.stack([(1 + one.lower * one.upper).tanh().flatten(1).sum(1).mean() for one in layers]).sum()


def volume(bounded: Any) -> Tensor:
    """Relaxation volume: Σ_i mean of max(0, −l)·max(0, u) (Balunović and Vechev, ICLR 2020).

    Twice the mean area of the triangle that relaxes each ReLU. Arguments and errors as :func:`tightness`.
    """
    layers = relu_bounds(bounded)
    return torch.stack([((-layer.lower).clamp(min=0) * layer.upper.clamp(min=0)).mean() for layer in layers]).sum()


def weight_l1(bounded: Any) -> Tensor:
    """The sum of the absolute values of all affine weights (used by Xiao et al., ICLR 2019)."""
    weights = {layer.parameter: layer.matrix for layer in graph.read_graph(bounded).affine}
    return torch.stack([weight.abs().sum() for weight in weights.values()]).sum()


BUILT_IN: dict[str, Regularizer] = {f.__name__: f for f in (tightness, relu_balance, relu_stability, volume, weight_l1)}


def undefined(bounded: Any, names: Iterable[str]) -> list[str]:
    """The built-in regularisers among ``names`` that use activations which the network does not have."""
    network = graph.read_graph(bounded)
    defined = {"weight_l1", *(["tightness"] if network.activations else []), *(BUILT_IN if network.relus else [])}
    return [name for name in names if name in BUILT_IN and name not in defined]
