"""IBP through affine layers in training mode, as one product with the ReLU before a layer and the BatchNorm behind it.

BatchNorm, which in IBP has the statistics of the clean pass, is a map s·z + t: with it, a layer has the weight s·W and
the bias s·b + t. The engine forms the interval behind every operator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.batchnorm import SharedBatchNorm
from lirpa_fastwarmup.engine.compat import engine, node_classes
from lirpa_fastwarmup.engine.nodes import BoundConvNd, MarginMatMul
from lirpa_fastwarmup.engine.products import LINEAR, convolution, interval_of_product

_CONVOLUTION: Any = (BoundConvNd, *node_classes("Conv"))
_LINEAR: Any = (*node_classes("Linear", "MatMul"), MarginMatMul)


def affine_interval(
    node: Any, interval_of: Callable[[Any], Any], first: Sequence[Any], radius_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor] | None:
    """IBP of an affine layer, or of the BatchNorm behind one; ``None`` where the engine must compute it.

    ``interval_of`` gives the interval of another node. Those in ``first`` are always formed, as regularisers read them.
    ``radius_dtype`` is that of :func:`interval_of_product`.
    """
    is_norm = isinstance(node, SharedBatchNorm) and node.bn_mode == "forward"
    layer = node.inputs[0] if is_norm else node
    if not _is_affine(layer) or (is_norm and len(layer.output_name) > 1):
        return None
    source = layer.inputs[0]
    rectified = type(source) is engine.bound_general.BoundRelu and len(source.output_name) == 1 and source not in first
    box, weight, *rest = [interval_of(one) for one in (source.inputs[0] if rectified else source, *layer.inputs[1:])]
    if torch.is_autocast_enabled(box[0].device.type):
        return None
    (lower, upper), weight, bias = box, weight[0], rest[0][0] if rest else None
    if isinstance(layer, _CONVOLUTION):
        plain = False, [0] * (lower.ndim - 2), layer.groups
        product = convolution(layer.stride, layer.padding, layer.dilation, *plain)
    else:
        product = LINEAR
        upper = layer._preprocess(upper, weight, bias)[0]
        lower, weight, bias = layer._preprocess(lower, weight, bias)
        if bias is not None and bias.shape != weight.shape[:1]:
            return None
    if is_norm:
        scale, shift = node.scale_and_shift(*(interval_of(source)[0] for source in node.inputs[1:]))
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return interval_of_product(product, lower, upper, weight, bias, rectified=rectified, radius_dtype=radius_dtype)


def _is_affine(node: Any) -> bool:
    """Whether ``node`` is a layer of constant weights, on vectors if it is no convolution."""
    if isinstance(node, _CONVOLUTION):
        return not getattr(node, "transposed", False) and not node.is_input_perturbed(1)
    return type(node) in _LINEAR and not node.is_input_perturbed(1) and len(node.inputs[0].output_shape) == 2
