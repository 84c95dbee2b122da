"""One state for a model and the BoundedModule built from it.

The engine shares parameters between the two, but copies buffers, so that BatchNorm's running
statistics split in two; it also switches ``requires_grad`` of the model's parameters with the mode.
The node classes here read the model's own modules instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.normalization import normalize_by_batch, normalize_over_ranks, scale_interval

_bound: Any = engine.bound_general
BoundParams: Any = _bound.BoundParams
BoundBuffers: Any = _bound.BoundBuffers
BoundConstant: Any = _bound.BoundConstant
BoundBatchNormalization: Any = _bound.BoundBatchNormalization
Interval: Any = _bound.Interval


class SharedParameter(BoundParams):
    """A parameter whose ``requires_grad`` stays the user's, whatever mode the network is in."""

    def forward(self) -> Tensor:
        return self.param


class SharedBatchNorm(BoundBatchNormalization):
    """BatchNorm that keeps the books of the nn.Module it was traced from.

    Attributes:
        owner: that module, in a tuple, so that it is not registered as a child of the node.
        updates_running_stats: whether a pass in training mode moves the running statistics.
        over_ranks: whether a batch's statistics are those of all processes together.
    """

    owner: tuple[_BatchNorm]
    updates_running_stats: bool
    over_ranks: bool
    eps: float
    momentum: float

    def forward(self, x: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x, w, b, m, v)
        if self.updates_running_stats:
            self.momentum = self._count_batch()
        else:
            m, v = m.clone(), v.clone()
        self.patches_start = x.ndim > 2
        normalize = normalize_over_ranks if self.over_ranks else normalize_by_batch
        result, self.current_mean, self.current_var = normalize(x, w, b, m, v, self.momentum, self.eps)
        return result

    def interval_propagate(self, *v: Any) -> Any:
        if self.bn_mode != "forward" or Interval.get_perturbation(v[0])[0] != math.inf:
            return super().interval_propagate(*v)
        (lower, upper), weight, bias = v[0], v[1][0], v[2][0]
        if not self.training:
            self.current_mean, self.current_var = v[3][0], v[4][0]
        scale = weight / (self.current_var + self.eps).sqrt()
        return scale_interval(lower, upper, scale, bias - self.current_mean * scale)

    def _count_batch(self) -> float:
        """Count a batch, as nn.BatchNorm does, and return the share that it takes in the running statistics."""
        module = self.owner[0]
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:
                return 1.0 / float(module.num_batches_tracked)  # A cumulative average.
        return 0.0 if module.momentum is None else module.momentum


class ConstantParameter(BoundConstant):
    """Weight or bias of a BatchNorm without any (affine=False), as 0.3's CROWN reads them."""

    @property
    def param(self) -> Tensor:
        value: Tensor = self.value
        return value


class ViewedBatchNorm(SharedBatchNorm):
    """A shared BatchNorm that is in its module's mode, too, at every moment."""

    @property
    def training(self) -> bool:
        return self.owner[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        """The mode is the module's alone."""


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
    """The module and attribute of the model's parameter or buffer ``name``, if it has one."""
    prefix, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return None
    known = attribute in module._parameters or attribute in module._buffers
    return (module, attribute) if known else None


def state_links(bounded: Any, model: nn.Module) -> list[StateLink]:
    """The links of every parameter and buffer node of ``bounded`` to ``model``."""
    links = []
    for node in bounded._modules.values():
        if isinstance(node, BoundParams | BoundBuffers):
            owner = _owner(model, node.ori_name)
            if owner is not None:
                links.append(StateLink(node, *owner))
    return links


def adopt_batchnorm(bounded: Any, model: nn.Module, kind: type[SharedBatchNorm]) -> None:
    """Turn each BatchNorm node traced from a module of ``model`` into one of class ``kind``.

    Raises:
        NotImplementedError: the engine was told to leave out a part of BatchNorm.
    """
    for node in bounded._modules.values():
        if not isinstance(node, BoundBatchNormalization):
            continue
        if not (node.use_mean and node.use_var and node.use_affine):
            raise NotImplementedError(
                "bound_opts['bn'] leaves out a part of BatchNorm, so that the bounded network computes another "
                "function than the model: leave the option out, or change the model"
            )
        owner = _owner(model, getattr(node.inputs[3], "ori_name", ""))
        if owner is not None and isinstance(owner[0], _BatchNorm):
            node.__class__ = kind
            object.__setattr__(node, "owner", (owner[0],))
            node.updates_running_stats = True
            node.over_ranks = False
            for source in node.inputs[1:3]:
                if type(source) is BoundConstant:
                    source.__class__ = ConstantParameter


def batchnorm_over_ranks(bounded: Any) -> None:
    """Take BatchNorm's statistics, in training mode, over the batches of all processes."""
    for node in bounded._modules.values():
        if isinstance(node, SharedBatchNorm):
            node.over_ranks = True


def adopt_parameters(bounded: Any) -> None:
    """Leave ``requires_grad`` of the model's parameters to the user."""
    for node in bounded._modules.values():
        if type(node) is BoundParams:
            node.__class__ = SharedParameter


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
        ValueError: ``bounded`` was built from another module.
        NotImplementedError: its ``bound_opts`` leave out a part of BatchNorm.
    """
    links = state_links(bounded, model)
    parameters = [node for node in bounded._modules.values() if isinstance(node, BoundParams)]
    linked = {id(link.node): link for link in links}
    for node in parameters:
        link = linked.get(id(node))
        if link is None or link.owner._parameters.get(link.attribute) is not node.param:
            raise ValueError(
                f"the parameter {node.ori_name!r} of this BoundedModule is not one of the given model's: pass the "
                "nn.Module that the BoundedModule was built from, not a copy of it"
            )
    adopt_batchnorm(bounded, model, SharedBatchNorm)
    shared = [link for link in links if isinstance(link.node, BoundBuffers)]
    for link in shared:
        link.refresh()
    return [link.node.ori_name for link in shared]


def follow_modules(bounded: Any, training: bool) -> None:
    """Put every node in the given mode; BatchNorm nodes take mode and eps from their own module."""
    for node in bounded._modules.values():
        node.training = training
        if isinstance(node, SharedBatchNorm):
            node.eps = node.owner[0].eps


@contextmanager
def frozen_running_stats(bounded: Any) -> Iterator[None]:
    """Let passes in training mode take batch statistics without moving the running ones."""
    nodes = [node for node in bounded._modules.values() if isinstance(node, SharedBatchNorm)]
    for node in nodes:
        node.updates_running_stats = False
    try:
        yield
    finally:
        for node in nodes:
            node.updates_running_stats = True
