"""Checks of CROWN's linear relaxations, node by node.

A relaxation that is on the wrong side of its function by a little is hidden, in the bounds of a whole network, by the
slack of all others. Here every node is checked by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.operators import OPERATORS, operator_of
from lirpa_fastwarmup.engine.precision import SLACK

_ELEMENTS = 8  # Outputs of a node that are looked at, for each sample.


@torch.no_grad()
def wrong_relaxations(bounded: Any, batch: int) -> list[tuple[int, str]]:
    """Linear relaxations of nodes with one argument that some point between the argument's bounds contradicts.

    Args:
        bounded: a BoundedModule whose last pass was one of CROWN-IBP or CROWN, so that its nodes hold bounds. Slopes
            that alpha-CROWN has optimised are left out.
        batch: samples of that pass.

    Returns:
        Pairs of a sample's place in the batch and what is wrong.
    """
    graph = read_graph(bounded)
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in graph.nodes:
        if _is_relaxed(node, batch):
            wrong = _wrong_samples(node, graph.nodes[-1], batch, generator)
            text = f"has a linear relaxation on the wrong side of its function {graph.place_of(node)}"
            found += [(sample, text) for sample in wrong]
    return found


def _is_relaxed(node: Any, batch: int) -> bool:
    if operator_of(node) not in OPERATORS:  # A user's own may want other arguments; it is untested anyway.
        return False
    if list(getattr(node, "requires_input_bounds", ())) != [0] or getattr(node, "opt_stage", None) in ("opt", "reuse"):
        return False
    source = node.inputs[0]
    ends = getattr(source, "lower", None), getattr(source, "upper", None)
    return bool(source.perturbed) and all(isinstance(end, Tensor) and len(end) == batch for end in ends)


def _wrong_samples(node: Any, last: Any, batch: int, generator: torch.Generator) -> list[int]:
    source = node.inputs[0]
    shape = torch.Size(node.output_shape[1:])
    elements = _elements(source.lower, source.upper, shape.numel(), generator)
    count = len(elements)
    rows = source.lower.new_zeros(count, batch, shape.numel())
    rows = rows.scatter(2, elements.unsqueeze(2), 1.0).unflatten(2, shape)
    # The engine's own activations keep slopes for each node that bounds are computed of.
    options = {"start_node": last} if "start_node" in inspect.signature(node.bound_backward).parameters else {}
    [(below, above), *_], below_bias, above_bias = node.bound_backward(rows, rows.clone(), *node.inputs, **options)
    wrong = torch.zeros(batch, dtype=torch.bool, device=rows.device)
    for point in _points(source.lower.expand_as(below), source.upper.expand_as(below), below, above, generator):
        value = (
            node.forward(point.flatten(0, 1))
            .reshape(count * batch, -1)
            .gather(1, elements.reshape(-1, 1))
            .view(count, batch)
        )
        for sign, slopes, bias in ((1, below, below_bias), (-1, above, above_bias)):
            terms = (slopes * point).reshape(count, batch, -1)
            scale = 1 + torch.maximum(value.abs(), terms.abs().sum(2) + torch.as_tensor(bias).abs())
            wrong |= (sign * (terms.sum(2) + bias - value) > SLACK[rows.dtype] * scale).any(0)
    return [int(sample) for sample in wrong.nonzero().flatten()]


def _elements(lower: Tensor, upper: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places of outputs, (elements, batch): random ones, and those of the widest inputs where each has its own."""
    drawn = torch.randint(count, (_ELEMENTS, len(lower)), generator=generator).to(lower.device)
    if lower[0].numel() == count:
        widest = min(_ELEMENTS // 2, count)
        drawn[:widest] = (upper - lower).reshape(len(lower), -1).topk(widest, 1).indices.T
    return drawn


def _points(lower: Tensor, upper: Tensor, below: Tensor, above: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The ends, the corners where the lines are highest and lowest, and points in between."""
    yield from (lower, upper, torch.where(below > 0, upper, lower), torch.where(above > 0, lower, upper))
    for share in (0.25, 0.5, 0.75):
        yield lower + (upper - lower) * share
    for _ in range(2):
        yield lower + (upper - lower) * torch.rand(lower.shape, generator=generator).to(lower)
