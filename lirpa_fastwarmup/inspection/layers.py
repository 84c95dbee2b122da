"""A bounded network looked at over one batch: widths of bounds, states of ReLUs, weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lirpa_fastwarmup.boxes import (
    Epsilon,
    InputRange,
    check_input_shapes,
    check_radius,
    inputs_error,
    inputs_fit,
)
from lirpa_fastwarmup.engine.bounds import ibp_margins, input_box, proved
from lirpa_fastwarmup.engine.graph import AffineLayer, NetworkGraph, read_graph, weight_of
from lirpa_fastwarmup.engine.layers import LayerBounds, input_half_width, outputs_of_batch, relu_bounds, relus_read
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.inspection.diagnosis import findings
from lirpa_fastwarmup.inspection.statistics import AffineStatistics, Inspection, OutputStatistics, ReluStatistics
from lirpa_fastwarmup.recipe.initialization import ibp_std
from lirpa_fastwarmup.recipe.moments import state_moments


@torch.no_grad()
def inspect(
    bounded: BoundedModule,
    x: Tensor | tuple[Tensor, ...],
    eps: Epsilon,
    *,
    input_range: InputRange | None = (0.0, 1.0),
) -> Inspection:
    """Look at the interval bounds of ``bounded`` over the boxes around ``x``, and at its weights, layer by layer.

    The network is looked at in the mode that it is in. In training mode BatchNorm takes the statistics of ``x``, as a
    training step does: so look before and during training. In evaluation mode it takes its running ones, as a
    certificate does. Nothing of the network changes; the bounds of its last pass are those of this one afterwards.

    Args:
        bounded: the network.
        x: inputs ``(batch, *input)``, or a tuple of them for a network of several inputs. A BoundedTensor brings a box
            of its own.
        eps: radius of the box, in units of the input.
        input_range: lowest and highest valid input, to which the box is clipped; ``None`` for unclipped data.

    Raises:
        TypeError: ``bounded`` is no :class:`lirpa_fastwarmup.BoundedModule`.
        ValueError: the batch is empty, or of one sample while BatchNorm is in training mode; the inputs are not as
            many, or of other shapes, than the network was wrapped for; ``eps`` is 0 (all widths would be 0), negative,
            not finite or wider than the input range; ``x`` lies outside its range.
        NotImplementedError: Dropout is in training mode.
    """
    if not isinstance(bounded, BoundedModule):
        raise TypeError(
            f"expected a lirpa_fastwarmup.BoundedModule, found {type(bounded).__name__}: wrap the network first, "
            "bounded = lirpa_fastwarmup.BoundedModule(model, example_inputs)"
        )
    check_radius(eps, input_range)
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    _check_inputs(bounded, tensors)
    boxes = tuple(one if hasattr(one, "ptb") else _box(one, eps, input_range) for one in tensors)
    with exact_arithmetic(boxes[0].device), torch.autocast(boxes[0].device.type, enabled=False):
        outputs = outputs_of_batch(bounded, tuple(torch.as_tensor(one) for one in tensors))
        output = _bound(bounded, boxes, outputs)
    graph = read_graph(bounded)
    at_input = float(input_half_width(bounded)) if graph.first_sources else math.nan
    found = Inspection(
        eps=float(torch.as_tensor(eps).max()),
        samples=len(tensors[0]),
        training=bounded.training,
        input_half_width=at_input,
        relus=_relu_figures(relu_bounds(bounded), relus_read(bounded), at_input) if graph.relus else (),
        affine=tuple(_affine_figures(graph, layer) for layer in graph.affine),
        output=output,
    )
    return dataclasses.replace(found, findings=findings(found))


def _check_inputs(bounded: BoundedModule, tensors: tuple[Tensor, ...]) -> None:
    check_input_shapes(tensors, bounded.example)
    samples = min(len(one) for one in tensors)
    if samples == 0:
        raise ValueError("there is nothing to inspect: the batch is empty. Pass a batch of real inputs")
    if samples == 1 and any(isinstance(m, _BatchNorm) and m.training for m in bounded.wrapped.modules()):
        raise ValueError(
            "one sample has no statistics for BatchNorm in training mode: pass more, or call bounded.eval()"
        )


def _box(x: Tensor, eps: Epsilon, input_range: InputRange | None) -> Any:
    if not bool(inputs_fit(x, input_range)):  # On any device: figures are read from it anyway.
        raise inputs_error(x, input_range)
    return input_box(x, eps, input_range)


def _bound(bounded: BoundedModule, boxes: tuple[Any, ...], outputs: Tensor) -> OutputStatistics | None:
    """Bound every layer, in one pass, and tell of the outputs if they are those of a classifier with one input."""
    if len(boxes) > 1 or outputs.ndim != 2 or outputs.shape[1] < 2:
        bounded.compute_bounds(x=boxes, method="IBP", reuse_statistics=True)
        return None
    top = outputs.topk(2, dim=1)
    margins = ibp_margins(bounded, boxes[0], top.indices[:, 0], outputs.shape[1], reuse_statistics=True)
    return OutputStatistics(
        gap=float((top.values[:, 0] - top.values[:, 1]).double().mean()),
        lower_bound=float(margins.amin(1).double().mean()),
        certified=float(proved(margins).double().mean()),
        spread=float(outputs.double().std(0, correction=0).max()),
    )


def _relu_figures(
    layers: Sequence[LayerBounds], read: Sequence[Sequence[int]], at_input: float
) -> tuple[ReluStatistics, ...]:
    figures: list[ReluStatistics] = []
    # One transfer from the device for all layers.
    for layer, above, values in zip(layers, read, torch.stack([_sums(one) for one in layers]).tolist(), strict=True):
        half_width, active, inactive, dead, distance, *sums = values
        before = math.fsum(figures[place].half_width for place in above) / len(above) if above else at_input
        figures.append(
            ReluStatistics(
                name=layer.name,
                neurons=math.prod(layer.lower.shape[1:]),
                half_width=half_width,
                gain=_ratio(half_width, before),
                growth=_ratio(half_width, at_input),
                always_active=active,
                always_inactive=inactive,
                unstable=max(0.0, 1.0 - active - inactive),
                dead=dead,
                mean_ratio=_ratio(sums[0], -sums[2]),
                variance_ratio=_ratio(sums[1], sums[3]),
                distance=distance,
            )
        )
    return tuple(figures)


def _sums(layer: LayerBounds) -> Tensor:
    """Mean half-width, shares of active, inactive and dead, mean |c|, and the sums of ρ and s, in double precision."""
    lower, upper = layer.lower, layer.upper
    highest = upper.amax([0, *range(2, upper.ndim)])
    active, inactive = state_moments(lower, upper)
    figures = [
        (upper - lower).mean(dtype=torch.float64) / 2,
        (lower > 0).sum() / lower.numel(),
        (upper <= 0).sum() / upper.numel(),
        (highest <= 0).sum() / highest.numel(),
        torch.lerp(lower, upper, 0.5).abs().mean(dtype=torch.float64),
        *(active.total, active.spread, inactive.total, inactive.spread),
    ]
    return torch.stack([figure.double() for figure in figures])


def _ratio(above: float, below: float) -> float:
    if below == 0:
        return math.nan if above == 0 or math.isnan(above) else math.inf
    return above / below


def _affine_figures(graph: NetworkGraph, layer: AffineLayer) -> AffineStatistics:
    weight = weight_of(layer).double()
    # What an affine layer reads from ReLUs is half as wide as their inputs are: half of them are off.
    passed = 0.5 if graph.read_by(layer) else 1.0
    return AffineStatistics(
        name=layer.name,
        fan_in=layer.fan_in,
        weight_std=float(weight.std(correction=0)) if layer.plain else None,
        ibp_std=ibp_std(layer, graph.reads_relu_of_sum(layer)),
        expected_gain=passed * layer.fan_in * float(weight.abs().mean()) if layer.plain else None,
        batchnorm=graph.has_batchnorm(layer),
        classification=any(layer is last for last in graph.classification_layers()),
    )
