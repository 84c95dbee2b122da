"""A training step, recorded once for each shape, compiled, and replayed.

A recording holds the forward and the backward pass: it computes the loss and the gradients of all parameters, and
``backward`` only hands these over. It calls nothing of the engine, so a step runs no Python and waits for no device.
"""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from lirpa_fastwarmup.boxes import Epsilon, InputRange
from lirpa_fastwarmup.engine import bounds, capture, tracing
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.products import require_first_derivative

logger = logging.getLogger(__name__)

# (box, x, y, eps, fraction, clean_weight, ...) -> 0-dim tensors by name, "loss" among them.
Step = Callable[..., Mapping[str, Tensor]]
# x, y, eps, fraction, clean_weight and anything else that differs from step to step, all on one device.
Batch = tuple[Tensor, ...]

# The largest relative differences to the eager step, of the loss and of the gradient. They find mistakes: rounding
# alone flips a few ReLUs, and changes a gradient by up to a percent where bounds explode.
_TOLERANCES = (1e-3, 0.05)
_COARSE_TOLERANCES = (0.05, 0.2)
_SMALLEST = 1e-6


class CompilationWarning(UserWarning):
    """A training step could not be compiled; the engine computes it instead."""


class CompiledSteps:
    """Training steps of one network, each compiled on first use, for batches of ``batch_size`` or of any size."""

    def __init__(
        self, bounded: BoundedModule, input_range: InputRange | None, batch_size: int | None, backend: str = "inductor"
    ) -> None:
        self._bounded, self._input_range = bounded, input_range
        self._batch_size, self._backend = batch_size, backend
        self._steps: dict[Any, _RecordedStep] = {}
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}  # Compiled code cannot be pickled, and belongs to one network.

    def run(
        self, step: Step, key: tuple[Any, ...], x: Tensor, y: Tensor, eps: Epsilon, *scalars: float, starts: Any = ()
    ) -> dict[str, Tensor] | None:
        """The values of ``step``, compiled; ``None`` where it must run eagerly. Only the loss has a gradient.

        ``key`` holds the step's name for the log, then everything else that ``step`` depends on besides the network. If
        the step cannot be compiled, a CompilationWarning says why, and every later step runs eagerly.
        """
        suits = self._bounded.training and torch.is_grad_enabled() and self._batch_size in (None, len(x))
        if self._failed or not suits or x.requires_grad or (isinstance(eps, Tensor) and eps.requires_grad):
            return None
        batch = (x, y, *(scalar_like(x, scalar) for scalar in (eps, *scalars)), *starts)
        key = (*key, *self._state_key(batch))
        try:
            if key not in self._steps:  # A loss of the user's own may be unhashable.
                self._steps[key] = self._record(step, key, batch)
        except Exception as error:
            self._failed = True
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            text = f"training steps run eagerly, as this one cannot be compiled: {reason}"
            warnings.warn(text, CompilationWarning, stacklevel=5)
            logger.debug("no compiled step", exc_info=True)
            return None
        return self._steps[key].run(batch)

    def _record(self, step: Step, key: tuple[Any, ...], batch: Batch) -> "_RecordedStep":
        if self._bounded.over_ranks:
            raise NotImplementedError("sums over several processes cannot be recorded")
        logger.info("compiling the training step %s, for batches of shape %s", key[0], tuple(batch[0].shape))
        try:
            return _RecordedStep(step, self._bounded, self._input_range, batch, self._backend)
        finally:
            capture.forget_last_pass(self._bounded)  # No other pass follows that would free its tensors.

    def _state_key(self, batch: Batch) -> tuple[Any, ...]:
        """Everything that any recording depends on besides the values of tensors."""
        x, _, eps, *_ = batch
        model, device = self._bounded.wrapped, x.device.type
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        return (
            tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in (x, eps)),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            self._bounded.radius_dtype,
            self._bounded.over_ranks,
            tuple(module.training for module in model.modules()),
            tuple((one.eps, one.momentum, one.track_running_stats) for one in norms),
            tuple((parameter.shape, parameter.requires_grad) for parameter in model.parameters()),
        )


class _RecordedStep:
    """A step for batches of one shape. Raises RuntimeError unless it computes what the engine does."""

    def __init__(
        self, step: Step, bounded: BoundedModule, input_range: InputRange | None, batch: Batch, backend: str
    ) -> None:
        self._bounded, self._input_range = bounded, input_range
        self._trained = [name for name, value in bounded.wrapped.named_parameters() if value.requires_grad]
        self._names: list[str] = []
        example = batch[0]
        box = capture.RecordableBox(example)

        def flat(x: Tensor, y: Tensor, eps: Tensor, *more: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            values = step(box.around(x, eps, input_range), x, y, eps, *more)
            loss, self._names = values["loss"], list(values)
            grads = torch.autograd.grad(loss, self._parameters(), allow_unused=True)
            return torch.stack([value.detach().to(loss.dtype) for value in values.values()]), list(grads)

        # The copies of parameters are parameters: nodes refuse anything else where they have held one.
        graph = capture.record(flat, bounded, copy.deepcopy(self._state()), batch)
        # On the CPU, converting to and from channels-last memory costs more than it gains.
        options: Any = {"layout_optimization": False} if backend == "inductor" and example.is_cpu else None
        replay: Any = torch.compile(graph, fullgraph=True, dynamic=False, backend=backend, options=options)
        self._replay: Callable[..., Any] = CudaGraph(replay, batch) if example.device.type == "cuda" else replay
        self._compare_with_eager(step, batch)

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """The values of the step on ``batch``; it updates the running statistics, and the loss has a gradient."""
        state = self._state()
        stacked, grads = self._run(state, batch)
        values = dict(zip(self._names, stacked.unbind(), strict=True))
        used = {name: grad for name, grad in zip(self._trained, grads, strict=True) if grad is not None}
        values["loss"] = _WithGradients.apply(values["loss"], [*used.values()], *(state[name] for name in used))
        return values

    @torch.no_grad()
    def _run(self, state: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        # Detached, because a compiler would prepare for gradients of the gradients.
        return self._replay(*[tensor.detach() for tensor in state.values()], *batch)

    def _state(self) -> dict[str, Tensor]:
        return {**dict(self._bounded.wrapped.named_parameters()), **dict(self._bounded.wrapped.named_buffers())}

    def _parameters(self) -> list[Tensor]:
        """The trained parameters; during the recording, the tensors in their place."""
        parameters = dict(self._bounded.wrapped.named_parameters())
        return [parameters[name] for name in self._trained]

    def _compare_with_eager(self, step: Step, batch: Batch) -> None:
        """Raise RuntimeError unless the losses and gradients agree on a batch not recorded."""
        x, y, eps, fraction = batch[0].flip(0), batch[1].flip(0), batch[2] * 0.75, batch[3] * 0.75
        other = (x, y, eps, fraction, torch.full_like(batch[4], 0.25), *batch[5:])  # Weights 0 and 1 would hide terms.
        with tracing.unchanged(self._bounded.wrapped):
            loss = step(bounds.input_box(x, eps, self._input_range), *other)["loss"]
            expected = torch.autograd.grad(loss, self._parameters(), allow_unused=True)
        with tracing.unchanged(self._bounded.wrapped):
            values, grads = self._run(self._state(), other)
        if not loss.isfinite():
            return
        found = values[self._names.index("loss")]
        differences = _relative_difference([found], [loss.detach()]), _relative_difference(grads, expected)
        # Off the CPU and under autocast, products may be rounded to TF32 or to autocast's dtype.
        coarse = x.device.type != "cpu" or torch.is_autocast_enabled(x.device.type)
        tolerances = _COARSE_TOLERANCES if coarse else _TOLERANCES
        if not all(found <= allowed for found, allowed in zip(differences, tolerances, strict=True)):
            text = f"the compiled loss differs from the engine's by {differences[0]:.1e} and its gradient by "
            raise RuntimeError(text + f"{differences[1]:.1e}, relatively")


class CudaGraph:
    """``function(*state, *inputs)`` as a CUDA graph: one launch instead of one per kernel.

    The graph reads and writes the state in place, and is captured again where the state has other memory. Inputs are
    copied to the memory that it reads, and results from the memory that it writes.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        self._function, self._inputs = function, tuple(tensor.clone() for tensor in inputs)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: tuple[int, ...] = ()
        self._result: Any = None

    def __call__(self, *tensors: Tensor) -> Any:
        state, inputs = tensors[: -len(self._inputs)], tensors[-len(self._inputs) :]
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        addresses = tuple(tensor.data_ptr() for tensor in state)
        if self._graph is None or addresses != self._addresses:
            self._graph, self._addresses = self._captured(state), addresses
        self._graph.replay()
        computed = [leaf for leaf in tree_leaves(self._result) if isinstance(leaf, Tensor)]
        copies = iter(torch._foreach_mul(computed, 1))  # In one launch. The next replay overwrites the originals.
        return tree_map_only(Tensor, lambda _: next(copies), self._result)

    def _captured(self, state: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # As torch.cuda.graph's documentation advises: libraries choose and allocate in these.
                self._function(*state, *self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)  # The runs updated the running statistics.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._function(*state, *self._inputs)
        return graph


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative()
        return None, None, *torch._foreach_mul(ctx.grads, grad)


def scalar_like(x: Tensor, value: float | Tensor) -> Tensor:
    """``value`` in the dtype and on the device of ``x``; a number does not wait for the device."""
    return value.to(x) if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype, device=x.device)


def _relative_difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The norm of the difference over the norm of the expected values, of all tensors together."""
    if [one is None for one in found] != [one is None for one in expected]:
        return math.inf
    pairs = [(one, two) for one, two in zip(found, expected, strict=True) if one is not None and two is not None]
    difference = torch.stack([(one - two).double().norm() for one, two in pairs]).norm()
    size = torch.stack([two.double().norm() for _, two in pairs]).norm()
    return float(difference / size.clamp(min=_SMALLEST))
