"""The objective's training step, recorded once for each shape and phase, compiled, and replayed.

A recording holds the forward and the backward pass: it gives the loss and the gradients of all parameters at once, and
``backward`` only hands these over. It calls for nothing of the engine, so that neither Python nor a wait for the device
is left in a step.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lirpa_fastwarmup.boxes import Epsilon, InputRange
from lirpa_fastwarmup.engine.bounds import input_box
from lirpa_fastwarmup.engine.capture import RecordableBox, forget_last_pass, record
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.recipe.cuda_graph import CudaGraph
from lirpa_fastwarmup.recipe.step import StepValues, Terms, compute_step

logger = logging.getLogger(__name__)

_VALUES = ("loss", "clean_loss", "clean_error", "robust_loss", "verified_error")
# Largest relative differences to the eager step, of the loss and of the gradient, with which a compiled one is used.
# They are to find mistakes: rounding alone turns a ReLU here and there, and moves a gradient by up to a percent where
# bounds explode.
_TOLERANCES = (1e-3, 0.05)
_COARSE_TOLERANCES = (0.05, 0.2)
_SMALLEST = 1e-6


class CompilationWarning(UserWarning):
    """A training step could not be compiled, and is taken by the engine itself."""


@dataclass(frozen=True)
class Batch:
    """What a step is computed from, besides the network: eps and fraction as tensors of the batch's device."""

    x: Tensor
    y: Tensor
    eps: Tensor
    fraction: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.y, self.eps, self.fraction


class CompiledSteps:
    """Compiled training steps of one network, each made when it is first asked for.

    Args:
        bounded: the network.
        input_range: to which the box is clipped.
        batch_size: compile batches of this many samples only; ``None`` for whatever comes.
        backend: of ``torch.compile``.
    """

    def __init__(
        self,
        bounded: BoundedModule,
        input_range: InputRange | None,
        *,
        batch_size: int | None = None,
        backend: str = "inductor",
    ) -> None:
        self._bounded = bounded
        self._input_range = input_range
        self._batch_size = batch_size
        self._backend = backend
        self._steps: dict[Any, _RecordedStep] = {}
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}  # What is compiled stays with the process, and with the network.

    def take(self, terms: Terms, x: Tensor, y: Tensor, eps: Epsilon, fraction: float) -> StepValues | None:
        """The step, compiled; ``None`` where it has to be taken eagerly.

        Warns:
            CompilationWarning: it could not be compiled; the reason is in the text. No other will be tried.
        """
        if self._failed or not self._suits(x, eps):
            return None
        batch = Batch(x, y, scalar_like(x, eps), scalar_like(x, fraction))
        key = self._key(terms, batch)
        if key not in self._steps:
            try:
                if self._bounded.over_ranks:
                    raise NotImplementedError("sums over several processes cannot be recorded")
                self._steps[key] = self._compiled(terms, batch)
            except Exception as error:
                self._failed = True
                warnings.warn(
                    f"training steps are taken eagerly, as this one cannot be compiled: {_first_line(error)}",
                    CompilationWarning,
                    stacklevel=5,
                )
                logger.debug("no compiled step", exc_info=True)
                return None
        return self._steps[key].take(batch)

    def _suits(self, x: Tensor, eps: Epsilon) -> bool:
        return (
            self._bounded.training
            and torch.is_grad_enabled()
            and (self._batch_size is None or len(x) == self._batch_size)
            and not x.requires_grad
            and not (isinstance(eps, Tensor) and eps.requires_grad)
        )

    def _key(self, terms: Terms, batch: Batch) -> Any:
        """All that a recording depends on besides the values of tensors."""
        model, device = self._bounded.wrapped, batch.x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (
            (terms.phase, terms.kappa, terms.reg_weight, tuple(terms.fading)),
            tuple((name, weight) for name, (_, weight) in terms.constant.items()),
            tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in (batch.x, batch.eps)),
            autocast,
            tuple(module.training for module in model.modules()),
            tuple((parameter.shape, parameter.requires_grad) for parameter in model.parameters()),
        )

    def _compiled(self, terms: Terms, batch: Batch) -> _RecordedStep:
        logger.info("compiling the training step %s, for batches of shape %s", terms.phase.value, tuple(batch.x.shape))
        try:
            step = _RecordedStep(terms, self._bounded, self._input_range, batch, self._backend)
            step.compare_with_eager(batch)
        finally:
            forget_last_pass(self._bounded)  # No other is to come.
        return step


class _RecordedStep:
    """The step of one phase, for batches of one shape."""

    def __init__(
        self, terms: Terms, bounded: BoundedModule, input_range: InputRange | None, batch: Batch, backend: str
    ) -> None:
        self._terms = terms
        self._bounded = bounded
        self._input_range = input_range
        self._trained = [name for name, value in bounded.wrapped.named_parameters() if value.requires_grad]
        self._names: list[str] = []
        box = RecordableBox(batch.x)

        def step(x: Tensor, y: Tensor, eps: Tensor, fraction: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            values = compute_step(terms, bounded, x, y, lambda: box.around(x, eps, input_range), fraction)
            parameters = dict(bounded.wrapped.named_parameters())
            grads = torch.autograd.grad(values.loss, [parameters[name] for name in self._trained], allow_unused=True)
            named = {name: getattr(values, name) for name in _VALUES} | {f".{n}": t for n, t in values.terms.items()}
            told = {name: value.detach() for name, value in named.items() if value is not None}
            self._names = list(told)
            return torch.stack([value.to(values.loss.dtype) for value in told.values()]), list(grads)

        graph = record(step, bounded, self._copied_state(), batch.tensors)
        # On the CPU, converting to and from channels-last memory costs more than it gains.
        options: Any = (
            {"layout_optimization": False} if backend == "inductor" and batch.x.device.type == "cpu" else None
        )
        self._replay: Callable[..., Any] = torch.compile(
            graph, fullgraph=True, dynamic=False, backend=backend, options=options
        )
        if batch.x.device.type == "cuda":
            self._replay = CudaGraph(self._replay, batch.tensors)

    def take(self, batch: Batch) -> StepValues:
        """The step on ``batch``: the running statistics are moved, and the loss has its gradients."""
        state = self._state()
        values, grads = self._run(state, batch)
        parameters = [state[name] for name, grad in zip(self._trained, grads, strict=True) if grad is not None]
        loss = _WithGradients.apply(values[0], [grad for grad in grads if grad is not None], *parameters)
        told = dict(zip(self._names, values.unbind(), strict=True))
        return StepValues(
            loss,
            **{name: told.get(name) for name in _VALUES[1:]},  # type: ignore[arg-type]
            terms={name[1:]: value for name, value in told.items() if name.startswith(".")},
        )

    @torch.no_grad()
    def _run(self, state: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        # Detached, because a compiler would prepare for gradients of the gradients.
        result: tuple[Tensor, list[Tensor | None]] = self._replay(
            *[tensor.detach() for tensor in state.values()], *batch.tensors
        )
        return result

    def _state(self) -> dict[str, Tensor]:
        model = self._bounded.wrapped
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def _copied_state(self) -> dict[str, Tensor]:
        # Parameters again, because nodes may not hold anything else where they have held one.
        return {
            name: nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else tensor.clone()
            for name, tensor in self._state().items()
        }

    def compare_with_eager(self, batch: Batch) -> None:
        """See that the compiled step computes what the engine does, on another batch than was recorded.

        Raises:
            RuntimeError: it does not.
        """
        other = Batch(batch.x.flip(0), batch.y.flip(0), batch.eps * 0.75, batch.fraction * 0.75)
        with _kept_buffers(self._bounded.wrapped):
            expected = self._eager(other)
        with _kept_buffers(self._bounded.wrapped):
            values, grads = self._run(self._state(), other)
        if not expected[0].isfinite():
            return
        differences = _relative_difference([values[0]], [expected[0]]), _relative_difference(grads, expected[1])
        tolerances = _COARSE_TOLERANCES if _is_coarse(batch.x.device) else _TOLERANCES
        if not all(found <= allowed for found, allowed in zip(differences, tolerances, strict=True)):
            raise RuntimeError(
                f"compiled, its loss differs from the engine's by {differences[0]:.1e} and its gradient by "
                f"{differences[1]:.1e}, relatively"
            )

    def _eager(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor | None]]:
        def box() -> Any:
            return input_box(batch.x, batch.eps, self._input_range)

        parameters = dict(self._bounded.wrapped.named_parameters())
        loss = compute_step(self._terms, self._bounded, batch.x, batch.y, box, batch.fraction).loss
        trained = [parameters[name] for name in self._trained]
        return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.grads, grad)


def scalar_like(x: Tensor, value: float | Tensor) -> Tensor:
    """``value`` in the dtype and on the device of ``x``, without a wait for the device where it is a number."""
    return value.to(x) if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype, device=x.device)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back afterwards as they were."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def _relative_difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The norm of the difference over the norm of what was expected, all tensors together."""
    if [one is None for one in found] != [one is None for one in expected]:
        return math.inf
    pairs = [(one, two) for one, two in zip(found, expected, strict=True) if one is not None and two is not None]
    difference = torch.stack([(one - two).double().norm() for one, two in pairs]).norm()
    size = torch.stack([two.double().norm() for _, two in pairs]).norm()
    return float(difference / size.clamp(min=_SMALLEST))


def _is_coarse(device: torch.device) -> bool:
    """Whether products may be rounded to TF32 or to autocast's dtype."""
    return device.type != "cpu" or torch.is_autocast_enabled(device.type)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
