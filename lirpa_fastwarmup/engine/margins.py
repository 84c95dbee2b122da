"""IBP bounds on a last layer's margins z_y − z_j for many classes, without an array (batch, classes, features).

For the weights W of a layer, its input's centre m and radius r, the margins have the centre (W_y − W_j)·m and the
radius |W_y − W_j|·r (Gowal et al., 2018, section 3). They are computed for one sample after the other in the same
memory; in a recorded step, by sums that a compiler fuses with their terms.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.compat import engine, node_classes
from lirpa_fastwarmup.engine.nodes import ComputedConstant
from lirpa_fastwarmup.engine.products import require_first_derivative

_CONSTANT = (*node_classes("Params", "Buffers", "Constant"), ComputedConstant)
_AT_ONCE = 2**15  # Elements that stay in a core's cache; PyTorch divides no operation on so few among threads.
_MANY = 2**22  # Elements of the array for the whole batch, above which this is faster.


def is_recorded() -> bool:
    """Whether a training step is being recorded, whose tensors have no values."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _centres_and_radii(weight: Tensor, centre: Tensor, radius: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and radii of the margins, (batch, classes)."""
    own = weight[labels]
    if is_recorded():
        differences = own.unsqueeze(1) - weight
        return (differences * centre.unsqueeze(1)).sum(2), (differences.abs() * radius.unsqueeze(1)).sum(2)
    centres, radii = (centre.new_empty(len(labels), len(weight)) for _ in range(2))
    size = max(1, _AT_ONCE // weight.shape[1])
    for rows, *results in zip(weight.split(size), centres.split(size, 1), radii.split(size, 1), strict=True):
        differences = torch.empty_like(rows)
        for row, middle, extent, to_centre, to_radius in zip(own, centre, radius, *results, strict=True):
            torch.sub(row, rows, out=differences)
            torch.mv(differences, middle, out=to_centre)
            torch.mv(differences.abs_(), extent, out=to_radius)
    return centres, radii


def _gradients_of_radii(grad: Tensor, weight: Tensor, radius: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the radii with respect to ``weight`` and ``radius``, from that with respect to the radii."""
    own = weight[labels]
    if is_recorded():
        differences, given = own.unsqueeze(1) - weight, grad.unsqueeze(2)
        signed = differences.sign() * given
        of_weight, of_own = -(signed * radius.unsqueeze(1)).sum(0), signed.sum(1)
        return of_weight.index_add(0, labels, of_own * radius), (differences.abs() * given).sum(1)
    of_weight, of_radius, of_own = torch.zeros_like(weight), torch.zeros_like(radius), torch.zeros_like(radius)
    size = max(1, _AT_ONCE // weight.shape[1])
    for rows, of_rows, of_margins in zip(weight.split(size), of_weight.split(size), grad.split(size, 1), strict=True):
        differences, signs = torch.empty_like(rows), torch.empty_like(rows)
        for row, given, extent, to_radius, to_own in zip(own, of_margins, radius, of_radius, of_own, strict=True):
            torch.sub(row, rows, out=differences)
            torch.sign(differences, out=signs)
            to_radius.addmv_(differences.abs_().t(), given)
            to_own.addmv_(signs.t(), given)
            of_rows.addcmul_(signs.mul_(given.unsqueeze(1)), extent, value=-1)
    return of_weight.index_add_(0, labels, of_own * radius), of_radius


class _Margins(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return _centres_and_radii(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_of_radii: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative()
        weight, centre, radius, labels = ctx.saved_tensors
        # Of the difference of two logits: each one's own gradient, and minus that of the others.
        logits = (-grad).scatter_add(1, labels.unsqueeze(1), grad.sum(1, keepdim=True))
        of_weight, of_radius = _gradients_of_radii(grad_of_radii.contiguous(), weight, radius, labels)
        return of_weight + logits.t() @ centre, logits @ weight, of_radius, None


def margin_interval(node: Any, labels: Tensor, interval_of: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """IBP bounds on z_y − z_j for the logits of ``node``, (batch, classes), merged with it if it is a linear layer.

    ``interval_of`` gives a node's interval. The engine's product of a matrix and the layer is quadratic in the classes.
    """
    is_linear = isinstance(node, engine.bound_general.BoundLinear) and isinstance(node.inputs[1], _CONSTANT)
    on_vectors = is_linear and len(node.inputs[0].output_shape) == 2 and not node.is_input_perturbed(1)
    on_vectors &= all(len(bias.output_shape) == 1 for bias in node.inputs[2:])
    inputs = [interval_of(source) for source in node.inputs] if on_vectors else []
    if not inputs:
        own, (lower, upper) = labels.unsqueeze(1), interval_of(node)
        return lower.gather(1, own) - upper, upper.gather(1, own) - lower
    (low, weight, *bias), (high, *_) = (node._preprocess(*ends) for ends in zip(*inputs, strict=True))
    centre, radius = (low + high) / 2, (high - low) / 2
    # A GPU would wait for thousands of small launches.
    if labels.device.type == "cpu" and len(labels) * weight.numel() > _MANY:
        centres, radii = _Margins.apply(weight, centre, radius, labels)
    else:
        differences = weight.index_select(0, labels).unsqueeze(1) - weight
        products = (differences, centre), (differences.abs(), radius)
        centres, radii = (rows.matmul(vector.unsqueeze(2)).squeeze(2) for rows, vector in products)
    if bias and bias[0] is not None:
        centres = centres + (bias[0].index_select(0, labels).unsqueeze(1) - bias[0])
    return centres - radii, centres + radii


def unread_rows(labels: Tensor, classes: int, dtype: torch.dtype) -> Any:
    """A placeholder for the rows e_y − e_j: NaNs that take no memory, with the labels as the attribute ``labels``."""
    rows: Any = torch.full((), math.nan, dtype=dtype, device=labels.device).expand(len(labels), classes, classes)
    rows.labels = labels
    return rows
