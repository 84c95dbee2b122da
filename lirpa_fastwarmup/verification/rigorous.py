"""Interval bounds that hold in floating point: every rounding error is bounded, and ends are rounded outward.

They prove two statements about a network with float32 parameters and a box of real points around a sample:

- "exact": in exact arithmetic, the network has the same class at every point of the box;
- "float32": so it has as PyTorch computes it in float32, at every float32 point of the box, whatever the order of its
  sums. The rounding errors of the network may be 0, so that this statement implies the first.

"float32" is about products and sums that are computed as such: no TF32, and no convolution by Winograd's algorithm, by
FFT or by NNPACK. Underflow is gradual, as it is unless torch.set_flush_denormal was called. Where a float32 number
might overflow, nothing is proved.

The bounds are computed in float64. A sum of n products, in any order, is within γ_n·Σ|a·b| of the exact one, where
γ_n = n·u/(1 − n·u) and u is 2⁻⁵³ for float64 and 2⁻²⁴ for float32 (Higham, 2002, section 3.1). Functions other than
sums, products, quotients, roots and piecewise linear ones are refused: no standard bounds their error.
"""

import logging
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lirpa_fastwarmup.boxes import Epsilon, InputRange, broadcast_to_batch
from lirpa_fastwarmup.engine.tracing import copy_of
from lirpa_fastwarmup.verification import intervals
from lirpa_fastwarmup.verification.intervals import MOVING, Interval, Rule, increasing, intervals_in, monotone

logger = logging.getLogger(__name__)

Statement = Literal["exact", "float32"]

_U64, _U32 = 2.0**-53, 2.0**-24
_SLACK = 1 + 2.0**-20  # Covers the rounding of the error bounds themselves.
_TINY64 = 1e-300  # More than any sum loses to underflow.
_TINY32 = 2.0**-149  # More than one operation loses to it in float32.
_LARGEST = torch.finfo(torch.float32).max / 2
_EXACT = {"full", "ones", "zeros", "scalar_tensor", "arange"}  # What they compute, if float32 holds it.
_LINEAR = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
_BATCH_NORM_ROUNDINGS = 12  # Of (x − m)·s + b and of x·s + (b − m·s), with those of s = w/√(v + ε).


def _gamma(count: int, unit: float) -> float:
    if count * unit >= 0.5:
        raise ArithmeticError(f"rounding errors of sums of {count} terms are not bounded in this precision")
    return _SLACK * count * unit / (1 - count * unit)


def _holds_in_float32(values: Sequence[Any]) -> bool:
    """Whether float32 holds every Python number among ``values``."""
    numbers = [value for value in values if isinstance(value, float | int)]
    return all(float(torch.tensor(float(value), dtype=torch.float32)) == value for value in numbers)


def _outward(found: Interval) -> Interval:
    """``found``, its ends, each after one rounding to nearest, moved by more than that rounding."""
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    return Interval((found.lower - _TINY64).nextafter(-infinity), (found.upper + _TINY64).nextafter(infinity))


def _computed(function: Any, *args: Any) -> Interval:
    return _outward(monotone(function, args, {}))


def _sizes(x: Interval) -> Tensor:
    return torch.maximum(x.lower.abs(), x.upper.abs())


def box_around(x: Tensor, eps: Epsilon, input_range: InputRange | None) -> Interval:
    """The box of real points around ``x`` in float64, its ends rounded outward; clipped to ``input_range``."""
    x = x.cpu().double()
    radius = broadcast_to_batch(eps, x, "eps")
    box = _outward(Interval(x - radius, x + radius))
    if input_range is None:
        return box
    low, high = (torch.as_tensor(broadcast_to_batch(end, x, "input_range"), dtype=x.dtype) for end in input_range)
    return Interval(torch.maximum(box.lower, low.cpu()), torch.minimum(box.upper, high.cpu()))


class _Arithmetic:
    """Interval rules for the values of a network in exact arithmetic, or as computed in float32."""

    def __init__(self, *, computed: bool) -> None:
        self.unit, self.tiny = (_U32, _TINY32) if computed else (0.0, 0.0)

    def errors(self, count: int) -> float:
        """The network's own γ of ``count`` roundings."""
        return _gamma(count, self.unit)

    def widened(self, x: Interval, error: Tensor | float) -> Interval:
        """``x``, after the network's own rounding by at most ``error``."""
        if not self.unit:
            return x
        found = _outward(Interval(x.lower - error * _SLACK, x.upper + error * _SLACK))
        self.require_finite(_sizes(found))
        return found

    def require_finite(self, *sizes: Tensor | float) -> None:
        """Raise ArithmeticError if values of these sizes, partial sums among them, may overflow in the network."""
        if self.unit and not all(bool((torch.as_tensor(size) < _LARGEST).all()) for size in sizes):
            raise ArithmeticError("a value may overflow in float32")

    def rounded(self, rule: Rule, count: int) -> Rule:
        """``rule`` of an elementwise operator, which rounds once here, and ``count`` times in the network."""

        def applied(function: Any, args: Any, kwargs: Any) -> Any:
            found = rule(function, args, kwargs)
            if found is NotImplemented:
                return found
            found = _outward(found)
            self.require_finite(*(abs(value) for value in args if isinstance(value, float | int)))
            largest = max(float(_sizes(value).amax()) for value in intervals_in((args, kwargs)))
            tiny = count * self.tiny * (1 + largest)
            return self.widened(found, self.errors(count) * _sizes(found) + tiny)

        return applied

    def sum(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Sums and differences, without a factor; a Python number is rounded to float32 first."""
        if kwargs or len(args) > 2:
            return NotImplemented
        found = _outward(monotone(function, args, kwargs))
        constants = math.fsum(abs(value) for value in args if isinstance(value, float | int))
        return self.widened(found, self.errors(2) * (_sizes(found) + constants) + 2 * self.tiny)

    def clipped(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Operators that choose between their argument and constants, which float32 may round."""
        found = increasing(function, args, kwargs)
        if _holds_in_float32((*args, *kwargs.values())):
            return found
        return self.widened(found, self.errors(1) * _sizes(found) + self.tiny)

    def affine(self, product: Callable[..., Tensor], x: Any, weight: Any, bias: Any, terms: int) -> Any:
        """product(x, weight) + bias, where each element of the product is a sum of ``terms`` products."""
        if not isinstance(x, Interval) or isinstance(weight, Interval) or isinstance(bias, Interval):
            return NotImplemented
        centre = (x.lower + x.upper) / 2
        radius = torch.maximum(x.upper - centre, centre - x.lower) * _SLACK
        self.require_finite(terms * _sizes(x).amax() * weight.abs().amax())  # No partial sum is larger.
        own, theirs = _gamma(terms + 2, _U64), self.errors(terms + 1)
        value = product(centre, weight)
        spread = product(radius + (own + theirs) * (centre.abs() + radius), weight.abs())
        if bias is not None:
            value, spread = value + bias, spread + (own + theirs) * bias.abs()
        spread = spread * (1 + 8 * own) * _SLACK + (2 * terms + 2) * self.tiny
        return self.widened(_outward(Interval(value - spread, value + spread)), 0.0)

    def rounding(self, x: Interval, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The network's own rounding of each output of a linear layer, (batch, outputs)."""
        size = _sizes(x) @ weight.abs() + (0.0 if bias is None else bias.abs())
        self.require_finite(size)
        terms = len(weight) + 1
        return self.errors(terms) * size * (1 + 8 * _gamma(terms, _U64)) + (2 * terms) * self.tiny

    def addmm(self, function: Any, args: Any, kwargs: Any) -> Any:
        bias, x, weight = args
        if kwargs or isinstance(weight, Interval):
            return NotImplemented
        return self.affine(torch.mm, x, weight, bias, weight.shape[0])

    def matmul(self, function: Any, args: Any, kwargs: Any) -> Any:
        one, other = args
        if isinstance(other, Interval):
            return self.affine(lambda x, weight: function(weight, x), other, one, None, other.lower.shape[-2])
        return self.affine(function, one, other, None, other.shape[-2])

    def convolution(self, function: Any, args: Any, kwargs: Any) -> Any:
        x, weight, bias, *attributes = args
        if isinstance(weight, Interval) or isinstance(bias, Interval):
            return NotImplemented
        transposed, groups = attributes[3], attributes[5]
        terms = (weight.shape[0] // groups if transposed else weight.shape[1]) * math.prod(weight.shape[2:])
        bias = None if bias is None else bias.view(-1, *[1] * len(attributes[0]))
        return self.affine(lambda x, weight: function(x, weight, None, *attributes), x, weight, bias, terms)

    def averaged(self, terms_of: Callable[[Tensor, Any, Tensor], int]) -> Rule:
        """Sums and means, as operators that are linear with coefficients of at least 0."""

        def applied(function: Any, args: Any, kwargs: Any) -> Any:
            x = args[0]
            if kwargs.get("dtype") is not None or not isinstance(x, Interval):
                return NotImplemented
            lower, upper, size = (function(end, *args[1:], **kwargs) for end in (x.lower, x.upper, _sizes(x)))
            if not bool((size >= 0).all()):  # A divisor below 0.
                return NotImplemented
            terms = terms_of(x.lower, args, lower) + 2
            self.require_finite(terms * _sizes(x).amax())
            own, tiny = _gamma(terms, _U64) * size * 2, 2 * terms * self.tiny
            return self.widened(_outward(Interval(lower - own, upper + own)), self.errors(terms) * size + tiny)

        return applied

    def batch_norm(self, function: Any, args: Any, kwargs: Any) -> Any:
        """(x − m)·s + b with s = w/√(v + ε), for either formula of PyTorch."""
        if any(value is True for value in args) or intervals_in((args[1:], kwargs)):
            return NotImplemented
        x, weight, bias, mean, var = args[:5]
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        weight, bias, mean, var = (one.view(-1, *[1] * (x.lower.ndim - 2)) for one in (weight, bias, mean, var))
        scale = _computed(torch.div, weight, _computed(torch.sqrt, _computed(torch.add, var, args[-1])))
        scaled = _computed(torch.mul, _computed(torch.sub, x, mean), scale)
        size = (_sizes(x) + mean.abs()) * _sizes(scale) + bias.abs()
        self.require_finite(_sizes(scale), size)
        tiny = 8 * self.tiny * (1 + _sizes(scale) + _sizes(x) + mean.abs())
        error = self.errors(_BATCH_NORM_ROUNDINGS) * size + tiny
        return [self.widened(_computed(torch.add, scaled, bias), error), None, None]

    def rules(self) -> dict[str, Rule]:
        pooled = self.averaged(lambda x, args, result: math.prod(args[1] if len(args[1]) > 1 else [args[1][0]] * 3))
        piecewise = self.rounded(intervals.turning_at(0), 2)  # A slope and a product.
        return {
            **dict.fromkeys([*MOVING, "relu", "amax", "amin", "maximum", "minimum"], increasing),
            **dict.fromkeys(["max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"], increasing),
            **dict.fromkeys(["view", "_unsafe_view"], intervals.view),
            **dict.fromkeys(["clamp", "clamp_min", "clamp_max", "hardtanh", "constant_pad_nd", "fill"], self.clipped),
            **dict.fromkeys(["add", "sub", "rsub"], self.sum),
            "mul": self.rounded(monotone, 2),
            **dict.fromkeys(["leaky_relu", "_prelu_kernel"], piecewise),
            **dict.fromkeys(["mm", "bmm"], self.matmul),
            **dict.fromkeys(intervals.BATCH_NORM, self.batch_norm),
            **dict.fromkeys(["avg_pool2d", "avg_pool3d"], pooled),
            **dict.fromkeys(["_adaptive_avg_pool2d", "_adaptive_avg_pool3d"], self.averaged(_adaptively_pooled)),
            **dict.fromkeys(["mean", "sum"], self.averaged(lambda x, _, result: x.numel() // result.numel())),
            "abs": intervals.turning_at(0),
            "neg": monotone,
            "div": self.rounded(_quotient, 3),  # A GPU multiplies by the reciprocal of a constant.
            "addmm": self.addmm,
            "convolution": self.convolution,
        }


def _adaptively_pooled(x: Tensor, args: Any, result: Tensor) -> int:
    return math.prod(-(-before // after) + 1 for before, after in zip(x.shape[2:], result.shape[2:], strict=True))


def _quotient(function: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(args[1], Interval) or kwargs or not bool((torch.as_tensor(args[1]) != 0).all()):
        return NotImplemented
    return monotone(function, args, kwargs)


class _Rigorous(intervals.Propagation):
    """Evaluates a traced network by the rules of one arithmetic; constants that are computed become intervals."""

    is_float32 = True  # The network, which is traced in float64.

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._in_float32(super().get_attr(target, args, kwargs), "a constant")

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._in_float32(super().placeholder(target, args, kwargs), "an input")

    def _in_float32(self, value: Any, what: str, is_known: bool = True) -> Any:
        checked = self.is_float32 and isinstance(value, Tensor) and (is_known or value.is_floating_point())
        if checked and not (is_known and torch.equal(value.float().to(value.dtype), value)):
            text = f"no interval rule covers {what} that may differ in float32: "
            raise intervals.UnknownOperatorError(text + "make it a float32 buffer or a Python number")
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target).split(".")[1] if isinstance(target, torch._ops.OpOverload) else ""
        moves = name in MOVING or (name in ("view", "_unsafe_view") and not isinstance(args[1], torch.dtype))
        moves &= name != "constant_pad_nd" or _holds_in_float32((*args, *kwargs.values()))
        if target is not operator.getitem and not moves and not intervals_in((args, kwargs)):
            floating = [isinstance(value, Tensor) and value.is_floating_point() for value in args]
            ends = zip(args, floating, strict=True)
            args = tuple(Interval(one.double(), one.double()) if is_number else one for one, is_number in ends)
        result = super().call_function(target, args, kwargs)
        made = not any(isinstance(leaf, Interval | Tensor) for leaf in tree_leaves((args, kwargs)))
        return self._in_float32(result, f"a result of {name}", name in _EXACT) if made else result


def _end_before_last_layer(graph: torch.fx.GraphModule) -> None:
    """Let ``graph`` return the operands of the linear layer that it ends with, if it does."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    last = output.args[0]
    if last.target in _LINEAR and not last.kwargs:
        output.args = (last.args if len(last.args) == 3 else (None, *last.args),)
        graph.recompile()


class RigorousMargins:
    """Proves the module's statements about a network; raises ArithmeticError if subnormal numbers are flushed."""

    def __init__(self, model: nn.Module) -> None:
        if not bool(torch.tensor(5e-324, dtype=torch.float64) * 1 > 0):
            raise ArithmeticError("subnormal numbers are flushed to zero: call torch.set_flush_denormal(False)")
        dtypes = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
        self.is_float32 = dtypes <= {torch.float32}
        self._model = copy_of(model).eval().to("cpu", torch.float64)
        self._graphs: dict[Any, torch.fx.GraphModule] = {}  # By input shapes, and whether the last layer is left out.
        self._arithmetics = {name: _Arithmetic(computed=name == "float32") for name in ("float32", "exact")}

    @torch.inference_mode(False)
    @torch.no_grad()
    def bounds(self, inputs: Sequence[Interval | Tensor], arithmetic: str, *, before_last: bool = False) -> Any:
        """Bounds on the logits; or the operands (bias, x, weight) of the linear layer that the network ends with."""
        examples = [value.lower if isinstance(value, Interval) else value for value in inputs]
        key = tuple(value.shape for value in examples), before_last
        if key not in self._graphs:
            self._graphs[key] = intervals.trace(self._model, examples)
            if self.is_float32:
                self._require_same_in_float32(self._graphs[key], examples)
            if before_last:
                _end_before_last_layer(self._graphs[key])
        network = _Rigorous(self._graphs[key], self._model, self._arithmetics[arithmetic].rules())
        network.is_float32 = self.is_float32
        return network.run(*inputs)

    def _require_same_in_float32(self, graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> None:
        """Refuse a network that reads its precision: it was traced in float64."""
        given = [value.float() if value.is_floating_point() else value for value in examples]
        single = intervals.trace(copy_of(self._model).float(), given)
        if str(single.graph).replace("float32", "float64") != str(graph.graph):
            text = "the network computes something else in float64 than in float32: remove what depends on a dtype"
            raise intervals.UnknownOperatorError(text)

    def proved(self, inputs: Sequence[Interval | Tensor], y: Tensor, arithmetic: str) -> Tensor:
        """Whether class y is that of every point of each box, (batch,)."""
        try:
            found = self.bounds(inputs, arithmetic, before_last=True)
            if isinstance(found, Interval):
                own, others = found.lower.gather(1, y.unsqueeze(1)), found.upper
            else:
                own, others = torch.zeros(len(y), 1), self._differences(y, arithmetic, *found)
        except ArithmeticError as error:
            logger.info("nothing is proved in %s arithmetic: %s", arithmetic, error)
            return torch.zeros_like(y).bool()
        return (own > others.scatter(1, y.unsqueeze(1), -torch.inf)).all(1)

    def _differences(self, y: Tensor, arithmetic: str, bias: Any, x: Any, weight: Any) -> Tensor:
        """Upper bounds on z_j − z_y, (batch, classes): one product of the last layer's x; each is rounded by itself."""
        if isinstance(weight, Interval) or isinstance(bias, Interval) or not isinstance(x, Interval):
            raise intervals.UnknownOperatorError("no interval rule covers a last linear layer whose weight is computed")
        differences = weight - weight.t()[y].unsqueeze(2)  # For their rounding, there is one more term below.
        shifts = None if bias is None else bias - bias[y].unsqueeze(1)
        product = partial(torch.einsum, "bi,bic->bc")
        exactly = self._arithmetics["exact"].affine(product, x, differences, shifts, len(weight) + 1)
        errors = self._arithmetics[arithmetic].rounding(x, weight, bias)
        return self._arithmetics[arithmetic].widened(exactly, errors + errors.gather(1, y.unsqueeze(1))).upper

    def statements(self, inputs: Sequence[Interval | Tensor], y: Tensor) -> list[Statement | None]:
        """The strongest statement that is proved for each box: "float32", "exact" or ``None``."""
        computed = self.proved(inputs, y, "float32") if self.is_float32 else torch.zeros_like(y).bool()
        exact = computed if bool(computed.all()) else self.proved(inputs, y, "exact")
        pairs = zip(computed.tolist(), exact.tolist(), strict=True)
        return ["float32" if one else "exact" if other else None for one, other in pairs]
