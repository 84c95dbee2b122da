"""Batch normalisation of tensors and of intervals, in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lirpa_fastwarmup.distributed import differentiable_all_reduce


def normalize_by_batch(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``F.batch_norm`` in training mode, the batch's mean and its biased variance, per channel; differentiable once.

    PyTorch computes the statistics anyway, but gives no gradient through them. Computed a second time from the
    batch, they cost several times the normalisation itself (on the CPU, the variance above all).

    Args:
        x: ``(batch, channels, *space)``.
        running_mean, running_var: moved towards the batch's by ``momentum``, in place.
    """
    return _BatchNormWithStatistics.apply(x, weight, bias, running_mean, running_var, momentum, eps)


class _BatchNormWithStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.eps = eps
        result, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        return result, mean.clone(), inverse.pow(-2).sub_(eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        gradients = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        if ctx.needs_input_grad[0]:
            count = x.numel() // len(mean)
            slope = grad_var * (2 / count)
            shape = (1, -1, *[1] * (x.ndim - 2))
            offset = grad_mean / count - slope * mean
            gradients[0].add_(x * slope.view(shape)).add_(offset.view(shape))
        return (*gradients, None, None, None, None)


def normalize_over_ranks(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`normalize_by_batch`, with the statistics of all processes' batches together."""
    shape, over = (1, -1, *[1] * (x.ndim - 2)), [dim for dim in range(x.ndim) if dim != 1]
    given, x = x.dtype, x.to(weight.dtype)  # Half of the digits would round the count of a batch.
    own = x.new_tensor([x.numel() // x.shape[1]])
    sums = differentiable_all_reduce(torch.cat([x.sum(over), own]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    deviation = x - mean.view(shape)
    var = differentiable_all_reduce(deviation.square().sum(over)) / count
    running_mean.lerp_(mean.detach(), momentum)
    running_var.lerp_(var.detach() * (count / (count - 1)), momentum)
    scale = weight / (var + eps).sqrt()
    return (deviation * scale.view(shape) + bias.view(shape)).to(given), mean, var


def scale_interval(lower: Tensor, upper: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of scale·z + shift for z from ``lower`` to ``upper``, per channel; differentiable once.

    Args:
        lower, upper: ``(batch, channels, *space)``.
        scale, shift: (channels,).
    """
    shape = (1, -1, *[1] * (lower.ndim - 2))
    return _ScaledInterval.apply(lower, upper, scale.view(shape), shift.view(shape))


class _ScaledInterval(torch.autograd.Function):
    # By centre and radius, overwriting what it has made; a chain of operations reads and writes about twice as much.

    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(lower, upper, scale)
        centre = (lower + upper).mul_(scale / 2).add_(shift)
        radius = (upper - lower).mul_(scale.abs() / 2)
        return centre - radius, centre.add_(radius)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lower: Tensor, grad_upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lower, upper, scale = ctx.saved_tensors
        grad_centre, grad_radius = grad_lower + grad_upper, grad_upper - grad_lower
        over = [dim for dim in range(lower.ndim) if dim != 1]
        grad_shift = grad_centre.sum(over, keepdim=True)
        grad_scale = (lower + upper).mul_(grad_centre).sum(over, keepdim=True)
        grad_scale += (upper - lower).mul_(grad_radius).sum(over, keepdim=True) * scale.sign()
        grad_centre.mul_(scale / 2)
        grad_radius.mul_(scale.abs() / 2)
        return grad_centre - grad_radius, grad_centre.add_(grad_radius), grad_scale / 2, grad_shift
