"""Initialisations: the paper's, under which interval bounds neither explode nor vanish, and others by name.

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
from lirpa_fastwarmup.engine.graph import AffineLayer, StructureError, affine_weights, read_graph, weight_of
from lirpa_fastwarmup.engine.layers import width_gain

_LITERATURE: dict[str, Callable[..., Tensor]] = {
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
}
INITIALIZATIONS = ("default", *_LITERATURE, "ibp", "ibp-calibrated")


@dataclass(frozen=True)
class LayerInit:
    """How one layer was initialised.

    Attributes:
        name: qualified name of the module.
        fan_in: inputs that one output adds up.
        std: standard deviation of the weights, after halving and calibration.
        halved: the layer reads the ReLU of a residual sum, and its weights were halved for it.
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
    """Initialise every affine weight but those of the classification layers, in place.

    Weights are drawn from N(0, σ²) with σ = √(2π)/n for fan-in n; a layer that reads the ReLU of a
    residual sum directly, where intervals are twice as wide, gets half of that. Biases and BatchNorm
    stay as they are. Classification layers are those whose output reaches the network's output without
    a non-linearity.

    The formula supposes ReLU between the layers. ``calibrate`` measures instead: on that batch, layer
    by layer, the gain in interval width (see :func:`lirpa_fastwarmup.engine.layers.width_gain`) is
    brought to 1, so that it also holds with other activations, pooling and residual sums.

    Args:
        bounded: a BoundedModule of either engine.
        generator: source of the random numbers; by default torch's own.
        calibrate: example inputs ``(batch, *input)``, or a tuple of them for a network of several inputs. A
            BoundedTensor (see :func:`lirpa_fastwarmup.input_box`) brings a box of its own.
        eps: radius of the unclipped box around plain ``calibrate``, in units of the input. The gain of a
            layer depends on it a little, since wide intervals leave more neurons undecided.

    Returns:
        What each initialised layer got, in order of execution.

    Raises:
        StructureError: the weight of a layer is computed by a parametrisation.
        ValueError: ``eps`` is negative or not finite, or a gain that no rescaling brings to 1.

        No weight has changed then.
    """
    graph = read_graph(bounded)
    final = {layer.parameter for layer in graph.classification_layers()}
    # A weight that serves in several places is initialised for the first of them.
    layers = list({layer.parameter: layer for layer in reversed(graph.affine) if layer.parameter not in final}.values())
    layers.reverse()
    _check_structure(layers)
    halved = {id(layer) for layer in layers if graph.reads_relu_of_sum(layer)}
    before = [weight_of(layer).clone() for layer in layers]
    scales = [1.0] * len(layers)
    try:
        for layer in layers:
            weight_of(layer).normal_(0.0, ibp_std(layer, id(layer) in halved), generator=generator)
        if calibrate is not None:
            scales = _calibrate(bounded, layers, calibrate, eps)
    except Exception:
        for layer, weight in zip(layers, before, strict=True):
            weight_of(layer).copy_(weight)
        raise
    return [
        LayerInit(layer.name, layer.fan_in, ibp_std(layer, id(layer) in halved) * scale, id(layer) in halved)
        for layer, scale in zip(layers, scales, strict=True)
    ]


@torch.no_grad()
def initialize_(
    bounded: Any,
    scheme: str,
    *,
    generator: torch.Generator | None = None,
    calibrate: Tensor | None = None,
    eps: float | Tensor = 8 / 255,
) -> None:
    """Initialise the weights of ``bounded`` in place by a scheme's name; biases and BatchNorm stay.

    Args:
        bounded: a BoundedModule of either engine.
        scheme: "default" leaves the network as its author made it; "kaiming" (normal, He et al., 2015), "xavier"
            (normal, Glorot and Bengio, 2010) and "orthogonal" (Saxe et al., 2014) draw every affine weight, by
            torch.nn.init; "ibp" is :func:`ibp_init_`, "ibp-calibrated" that with ``calibrate``.
        generator: source of the random numbers; by default torch's own.
        calibrate, eps: of "ibp-calibrated", as in :func:`ibp_init_`.

    Raises:
        StructureError: the weight of a layer is computed by a parametrisation.
        ValueError: an unknown scheme, or "ibp-calibrated" without inputs to calibrate on.
    """
    if scheme not in INITIALIZATIONS:
        raise ValueError(f"unknown initialisation {scheme!r}; known are {', '.join(INITIALIZATIONS)}")
    if scheme == "ibp-calibrated" and calibrate is None:
        raise ValueError("the initialisation ibp-calibrated measures on inputs: pass a batch of them as calibrate")
    if scheme in _LITERATURE:
        layers = read_graph(bounded).affine
        _check_structure(layers)
        for weight in affine_weights(bounded):
            _LITERATURE[scheme](weight, generator=generator)
    elif scheme != "default":
        ibp_init_(bounded, generator=generator, calibrate=calibrate if scheme == "ibp-calibrated" else None, eps=eps)


def ibp_std(layer: AffineLayer, halved: bool) -> float:
    """√(2π)/n, or ``halved`` for a layer that reads the ReLU of a residual sum: what :func:`ibp_init_` draws with."""
    return math.sqrt(2 * math.pi) / layer.fan_in / (2 if halved else 1)


def _check_structure(layers: list[AffineLayer]) -> None:
    for layer in layers:
        if not layer.plain:
            raise StructureError(
                f"the weight of {layer.name!r} is computed from {layer.parameter!r} by a parametrisation, so that "
                "its values cannot be drawn: initialise before the parametrisation is registered"
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
