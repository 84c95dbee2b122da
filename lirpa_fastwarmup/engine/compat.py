"""Lets the installed auto_LiRPA import and run on the installed PyTorch and numpy.

auto_LiRPA 0.3, the newest release on PyPI, was written for PyTorch 1.12 and numpy 1. Four names that
it uses are gone since; each is supplied here, and only where it is missing, so that a release that
needs nothing (0.7 and later) is left untouched. No file of the engine is edited.

Two names are read once, while the engine is imported, and are taken away again afterwards; two are
read at every conversion and stay.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.onnx.symbolic_helper as symbolic_helper

logger = logging.getLogger(__name__)

INSTALL_HINT = (
    "Install one of:\n"
    "    pip install --no-deps auto_LiRPA==0.3\n"
    "    pip install --no-deps git+https://github.com/Verified-Intelligence/auto_LiRPA.git\n"
    "(--no-deps, because the engine's metadata asks for versions of torch that exclude a current one)."
)

# The opset whose operators 0.3 knows how to read: later ones turn the axes of Squeeze, Unsqueeze and
# ReduceSum from attributes into inputs.
_OPSET = 12


def _export_globals() -> Any:
    """The settings of torch's TorchScript exporter; the module moved in PyTorch 2.9."""
    for name in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
        try:
            return importlib.import_module(name).GLOBALS
        except ModuleNotFoundError:
            continue
    raise ImportError(f"torch {torch.__version__} has no TorchScript exporter, which auto_LiRPA converts networks with")


@contextmanager
def preserved_export_settings() -> Iterator[None]:
    """Undo, on leaving, what converting a network changes in torch's process-wide export settings."""
    settings = _export_globals()
    saved = dict(vars(settings))
    try:
        yield
    finally:
        vars(settings).update(saved)


def _set_opset_version(version: int) -> None:
    _export_globals().export_onnx_opset_version = version


def _node_getitem(node: Any, name: str) -> Any:
    return symbolic_helper._node_get(node, name)


@contextmanager
def _names_read_at_import() -> Iterator[None]:
    """Supply the two names that 0.3 imports from torch and numpy, for as long as the import lasts."""
    undo: list[Callable[[], object]] = []
    # numpy.lib.arraysetops became private in numpy 2.0; 0.3 imports (and never calls) its `isin`.
    if not hasattr(np.lib, "arraysetops"):
        stand_in = ModuleType("numpy.lib.arraysetops")
        stand_in.isin = np.isin  # type: ignore[attr-defined]
        sys.modules[stand_in.__name__] = stand_in
        undo.append(lambda: sys.modules.pop(stand_in.__name__, None))
    # symbolic_helper._set_opset_version went in PyTorch 1.13, when the setting moved to GLOBALS.
    if not hasattr(symbolic_helper, "_set_opset_version"):
        symbolic_helper._set_opset_version = _set_opset_version  # type: ignore[attr-defined]
        undo.append(lambda: delattr(symbolic_helper, "_set_opset_version"))
    try:
        yield
    finally:
        for step in undo:
            step()


def _names_taken() -> list[str]:
    """Of the names offered during the import, those that this release of the engine took."""
    taken = []
    if not hasattr(np.lib, "arraysetops") and hasattr(sys.modules["auto_LiRPA.operators.base"], "isin"):
        taken.append("numpy.lib.arraysetops")
    if getattr(sys.modules["auto_LiRPA.parse_graph"], "_set_opset_version", None) is _set_opset_version:
        taken.append("torch.onnx.symbolic_helper._set_opset_version")
    return taken


@contextmanager
def silenced_warnings() -> Iterator[None]:
    """Swallow warnings, also where the process turns them into errors, and restore its filters."""
    # Recorded rather than ignored: the engine sets a filter of its own, which would lift ours.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        yield


@contextmanager
def _import_without_side_effects() -> Iterator[None]:
    """Keep the engine's import from changing the process: root log handlers and warning filters."""
    handlers = list(logging.root.handlers)
    with silenced_warnings():
        try:
            yield
        finally:
            # The engine calls logging.basicConfig, after which the user's own call would do nothing.
            logging.root.handlers[:] = handlers


def _supply_node_subscript() -> list[str]:
    """torch._C.Node lost its subscript in PyTorch 1.13; 0.3 reads each node's attributes with it."""
    node_class = torch._C.Node
    # Later releases read attributes through symbolic_helper and bring a function for it.
    if hasattr(sys.modules["auto_LiRPA.parse_graph"], "get_node_attribute"):
        return []
    if getattr(node_class, "__getitem__", None) is not _node_getitem:
        if hasattr(node_class, "__getitem__"):
            return []
        setattr(node_class, "__getitem__", _node_getitem)  # noqa: B010 (mypy takes it for a method)
    return ["torch._C.Node.__getitem__"]


def _supply_named_members(bounded_module: Any) -> list[str]:
    """Module._named_members takes remove_duplicate since PyTorch 2.0; 0.3 overrides it without."""
    members = bounded_module._named_members
    if getattr(members, "_is_patch", False):
        return ["auto_LiRPA.BoundedModule._named_members"]
    if "remove_duplicate" in members.__code__.co_varnames:
        return []

    def _named_members(
        self: Any,
        get_members_fn: Any,
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, Any]]:
        # The engine's own always drops duplicates, which is what every caller but one asks for.
        return members(self, get_members_fn, prefix=prefix, recurse=recurse)

    _named_members._is_patch = True  # type: ignore[attr-defined]
    bounded_module._named_members = _named_members
    return ["auto_LiRPA.BoundedModule._named_members"]


def load_engine() -> tuple[Any, tuple[str, ...]]:
    """Import auto_LiRPA, supplying what it lacks. Returns it and the names of the active patches.

    Calling it again changes nothing and returns the same.

    Raises:
        ImportError: no engine is installed (the text says how to install one), or it lacks a package.
    """
    with _names_read_at_import(), _import_without_side_effects():
        try:
            engine = importlib.import_module("auto_LiRPA")
        except ModuleNotFoundError as error:
            if error.name == "auto_LiRPA":
                raise ImportError(
                    f"lirpa_fastwarmup needs the auto_LiRPA engine, and none is installed. {INSTALL_HINT}"
                ) from error
            raise ImportError(
                f"auto_LiRPA is installed, but the package {error.name!r} that it imports is not: "
                f"pip install {error.name}"
            ) from error
    patches = (*_names_taken(), *_supply_node_subscript(), *_supply_named_members(engine.BoundedModule))
    return engine, patches


engine, ACTIVE_PATCHES = load_engine()
ENGINE_VERSION: str = engine.__version__


def node_classes(*operators: str) -> Any:
    """The engine's node classes of these operators ("Relu", "Conv"), as far as this release has them.

    A tuple of classes, typed ``Any`` because the engine is untyped and ours derive from them.
    """
    found = (getattr(engine.bound_general, f"Bound{name}", None) for name in operators)
    return tuple(cls for cls in found if cls is not None)
