"""A BoundedModule read as a network: its affine layers, ReLUs, sums and outputs.

Nodes are found by type and by their place in the graph; their names differ between releases of the
engine, and even between two conversions.
"""

from __future__ import annotations

import hashlib
import marshal
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lirpa_fastwarmup.engine.arithmetic import BoundConstantArithmetic
from lirpa_fastwarmup.engine.compat import engine, node_classes
from lirpa_fastwarmup.engine.nodes import BoundConvNd, BoundMeanPool, ConstantPad, evaluate
from lirpa_fastwarmup.storage import add_to_hash

_INPUT = node_classes("Input")
_PARAMETER = node_classes("Params")
_STATE = node_classes("Params", "Buffers")
_CONVOLUTION = (*node_classes("Conv", "ConvTranspose"), BoundConvNd)
_TRANSPOSED = node_classes("ConvTranspose")
_TRANSPOSE = node_classes("Transpose")
_AFFINE: Any = (*_CONVOLUTION, *node_classes("Linear"))
_RELU = node_classes("Relu")
_OTHER_PIECEWISE = node_classes("LeakyRelu")
_BATCHNORM = node_classes("BatchNormalization")
_SUM = node_classes("Add", "Sub")
_PRODUCT = node_classes("Mul")
_DIVISION = node_classes("Div")
_RESHAPING = node_classes(
    *("Flatten", "Reshape", "ATenUnflatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast", "Dropout")
)
# Operators through which a sum of two inputs is the sum of the two outputs, up to a constant.
_LINEAR_PASSAGE = node_classes(
    *("BatchNormalization", "Add", "Sub", "Neg", "Identity", "Dropout", "Cast", "CumSum"),
    *("Flatten", "Reshape", "ATenUnflatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile"),
    *("Concat", "Slice", "Split", "Gather", "Pad", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"),
)


class StructureError(ValueError):
    """The network's structure does not allow what was asked for; the text says where and why."""


@dataclass(frozen=True, eq=False)
class AffineLayer:
    """A convolution or linear layer with a trained weight.

    Attributes:
        name: qualified name of the module that holds the weight ("" for the network itself).
        parameter: qualified name of the weight (with a parametrisation, of its first ingredient).
        fan_in: inputs that one output adds up: k·k·C_in/groups for a convolution, that divided by the
            product of the strides for a transposed one, the input features for a linear layer.
        plain: the weight is the parameter itself, not computed from it.
    """

    name: str
    parameter: str
    fan_in: float
    plain: bool
    node: Any
    source: Any


class NetworkGraph:
    """The part of a BoundedModule's graph that leads from its inputs to its output.

    Attributes:
        inputs: the nodes of the network's inputs.
        affine: the affine layers, in order of execution.
        relus: the ReLU nodes, in order of execution, each after its name: that of the affine layer that
            feeds it (the nearest above, of a sum the last one).
        first_sources: the nodes that the first affine layers read: the inputs, after any normalisation.
    """

    def __init__(self, bounded: Any) -> None:
        self.output = bounded.final_node()
        live = _reached(self.output, lambda node: node.inputs)
        self.nodes = [node for node in bounded._modules.values() if id(node) in live]
        self._position = {id(node): position for position, node in enumerate(self.nodes)}
        self.inputs = [node for node in self.nodes if isinstance(node, _INPUT) and not isinstance(node, _STATE)]
        self._data = {id(node) for node in self.inputs}
        for node in _in_dependency_order(self.nodes):
            if any(id(source) in self._data for source in node.inputs):
                self._data.add(id(node))
        self._users: dict[int, list[Any]] = {id(node): [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                self._users[id(source)].append(node)
        self.affine = [layer for layer in map(self._affine_layer, self.nodes) if layer is not None]
        self._affine_at = {id(layer.node): layer for layer in self.affine}
        self.relus = [(self._relu_name(node), node) for node in self.nodes if self._is_relu(node)]
        first = {id(layer.source): layer.source for layer in self.affine if not self.read_by(layer)}
        self.first_sources = list(first.values())

    def _is_relu(self, node: Any) -> bool:
        return isinstance(node, _RELU) and not isinstance(node, _OTHER_PIECEWISE) and id(node) in self._data

    def _affine_layer(self, node: Any) -> AffineLayer | None:
        if not isinstance(node, _AFFINE):
            return None
        sources = [source for source in node.inputs[:2] if id(source) in self._data]
        if len(sources) != 1:
            return None  # A product of two activations, or of two constants.
        weight = next(source for source in node.inputs[:2] if source is not sources[0])
        parameter = _parameter_behind(weight)
        if parameter is None:
            return None
        module = parameter.ori_name.rpartition(".")[0]
        module = module.removesuffix(f".parametrizations.{module.rpartition('.')[2]}")
        return AffineLayer(
            name=module,
            parameter=parameter.ori_name,
            fan_in=_fan_in(node, parameter, sources[0]),
            plain=weight is parameter or all(isinstance(n, _TRANSPOSE) for n in _between(weight, parameter)),
            node=node,
            source=sources[0],
        )

    def _passes_linearly(self, node: Any) -> bool:
        data = [id(source) in self._data for source in node.inputs]
        if isinstance(node, _DIVISION):
            return data == [True, False]
        if isinstance(node, (*_PRODUCT, *_AFFINE)):  # By a constant, or by a matrix that is not trained.
            return sum(data) == 1
        return isinstance(node, (*_LINEAR_PASSAGE, BoundMeanPool, ConstantPad, BoundConstantArithmetic))

    def _above(self, node: Any, crosses: Callable[[Any], bool]) -> list[AffineLayer]:
        """The nearest affine layers at or above ``node``, going up through what ``crosses`` allows."""

        def climb(current: Any) -> Iterable[Any]:
            return current.inputs if id(current) not in self._affine_at and crosses(current) else ()

        found = _reached(node, climb)
        return [layer for layer in self.affine if id(layer.node) in found]

    def read_by(self, layer: AffineLayer) -> list[AffineLayer]:
        """The affine layers whose outputs ``layer`` reads, through whatever lies between."""
        return self._above(layer.source, lambda _: True)

    def classification_layers(self) -> list[AffineLayer]:
        """The affine layers whose output reaches the network's output without a non-linearity."""

        def climb(node: Any) -> Iterable[Any]:
            if id(node) in self._affine_at:
                return (self._affine_at[id(node)].source,)
            return node.inputs if self._passes_linearly(node) else ()

        found = _reached(self.output, climb)
        return [layer for layer in self.affine if id(layer.node) in found]

    def has_batchnorm(self, layer: AffineLayer) -> bool:
        """Whether BatchNorm is the next thing after ``layer``, or after the sum that it feeds."""
        waiting = list(self._users[id(layer.node)])
        while waiting:
            node = waiting.pop()
            if isinstance(node, _BATCHNORM):
                return True
            if isinstance(node, (*_SUM, *_RESHAPING)) or (isinstance(node, BoundConstantArithmetic) and node.is_shift):
                waiting += self._users[id(node)]
        return False

    def _is_data_sum(self, node: Any) -> bool:
        return isinstance(node, _SUM) and sum(id(source) in self._data for source in node.inputs) > 1

    def reads_relu_of_sum(self, layer: AffineLayer) -> bool:
        """Whether ``layer`` reads the ReLU of a residual sum directly, BatchNorm taken as identity."""
        node = layer.source
        if not self._is_relu(node):
            return False
        node = node.inputs[0]
        while isinstance(node, _BATCHNORM):
            node = node.inputs[0]
        return self._is_data_sum(node)

    def _relu_name(self, relu: Any) -> str:
        above = self._above(relu.inputs[0], self._passes_linearly) or self._above(relu.inputs[0], lambda _: True)
        return above[-1].name if above else "input"

    def relus_above(self, relu: Any) -> list[int]:
        """Places, in ``relus``, of the nearest ReLUs that ``relu`` reads, through whatever lies between."""
        at = {id(node): place for place, (_, node) in enumerate(self.relus)}
        found = _reached(relu.inputs[0], lambda node: () if id(node) in at else node.inputs)
        return sorted(place for node, place in at.items() if node in found)

    def place_of(self, node: Any) -> str:
        """Where ``node`` is, in words: by the nearest affine module above it."""
        if id(node) in self._affine_at:
            return f"in module {self._affine_at[id(node)].name!r}"
        above = [layer for source in node.inputs for layer in self._above(source, lambda _: True)]
        return f"after module {above[-1].name!r}" if above else "at the input"

    def below(self, node: Any) -> list[Any]:
        """``node`` and all nodes that depend on it, in order of execution."""
        found = _reached(node, lambda current: self._users[id(current)])
        return [other for other in self.nodes if id(other) in found]

    def called_more_than_once(self) -> list[str]:
        """Names of the modules whose weight serves in several places of the network."""
        names = [layer.parameter for layer in self.affine]
        return sorted({layer.name for layer in self.affine if names.count(layer.parameter) > 1})

    def spatial_rank(self, layer: AffineLayer) -> int:
        """The number of spatial dimensions of ``layer``'s output ``(batch, channels, *space)``."""
        return len(layer.node.output_shape) - 2


def read_graph(bounded: Any) -> NetworkGraph:
    """The graph of ``bounded``, read once and kept with it.

    Raises:
        TypeError: ``bounded`` is no BoundedModule.
    """
    if not isinstance(bounded, engine.BoundedModule):
        raise TypeError(
            f"expected a BoundedModule, found {type(bounded).__name__}: wrap the network first, bounded = "
            "lirpa_fastwarmup.BoundedModule(model, example_inputs)"
        )
    graph = bounded.__dict__.get("_fastwarmup_graph")
    if graph is None:
        graph = NetworkGraph(bounded)
        object.__setattr__(bounded, "_fastwarmup_graph", graph)
    return graph


def weight_of(layer: AffineLayer) -> nn.Parameter:
    """The parameter that holds the weight of ``layer``."""
    weight = next(source for source in layer.node.inputs[:2] if source is not layer.source)
    return _parameter_behind(weight).param


def affine_weights(bounded: Any) -> list[nn.Parameter]:
    """The weights of all affine layers of ``bounded``, each once, in order of execution."""
    weights = {layer.parameter: weight_of(layer) for layer in read_graph(bounded).affine}
    return list(weights.values())


def _reached(start: Any, neighbours: Callable[[Any], Iterable[Any]]) -> set[int]:
    seen = {id(start)}
    waiting = [start]
    while waiting:
        for node in neighbours(waiting.pop()):
            if id(node) not in seen:
                seen.add(id(node))
                waiting.append(node)
    return seen


def _in_dependency_order(nodes: list[Any]) -> list[Any]:
    ordered: list[Any] = []
    done: set[int] = set()
    waiting = list(reversed(nodes))
    while waiting:
        node = waiting[-1]
        missing = [source for source in node.inputs if id(source) not in done]
        if missing:
            waiting.extend(missing)
            continue
        waiting.pop()
        if id(node) not in done:
            done.add(id(node))
            ordered.append(node)
    return ordered


def _parameter_behind(node: Any) -> Any:
    """The parameter node that ``node`` is computed from, the first one where there are several."""
    waiting = [node]
    while waiting:
        current = waiting.pop(0)
        if isinstance(current, _PARAMETER):
            return current
        waiting.extend(current.inputs)
    return None


def _between(node: Any, parameter: Any) -> list[Any]:
    found = []
    while node is not parameter:
        found.append(node)
        if len(node.inputs) != 1:
            return [*found, parameter]
        node = node.inputs[0]
    return found


def _fan_in(node: Any, parameter: Any, source: Any) -> float:
    shape = parameter.param.shape
    if not isinstance(node, _CONVOLUTION):
        return float(source.output_shape[-1 if source is node.inputs[0] else -2])
    if isinstance(node, _TRANSPOSED) or getattr(node, "transposed", False):
        return shape[0] * math.prod(shape[2:]) / node.groups / math.prod(node.stride)
    return float(math.prod(shape[1:]))


def fingerprint(bounded: Any) -> str:
    """A digest of the function that ``bounded`` computes: operators, attributes, connections, weights and constants.

    Networks of one ``repr`` and one state dict differ in it where their ``forward`` differs.
    """
    hashed = hashlib.sha256()
    for node in bounded._modules.values():
        sources = [source.name for source in (*node.inputs, *getattr(node, "constant", ()))]
        add_to_hash(hashed, (_code(type(node)), node.name, sources, getattr(node, "attr", None)))
        add_to_hash(hashed, (getattr(node, "operation", None), getattr(node, "constant_first", None)))
        if not node.inputs and (isinstance(node, _STATE) or not isinstance(node, _INPUT)):
            add_to_hash(hashed, evaluate(node))
    return hashed.hexdigest()


def _code(kind: type) -> tuple[str, ...] | list[Any]:
    """The name of a node's class, and the code of a user's own."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.startswith(("auto_LiRPA.", "lirpa_fastwarmup.")):
        return (name,)  # Of a version that is known.
    functions = [getattr(value, "__code__", None) for value in vars(kind).values()]
    return [name, *(marshal.dumps(code) for code in functions if code is not None)]
