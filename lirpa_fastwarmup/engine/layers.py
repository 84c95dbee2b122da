"""What the last bound pass left at each layer: the bounds of ReLU inputs, and interval widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.graph import AffineLayer, StructureError, read_graph
from lirpa_fastwarmup.engine.sharing import BoundBatchNormalization


@dataclass(frozen=True)
class LayerBounds:
    """Bounds on the input of one ReLU, (batch, *neurons), named by the affine layer that feeds it."""

    name: str
    lower: Tensor
    upper: Tensor


def _bounds_at(node: Any) -> tuple[Tensor, Tensor]:
    lower, upper = getattr(node, "lower", None), getattr(node, "upper", None)
    if lower is None or upper is None:
        raise RuntimeError(
            "the BoundedModule holds no layer bounds: a forward pass clears them. Call "
            "bounded.compute_bounds(x=(box,), method='IBP') first"
        )
    return lower, upper


def relu_bounds(bounded: Any) -> list[LayerBounds]:
    """The bounds on every ReLU's input that the last pass left, in order of execution.

    Raises:
        RuntimeError: no bounds have been computed since the last forward pass.
        StructureError: the network has no ReLU.
    """
    graph = read_graph(bounded)
    if not graph.relus:
        raise StructureError(
            "the network has no ReLU, whose inputs the regularisers are defined on: leave them out (regularizers=())"
        )
    return [LayerBounds(graph.relu_name(relu), *_bounds_at(relu.inputs[0])) for relu in graph.relus]


def input_half_width(bounded: Any) -> Tensor:
    """Δ_0: the mean half-width of what the first affine layer reads, after any normalisation.

    Raises:
        RuntimeError: no bounds have been computed since the last forward pass.
    """
    widths = []
    for node in read_graph(bounded).first_sources():
        lower, upper = _bounds_at(node)
        widths.append((upper - lower).flatten())
    return torch.cat(widths).mean() / 2


class IdentityBatchNorm(BoundBatchNormalization):
    """A BatchNorm node that lets its input through, in place of one taken as the identity."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x

    def interval_propagate(self, *v: Any) -> Any:
        return v[0]


@contextmanager
def batchnorm_as_identity(bounded: Any) -> Iterator[None]:
    """Take every BatchNorm as the identity, for as long as the block lasts."""
    nodes = [node for node in bounded._modules.values() if isinstance(node, BoundBatchNormalization)]
    classes = [node.__class__ for node in nodes]
    try:
        for node in nodes:
            node.__class__ = IdentityBatchNorm
        yield
    finally:
        for node, cls in zip(nodes, classes, strict=True):
            node.__class__ = cls


@torch.no_grad()
def width_gain(bounded: Any, layer: AffineLayer, box: tuple[Any, ...]) -> float:
    """The factor by which ``layer`` widens intervals, BatchNorm taken as the identity.

    The mean width at the layer's output over the mean width at the outputs of the affine layers that it
    reads; for a first layer, over the width of what it reads.

    Args:
        box: the inputs, BoundedTensors.
    """
    read = read_graph(bounded).read_by(layer)
    with batchnorm_as_identity(bounded):
        bounded.compute_bounds(x=box, method="IBP", final_node_name=layer.node.name)
        before = [_mean_width(other.node) for other in read] or [_mean_width(layer.source)]
        return float(_mean_width(layer.node) / torch.stack(before).mean())


def _mean_width(node: Any) -> Tensor:
    lower, upper = _bounds_at(node)
    return (upper - lower).mean()
