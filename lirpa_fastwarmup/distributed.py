"""Collectives over the processes of PyTorch's default process group, which torchrun starts; without one, over one."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(minutes=10)  # For a rank that waits for the others within a step,
_PATIENCE = timedelta(days=7)  # and where the work of ranks differs in length.
_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The rank of this process, from 0, and the number of processes. Rank 0 writes and prints."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


SINGLE = World()


def world() -> World:
    """Rank and size in the default process group."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return SINGLE


def local_device(named: torch.device) -> torch.device:
    """The device of this process; under torchrun, each has a GPU of its own. Raises ValueError if there are too few."""
    place = os.environ.get("LOCAL_RANK")
    if named.type != "cuda" or named.index is not None or place is None:
        return named
    if int(place) >= torch.cuda.device_count():
        problem = f"process {place} of this machine has no GPU, as there are {torch.cuda.device_count()}"
        raise ValueError(f"{problem}: start one process per GPU (--nproc-per-node)")
    return torch.device("cuda", int(place))


@contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, during the block. Without torchrun, there is one process.

    NCCL connects GPUs, gloo all other kinds of ``device``. Raises NotImplementedError if this PyTorch has no NCCL, and
    ConnectionError if the processes cannot connect, or one of them ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world() != SINGLE:
        yield world()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_backend_available(backend):
        problem = f"several processes on {device.type} are connected by {backend}, which this PyTorch lacks"
        raise NotImplementedError(f"{problem}: install a build with it, or train on one device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        _meet(backend)
        yield world()
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors whose message begins with a place in its sources.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        text = f"rank {os.environ.get('RANK')} lost the connection to the others, or waited longer than {_TIMEOUT}: "
        raise ConnectionError(f"{text}another one ended; see its error ({str(error).splitlines()[0]})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    from torch.distributed.rendezvous import rendezvous  # PyTorch may be built without torch.distributed.

    store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
    # After a restart torchrun may pass the same store, with the addresses of processes that have ended.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes, without a gradient; shape and dtype as ``values``."""
    if world().size > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
    return values


def differentiable_all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes; its gradient is the sum of their gradients."""
    return values if world().size == 1 else _AllReduce.apply(values)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduce(values)

    backward = forward


def broadcast(value: _T) -> _T:
    """Rank 0's ``value``, any object that can be pickled, on every rank."""
    holder: list[Any] = [value]
    if world().size > 1:
        dist.broadcast_object_list(holder, src=0)
    return holder[0]


def all_gather(value: _T, group: Any = None) -> list[_T]:
    """The values of all ranks, by rank, on every rank; ``group`` from :func:`patient_group` for ranks that are late."""
    values: list[Any] = [value] * world().size
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def patient_group() -> Any:
    """A group for an :func:`all_gather` for which some ranks are much later than others; every rank must call this."""
    return None if world().size == 1 else _patient_group(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _patient_group(default: Any) -> Any:
    # Made on all ranks at once, and kept: PyTorch 2.4 may wait forever if it frees a group right after a collective.
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 first, even if it fails there, and then on the others, which find the files it wrote."""
    group = patient_group()
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
