"""Records a computation through the engine once, as a flat graph of tensor operations.

The engine walks its graph in Python at every pass, but its tensor operations are the same for every batch of one shape.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends
from lirpa_fastwarmup.engine import batchnorm
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.inputs import with_ends

_DATA, _CHECK = "_recorded_data", "_recorded_check"  # Attributes that mark tensors.
_READS = ("__bool__", "__int__", "__index__", "__float__", "item", "tolist")
_CHECKS = ("isnan", "isinf")
_SIZED = ("reshape", "view", "expand", "repeat", "tile", "permute")  # The engine passes them sizes in tensors.


class _Reads(TorchFunctionMode):
    """Answers what tensors under recording cannot: reads of their values, and boxes around them.

    Integers that do not depend on data, such as shapes, are the same for every batch, and are read as they are. Of
    data, only checks such as ``if isnan(x).any()`` are answered, with no; 0.7 makes them at every node.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_unboxed, (args, kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _READS:
            if hasattr(args[0], _CHECK):
                return False
            if not _is_data(args[0]):
                with disable_proxy_modes_tracing():
                    return func(*args, **kwargs)
        if name in _SIZED:
            with disable_proxy_modes_tracing():
                args = (args[0], *tree_map_only(Tensor, lambda x: x if _is_data(x) else x.tolist(), args[1:]))
        result = func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        if any(map(_is_data, given)):
            _mark_as_data(tree_leaves(result))
        if name in _CHECKS or (name in ("any", "all") and hasattr(given[0], _CHECK)):
            setattr(result, _CHECK, True)
        return result


def _unboxed(value: Any) -> Any:
    """The batch itself, where 0.7 passes the box through the network for what depends on shapes alone."""
    return getattr(value, "_recorded_batch", value) if isinstance(value, engine.BoundedTensor) else value


def _mark_as_data(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            setattr(value, _DATA, True)


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and (hasattr(value, _DATA) or value.is_floating_point())


class RecordableBox:
    """The box around a batch under recording, of which no BoundedTensor can be made; ``example`` is not recorded."""

    def __init__(self, example: Tensor) -> None:
        self._box = engine.BoundedTensor(example.detach(), engine.PerturbationLpNorm(norm=math.inf, eps=0.0))

    def around(self, x: Tensor, eps: Epsilon, input_range: InputRange | None) -> Any:
        """As :func:`lirpa_fastwarmup.input_box`, without its checks; for bounds alone."""
        self._box._recorded_batch = x
        return with_ends(self._box, *box_ends(x, eps, input_range), eps=0.0)


def record(
    function: Callable[..., Any], bounded: Any, state: Mapping[str, Tensor], inputs: tuple[Tensor, ...]
) -> GraphModule:
    """Record ``function(*inputs)``, which computes with ``bounded``, as a module of ``(*state.values(), *inputs)``.

    Buffers in ``state``, of the bounded model, are changed in place, also while recording, and nodes keep recorded
    tensors (see :func:`forget_last_pass`). Raises RuntimeError if ``function`` reads a tensor's value.
    """
    names = [f"model.{name}" for name in state]

    def flat(*tensors: Tensor) -> Any:
        module = nn.Module()  # It owns the model that `function` calls.
        module.model, module.forward, module.training = bounded.wrapped, function, bounded.training
        _mark_as_data(tensors)
        with _Reads():
            return functional_call(module, dict(zip(names, tensors[: len(names)], strict=True)), tensors[len(names) :])

    detached = [tensor.detach() for tensor in inputs]  # Marks must not stay on the caller's tensors.
    return make_fx(flat)(*state.values(), *detached)


@torch.no_grad()
def forget_last_pass(bounded: Any) -> None:
    """Release the tensors that the nodes of ``bounded`` hold, by a pass over the smallest batch."""
    with batchnorm.frozen_running_stats(bounded):
        bounded.forward(*bounded.example)
