"""Interval bounds on a network's output, computed without auto_LiRPA, to check the engine's IBP bounds against.

The network is traced to ATen operators, and each operator maps intervals to intervals: interval arithmetic (Moore,
1966), called interval bound propagation (IBP) for neural networks (Gowal et al., 2018). Only the operators of a closed
list have a rule. A rule calls the traced operator, with all of its attributes, on suitable ends of the intervals.
"""

import copy
import csv
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_SILU_MINIMUM = -1.2784645427610738  # Where x·sigmoid(x) is smallest.
_GELU_MINIMA = -0.7517915246935645, -0.7524614220710162  # Of the exact function, and of the approximation by tanh.
_RANDOM = torch.Tag.nondeterministic_seeded


class UnknownOperatorError(NotImplementedError):
    """The network contains an operator, named in the message, that no interval rule covers."""


@dataclass(frozen=True, eq=False)
class Interval:
    """All numbers from ``lower`` to ``upper``, elementwise."""

    lower: Tensor
    upper: Tensor


# Maps an operator and its arguments, some of them intervals, to its result: an interval, or a list for several outputs.
# NotImplemented where the rule does not cover the arguments.
Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


@torch.inference_mode(False)
@torch.no_grad()
def interval_bounds(model: nn.Module, *boxes: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Bound the output of ``model`` over a box by interval arithmetic in float64.

    Each operator is bounded by itself, so the dependencies between its operands are lost, except in the product x·x of
    a tensor with itself. At radius 0 both bounds are the network's output. Rounding is to nearest, not outward, so
    compare with a tolerance.

    There is a box (lower, upper), or a constant tensor, for each input. The bounds are those of a float64 copy of
    ``model`` in evaluation mode, on the device of the first box.
    """
    device = (boxes[0] if isinstance(boxes[0], Tensor) else boxes[0][0]).device
    inputs = [_as_value(box, device) for box in boxes]
    examples = [value.lower if isinstance(value, Interval) else value for value in inputs]
    with torch.autocast(device.type, enabled=False), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = copy.deepcopy(model).eval().to(device, torch.float64)
        output = Propagation(trace(model, examples), model).run(*inputs)
    lower, upper = (output.lower, output.upper) if isinstance(output, Interval) else (output, output)
    if not bool((lower <= upper).all()):
        raise ArithmeticError("a bound is NaN, or a lower bound exceeds the upper bound")
    return lower.double(), upper.double()


def _as_value(box: tuple[Tensor, Tensor] | Tensor, device: torch.device) -> Interval | Tensor:
    if isinstance(box, Tensor):
        return box.to(device, torch.float64 if box.is_floating_point() else box.dtype, copy=True)
    lower, upper = (end.to(device, torch.float64, copy=True) for end in box)
    if lower.shape != upper.shape:
        raise ValueError(f"the ends of a box differ in shape: {tuple(lower.shape)} and {tuple(upper.shape)}")
    if not bool((lower <= upper).all()):
        raise ValueError("the lower end of a box exceeds the upper end, or is NaN")
    return Interval(lower, upper)


def trace(model: nn.Module, examples: list[Tensor]) -> torch.fx.GraphModule:
    """The ATen operators of ``model`` on inputs like ``examples``."""

    def forward(*inputs: Tensor) -> Tensor:
        output = model(*(x.clone() for x in inputs))  # The model may change an input in place.
        if not isinstance(output, Tensor):
            raise RuntimeError(f"it returns an object of type {type(output).__name__}; return one tensor")
        return output

    try:  # torch.func.functionalize, which is public, does not remove the in-place copies of circular padding.
        graph = make_fx(dispatch_functionalize(forward))(*examples)
    except (RuntimeError, TypeError) as error:  # The network ran before.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UnknownOperatorError(f"the network cannot be traced to PyTorch's own operators: {reason}") from error
    graph.graph.eliminate_dead_code()  # An operator whose result is unused needs no rule.
    return graph


class Propagation(torch.fx.Interpreter):
    """Evaluates a traced network on intervals and tensors."""

    def __init__(self, graph: torch.fx.GraphModule, model: nn.Module, rules: Mapping[str, Rule] | None = None) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self._rules = _RULES if rules is None else rules
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._last = "none"

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        self._last = self._names.get(id(value), self._last)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem:
            result = args[0][args[1]]
        elif not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or _RANDOM in target.tags:
            result = NotImplemented  # What remains to be mutated is a buffer: the output depends on earlier calls.
        elif intervals_in((args, kwargs)):
            namespace, _, name = str(target).rpartition(".")[0].rpartition(".")
            rule = self._rules.get(name) if namespace == "aten" else None
            result = rule(target, args, kwargs) if rule else NotImplemented
        else:
            result = super().call_function(target, args, kwargs)
        if result is NotImplemented:
            problem = f"no interval rule covers {target} here (last parameter read: {self._last})"
            raise UnknownOperatorError(f"{problem}: leave rigorous out, or write the network with other operators")
        return result


def intervals_in(arguments: Any) -> list[Interval]:
    """The intervals among an operator's arguments, in order."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Interval)]


def _call(function: Any, args: Any, kwargs: Any, values: Iterable[Tensor]) -> Any:
    """``function``'s result with ``values`` in place of the intervals, in the order of :func:`intervals_in`."""
    ends = iter(values)
    args, kwargs = tree_map_only(Interval, lambda _: next(ends), (args, kwargs))
    return function(*args, **kwargs)


def _pair(lower: Any, upper: Any) -> Any:
    """Intervals from results at the lower and upper ends; NotImplemented in place of indices."""
    return tree_map(lambda low, high: Interval(low, high) if low.is_floating_point() else NotImplemented, lower, upper)


def _hull(results: list[Any]) -> Any:
    """The smallest intervals that contain all ``results`` of one operator."""
    return tree_map(lambda *ends: _pair(reduce(torch.minimum, ends), reduce(torch.maximum, ends)), *results)


def increasing(function: Any, args: Any, kwargs: Any) -> Any:
    """Operators that do not decrease in any of the intervals, such as those that move elements."""
    intervals = intervals_in((args, kwargs))
    lower = _call(function, args, kwargs, [interval.lower for interval in intervals])
    return _pair(lower, _call(function, args, kwargs, [interval.upper for interval in intervals]))


def monotone(function: Any, args: Any, kwargs: Any) -> Any:
    """Operators that are monotone in each interval; the direction may depend on the other arguments."""
    corners = itertools.product(*((interval.lower, interval.upper) for interval in intervals_in((args, kwargs))))
    return _hull([_call(function, args, kwargs, corner) for corner in corners])


def turning_at(*points: float) -> Rule:
    """The rule of elementwise functions that are monotone, in either direction, between consecutive ``points``."""

    def rule(function: Any, args: Any, kwargs: Any) -> Any:
        x, *others = args
        if not isinstance(x, Interval) or intervals_in((others, kwargs)):
            return NotImplemented
        inside = [x.lower.clamp(min=point).minimum(x.upper) for point in points]
        return _hull([function(value, *others, **kwargs) for value in (x.lower, x.upper, *inside)])

    return rule


def _bilinear(product: Any, one: Any, other: Any) -> Any:
    """Products with a constant W: the lower bound is product(lower, W⁺) + product(upper, W⁻)."""
    if isinstance(one, Interval) and isinstance(other, Interval):
        return NotImplemented
    if isinstance(other, Interval):
        return _bilinear(lambda b, a: product(a, b), other, one)
    if not isinstance(one, Interval):
        return product(one, other)
    positive, negative = other.clamp(min=0), other.clamp(max=0)
    lower = product(one.lower, positive) + product(one.upper, negative)
    return Interval(lower, product(one.upper, positive) + product(one.lower, negative))


def _plus_product(product: Any) -> Rule:
    """The rule of beta·c + alpha·product(a, b)."""

    def rule(function: Any, args: Any, kwargs: Any) -> Any:
        result = _bilinear(product, *args[1:])
        if result is NotImplemented:
            return result
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        return monotone(lambda c, ab: beta * c + alpha * ab, (args[0], result), {})

    return rule


def _convolution(function: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, *attributes = args
    if isinstance(bias, Interval):
        return NotImplemented
    result = _bilinear(lambda x, weight: function(x, weight, None, *attributes), x, weight)
    if bias is None or result is NotImplemented:
        return result
    return increasing(torch.add, (result, bias.view(-1, *[1] * len(attributes[0]))), {})


def _multiply(function: Any, args: Any, kwargs: Any) -> Any:
    one, other = args
    if one is other:
        return turning_at(0)(lambda x: function(x, x), (one,), kwargs)
    return monotone(function, args, kwargs)


def _power(function: Any, args: Any, kwargs: Any) -> Any:
    base, exponent = args
    if not isinstance(base, Interval) or isinstance(exponent, Interval | Tensor):
        return NotImplemented
    if not float(exponent).is_integer():
        _require(base.lower >= 0, function)
    if exponent < 0:
        _require(_excludes_zero(base), function)
    return turning_at(0)(function, args, kwargs)


def _within(domain: Callable[[Interval], Tensor], rule: Rule, position: int = 0) -> Rule:
    """``rule`` where the argument at ``position`` lies in ``domain``."""

    def restricted(function: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(args[position], Interval):
            _require(domain(args[position]), function)
        return rule(function, args, kwargs)

    return restricted


def _excludes_zero(x: Interval) -> Tensor:
    return (x.lower > 0) | (x.upper < 0)


def _require(condition: Tensor, function: Any) -> None:
    if not bool(condition.all()):
        raise ValueError(f"the operator {function} is undefined or unbounded on part of its interval")


def _softplus(function: Any, args: Any, kwargs: Any) -> Any:
    x, beta, threshold = list(args) + [1, 20][len(args) - 1 :]
    jump = threshold / beta  # Beyond it ATen returns x, which is less than log(1 + exp(beta·x))/beta.
    around = [math.nextafter(jump, -math.inf), jump, math.nextafter(jump, math.inf)]
    return turning_at(*around)(function, (x, beta, threshold), kwargs)


def _batch_norm(function: Any, args: Any, kwargs: Any) -> Any:
    if any(value is True for value in args) or intervals_in((args[1:], kwargs)):  # True: training mode.
        return NotImplemented
    return monotone(function, args, kwargs)


def view(function: Any, args: Any, kwargs: Any) -> Any:
    """Another shape, but no other dtype; the ends may be laid out in memory differently from the traced tensor."""
    return NotImplemented if isinstance(args[1], torch.dtype) else increasing(torch.reshape, args, kwargs)


def _only_shape(function: Any, args: Any, kwargs: Any) -> Any:
    """Operators that read only the shape of an interval, not its values."""
    return _call(function, args, kwargs, [interval.lower for interval in intervals_in((args, kwargs))])


with (Path(__file__).parent / "aten.csv").open(newline="", encoding="utf-8") as _file:
    _OPERATORS = {row["kind"]: row["operators"].split() for row in csv.DictReader(_file)}
MOVING, BATCH_NORM = frozenset(_OPERATORS["moving"]), frozenset(_OPERATORS["batch norm"])  # MOVING ones only copy.
_RULES: dict[str, Rule] = {
    **dict.fromkeys([*MOVING, *_OPERATORS["not decreasing"]], increasing),
    **dict.fromkeys(["view", "_unsafe_view"], view),
    **dict.fromkeys(["add", "avg_pool2d", "avg_pool3d", "neg", "rsub", "sub"], monotone),
    **dict.fromkeys(["_prelu_kernel", "abs", "celu", "elu", "leaky_relu"], turning_at(0)),
    **dict.fromkeys(["bmm", "dot", "mm", "mv"], lambda function, args, kwargs: _bilinear(function, *args)),
    **dict.fromkeys(BATCH_NORM, _batch_norm),
    **dict.fromkeys(_OPERATORS["filled"], _only_shape),
    "addmm": _plus_product(torch.mm),
    "addmv": _plus_product(torch.mv),
    "baddbmm": _plus_product(torch.bmm),
    "convolution": _convolution,
    "div": _within(_excludes_zero, monotone, position=1),
    "gelu": turning_at(*_GELU_MINIMA),
    "hardswish": turning_at(-3, -1.5),
    "log": _within(lambda x: x.lower > 0, increasing),
    "mul": _multiply,
    "pow": _power,
    "reciprocal": _within(_excludes_zero, monotone),
    "rsqrt": _within(lambda x: x.lower > 0, monotone),
    "silu": turning_at(_SILU_MINIMUM),
    "softplus": _softplus,
    "sqrt": _within(lambda x: x.lower >= 0, increasing),
}
