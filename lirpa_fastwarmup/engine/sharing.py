"""One state for a model and the BoundedModule built from it.

The engine shares parameters between the two, but copies buffers, so that BatchNorm's running
statistics split in two; it also switches ``requires_grad`` of the model's parameters with the mode.
The node classes here read the model's own modules instead.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lirpa_fastwarmup.engine.compat import engine

_bound: Any = engine.bound_general
BoundParams: Any = _bound.BoundParams
BoundBuffers: Any = _bound.BoundBuffers
BoundLinear: Any = _bound.BoundLinear
BoundMatMul: Any = _bound.BoundMatMul
BoundBatchNormalization: Any = _bound.BoundBatchNormalization


class SharedParameter(BoundParams):
    """A parameter whose ``requires_grad`` stays the user's, whatever mode the network is in."""

    def forward(self) -> Tensor:
        return self.param


class SharedBatchNorm(BoundBatchNormalization):
    """BatchNorm that keeps the books of the nn.Module it was traced from.

    ``owner`` holds that module, in a tuple, so that it is not registered as a child of the node.
    """

    owner: tuple[_BatchNorm]

    def forward(self, x: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor) -> Tensor:
        module = self.owner[0]
        if self.training and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:  # A cumulative average, as nn.BatchNorm computes it.
                self.momentum = 1.0 / float(module.num_batches_tracked)
            else:
                self.momentum = module.momentum
        return super().forward(x, w, b, m, v)


class MarginMatMul(BoundMatMul):
    """A linear layer without bias whose interval bound takes a margin matrix (0.3's takes none)."""

    def interval_propagate(self, *v: Any, C: Tensor | None = None) -> Any:
        return BoundLinear.interval_propagate(self, *v, C=C)


@dataclass(frozen=True)
class StateLink:
    """A node, and the module and attribute of the model whose tensor it shows."""

    node: Any
    owner: nn.Module
    attribute: str

    def refresh(self) -> None:
        """Point the node at the tensor that the model holds now (``.to`` and loading may replace it)."""
        if isinstance(self.node, BoundParams):
            self.node._parameters["param"] = self.owner._parameters[self.attribute]
        else:
            self.node._buffers["buffer"] = self.owner._buffers[self.attribute]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    prefix, _, attribute = name.rpartition(".")
    try:
        return model.get_submodule(prefix), attribute
    except AttributeError:
        return None


def state_links(bounded: Any, model: nn.Module) -> list[StateLink]:
    """The links of every parameter and buffer node of ``bounded`` to ``model``."""
    links = []
    for node in bounded._modules.values():
        if isinstance(node, BoundParams | BoundBuffers):
            owner = _owner(model, node.ori_name)
            if owner is not None and owner[1] in {**owner[0]._parameters, **owner[0]._buffers}:
                links.append(StateLink(node, *owner))
    return links


def adopt_batchnorm(bounded: Any, model: nn.Module) -> list[Any]:
    """Turn each BatchNorm node traced from a module of ``model`` into a :class:`SharedBatchNorm`."""
    adopted = []
    for node in bounded._modules.values():
        if not isinstance(node, BoundBatchNormalization):
            continue
        owner = _owner(model, getattr(node.inputs[3], "ori_name", ""))
        if owner is not None and isinstance(owner[0], _BatchNorm):
            node.__class__ = SharedBatchNorm
            object.__setattr__(node, "owner", (owner[0],))
            adopted.append(node)
    return adopted


def adopt_parameters(bounded: Any) -> None:
    """Leave ``requires_grad`` of the model's parameters to the user."""
    for node in bounded._modules.values():
        if type(node) is BoundParams:
            node.__class__ = SharedParameter


def adopt_matmul(bounded: Any) -> None:
    """Let linear layers without bias take a margin matrix, where the engine's take none."""
    if "C" in inspect.signature(BoundMatMul.interval_propagate).parameters:
        return
    for node in bounded._modules.values():
        if type(node) is BoundMatMul:
            node.__class__ = MarginMatMul


def share_batchnorm_state(bounded: Any, model: nn.Module) -> list[str]:
    """Make BatchNorm's running statistics one and the same for ``bounded`` and ``model``.

    For a plain ``auto_LiRPA.BoundedModule``; :class:`lirpa_fastwarmup.BoundedModule` does it by
    itself. The model's statistics are kept. Moving either to another device or dtype afterwards
    replaces tensors: call it again then.

    Args:
        bounded: a BoundedModule of either engine.
        model: the module that it was built from.

    Returns:
        The names of the model's buffers that are now shared.

    Raises:
        ValueError: ``bounded`` has BatchNorm, but not of ``model``.
    """
    adopted = adopt_batchnorm(bounded, model)
    links = [link for link in state_links(bounded, model) if isinstance(link.node, BoundBuffers)]
    has_batchnorm = any(isinstance(node, BoundBatchNormalization) for node in bounded._modules.values())
    if has_batchnorm and not adopted:
        raise ValueError(
            "none of the BatchNorm statistics in this BoundedModule belong to the given model: "
            "pass the nn.Module that the BoundedModule was built from"
        )
    for link in links:
        link.refresh()
    return [link.node.ori_name for link in links]


def follow_mode(bounded: Any, training: bool) -> None:
    """Put every node in the given mode, and each BatchNorm node in that of its own module."""
    for node in bounded._modules.values():
        node.training = node.owner[0].training if isinstance(node, SharedBatchNorm) else training
