"""The box around a batch, bounds on a classifier's margins over it by every method, and loss fusion."""

import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lirpa_fastwarmup.boxes import box_ends, check_eps, check_pair, inputs_error, inputs_fit
from lirpa_fastwarmup.engine.compat import INTERMEDIATE, engine
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.inputs import Inputs, Layout, bounded_tensor
from lirpa_fastwarmup.engine.margins import unread_rows
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.precision import temporarily

logger = logging.getLogger(__name__)

COEFFICIENTS = 1 << 22  # Of a layer, in one backward pass. With many classes, those of all rows take gigabytes.

_ELEMENTS = 1 << 14  # Of the widest layer, in one CROWN pass, for all samples.


def input_box(x: Inputs, eps: Any, input_range: Any = (0.0, 1.0)) -> Any:
    """The box ``{x' : |x' − x| ≤ eps, elementwise} ∩ input_range``, as a BoundedTensor.

    Args:
        x: clean inputs ``(batch, *input)``, within ``input_range``; or a tuple of the inputs of a network.
        eps: radius in units of the input: a number, one per channel, a tensor of the input's shape, or one value per
            sample, shape (batch, 1, …). For several inputs also a tuple, one for each; 0 for an unperturbed input.
        input_range: lowest and highest valid input, numbers or tensors; ``None`` for unclipped data; for several
            inputs also a tuple.

    Returns:
        The box; for several inputs a tuple of boxes, with integer inputs as they are.

    Raises:
        TypeError: ``eps`` is neither a number nor a tensor.
        ValueError: ``eps`` is negative, not finite or of a shape that does not fit; on the CPU also if ``x`` lies
            outside ``input_range`` (elsewhere the check would wait for the device).

    Example:
        >>> box = fw.input_box(x, eps=8 / 255)
        >>> lower, upper = bounded.compute_bounds(x=(box,), method="IBP")
    """
    if not isinstance(x, Tensor):
        layout = Layout(tuple(x))
        each = zip(x, layout.radii(eps), layout.ranges(input_range), strict=True)
        return tuple(input_box(*one) if one[0].is_floating_point() else one[0] for one in each)
    check_pair(input_range)
    if not isinstance(eps, Tensor) or eps.device.type == "cpu":
        check_eps(eps)
    if x.device.type == "cpu" and not bool(inputs_fit(x, input_range)):
        raise inputs_error(x, input_range)
    return bounded_tensor(x, *box_ends(x, eps, input_range), eps)


def class_count(bounded: Any) -> int:
    """The number of classes of a BoundedModule; refuses outputs that are not (batch, classes ≥ 2)."""
    shape = tuple(bounded.final_shape)
    if len(shape) != 2 or shape[1] < 2:
        text = f"expected a classifier whose output is (batch, classes ≥ 2), found {shape}: return a score per class, "
        raise ValueError(text + "and for a single score s, above 0 for class 1, torch.nn.functional.pad(s, (1, 0))")
    return int(shape[1])


def other_classes(labels: Tensor, classes: int) -> Tensor:
    """Every class j ≠ y, in order, shape (batch, classes − 1)."""
    others = torch.arange(classes - 1, device=labels.device)
    return others + (others >= labels.unsqueeze(1)).long()  # Shifted past y.


def margin_matrix(labels: Tensor, classes: int, dtype: torch.dtype, others: Tensor | None = None) -> Tensor:
    """Rows e_y − e_j for j in ``others``, or for every j ≠ y: (batch, rows or classes − 1, classes)."""
    eye = torch.eye(classes, dtype=dtype, device=labels.device)
    return eye[labels].unsqueeze(1) - eye[other_classes(labels, classes) if others is None else others]


def ibp_margin_bounds(
    bounded: Any, box: Any, labels: Tensor, classes: int, *, reuse_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """IBP lower and upper bounds on z_y − z_j for j ≠ y, each (batch, classes − 1), over a box, or a tuple of boxes."""
    boxes = box if isinstance(box, tuple) else (box,)
    dtype = next(x.dtype for x in boxes if x.is_floating_point())
    if not isinstance(bounded, BoundedModule):  # The engine's own, which reuses the statistics of the last pass.
        return bounded.compute_bounds(x=boxes, C=margin_matrix(labels, classes, dtype), method="IBP")
    rows = unread_rows(labels, classes, dtype)
    lower, upper = bounded.compute_bounds(x=boxes, C=rows, method="IBP", reuse_statistics=reuse_statistics)
    others = other_classes(labels, classes)
    return lower.gather(1, others), upper.gather(1, others)


def crown_lower(bounded: Any, directions: Tensor) -> Tensor:
    """CROWN's lower bounds on ``directions`` (batch, rows, classes) @ logits, from the last IBP pass: (batch, rows)."""
    return bounded.compute_bounds(x=None, C=directions, IBP=False, method="CROWN", bound_upper=False)[0]


class ShrunkRelu(engine.bound_general.BoundRelu):
    """A ReLU whose IBP shrinks the upper bounds of unstable neurons: for training only, because it is not sound."""

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        lower, upper = v[0]
        return lower.relu(), torch.where((lower < 0) & (upper > 0), self.factor * upper, upper).relu()


@contextmanager
def shrunk_relus(bounded: Any, factor: float) -> Iterator[None]:
    """In IBP, multiply the upper bounds of unstable ReLUs by ``factor``, for training only (Müller et al., 2023)."""
    nodes = [node for _, node in read_graph(bounded).relus] if factor != 1 else []
    for node in nodes:
        node.factor = factor
    with temporarily(nodes, "__class__", ShrunkRelu):
        yield


def proved(margins: Tensor) -> Tensor:
    """Whether all margins of each sample are proved positive. NaN proves nothing."""
    return (margins > 0).all(1)


def _by_rows(bounded: Any, box: Any, labels: Tensor, classes: int, inputs: Iterable[Any], **options: Any) -> Tensor:
    """Margins, by blocks of rows; ``inputs`` of each block's pass, ``None`` to reuse the intermediate bounds before."""
    blocks = other_classes(labels, classes).split(max(1, COEFFICIENTS // max(1, len(labels) * _widest(bounded))), 1)
    lower = []
    for others, x in zip(blocks, inputs, strict=False):
        matrix = margin_matrix(labels, classes, box.dtype, others)
        lower.append(bounded.compute_bounds(x=x, C=matrix, bound_upper=False, **options)[0].detach())
    return torch.cat(lower, 1)


def _at_once(bounded: Any) -> int:
    """Samples per CROWN pass. A pass bounds, for every sample, each neuron that is unstable in any of them."""
    return max(1, _ELEMENTS // _widest(bounded))


def _widest(bounded: Any) -> int:
    return max(math.prod(node.output_shape[1:]) for node in bounded._modules.values() if node.output_shape)


def _crown_ibp(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    bounded.compute_bounds(x=(box,), method="IBP")
    return _by_rows(bounded, box, labels, classes, repeat(None), method="CROWN")


def _crown(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    return _by_rows(bounded, box, labels, classes, chain([(box,)], repeat(None)), method="CROWN")


class ClosedClamps(TorchFunctionMode):
    """Clamps with gradient 1 at their ends too, as before PyTorch 2.15: slopes start there, and would stay."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = self._clamp if func in (torch.clamp, Tensor.clamp) else func
        return called(*args, **(kwargs or {}))

    @staticmethod
    def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:  # noqa: A002 (as torch.clamp calls them)
        above = x if min is None else torch.where(x < min, min, x)
        return above if max is None else torch.where(above > max, max, above)


def _crown_and_ibp(bounded: Any, box: Any, labels: Tensor, classes: int) -> tuple[Tensor, dict[str, Any]]:
    """CROWN's margins, and the intersections of its intermediate bounds with IBP's; a few samples at a time."""
    found = []
    whole = box.as_subclass(Tensor), box.ptb.x_L, box.ptb.x_U, labels
    for *ends, some in zip(*(one.split(_at_once(bounded)) for one in whole), strict=True):
        part = bounded_tensor(*ends)
        bounded.compute_bounds(x=(part,), method="IBP")
        by_ibp = _intermediate_bounds(bounded)
        margins, by_crown = _crown(bounded, part, some, classes), _intermediate_bounds(bounded)
        found.append((margins, {name: _intersection(one, by_ibp[name]) for name, one in by_crown.items()}))
    return tree_map(lambda *parts: torch.cat(parts), *found)


def _alpha_crown(bounded: Any, box: Any, labels: Tensor, classes: int) -> Tensor:
    """Optimises the slopes of the margins' own pass, over the intersection of IBP's and CROWN's intermediate bounds.

    Slopes for every intermediate neuron, the engine's default, cost 30 times as much and improve margins by 0.1 %.
    """
    if not bounded.optimizable_activations:  # A linear network has no slopes to optimise.
        return _crown(bounded, box, labels, classes)
    crown, both = _crown_and_ibp(bounded, box, labels, classes)
    given, quiet = {INTERMEDIATE: both}, redirect_stdout(io.StringIO())  # 0.7 prints.
    # The engine's first call leaves them out: it would compute them anew, with slopes for every intermediate neuron.
    with torch.enable_grad(), ClosedClamps(), quiet, temporarily([bounded], "within_optimization", given):
        optimized = _by_rows(bounded, box, labels, classes, repeat((box,)), method="alpha-CROWN", **given)
    for node in bounded._modules.values():
        if hasattr(node, "alpha_lookup_idx"):  # Later CROWN passes would bound only the neurons listed in it.
            node.alpha_lookup_idx = {}
    # Tighter intermediate bounds may select other relaxations of products, and loosen the result.
    return torch.maximum(optimized, crown)


def bounded_inputs(bounded: Any) -> Iterator[Any]:
    """The nodes whose bounds the relaxation of another node uses, after a pass of any method."""
    for node in bounded._modules.values():
        for position in getattr(node, "requires_input_bounds", ()):
            source = node.inputs[position]
            if source.perturbed and isinstance(source.lower, Tensor):
                yield source


def _intermediate_bounds(bounded: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {source.name: (source.lower.detach(), source.upper.detach()) for source in bounded_inputs(bounded)}


def _intersection(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lower = torch.maximum(one[0], other[0].view_as(one[0]))
    # Rounding can separate two intervals that touch.
    return lower, torch.maximum(lower, torch.minimum(one[1], other[1].view_as(one[1])))


_METHODS: dict[str, Callable[[Any, Any, Tensor, int], Tensor]] = {
    "IBP": lambda *given: ibp_margin_bounds(*given)[0],
    "CROWN-IBP": _crown_ibp,
    "CROWN": _crown,
    "alpha-CROWN": _alpha_crown,
}
METHODS: tuple[str, ...] = tuple(_METHODS)  # Cheapest first.


class MarginBounds:
    """Lower bounds on the margins of a classifier, by any of :data:`METHODS`, on copies of it in ``dtype``.

    A method that fails with coefficients stored as patches, which save memory but support fewer operators, uses
    matrices from then on. ``live``: use ``bounded`` itself, in evaluation mode and of this dtype; only IBP is certain
    to work then, and its bounds stay at the nodes.
    """

    def __init__(self, bounded: BoundedModule, dtype: torch.dtype, *, live: bool = False) -> None:
        self.dtype = dtype
        self.classes = class_count(bounded)
        self._with_patches = bounded if live else bounded.rebuilt(dtype)
        self._networks = dict.fromkeys(METHODS, self._with_patches)

    @property
    def model(self) -> nn.Module:
        """The plain network whose margins are bounded, in evaluation mode, of packed inputs if there are several."""
        return self._with_patches.plain

    def bounded(self, method: str) -> BoundedModule:
        """The bounded copy that ``method`` uses, with the intermediate bounds of its last pass."""
        return self._networks[method]

    def at_once(self, method: str) -> int | None:
        """How many samples in one pass of ``method`` take least time; ``None`` for as many as there are."""
        return _at_once(self._networks[method]) if method == "CROWN" else None

    @torch.no_grad()
    def lower(self, box: Any, labels: Tensor, method: str) -> Tensor:
        """Lower bounds on z_y − z_j for every class j ≠ y over ``box``, in this dtype: (batch, classes − 1)."""
        try:
            return _METHODS[method](self._networks[method], box, labels, self.classes).detach()
        except NotImplementedError as error:
            if self._networks[method] is not self._with_patches or self._with_patches.conv_mode != "patches":
                raise
            logger.info("%s fails on this network with patches (%s): trying matrices", method, error)
        self._networks[method] = self._with_patches.rebuilt(self.dtype, conv_mode="matrix")
        return self.lower(box, labels, method)


def log_sum_exp(upper: Tensor) -> Tensor:
    """log(1 + Σ_j exp(u_j)): the largest cross-entropy under ``upper`` bounds (batch, classes − 1) on z_j − z_y."""
    return torch.nn.functional.pad(upper, (1, 0)).logsumexp(1)


def fused_crown_loss(bounded: Any, lower: Tensor, upper: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Loss fusion: CROWN's upper bound on the cross-entropy over the box of the last IBP pass, shape (batch,).

    The cross-entropy is log Σ_j exp(t_j) with t_j = z_j − z_y. Over the IBP bounds l_j ≤ t_j ≤ u_j, ``lower`` and
    ``upper`` (batch, classes − 1), the convex exp lies below its chord, exp(t) ≤ exp(u_j) + k_j (t − u_j). The chords'
    sum is linear in the logits: one backward pass bounds it for all classes (Xu et al., NeurIPS 2020, section 3.3).
    """
    # This shift keeps exp finite. It cancels in the result, so it carries no gradient.
    shift = upper.detach().amax(1, keepdim=True).clamp(min=0)
    at_upper = (upper - shift).exp()
    slope = at_upper * _chord(upper - lower)
    # Σ_j k_j (e_j − e_y), shape (batch, 1, classes).
    direction = slope.new_zeros(len(labels), classes).scatter(1, other_classes(labels, classes), slope)
    direction = direction.scatter(1, labels.unsqueeze(1), -slope.sum(1, keepdim=True)).unsqueeze(1)
    upper_bounds = bounded.compute_bounds(x=None, C=direction, IBP=False, method="CROWN", bound_lower=False)[1]
    linear = upper_bounds.squeeze(1)
    own = (-shift).exp().squeeze(1)  # The summand of j = y.
    total = own + (at_upper - slope * upper).sum(1) + linear
    # Where cancellation leaves only rounding errors, their size and the loss's own lower bound replace the sum.
    terms = (own + at_upper.sum(1) + (slope * upper).abs().sum(1) + linear.abs()).detach()
    loss = torch.maximum(total, torch.finfo(total.dtype).eps * terms).log() + shift.squeeze(1)
    return torch.maximum(loss, log_sum_exp(lower))


def _chord(width: Tensor) -> Tensor:
    """(1 − exp(−width))/width: the slope of exp's chord over an interval, relative to exp at its upper end."""
    small = width < 1e-3
    safe = torch.where(small, torch.ones_like(width), width)
    return torch.where(small, 1 - width / 2 + width.square() / 6, -torch.expm1(-safe) / safe)


def mixed_log(one: Tensor, other: Tensor, weight: float | Tensor) -> Tensor:
    """log(weight·exp(one) + (1 − weight)·exp(other)), for 0 < weight ≤ 1, without overflow."""
    weight = torch.as_tensor(weight, dtype=one.dtype, device=one.device)
    return torch.logaddexp(one + weight.log(), other + torch.log1p(-weight))
