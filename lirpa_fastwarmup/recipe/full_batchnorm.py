"""Full batch normalisation: BatchNorm after every affine layer but the classification layers, inserted and folded.

It keeps ReLUs from going dead in the warmup (Shi et al., NeurIPS 2021, section 3.2).
"""

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.graph import AffineLayer, StructureError, read_graph
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.observation import Recorder, untraceable
from lirpa_fastwarmup.engine.tracing import copy_of, unchanged

logger = logging.getLogger(__name__)

_CHILD = "batchnorm"
_OWN = {"weight", "bias"}  # A module's parameters (or None), unless they are computed from others.
_BY_RANK = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # Spatial dimensions: 0, 1, 2, 3.
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _normalise_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    # A module-level function, so that the model can still be pickled and copied.
    return module.get_submodule(_CHILD)(output)


def insert_batchnorm(model: nn.Module, *example_inputs: Tensor) -> list[str]:
    """Insert BatchNorm after every affine layer that lacks it, in place; return their names, in order of execution.

    BatchNorm becomes the child ``batchnorm`` of the layer's module and normalises its output in a forward hook: the
    model keeps its class, ``forward`` and state-dict keys, and gets new keys. Biases stay. Classification layers (whose
    output reaches the network's output without a non-linearity) get none, nor do layers with BatchNorm directly after
    them or after the sum that they feed. To deploy the network without this package, see :func:`fold_batchnorm`.

    Args:
        model: any nn.Module whose operators the installed engine bounds.
        example_inputs: inputs that ``model`` can be called with, batch first. Only shapes matter.

    Raises:
        TypeError: ``model`` is a BoundedModule.
        StructureError: the path through the network depends on the data, a module is called in several places, or a
            layer's output has no channel dimension to normalise. The model is then unchanged.
        NotImplementedError: the engine has no bounds for an operator of the network.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5408, 10))
        >>> fw.insert_batchnorm(net, torch.zeros(2, 1, 28, 28))
        ['0']
    """
    if isinstance(model, engine.BoundedModule):
        text = "expected the network itself, found a BoundedModule: insert BatchNorm before wrapping it, because a "
        raise TypeError(text + "bounded module keeps the operators that it was built with")
    with unchanged(model):
        observed, reasons = untraceable(model, example_inputs)
    if reasons:
        text = f"the network's path is not fixed: {'; '.join(reasons)}. Layers off the example's path would get no "
        raise StructureError(text + "BatchNorm: use tensor operations (torch.where) instead, or add it yourself")
    graph = read_graph(BoundedModule(model, tuple(example_inputs), allow_untested=True))
    final = graph.classification_layers()
    layers = [layer for layer in graph.affine if layer not in final and not graph.has_batchnorm(layer)]
    names = {layer.name for layer in layers}
    repeated = names & {*graph.called_more_than_once(), *(name for name, count in observed.calls.items() if count > 1)}
    if repeated:
        text = f"{', '.join(sorted(repeated))}: called in several places of the network, and one BatchNorm cannot hold "
        raise StructureError(text + "the statistics of both. Give each place its own module, or add BatchNorm yourself")
    inserted: dict[Any, Any] = {model.get_submodule(one.name): _batchnorm_for(model, one) for one in layers}
    for module, batchnorm in inserted.items():
        module.add_module(_CHILD, batchnorm)
        module.register_forward_hook(_normalise_output)
    if missed := _without_effect(model, example_inputs, names):
        for module in inserted:
            _remove_batchnorm(module)
        text = f"{', '.join(missed)}: the module does not return the plain output of its weight, or other code uses "
        raise StructureError(text + "the weight, so BatchNorm cannot be put directly after it. Add BatchNorm yourself")
    reads = _reads_of_parameters(model, example_inputs)
    for layer, (module, batchnorm) in zip(layers, inserted.items(), strict=True):
        batchnorm.folding_is_exact = all(reads[id(module._parameters.get(name))] <= 1 for name in _OWN)
        logger.info("inserted %s after %s", type(batchnorm).__name__, layer.name)
    return [layer.name for layer in layers]


def _remove_batchnorm(module: Any) -> None:
    delattr(module, _CHILD)
    for key in [key for key, hook in module._forward_hooks.items() if hook is _normalise_output]:
        del module._forward_hooks[key]


def _without_effect(model: nn.Module, example_inputs: tuple[Tensor, ...], names: set[str]) -> list[str]:
    """The layers among ``names`` that BatchNorm does not follow directly, although it was inserted."""
    try:
        graph = read_graph(BoundedModule(model, tuple(example_inputs), allow_untested=True))
    except Exception:  # The network may do anything with an output that is no plain tensor.
        logger.debug("the network fails with BatchNorm inserted", exc_info=True)
        return sorted(names)
    return [layer.name for layer in graph.affine if layer.name in names and not graph.has_batchnorm(layer)]


def _reads_of_parameters(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Counter[int]:
    """How many calls of torch functions compute tensors from each parameter, by its id."""
    reads: Counter[int] = Counter()

    def look(_: str, args: Any, kwargs: Any, result: Any) -> None:
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # A weight's shape or dtype does no harm.
            reads.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)})

    with unchanged(model), torch.no_grad():
        Recorder(look).run(model.eval(), example_inputs)
    return reads


def _batchnorm_for(model: nn.Module, layer: AffineLayer) -> nn.Module:
    module = model.get_submodule(layer.name)
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        text = f"{type(module).__name__} uses the weight {layer.parameter!r} itself, not a linear layer or convolution "
        raise StructureError(text + "whose output could be normalised: use a module for it, or add BatchNorm yourself")
    if hasattr(module, _CHILD):
        raise StructureError(f"{layer.name!r} already has an attribute {_CHILD!r}, which this would replace")
    rank = len(layer.node.output_shape) - 2  # Spatial dimensions.
    if isinstance(module, nn.Linear) and rank > 0:
        text = f"the linear layer {layer.name!r} works on an output of {rank + 2} dimensions, with features in the "
        raise StructureError(text + "last, and BatchNorm normalises the second: flatten first, or add it yourself")
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    return _BY_RANK[rank](channels, device=module.weight.device, dtype=module.weight.dtype).train(module.training)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of ``model``, in any mode, with the BatchNorm that :func:`insert_batchnorm` inserted folded into weights.

    The copy is of the author's class, needs nothing of this package, and has the state-dict keys from before
    ``insert_batchnorm``, plus a bias in each folded layer that had none. It computes what ``model`` computes in
    evaluation mode, up to rounding. BatchNorm of the author's own code stays, also if none was inserted. The copy is in
    evaluation mode; further training continues without BatchNorm, which is part of its weights.

    Raises:
        TypeError: ``model`` is not the network itself, but a BoundedModule or a module that holds one.
        StructureError: BatchNorm cannot be folded into a layer, because its weight is parametrised, pruned or shared;
            other code of the network reads the weight; its class has a ``forward`` of its own; other hooks run before
            the BatchNorm; or the BatchNorm was replaced. The message names the layer.

    Example:
        >>> folded = fw.fold_batchnorm(net)
        >>> MyNet().load_state_dict(folded.state_dict())
        <All keys matched successfully>
    """
    # Also a module that holds a BoundedModule as ShortWarmup does.
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    held = (value for part in parts for value in (part, *vars(part).values()))
    if not parts or any(isinstance(value, engine.BoundedModule) for value in held):
        text = f"expected the network itself, found {type(model).__name__}: pass the nn.Module that insert_batchnorm "
        raise TypeError(text + "was called with (bounded.wrapped, if bounded is a lirpa_fastwarmup.BoundedModule)")
    layers = {name: part for name, part in model.named_modules() if _normalise_output in part._forward_hooks.values()}
    for name, layer in layers.items():
        if obstacle := _obstacle_to_folding(layer, model):
            raise StructureError(f"BatchNorm cannot be folded into {name!r}: {obstacle}")
    folded = copy_of(model).eval()
    for name in layers:
        _fold_(folded.get_submodule(name))
    return folded


def _obstacle_to_folding(layer: nn.Module, model: nn.Module) -> str:
    """Why BatchNorm cannot be folded into ``layer``, and what to do; "" if it can."""
    kind = type(layer)
    batchnorm: Any = layer._modules.get(_CHILD)
    base: Any = next((base for base in kind.__mro__ if base in _FOLDABLE), None)
    methods = [name for name in ("__call__", "forward", "_conv_forward") if hasattr(base, name)]
    if base is None or "forward" in vars(layer) or any(getattr(kind, one) is not getattr(base, one) for one in methods):
        text = f"{kind.__name__} has a forward of its own, which may not be affine in weight and bias: call an "
        return text + "nn.Linear or convolution module in it instead"
    if not layer._parameters.keys() >= _OWN:
        text = "its weight or bias is computed from other parameters: first make it permanent, by torch.nn.utils, with "
        return text + "parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove"
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    holders = [(name, part) for name, part in model.named_modules() if own & {*map(id, part._parameters.values())}]
    if sharing := [repr(name) for name, part in holders if part is not layer]:
        return f"its weight or bias is shared with {', '.join(sharing)}: give each module its own parameters"
    hooks = list(layer._forward_hooks.values())
    if layer._forward_pre_hooks or hooks[0] is not _normalise_output or hooks.count(_normalise_output) > 1:
        return "another hook runs before its BatchNorm, and may read or change what folding changes: remove the hook"
    if type(batchnorm) not in _BY_RANK or not batchnorm._parameters.keys() >= _OWN:
        return f"its child {_CHILD!r} is now a {type(batchnorm).__name__}: restore the BatchNorm that was inserted"
    if batchnorm._forward_hooks or batchnorm._forward_pre_hooks:
        return "its BatchNorm has hooks, which would be lost: remove them"
    if batchnorm.running_mean is None or batchnorm.running_var is None:
        return "its BatchNorm has no running statistics, and normalises every batch by itself"
    if not getattr(batchnorm, "folding_is_exact", False):
        return "other code of the network reads its weight or bias, which folding changes: deploy the network as it is"
    return ""


def _exact(value: Tensor | None, absent: float = 0.0) -> Tensor:
    return torch.tensor(absent).double() if value is None else value.detach().cpu().double()  # MPS has no float64.


@torch.no_grad()
def _fold_(layer: Any) -> None:
    """Fold the BatchNorm of ``layer``, in float64 until the result is rounded once."""
    batchnorm, weight = layer.batchnorm, layer.weight
    scale = _exact(batchnorm.weight, 1.0) / (_exact(batchnorm.running_var) + batchnorm.eps).sqrt()
    bias = (_exact(layer.bias) - _exact(batchnorm.running_mean)) * scale + _exact(batchnorm.bias)
    # Outputs come first in a weight; in a transposed one after the inputs, which are split into groups.
    groups = layer.groups if getattr(layer, "transposed", False) else len(scale)
    grouped = _exact(weight).unflatten(0, (groups, -1))
    folded = (grouped * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)
    for name, value, old in (("weight", folded, weight), ("bias", bias, layer.bias)):
        like = weight if old is None else old
        layer.register_parameter(name, nn.Parameter(value.to(like), requires_grad=like.requires_grad))
    _remove_batchnorm(layer)
