"""The operators and attributes whose bounds have been tested; all others are refused by name.

tests/test_conformance.py tests each entry on both releases of the engine, at sampled and searched points and against an
independent interval arithmetic. docs/operators.md is generated from the same tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lirpa_fastwarmup.engine import nodes
from lirpa_fastwarmup.engine.batchnorm import SharedBatchNorm, ViewedBatchNorm
from lirpa_fastwarmup.engine.compat import node_classes
from lirpa_fastwarmup.engine.graph import NetworkGraph
from lirpa_fastwarmup.engine.places import Places, by_place


@dataclass(frozen=True)
class Operator:
    """The tested bounds of an operator."""

    classes: tuple[Any, ...]  # Its node classes, the engine's or ours, without subclasses.
    # Whether it supports CROWN, and not only IBP, given which inputs depend on the network's.
    crown: Callable[[Any, list[bool]], bool] = lambda node, depends: True
    patches: bool = False  # Whether CROWN's coefficients may be patches when they reach it.
    # Says what a node has that is not supported and what to write instead, given which inputs depend on the network's.
    objection: Callable[[Any, list[bool]], str | None] = lambda node, depends: None


def _leaky(node: Any, _: list[bool]) -> str | None:
    slope = node.attr.get("alpha", 0.01)
    return None if 0 <= slope <= 1 else f"its slope is {slope:g}: use one between 0 and 1"


def _one_activation(_: Any, depends: list[bool]) -> str | None:
    return "it multiplies two activations: multiply by a weight" if sum(depends) > 1 else None


def _linear(node: Any, depends: list[bool]) -> str | None:
    factors = node.attr.get("alpha", 1.0), node.attr.get("beta", 1.0)
    if factors[0] != 1 or factors[1] < 0:  # CROWN leaves out the first.
        return f"it multiplies weight and bias by {factors[0]:g} and {factors[1]:g}: scale the weights instead"
    return _one_activation(node, depends)


def _leaky_by_crown(node: Any, _: list[bool]) -> bool:
    # Lines of larger slopes are loose where a neuron is stable, too, and checks at radius 0 need equality.
    return bool(node.attr.get("alpha", 0.01) <= 0.5 or node.attr["alpha"] == 1)


def _matmul(node: Any, depends: list[bool]) -> str | None:
    if any(len(source.output_shape) > 2 for source, data in zip(node.inputs, depends, strict=True) if not data):
        return "it multiplies by a constant of more than two dimensions: multiply by a matrix"
    return _one_activation(node, depends)


def _two_operands(node: Any, _: list[bool]) -> str | None:
    return None if len(node.inputs) == 2 else "it has more than two operands"


def _tested(*names: str, ours: tuple[Any, ...] = (), **properties: Any) -> dict[str, Operator]:
    """Operators with the engine's node classes, and ours."""
    return {name: Operator((*node_classes(name), *ours), **properties) for name in names}


def _replaced(**classes: Any) -> dict[str, Operator]:
    """Operators whose node classes are all ours."""
    return {name: Operator((cls,)) for name, cls in classes.items()}


OPERATORS: dict[str, Operator] = {
    **_tested("Conv", "Relu", "Sigmoid", "Tanh", "Flatten", "Identity", "Dropout", patches=True),
    **_tested("ConvTranspose", "Neg", "Transpose", "Squeeze", "Unsqueeze"),
    **_tested("Linear", patches=True, objection=_linear),
    # Of a constant times an activation, 0.7 orders the coefficients wrongly.
    **_tested("MatMul", ours=(nodes.MarginMatMul,), patches=True, objection=_matmul, crown=lambda _, data: data[0]),
    **_tested("BatchNormalization", ours=(SharedBatchNorm, ViewedBatchNorm), patches=True),
    **_tested("LeakyRelu", patches=True, objection=_leaky, crown=_leaky_by_crown),
    **_tested("Softplus", crown=lambda node, depends: False),
    **_tested("Abs"),
    **{name: Operator((cls,), crown=lambda node, depends: False) for name, cls in nodes.ELEMENTWISE.items()},
    **(_tested("Sqr") if node_classes("Sqr") else {}),  # x·x, which 0.3 bounds as a product.
    **_tested("Add", "Sub", patches=True, objection=_two_operands),
    **_tested("Mul", objection=_two_operands),
    **_tested("Reshape", ours=(*node_classes("ATenUnflatten"), nodes.BatchReshape), patches=True),
    **_replaced(MaxPool=nodes.BoundMaximumPool, AveragePool=nodes.BoundMeanPool, GlobalAveragePool=nodes.GlobalMean),
    **_replaced(Clip=nodes.BoundClamp, Pad=nodes.ConstantPad, Slice=nodes.StridedSlice),
    **_replaced(DepthToSpace=nodes.PixelShuffle),
    **{cls.__name__.removeprefix("Bound"): Operator((ours,)) for cls, ours in nodes.ADJOINT.items()},
    "Concat": Operator((nodes.LinfConcat,), objection=lambda node, _: None if node.axis else "it concatenates batches"),
    "convolution of another rank, or transposed": Operator((nodes.BoundConvNd,)),
    "arithmetic with a constant": Operator((nodes.BoundConstantArithmetic,), patches=True),
}
# Of which operands other than the first may depend on the network's inputs: of all others, bounds read one end.
_SEVERAL = {"MatMul", "Add", "Sub", "Mul", "Concat", "Gather", "arithmetic with a constant"}
_NAMES: dict[type, str] = {cls: name for name, operator in OPERATORS.items() for cls in operator.classes}
_NAMES |= {ours: _NAMES[cls] for cls, ours in nodes.SATURATING.items()}


def operator_of(node: Any) -> str:
    """The operator's name in :data:`OPERATORS`, or the node's class if it is not listed."""
    return _NAMES.get(type(node), type(node).__name__.removeprefix("Bound"))


@dataclass(frozen=True)
class Acceptance:
    """The bounds that a BoundedModule supports: what is untested or bounded by IBP alone, with places and advice."""

    untested: tuple[str, ...]
    interval_only: tuple[str, ...]
    advice: str
    needs_matrices: bool


def review(bounded: Any, model: nn.Module) -> Acceptance:
    """Compare the operators of ``bounded``, built from ``model`` and with our nodes, with :data:`OPERATORS`."""
    values = nodes.reached_from_inputs(list(bounded._modules.values()), through_shapes=False)
    graph, batch = NetworkGraph(bounded), len(bounded.example[0])
    flagged: list[tuple[Any, str | None]] = []
    for node in graph.nodes:
        if id(node) not in values or nodes.is_input(node):
            continue
        depends = [id(source) in values for source in node.inputs]
        objection = _objection(node, depends, batch)
        if objection is not None or not OPERATORS[operator_of(node)].crown(node, depends):
            flagged.append((node, objection))
    places, advice = Places(model, bounded.example) if flagged else None, dict[str, None]()
    without_test, without_crown = list[tuple[str, str]](), list[tuple[str, str]]()
    for node, objection in flagged:
        name, layer = operator_of(node), places.of_node(node.name) if places else None
        instead = layer.advice(name) if layer else []
        advice |= dict.fromkeys(instead)
        place = f"in {layer}" if layer else graph.place_of(node)
        flaws = without_crown if objection is None else without_test
        flaws.append((name, place if instead or not objection else f"{place} ({objection})"))
    untested, interval_only = (tuple(by_place(flaws)) for flaws in (without_test, without_crown))
    # Whether coefficients that start as patches would reach an operator that does not support them.
    below = (other for node in graph.nodes if not _supports_patches(node) for other in graph.below(node))
    needs_matrices = any(getattr(node, "mode", None) == "patches" and len(node.output_shape) == 4 for node in below)
    return Acceptance(untested, interval_only, "".join(advice), needs_matrices)


def _objection(node: Any, depends: list[bool], batch: int) -> str | None:
    if type(node) not in _NAMES:
        return ""
    name = operator_of(node)
    objection = OPERATORS[name].objection(node, depends)
    if any(depends[1:]) and name not in _SEVERAL:
        objection = "its weight, bias or other argument depends on the input: use a constant"
    if objection is None and tuple(node.output_shape[:1]) != (batch,):
        objection = f"its output {tuple(node.output_shape)} does not begin with the batch, of {batch}: keep it first"
    return objection


def _supports_patches(node: Any) -> bool:
    """Whether coefficients may be patches when they reach ``node``.

    If patches outgrow the image, both releases turn them into matrices whose rows are as long as the image is high,
    which is right for squares only. They also read the weights of a depthwise convolution as those of a single group.
    """
    operator = OPERATORS.get(operator_of(node))
    if operator is not None and not operator.patches:
        return False
    shapes = [other.output_shape for other in (node, *node.inputs) if other.output_shape is not None]
    spatial = [shape[2:] for shape in shapes if len(shape) == 4]
    if operator_of(node) == "Conv":
        if node.groups != 1 or set(node.dilation) != {1}:
            return False
        spatial += [node.attr["kernel_shape"], node.stride, node.padding]
    return all(len(set(sizes)) == 1 for sizes in spatial)
