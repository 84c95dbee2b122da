"""Node classes that replace the engine's, for operators that it lacks or bounds incorrectly (see docs/engines.md).

Convolutions and pooling support one to three dimensions, with CROWN's coefficients as matrices. The engine treats an
operand as constant only if its node is a leaf: :class:`BoundConstantArithmetic` also has computed and broadcast ones.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lirpa_fastwarmup.engine.batchnorm import ViewedBatchNorm, adopt_batchnorm
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine, node_classes

_engine: Any = engine.bound_general

_INPUT = node_classes("Input")
_STATE = node_classes("Params", "Buffers")
_ARITHMETIC: dict[Any, str] = {cls: name for name in ("Add", "Sub", "Mul", "Div") for cls in node_classes(name)}


def value_of(node: Any) -> Tensor:
    """The value of a node that does not depend on the network's inputs: from the last pass, or computed."""
    value = getattr(node, "forward_value", None)
    return evaluate(node) if value is None else torch.as_tensor(value)


def evaluate(node: Any) -> Tensor:
    """The current value of a constant, differentiable if it is computed from parameters."""
    return torch.as_tensor(node.forward(*(evaluate(source) for source in node.inputs)))


def is_input(node: Any) -> bool:
    """Whether ``node`` is an input of the network."""
    return isinstance(node, _INPUT) and not isinstance(node, _STATE)


def reached_from_inputs(nodes: list[Any], *, through_shapes: bool) -> set[int]:
    """Ids of the nodes, among all ``nodes`` of a BoundedModule, that depend on its inputs or on perturbed weights.

    With ``through_shapes``, also of those that depend only on an input's shape.
    """
    reached = {id(node) for node in nodes if is_input(node) or getattr(node, "perturbation", None) is not None}
    inner = [node for node in nodes if through_shapes or not isinstance(node, _engine.BoundShape)]
    while found := {id(n) for n in inner if any(id(source) in reached for source in n.inputs)} - reached:
        reached |= found
    return reached


def require_matrix(coefficients: Any, node: Any) -> Tensor:
    """Return CROWN's coefficients, or raise NotImplementedError if they are stored as patches."""
    if isinstance(coefficients, Tensor):
        return coefficients
    text = f"CROWN through {type(node).__name__} with coefficients of type {type(coefficients).__name__}: build the "
    raise NotImplementedError(text + "BoundedModule with bound_opts={'conv_mode': 'matrix'}, or use IBP")


def _both_sides(one_side: Callable[[Any, bool], Any], last_lA: Any, last_uA: Any, constants: int = 0) -> Any:
    """What ``bound_backward`` returns; ``one_side(coefficients, is_lower)`` gives the first input's, and a bias."""
    lA, lower_bias = (None, 0) if last_lA is None else one_side(last_lA, True)
    uA, upper_bias = (None, 0) if last_uA is None else one_side(last_uA, False)
    return [(lA, uA), *[(None, None)] * constants], lower_bias, upper_bias


class _Windowed(_engine.Bound):
    """An operator on windows over one, two or three spatial dimensions, with the attributes of ONNX."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.rank = len(attr["kernel_shape"])
        pads = attr.get("pads", [0] * (2 * self.rank))
        if pads[: self.rank] != pads[self.rank :]:
            name = type(self).__name__.removeprefix("Bound")
            raise NotImplementedError(f"a {name} padded differently at its two ends: {pads}")
        self.padding: list[int] = pads[: self.rank]
        self.stride: list[int] = attr.get("strides", [1] * self.rank)
        self.dilation: list[int] = attr.get("dilations", [1] * self.rank)


class BoundConvNd(_Windowed):
    """A convolution, plain or transposed, of the features ``(batch, channels, *space)``, a weight and maybe a bias."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any, *, transposed: bool) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.patches_start, self.transposed, self.groups = False, transposed, attr["group"]
        output_padding = attr.get("output_padding", [0] * self.rank)
        self.arguments = (self.stride, self.padding, self.dilation, transposed, output_padding, self.groups)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(x, weight, bias, *self.arguments)

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        if self.is_input_perturbed(1):
            raise NotImplementedError("bounds over perturbed convolution weights")
        (lower, upper), weight = v[0], v[1][0]
        centre = self.forward((lower + upper) / 2, weight, v[2][0] if len(v) == 3 else None)
        radius = self.forward((upper - lower) / 2, weight.abs())
        return centre - radius, centre + radius

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        def one_side(last_A: Any, _: bool) -> tuple[Any, Any]:
            rows = require_matrix(last_A, self).flatten(0, 1)
            zeros = rows.new_zeros(len(rows), *self.input_shape[1:])
            given = (rows, zeros, x[1].lower, None, *self.arguments, (True, False, False))
            next_A = torch.ops.aten.convolution_backward(*given)[0].unflatten(0, last_A.shape[:2])
            return next_A, last_A.flatten(3).sum(3).matmul(x[2].lower) if len(x) == 3 else 0

        return _both_sides(one_side, last_lA, last_uA, len(x) - 1)


def _padding_of_same(attr: Any) -> list[int]:
    """The padding that ``padding="same"`` stands for, which neither release computes."""
    if attr.get("auto_pad") not in ("SAME_UPPER", b"SAME_UPPER"):
        return [0] * (2 * len(attr["kernel_shape"]))
    # "same" requires stride 1; with an even kernel the total is odd, and the far end gets one more.
    totals = [d * (k - 1) for d, k in zip(attr["dilations"], attr["kernel_shape"], strict=True)]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def _convolution(transposed: bool, attr: Any, *arguments: Any) -> Any:
    """The engine's own node if it supports the attributes, otherwise ours."""
    attr = {"pads": _padding_of_same(attr), **attr}
    # 0.7 accepts a three-dimensional convolution, and then runs conv2d; the adjoint of its dilated transposed
    # convolutions has another shape than their input. 0.3's convolutions have a single dilation.
    one_dilation = len(set(attr["dilations"])) == 1 and not (transposed and max(attr["dilations"]) > 1)
    if len(attr["kernel_shape"]) < 3 and one_dilation:
        with contextlib.suppress(AssertionError, IndexError):
            return (_engine.BoundConvTranspose if transposed else _engine.BoundConv)(attr, *arguments)
    return BoundConvNd(attr, *arguments, transposed=transposed)


class MonotoneIntervals:
    """Mixin: IBP of a function that is monotone in every input that is no constant (axes, a slice's ends)."""

    def interval_propagate(self: Any, *v: Any) -> tuple[Tensor, Tensor]:
        return self.forward(*(interval[0] for interval in v)), self.forward(*(interval[1] for interval in v))


class AdjointBounds(MonotoneIntervals):
    """Mixin: bounds of a linear map with coefficients ≥ 0; CROWN multiplies by the derivative of its ``forward``."""

    def bound_backward(self: Any, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        constants = [value_of(source) for source in x[1:]]

        def one_side(last_A: Any, _: bool) -> tuple[Tensor, int]:
            rows = require_matrix(last_A, self).flatten(0, 1)
            zeros = rows.new_zeros(len(rows), *self.input_shape[1:])
            adjoint = torch.func.vjp(lambda point: self.forward(point, *constants), zeros)[1]
            return adjoint(rows)[0].unflatten(0, last_A.shape[:2]), 0

        return _both_sides(one_side, last_lA, last_uA, len(constants))


class BoundMeanPool(AdjointBounds, _Windowed):
    """Average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        flags = (bool(self.attr.get(name, 0)) for name in ("ceil_mode", "count_include_pad"))
        return getattr(F, f"avg_pool{self.rank}d")(x, self.attr["kernel_shape"], self.stride, self.padding, *flags)


class GlobalMean(AdjointBounds, _engine.BoundGlobalAveragePool):
    """The mean over all spatial dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)


class ConstantPad(AdjointBounds, _engine.Bound):
    """Padding with zeros, with the edge or by reflection."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.mode = {"edge": "replicate"}.get(attr["mode"], attr["mode"])
        rank = len(attr["pads"]) // 2
        begin, end = attr["pads"][:rank], attr["pads"][rank:]
        first = 0 if self.mode == "constant" else 2  # The other modes pad spatial dimensions only.
        if begin[0] or end[0] or attr.get("value") or any(begin[:first] + end[:first]):
            raise NotImplementedError("padding of the batch, or with other numbers than 0")
        self.widths = [width for d in reversed(range(first, rank)) for width in (begin[d], end[d])]

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.widths, self.mode)


class PixelShuffle(AdjointBounds, _engine.Bound):
    """Channels moved into space, which some of the exporter's tables convert to one operator."""

    def forward(self, x: Tensor) -> Tensor:
        if self.attr["mode"] != "CRD":
            raise NotImplementedError("DepthToSpace in another order than that of F.pixel_shuffle")
        return F.pixel_shuffle(x, self.attr["blocksize"])


class StridedSlice(AdjointBounds, _engine.BoundSlice):
    """A slice along one axis, with any step."""

    def forward(self, x: Any, start: Any = None, end: Any = None, axes: Any = None, steps: Any = 1) -> Any:
        if not isinstance(x, Tensor) or start is None:
            return super().forward(x, start, end, axes, steps)
        axis = int(axes)
        positions = range(*slice(int(start), int(end), int(steps)).indices(x.shape[axis]))
        return x.index_select(axis, torch.tensor(positions, dtype=torch.int64, device=x.device))


class MarginMatMul(_engine.BoundMatMul):
    """A linear layer without bias whose interval bound accepts a margin matrix, which 0.3's does not."""

    def interval_propagate(self, *v: Any, C: Tensor | None = None) -> Any:
        return _engine.BoundLinear.interval_propagate(self, *v, C=C)


class LinfConcat(MonotoneIntervals, _engine.BoundConcat):
    """Concatenation of intervals, the input box included, on which 0.7's fails."""


class BatchReshape(_engine.BoundReshape):
    """A reshape that keeps the batch dimension, for any batch size.

    In 0.3's trace of ``x.view(x.shape[0], -1)`` the size of the example batch, ``traced_batch``, is a constant.
    """

    def forward(self, x: Tensor, shape: Any) -> Any:
        shape = [int(size) for size in shape]
        if shape[0] == self.traced_batch:
            shape[0] = x.shape[0]
        return super().forward(x, shape)


class BoundMaximumPool(MonotoneIntervals, _Windowed):
    """Max pooling. CROWN bounds the maximum of a window from below by the element with the largest lower bound.

    It bounds it from above too if no other can exceed it, and else the largest upper bound does (Singh et al., 2019).
    """

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.requires_input_bounds = [0]

    def forward(self, x: Tensor) -> Tensor:
        size, ceil_mode = self.attr["kernel_shape"], bool(self.attr.get("ceil_mode", 0))
        return getattr(F, f"max_pool{self.rank}d")(x, size, self.stride, self.padding, self.dilation, ceil_mode)

    def bound_backward(self, last_lA: Any, last_uA: Any, x: Any, **kwargs: Any) -> Any:
        positions, inside = self._windows(x.lower.shape[2:], x.lower.device)
        lower, upper = (end.flatten(2)[:, :, positions].masked_fill(~inside, -math.inf) for end in (x.lower, x.upper))
        best, element = lower.max(-1)
        others = upper.scatter(-1, element.unsqueeze(-1), -math.inf).amax(-1)
        decided, largest = best >= others, upper.amax(-1)
        chosen = positions.expand_as(lower).gather(-1, element.unsqueeze(-1)).squeeze(-1)

        def one_side(last_A: Any, is_lower: bool) -> tuple[Any, Any]:
            rows = require_matrix(last_A, self).flatten(3)
            from_above = rows.clamp(max=0) if is_lower else rows.clamp(min=0)
            linear = torch.where(decided, rows, rows - from_above)
            coefficients = rows.new_zeros(*rows.shape[:3], math.prod(x.lower.shape[2:]))
            coefficients = coefficients.scatter_add(-1, chosen.expand_as(rows), linear)
            bias = (from_above * torch.where(decided, torch.zeros_like(largest), largest)).flatten(2).sum(2)
            return coefficients.unflatten(-1, x.lower.shape[2:]), bias

        return _both_sides(one_side, last_lA, last_uA)

    def _windows(self, space: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of each window's elements into the flattened space, and which are no padding: (windows, elements)."""
        positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
        inside = torch.ones(1, 1, dtype=torch.bool, device=device)
        for d, size in enumerate(space):
            first = torch.arange(int(self.output_shape[2 + d]), device=device) * self.stride[d] - self.padding[d]
            index = first.unsqueeze(1) + torch.arange(self.attr["kernel_shape"][d], device=device) * self.dilation[d]
            valid = (index >= 0) & (index < size)
            index = index.clamp(0, size - 1)
            positions = (positions[:, None, :, None] * size + index[None, :, None, :]).flatten(2).flatten(0, 1)
            inside = (inside[:, None, :, None] & valid[None, :, None, :]).flatten(2).flatten(0, 1)
        return positions, inside


class BoundClamp(MonotoneIntervals, _engine.Bound):
    """clip(a·x + b, low, high) with a > 0: ReLU6, Hardtanh, clamp and Hardsigmoid."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any, *, sigmoid: bool = False) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.requires_input_bounds = [0]
        self.slope: float = attr.get("alpha", 0.2) if sigmoid else 1.0
        self.offset: float = attr.get("beta", 0.5) if sigmoid else 0.0
        self.low: float = 0.0 if sigmoid else attr.get("min", -math.inf)
        self.high: float = 1.0 if sigmoid else attr.get("max", math.inf)
        self.low = min(self.low, self.high)  # As torch.clamp, if the lower limit is above the upper one.

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.slope == 1 and self.offset == 0 else x * self.slope + self.offset).clamp(self.low, self.high)

    def bound_backward(self, last_lA: Any, last_uA: Any, x: Any, **kwargs: Any) -> Any:
        below, above = self._lines(x.lower * self.slope + self.offset, x.upper * self.slope + self.offset)

        def one_side(last_A: Any, is_lower: bool) -> tuple[Any, Any]:
            positive, negative = (below, above) if is_lower else (above, below)
            up, down = require_matrix(last_A, self).clamp(min=0), last_A.clamp(max=0)
            coefficients = up * positive[0] + down * negative[0]
            shift = up * (positive[1] + positive[0] * self.offset) + down * (negative[1] + negative[0] * self.offset)
            return coefficients * self.slope, shift.flatten(2).sum(2)

        return _both_sides(one_side, last_lA, last_uA)

    def _lines(self, lower: Tensor, upper: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Slope and intercept of a line below and of a line above clip(z, low, high), for z in [lower, upper].

        The chord, if it is a bound. Otherwise a line through the kink: with two kinks, to the value at the other end;
        with a single one, the flatter or the steeper piece, whichever leaves the smaller area.
        """
        at_lower, at_upper = (end.clamp(self.low, self.high) for end in (lower, upper))
        low, high = lower.clamp(min=self.low), upper.clamp(max=self.high)  # Finite even if the function has no limit.
        kinks = (lower < self.low) & (upper > self.low), (lower < self.high) & (upper > self.high)
        chord = _quotient(at_upper - at_lower, upper - lower)
        bent = torch.where(kinks[1], _quotient(high - low, upper - low), (upper - low > low - lower).to(lower))
        below = torch.where(kinks[0], bent, chord)
        below_at = torch.where(kinks[0], low, upper), torch.where(kinks[0], low, at_upper)
        bent = torch.where(kinks[0], _quotient(high - low, high - lower), (high - lower > upper - high).to(lower))
        above = torch.where(kinks[1], bent, chord)
        above_at = torch.where(kinks[1], high, lower), torch.where(kinks[1], high, at_lower)
        return (below, below_at[1] - below * below_at[0]), (above, above_at[1] - above * above_at[0])


class ElementwiseIntervals(_engine.Bound):
    """An elementwise function that is monotone on either side of 0, bounded by IBP alone."""

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        lower, upper = v[0]
        # The function is extreme at an end or at 0; without 0 in the interval, the third point is an end.
        values = [self.forward(point) for point in (lower, upper, lower.clamp(min=0).minimum(upper))]
        return functools.reduce(torch.minimum, values), functools.reduce(torch.maximum, values)


class _Saturating:
    """Mixin for 0.3's sigmoid and tanh, whose lines are those of the interval cut at ±500, and are wrong beyond."""

    def bound_relax(self: Any, x: Any) -> None:
        super().bound_relax(x)  # type: ignore[misc]
        far = torch.maximum(-x.lower, x.upper) > self.x_limit
        for slope, intercept, end in (("lw", "lb", x.lower), ("uw", "ub", x.upper)):
            setattr(self, slope, getattr(self, slope).masked_fill(far, 0))
            setattr(self, intercept, torch.where(far, self.forward(end), getattr(self, intercept)))


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient clamped to [0, 1], and 0 if the denominator is not positive; its gradient is finite everywhere."""
    positive = denominator > 0
    safe = torch.where(positive, denominator, torch.ones_like(denominator))
    return torch.where(positive, numerator / safe, torch.zeros_like(numerator)).clamp(0, 1)


class SharedParameter(_engine.BoundParams):
    """A parameter whose ``requires_grad`` the engine does not change with the mode."""

    def forward(self) -> Tensor:
        return self.param


class ComputedConstant:
    """Mixin: a value computed from parameters, buffers and constants only; its interval is the value itself.

    0.3 propagates intervals through products of constants as if they were data, which changes the weights.
    """

    def interval_propagate(self: Any, *v: Any) -> tuple[Tensor, Tensor]:
        value = self.forward(*(interval[0] for interval in v))
        return value, value

    def __getattr__(self: Any, name: str) -> Any:
        # CROWN reads the bounds of weights, which 0.3 stores for parameters only, and deletes those that it stored.
        return evaluate(self) if name in ("lower", "upper") else super().__getattr__(name)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        if name not in ("lower", "upper") or name in vars(self):
            super().__delattr__(name)


class BoundConstantArithmetic(_engine.Bound):
    """x + c, x − c, c − x, x·c or x/c, where c does not depend on the network's inputs: the affine map s·x + t."""

    constant: tuple[Any]  # The node of c, which would be registered as a child outside a tuple.

    @property
    def is_shift(self) -> bool:
        """Whether s = 1."""
        return self.operation in ("Add", "Sub") and not (self.operation == "Sub" and self.constant_first)

    def _scale_and_shift(self) -> tuple[Tensor | float, Tensor | float]:
        c = evaluate(self.constant[0])
        if self.operation == "Add":
            return 1.0, c
        if self.operation == "Sub":
            return (-1.0, c) if self.constant_first else (1.0, -c)
        return (c if self.operation == "Mul" else 1 / c), 0.0

    def forward(self, x: Tensor) -> Tensor:
        c = evaluate(self.constant[0])
        operation: Callable[..., Tensor] = getattr(torch, self.operation.lower())
        return operation(c, x) if self.constant_first else operation(x, c)

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        scale, shift = self._scale_and_shift()
        one, other = (scale * end + shift for end in v[0])
        if isinstance(scale, float):
            return (one, other) if scale > 0 else (other, one)
        return torch.minimum(one, other), torch.maximum(one, other)

    def bound_backward(self, last_lA: Any, last_uA: Any, x: Any, **kwargs: Any) -> Any:
        scale, shift = self._scale_and_shift()
        output, source = tuple(self.output_shape[1:]), tuple(x.output_shape[1:])

        def one_side(last_A: Any, _: bool) -> tuple[Any, Any]:
            if isinstance(last_A, _engine.Patches):
                return _through_patches(self, last_A, scale, shift, source)
            bias = (last_A * shift).flatten(2).sum(2) if isinstance(shift, Tensor) else 0
            given, added = last_A.shape[:2], [1] * (len(output) - len(source))  # Dimensions that broadcasting added.
            return (last_A * scale).sum_to_size(*given, *added, *source).reshape(*given, *source), bias

        return _both_sides(one_side, last_lA, last_uA)


def _through_patches(node: Any, last_A: Any, scale: Any, shift: Any, source: tuple[int, ...]) -> tuple[Any, Any]:
    """Coefficients stored as patches, which is exact if the scale is one number per channel."""
    per_channel, output = torch.as_tensor(scale), tuple(node.output_shape[1:])
    if last_A.identity or output != source or math.prod(per_channel.shape[-2:]) > 1:
        require_matrix(last_A, node)
    if per_channel.ndim > 3:
        per_channel = per_channel[0]
    bias: Any = 0
    if isinstance(shift, Tensor):
        bias = last_A.matmul(shift.expand(last_A.patches.shape[1], *output)).transpose(0, 1)
    return last_A.create_similar(last_A.patches * per_channel.to(last_A.patches)), bias


_FUNCTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Elu": lambda node, x: F.elu(x, node.attr.get("alpha", 1.0)),
    "Selu": lambda node, x: F.selu(x),
    "Erf": lambda node, x: torch.erf(x),
}
# Node classes of operators that neither release has.
ELEMENTWISE: dict[str, Any] = {
    name: type(f"Bound{name}", (ElementwiseIntervals,), {"forward": forward}) for name, forward in _FUNCTIONS.items()
}
CUSTOM_OPERATORS: dict[str, Callable[..., Any]] = {
    **{f"onnx::{name}": cls for name, cls in ELEMENTWISE.items()},
    "onnx::Conv": functools.partial(_convolution, False),
    "onnx::ConvTranspose": functools.partial(_convolution, True),
    "onnx::AveragePool": BoundMeanPool,
    "onnx::GlobalAveragePool": GlobalMean,
    "onnx::MaxPool": BoundMaximumPool,
    "onnx::Pad": ConstantPad,
    "onnx::Slice": StridedSlice,
    "onnx::Clip": BoundClamp,
    "onnx::DepthToSpace": PixelShuffle,
    "onnx::HardSigmoid": functools.partial(BoundClamp, sigmoid=True),
}
# Engine classes whose forward passes are right, and whose bounds are not always, and their replacements.
ADJOINT: dict[Any, Any] = {
    cls: type(f"Adjoint{cls.__name__}", (AdjointBounds, cls), {})
    for cls in node_classes("ReduceMean", "ReduceSum", "Split", "Gather")
}
SATURATING: dict[Any, Any] = {
    cls: type(f"Saturating{cls.__name__}", (_Saturating, cls), {})
    for cls in (node_classes("Sigmoid", "Tanh") if ENGINE_VERSION.startswith("0.3") else ())
}
_REPLACEMENTS: dict[Any, Any] = {_engine.BoundParams: SharedParameter, _engine.BoundConcat: LinfConcat}
_REPLACEMENTS |= ADJOINT | SATURATING
if "C" not in inspect.signature(_engine.BoundMatMul.interval_propagate).parameters:
    _REPLACEMENTS[_engine.BoundMatMul] = MarginMatMul


def adopt(bounded: Any, model: nn.Module) -> None:
    """Replace the nodes of ``bounded``, built from ``model``, by the classes of this package where necessary.

    Refuses operands that depend on the inputs by their shape alone (``expand_as``), for which the bounds of both
    releases are wrong, and ``bound_opts`` that omit a part of BatchNorm.
    """
    nodes, traced_batch = list(bounded._modules.values()), len(bounded.example[0])
    for node in nodes:
        if type(node) is _engine.BoundReshape and node.input_shape[0] == traced_batch == node.output_shape[0]:
            node.__class__, node.traced_batch = BatchReshape, traced_batch
        else:
            node.__class__ = _REPLACEMENTS.get(type(node), type(node))
    _adopt_constants(nodes)
    adopt_batchnorm(bounded, model, ViewedBatchNorm)


def _adopt_constants(nodes: list[Any]) -> None:
    of_data = reached_from_inputs(nodes, through_shapes=True)
    of_values = reached_from_inputs(nodes, through_shapes=False)
    for node in nodes:
        if node.inputs and id(node) not in of_data:
            node.__class__ = type(f"Computed{type(node).__name__}", (ComputedConstant, type(node)), {})
        operation = _ARITHMETIC.get(type(node))
        values = [id(source) in of_values for source in node.inputs]
        if operation is None or len(values) != 2 or sum(values) != 1 or (operation == "Div" and not values[0]):
            continue
        data, constant = node.inputs if values[0] else reversed(node.inputs)
        if id(constant) in of_data:
            text = "an operand of a sum or product is expanded to the shape of the input (expand_as, or a shape read "
            raise NotImplementedError(text + "in Python): use broadcasting instead")
        node.__class__ = BoundConstantArithmetic
        node.operation, node.constant, node.constant_first = operation, (constant,), not values[0]
        constant.output_name.remove(node.name)
        node.inputs = [data]
        if "input_name" in vars(node):  # 0.7 derives it from the inputs.
            node.input_name = [data.name]
        # The engine set these for an operator of two perturbed operands.
        node.requires_input_bounds = []
        node.nonlinear = node.splittable = node.patches_start = False
