"""A computation through the engine, recorded once as a flat graph of tensor operations.

The engine walks its graph in Python at every pass. What it does to tensors is the same for every batch of one shape, so
that a recording of one pass, with parameters, buffers and the batch as its inputs, computes any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends
from lirpa_fastwarmup.engine import batchnorm
from lirpa_fastwarmup.engine.compat import engine

_READS = ("__bool__", "__int__", "__index__", "__float__", "item", "tolist")
_CHECKS = ("isnan", "isinf")
# Called with sizes, which the engine has in tensors.
_SIZED = ("reshape", "view", "expand", "repeat", "tile", "permute")


class _Reads(TorchFunctionMode):
    """What a recording has to supply that tensors under recording lack: values, and boxes around them.

    Shapes are the same for every batch that is replayed: integers that do not come from data are read as they are. Of
    data, only ``if isnan(x).any()`` and the like is answered, with no; 0.7 asks so at every node.
    """

    def __init__(self, data: Iterable[Tensor]) -> None:
        super().__init__()
        for tensor in data:
            _mark(tensor, "data")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_unboxed, (args, kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _READS:
            if _marked(args[0], "check"):
                return False
            if not _is_data(args[0]):
                with disable_proxy_modes_tracing():
                    return func(*args, **kwargs)
        if name in _SIZED:
            with disable_proxy_modes_tracing():
                args = (args[0], *tree_map(lambda size: size.tolist() if _is_constant(size) else size, args[1:]))
        result = func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(map(_is_data, given)):
            for tensor in made:
                _mark(tensor, "data")
        if name in _CHECKS or (name in ("any", "all") and _marked(given[0], "check")):
            _mark(result, "check")
        return result


def _unboxed(value: Any) -> Any:
    """The batch itself, where 0.7 passes the box through the network for what depends on shapes alone."""
    return getattr(value, "_recorded_batch", value) if isinstance(value, engine.BoundedTensor) else value


def _mark(tensor: Tensor, what: str) -> None:
    setattr(tensor, f"_recorded_{what}", True)


def _marked(tensor: Any, what: str) -> bool:
    return getattr(tensor, f"_recorded_{what}", False)


def _is_constant(value: Any) -> bool:
    return isinstance(value, Tensor) and not _is_data(value)


def _is_data(value: Any) -> bool:
    """Whether ``value`` may be another one for another batch."""
    return isinstance(value, Tensor) and (_marked(value, "data") or value.is_floating_point())


class RecordableBox:
    """The box around a batch that is being recorded.

    A BoundedTensor cannot be made from a tensor under recording; its perturbation can.

    Args:
        example: a batch of the shape to be recorded, not under recording.
    """

    def __init__(self, example: Tensor) -> None:
        example = example.detach()
        ends = engine.PerturbationLpNorm(norm=math.inf, eps=0.0, x_L=example, x_U=example)
        self._box = engine.BoundedTensor(example, ends)

    def around(self, x: Tensor, eps: Epsilon, input_range: InputRange | None) -> Any:
        """As :func:`lirpa_fastwarmup.engine.bounds.input_box`, without its checks; for bounds alone."""
        lower, upper = box_ends(x, eps, input_range)
        self._box._recorded_batch = x
        self._box.ptb = engine.PerturbationLpNorm(norm=math.inf, eps=0.0, x_L=lower, x_U=upper)
        return self._box


class _Function(nn.Module):
    """A function as the forward pass of a module that owns the model it calls."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(*inputs)


def record(
    function: Callable[..., Any], bounded: Any, state: Mapping[str, Tensor], inputs: tuple[Tensor, ...]
) -> GraphModule:
    """Record ``function(*inputs)``, which computes with ``bounded``, with its model's ``state`` as inputs too.

    Args:
        function: returns tensors in any nesting of tuples, lists and dicts.
        bounded: a BoundedModule, whose nodes keep what was recorded; see :func:`forget_last_pass`.
        state: tensors in place of the wrapped model's parameters and buffers while it is recorded. Buffers among them
            are changed.
        inputs: an example of the arguments.

    Returns:
        A module that takes ``(*state.values(), *inputs)`` and returns what ``function`` does, in the same operations;
        buffers are changed in place.

    Raises:
        RuntimeError: ``function`` reads a tensor's value.
    """
    names = [f"model.{name}" for name in state]

    def flat(*tensors: Tensor) -> Any:
        module = _Function(bounded.wrapped, function)
        module.training = bounded.training
        with _Reads(tensors):
            return functional_call(module, dict(zip(names, tensors[: len(names)], strict=True)), tensors[len(names) :])

    return make_fx(flat)(
        *state.values(), *(tensor.detach() for tensor in inputs)
    )  # Marks stay on none of the caller's.


@torch.no_grad()
def forget_last_pass(bounded: Any) -> None:
    """Let go of the tensors that the nodes of ``bounded`` hold, as a pass over the smallest batch does."""
    with batchnorm.frozen_running_stats(bounded):
        bounded.forward(*bounded.example)
