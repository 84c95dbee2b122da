"""IBP bounds on a last layer's margins z_y − z_j for many classes, without an array (batch, classes, features).

For the weights W of a layer, its input's centre m and radius r, the margins have the centre (W_y − W_j)·m and the
radius |W_y − W_j|·r (Gowal et al., 2018, section 3). They are computed for one sample after the other in the same
memory; in a recorded step, by sums that a compiler fuses with their terms.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lirpa_fastwarmup.engine.compat import engine, node_classes

_Linear: Any = engine.bound_general.BoundLinear
_WEIGHTS = node_classes("Params", "Buffers", "Constant")
_AT_ONCE = 2**15  # Elements that stay in a core's cache; PyTorch divides no operation on so few among threads.
_MANY = 2**22  # Elements of the array for the whole batch from which on this is faster.


def _is_recorded() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _centres_and_radii(weight: Tensor, centre: Tensor, radius: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and radii of the margins, (batch, classes)."""
    own = weight[labels]
    if _is_recorded():
        differences = own.unsqueeze(1) - weight
        return (differences * centre.unsqueeze(1)).sum(2), (differences.abs() * radius.unsqueeze(1)).sum(2)
    centres, radii = (centre.new_empty(len(labels), len(weight)) for _ in range(2))
    size = max(1, _AT_ONCE // weight.shape[1])
    for rows, *results in zip(weight.split(size), centres.split(size, 1), radii.split(size, 1), strict=True):
        differences = torch.empty_like(rows)
        for sample in zip(own, centre, radius, *results, strict=True):
            torch.sub(sample[0], rows, out=differences)
            torch.mv(differences, sample[1], out=sample[3])
            torch.mv(differences.abs_(), sample[2], out=sample[4])
    return centres, radii


def _gradients_of_radii(grad: Tensor, weight: Tensor, radius: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the radii with respect to ``weight`` and ``radius``, from that with respect to the radii."""
    own = weight[labels]
    if _is_recorded():
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_of_radii: Tensor) -> tuple[Tensor | None, ...]:
        weight, centre, radius, labels = ctx.saved_tensors
        # Of the difference of two logits: each one's own gradient, and minus that of the others.
        logits = (-grad).scatter_add(1, labels.unsqueeze(1), grad.sum(1, keepdim=True))
        of_weight, of_radius = _gradients_of_radii(grad_of_radii.contiguous(), weight, radius, labels)
        return of_weight + logits.t() @ centre, logits @ weight, of_radius, None


class MarginLinear(_Linear):
    """A last layer whose margin matrix ``C`` is from :func:`unread_rows`."""

    def interval_propagate(self, *v: Any, C: Any = None) -> tuple[Tensor, Tensor]:
        (low, weight, *bias), (high, *_) = (self._preprocess(*ends) for ends in zip(*v, strict=True))
        centres, radii = _Margins.apply(weight, (low + high) / 2, (high - low) / 2, C.labels)
        if bias and bias[0] is not None:
            centres = centres + (bias[0].index_select(0, C.labels).unsqueeze(1) - bias[0])
        return centres - radii, centres + radii


def _is_constant(node: Any) -> bool:
    return isinstance(node, _WEIGHTS) or (bool(node.inputs) and all(map(_is_constant, node.inputs)))


def is_large(node: Any, labels: Tensor) -> bool:
    """Whether ``node`` is a layer with constant weights whose margins a :class:`MarginLinear` bounds faster."""
    if not isinstance(node, _Linear) or not _is_constant(node.inputs[1]) or node.is_input_perturbed(1):
        return False
    elements = len(labels) * node.output_shape[-1] * node.inputs[0].output_shape[-1]
    return labels.device.type == "cpu" and elements > _MANY  # A GPU would wait for thousands of small launches.


def unread_rows(labels: Tensor, classes: int, dtype: torch.dtype) -> Any:
    """In place of the rows e_y − e_j: a tensor of their shape that takes no memory, with the attribute ``labels``."""
    rows: Any = torch.empty((), dtype=dtype, device=labels.device).expand(len(labels), classes, classes)
    rows.labels = labels
    return rows
