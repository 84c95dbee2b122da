"""Converting a network without leaving a trace of it: on the model, the process or the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lirpa_fastwarmup.engine.compat import (
    ENGINE_VERSION,
    all_node_classes,
    preserved_export_settings,
    silenced_warnings,
)

# Reading a tensor's value into Python: what a trace cannot follow.
_READS_A_VALUE = {"__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy"}


class DataDependentControlFlowWarning(UserWarning):
    """The network reads tensor values in Python; bounds hold for the path that the example took."""


class _ValueReads(TorchFunctionMode):
    """Notes the places of user code where the value of a tensor is read into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS_A_VALUE:
            frame = traceback.extract_stack(limit=2)[0]
            self.places.append(f"{frame.filename}:{frame.lineno}")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def value_reads(model: nn.Module, inputs: Sequence[Tensor]) -> list[str]:
    """Run ``model`` once; return ``file:line`` of each place where it reads a tensor's value."""
    with _ValueReads() as reads:
        model(*inputs)
    return list(dict.fromkeys(reads.places))


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
                if not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


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
            f"auto_LiRPA {ENGINE_VERSION} failed while converting the network "
            f"({type(error).__name__}: {error}). Its operators are: {', '.join(supported_operators())}."
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
