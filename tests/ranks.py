"""What several processes compute in the tests of them; each rank runs its functions in one process of its own."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.distributed import all_gather, patient_group, rank_zero_first
from lirpa_fastwarmup.engine.batchnorm import normalize_over_ranks
from lirpa_fastwarmup.recipe.losses import LOSSES
from tests.networks import SmallResNet, convolutional

# After it, a process gives up waiting for one that has failed.
LIMIT = timedelta(minutes=2)
_KEPT: list[Any] = []  # The last group: PyTorch 2.4 may wait forever when it frees one directly after a collective.
NETWORKS = {"convolutional": convolutional, "residual": lambda: SmallResNet(batchnorm=True)}


@functools.cache
def _process(rank: int) -> ProcessPoolExecutor:
    """The process of a rank, which stays for the next function: importing torch takes seconds."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def end_processes(size: int) -> None:
    """End the processes that :func:`results_of` started."""
    for rank in range(size):
        _process(rank).shutdown()
    _process.cache_clear()


def _joined(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=LIMIT)
    try:
        torch.save(function(rank, size, *arguments), f"{folder}/{rank}.pt")
    finally:
        _KEPT[:] = [dist.group.WORLD]
        dist.destroy_process_group()


def results_of(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, size, *arguments)`` gives in each of ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_process(rank).submit(_joined, rank, size, folder, function, arguments) for rank in range(size)]
        for job in jobs:
            job.result()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


class FromOnePlace(fw.attacks.PGD):
    """An attack that starts at the same place of each sample's box."""

    def starts(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.full((1, *x.shape), 0.25)


_ATTACK = FromOnePlace(steps=2, step_size=0.5)
ATTACKED: dict[str, Any] = {"sabr": {"ratio": 0.4, "attack": _ATTACK}, "mtl-ibp": {"alpha": 0.3, "attack": _ATTACK}}


def objective(network: str, *, training: bool, regularised: bool, bound: str = "ibp") -> fw.ShortWarmup:
    """A fresh objective in the middle of its ramp, the same in every process."""
    torch.manual_seed(0)
    bounded = fw.BoundedModule(NETWORKS[network](), torch.rand(2, 1, 8, 8))
    fw.ibp_init_(bounded)
    schedule = fw.SmoothedEpsilon(0.05, 1, 10, 10)
    loss = LOSSES[bound](**ATTACKED.get(bound, {}))
    warmup = fw.ShortWarmup(bounded, schedule, reg_weight=0.5 if regularised else 0.0, loss=loss)
    warmup.steps_done = 60
    if not training:  # BatchNorm in evaluation mode alone: the radius is still the ramp's.
        for module in warmup.model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
    return warmup


def batch(count: int) -> tuple[Tensor, Tensor]:
    """Samples, the same in every process."""
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x[::3] *= 0.2
    return x, torch.arange(count) % 3


def step_of(warmup: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The gradients of a step, its terms, and the state that it leaves."""
    out = warmup(x, y)
    out.loss.backward()
    inner = getattr(warmup, "module", warmup)
    return {
        "gradients": {name: parameter.grad for name, parameter in inner.named_parameters()},
        "terms": {name: float(value.detach()) for name, value in out.terms.items()},
        "state": inner.state_dict(),
    }


def shared_step(rank: int, size: int, count: int, together: bool, options: dict[str, Any]) -> dict[str, Any]:
    """One step on this process's share of a batch."""
    warmup = objective(**options)
    if together:
        warmup.bounded.join_ranks()
    x, y = batch(count)
    return step_of(nn.parallel.DistributedDataParallel(warmup), x[rank::size], y[rank::size])


def compiled_step(rank: int, size: int, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """As :func:`shared_step`, compiled for real."""
    warmup = objective(compile=True, **options)
    compiled = warmup._compiled
    x, y = batch(count)
    found = step_of(nn.parallel.DistributedDataParallel(warmup), x[rank::size], y[rank::size])
    return {**found, "recordings": len(compiled._steps)}


def compiled_over_ranks(rank: int, size: int) -> list[str]:
    """The warnings of a compiled step with statistics over all processes."""
    import warnings

    bounded = fw.BoundedModule(convolutional(), torch.rand(2, 1, 8, 8)).join_ranks()
    warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.05), compile=True)
    x, y = batch(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fw.CompilationWarning)
        warmup(x[rank::size], y[rank::size]).loss.backward()
    return [str(one.message) for one in caught if isinstance(one.message, fw.CompilationWarning)]


def joined_runs(rank: int, size: int, change: str) -> str:
    """The error of processes whose settings, or data, differ."""
    from lirpa_fastwarmup.experiments.presets import preset
    from lirpa_fastwarmup.experiments.training.build import build_run
    from lirpa_fastwarmup.experiments.training.run import join_ranks

    settings = preset("mnist5k").replace(width=2, hidden=8, data_limit=64, batch_size=16)
    changes: dict[str, Any] = {"settings": {"lr": 0.1}, "data": {"data_limit": 48}, "nothing": {}}[change]
    run = build_run(settings.replace(**changes) if rank else settings, torch.device("cpu"))
    if change == "data":
        run.settings = settings
    try:
        join_ranks(run)
    except ValueError as error:
        return str(error)
    return ""


def half_precision_step(rank: int, size: int, count: int) -> dict[str, Any]:
    """A step under autocast, with statistics over all processes."""
    warmup = objective("convolutional", training=True, regularised=False)
    warmup.bounded.join_ranks()
    x, y = batch(count)
    with torch.autocast("cpu", torch.bfloat16):
        return step_of(nn.parallel.DistributedDataParallel(warmup), x[rank::size], y[rank::size])


def half_precision_count(rank: int, size: int) -> list[Tensor]:
    """Mean and variance of so many values that bfloat16 cannot tell their number."""
    values = torch.linspace(0, 1, 96_100).view(1, 1, 310, 310).bfloat16()
    one, zero = torch.ones(1), torch.zeros(1)
    return list(normalize_over_ranks(values, one, zero, zero.clone(), one.clone(), 0.1, 1e-5)[1:])


def after_unequal_work(rank: int, size: int, folder: str) -> list[int]:
    """What all ranks have, where some of them work for longer than they may wait for one another in a step."""
    dist.destroy_process_group()
    limit = timedelta(seconds=1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=size, timeout=limit)
    group = patient_group()
    time.sleep(3 * rank)
    return all_gather(rank, group)


def found_by_leader(rank: int, size: int, folder: str) -> bool:
    """Whether the file was there already that rank 0 makes, and takes its time for."""
    path = Path(folder) / "made"
    with rank_zero_first():
        found = path.exists()
        if not found:
            time.sleep(1)
            path.touch()
    return found
