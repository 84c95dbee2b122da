"""Converts networks without side effects on the model or the process, and names the place of failures."""

import copy
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.operators import operator_of
from lirpa_fastwarmup.engine.places import Places, by_place, quiet_engine
from lirpa_fastwarmup.memory import is_out_of_memory

_OURS = ("auto_LiRPA", "lirpa_fastwarmup")
_LIBRARIES = {"torch", *sys.stdlib_module_names} - {"__main__"}
# Functions that read a tensor's value into Python or into a shape, which a trace cannot follow.
_READS_A_VALUE = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
}
_LINEAR_FROM = 20  # Softplus is the identity beyond, within 2e-9.


class TracedPathWarning(UserWarning):
    """The network can take several paths; bounds hold for the one that was traced."""


class Recorder(TorchFunctionMode):
    """Runs a network and passes every call of a torch function to ``look(name, args, kwargs, result)``."""

    def __init__(self, look: Callable[[str, Any, Any, Any], None]) -> None:
        super().__init__()
        self._look = look
        self.running: list[str] = []  # The modules that are running, innermost last.
        self.calls: Counter[str] = Counter()  # How often each module was called, by name.

    def run(self, model: nn.Module, inputs: Sequence[Tensor]) -> Any:
        self._names = {module: name for name, module in model.named_modules()}
        with self, ExitStack() as hooks:
            for module in self._names:
                hooks.enter_context(module.register_forward_pre_hook(self._enter))
                hooks.enter_context(module.register_forward_hook(self._leave))
            return model(*inputs)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.calls[self._names[module]] += 1
        self.running.append(f"{self._names[module]!r} ({type(module).__name__})")

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._look(getattr(func, "__name__", str(func)), args, kwargs or {}, result)
        return result


class Observation(Recorder):
    """What one run of a network does, in its current mode.

    ``value_reads`` holds ``file:line`` of each call in user code that reads a tensor's value, ``constants`` the buffers
    that are read, by name, ``norm_modes`` whether each functional batch_norm uses the statistics of the batch (of
    modules only where that is not their mode), ``altered`` calls that the exporter turns into another function, and
    what to write instead.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__(self._inspect)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._counters = {id(module.num_batches_tracked) for module in norms}
        self._norms = {id(module.running_mean): module for module in norms}
        self._buffers = {id(tensor): name for name, tensor in model.named_buffers()}
        self.constants: dict[str, Tensor] = {}
        self.value_reads: dict[str, None] = {}
        self.operations: list[str] = []
        self.norm_modes: list[bool] = []
        self.altered: list[str] = []
        self.output = self.run(model, inputs)

    def _inspect(self, name: str, args: Any, kwargs: Any, _: Any) -> None:
        first = id(args[0]) if args else None
        if first in self._counters:
            return
        masks = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        reads = name in _READS_A_VALUE or masks or (name == "where" and len(args) == 1)
        if reads and first in self._buffers:  # Training changes parameters, and seldom buffers.
            self.constants[self._buffers[first]] = args[0].detach().clone()
        elif reads:
            frame = traceback.extract_stack(limit=3)[0]  # Of the code that called the function.
            self.value_reads[f"{frame.filename}:{frame.lineno}"] = None
        if name == "batch_norm":
            by_batch = bool(args[5] if len(args) > 5 else kwargs.get("training", False))
            module = self._norms.get(id(args[1] if len(args) > 1 else None))
            if module is None or by_batch != module.training:
                self.norm_modes.append(by_batch)
        self.altered += _altered_by_export(name, args, kwargs)
        # Dropout is also called in evaluation mode, where it does nothing.
        random = "dropout" in name or name == "rrelu"
        self.operations.append(f"{name} {kwargs.get('training', True)}" if random else name)


def _altered_by_export(name: str, args: Any, kwargs: Any) -> list[str]:
    """Calls that the exporter silently turns into another function, which random inputs seldom reveal."""
    if name == "softplus" and (args[2] if len(args) > 2 else kwargs.get("threshold", _LINEAR_FROM)) < _LINEAR_FROM:
        return [f"softplus with a threshold below {_LINEAR_FROM}, which the exporter drops: use the default one"]
    if "dropout" in name and kwargs.get("training", True) and kwargs.get("p", 0.5):
        return [f"{name} that is on in evaluation mode: use nn.Dropout"]
    return []


def untraceable(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Observation, list[str]]:
    """Observe ``model`` in evaluation mode; also return why a trace would not hold for every input and mode.

    Refuses BatchNorm without running statistics and calls that the exporter alters. Call it under :func:`unchanged`.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            text = f"{name or 'the network'} is wrapped by torch.compile, through which the engine does not see: pass "
            text += "the module that you compiled (compiled._orig_mod). "
            raise NotImplementedError(text + "ShortWarmup(compile=True) compiles the training step")
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            text = f"{name!r} normalises every batch by itself, also in evaluation (track_running_stats=False): the "
            text += "output for one input then depends on the others, "
            raise NotImplementedError(text + "and has no bound of its own. Use running statistics")
    first = Observation(model.eval(), inputs)  # It may build state.
    observed = Observation(model, inputs)
    for name, value in first.constants.items():
        again = observed.constants.pop(name, None)
        if again is not None and torch.allclose(value, again, 0, 0, equal_nan=True):
            observed.constants[name] = again
        else:
            observed.value_reads[f"every call, of the buffer {name!r}"] = None
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
        evaluating = Observation(model.eval(), inputs)
        model.train()
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.eval()  # BoundedModule refuses it when it is active.
        training = Observation(model, inputs)
    except (RuntimeError, ValueError):
        return False  # The network supports one sample only, and cannot be trained on it.
    # The engine bounds a functional batch_norm in the model's mode, whatever its argument.
    norms_follow = not any(evaluating.norm_modes) and all(training.norm_modes)
    return training.operations != evaluating.operations or not norms_follow


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore ``model`` on exit: buffers, mode of every module, requires_grad; and the random state."""
    before: list[tuple[Any, str, bool]] = [(module, "training", module.training) for module in model.modules()]
    before += [(parameter, "requires_grad", parameter.requires_grad) for parameter in model.parameters()]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                saved = buffers.get(name)  # A buffer that the first call registers has no earlier state.
                if saved is not None and not torch.equal(buffer, saved.to(buffer.device)):
                    buffer.copy_(saved)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of a module that stores a computed tensor (a pruned weight) with its autograd graph."""
    values = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


@contextmanager
def quiet_conversion(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Silence the engine's conversion, and turn its failures into a NotImplementedError that names the layer."""
    try:
        with quiet_engine():
            yield
    except Exception as error:  # The network itself ran on these inputs, so its conversion failed.
        if is_out_of_memory(error):
            raise
        raise _conversion_error(error, model, inputs) from error


def _conversion_error(error: Exception, model: nn.Module, inputs: Sequence[Tensor]) -> NotImplementedError:
    failed, are_unknown = _failed_operators(error)
    places = Places(model, inputs)
    found = [(operator, places.of_node(name)) for operator, name in failed]
    found = found or [places.of_call(re.findall(r"\w+", str(error)))]  # The exporter failed, and names a function.
    named = "; ".join(by_place((operator, f"in {layer}" if layer else "") for operator, layer in found))
    advice = "".join(dict.fromkeys(text for operator, layer in found if layer for text in layer.advice(operator)))
    # Assertions and lookup errors of the engine explain nothing; the traceback shows them.
    reason = f" ({error})" if isinstance(error, NotImplementedError) else ""
    text = f"has no bounds for the operator(s) {named}" if are_unknown else f"cannot convert {named}{reason}"
    return NotImplementedError(
        f"auto_LiRPA {ENGINE_VERSION} {text}.{advice} Write the network with tested operators (docs/operators.md)"
        f"{', or pass custom_ops and allow_untested=True' if are_unknown else ''}"
    )


def _failed_operators(error: BaseException) -> tuple[list[tuple[str, str]], bool]:
    """The operators and nodes at which a conversion failed, and whether they are unknown, from its variables."""
    found: list[tuple[str, str]] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        unknown, nodes, number = (frame.f_locals.get(name) for name in ("unsupported_ops", "nodesOP", "n"))
        if isinstance(unknown, list) and unknown:
            return [(_operator_in(entry), entry.name) for entry in unknown], True
        if isinstance(nodes, list) and isinstance(number, int) and number < len(nodes) and hasattr(nodes[number], "op"):
            found = [(_operator_in(nodes[number]), nodes[number].name)]  # Not yet a node of the engine.
        for node in (frame.f_locals.get("node"), frame.f_locals.get("self")):
            if isinstance(node, engine.bound_general.Bound) and isinstance(vars(node).get("name"), str):
                found = [(operator_of(node), node.name)]
    return found, False


def _operator_in(entry: Any) -> str:
    """The name of a traced operator; one that ONNX lacks is exported as ATen, with its own name as an attribute."""
    if isinstance(entry.attr.get("value"), str):
        return "Einsum"  # Its equation is a constant of its own, where conversion fails first.
    return f"aten::{entry.attr['operator']}" if "operator" in entry.attr else str(entry.op).removeprefix("onnx::")


@contextmanager
def named_failures(bounded: Any, method: str) -> Iterator[None]:
    """Turn the engine's exceptions into a NotImplementedError that names ``method`` and the place in the network.

    Exceptions of the user's own operators and out-of-memory errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        packages = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
        # The innermost code, libraries aside.
        origin = next((package for package in reversed(packages) if package not in _LIBRARIES), _OURS[0])
        if is_out_of_memory(error) or origin not in _OURS:
            raise
        place = _place(bounded, [frame for frame, package in zip(frames, packages, strict=True) if package in _OURS])
        reason = f" ({type(error).__name__}: {error})" if str(error) else ""
        text = f"auto_LiRPA {ENGINE_VERSION} failed in {method} {place}{reason}: use another method, or write the "
        raise NotImplementedError(text + "network with other operators") from error


def _place(bounded: Any, frames: list[FrameType]) -> str:
    nodes = {id(node) for node in bounded._modules.values()}
    for found in (frame.f_locals.get(name) for frame in reversed(frames) for name in ("self", "l", "node")):
        if isinstance(found, engine.bound_general.Bound) and id(found) in nodes:
            return f"at {operator_of(found)} {read_graph(bounded).place_of(found)}"
    return "on this network"
