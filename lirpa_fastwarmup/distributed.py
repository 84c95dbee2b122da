"""Several processes that compute one run, as torchrun starts them: who they are, and sums over them.

The processes are PyTorch's default process group. Without one, a process is alone, and sums are what it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

_TIMEOUT = timedelta(minutes=10)  # How long one rank may wait for the others in the midst of a step.
_PATIENCE = timedelta(days=7)  # … and where their work is of unequal length.
_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """A process among those that compute one run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0


SINGLE = World()


def world() -> World:
    """This process among those of the default process group."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return SINGLE


def local_device(named: torch.device) -> torch.device:
    """The device of this process: of several GPUs, each process that torchrun started on a machine has its own.

    Raises:
        ValueError: the machine has fewer GPUs than processes.
    """
    place = os.environ.get("LOCAL_RANK")
    if named.type != "cuda" or named.index is not None or place is None:
        return named
    if int(place) >= torch.cuda.device_count():
        raise ValueError(
            f"process {place} of this machine has no GPU, as there are {torch.cuda.device_count()}: start as many "
            "processes as there are GPUs (--nproc-per-node)"
        )
    return torch.device("cuda", int(place))


@contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Be one of the processes that torchrun started, for as long as the block lasts; alone where it did not.

    Args:
        device: where this process computes; NCCL connects GPUs, gloo everything else.

    Raises:
        NotImplementedError: this PyTorch has no NCCL, which connects GPUs.
        ConnectionError: the processes do not find one another, or one of them is lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world() != SINGLE:
        yield world()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_backend_available(backend):
        raise NotImplementedError(
            f"several processes on {device.type} are connected by {backend}, which this PyTorch was built without: "
            "install one with it, or train on one device"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank = os.environ.get("RANK")
    try:
        _meet(backend)
        yield world()
    except RuntimeError as error:
        # gloo's own errors are plain RuntimeErrors that begin with a place in its sources.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise ConnectionError(
            f"rank {rank} lost the connection to the others, or waited for {_TIMEOUT} in vain: one of them ended, and "
            f"its own error is the one to look for ({str(error).splitlines()[0]})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
    # torchrun may give the same store again after a restart, with the addresses of processes that are gone.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes, without a gradient; shape and dtype as ``values``."""
    if world().size == 1:
        return values
    result = values.detach().clone()
    dist.all_reduce(result)
    return result


def differentiable_all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes. Its gradient is the sum of the gradients that all of them have for it."""
    return values if world().size == 1 else _AllReduce.apply(values)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduce(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce(grad)


def broadcast(value: _T) -> _T:
    """What rank 0 has, on every rank; any object that can be pickled."""
    if world().size == 1:
        return value
    holder = [value if world().is_rank_zero else None]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]  # type: ignore[return-value]


def all_gather(value: _T, group: Any = None) -> list[_T]:
    """What every rank has, by rank, on all of them; in a group of :func:`patient_group`, however late they come."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def patient_group() -> Iterator[Any]:
    """A group for :func:`all_gather` at the end of a block that takes some ranks much longer than others.

    Every rank must enter the block. Objects are sent over gloo, on whatever device the ranks compute.
    """
    if world().size == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let rank 0 run the block alone, and the others when it has: they find what it downloaded or wrote.

    Where it fails on rank 0, the others run the block as well, and fail by themselves.
    """
    with patient_group() as group:
        if not world().is_rank_zero:
            all_gather(None, group)
        try:
            yield
        finally:
            if world().is_rank_zero:
                all_gather(None, group)


@torch.no_grad()
def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every rank the buffers of rank 0, such as BatchNorm's running statistics, in place."""
    if world().size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
