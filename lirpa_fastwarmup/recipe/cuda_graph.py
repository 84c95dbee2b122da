"""A function of tensors on a GPU as a CUDA graph: one launch instead of one for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_WARM_UP_RUNS = 3  # As torch.cuda.graph's documentation advises: libraries choose and allocate in the first runs.


class CudaGraph:
    """``function(*state, *inputs)``, captured once and replayed.

    The state is read and written where it lies; where it has moved, it is captured anew. Inputs are copied to where the
    graph reads them, and results from where it writes them.

    Args:
        function: without anything that waits for the device.
        inputs: an example of those that change.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        self._function = function
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._places: tuple[int, ...] = ()
        self._result: Any = None

    def __call__(self, *tensors: Tensor) -> Any:
        """The result for ``(*state, *inputs)``."""
        state, inputs = tensors[: -len(self._inputs)], tensors[-len(self._inputs) :]
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        places = tuple(tensor.data_ptr() for tensor in state)
        if self._graph is None or places != self._places:
            self._capture(state)
            self._places = places
        assert self._graph is not None
        self._graph.replay()
        leaves, structure = tree_flatten(self._result)
        computed = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        copies = iter(torch._foreach_mul(computed, 1))  # The next replay overwrites them. One launch for many.
        return tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def _capture(self, state: tuple[Tensor, ...]) -> None:
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self._function(*state, *self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)  # The runs moved the running statistics.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self._function(*state, *self._inputs)
