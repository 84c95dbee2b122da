"""The inspection of a bounded network over one batch: widths of bounds, states of ReLUs, weights."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lirpa_fastwarmup.boxes import Epsilon, InputRange, check_input_shapes, check_positive, inputs_error, inputs_fit
from lirpa_fastwarmup.engine import batchnorm, bounds, graph, module, plain, precision
from lirpa_fastwarmup.inspection.diagnosis import findings
from lirpa_fastwarmup.inspection.statistics import AffineStatistics, Inspection, OutputStatistics, ReluStatistics
from lirpa_fastwarmup.recipe import initialization, regularizers


@torch.no_grad()
def inspect(bounded: Any, x: Tensor | tuple[Tensor, ...], eps: Any, *, input_range: Any = (0.0, 1.0)) -> Inspection:
    """Compute statistics of interval bounds over the boxes around ``x``, and of weights, for each layer.

    BatchNorm uses the statistics of ``x`` in training mode, as a training step does, and its running statistics in
    evaluation mode, as certificates do. Nothing changes, except that the network holds the bounds of this pass.

    Args:
        bounded: the network, a BoundedModule of this package or the engine's own.
        x: inputs ``(batch, *input)``, a tuple of them for several inputs, or BoundedTensors with boxes of their own.
        eps, input_range: radius of the box, and its range, as for :func:`lirpa_fastwarmup.input_box`.

    Raises:
        TypeError: ``bounded`` is not a BoundedModule.
        ValueError: the batch is empty, or has one sample while BatchNorm is in training mode; number or shapes of the
            inputs differ from those that the network was wrapped with; ``eps`` is 0 (all widths would be 0), negative,
            not finite or wider than the input range; ``x`` lies outside its range.
        NotImplementedError: an engine module with bounds that are not proved.

    Example:
        >>> print(fw.inspect(fw.BoundedModule(net, x), x, eps=8 / 255))  # Tables of the layers, then findings.
    """
    bounded = plain.view_of(bounded)
    layout = bounded.layout
    largest = torch.as_tensor(layout.pack_eps(eps, input_range)).max()
    check_positive(largest)
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    check_input_shapes(tensors, bounded.example)
    samples = min(map(len, tensors))
    if samples == 0:
        raise ValueError("the batch is empty: pass a batch of real inputs")
    if samples == 1 and any(isinstance(m, _BatchNorm) and m.training for m in bounded.wrapped.modules()):
        raise ValueError("one sample has no statistics for BatchNorm in training: pass more, or call bounded.eval()")
    boxes = tuple(map(_box, tensors, layout.radii(eps), layout.ranges(input_range)))
    with precision.exact_arithmetic(boxes[0].device):
        with batchnorm.frozen_running_stats(bounded):
            outputs = bounded(*map(torch.as_tensor, tensors))
        output = _bound(bounded, boxes, outputs)
    network = graph.read_graph(bounded)
    at_input = float(graph.input_half_width(bounded)) if network.first_sources else math.nan
    found = Inspection(
        eps=float(largest),
        samples=len(tensors[0]),
        training=bounded.training,
        input_half_width=at_input,
        relus=_relu_statistics(bounded, at_input) if network.relus else (),
        affine=tuple(_affine_statistics(network, layer) for layer in network.affine),
        output=output,
    )
    return dataclasses.replace(found, findings=findings(found))


def _box(x: Tensor, eps: Epsilon, input_range: InputRange | None) -> Any:
    if hasattr(x, "ptb") or not x.is_floating_point():
        return x
    if not bool(inputs_fit(x, input_range)):  # Waits for the device, as reading the statistics does.
        raise inputs_error(x, input_range)
    return bounds.input_box(x, eps, input_range)


def _bound(bounded: module.BoundedModule, boxes: tuple[Any, ...], outputs: Tensor) -> OutputStatistics | None:
    """Bound every layer in one pass; return the statistics of the outputs of a classifier."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        bounded.compute_bounds(x=boxes, method="IBP", reuse_statistics=True)
        return None
    top = outputs.topk(2, dim=1)
    labels, classes = top.indices[:, 0], outputs.shape[1]
    margins, _ = bounds.ibp_margin_bounds(bounded, boxes, labels, classes, reuse_statistics=True)
    return OutputStatistics(
        gap=float((top.values[:, 0] - top.values[:, 1]).double().mean()),
        lower_bound=float(margins.amin(1).double().mean()),
        certified=float(bounds.proved(margins).double().mean()),
        spread=float(outputs.double().std(0, correction=0).max()),
    )


def _relu_statistics(bounded: module.BoundedModule, at_input: float) -> tuple[ReluStatistics, ...]:
    layers, found = graph.relu_bounds(bounded), list[ReluStatistics]()
    moments = torch.stack([_sums(layer) for layer in layers]).tolist()  # One transfer from the device for all layers.
    for layer, above, values in zip(layers, graph.relus_read(bounded), moments, strict=True):
        half_width, active, inactive, dead, distance, *sums = values
        before = math.fsum(found[place].half_width for place in above) / len(above) if above else at_input
        widths = half_width, _ratio(half_width, before), _ratio(half_width, at_input)
        fractions = active, inactive, max(0.0, 1.0 - active - inactive), dead
        values = *widths, *fractions, _ratio(sums[0], -sums[2]), _ratio(sums[1], sums[3]), distance
        found.append(ReluStatistics(layer.name, math.prod(layer.lower.shape[1:]), *values))
    return tuple(found)


def _sums(layer: graph.LayerBounds) -> Tensor:
    """Mean half-width, fractions active, inactive and dead, mean |c|, and the sums of ρ and s, in float64."""
    lower, upper = layer.lower, layer.upper
    highest = upper.amax([place for place in range(upper.ndim) if place != layer.units])
    active, inactive = regularizers.state_moments(lower, upper)
    values = [
        (upper - lower).mean(dtype=torch.float64) / 2,
        (lower > 0).sum() / lower.numel(),
        (upper <= 0).sum() / upper.numel(),
        (highest <= 0).sum() / highest.numel(),
        torch.lerp(lower, upper, 0.5).abs().mean(dtype=torch.float64),
        *active,
        *inactive,
    ]
    return torch.stack([value.double() for value in values])


def _ratio(above: float, below: float) -> float:
    return above / below if below != 0 else math.inf if abs(above) > 0 else math.nan


def _affine_statistics(network: graph.NetworkGraph, layer: graph.AffineLayer) -> AffineStatistics:
    weight = layer.weight.double()
    passed = 0.5 if network.reads_activation(layer) else 1.0  # About half of the ReLUs are inactive.
    return AffineStatistics(
        name=layer.name,
        fan_in=layer.fan_in,
        weight_std=float(weight.std(correction=0)) if layer.plain else None,
        ibp_std=initialization.ibp_std(layer, network.reads_relu_of_sum(layer)),
        expected_gain=passed * layer.fan_in * float(weight.abs().mean()) if layer.plain else None,
        batchnorm=network.has_batchnorm(layer),
        classification=layer in network.classification_layers(),
    )
