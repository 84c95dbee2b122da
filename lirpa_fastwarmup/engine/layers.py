"""What the last bound pass left at each layer: the bounds of ReLU inputs, and interval widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.batchnorm import BoundBatchNormalization, frozen_running_stats
from lirpa_fastwarmup.engine.graph import AffineLayer, NetworkGraph, StructureError, read_graph


@dataclass(frozen=True)
class LayerBounds:
    """Bounds on the input of one ReLU, ``(batch, *neurons)``, named by the affine layer that feeds it."""

    name: str
    lower: Tensor
    upper: Tensor


def _bounds_at(node: Any, graph: NetworkGraph) -> tuple[Tensor, Tensor]:
    lower, upper = getattr(node, "lower", None), getattr(node, "upper", None)
    passed = any(getattr(source, "lower", None) is not None for source in graph.inputs)
    if passed and lower is None and not node.perturbed:
        # Not every engine visits what no perturbed input leads to: there both bounds are the value.
        lower = upper = getattr(node, "forward_value", None)
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
    return [LayerBounds(name, *_bounds_at(relu.inputs[0], graph)) for name, relu in graph.relus]


def relus_read(bounded: Any) -> list[list[int]]:
    """For each ReLU, in the order of :func:`relu_bounds`, the places of the nearest ones that it reads."""
    graph = read_graph(bounded)
    return [graph.relus_above(relu) for _, relu in graph.relus]


def outputs_of_batch(bounded: Any, x: tuple[Tensor, ...]) -> Tensor:
    """The outputs of a clean pass that moves no running statistics; in training mode, with those of the batch."""
    with frozen_running_stats(bounded):
        return bounded(*x)


def input_half_width(bounded: Any) -> Tensor:
    """Δ_0: the mean half-width of what the first affine layer reads, after any normalisation.

    Raises:
        RuntimeError: no bounds have been computed since the last forward pass.
    """
    widths = []
    graph = read_graph(bounded)
    for node in graph.first_sources:
        lower, upper = _bounds_at(node, graph)
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
    graph = read_graph(bounded)
    with batchnorm_as_identity(bounded):
        bounded.compute_bounds(x=box, method="IBP", final_node_name=layer.node.name)
        read = [other.node for other in graph.read_by(layer)] or [layer.source]
        before = torch.stack([_mean_width(node, graph) for node in read]).mean()
        gain = float(_mean_width(layer.node, graph) / before)
        bounded.forward(*box)  # Clears bounds that hold for this layer's prefix of another network.
        return gain


def _mean_width(node: Any, graph: NetworkGraph) -> Tensor:
    lower, upper = _bounds_at(node, graph)
    return (upper - lower).mean()
