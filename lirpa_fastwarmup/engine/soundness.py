"""Checks that bounds contain what the network attains: margins, the values of every node, linear relaxations."""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import Epsilon, InputRange, broadcast_to_batch, radii_of
from lirpa_fastwarmup.engine.bounds import MarginBounds, bounded_inputs, input_box
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.operators import OPERATORS, operator_of
from lirpa_fastwarmup.engine.precision import SLACK

PROBED = 16  # Samples of a batch whose bounds are checked in full.
_PROBED_BY = {"CROWN": 8, "alpha-CROWN": 4}  # Fewer where a method is expensive.
_NARROW = 1 / 16  # Of the radius: bounds over so small a box are nearly attained, so that errors in them show.
_POINT_SLACK = {torch.float32: 1e-5, torch.float64: 1e-12}  # At radius 0 bounds are the network's own arithmetic.
_CORNERS = 2  # Random corners, in addition to the corners that gradients point to.
_ELEMENTS = 8  # Outputs of a node per sample whose relaxations are checked.

Finding = tuple[int, str]  # A sample's index in the batch, and what is wrong with it.


class UnsoundBoundError(Exception):
    """A value attained in a box lies outside its bounds: the engine is wrong, and no certificate can be trusted.

    ``contradictions`` holds what was found, one sentence each, and ``result`` what was computed nevertheless.
    """

    def __init__(self, contradictions: Sequence[str], result: object = None) -> None:
        more = f" (and {len(contradictions) - 1} more)" if len(contradictions) > 1 else ""
        text = f"the bounds are not sound, and no certificate of this verification can be trusted: {contradictions[0]}"
        text += f"{more}. Compare with the other release of auto_LiRPA; lirpa-fastwarmup info prints the one in use"
        super().__init__(text)
        self.contradictions, self.result = list(contradictions), result


def class_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − z_j for every class j ≠ y, shape (batch, classes − 1); independent of margin_matrix, which it checks."""
    own = labels.unsqueeze(1)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, own, False)
    return logits.gather(1, own) - logits[others].view(len(logits), -1)


def attained_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`class_margins`, plus the rounding of logits that share a large offset."""
    return class_margins(logits, labels) + _rounding(logits)


def _rounding(logits: Tensor) -> Tensor:
    return 8 * torch.finfo(logits.dtype).eps * logits.abs().amax(1, keepdim=True)


def corners_of(x: Tensor, eps: Epsilon, input_range: InputRange | None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest corner of each box; independent of box_ends, which it checks."""
    radius = broadcast_to_batch(eps, x, "eps")
    lower, upper = x - radius, x + radius
    if input_range is None:
        return lower, upper
    low, high = (torch.as_tensor(broadcast_to_batch(end, x, "input_range")).to(x) for end in input_range)
    return torch.maximum(lower, low.expand_as(x)), torch.minimum(upper, high.expand_as(x))


def tolerance(bound: Tensor, value: Tensor) -> Tensor:
    """What rounding explains, per element: relative to the element, and a few ulp of the largest in its row."""
    size = torch.maximum(bound.abs(), value.abs())
    largest = _rows(size).amax(1).view(-1, *[1] * (size.ndim - 1))
    return SLACK[bound.dtype] * (1 + size) + 8 * torch.finfo(bound.dtype).eps * largest


def contradicted(lower: Tensor, attained: Tensor) -> Tensor:
    """Whether a margin of each sample, attained in its box, lies below its lower bound; (batch, classes − 1) both."""
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
) -> list[Finding]:
    """Bound the margins of at most ``most`` samples, evenly spaced, over several boxes; compare with attained values.

    The boxes are the given ones, smaller ones, and boxes of radius 0, where the bounds must equal the margins: these
    show a wrong sign in one weight of thousands, which the slack of a real box hides. ``points`` adds one to each box.
    """
    some = torch.arange(0, len(y), -(-len(y) // min(most, _PROBED_BY.get(method, PROBED))), device=y.device)
    found = []
    for part in some.split(min(most, network.at_once(method) or most)):
        given = [] if points is None else [points[part]]
        wrong = _contradictions(network, x[part], y[part], radii_of(eps, x, part), method, input_range, given)
        found += [(int(part[place]), text) for place, text in wrong]
    return found


def _contradictions(
    network: MarginBounds, x: Tensor, y: Tensor, eps: Epsilon, method: str, input_range: InputRange | None, points: Any
) -> list[Finding]:
    found = []
    for radius, given in ((eps, points), (eps * _NARROW, [])):
        margins = network.lower(input_box(x, radius, input_range), y, method)
        bounded = network.bounded(method)
        wrong = wrong_relaxations(bounded, len(y)) if method in ("CROWN-IBP", "CROWN") else []
        wrong += escapes(bounded, margins, y, *corners_of(x, radius, input_range), points=given)
        found += [(place, f"{text}, by {method}") for place, text in wrong]
    with torch.no_grad():
        logits, lower = network.model(x), network.lower(input_box(x, 0.0, input_range), y, method)
        margins = class_margins(logits, y)
        scale = 1 + torch.maximum(lower.abs(), margins.abs()).amax(1, keepdim=True)
        off = ((lower - margins).abs() > _POINT_SLACK[lower.dtype] * scale + _rounding(logits)).any(1)
    text = f"has other margins than {method} gives the box of radius 0 around it"
    return found + [(place, text) for place in off.nonzero().flatten().tolist()]


def escapes(
    bounded: Any, margins: Tensor, y: Tensor, lower: Tensor, upper: Tensor, *, points: Iterable[Tensor] = ()
) -> list[Finding]:
    """Values of nodes and margins, attained in a box, outside the bounds of the last pass over that box.

    Checks the given points, the centre, random corners, and for every pre-activation and the margins the two corners
    that the gradient of one element per sample points to. ``bounded`` is in evaluation mode.
    """
    graph, generator = read_graph(bounded), torch.Generator().manual_seed(0)
    nodes = [_BoundedNode(node) for node in graph.nodes if _is_bounded(node, len(y))]
    extremes = _extremes(bounded, nodes, margins, y, lower, upper, generator)
    found: list[Finding] = []
    for point in itertools.chain(points, _corners(lower, upper, generator), extremes):
        with torch.no_grad():
            attained = attained_margins(bounded.plain(point), y)
            bounded.forward(point)
        below = contradicted(margins, attained).nonzero().flatten().tolist()
        found += [(sample, "has a margin below its lower bound at a point of its box") for sample in below]
        for node in nodes:
            found += [(one, f"has a value outside its bounds {graph.place_of(node.node)}") for one in node.escaped()]
    return found


class _BoundedNode:
    """A node with the bounds of the last pass, which the next pass clears, and the range of values seen so far."""

    def __init__(self, node: Any) -> None:
        self.node, self.lower, self.upper = node, node.lower.detach(), node.upper.detach()
        self.lowest = torch.full_like(self.lower, torch.inf)
        self.highest = torch.full_like(self.upper, -torch.inf)

    def escaped(self) -> list[int]:
        """The samples whose current value lies outside the bounds; the value extends the range seen."""
        value = self.node.forward_value
        self.lowest, self.highest = torch.minimum(self.lowest, value), torch.maximum(self.highest, value)
        low = value < self.lower - tolerance(self.lower, value)
        high = value > self.upper + tolerance(self.upper, value)
        return _rows(low | high).any(1).nonzero().flatten().tolist()

    def elements(self, generator: torch.Generator) -> Tensor:
        """One element per sample: the one whose values fill most of its bounds, or a random one, by turns."""
        width = _rows(self.upper - self.lower)
        filled = _rows(self.highest - self.lowest) / width.clamp(min=torch.finfo(width.dtype).tiny)
        fullest = torch.where(width > 0, filled, torch.zeros_like(filled)).argmax(1)
        drawn = torch.randint(width.shape[1], (len(width),), generator=generator).to(fullest.device)
        return torch.where(torch.arange(len(width), device=fullest.device) % 2 == 1, drawn, fullest)


def _is_bounded(node: Any, batch: int) -> bool:
    lower, upper = getattr(node, "lower", None), getattr(node, "upper", None)
    if not (node.perturbed and isinstance(lower, Tensor) and isinstance(upper, Tensor) and node.inputs):
        return False
    return lower.is_floating_point() and lower.shape == upper.shape == torch.Size((batch, *node.output_shape[1:]))


def _corners(lower: Tensor, upper: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    yield (lower + upper) / 2
    for _ in range(_CORNERS):
        side = torch.rand(lower.shape, generator=generator).to(lower.device) < 0.5
        yield torch.where(side, lower, upper)


def _extremes(
    bounded: Any, nodes: list[_BoundedNode], margins: Tensor, y: Tensor, lower: Tensor, upper: Tensor, generator: Any
) -> Iterator[Tensor]:
    relaxed = {id(node) for node in bounded_inputs(bounded)}
    centre = ((lower + upper) / 2).requires_grad_(True)
    with torch.enable_grad():
        attained = class_margins(bounded.forward(centre), y)
    # Visits replace the values.
    values = [(node, node.node.forward_value) for node in nodes if id(node.node) in relaxed]
    at_nodes = ((value, node.elements(generator)) for node, value in values)
    for value, elements in itertools.chain(at_nodes, [(attained, (attained - margins).argmin(1))]):
        with torch.enable_grad():
            total = _rows(value).gather(1, elements.unsqueeze(1)).sum()
            (gradient,) = torch.autograd.grad(total, centre, retain_graph=True, allow_unused=True)
        if gradient is not None:
            yield torch.where(gradient > 0, upper, lower)
            yield torch.where(gradient > 0, lower, upper)


def _rows(values: Tensor) -> Tensor:
    """One row per sample, also where a sample is a single value without a dimension."""
    return values.reshape(len(values), -1)


@torch.no_grad()
def wrong_relaxations(bounded: Any, batch: int) -> list[Finding]:
    """Linear relaxations of nodes with one argument that a point between the argument's bounds contradicts.

    In the bounds of a whole network, the slack of the other nodes hides a relaxation that is slightly wrong. The last
    pass, over ``batch`` samples, must be CROWN-IBP or CROWN; slopes that alpha-CROWN has optimised are not checked.
    """
    graph, generator = read_graph(bounded), torch.Generator().manual_seed(0)
    found = []
    for node in graph.nodes:
        if _is_relaxed(node, batch):
            wrong = _wrong_samples(node, graph.nodes[-1], batch, generator)
            text = f"has a linear relaxation on the wrong side of its function {graph.place_of(node)}"
            found += [(sample, text) for sample in wrong.nonzero().flatten().tolist()]
    return found


def _is_relaxed(node: Any, batch: int) -> bool:
    if operator_of(node) not in OPERATORS:  # An operator of the user may need other arguments, and is untested anyway.
        return False
    if list(getattr(node, "requires_input_bounds", ())) != [0] or getattr(node, "opt_stage", None) in ("opt", "reuse"):
        return False
    source = node.inputs[0]
    ends = getattr(source, "lower", None), getattr(source, "upper", None)
    return bool(source.perturbed) and all(isinstance(end, Tensor) and len(end) == batch for end in ends)


def _wrong_samples(node: Any, last: Any, batch: int, generator: torch.Generator) -> Tensor:
    source = node.inputs[0]
    shape = torch.Size(node.output_shape[1:])
    elements = _checked_elements(source.lower, source.upper, shape.numel(), generator)
    rows = source.lower.new_zeros(len(elements), batch, shape.numel())
    rows = rows.scatter(2, elements.unsqueeze(2), 1.0).unflatten(2, shape)
    # The engine's own activations store slopes per node that the pass starts from.
    options = {"start_node": last} if "start_node" in inspect.signature(node.bound_backward).parameters else {}
    [(below, above), *_], below_bias, above_bias = node.bound_backward(rows, rows.clone(), *node.inputs, **options)
    wrong = torch.zeros(batch, dtype=torch.bool, device=rows.device)
    for point in _points(source.lower.expand_as(below), source.upper.expand_as(below), below, above, generator):
        outputs = node.forward(point.flatten(0, 1)).reshape(elements.numel(), -1)
        value = outputs.gather(1, elements.reshape(-1, 1)).view_as(elements)
        for sign, slopes, bias in ((1, below, below_bias), (-1, above, above_bias)):
            terms = (slopes * point).reshape(*elements.shape, -1)
            scale = 1 + torch.maximum(value.abs(), terms.abs().sum(2) + torch.as_tensor(bias).abs())
            wrong |= (sign * (terms.sum(2) + bias - value) > SLACK[rows.dtype] * scale).any(0)
    return wrong


def _checked_elements(lower: Tensor, upper: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of outputs (elements, batch): random ones, and the widest inputs' where each output has its own."""
    drawn = torch.randint(count, (_ELEMENTS, len(lower)), generator=generator).to(lower.device)
    if lower[0].numel() == count:
        widest = min(_ELEMENTS // 2, count)
        drawn[:widest] = _rows(upper - lower).topk(widest, 1).indices.T
    return drawn


def _points(lower: Tensor, upper: Tensor, below: Tensor, above: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The ends, the corners where the lines are highest and lowest, and points in between."""
    yield from (lower, upper, torch.where(below > 0, upper, lower), torch.where(above > 0, lower, upper))
    for fraction in (0.25, 0.5, 0.75):
        yield lower + (upper - lower) * fraction
    for _ in range(2):
        yield lower + (upper - lower) * torch.rand(lower.shape, generator=generator).to(lower)
