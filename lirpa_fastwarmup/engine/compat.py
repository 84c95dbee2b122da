"""Imports the installed auto_LiRPA, with the names that 0.3 lacks on newer PyTorch and numpy (see docs/engines.md)."""

import functools
import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.onnx.symbolic_helper as symbolic_helper
from torch import Tensor


def _exporter_module(name: str) -> Any:
    """A module of torch's TorchScript exporter, which moved in PyTorch 2.9."""
    for package in ("torch.onnx._internal.torchscript_exporter", "torch.onnx"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(f"{package}.{name}")
    raise ImportError(f"torch {torch.__version__} has no TorchScript exporter, which auto_LiRPA converts networks with")


@contextmanager
def preserved_export_settings() -> Iterator[None]:
    """Convert with opset 10, and restore torch's process-wide export settings on exit.

    PyTorch registers later opsets on demand, so an export with one of them would change later conversions.
    """
    settings = _exporter_module("_globals").GLOBALS
    with ExitStack() as stack:
        stack.callback(vars(settings).update, dict(vars(settings)))
        stack.callback(_opset.reset, _opset.set(_OPSET))
        settings.export_onnx_opset_version = _OPSET
        yield


@contextmanager
def silenced_warnings() -> Iterator[None]:
    """Discard warnings, also where the process turns them into errors, and restore its filters."""
    # Recorded, not ignored: the engine sets a filter of its own, which would override one that ignores them.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        yield


_OPSET = 10
_opset: ContextVar[int | None] = ContextVar("_opset", default=None)  # Of conversions by this package.


def _set_opset_version(version: int) -> None:
    _exporter_module("_globals").GLOBALS.export_onnx_opset_version = _opset.get() or version


def _import_engine() -> Any:
    """Import auto_LiRPA without side effects on logging and warnings, and with the two names that 0.3 imports."""
    with silenced_warnings(), ExitStack() as stack:
        # The engine calls logging.basicConfig, after which the user's own call would do nothing.
        stack.callback(setattr, logging.root, "handlers", list(logging.root.handlers))
        if not hasattr(np.lib, "arraysetops"):  # Private since numpy 2.0; 0.3 imports (and never calls) its `isin`.
            stand_in = ModuleType("numpy.lib.arraysetops")
            stand_in.isin = np.isin  # type: ignore[attr-defined]
            sys.modules[stand_in.__name__] = stand_in
            stack.callback(sys.modules.pop, stand_in.__name__, None)
        if not hasattr(symbolic_helper, "_set_opset_version"):  # Moved to the exporter's settings in PyTorch 1.13.
            symbolic_helper._set_opset_version = _set_opset_version  # type: ignore[attr-defined]
            stack.callback(delattr, symbolic_helper, "_set_opset_version")
        try:
            return importlib.import_module("auto_LiRPA")
        except ModuleNotFoundError as error:
            if error.name != "auto_LiRPA":
                missing = f"a package that it imports is not: pip install {error.name}"
                raise ImportError(f"auto_LiRPA is installed, but {missing}") from error
            raise ImportError(
                "lirpa_fastwarmup needs the auto_LiRPA engine, and none is installed. Install one of:\n"
                "    pip install --no-deps auto_LiRPA==0.3\n"
                "    pip install --no-deps git+https://github.com/Verified-Intelligence/auto_LiRPA.git\n"
                "(--no-deps, because its metadata asks for torch < 2.9, and in 0.3 for < 1.13; see docs/engines.md)."
            ) from error


def _patch(bounded_module: Any) -> Iterator[str]:
    """Supply the two names that 0.3 reads at every conversion, and yield the names of all four that it uses."""
    parser = sys.modules["auto_LiRPA.parse_graph"]
    if not hasattr(np.lib, "arraysetops") and hasattr(sys.modules["auto_LiRPA.operators.base"], "isin"):
        yield "numpy.lib.arraysetops"
    if getattr(parser, "_set_opset_version", None) is _set_opset_version:
        yield "torch.onnx.symbolic_helper._set_opset_version"
    # torch._C.Node lost its subscript in PyTorch 1.13; later releases read attributes with a function of their own.
    if not hasattr(parser, "get_node_attribute") and not hasattr(torch._C.Node, "__getitem__"):
        setattr(torch._C.Node, "__getitem__", lambda node, name: symbolic_helper._node_get(node, name))  # noqa: B010
        yield "torch._C.Node.__getitem__"
    # PyTorch 2.0 passes remove_duplicate, which 0.3's override lacks; it always removes duplicates.
    members = bounded_module._named_members
    if "remove_duplicate" not in members.__code__.co_varnames:

        def _named_members(self: Any, *args: Any, remove_duplicate: bool = True, **kwargs: Any) -> Any:
            return members(self, *args, **kwargs)

        bounded_module._named_members = _named_members
        yield "auto_LiRPA.BoundedModule._named_members"


RECORD = "_fastwarmup_record"


@dataclass(frozen=True)
class Record:
    """What an engine module was built from, the model's buffers before and after, and the module's copies of them."""

    model: Any
    arguments: dict[str, Any]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    copies: dict[str, Tensor]


def _record_models(bounded_module: Any) -> None:
    """Let every engine module keep a :class:`Record`, which it needs to be used as a view of its model."""
    build = bounded_module.__init__

    @functools.wraps(build)
    def build_and_record(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(build).bind(self, *args, **kwargs).arguments
        model = arguments["model"]
        if type(self).__module__.partition(".")[0] == "lirpa_fastwarmup" or isinstance(model, bounded_module):
            build(self, *args, **kwargs)  # Of this package, or a shallow copy of a module that has its record.
            return
        before = _cloned(model.named_buffers())
        build(self, *args, **kwargs)
        copies = _cloned((node.ori_name, node.buffer) for node in self._modules.values() if hasattr(node, "buffer"))
        object.__setattr__(self, RECORD, Record(model, dict(arguments), before, _cloned(model.named_buffers()), copies))

    bounded_module.__init__ = build_and_record


def _cloned(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


engine: Any = _import_engine()
_exporter_module("symbolic_opset11")  # It registers gather, without which the engine cannot convert its loss fusion.
ACTIVE_PATCHES: tuple[str, ...] = tuple(_patch(engine.BoundedModule))
_record_models(engine.BoundedModule)
ENGINE_VERSION: str = engine.__version__
_ARGUMENTS = inspect.signature(engine.BoundedModule.compute_bounds).parameters
INTERMEDIATE = next(name for name in ("interm_bounds", "intermediate_layer_bounds") if name in _ARGUMENTS)  # 0.7, 0.3


def node_classes(*operators: str) -> Any:
    """A tuple of the engine's node classes of these operators ("Relu", "Conv"), as far as this release has them."""
    found = (getattr(engine.bound_general, f"Bound{name}", None) for name in operators)
    return tuple(cls for cls in found if cls is not None)
