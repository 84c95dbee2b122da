"""Initialisation of weights: the paper's, under which interval bounds neither explode nor vanish, and others by name.

For a layer with weights N(0, σ²) that reads a ReLU, the expected gain in interval width is
(n/2)·E|W| = (n/2)·σ·√(2/π); it is 1 for σ = √(2π)/n (Shi et al., NeurIPS 2021, section 3.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.graph import AffineLayer, StructureError, affine_weights, read_graph

_LITERATURE: dict[str, Callable[..., Tensor]] = {
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
}
INITIALIZATIONS = ("default", *_LITERATURE, "ibp")


@dataclass(frozen=True)
class LayerInit:
    """The initialisation of one layer.

    Attributes:
        name: qualified name of the module.
        fan_in: number of inputs that one output sums.
        std: standard deviation of the weights, after halving.
        halved: whether the layer reads the ReLU of a residual sum, which halves its weights.
    """

    name: str
    fan_in: float
    std: float
    halved: bool


@torch.no_grad()
def ibp_init_(bounded: Any, *, generator: torch.Generator | None = None) -> list[LayerInit]:
    """Initialise all affine weights but the classification layers' in place; return the layers in order of execution.

    Weights are drawn from N(0, σ²) with σ = √(2π)/n for fan-in n, or half of that for a layer that reads the ReLU of a
    residual sum directly, where intervals are twice as wide. Biases and BatchNorm stay. Classification layers reach the
    network's output without a non-linearity. Raises StructureError, and changes nothing, for parametrised weights.

    Args:
        bounded: a BoundedModule of either engine.
        generator: source of the random numbers; by default torch's global one.

    Example:
        >>> bounded = fw.BoundedModule(fw.models.cnn7((1, 28, 28), 10), torch.zeros(2, 1, 28, 28))
        >>> layers = fw.ibp_init_(bounded)
    """
    graph = read_graph(bounded)
    final = {layer.parameter for layer in graph.classification_layers()}
    # A weight that several layers share is initialised for the first of them.
    first = {layer.parameter: layer for layer in reversed(graph.affine)}
    layers = [layer for layer in graph.affine if layer is first[layer.parameter] and layer.parameter not in final]
    _check_structure(layers)
    halved = [graph.reads_relu_of_sum(layer) for layer in layers]
    stds = [ibp_std(layer, half) for layer, half in zip(layers, halved, strict=True)]
    for layer, std in zip(layers, stds, strict=True):
        layer.weight.normal_(0.0, std, generator=generator)
    return [LayerInit(one.name, one.fan_in, std, half) for one, std, half in zip(layers, stds, halved, strict=True)]


@torch.no_grad()
def initialize_(bounded: Any, scheme: str, *, generator: torch.Generator | None = None) -> None:
    """Initialise the weights of ``bounded`` in place by the name of a scheme; biases and BatchNorm stay.

    Args:
        bounded, generator: see :func:`ibp_init_`, with its errors.
        scheme: "default" keeps the weights; "kaiming" (normal, He et al., 2015), "xavier" (normal, Glorot and Bengio,
            2010) and "orthogonal" (Saxe et al., 2014) draw every affine weight, by torch.nn.init; "ibp" is
            :func:`ibp_init_`. Raises ValueError for an unknown one.
    """
    if scheme not in INITIALIZATIONS:
        raise ValueError(f"unknown initialisation {scheme!r}; known are {', '.join(INITIALIZATIONS)}")
    if scheme in _LITERATURE:
        _check_structure(read_graph(bounded).affine)
        for weight in affine_weights(bounded):
            _LITERATURE[scheme](weight, generator=generator)
    elif scheme != "default":
        ibp_init_(bounded, generator=generator)


def ibp_std(layer: AffineLayer, halved: bool) -> float:
    """The standard deviation of :func:`ibp_init_`, ``halved`` for a layer that reads the ReLU of a residual sum."""
    return math.sqrt(2 * math.pi) / layer.fan_in / (2 if halved else 1)


def _check_structure(layers: list[AffineLayer]) -> None:
    for layer in layers:
        if not layer.plain:
            text = f"the weight of {layer.name!r} is computed from {layer.parameter!r} by a parametrisation, so its "
            raise StructureError(text + "values cannot be drawn: initialise before you register the parametrisation")
