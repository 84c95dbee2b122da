"""Sums over the always-active and the always-inactive neurons of a ReLU layer, in few passes over its bounds.

Written as one function of autograd, because a chain of tensor operations reads and writes the layer's bounds about
twice as often, forward and backward; and without masks of booleans, with which arithmetic on the CPU is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lirpa_fastwarmup.distributed import differentiable_all_reduce


class Moments(NamedTuple):
    """Of the neurons in one state, with c = (l + u)/2 and its mean μ over all neurons: 0-dim tensors.

    Attributes:
        total: Σ c.
        spread: Σ (c − μ)².
    """

    total: Tensor
    spread: Tensor


def state_moments(lower: Tensor, upper: Tensor) -> tuple[Moments, Moments]:
    """The moments of always-active (l > 0) and of always-inactive (u < 0) neurons, differentiable once.

    Args:
        lower, upper: bounds on a ReLU layer's input ``(batch, *neurons)``.
    """
    sums = _StateMoments.apply(lower, upper)
    return Moments(*sums[:2]), Moments(*sums[2:])


def over_ranks(bounded: Any) -> bool:
    """Whether figures are those of all processes' batches; see :meth:`lirpa_fastwarmup.BoundedModule.join_ranks`."""
    return getattr(bounded, "over_ranks", False) and bounded.training


def means_over_ranks(means: Tensor, samples: int) -> Tensor:
    """Means over this process's ``samples`` as means over the samples of all processes; shape (means,)."""
    sums = differentiable_all_reduce(torch.cat([means * samples, means.new_tensor([samples])]))
    return sums[:-1] / sums[-1].detach()


def moments_over_ranks(layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The moments of :func:`state_moments` over all processes, two per state, for each layer: shape (layers, 4).

    Args:
        layers: lower and upper bounds ``(batch, *neurons)`` of this process's batch.
    """
    centres = [torch.lerp(lower, upper, 0.5) for lower, upper in layers]
    means = means_over_ranks(torch.stack([centre.mean() for centre in centres]), len(centres[0]))
    rows = []
    for centre, mean, (lower, upper) in zip(centres, means, layers, strict=True):
        for condition in (lower.detach(), -upper.detach()):
            spread = _where_positive(centre - mean, condition).square().sum()
            rows += [_where_positive(centre, condition).sum(), spread]
    return differentiable_all_reduce(torch.stack(rows)).view(len(layers), 4)


def _where_positive(values: Tensor, condition: Tensor) -> Tensor:
    """``values`` where ``condition`` is above 0, and 0 elsewhere."""
    return torch.ops.aten.threshold_backward(values, condition, 0)


class _StateMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
        centre = torch.lerp(lower, upper, 0.5)
        mean = centre.mean()
        deviation = centre - mean
        sums: list[Tensor] = []
        deviations: list[Tensor] = []
        for condition in (lower, -upper):
            selected = _where_positive(deviation, condition).flatten()
            sums += [_where_positive(centre, condition).sum(), selected.dot(selected)]
            deviations.append(selected.sum())
        ctx.save_for_backward(lower, upper, mean, *deviations)
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, mean, *deviations = ctx.saved_tensors
        deviation = torch.lerp(lower, upper, 0.5).sub_(mean)  # Once more, rather than kept until now.
        active, inactive = (
            _where_positive((deviation * spread).add_(total / 2), condition)
            for condition, total, spread in ((lower, *grads[:2]), (-upper, *grads[2:]))
        )
        # Through μ every neuron moves the spreads.
        through_mean = -(grads[1] * deviations[0] + grads[3] * deviations[1]) / deviation.numel()
        grad = active.add_(inactive).add_(through_mean)
        return grad, grad
