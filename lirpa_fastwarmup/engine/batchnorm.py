"""BatchNorm nodes: state shared with the model, whose buffers the engine copies, batch statistics, and intervals."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lirpa_fastwarmup.distributed import differentiable_all_reduce
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.precision import temporarily
from lirpa_fastwarmup.engine.products import require_first_derivative

_engine: Any = engine.bound_general
BoundBatchNormalization: Any = _engine.BoundBatchNormalization


def normalize_by_batch(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``F.batch_norm`` in training mode, the batch's mean and its biased variance, per channel; differentiable once.

    PyTorch computes the statistics, but provides no gradient through them. Computing them a second time costs several
    times as much as the normalisation itself (on the CPU, mostly for the variance).
    """
    return _BatchNormWithStatistics.apply(x, weight, bias, running_mean, running_var, momentum, eps)


class _BatchNormWithStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.eps = eps
        result, batch_mean, inverse_std = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, batch_mean, inverse_std)
        return result, batch_mean.clone(), inverse_std.pow(-2).sub_(eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative()
        x, weight, mean, inverse_std = ctx.saved_tensors
        gradients = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        if ctx.needs_input_grad[0]:
            count = x.numel() // len(mean)
            slope = grad_var * (2 / count)
            offset = grad_mean / count - slope * mean
            gradients[0].add_(x * _per_channel(slope, x)).add_(_per_channel(offset, x))
        return (*gradients, None, None, None, None)


def normalize_over_ranks(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`normalize_by_batch`, with the statistics of the batches of all processes."""
    over = [dim for dim in range(x.ndim) if dim != 1]
    dtype, x = x.dtype, x.to(weight.dtype)  # Half precision would round the number of samples.
    sums = differentiable_all_reduce(torch.cat([x.sum(over), x.new_tensor([x.numel() // x.shape[1]])]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    deviation = x - _per_channel(mean, x)
    var = differentiable_all_reduce(deviation.square().sum(over)) / count
    running_mean.lerp_(mean.detach(), momentum)
    running_var.lerp_(var.detach() * (count / (count - 1)), momentum)
    return (deviation * _per_channel(weight / (var + eps).sqrt(), x) + _per_channel(bias, x)).to(dtype), mean, var


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


class _FunctionalNorm(NamedTuple):
    """F.batch_norm called by ``module``, in its mode, as a BatchNorm module."""

    module: nn.Module
    eps: float
    momentum: float
    num_batches_tracked: None = None
    track_running_stats: bool = True

    @property
    def training(self) -> bool:
        return self.module.training


class SharedBatchNorm(BoundBatchNormalization):
    """BatchNorm that updates the running statistics of the nn.Module it was traced from."""

    # In training mode, a forward pass normalises by its own "batch", by the "last" one, or by the "running" statistics.
    statistics = "batch"
    # In a tuple, so that the module is not registered as a child of the node.
    owner: tuple["_BatchNorm | _FunctionalNorm"]
    updates_running_stats = True  # Whether a pass in training mode moves the running statistics.
    over_ranks = False  # Whether batch statistics are computed over the batches of all processes.
    current_mean: Tensor
    current_var: Tensor

    def forward(self, x: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x, w, b, m, v)
        if self.statistics != "batch":
            mean, var = (m, v) if self.statistics == "running" else (self.current_mean, self.current_var)
            scale = w / (var + self.eps).sqrt()
            return x * _per_channel(scale, x) + _per_channel(b - mean * scale, x)
        if self.updates_running_stats and self.owner[0].track_running_stats:
            self.momentum = self._count_batch()
        else:
            m, v = m.clone(), v.clone()
        self.patches_start = x.ndim > 2
        normalize = normalize_over_ranks if self.over_ranks else normalize_by_batch
        result, self.current_mean, self.current_var = normalize(x, w, b, m, v, self.momentum, self.eps)
        return result

    def interval_propagate(self, *v: Any) -> Any:
        # The engine's own modules also have these nodes, and balls of other norms.
        if self.bn_mode != "forward" or _engine.Interval.get_perturbation(v[0])[0] != math.inf:
            return super().interval_propagate(*v)
        (lower, upper), constants = v[0], self.scale_and_shift(*(interval[0] for interval in v[1:]))
        scale, shift = (_per_channel(one, lower) for one in constants)
        centre, radius = (lower + upper) * (scale / 2) + shift, (upper - lower) * (scale.abs() / 2)
        return centre - radius, centre + radius

    def scale_and_shift(self, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The map s·z + t that intervals go through: s and t, (channels,) each."""
        if not self.training:
            self.current_mean, self.current_var = mean, var
        scale = weight / (self.current_var + self.eps).sqrt()
        return scale, bias - self.current_mean * scale

    def _count_batch(self) -> float:
        """Count a batch, as nn.BatchNorm does, and return the momentum of the running statistics."""
        module = self.owner[0]
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:
                return 1.0 / float(module.num_batches_tracked)  # A cumulative average.
        return 0.0 if module.momentum is None else module.momentum


class ViewedBatchNorm(SharedBatchNorm):
    """A SharedBatchNorm that is always in its module's mode."""

    training: Any = property(lambda self: self.owner[0].training, lambda self, mode: None)  # Setting has no effect.


class ConstantParameter(_engine.BoundConstant):
    """Weight or bias of a BatchNorm with affine=False, with the attribute that 0.3's CROWN reads."""

    param = property(attrgetter("value"))


def _nodes_of(bounded: Any, kind: Any = SharedBatchNorm) -> list[Any]:
    return [node for node in bounded._modules.values() if isinstance(node, kind)]


def adopt_batchnorm(bounded: Any, model: nn.Module, kind: type[SharedBatchNorm]) -> None:
    """Turn each BatchNorm node whose statistics are buffers of ``model`` into one of class ``kind``.

    Raises:
        NotImplementedError: ``bound_opts`` omit a part of BatchNorm.
    """
    for node in _nodes_of(bounded, BoundBatchNormalization):
        if not (node.use_mean and node.use_var and node.use_affine):
            text = "bound_opts['bn'] omits a part of BatchNorm, so that the bounded network computes another function "
            raise NotImplementedError(text + "than the model: remove the option, or change the model")
        owner = _owner(model, getattr(node.inputs[3], "ori_name", ""))
        if owner is not None:
            is_module = isinstance(owner[0], _BatchNorm)
            node.owner = (owner[0] if is_module else _FunctionalNorm(owner[0], node.eps, node.momentum),)
            node.__class__ = kind
            node.eps = node.owner[0].eps
            for source in node.inputs[1:3]:
                if type(source) is _engine.BoundConstant:
                    source.__class__ = ConstantParameter


def follow_modules(bounded: Any, training: bool) -> None:
    """Put every node in the given mode; BatchNorm nodes take mode and eps from their own module."""
    for node in bounded._modules.values():
        node.training = training
    for node in _nodes_of(bounded):
        node.eps = node.owner[0].eps


def frozen_running_stats(bounded: Any) -> AbstractContextManager[None]:
    """Keep passes in training mode from moving the running statistics."""
    return temporarily(_nodes_of(bounded), "updates_running_stats", False)


def normalized_by(bounded: Any, statistics: str) -> AbstractContextManager[None]:
    """In training mode, let forward passes normalise by the statistics of the "last" batch, or the "running" ones."""
    return temporarily(_nodes_of(bounded), "statistics", statistics)


@dataclass(frozen=True)
class StateLink:
    """A node, and the module and attribute of the model that hold its tensor; ``tied`` are further ones."""

    node: Any
    owner: nn.Module
    attribute: str
    tied: Sequence[tuple[nn.Module, str]] = ()

    def refresh(self) -> None:
        """Point the node to the model's current tensor, which ``.to`` and loading may have replaced."""
        kind, name = ("_parameters", "param") if isinstance(self.node, _engine.BoundParams) else ("_buffers", "buffer")
        current = getattr(self.owner, kind)[self.attribute]
        others = [getattr(owner, kind).get(attribute) for owner, attribute in self.tied]
        # Moving a model copies a shared buffer for each of its modules.
        if any(one is not current and (kind == "_parameters" or not torch.equal(one, current)) for one in others):
            text = f"the tensor {self.node.ori_name!r} was shared by several modules when the network was wrapped, and "
            raise ValueError(text + "is no longer: build a BoundedModule again, or share it again")
        getattr(self.node, kind)[name] = current


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module and attribute of the model's parameter or buffer ``name``, if it exists."""
    prefix, _, attribute = name.rpartition(".")
    with suppress(AttributeError):
        module = model.get_submodule(prefix)
        if attribute in module._parameters or attribute in module._buffers:
            return module, attribute
    return None


def state_links(bounded: Any, model: nn.Module) -> list[StateLink]:
    """The links of every parameter and buffer node of ``bounded`` to ``model``."""
    nodes = _nodes_of(bounded, (_engine.BoundParams, _engine.BoundBuffers))
    owners = [(node, _owner(model, node.ori_name)) for node in nodes]
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            holders.setdefault(id(value), []).append((module, name))
    return [StateLink(node, *own, holders.get(id(getattr(*own)), ())) for node, own in owners if own is not None]


def share_batchnorm_state(bounded: Any, model: nn.Module) -> list[str]:
    """Share BatchNorm's running statistics between ``bounded`` and ``model``.

    For an ``auto_LiRPA.BoundedModule`` of either release, built from ``model``; this package's own needs no call. The
    model's statistics are kept. Moving either to another device or dtype replaces tensors: call this again afterwards.

    Returns:
        The names of the model's buffers that are now shared.

    Raises:
        ValueError: ``bounded`` was built from another module.
        NotImplementedError: Its ``bound_opts`` omit a part of BatchNorm.
    """
    links = {id(link.node): link for link in state_links(bounded, model)}
    for node in _nodes_of(bounded, _engine.BoundParams):
        link = links.get(id(node))
        if link is None or link.owner._parameters.get(link.attribute) is not node.param:
            text = f"the given model does not hold the parameter {node.ori_name!r} of this BoundedModule: pass the "
            raise ValueError(text + "nn.Module that the BoundedModule was built from, not a copy of it")
    adopt_batchnorm(bounded, model, SharedBatchNorm)
    shared = [link for link in links.values() if isinstance(link.node, _engine.BoundBuffers)]
    for link in shared:
        link.refresh()
    return [link.node.ori_name for link in shared]
