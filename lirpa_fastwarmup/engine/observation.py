"""Watches runs of a network: the torch functions that it calls, and what a trace of it would miss."""

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lirpa_fastwarmup.engine.places import quiet_engine

# Functions that read a tensor's value into Python or into a shape, which a trace cannot follow.
_READS_A_VALUE = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
    *("__format__", "__repr__", "__dlpack__", "item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
    *("data_ptr", "storage", "untyped_storage", "__reduce_ex__"),
}
_COPIES_VALUES = {"tensor", "new_tensor", "as_tensor", "asarray"}  # From lists of tensors.
_NOT_THE_USERS = __file__, str(Path(torch.__file__).parent)
_LINEAR_FROM = 20  # Softplus is the identity beyond, within 2e-9.


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


class _Inner(TorchDispatchMode):
    """Passes on what torch functions do inside: reads of scalars, such as of a tensor given as a number, and set_."""

    look: Callable[[str, Any, Any, Any], None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.set_):
            self.look("item" if len(args) == 1 else "set_", args, {}, None)
        return func(*args, **(kwargs or {}))


class _Call(NamedTuple):
    """A call of a torch function; tensors by their ids."""

    name: str  # "" if it returns no floating-point tensors.
    numbers: list[float]
    stale: str  # What is wrong with a tensor that it reads, if it is.
    made: set[int]  # Returned or changed.
    given: set[int]


class Observation(Recorder):
    """What one run of a network does, in its current mode, without gradients unless ``grad``.

    ``value_reads`` holds ``file:line`` of each call in user code that reads a tensor's value, ``constants`` the buffers
    that are read, by name, ``norm_modes`` whether each functional batch_norm uses the batch's statistics (of modules
    only where that is not their mode), ``altered`` calls that the exporter alters, and what to write instead.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], *, grad: bool = False) -> None:
        super().__init__(self._inspect)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._counters = {id(module.num_batches_tracked) for module in norms}
        self._norms = {id(module.running_mean): module for module in norms}
        self._buffers = {_storage(tensor) or -1: (name, tensor) for name, tensor in model.named_buffers()}
        self.constants: dict[str, Tensor] = {}
        self.value_reads: dict[str, None] = {}
        self.operations: list[str] = []
        # Those of floats that the output depends on, and the numbers among their arguments; the last first.
        self.computations: list[tuple[str, list[float]]] = []
        self._calls: list[_Call] = []
        self._of_sizes: set[int] = set()  # Ids of what a trace computes from sizes, which are numbers elsewhere.
        self._seen: dict[int, tuple[int, Tensor]] = {}  # Every tensor, with its place in time; so no id is used twice.
        self._written: dict[int, tuple[int, Tensor, str]] = {}  # By storage: when, by which tensor and by what call.
        self.norm_modes: list[bool] = []
        self.altered: list[str] = []
        inner = _Inner()
        inner.look = self._inspect
        with torch.set_grad_enabled(grad), inner:
            self.output = self.run(model, inputs)
        for one in _strided(inputs):
            if written := self._written.get(one.untyped_storage()._cdata):
                text = f"{written[2]}, which changes its input in place, so that a box around it would change too: "
                self.altered.append(text + "remove inplace=True from the first operation, or copy the input")
        self._keep_ancestors([*inputs, *model.parameters(), *model.buffers()])
        self._seen, self._written, self._calls = {}, {}, []  # They hold every tensor of the run.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name, stale = _strided((args, kwargs)), getattr(func, "__name__", str(func)), ""
        versions = [one._version for one in given]
        for one in given:
            when, writer, how = self._written.get(one.untyped_storage()._cdata, (0, one, ""))
            if self._time_of(one) < when and one is not writer and not _reads_shape_alone(name, one, args):
                stale = f"{how}, which changes in place what {name} then reads through another tensor (a view, "
                stale += "detach() or .data): use an operation that is not in place"
        if getattr(func, "__self__", None) is Tensor.data:
            stale = ".data, of which a trace keeps the values alone: use detach()"
        result = super().__torch_function__(func, types, args, kwargs)
        changed = [one for one, version in zip(given, versions, strict=True) if one._version != version]
        for one in reversed(changed):  # The first argument last, because views of one tensor share a version.
            self._written[one.untyped_storage()._cdata] = len(self._seen), one, name
        made = _strided(result)
        for one in made:
            self._time_of(one)
        of_sizes = {id(one) for one in made if not one.ndim and given and all(self._is_size(other) for other in given)}
        self._of_sizes |= of_sizes
        is_float = any(one.is_floating_point() for one in made) and not of_sizes
        leaves, changes = tree_leaves((args, kwargs)) if is_float else [], {*map(id, [*made, *changed])}
        numbers = [float(one) for one in leaves if isinstance(one, float | int) or self._is_size(one)]
        self._calls.append(_Call(name if is_float else "", numbers, stale, changes, {*map(id, given)}))
        return result

    def _is_size(self, one: Any) -> bool:
        return bool(_strided(one)) and one.ndim == 0 and (not one.is_floating_point() or id(one) in self._of_sizes)

    def _keep_ancestors(self, known: Sequence[Tensor]) -> None:
        """Keep what the output depends on; all calls, if a part of it was made unseen."""
        needed, calls = {*map(id, _strided(self.output))}, list[_Call]()
        for call in reversed(self._calls):
            if call.made & needed:
                needed |= call.given
                calls.append(call)
        unseen = needed.difference(map(id, known), *(call.made for call in self._calls))
        calls = self._calls if unseen else calls
        self.computations = [(call.name, call.numbers) for call in calls if call.name]
        self.altered += [call.stale for call in calls if call.stale]

    def _time_of(self, one: Tensor) -> int:
        return self._seen.setdefault(id(one), (len(self._seen), one))[0]

    def _inspect(self, name: str, args: Any, kwargs: Any, _: Any) -> None:
        first = id(args[0]) if args else None
        if first in self._counters:
            return
        masks = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        copies = name in _COPIES_VALUES and any(isinstance(one, list | tuple) and _strided(one) for one in args)
        reads = name in _READS_A_VALUE or masks or copies or (name == "where" and len(args) == 1)
        if reads and (known := self._buffers.get(_storage(args[0]) or 0)):  # Training seldom changes them.
            self.constants[known[0]] = known[1].detach().clone()
        elif reads:
            stack = reversed(traceback.extract_stack())
            frame = next(one for one in stack if not one.filename.startswith(_NOT_THE_USERS))
            self.value_reads[f"{frame.filename}:{frame.lineno}"] = None
        if name == "batch_norm":
            by_batch = bool(args[5] if len(args) > 5 else kwargs.get("training", False))
            module = self._norms.get(id(args[1] if len(args) > 1 else None))
            if module is None or by_batch != module.training:
                self.norm_modes.append(by_batch)
        self.altered += _altered_by_export(name, args, kwargs)
        if name == "set_" or (name == "__set__" and isinstance(args[1], Tensor)):
            self.altered.append("set_ or an assignment to the data of a tensor: compute another tensor")
        # Dropout is also called in evaluation mode, where it does nothing.
        random = "dropout" in name or name == "rrelu"
        self.operations.append(f"{name} {kwargs.get('training', True)}" if random else name)


def _reads_shape_alone(name: str, one: Tensor, args: Any) -> bool:
    return name.endswith("_like") or name.startswith("new_") or (name.endswith("_as") and one is not args[0])


def _strided(value: Any) -> list[Tensor]:
    """The tensors in ``value`` that have storage and versions."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return [one for one in tensors if one.layout == torch.strided and not one.is_inference() and not wrapped(one)]


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and _strided(value) else None


def _altered_by_export(name: str, args: Any, kwargs: Any) -> list[str]:
    """Calls that the exporter silently turns into another function, which random inputs seldom reveal."""
    if name == "softplus" and (args[2] if len(args) > 2 else kwargs.get("threshold", _LINEAR_FROM)) < _LINEAR_FROM:
        return [f"softplus with a threshold below {_LINEAR_FROM}, which the exporter drops: use the default one"]
    if name == "embedding" and (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None:
        return ["embedding with max_norm, which changes the weights that it reads: normalise them before"]
    if "dropout" in name and kwargs.get("training", True) and kwargs.get("p", 0.5):
        return [f"{name} that is on in evaluation mode: use nn.Dropout"]
    return []


def untraceable(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Observation, list[str]]:
    """Observe ``model`` in evaluation mode; also return why a trace would not hold for every input and mode.

    Refuses BatchNorm without running statistics and calls that the exporter alters. Call it under :func:`unchanged`.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            text = f"{name or 'the network'} is wrapped by torch.compile, which hides it from the engine: pass its "
            raise NotImplementedError(text + "compiled._orig_mod. ShortWarmup(compile=True) compiles training steps")
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            text = f"{name!r} normalises every batch by itself, also in evaluation (track_running_stats=False), so "
            raise NotImplementedError(text + "one input alone has no output to bound: use running statistics")
    first = Observation(model.eval(), inputs)  # It may build state.
    observed = Observation(model, inputs)
    for name, value in first.constants.items():
        again = observed.constants.get(name)
        if again is None or not torch.allclose(value, again, 0, 0, equal_nan=True):
            observed.constants.pop(name, None)
            observed.value_reads[f"every call, of the buffer {name!r}"] = None
    if observed.altered:
        raise NotImplementedError(f"the network calls {observed.altered[0]}")
    reasons = [f"it reads the value of a tensor at {place}" for place in observed.value_reads]
    if _differs_in_training(model, inputs):
        reasons.append("it computes something else in training mode")
    _require_same_when_traced(model.eval(), inputs, observed)
    return observed, reasons


class _Observed(nn.Sequential):
    """A model to be traced, and what it does then."""

    def forward(self, *inputs: Tensor) -> Any:
        self.found = Observation(self[0], inputs, grad=True)
        return self.found.output


def _require_same_when_traced(model: nn.Module, inputs: Sequence[Tensor], evaluated: Observation) -> None:
    observed = _Observed(model).eval()
    try:
        with quiet_engine():
            graph, _ = torch.jit._get_trace_graph(observed, tuple(inputs))  # type: ignore[attr-defined]
    except Exception:  # The conversion will fail too, and name the place.
        return
    functions = [node for node in graph.nodes() if node.kind() == "prim::PythonOp"]
    if named := [one.pyname() for one in functions if hasattr(getattr(one.pyobj(), "__self__", None), "symbolic")]:
        text = f"the network calls {named[0]}, an autograd.Function whose symbolic() may be another function than its "
        raise NotImplementedError(text + "forward(): write it with PyTorch's operators alone")
    one, other = observed.found.computations, evaluated.computations
    same = [(name, len(numbers)) for name, numbers in one] == [(name, len(numbers)) for name, numbers in other]
    pairs = zip(one, other, strict=False)  # Numbers that a trace computes from sizes are rounded.
    if not same or not all(np.allclose(found[1], expected[1], 1e-5, 0, equal_nan=True) for found, expected in pairs):
        text = "the network computes something else while it is traced with gradients, as for its bounds, than in use: "
        raise NotImplementedError(text + "remove the branch (on torch.jit.is_tracing or torch.is_grad_enabled)")


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
