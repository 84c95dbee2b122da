"""Intervals through the product of a constant and the input: of centre c and radius r, W·c + b ± |W|·r.

(Gowal et al., 2018, section 3.) One function overwrites what a chain of operations would copy, forward and backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def require_first_derivative() -> None:
    """Raise RuntimeError under ``create_graph=True``: second derivatives would silently be incomplete."""
    if torch.is_grad_enabled():
        text = "losses, bounds and BatchNorm statistics in training mode have no second derivatives"
        raise RuntimeError(f"{text}: leave create_graph=True out, or bound the network in evaluation mode")


class Product(NamedTuple):
    """A product of an input and a weight, plus a bias, and its gradients with respect to those of the three needed."""

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Sequence[bool]], Sequence[Any]]


def convolution(*arguments: Any) -> Product:
    """The product of ``torch.convolution`` with these arguments behind the bias."""

    def backward(grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> Sequence[Any]:
        return torch.ops.aten.convolution_backward(grad, x, weight, [grad.shape[1]], *arguments, needed)

    return Product(lambda x, weight, bias: torch.convolution(x, weight, bias, *arguments), backward)


def _backward_of_linear(grad: Tensor, x: Tensor, weight: Tensor, need: Sequence[bool]) -> Sequence[Any]:
    return grad.mm(weight) if need[0] else None, grad.t().mm(x) if need[1] else None, grad.sum(0) if need[2] else None


LINEAR = Product(F.linear, _backward_of_linear)  # On vectors (batch, features).


def interval_of_product(
    product: Product, *tensors: Tensor | None, rectified: bool = False, radius_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The interval of ``product``; ``tensors`` are lower and upper end of the input's, weight, and bias or ``None``.

    It is differentiable once. ``rectified``: of the input's ReLU. ``radius_dtype``: the factors of |W|·r are rounded to
    it. Terms of that sum are at least 0, so bfloat16 changes it by at most 2⁻⁷; a centre could change by a radius.
    """
    return _Interval.apply(product, rectified, radius_dtype, *tensors)


class _Interval(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, product: Product, rectified: bool, radius_dtype: torch.dtype | None, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        lower, upper, weight, bias = tensors
        dtype = radius_dtype or lower.dtype
        low, high, half = *((lower.relu(), upper.relu()) if rectified else (lower, upper)), weight / 2
        # Twice the centre and the radius. The halves of the weight make up for it.
        total, width = low + high, (high.sub_(low) if rectified else high - low).to(dtype)
        del low, high
        ctx.product = product
        ctx.save_for_backward(total, width, half, *((lower, upper) if rectified else ()))
        radius = product.forward(width, half.abs().to(dtype), None)
        centre = product.forward(total, half, bias)
        return centre - radius, centre.add_(radius)

    @staticmethod
    def backward(ctx: Any, grad_lower: Tensor, grad_upper: Tensor) -> tuple[Any, ...]:
        require_first_derivative()
        total, width, half, *before = ctx.saved_tensors
        needed = any(ctx.needs_input_grad[3:5]), *ctx.needs_input_grad[5:]
        backward, low = ctx.product.backward, width.dtype
        of_total, of_weight, of_bias = backward(grad_lower + grad_upper, total, half, needed)
        grad_radius = (grad_upper - grad_lower).to(low)
        of_width, of_size, _ = backward(grad_radius, width, half.abs().to(low), [*needed[:2], False])
        ends: Any = (None, None)
        if needed[0]:
            ends = of_total - of_width, of_total.add_(of_width)
            if before:
                backward_of_relu = torch.ops.aten.threshold_backward.grad_input
                ends = [backward_of_relu(grad, x, 0, grad_input=grad) for grad, x in zip(ends, before, strict=True)]
        if needed[1]:
            of_weight = of_weight.addcmul_(of_size, half.sign()).div_(2)
        return None, None, None, *ends, of_weight, of_bias
