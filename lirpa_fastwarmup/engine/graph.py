"""A BoundedModule read as a network: its affine layers, activations, sums and outputs, and the bounds at its layers.

Nodes are found by type and position: their names differ between releases of the engine, and even between conversions.
"""

import hashlib
import itertools
import marshal
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine import nodes
from lirpa_fastwarmup.engine.compat import engine, node_classes
from lirpa_fastwarmup.engine.nodes import BoundConstantArithmetic, evaluate, is_input
from lirpa_fastwarmup.storage import add_to_hash

_inputs: Callable[[Any], Iterable[Any]] = operator.attrgetter("inputs")
_CONTAINERS = (nn.Sequential.forward, nn.Module.forward)  # nn.ModuleList and nn.ModuleDict define none of their own.
_PARAMETER = node_classes("Params")
_CONVOLUTION = (*node_classes("Conv", "ConvTranspose"), nodes.BoundConvNd)
_AFFINE: Any = (*_CONVOLUTION, *node_classes("Linear"))
_BATCHNORM = node_classes("BatchNormalization")
_SUM = node_classes("Add", "Sub")
_PRODUCT = node_classes("Mul")
_ACTIVATION = (*node_classes("Activation"), nodes.BoundClamp, nodes.ElementwiseIntervals)
_NO_ACTIVATION = (*_AFFINE, *_PRODUCT, *node_classes("MatMul"))  # 0.7 derives them from its activations.
_RESHAPING = node_classes(
    *("Flatten", "Reshape", "ATenUnflatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast", "Dropout")
)
# Operators that map a sum of two inputs to the sum of the two outputs, up to a constant.
_LINEAR = (
    *node_classes("BatchNormalization", "Add", "Sub", "Neg", "CumSum", "Expand", "Tile", "Concat", "Slice", "Split"),
    *node_classes("Gather", "Pad", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"),
    *(*_RESHAPING, nodes.BoundMeanPool, nodes.ConstantPad, BoundConstantArithmetic),
)


class StructureError(ValueError):
    """The network's structure does not support the operation; the message names the place and the reason."""


@dataclass(frozen=True, eq=False)
class AffineLayer:
    """A convolution or linear layer with a trained weight."""

    name: str  # Qualified name of the module that holds the weight ("" for the network itself).
    parameter: str  # Qualified name of the weight (with a parametrisation, of its first input).
    fan_in: float  # The number of inputs that one output sums.
    plain: bool  # The weight is the parameter itself, not computed from it.
    node: Any
    source: Any  # The node that the layer reads.
    _weight: Any  # The node of the parameter.
    _factor: Any  # The node of the weight.

    @property
    def weight(self) -> nn.Parameter:
        return self._weight.param

    @property
    def matrix(self) -> Tensor:
        """The weight itself, differentiable, also where a parametrisation computes it."""
        return evaluate(self._factor)


class NetworkGraph:
    """The part of a BoundedModule's graph between its inputs and its output.

    Attributes:
        inputs: the nodes of the network's inputs.
        affine: the affine layers, in order of execution.
        relus: name and node of each ReLU, in order of execution. A ReLU is named after the affine layer that feeds it,
            and after a residual sum by the module that holds the sum.
        activations: likewise, name and pre-activation, a node, of each elementwise non-linearity, ReLUs among them.
        first_sources: the nodes that the first affine layers read: the inputs, after any normalisation.
    """

    def __init__(self, bounded: Any) -> None:
        self.output = bounded.final_node()
        live = _reached([self.output], _inputs)
        self.nodes = [node for node in bounded._modules.values() if node in live]
        self._users: dict[Any, list[Any]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                self._users[source].append(node)
        self.inputs = list(filter(is_input, self.nodes))
        self._data = _reached(self.inputs, self._users.__getitem__)
        self.affine = [layer for layer in map(self._affine_layer, self.nodes) if layer is not None]
        self._affine_at = {layer.node: layer for layer in self.affine}
        self._model = bounded.__dict__.get("wrapped")
        relus = [node for node in self.nodes if self._is_relu(node)]
        self.relus = list(zip(self._names_at([relu.inputs[0] for relu in relus]), relus, strict=True))
        read = self._pre_activations()
        self.activations = list(zip(self._names_at(read), read, strict=True))
        self.first_sources = list(dict.fromkeys(layer.source for layer in self.affine if not self._above(layer.source)))

    def _affine_layer(self, node: Any) -> AffineLayer | None:
        sources = [source for source in node.inputs[:2] if source in self._data]
        if not isinstance(node, _AFFINE) or len(sources) != 1:
            return None  # A product of two activations, or of two constants.
        factor = next(source for source in node.inputs[:2] if source is not sources[0])
        # The first parameter, if the factor is computed from several.
        weight = next((node for node in _reached([factor], _inputs) if isinstance(node, _PARAMETER)), None)
        if weight is None:
            return None
        module = weight.ori_name.rpartition(".")[0]
        module = module.removesuffix(f".parametrizations.{module.rpartition('.')[2]}")
        fan_in = _fan_in(node, weight, sources[0])
        while isinstance(factor, node_classes("Transpose")):
            factor = factor.inputs[0]
        return AffineLayer(module, weight.ori_name, fan_in, factor is weight, node, sources[0], weight, factor)

    def _is_relu(self, node: Any) -> bool:
        is_relu = isinstance(node, node_classes("Relu")) and not isinstance(node, node_classes("LeakyRelu"))
        return is_relu and node in self._data

    def _passes_linearly(self, node: Any) -> bool:
        data = [source in self._data for source in node.inputs]
        if isinstance(node, node_classes("Div")):
            return data == [True, False]
        if isinstance(node, (*_PRODUCT, *_AFFINE)):  # By a constant, or by a matrix that is not trained.
            return sum(data) == 1
        return isinstance(node, _LINEAR)

    def _above(self, node: Any, crosses: Callable[[Any], bool] = lambda _: True) -> list[AffineLayer]:
        """The nearest affine layers at or above ``node``, through nodes that ``crosses`` accepts, by default all."""

        def climb(current: Any) -> Iterable[Any]:
            return current.inputs if current not in self._affine_at and crosses(current) else ()

        found = _reached([node], climb)
        return [layer for layer in self.affine if layer.node in found]

    def classification_layers(self) -> list[AffineLayer]:
        """The affine layers whose output reaches the network's output without a non-linearity."""

        def climb(node: Any) -> Iterable[Any]:
            if node in self._affine_at:
                return (self._affine_at[node].source,)
            return node.inputs if self._passes_linearly(node) else ()

        found = _reached([self.output], climb)
        return [layer for layer in self.affine if layer.node in found]

    def has_batchnorm(self, layer: AffineLayer) -> bool:
        """Whether BatchNorm follows ``layer`` directly, or the sum that it feeds."""

        def follow(node: Any) -> Iterable[Any]:
            is_shift = isinstance(node, BoundConstantArithmetic) and node.is_shift
            passes = node is layer.node or is_shift or isinstance(node, (*_SUM, *_RESHAPING))
            return self._users[node] if passes else ()

        return any(isinstance(node, _BATCHNORM) for node in _reached([layer.node], follow))

    def reads_activation(self, layer: AffineLayer) -> bool:
        """Whether a non-linearity lies between ``layer`` and the affine layers above it."""
        between = _reached([layer.source], lambda node: () if node in self._affine_at else node.inputs)
        return any(map(self._is_activation, between))

    def reads_relu_of_sum(self, layer: AffineLayer) -> bool:
        """Whether ``layer`` reads the ReLU of a residual sum directly, treating BatchNorm as the identity."""
        return self._is_relu(layer.source) and self._sum_before(layer.source.inputs[0]) is not None

    def _pre_activations(self) -> list[Any]:
        """The nodes that non-linearities read: one for each ReLU, and one for all others that read the same node."""
        gates = {node: x for product in self.nodes for node, x in self._gate(product)}
        found: list[Any] = []
        for node in self.nodes:
            if self._is_relu(node):
                found.append(node.inputs[0])
            elif self._is_activation(node) or node in gates:
                read = gates.get(node, node.inputs[0])
                found += [] if read in found else [read]
        return found

    def _is_activation(self, node: Any) -> bool:
        data = [source for source in node.inputs if source in self._data]
        is_activation = isinstance(node, _ACTIVATION) and not isinstance(node, _NO_ACTIVATION)
        return is_activation and len(data) == 1 and data[0].output_shape == node.output_shape

    def _gate(self, product: Any) -> list[tuple[Any, Any]]:
        """The nodes of x·g(x), as SiLU, GELU and Mish are converted, each with x; none if ``product`` is another."""
        for x in product.inputs if isinstance(product, _PRODUCT) else ():
            while isinstance(x, BoundConstantArithmetic):
                x = x.inputs[0]

            def climb(node: Any, x: Any = x) -> list[Any]:
                return [] if node is x else self._elementwise_inputs(node)

            within = _reached([product], climb)
            inside = [node for node in self.nodes if node in within and node is not x]
            if x in within and all(self._elementwise_inputs(node) for node in inside):
                return [(node, x) for node in inside]
        return []

    def _elementwise_inputs(self, node: Any) -> list[Any]:
        is_elementwise = isinstance(node, (BoundConstantArithmetic, *_SUM, *_PRODUCT)) or self._is_activation(node)
        return [source for source in node.inputs if source in self._data] if is_elementwise else []

    def _sum_before(self, node: Any) -> Any:
        """``node`` if it is a residual sum, or the sum before BatchNorm."""
        while isinstance(node, _BATCHNORM):
            node = node.inputs[0]
        return node if isinstance(node, _SUM) and sum(source in self._data for source in node.inputs) > 1 else None

    def _names_at(self, pre_activations: list[Any]) -> list[str]:
        layers, holders = [], []
        modules = {} if self._model is None else dict(self._model.named_modules())
        for read in pre_activations:
            above = self._above(read, self._passes_linearly) or self._above(read)
            layers.append(above[-1].name if above else "input")
            residual = self._sum_before(read)
            holders.append("" if residual is None else self._holder_of(residual, modules))
        # A module that holds several sums would give several activations the same name.
        unique = [bool(holder) and holders.count(holder) == 1 and holder not in layers for holder in holders]
        return [holder if use else layer for layer, holder, use in zip(layers, holders, unique, strict=True)]

    def _holder_of(self, residual: Any, modules: dict[str, nn.Module]) -> str:
        """The innermost module around the affine layers that feed one operand of a sum only; "" for the network.

        The engine does not record which module computes a sum. Containers (nn.Sequential, nn.ModuleList) never do.
        """
        left, right = (_reached([source], _inputs) for source in residual.inputs[:2])
        branches = [layer.name for layer in self.affine if (layer.node in left) != (layer.node in right)]
        levels = zip(*(name.split(".")[:-1] for name in branches), strict=False)
        holder = ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
        while holder and getattr(type(modules.get(holder)), "forward", None) in _CONTAINERS:
            holder = holder.rpartition(".")[0]
        return holder

    def place_of(self, node: Any) -> str:
        """The place of ``node`` for messages, relative to the nearest affine module above it."""
        if node in self._affine_at:
            return f"in module {self._affine_at[node].name!r}"
        above = [layer for source in node.inputs for layer in self._above(source)]
        return f"after module {above[-1].name!r}" if above else "at the input"

    def units_at(self, node: Any) -> int:
        """The dimension of ``node``'s value that numbers the units: the last after a linear layer, and else 1."""
        shape = node.output_shape
        above = [one.node for one in self._above(node, lambda other: other.output_shape == shape)]
        linear = [one for one in above if not isinstance(one, _CONVOLUTION) and one.output_shape == shape]
        return len(shape) - 1 if linear else 1

    def below(self, node: Any) -> Iterable[Any]:
        """``node`` and all nodes that depend on it."""
        return _reached([node], self._users.__getitem__)

    def called_more_than_once(self) -> list[str]:
        """Names of the modules whose weight is used in several places of the network."""
        names = [layer.parameter for layer in self.affine]
        return sorted({layer.name for layer in self.affine if names.count(layer.parameter) > 1})


def read_graph(bounded: Any) -> NetworkGraph:
    """The graph of ``bounded``, read once and stored with it; raise TypeError if it is not a BoundedModule."""
    if not isinstance(bounded, engine.BoundedModule):
        text = f"expected a BoundedModule, found {type(bounded).__name__}: wrap the network first, bounded = "
        raise TypeError(text + "lirpa_fastwarmup.BoundedModule(model, example_inputs)")
    graph = bounded.__dict__.get("_fastwarmup_graph")
    if graph is None:
        graph = NetworkGraph(bounded)
        object.__setattr__(bounded, "_fastwarmup_graph", graph)
    return graph


def is_used(bounded: Any, parameter: nn.Parameter) -> bool:
    """Whether the output of ``bounded`` depends on ``parameter``."""
    return any(node.param is parameter for node in read_graph(bounded).nodes if isinstance(node, _PARAMETER))


def affine_weights(bounded: Any) -> list[nn.Parameter]:
    """The weights of all affine layers of ``bounded``, each once, in order of execution."""
    return list({layer.parameter: layer.weight for layer in read_graph(bounded).affine}.values())


def _reached(start: Iterable[Any], neighbours: Callable[[Any], Iterable[Any]]) -> dict[Any, None]:
    """The nodes reached from ``start``, as the keys of a dictionary, nearest first."""
    seen = dict.fromkeys(start)
    waiting = list(seen)
    for node in waiting:  # It grows.
        new = [other for other in dict.fromkeys(neighbours(node)) if other not in seen]
        seen |= dict.fromkeys(new)
        waiting += new
    return seen


def _fan_in(node: Any, weight: Any, source: Any) -> float:
    """Input features, or k·k·C_in/groups of a convolution, over the product of the strides of a transposed one."""
    shape = weight.param.shape
    if not isinstance(node, _CONVOLUTION):
        return float(source.output_shape[-1 if source is node.inputs[0] else -2])
    if isinstance(node, node_classes("ConvTranspose")) or getattr(node, "transposed", False):
        return shape[0] * math.prod(shape[2:]) / node.groups / math.prod(node.stride)
    return float(math.prod(shape[1:]))


def fingerprint(bounded: Any) -> str:
    """A digest of the function that ``bounded`` computes: operators, attributes, connections, weights and constants.

    It distinguishes networks with the same ``repr`` and state dict whose ``forward`` differs.
    """
    hashed = hashlib.sha256()
    for node in bounded._modules.values():
        sources = [source.name for source in (*node.inputs, *getattr(node, "constant", ()))]
        add_to_hash(hashed, (_code(type(node)), node.name, sources, getattr(node, "attr", None)))
        add_to_hash(hashed, (getattr(node, "operation", None), getattr(node, "constant_first", None)))
        if not node.inputs and not is_input(node):
            add_to_hash(hashed, evaluate(node))
    return hashed.hexdigest()


def _code(kind: type) -> tuple[str, ...] | list[Any]:
    """The name of a node's class, and the code of a user's own class."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.startswith(("auto_LiRPA.", "lirpa_fastwarmup.")):
        return (name,)  # The version, which is recorded, determines the code.
    functions = [getattr(value, "__code__", None) for value in vars(kind).values()]
    return [name, *(marshal.dumps(code) for code in functions if code is not None)]


@dataclass(frozen=True)
class LayerBounds:
    """Bounds on the pre-activations of one ReLU or other activation, ``(batch, *neurons)``.

    ``name`` is the affine layer that feeds it; after a residual sum, the module that holds the sum. A row of its weight
    makes the values along all dimensions but the batch and ``units``.
    """

    name: str
    lower: Tensor
    upper: Tensor
    units: int = 1


def _bounds_at(node: Any, graph: NetworkGraph) -> tuple[Tensor, Tensor]:
    lower, upper = getattr(node, "lower", None), getattr(node, "upper", None)
    if lower is None and not node.perturbed and any(getattr(x, "lower", None) is not None for x in graph.inputs):
        # Not every release visits nodes without a perturbed input: their bounds are their value.
        lower = upper = getattr(node, "forward_value", None)
    if lower is None or upper is None:
        text = "the BoundedModule holds no layer bounds: a forward pass clears them. Call "
        raise RuntimeError(text + "bounded.compute_bounds(x=(box,), method='IBP') first")
    return lower, upper


def relu_bounds(bounded: Any) -> list[LayerBounds]:
    """The pre-activation bounds of every ReLU from the last bound pass, in order of execution.

    Raises:
        RuntimeError: No bounds have been computed since the last forward pass.
        StructureError: The network has no ReLU.
    """
    pre_activations = [(name, relu.inputs[0]) for name, relu in read_graph(bounded).relus]
    missing = "ReLU, and only tightness is defined for other activations: use it alone (regularizers=('tightness',))"
    return _layer_bounds(bounded, pre_activations, missing)


def activation_bounds(bounded: Any) -> list[LayerBounds]:
    """The pre-activation bounds of every elementwise non-linearity, ReLUs included; else as :func:`relu_bounds`."""
    missing = "activation, and the regularisers are defined on pre-activations: omit them (regularizers=())"
    return _layer_bounds(bounded, read_graph(bounded).activations, missing)


def _layer_bounds(bounded: Any, pre_activations: list[tuple[str, Any]], missing: str) -> list[LayerBounds]:
    if not pre_activations:
        raise StructureError(f"the network has no {missing}")
    network = read_graph(bounded)
    return [LayerBounds(name, *_bounds_at(node, network), network.units_at(node)) for name, node in pre_activations]


def relus_read(bounded: Any) -> list[list[int]]:
    """For each ReLU, in the order of :func:`relu_bounds`, the indices of the nearest ReLUs that it reads."""
    relus = [node for _, node in read_graph(bounded).relus]
    above = [_reached(node.inputs, lambda other: () if other in relus else other.inputs) for node in relus]
    return [[index for index, node in enumerate(relus) if node in found] for found in above]


def input_half_width(bounded: Any) -> Tensor:
    """Δ_0: the mean half-width of the input of the first affine layer, after any normalisation."""
    graph = read_graph(bounded)
    ends = [_bounds_at(node, graph) for node in graph.first_sources]
    return torch.cat([(upper - lower).flatten() for lower, upper in ends]).mean() / 2
