"""Sums and products with a constant, bounded exactly.

The engines tell a constant operand by its node being a leaf. Where it is computed (a reshaped buffer, twice a
buffer, one over a buffer), 0.3's bounds are wrong, IBP's of products included; where it is broadcast, both
engines' CROWN is wrong or fails in places. Here every sum, difference and product of an input-dependent operand
with one that is not is the affine map s·x + t that it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.compat import engine, node_classes
from lirpa_fastwarmup.engine.nodes import computed_constant, evaluate, leave_one_input

Bound: Any = engine.bound_general.Bound
_INPUT: Any = engine.bound_general.BoundInput
_STATE: Any = node_classes("Params", "Buffers")
_SHAPE: Any = engine.bound_general.BoundShape
_PATCHES: Any = engine.bound_general.Patches
_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
}
_OPERATIONS: dict[Any, str] = {cls: name for name in ("Add", "Sub", "Mul", "Div") for cls in node_classes(name)}


class BoundConstantArithmetic(Bound):
    """x + c, x − c, c − x, x·c or x/c, where c does not depend on the network's inputs.

    Attributes:
        operation: "Add", "Sub", "Mul" or "Div".
        constant: the node of c, in a tuple, so that it is not registered as a child.
        constant_first: c is the left operand.
    """

    operation: str
    constant: tuple[Any]
    constant_first: bool

    @property
    def is_shift(self) -> bool:
        """Whether x is only shifted."""
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
        left, right = (c, x) if self.constant_first else (x, c)
        return _FUNCTIONS[self.operation](left, right)

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        if getattr(getattr(v[0], "ptb", None), "norm", math.inf) != math.inf:
            raise NotImplementedError("arithmetic with a constant on an input box of another norm than l∞")
        scale, shift = self._scale_and_shift()
        one, other = (scale * end + shift for end in v[0])
        if isinstance(scale, float):
            return (one, other) if scale > 0 else (other, one)
        return torch.minimum(one, other), torch.maximum(one, other)

    def bound_backward(self, last_lA: Any, last_uA: Any, x: Any, **kwargs: Any) -> Any:
        scale, shift = self._scale_and_shift()
        shapes = tuple(self.output_shape[1:]), tuple(x.output_shape[1:])

        def one_side(last_A: Any) -> tuple[Any, Any]:
            if last_A is None:
                return None, 0
            if isinstance(last_A, _PATCHES):
                return _through_patches(last_A, scale, shift, *shapes)
            bias = (last_A * shift).flatten(2).sum(2) if isinstance(shift, Tensor) else 0
            return _sum_to(last_A * scale, shapes[1]), bias

        lA, lower_bias = one_side(last_lA)
        uA, upper_bias = one_side(last_uA)
        return [(lA, uA)], lower_bias, upper_bias


def _through_patches(
    last_A: Any, scale: Tensor | float, shift: Tensor | float, output: tuple[int, ...], source: tuple[int, ...]
) -> tuple[Any, Any]:
    """Coefficients kept as patches: exact where the scale is one number per channel."""
    per_channel = torch.as_tensor(scale)
    if last_A.identity or output != source or math.prod(per_channel.shape[-2:]) > 1:
        raise NotImplementedError(
            "CROWN through this arithmetic with coefficients kept as patches: build the BoundedModule with "
            "bound_opts={'conv_mode': 'matrix'}"
        )
    if per_channel.ndim > 3:
        per_channel = per_channel[0]
    bias: Any = 0
    if isinstance(shift, Tensor):
        batch = last_A.patches.shape[1]
        bias = last_A.matmul(shift.expand(batch, *output)).transpose(0, 1)
    return last_A.create_similar(last_A.patches * per_channel.to(last_A.patches)), bias


def _sum_to(coefficients: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo broadcasting: (spec, batch, *broadcast) summed to (spec, batch, *shape)."""
    missing = coefficients.ndim - 2 - len(shape)
    if missing > 0:
        coefficients = coefficients.flatten(2, 1 + missing).sum(2)
    dims = [2 + d for d, size in enumerate(shape) if size == 1 and coefficients.shape[2 + d] != 1]
    return coefficients.sum(dims, keepdim=True) if dims else coefficients


def simplify_arithmetic(bounded: Any) -> None:
    """Let :class:`BoundConstantArithmetic` take the place of the engine's nodes, where it applies.

    Raises:
        NotImplementedError: an operand depends on the inputs by their shape alone (``expand_as``), where the
            engines' bounds are wrong.
    """
    nodes = list(bounded._modules.values())
    of_data = reached_from_inputs(nodes, through_shapes=True)
    of_values = reached_from_inputs(nodes, through_shapes=False)
    for node in nodes:
        if node.inputs and id(node) not in of_data:
            kind: Any = type(node)
            node.__class__ = computed_constant(kind)
        operation = _OPERATIONS.get(type(node))
        if operation is None or len(node.inputs) != 2:
            continue
        values = [id(source) in of_values for source in node.inputs]
        if sum(values) != 1 or (operation == "Div" and not values[0]):
            continue
        data, constant = node.inputs if values[0] else reversed(node.inputs)
        if id(constant) in of_data:
            raise NotImplementedError(
                "an operand of a sum or product is made to the shape of the input (expand_as, or a shape read in "
                "Python): leave that to broadcasting"
            )
        node.__class__ = BoundConstantArithmetic
        node.operation, node.constant, node.constant_first = operation, (constant,), not values[0]
        _detach(node, data)


def _detach(node: Any, data: Any) -> None:
    """Leave ``data`` as the one input of ``node``."""
    leave_one_input(node, data)
    # What the engine noted about the product of two perturbed operands.
    node.requires_input_bounds = []
    node.nonlinear = node.splittable = node.patches_start = False


def reached_from_inputs(nodes: list[Any], *, through_shapes: bool) -> set[int]:
    """Ids of the nodes that depend on the network's inputs or on perturbed weights.

    Args:
        nodes: all nodes of a BoundedModule.
        through_shapes: also those that depend on an input's shape alone.
    """
    reached = {
        id(node)
        for node in nodes
        if (isinstance(node, _INPUT) and not isinstance(node, _STATE))
        or getattr(node, "perturbation", None) is not None
    }
    changed = True
    while changed:
        before = len(reached)
        for node in nodes:
            if isinstance(node, _SHAPE) and not through_shapes:
                continue
            if any(id(source) in reached for source in node.inputs):
                reached.add(id(node))
        changed = len(reached) > before
    return reached
