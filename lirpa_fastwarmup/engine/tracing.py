"""Converting a network without leaving a trace of it: on the model, the process or the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from lirpa_fastwarmup.engine.compat import (
    ENGINE_VERSION,
    all_node_classes,
    preserved_export_settings,
    silenced_warnings,
)

# Reading a tensor's value into Python, or into a shape: what a trace cannot follow.
_READS_A_VALUE = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy", "is_nonzero"),
    *("equal", "allclose", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
}


class TracedPathWarning(UserWarning):
    """The network can take several paths; bounds hold for the one that was traced."""


@dataclass(frozen=True)
class Observation:
    """What one run of a network did.

    Attributes:
        output: what it returned.
        value_reads: ``file:line`` of each place of user code where a tensor's value was read.
        operations: names of the torch functions called, in order; calls of BatchNorm's counter left out.
        calls: how often each module was called, by name.
    """

    output: Any
    value_reads: list[str]
    operations: list[str]
    calls: dict[str, int]


class _Recorder(TorchFunctionMode):
    def __init__(self, counters: set[int]) -> None:
        super().__init__()
        self._counters = counters
        self.value_reads: list[str] = []
        self.operations: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (args and id(args[0]) in self._counters):
            name = getattr(func, "__name__", str(func))
            if name in _READS_A_VALUE:
                frame = traceback.extract_stack(limit=2)[0]
                self.value_reads.append(f"{frame.filename}:{frame.lineno}")
            # Dropout in evaluation mode is called too, and does nothing.
            active = kwargs.get("training", True) if "dropout" in name else None
            self.operations.append(name if active is None else f"{name} {active}")
        return func(*args, **kwargs)


@torch.no_grad()
def observe(model: nn.Module, inputs: Sequence[Tensor]) -> Observation:
    """Run ``model`` once, in the mode that it is in, and note what it does."""
    counters = {id(m.num_batches_tracked) for m in model.modules() if isinstance(m, _BatchNorm)}
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    handles = [module.register_forward_pre_hook(count(name)) for name, module in model.named_modules()]
    try:
        with _Recorder(counters) as recorder:
            output = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Observation(output, list(dict.fromkeys(recorder.value_reads)), recorder.operations, calls)


def untraceable(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Observation, list[str]]:
    """Observe ``model`` in evaluation mode; also return why a trace would not hold for every input and mode.

    Changes the mode of ``model`` and its statistics: call it under :func:`unchanged`.

    Raises:
        NotImplementedError: BatchNorm without running statistics, of which there is no bound.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise NotImplementedError(
                f"{name!r} normalises every batch by itself, also in evaluation (track_running_stats=False): the "
                "output for one input then depends on the others, and has no bound of its own. Use running statistics"
            )
    if any(len(x) == 1 for x in inputs):
        inputs = [torch.cat([x, x]) for x in inputs]  # BatchNorm cannot be trained on one sample.
    observed = observe(model.eval(), inputs)
    reasons = [f"it reads the value of a tensor at {place}" for place in observed.value_reads]
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()  # Known, and refused where it is active.
    if observe(model, inputs).operations != observed.operations:
        reasons.append("it computes something else in training mode")
    model.eval()
    return observed, reasons


def active_dropout(model: nn.Module) -> list[str]:
    """Names of the Dropout modules that are drawing masks at present."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _DropoutNd) and module.training and module.p
    ]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give ``model`` back as it was: buffers, mode of every module, requires_grad, random state."""
    modes = [(module, module.training) for module in model.modules()]
    needs_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in needs_grad:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                saved = buffers[name].to(buffer.device)
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Keep the engine's conversion silent, and turn its failures into one clear error.

    Raises:
        NotImplementedError: the engine has no bound for an operator of the network.
    """
    log = logging.getLogger("auto_LiRPA.utils")
    collector = _Collector()
    propagated, log.propagate = log.propagate, False
    log.addHandler(collector)
    try:
        with (
            preserved_export_settings(),
            silenced_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    except NotImplementedError as error:
        raise NotImplementedError(_unsupported(collector.messages, error)) from error
    except (AssertionError, IndexError, KeyError, AttributeError) as error:
        raise NotImplementedError(
            f"auto_LiRPA {ENGINE_VERSION} failed while converting the network ({type(error).__name__}: {error}); it is "
            "built from an operator in a form that this release does not expect"
        ) from error
    finally:
        log.removeHandler(collector)
        log.propagate = propagated


def supported_operators() -> list[str]:
    """The ONNX operators that the installed engine has bounds for."""
    names = {cls.__name__.removeprefix("Bound") for cls in all_node_classes()}
    return sorted(name for name in names if not name.endswith(("Grad", "Input", "Params", "Buffers", "Activation")))


def _unsupported(messages: list[str], error: NotImplementedError) -> str:
    operators = sorted({m.split(",")[0].removeprefix("Name: ") for m in messages if m.startswith("Name: ")})
    if not operators:
        return f"auto_LiRPA {ENGINE_VERSION} could not convert the network: {error}"
    return (
        f"auto_LiRPA {ENGINE_VERSION} has no bounds for the operator(s) {', '.join(operators)} of this network. "
        "Replace them by operators that it supports, or pass custom_ops. "
        f"It supports: {', '.join(supported_operators())}."
    )
