"""The operators whose bounds have been tested, and what of their attributes; everything else is refused by name.

An entry stands for what tests/test_conformance.py finds sound on both engines: at sampled and searched points, and
against an interval arithmetic that shares nothing with the engine. docs/operators.md is made from the same tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lirpa_fastwarmup.engine.arithmetic import BoundConstantArithmetic, reached_from_inputs
from lirpa_fastwarmup.engine.batchnorm import SharedBatchNorm, ViewedBatchNorm
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine, node_classes
from lirpa_fastwarmup.engine.graph import NetworkGraph
from lirpa_fastwarmup.engine.nodes import (
    ADJOINT,
    BatchReshape,
    BoundClamp,
    BoundConvNd,
    BoundMaximumPool,
    BoundMeanPool,
    ConstantPad,
    GlobalMean,
    LinfConcat,
    MarginMatMul,
    StridedSlice,
)

_INPUT: Any = engine.bound_general.BoundInput


@dataclass(frozen=True)
class Operator:
    """What is known of the bounds of an operator.

    Attributes:
        classes: its node classes, the engine's or ours; subclasses do not count.
        crown: whether CROWN has bounds for it, and not IBP alone.
        patches: whether CROWN's coefficients may still be patches when they reach it.
        objection: given a node and which of its inputs depend on the network's inputs, what is not accepted of the
            node and what to write instead; ``None`` if there is nothing.
    """

    classes: tuple[Any, ...]
    crown: bool = True
    patches: bool = False
    objection: Callable[[Any, list[bool]], str | None] = lambda node, depends: None


def _leaky(node: Any, _: list[bool]) -> str | None:
    slope = node.attr.get("alpha", 0.01)
    return None if 0 <= slope <= 1 else f"its slope is {slope:g}: write one from 0 to 1"


def _one_activation(_: Any, depends: list[bool]) -> str | None:
    return "it multiplies two activations: multiply by a weight" if sum(depends) > 1 else None


def _linear(node: Any, depends: list[bool]) -> str | None:
    factors = node.attr.get("alpha", 1.0), node.attr.get("beta", 1.0)
    if min(factors) < 0:
        return f"it multiplies weight and bias by {factors[0]:g} and {factors[1]:g}: negate the weights instead"
    return _one_activation(node, depends)


def _matmul(node: Any, depends: list[bool]) -> str | None:
    if any(len(source.output_shape) > 2 for source, data in zip(node.inputs, depends, strict=True) if not data):
        return "it multiplies by a constant of more than two dimensions: multiply by a matrix"
    return _one_activation(node, depends)


def _two_operands(node: Any, _: list[bool]) -> str | None:
    return None if len(node.inputs) == 2 else "it has more than two operands"


def _adjoint(name: str) -> Operator:
    return Operator(tuple(ADJOINT[cls] for cls in node_classes(name)))


OPERATORS: dict[str, Operator] = {
    "Conv": Operator(node_classes("Conv"), patches=True),
    "convolution of another rank, or transposed": Operator((BoundConvNd,)),
    "ConvTranspose": Operator(node_classes("ConvTranspose")),
    "Linear": Operator(node_classes("Linear"), patches=True, objection=_linear),
    "MatMul": Operator((*node_classes("MatMul"), MarginMatMul), patches=True, objection=_matmul),
    "BatchNormalization": Operator(
        (*node_classes("BatchNormalization"), SharedBatchNorm, ViewedBatchNorm), patches=True
    ),
    "Relu": Operator(node_classes("Relu"), patches=True),
    "LeakyRelu": Operator(node_classes("LeakyRelu"), patches=True, objection=_leaky),
    "Sigmoid": Operator(node_classes("Sigmoid"), patches=True),
    "Tanh": Operator(node_classes("Tanh"), patches=True),
    "Clip": Operator((BoundClamp,)),
    "Softplus": Operator(node_classes("Softplus"), crown=False),
    "Add": Operator(node_classes("Add"), patches=True, objection=_two_operands),
    "Sub": Operator(node_classes("Sub"), patches=True, objection=_two_operands),
    "Mul": Operator(node_classes("Mul"), objection=_two_operands),
    "arithmetic with a constant": Operator((BoundConstantArithmetic,), patches=True),
    "Neg": Operator(node_classes("Neg")),
    "MaxPool": Operator((BoundMaximumPool,)),
    "AveragePool": Operator((BoundMeanPool,)),
    "GlobalAveragePool": Operator((GlobalMean,)),
    "Pad": Operator((ConstantPad,)),
    "ReduceMean": _adjoint("ReduceMean"),
    "ReduceSum": _adjoint("ReduceSum"),
    "Slice": Operator((StridedSlice,)),
    "Split": _adjoint("Split"),
    "Gather": _adjoint("Gather"),
    "Concat": Operator((LinfConcat,), objection=lambda node, _: "it joins batches" if node.axis == 0 else None),
    "Flatten": Operator(node_classes("Flatten"), patches=True),
    "Reshape": Operator((*node_classes("Reshape", "ATenUnflatten"), BatchReshape), patches=True),
    "Transpose": Operator(node_classes("Transpose")),
    "Squeeze": Operator(node_classes("Squeeze")),
    "Unsqueeze": Operator(node_classes("Unsqueeze")),
    "Identity": Operator(node_classes("Identity"), patches=True),
    "Dropout": Operator(node_classes("Dropout"), patches=True),
}
_NAMES: dict[type, str] = {cls: name for name, operator in OPERATORS.items() for cls in operator.classes}


def operator_of(node: Any) -> str:
    """The operator's name in :data:`OPERATORS`, or the node's class where that is not listed."""
    return _NAMES.get(type(node), type(node).__name__.removeprefix("Bound"))


@dataclass(frozen=True)
class Acceptance:
    """What bounds a BoundedModule may be asked for.

    Attributes:
        untested: operators and attributes that have not been tested, each with its place.
        interval_only: operators, with their places, for which there is IBP alone.
        needs_matrices: whether CROWN's coefficients must be matrices.
    """

    untested: tuple[str, ...]
    interval_only: tuple[str, ...]
    needs_matrices: bool


def review(bounded: Any, batch: int) -> Acceptance:
    """Compare the operators of ``bounded`` with :data:`OPERATORS`.

    Args:
        bounded: a BoundedModule whose nodes have been replaced by ours.
        batch: samples of the example that it was built with.
    """
    nodes = list(bounded._modules.values())
    values = reached_from_inputs(nodes, through_shapes=False)
    graph = NetworkGraph(bounded)
    live = {id(node) for node in graph.nodes}
    untested, interval_only = [], []
    for node in nodes:
        if id(node) not in values & live or isinstance(node, _INPUT):
            continue
        objection = _objection(node, [id(source) in values for source in node.inputs], batch)
        if objection is not None:
            untested.append(f"{operator_of(node)} {graph.place_of(node)}{objection}")
        elif not OPERATORS[operator_of(node)].crown:
            interval_only.append(f"{operator_of(node)} {graph.place_of(node)}")
    return Acceptance(_once(untested), _once(interval_only), _needs_matrices(graph))


def _once(texts: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _objection(node: Any, depends: list[bool], batch: int) -> str | None:
    if type(node) not in _NAMES:
        return ""
    objection = OPERATORS[operator_of(node)].objection(node, depends)
    if objection is None and tuple(node.output_shape[:1]) != (batch,):
        objection = f"its output {tuple(node.output_shape)} does not begin with the batch, of {batch}: keep that first"
    return None if objection is None else f" ({objection})"


def _needs_matrices(graph: NetworkGraph) -> bool:
    """Whether coefficients that begin as patches would meet what the engine is not right for."""
    starts = {
        id(node) for node in graph.nodes if getattr(node, "mode", None) == "patches" and len(node.output_shape) == 4
    }
    return any(
        not _handles_patches(node) and any(id(other) in starts for other in graph.below(node)) for node in graph.nodes
    )


def _handles_patches(node: Any) -> bool:
    """Whether coefficients may be patches when they reach ``node``.

    Where patches outgrow the image, both releases turn them into matrices whose rows are as long as the image is high:
    right for squares only. They also read the weights of a depthwise convolution as those of one group.
    """
    operator = OPERATORS.get(operator_of(node))
    if operator is not None and not operator.patches:
        return False
    shapes = [shape[2:] for shape in (node.output_shape, *_input_shapes(node)) if len(shape) == 4]
    if operator_of(node) == "Conv":
        if node.groups != 1 or set(node.dilation) != {1}:
            return False
        shapes += [node.attr["kernel_shape"], node.stride, node.padding]
    return all(len(set(shape)) == 1 for shape in shapes)


def _input_shapes(node: Any) -> list[Any]:
    return [source.output_shape for source in node.inputs if source.output_shape is not None]


def untested_error(untested: tuple[str, ...]) -> NotImplementedError:
    """The refusal of a network with untested operators."""
    return NotImplementedError(
        f"the bounds of auto_LiRPA {ENGINE_VERSION} have not been tested for {'; '.join(untested)}. Write the network "
        f"with other operators (tested are {', '.join(OPERATORS)}), or pass allow_untested=True: certificates then say "
        "that they rest on untested bounds"
    )
