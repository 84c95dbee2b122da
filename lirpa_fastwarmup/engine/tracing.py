"""Converts networks without side effects on the model or the process, and names the place of failures."""

import copy
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.operators import operator_of
from lirpa_fastwarmup.engine.places import Places, by_place, quiet_engine
from lirpa_fastwarmup.memory import is_out_of_memory

_OURS = ("auto_LiRPA", "lirpa_fastwarmup")
_LIBRARIES = {"torch", *sys.stdlib_module_names} - {"__main__"}


class TracedPathWarning(UserWarning):
    """The network can take several paths; bounds hold for the one that was traced."""


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
    text = f"auto_LiRPA {ENGINE_VERSION} {text}.{advice} Write the network with tested operators (docs/operators.md)"
    return NotImplementedError(text + (", or pass custom_ops and allow_untested=True" if are_unknown else ""))


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
