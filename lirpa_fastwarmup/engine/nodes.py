"""Node classes of ours, where the installed engine has none for an operator or one whose bounds are wrong.

Release 0.3 supports two-dimensional convolutions only, and transposed ones only without padding; 0.7 adds
one-dimensional ones. Both bound pooling in two dimensions only, and wrongly or not at all where windows overlap, are
padded or do not cover the input. The classes here serve one to three dimensions. Their CROWN bounds need coefficients
as matrices; :func:`lirpa_fastwarmup.engine.operators.review` decides where.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lirpa_fastwarmup.engine.compat import engine, node_classes

Bound: Any = engine.bound_general.Bound
BoundConv: Any = engine.bound_general.BoundConv
BoundConvTranspose: Any = engine.bound_general.BoundConvTranspose
BoundLinear: Any = engine.bound_general.BoundLinear
BoundMatMul: Any = engine.bound_general.BoundMatMul
BoundReshape: Any = engine.bound_general.BoundReshape
BoundConcat: Any = engine.bound_general.BoundConcat
BoundGlobalAveragePool: Any = engine.bound_general.BoundGlobalAveragePool
BoundSlice: Any = engine.bound_general.BoundSlice

_CONVOLUTION: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class BoundConvNd(Bound):
    """A convolution over one, two or three spatial dimensions, plain or transposed.

    Inputs are the features ``(batch, channels, *space)``, the weight and, optionally, the bias.
    """

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any, *, transposed: bool) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.rank = len(attr["kernel_shape"])
        if attr["pads"][: self.rank] != attr["pads"][self.rank :]:
            raise NotImplementedError(f"a convolution padded differently at its two ends: {attr['pads']}")
        self.transposed = transposed
        self.patches_start = False
        self.stride: list[int] = attr["strides"]
        self.padding: list[int] = attr["pads"][: self.rank]
        self.dilation: list[int] = attr["dilations"]
        self.groups: int = attr["group"]
        self.output_padding: list[int] = attr.get("output_padding", [0] * self.rank)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.transposed:
            return _TRANSPOSED[self.rank](
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return _CONVOLUTION[self.rank](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _apply_adjoint(self, coefficients: Tensor, weight: Tensor) -> Tensor:
        if self.transposed:
            spread = _CONVOLUTION[self.rank](
                coefficients, weight, None, self.stride, self.padding, self.dilation, self.groups
            )
            # Where the output padding is as wide as the stride, there are places beyond the input.
            inside = (slice(None), slice(None), *(slice(int(size)) for size in self.input_shape[2:]))
            return spread[inside]
        # What the strided convolution leaves of its input at the far end, so that the shapes agree.
        left_over = [
            int(self.input_shape[2 + d])
            - (int(coefficients.shape[2 + d]) - 1) * self.stride[d]
            + 2 * self.padding[d]
            - self.dilation[d] * (int(weight.shape[2 + d]) - 1)
            - 1
            for d in range(self.rank)
        ]
        return _TRANSPOSED[self.rank](
            coefficients, weight, None, self.stride, self.padding, left_over, self.groups, self.dilation
        )

    def forward(self, *x: Tensor) -> Tensor:
        return self._apply_weight(x[0], x[1], x[2] if len(x) == 3 else None)

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        if self.is_input_perturbed(1):
            raise NotImplementedError("bounds over perturbed convolution weights")
        lower, upper = v[0]
        weight = v[1][0]
        centre = self._apply_weight((lower + upper) / 2, weight, v[2][0] if len(v) == 3 else None)
        radius = self._apply_weight((upper - lower) / 2, weight.abs())
        return centre - radius, centre + radius

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        weight = x[1].lower

        def one_side(last_A: Any) -> tuple[Any, Any]:
            if last_A is None:
                return None, 0
            rows = require_matrix(last_A, self).flatten(0, 1)
            next_A = self._apply_adjoint(rows, weight).unflatten(0, last_A.shape[:2])
            bias = last_A.flatten(3).sum(3).matmul(x[2].lower) if len(x) == 3 else 0
            return next_A, bias

        lA, lower_bias = one_side(last_lA)
        uA, upper_bias = one_side(last_uA)
        return [(lA, uA), *[(None, None)] * (len(x) - 1)], lower_bias, upper_bias


def _automatic_padding(attr: Any) -> list[int]:
    """The padding that ``padding="same"`` stands for, which neither engine works out."""
    rank = len(attr["kernel_shape"])
    if attr.get("auto_pad") not in ("SAME_UPPER", b"SAME_UPPER"):
        return [0] * (2 * rank)
    # "same" comes with stride 1 only; an odd total, of an even kernel, is padded at the far end.
    totals = [d * (k - 1) for d, k in zip(attr["dilations"], attr["kernel_shape"], strict=True)]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def _engine_first(engine_operator: Any, *, transposed: bool) -> Callable[..., Any]:
    """An operator factory: the engine's own node where it takes these attributes, else ours."""

    def build(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
        attr = {"pads": _automatic_padding(attr), **attr}
        # 0.7 builds a three-dimensional convolution without complaint, and then runs conv2d; the adjoint of its dilated
        # transposed ones has another shape than their input.
        # 0.3's convolutions have one dilation.
        one_dilation = len(set(attr["dilations"])) == 1 and not (transposed and max(attr["dilations"]) > 1)
        if len(attr["kernel_shape"]) < 3 and one_dilation:
            try:
                return engine_operator(attr, inputs, output_index, options)
            except (AssertionError, IndexError):
                pass
        return BoundConvNd(attr, inputs, output_index, options, transposed=transposed)

    return build


class AdjointBounds:
    """Bounds of a linear map with coefficients ≥ 0 from its ``forward`` alone, for classes that derive from this.

    IBP maps both ends; CROWN multiplies by the adjoint, which is the derivative of ``forward``. The first input is the
    argument; further ones (axes, the ends of a slice) are constants.
    """

    inputs: list[Any]
    input_shape: Any

    def interval_propagate(self: Any, *v: Any) -> tuple[Tensor, Tensor]:
        constants = [interval[0] for interval in v[1:]]
        return self.forward(v[0][0], *constants), self.forward(v[0][1], *constants)

    def bound_backward(self: Any, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        constants = [value_of(source) for source in x[1:]]

        def one_side(last_A: Any) -> Tensor | None:
            if last_A is None:
                return None
            rows = require_matrix(last_A, self).flatten(0, 1)
            zeros = rows.new_zeros(len(rows), *self.input_shape[1:])
            adjoint = torch.func.vjp(lambda point: self.forward(point, *constants), zeros)[1]
            coefficients: Tensor = adjoint(rows)[0]
            return coefficients.unflatten(0, last_A.shape[:2])

        return [(one_side(last_lA), one_side(last_uA)), *[(None, None)] * len(constants)], 0, 0


def with_adjoint_bounds(engine_class: Any) -> Any:
    """``engine_class`` with the bounds of :class:`AdjointBounds` in place of its own."""
    return type(f"Adjoint{engine_class.__name__}", (AdjointBounds, engine_class), {})


def require_matrix(coefficients: Any, node: Any) -> Tensor:
    """CROWN's coefficients, which must be a tensor.

    Raises:
        NotImplementedError: they are kept as patches.
    """
    if isinstance(coefficients, Tensor):
        return coefficients
    raise NotImplementedError(
        f"CROWN through {type(node).__name__} with coefficients of type {type(coefficients).__name__}: build the "
        "BoundedModule with bound_opts={'conv_mode': 'matrix'}, or use IBP"
    )


def value_of(node: Any) -> Tensor:
    """The value of a node that is no argument of the bounds, from the last pass or else computed."""
    value = getattr(node, "forward_value", None)
    return evaluate(node) if value is None else torch.as_tensor(value)


def evaluate(node: Any) -> Tensor:
    """The present value of a constant, with gradient where it is computed from parameters."""
    return torch.as_tensor(node.forward(*(evaluate(source) for source in node.inputs)))


def leave_one_input(node: Any, argument: Any) -> None:
    """Take all inputs of ``node`` but ``argument`` out of the engine's graph."""
    for source in node.inputs:
        if source is not argument:
            source.output_name.remove(node.name)
    node.inputs = [argument]
    if "input_name" in vars(node):  # 0.7 derives it from the inputs.
        node.input_name = [argument.name]


def _number(attr: Any, name: str, inputs: Any, place: int, default: float) -> float:
    """A number that older tables of the exporter keep as an attribute, and newer ones as an input."""
    if name in attr or len(inputs) <= place:
        return float(attr.get(name, default))
    value = value_of(inputs[place])
    return float(value) if value.numel() else default


class ComputedConstant:
    """A value made from parameters, buffers and constants alone: its interval is the value itself.

    0.3 propagates intervals through products of constants as if they were data, and gets other weights.
    """

    def interval_propagate(self: Any, *v: Any) -> tuple[Tensor, Tensor]:
        value = self.forward(*(interval[0] for interval in v))
        return value, value

    def __getattr__(self: Any, name: str) -> Any:
        # CROWN reads the bounds of weights, which 0.3 keeps for parameters alone, and deletes those that it kept.
        return evaluate(self) if name in ("lower", "upper") else super().__getattr__(name)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        if name not in ("lower", "upper") or name in vars(self):
            super().__delattr__(name)


@functools.cache
def computed_constant(engine_class: Any) -> Any:
    """``engine_class`` with the interval of :class:`ComputedConstant`."""
    return type(f"Computed{engine_class.__name__}", (ComputedConstant, engine_class), {})


class _Pool(Bound):
    """Pooling over one, two or three spatial dimensions, with the attributes of ONNX."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.kernel_size: list[int] = attr["kernel_shape"]
        self.rank = len(self.kernel_size)
        self.stride: list[int] = attr.get("strides", [1] * self.rank)
        pads = attr.get("pads", [0] * (2 * self.rank))
        if pads[: self.rank] != pads[self.rank :]:
            raise NotImplementedError(f"pooling padded differently at its two ends: {pads}")
        self.padding: list[int] = pads[: self.rank]
        self.dilation: list[int] = attr.get("dilations", [1] * self.rank)
        self.ceil_mode = bool(attr.get("ceil_mode", 0))
        self.count_include_pad = bool(attr.get("count_include_pad", 0))


class BoundMeanPool(AdjointBounds, _Pool):
    """Average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        pool = _MEAN_POOL[self.rank]
        return pool(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class GlobalMean(AdjointBounds, BoundGlobalAveragePool):
    """The mean over all spatial dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)


class BoundMaximumPool(_Pool):
    """Max pooling. CROWN bounds the maximum of a window from below by the element with the largest lower bound.

    From above, the same element bounds it where no other can exceed it, and otherwise the largest upper bound (as in
    DeepPoly, Singh et al. 2019).
    """

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.requires_input_bounds = [0]

    def forward(self, x: Tensor) -> Tensor:
        pool = _MAX_POOL[self.rank]
        return pool(x, self.kernel_size, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode)

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        return self.forward(v[0][0]), self.forward(v[0][1])

    def bound_backward(self, last_lA: Any, last_uA: Any, x: Any, **kwargs: Any) -> Any:
        places, inside = self._windows(x.lower.shape[2:], x.lower.device)
        lower, upper = (end.flatten(2)[:, :, places] for end in (x.lower, x.upper))
        lower, upper = (end.masked_fill(~inside, -math.inf) for end in (lower, upper))
        best, element = lower.max(-1)
        others = upper.scatter(-1, element.unsqueeze(-1), -math.inf).amax(-1)
        decided, largest = best >= others, upper.amax(-1)
        chosen = places.expand_as(lower).gather(-1, element.unsqueeze(-1)).squeeze(-1)

        def one_side(last_A: Any, sign: int) -> tuple[Any, Any]:
            if last_A is None:
                return None, 0
            rows = require_matrix(last_A, self).flatten(3)
            from_above = (sign * rows).clamp(max=0) * sign
            linear = torch.where(decided, rows, rows - from_above)
            coefficients = rows.new_zeros(*rows.shape[:3], math.prod(x.lower.shape[2:]))
            coefficients = coefficients.scatter_add(-1, chosen.expand_as(rows), linear)
            bias = (from_above * torch.where(decided, torch.zeros_like(largest), largest)).flatten(2).sum(2)
            return coefficients.unflatten(-1, x.lower.shape[2:]), bias

        lA, lower_bias = one_side(last_lA, 1)
        uA, upper_bias = one_side(last_uA, -1)
        return [(lA, uA)], lower_bias, upper_bias

    def _windows(self, space: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of every window's elements, the place in the flattened space, and whether it lies in it and not beside it.

        Both (windows, elements).
        """
        places = torch.zeros(1, 1, dtype=torch.int64, device=device)
        inside = torch.ones(1, 1, dtype=torch.bool, device=device)
        for d, size in enumerate(space):
            first = torch.arange(int(self.output_shape[2 + d]), device=device) * self.stride[d] - self.padding[d]
            position = first.unsqueeze(1) + torch.arange(self.kernel_size[d], device=device) * self.dilation[d]
            valid = (position >= 0) & (position < size)
            position = position.clamp(0, size - 1)
            places = (places[:, None, :, None] * size + position[None, :, None, :]).flatten(2).flatten(0, 1)
            inside = (inside[:, None, :, None] & valid[None, :, None, :]).flatten(2).flatten(0, 1)
        return places, inside


class BoundClamp(Bound):
    """clip(a·x + b, low, high) with a > 0: ReLU6, Hardtanh, clamp and Hardsigmoid."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any, *, sigmoid: bool = False) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.requires_input_bounds = [0]
        self.slope: float = attr.get("alpha", 0.2) if sigmoid else 1.0
        self.offset: float = attr.get("beta", 0.5) if sigmoid else 0.0
        self.low: float = 0.0 if sigmoid else _number(attr, "min", inputs, 1, -math.inf)
        self.high: float = 1.0 if sigmoid else _number(attr, "max", inputs, 2, math.inf)
        self.low = min(self.low, self.high)  # As torch.clamp has it where the lower end is above the upper one.

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return (x if self.slope == 1 and self.offset == 0 else x * self.slope + self.offset).clamp(self.low, self.high)

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        return self.forward(v[0][0]), self.forward(v[0][1])

    def bound_backward(self, last_lA: Any, last_uA: Any, x: Any, **kwargs: Any) -> Any:
        below, above = self._lines(x.lower * self.slope + self.offset, x.upper * self.slope + self.offset)

        def one_side(last_A: Any, positive: Any, negative: Any) -> tuple[Any, Any]:
            if last_A is None:
                return None, 0
            up, down = require_matrix(last_A, self).clamp(min=0), last_A.clamp(max=0)
            coefficients = up * positive[0] + down * negative[0]
            shift = up * (positive[1] + positive[0] * self.offset) + down * (negative[1] + negative[0] * self.offset)
            return coefficients * self.slope, shift.flatten(2).sum(2)

        lA, lower_bias = one_side(last_lA, below, above)
        uA, upper_bias = one_side(last_uA, above, below)
        return [(lA, uA)], lower_bias, upper_bias

    def _lines(self, lower: Tensor, upper: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Slope and intercept of a line below and of one above clip(z, low, high), for z from lower to upper.

        The chord where that is one; else a line through the kink, the flatter or the steeper one of a single kink by
        the smaller area, to the other end's value of two.
        """
        at_lower, at_upper = (end.clamp(self.low, self.high) for end in (lower, upper))
        low, high = lower.clamp(min=self.low), upper.clamp(max=self.high)  # Finite, and the ends where there is none.
        kinks = (lower < self.low) & (upper > self.low), (lower < self.high) & (upper > self.high)
        chord = _quotient(at_upper - at_lower, upper - lower)
        bent = torch.where(kinks[1], _quotient(high - low, upper - low), (upper - low > low - lower).to(lower))
        below = torch.where(kinks[0], bent, chord)
        below_at = torch.where(kinks[0], low, upper), torch.where(kinks[0], low, at_upper)
        bent = torch.where(kinks[0], _quotient(high - low, high - lower), (high - lower > upper - high).to(lower))
        above = torch.where(kinks[1], bent, chord)
        above_at = torch.where(kinks[1], high, lower), torch.where(kinks[1], high, at_lower)
        return (below, below_at[1] - below * below_at[0]), (above, above_at[1] - above * above_at[0])


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, from 0 to 1, and 0 where the denominator is not above 0; its gradient is finite everywhere."""
    positive = denominator > 0
    safe = torch.where(positive, denominator, torch.ones_like(denominator))
    return torch.where(positive, numerator / safe, torch.zeros_like(numerator)).clamp(0, 1)


class ConstantPad(AdjointBounds, Bound):
    """Padding by zeros, by the edge or by reflection."""

    widths: list[int] | None = None

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.mode = {"edge": "replicate"}.get(attr["mode"], attr["mode"])
        if "pads" in attr:
            self._set_widths(attr["pads"], attr.get("value", 0.0))

    def _set_widths(self, pads: list[int], value: float) -> None:
        rank = len(pads) // 2
        begin, end = pads[:rank], pads[rank:]
        first = 0 if self.mode == "constant" else 2  # The other modes pad spatial dimensions only.
        if begin[0] or end[0] or value or any(begin[:first] + end[:first]):
            raise NotImplementedError("padding of the batch, or by other numbers than 0")
        self.widths = [width for d in reversed(range(first, rank)) for width in (begin[d], end[d])]

    def forward(self, x: Tensor, *constants: Tensor) -> Tensor:
        if self.widths is None:  # Newer tables of the exporter make the widths an input.
            pads, *value = constants
            self._set_widths([int(width) for width in pads], float(value[0]) if value and value[0].numel() else 0.0)
        assert self.widths is not None
        return F.pad(x, self.widths, self.mode)


class StridedSlice(AdjointBounds, BoundSlice):
    """A slice along one axis, with any step."""

    def forward(self, x: Any, start: Any = None, end: Any = None, axes: Any = None, steps: Any = 1) -> Any:
        if not isinstance(x, Tensor) or start is None:
            return super().forward(x, start, end, axes, steps)
        axis = int(axes)
        places = range(*slice(int(start), int(end), int(steps)).indices(x.shape[axis]))
        return x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))


class MarginMatMul(BoundMatMul):
    """A linear layer without bias whose interval bound takes a margin matrix (0.3's takes none)."""

    def interval_propagate(self, *v: Any, C: Tensor | None = None) -> Any:
        return BoundLinear.interval_propagate(self, *v, C=C)


class LinfConcat(BoundConcat):
    """Concatenation of intervals, also where one is the input box, at which 0.7's stumbles."""

    def interval_propagate(self, *v: Any) -> Any:
        perturbations = [getattr(interval, "ptb", None) for interval in v]
        if all(ptb is None or getattr(ptb, "norm", None) == math.inf for ptb in perturbations):
            return self.forward(*(interval[0] for interval in v)), self.forward(*(interval[1] for interval in v))
        return super().interval_propagate(*v)


class BatchReshape(BoundReshape):
    """A reshape that keeps the batch dimension, whatever the batch.

    0.3's trace of ``x.view(x.shape[0], -1)`` holds the size of the example batch as a constant.

    Attributes:
        traced_batch: that size.
    """

    traced_batch: int

    def forward(self, x: Tensor, shape: Any) -> Any:
        shape = [int(size) for size in shape]
        if shape[0] == self.traced_batch:
            shape[0] = x.shape[0]
        return super().forward(x, shape)


_MEAN_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

CUSTOM_OPERATORS: dict[str, Callable[..., Any]] = {
    "onnx::Conv": _engine_first(BoundConv, transposed=False),
    "onnx::ConvTranspose": _engine_first(BoundConvTranspose, transposed=True),
    "onnx::AveragePool": BoundMeanPool,
    "onnx::GlobalAveragePool": GlobalMean,
    "onnx::MaxPool": BoundMaximumPool,
    "onnx::Pad": ConstantPad,
    "onnx::Slice": StridedSlice,
    "onnx::Clip": BoundClamp,
    "onnx::HardSigmoid": functools.partial(BoundClamp, sigmoid=True),
}
# Engine classes whose forward passes are right and whose bounds are not always, and what takes their place.
ADJOINT = {cls: with_adjoint_bounds(cls) for cls in node_classes("ReduceMean", "ReduceSum", "Split", "Gather")}


def _keeps_batch(node: Any, batch: int) -> bool:
    """Whether a reshape's first dimension was the batch before and after, in the trace."""
    return bool(node.input_shape[0] == batch and node.output_shape[0] == batch)


def adopt_operators(bounded: Any) -> None:
    """Put the classes above in place of the engine's, where they are needed."""
    traced_batch = len(bounded.example[0])
    takes_margins = "C" in inspect.signature(BoundMatMul.interval_propagate).parameters
    for node in bounded._modules.values():
        if type(node) is BoundMatMul and not takes_margins:
            node.__class__ = MarginMatMul
        elif type(node) is BoundConcat:
            node.__class__ = LinfConcat
        elif isinstance(node, BoundClamp | ConstantPad):
            leave_one_input(node, node.inputs[0])  # They have read the others, of which the engine has no bounds.
        elif type(node) in ADJOINT:
            node.__class__ = ADJOINT[type(node)]
        elif type(node) is BoundReshape and _keeps_batch(node, traced_batch):
            node.__class__ = BatchReshape
            node.traced_batch = traced_batch
