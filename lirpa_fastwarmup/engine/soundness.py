"""Checks of bounds against values that the network attains: margins, and every bounded node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import Epsilon, InputRange, broadcast_to_batch
from lirpa_fastwarmup.engine.bounds import input_box
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.methods import MarginBounds, bounded_inputs
from lirpa_fastwarmup.engine.precision import SLACK
from lirpa_fastwarmup.engine.relaxations import wrong_relaxations

PROBED = 16  # Samples of a batch whose bounds are checked in full.
_PROBED_BY = {"CROWN": 8, "alpha-CROWN": 4}  # Of these, where a method is expensive.
_NARROW = 1 / 16  # Of the radius: bounds over so small a box are nearly attained, and a mistake in them shows.
# Rounding that bounds may be off by where there is no box, and the bounds are the network's own arithmetic.
_POINT_SLACK = {torch.float32: 1e-5, torch.float64: 1e-12}
_CORNERS = 2  # Random corners, beside those that gradients point to.


class UnsoundBoundError(Exception):
    """A value attained in a box lies outside its bounds: the engine is wrong, and no certificate can be believed.

    Attributes:
        contradictions: what was found, one sentence each.
        result: all that was computed nevertheless.
    """

    def __init__(self, contradictions: Sequence[str], result: object = None) -> None:
        more = f" (and {len(contradictions) - 1} more)" if len(contradictions) > 1 else ""
        super().__init__(
            f"the bounds are not sound, and no certificate of this verification can be believed: {contradictions[0]}"
            f"{more}. Compare with the other release of auto_LiRPA; lirpa-fastwarmup info names the one in use"
        )
        self.contradictions = list(contradictions)
        self.result = result


def class_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − z_j for every class j ≠ y, shape (batch, classes − 1); written out, as margin_matrix is being checked."""
    own = labels.unsqueeze(1)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, own, False)
    return logits.gather(1, own) - logits[others].view(len(logits), -1)


def corners_of(x: Tensor, eps: Epsilon, input_range: InputRange | None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest corner of each box; written out, as box_ends is being checked."""
    radius = broadcast_to_batch(eps, x, "eps")
    lower, upper = x - radius, x + radius
    if input_range is None:
        return lower, upper
    low, high = (torch.as_tensor(broadcast_to_batch(end, x, "input_range")).to(x) for end in input_range)
    return torch.maximum(lower, low.expand_as(x)), torch.minimum(upper, high.expand_as(x))


def contradicted(lower: Tensor, attained: Tensor) -> Tensor:
    """Which samples have a margin, attained at a point of the box, below its lower bound; shape (batch,).

    Args:
        lower: lower bounds on the margins, shape (batch, classes − 1).
        attained: margins at a point of each box, same shape.
    """
    return (attained < lower - tolerance(lower, attained)).any(1)


def find_contradictions(
    network: MarginBounds,
    x: Tensor,
    y: Tensor,
    eps: Epsilon,
    method: str,
    input_range: InputRange | None,
    *,
    points: Tensor | None = None,
    most: int = PROBED,
) -> list[tuple[int, str]]:
    """Bound the margins of some of a batch's samples over several boxes, and compare with values that are attained.

    The boxes are those of the batch, smaller ones, and boxes of radius 0, where bounds must be the margins themselves:
    a wrong sign in one weight of thousands, which the slack of a real box hides, shows there.

    Args:
        network: computes the bounds.
        x, y: samples ``(batch, *input)``, in the network's dtype, and their labels.
        eps: radius of the boxes; may have one value per sample, shape (batch, 1, …).
        method: the bounding method.
        input_range: lowest and highest valid input.
        points: a point of each box to look at beside those that are searched for.
        most: how many samples to look at; expensive methods are asked for fewer.

    Returns:
        Pairs of a sample's place in the batch and what was found.
    """
    some = _spread_out(len(y), min(most, _PROBED_BY.get(method, PROBED))).to(y.device)
    eps = per_sample(eps, x)(some)
    x, y = x[some], y[some]
    given = [] if points is None else [points[some]]
    found = []
    for radius, looked_at in ((eps, given), (eps * _NARROW, [])):
        margins = network.lower(input_box(x, radius, input_range), y, method)
        bounded = network.bounded(method)
        wrong = wrong_relaxations(bounded, len(y)) if method in ("CROWN-IBP", "CROWN") else []
        wrong += escapes(bounded, margins, y, *corners_of(x, radius, input_range), points=looked_at)
        found += [(place, f"{text}, by {method}") for place, text in wrong]
    found += _off_the_point(network, x, y, method, input_range)
    return [(int(some[place]), text) for place, text in found]


def per_sample(eps: Epsilon, x: Tensor) -> Callable[[Tensor], Epsilon]:
    """What gives the radii of some samples of the batch ``x``, where ``eps`` has one for each, shape (batch, 1, …)."""
    if isinstance(eps, Tensor) and eps.ndim == x.ndim and len(eps) == len(x):
        return lambda samples: eps[samples]
    return lambda samples: eps


def _spread_out(count: int, most: int) -> Tensor:
    """At most ``most`` of the numbers below ``count``, evenly spaced."""
    return torch.arange(0, count, -(-count // most))


@torch.no_grad()
def _off_the_point(
    network: MarginBounds, x: Tensor, y: Tensor, method: str, input_range: InputRange | None
) -> list[tuple[int, str]]:
    margins = class_margins(network.model(x), y)
    lower = network.lower(input_box(x, 0.0, input_range), y, method)
    scale = 1 + torch.maximum(lower.abs(), margins.abs()).amax(1, keepdim=True)
    off = ((lower - margins).abs() > _POINT_SLACK[lower.dtype] * scale).any(1)
    text = f"has other margins than {method} gives the box of radius 0 around it"
    return [(place, text) for place in off.nonzero().flatten().tolist()]


def tolerance(bound: Tensor, value: Tensor) -> Tensor:
    """What rounding explains, per element: relative to the element, and a few ulp of the largest in its row."""
    size = torch.maximum(bound.abs(), value.abs())
    largest = _rows(size).amax(1).view(-1, *[1] * (size.ndim - 1))
    return SLACK[bound.dtype] * (1 + size) + 8 * torch.finfo(bound.dtype).eps * largest


@dataclass(frozen=True)
class _Held:
    """A node with the bounds that a pass left at it, which the next pass clears."""

    node: Any
    lower: Tensor
    upper: Tensor


def escapes(
    bounded: Any, margins: Tensor, y: Tensor, lower: Tensor, upper: Tensor, *, points: Iterable[Tensor] = ()
) -> list[tuple[int, str]]:
    """Values of nodes and margins, attained in a box, outside the bounds of the last pass over that box.

    Looked at are the given points, random corners, and for every pre-activation and the margins the two corners that
    the gradient of one element per sample points to: of the element that comes closest to its bounds in every other
    sample, of a random one in the others.

    Args:
        bounded: a BoundedModule, in evaluation mode; its last pass bounded the boxes.
        margins: that pass's lower bounds on the margins, (batch, classes − 1).
        y: labels (batch,).
        lower, upper: the lowest and highest corner of each box, ``(batch, *input)``.
        points: points of the boxes, each of their shape, to look at beside those that are searched for.

    Returns:
        Pairs of a sample's place and what lies outside its bounds.
    """
    search = _Search(bounded, margins, y, lower, upper)
    for point in (*points, *search.corners()):
        search.visit(point)
    for point in search.extremes():
        search.visit(point)
    return search.found


class _Search:
    def __init__(self, bounded: Any, margins: Tensor, y: Tensor, lower: Tensor, upper: Tensor) -> None:
        self.bounded, self.y, self.lower, self.upper = bounded, y, lower, upper
        self.graph = read_graph(bounded)
        self.held = list(_held(self.graph.nodes, len(y)))
        self.margins = margins
        self.found: list[tuple[int, str]] = []
        self.generator = torch.Generator().manual_seed(0)
        # Of every node's elements, the share of its bounds that values have filled so far.
        self.lowest = [torch.full_like(held.lower, torch.inf) for held in self.held]
        self.highest = [torch.full_like(held.upper, -torch.inf) for held in self.held]

    def corners(self) -> Iterator[Tensor]:
        yield (self.lower + self.upper) / 2
        for _ in range(_CORNERS):
            side = torch.rand(self.lower.shape, generator=self.generator).to(self.lower.device) < 0.5
            yield torch.where(side, self.lower, self.upper)

    @torch.no_grad()
    def visit(self, point: Tensor) -> None:
        """Compare all values at ``point``, and the margins of the model itself, with their bounds."""
        attained = class_margins(self.bounded.wrapped(point), self.y)
        self.bounded.forward(point)
        for sample in contradicted(self.margins, attained).nonzero().flatten():
            self.found.append((int(sample), "has a margin below its lower bound at a point of its box"))
        for place, held in enumerate(self.held):
            value = held.node.forward_value
            self.lowest[place] = torch.minimum(self.lowest[place], value)
            self.highest[place] = torch.maximum(self.highest[place], value)
            low = value < held.lower - tolerance(held.lower, value)
            high = value > held.upper + tolerance(held.upper, value)
            for sample in _rows(low | high).any(1).nonzero().flatten():
                self.found.append((int(sample), f"has a value outside its bounds {self.graph.place_of(held.node)}"))

    def extremes(self) -> Iterator[Tensor]:
        """The corners that signed gradients at the centre point to."""
        read = {id(node) for node in bounded_inputs(self.bounded)}
        places = [place for place, held in enumerate(self.held) if id(held.node) in read]
        centre = ((self.lower + self.upper) / 2).requires_grad_(True)
        with torch.enable_grad():
            margins = class_margins(self.bounded.forward(centre), self.y)
        values = [self.held[place].node.forward_value for place in places]  # Visits replace them.
        for place, value in zip(places, values, strict=True):
            yield from self._towards(centre, value, self._elements(place))
        yield from self._towards(centre, margins, (margins - self.margins).argmin(1))

    def _elements(self, place: int) -> Tensor:
        """One element per sample, by its place in the flattened node."""
        held = self.held[place]
        width = _rows(held.upper - held.lower)
        filled = _rows(self.highest[place] - self.lowest[place]) / width.clamp(min=torch.finfo(width.dtype).tiny)
        chosen = torch.where(width > 0, filled, torch.zeros_like(filled)).argmax(1)
        drawn = torch.randint(width.shape[1], (len(width),), generator=self.generator).to(chosen.device)
        other = torch.arange(len(width), device=chosen.device) % 2 == 1
        return torch.where(other, drawn, chosen)

    def _towards(self, centre: Tensor, values: Tensor, elements: Tensor) -> Iterator[Tensor]:
        with torch.enable_grad():
            total = _rows(values).gather(1, elements.unsqueeze(1)).sum()
            (gradient,) = torch.autograd.grad(total, centre, retain_graph=True, allow_unused=True)
        if gradient is not None:
            yield torch.where(gradient > 0, self.upper, self.lower)
            yield torch.where(gradient > 0, self.lower, self.upper)


def _held(nodes: Sequence[Any], batch: int) -> Iterator[_Held]:
    """The nodes that the last pass bounded, with their bounds for every sample."""
    for node in nodes:
        lower, upper = getattr(node, "lower", None), getattr(node, "upper", None)
        if not (node.perturbed and isinstance(lower, Tensor) and isinstance(upper, Tensor) and node.inputs):
            continue
        if lower.is_floating_point() and lower.shape == upper.shape == torch.Size((batch, *node.output_shape[1:])):
            yield _Held(node, lower.detach(), upper.detach())


def _rows(values: Tensor) -> Tensor:
    """One row a sample, also where a sample has one value without a dimension."""
    return values.reshape(len(values), -1)
