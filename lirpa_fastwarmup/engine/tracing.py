"""Converting a network without leaving a trace of it: on the model, the process or the terminal."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
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
    preserved_export_settings,
    silenced_warnings,
)
from lirpa_fastwarmup.engine.operators import OPERATORS
from lirpa_fastwarmup.memory import is_out_of_memory

# Reading a tensor's value into Python, or into a shape: what a trace cannot follow.
_READS_A_VALUE = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
}


_LINEAR_FROM = 20  # Softplus is the identity beyond, within 2e-9.


class TracedPathWarning(UserWarning):
    """The network can take several paths; bounds hold for the one that was traced."""


@dataclass(frozen=True)
class Observation:
    """What one run of a network did.

    Attributes:
        output: what it returned.
        value_reads: ``file:line`` of each place of user code where a tensor's value was read.
        operations: names of the torch functions called, in order; calls of BatchNorm's counter left out.
        norm_modes: of each functional batch_norm, whether it used the statistics of the batch.
        altered: calls that the exporter would make another function of, and what to write instead.
        calls: how often each module was called, by name.
    """

    output: Any
    value_reads: list[str]
    operations: list[str]
    norm_modes: list[bool]
    altered: list[str]
    calls: dict[str, int]


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._counters = {id(module.num_batches_tracked) for module in norms}
        self._statistics = {id(module.running_mean) for module in norms}
        self._constants = {id(tensor) for tensor in model.buffers()}  # Training changes parameters.
        self.value_reads: list[str] = []
        self.operations: list[str] = []
        self.norm_modes: list[bool] = []
        self.altered: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = id(args[0]) if args else None
        if first not in self._counters:
            name = getattr(func, "__name__", str(func))
            if first not in self._constants and self._reads_a_value(name, args):
                frame = traceback.extract_stack(limit=2)[0]
                self.value_reads.append(f"{frame.filename}:{frame.lineno}")
            if name == "batch_norm" and id(args[1] if len(args) > 1 else None) not in self._statistics:
                self.norm_modes.append(bool(args[5] if len(args) > 5 else kwargs.get("training", False)))
            self.altered += _altered_by_export(name, args, kwargs)
            # Dropout in evaluation mode is called too, and does nothing.
            active = kwargs.get("training", True) if "dropout" in name else None
            self.operations.append(name if active is None else f"{name} {active}")
        return func(*args, **kwargs)

    @staticmethod
    def _reads_a_value(name: str, args: Any) -> bool:
        masks = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        return name in _READS_A_VALUE or masks or (name == "where" and len(args) == 1)


def _altered_by_export(name: str, args: Any, kwargs: Any) -> list[str]:
    """What the exporter would silently make another function of, and random inputs seldom show."""
    if name == "softplus" and (args[2] if len(args) > 2 else kwargs.get("threshold", _LINEAR_FROM)) < _LINEAR_FROM:
        return [f"softplus with a threshold below {_LINEAR_FROM}, which the exporter drops: use the default one"]
    if "dropout" in name and kwargs.get("training", True) and kwargs.get("p", 0.5):
        return [f"{name} that is on in evaluation mode: use nn.Dropout"]
    return []


@torch.no_grad()
def observe(model: nn.Module, inputs: Sequence[Tensor]) -> Observation:
    """Run ``model`` once, in the mode that it is in, and note what it does."""
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    handles = [module.register_forward_pre_hook(count(name)) for name, module in model.named_modules()]
    try:
        with _Recorder(model) as recorder:
            output = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    reads = list(dict.fromkeys(recorder.value_reads))
    return Observation(output, reads, recorder.operations, recorder.norm_modes, recorder.altered, calls)


def untraceable(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Observation, list[str]]:
    """Observe ``model`` in evaluation mode; also return why a trace would not hold for every input and mode.

    Changes the mode of ``model`` and its statistics: call it under :func:`unchanged`.

    Raises:
        NotImplementedError: BatchNorm without running statistics, of which there is no bound; or a call that the
            exporter would make another function of.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise NotImplementedError(
                f"{name!r} normalises every batch by itself, also in evaluation (track_running_stats=False): the "
                "output for one input then depends on the others, and has no bound of its own. Use running statistics"
            )
    observe(model.eval(), inputs)  # What the network builds at its first call is built now.
    observed = observe(model, inputs)
    if observed.altered:
        raise NotImplementedError(f"the network calls {observed.altered[0]}")
    reasons = [f"it reads the value of a tensor at {place}" for place in observed.value_reads]
    if _differs_in_training(model, inputs):
        reasons.append("it computes something else in training mode")
    model.eval()
    return observed, reasons


def _differs_in_training(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    if any(len(x) == 1 for x in inputs):
        inputs = [torch.cat([x, x]) for x in inputs]  # BatchNorm cannot be trained on one sample.
    try:
        evaluating = observe(model.eval(), inputs)
        model.train()
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.eval()  # Known, and refused where it is active.
        training = observe(model, inputs)
    except (RuntimeError, ValueError):
        return False  # It takes one sample only, and cannot be trained on it.
    # A functional batch_norm is bounded in the model's mode, whatever it was told.
    norms_follow = not any(evaluating.norm_modes) and all(training.norm_modes)
    return training.operations != evaluating.operations or not norms_follow


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
                saved = buffers.get(name)  # A buffer that the first call registered has no earlier state.
                if saved is not None and not torch.equal(buffer, saved.to(buffer.device)):
                    buffer.copy_(saved)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of a module that keeps a computed tensor (a pruned weight) with the graph of its last pass."""
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


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
    except Exception as error:  # The network itself has run on these inputs: what fails is its conversion.
        if is_out_of_memory(error):
            raise
        raise NotImplementedError(
            f"auto_LiRPA {ENGINE_VERSION} failed while converting the network ({type(error).__name__}: {error}); it is "
            f"built from {_failed_operator(error)} in a form that this release does not expect: write it with other "
            "operators"
        ) from error
    finally:
        log.removeHandler(collector)
        log.propagate = propagated


def _failed_operator(error: BaseException) -> str:
    """The operator that a conversion failed at, with its attributes, from what the engine's functions were at."""
    found = "an operator"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        nodes, number, node = (frame.f_locals.get(name) for name in ("nodesOP", "n", "self"))
        if isinstance(nodes, list) and isinstance(number, int) and number < len(nodes):
            found = _described(str(nodes[number].op).removeprefix("onnx::"), nodes[number].attr)
        elif type(node).__module__.startswith("auto_LiRPA.operators") and isinstance(vars(node).get("attr"), dict):
            found = _described(type(node).__name__.removeprefix("Bound"), vars(node)["attr"])
    return found


def _described(name: str, attributes: Any) -> str:
    shown = {key: value for key, value in dict(attributes).items() if not isinstance(value, torch.device)}
    return f"the operator {name}{f' with {shown}' if shown else ''}"


def _operator(message: str) -> str:
    """The operator that a line of the engine's log, "Name: …, Attr: {…}", is about."""
    # What ONNX has no name for is exported as ATen, with its own name among the attributes.
    hidden = re.search(r"'operator': '(\w+)'", message)
    return f"aten::{hidden[1]}" if hidden else message.split(",")[0].removeprefix("Name: ")


def _unsupported(messages: list[str], error: NotImplementedError) -> str:
    operators = sorted({_operator(m) for m in messages if m.startswith("Name: ")})
    if not operators:
        return f"auto_LiRPA {ENGINE_VERSION} could not convert the network: {error}"
    return (
        f"auto_LiRPA {ENGINE_VERSION} has no bounds for the operator(s) {', '.join(operators)} of this network. "
        f"Replace them by operators whose bounds have been tested ({', '.join(OPERATORS)}), or pass custom_ops and "
        "allow_untested=True"
    )
