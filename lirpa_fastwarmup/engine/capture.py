"""A computation through the engine, recorded once as a flat graph of tensor operations.

The engine walks its graph in Python at every pass. What it does to tensors is the same for every batch of one shape, so
that a recording of one pass, with parameters, buffers and the batch as its inputs, computes any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from lirpa_fastwarmup.engine import sharing
from lirpa_fastwarmup.engine.bounds import box_ends
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.inputs import Epsilon, InputRange

_MARK = "_is_nan_check"


class _PassedNanChecks(TorchFunctionMode):
    """Let ``if isnan(x).any()`` go on as if there were none: 0.7 asks so at every node; a recording has no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__bool__" and getattr(args[0], _MARK, False):
            return False
        result = func(*args, **(kwargs or {}))
        if name == "isnan" or (name == "any" and getattr(args[0], _MARK, False)):
            setattr(result, _MARK, True)
        return result


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
        bounded: a BoundedModule; left without bounds, as after a forward pass.
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
        with _PassedNanChecks():
            return functional_call(module, dict(zip(names, tensors[: len(names)], strict=True)), tensors[len(names) :])

    try:
        return make_fx(flat)(*state.values(), *inputs)
    finally:
        _forget_last_pass(bounded)


@torch.no_grad()
def _forget_last_pass(bounded: Any) -> None:
    """Let go of the tensors that nodes hold, which a pass that is never followed by another would keep in memory."""
    with sharing.without_bookkeeping(bounded):
        bounded.forward(*bounded.example)
