"""Full batch normalisation: BatchNorm after every affine layer but the classification layers.

It keeps ReLUs from going dead in the warmup (Shi et al., NeurIPS 2021, section 3.2).
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from lirpa_fastwarmup.engine.graph import AffineLayer, NetworkGraph, StructureError, read_graph
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.tracing import unchanged, untraceable

logger = logging.getLogger(__name__)

_CHILD = "batchnorm"
_BY_RANK = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # Spatial dimensions: 0, 1, 2, 3.


def _normalise_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    # A module-level function, so that the model can still be pickled and copied.
    return module.get_submodule(_CHILD)(output)


def insert_batchnorm(model: nn.Module, *example_inputs: Tensor) -> list[str]:
    """Insert BatchNorm after every affine layer that lacks it, in place.

    The BatchNorm becomes the child ``batchnorm`` of the layer's module and normalises its output in a forward hook: the
    model keeps its class, its ``forward`` and its state-dict keys, and gets new keys for the new modules. Biases stay.
    Classification layers (whose output reaches the network's output without a non-linearity) get none, nor do layers
    with BatchNorm directly after them or after the sum that they feed; a second call inserts nothing.

    Args:
        model: any nn.Module whose operators the installed engine bounds.
        example_inputs: inputs that ``model`` can be called with, batch first. Only shapes matter.

    Returns:
        The qualified names of the modules that got a BatchNorm, in order of execution.

    Raises:
        StructureError: the path through the network depends on the data, a module is called in several places (one
            BatchNorm cannot hold the statistics of both), or a layer's output has no channel dimension to normalise.
            The model is then unchanged.
        NotImplementedError: the engine has no bounds for an operator of the network.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5408, 10))
        >>> fw.insert_batchnorm(net, torch.zeros(2, 1, 28, 28))
        ['0']
    """
    with unchanged(model):
        observed, reasons = untraceable(model, example_inputs)
    if reasons:
        raise StructureError(
            f"the network's path is not fixed: {'; '.join(reasons)}. Layers off the path of the example would be left "
            "without BatchNorm: use tensor operations (torch.where) instead, or add BatchNorm yourself"
        )
    graph = read_graph(BoundedModule(model, tuple(example_inputs), allow_untested=True))
    final = {id(layer) for layer in graph.classification_layers()}
    layers = [layer for layer in graph.affine if id(layer) not in final and not graph.has_batchnorm(layer)]
    names = {layer.name for layer in layers}
    repeated = names & {*graph.called_more_than_once(), *(name for name, count in observed.calls.items() if count > 1)}
    if repeated:
        raise StructureError(
            f"{', '.join(sorted(repeated))}: called in several places of the network, and one BatchNorm cannot hold "
            "the statistics of both. Give each place its own module, or add BatchNorm yourself"
        )
    modules = [(layer.name, model.get_submodule(layer.name), _batchnorm_for(model, graph, layer)) for layer in layers]
    hooks = []
    for _, module, batchnorm in modules:
        module.add_module(_CHILD, batchnorm)
        hooks.append(module.register_forward_hook(_normalise_output))
    missed = _without_effect(model, example_inputs, names)
    if missed:
        for (_, module, _), hook in zip(modules, hooks, strict=True):
            hook.remove()
            delattr(module, _CHILD)
        raise StructureError(
            f"{', '.join(missed)}: the module does not return the plain output of its weight, or other code uses the "
            "weight, so BatchNorm cannot be put directly after it. Add BatchNorm yourself"
        )
    for name, _, batchnorm in modules:
        logger.info("inserted %s after %s", type(batchnorm).__name__, name)
    return [layer.name for layer in layers]


def _without_effect(model: nn.Module, example_inputs: tuple[Tensor, ...], names: set[str]) -> list[str]:
    """The layers among ``names`` that BatchNorm does not follow directly, although it was inserted."""
    try:
        graph = read_graph(BoundedModule(model, tuple(example_inputs), allow_untested=True))
    except Exception:  # The network may do anything with an output that is no plain tensor.
        logger.debug("the network fails with BatchNorm inserted", exc_info=True)
        return sorted(names)
    return [layer.name for layer in graph.affine if layer.name in names and not graph.has_batchnorm(layer)]


def _batchnorm_for(model: nn.Module, graph: NetworkGraph, layer: AffineLayer) -> nn.Module:
    module = model.get_submodule(layer.name)
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        raise StructureError(
            f"the weight {layer.parameter!r} is used by the code of {type(module).__name__}, not by an nn.Linear or "
            "convolution module whose output could be normalised: use a module for it, or add BatchNorm yourself"
        )
    if hasattr(module, _CHILD):
        raise StructureError(
            f"{layer.name!r} already has an attribute {_CHILD!r}, which insert_batchnorm would replace"
        )
    rank = graph.spatial_rank(layer)
    if isinstance(module, nn.Linear) and rank > 0:
        raise StructureError(
            f"the linear layer {layer.name!r} works on an output of {rank + 2} dimensions, whose features are not the "
            "channel dimension that BatchNorm normalises: flatten first, or add BatchNorm yourself"
        )
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    batchnorm = _BY_RANK[rank](channels, device=module.weight.device, dtype=module.weight.dtype)
    return batchnorm.train(module.training)
