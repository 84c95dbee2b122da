"""Initialisation of weights: the paper's, under which interval bounds neither explode nor vanish, and others by name.

For a layer with weights N(0, σ²) that reads a ReLU, the expected gain in interval width is
(n/2)·E|W| = (n/2)·σ·√(2/π); it is 1 for σ = √(2π)/n (Shi et al., NeurIPS 2021, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.boxes import check_eps
from lirpa_fastwarmup.engine.bounds import input_box
from lirpa_fastwarmup.engine.graph import AffineLayer, StructureError, affine_weights, read_graph, weight_of, width_gain

_LITERATURE: dict[str, Callable[..., Tensor]] = {
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
}
INITIALIZATIONS = ("default", *_LITERATURE, "ibp", "ibp-calibrated")


@dataclass(frozen=True)
class LayerInit:
    """The initialisation of one layer.

    Attributes:
        name: qualified name of the module.
        fan_in: number of inputs that one output sums.
        std: standard deviation of the weights, after halving and calibration.
        halved: whether the layer reads the ReLU of a residual sum, which halves its weights.
    """

    name: str
    fan_in: float
    std: float
    halved: bool


@torch.no_grad()
def ibp_init_(
    bounded: Any,
    *,
    generator: torch.Generator | None = None,
    calibrate: Tensor | tuple[Tensor, ...] | None = None,
    eps: float | Tensor = 8 / 255,
) -> list[LayerInit]:
    """Initialise every affine weight except those of the classification layers, in place.

    Weights are drawn from N(0, σ²) with σ = √(2π)/n for fan-in n, or half of that for a layer that reads the ReLU of a
    residual sum directly, where intervals are twice as wide. Biases and BatchNorm stay. Classification layers are
    those whose output reaches the network's output without a non-linearity.

    The formula assumes ReLU between the layers. With ``calibrate``, the gain in interval width is measured on that
    batch, layer by layer, and scaled to 1 (see :func:`lirpa_fastwarmup.engine.graph.width_gain`), which also holds
    with other activations, pooling and residual sums.

    Args:
        bounded: a BoundedModule of either engine.
        generator: source of the random numbers; by default torch's global one.
        calibrate: example inputs ``(batch, *input)``, or a tuple of them for a network of several inputs. A
            BoundedTensor (see :func:`lirpa_fastwarmup.input_box`) has its own box.
        eps: radius of the unclipped box around plain ``calibrate``, in units of the input; gains depend on it slightly.

    Returns:
        The initialisation of each layer, in order of execution.

    Raises:
        StructureError: the weight of a layer is computed by a parametrisation.
        ValueError: ``eps`` is negative or not finite, or no rescaling brings a gain to 1. No weight has changed then.

    Example:
        >>> bounded = fw.BoundedModule(fw.models.cnn7((1, 28, 28), 10), torch.zeros(2, 1, 28, 28))
        >>> layers = fw.ibp_init_(bounded)
    """
    graph = read_graph(bounded)
    final = {layer.parameter for layer in graph.classification_layers()}
    # A weight that several layers share is initialised for the first of them.
    layers = list({layer.parameter: layer for layer in reversed(graph.affine) if layer.parameter not in final}.values())
    layers.reverse()
    _check_structure(layers)
    halved = [graph.reads_relu_of_sum(layer) for layer in layers]
    stds = [ibp_std(layer, half) for layer, half in zip(layers, halved, strict=True)]
    before = [weight_of(layer).clone() for layer in layers]
    scales = [1.0] * len(layers)
    try:
        for layer, std in zip(layers, stds, strict=True):
            weight_of(layer).normal_(0.0, std, generator=generator)
        if calibrate is not None:
            scales = _calibrate(bounded, layers, calibrate, eps)
    except Exception:
        for layer, weight in zip(layers, before, strict=True):
            weight_of(layer).copy_(weight)
        raise
    found = zip(layers, stds, scales, halved, strict=True)
    return [LayerInit(layer.name, layer.fan_in, std * scale, half) for layer, std, scale, half in found]


@torch.no_grad()
def initialize_(
    bounded: Any,
    scheme: str,
    *,
    generator: torch.Generator | None = None,
    calibrate: Tensor | None = None,
    eps: float | Tensor = 8 / 255,
) -> None:
    """Initialise the weights of ``bounded`` in place by the name of a scheme; biases and BatchNorm stay.

    Args:
        bounded: a BoundedModule of either engine.
        scheme: "default" keeps the weights; "kaiming" (normal, He et al., 2015), "xavier" (normal, Glorot and Bengio,
            2010) and "orthogonal" (Saxe et al., 2014) draw every affine weight, by torch.nn.init; "ibp" is
            :func:`ibp_init_`, "ibp-calibrated" the same with ``calibrate``.
        generator: source of the random numbers; by default torch's global one.
        calibrate, eps: for "ibp-calibrated", as in :func:`ibp_init_`.

    Raises:
        StructureError: the weight of a layer is computed by a parametrisation.
        ValueError: an unknown scheme, or "ibp-calibrated" without inputs to calibrate on.
    """
    if scheme not in INITIALIZATIONS:
        raise ValueError(f"unknown initialisation {scheme!r}; known are {', '.join(INITIALIZATIONS)}")
    if scheme == "ibp-calibrated" and calibrate is None:
        raise ValueError("the initialisation ibp-calibrated measures on inputs: pass a batch of them as calibrate")
    if scheme in _LITERATURE:
        _check_structure(read_graph(bounded).affine)
        for weight in affine_weights(bounded):
            _LITERATURE[scheme](weight, generator=generator)
    elif scheme != "default":
        ibp_init_(bounded, generator=generator, calibrate=calibrate if scheme == "ibp-calibrated" else None, eps=eps)


def ibp_std(layer: AffineLayer, halved: bool) -> float:
    """The standard deviation of :func:`ibp_init_`, ``halved`` for a layer that reads the ReLU of a residual sum."""
    return math.sqrt(2 * math.pi) / layer.fan_in / (2 if halved else 1)


def _check_structure(layers: list[AffineLayer]) -> None:
    for layer in layers:
        if not layer.plain:
            raise StructureError(
                f"the weight of {layer.name!r} is computed from {layer.parameter!r} by a parametrisation, so its "
                "values cannot be drawn: initialise before you register the parametrisation"
            )


def _calibrate(
    bounded: Any, layers: list[AffineLayer], inputs: Tensor | tuple[Tensor, ...], eps: float | Tensor
) -> list[float]:
    """Rescale the layers one after the other to a width gain of 1; return the factors."""
    check_eps(eps)
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    box = tuple(x if hasattr(x, "ptb") else input_box(x, eps, input_range=None) for x in tensors)
    scales = []
    for layer in layers:
        gain = width_gain(bounded, layer, box)
        if not (math.isfinite(gain) and gain > 0):
            raise ValueError(
                f"the interval width gain of layer {layer.name!r} was measured as {gain}, which no rescaling brings "
                "to 1: calibrate on real inputs, with an eps above float32's resolution of them"
            )
        weight_of(layer).div_(gain)
        scales.append(1.0 / gain)
    return scales
