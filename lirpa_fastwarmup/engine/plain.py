"""Accepts the engine's own BoundedModule where this package's is needed, through a view of the wrapped nn.Module.

The engine does not keep that nn.Module, and copies its buffers: :mod:`.compat` records both at building.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.batchnorm import share_batchnorm_state
from lirpa_fastwarmup.engine.compat import RECORD, Record, engine
from lirpa_fastwarmup.engine.equality import same_outputs
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.nodes import SharedParameter
from lirpa_fastwarmup.engine.tracing import unchanged

_VIEW = "_fastwarmup_view"
_BUILD = "Build lirpa_fastwarmup.BoundedModule(model, example_inputs) instead"


def view_of(bounded: Any) -> BoundedModule:
    """``bounded`` itself if it is this package's, otherwise a BoundedModule of the nn.Module that it was built from.

    It is built once and follows the mode of ``bounded``. Both share parameters and BatchNorm's running statistics from
    then on: those of the one that was trained. Raises TypeError, ValueError or NotImplementedError if it is not sound.
    """
    if isinstance(bounded, BoundedModule):
        return bounded
    if not isinstance(bounded, engine.BoundedModule):
        if isinstance(getattr(bounded, "module", None), engine.BoundedModule):
            raise TypeError(f"expected a BoundedModule, found {type(bounded).__name__}: pass its .module")
        read_graph(bounded)  # Raises the error.
    known: BoundedModule | None = vars(bounded).get(_VIEW)
    view = _joined(bounded) if known is None else known
    share_batchnorm_state(bounded, view.wrapped)  # Refuses parameters that were replaced since.
    if known is None:
        with unchanged(view.wrapped), torch.no_grad():
            _require_same(bounded, view, view.wrapped)
        object.__setattr__(bounded, _VIEW, view)
    if view.training != bounded.training:
        view.train(bounded.training)
    return view


def _joined(bounded: Any) -> BoundedModule:
    record: Record | None = vars(bounded).get(RECORD)
    if record is None:
        text = "this auto_LiRPA BoundedModule was built before lirpa_fastwarmup was imported, so the network in it is "
        raise ValueError(text + f"unknown: import lirpa_fastwarmup at the top of the script. {_BUILD}, if you cannot")
    model: nn.Module = record.model
    _choose_statistics(bounded, record)
    given = {name: value for name, value in record.arguments.items() if name not in ("self", "model", "verbose")}
    with unchanged(model):  # The engine may have left it in another mode.
        view = BoundedModule(model, **{**given, "device": bounded.device})
    for node in bounded._modules.values():
        if type(node) is engine.bound_general.BoundParams:
            node.__class__ = SharedParameter  # The engine's changes requires_grad with the mode.
    return view


def _choose_statistics(bounded: Any, record: Record) -> None:
    """Load the buffers of ``bounded`` into the nn.Module, unless only the latter's have moved since building."""
    own = dict(record.model.named_buffers())
    nodes = [node for node in bounded._modules.values() if hasattr(node, "buffer")]
    copies = {node.ori_name: node.buffer for node in nodes if node.buffer is not own.get(node.ori_name)}
    moved = [name for name, value in copies.items() if not _equal(value, record.copies.get(name))]
    own_moved = [name for name, value in own.items() if not _equal(value, record.after.get(name))]
    if moved and any(name in copies for name in own_moved):
        text = f"the BoundedModule and its network both changed {moved[0]!r}, each its own copy, so that the one to "
        raise ValueError(text + "certify is unknown: call share_batchnorm_state(bounded, model) after building it")
    if copies and not own_moved:  # Otherwise the network goes its own way, also through shared buffers.
        with torch.no_grad():
            for name, value in {**record.before, **copies}.items():
                own[name].copy_(value)


def _equal(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(value.cpu(), other.cpu())


def _require_same(bounded: Any, view: BoundedModule, model: nn.Module) -> None:
    training = bounded.training
    bounded.eval()  # Which returns nothing, in 0.3.
    try:
        found = bounded.forward(*view.example)
    finally:
        bounded.train(training)
    model.eval()
    if not bool(same_outputs(found, model, view.example).all()):
        text = "this auto_LiRPA BoundedModule computes another function than the network that it was built from: the "
        raise ValueError(text + f"network was changed since, or the engine converts it wrongly. {_BUILD}")
