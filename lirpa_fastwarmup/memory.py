"""Computation in micro-batches that fit into memory, and memory that is kept for the next step."""

import ctypes
import logging
import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = r"(?i)out of memory|can't allocate|not enough memory|bad_alloc|could not create a primitive"
_USABLE = 0.8  # Of the free memory; operators use the rest internally.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # Parameters of mallopt.


class OutOfMemoryError(RuntimeError):
    """A single sample does not fit into memory."""


class MicroBatches:
    """Splits batches into micro-batches that fit into memory.

    A GPU raises an error if something does not fit, and the micro-batch is halved. A CPU's operating system kills the
    process instead, so the memory of one sample is measured first, and the free memory determines the size.
    """

    def __init__(self, size: int) -> None:
        self.size = size  # Samples per micro-batch; it only shrinks.
        self._measured = False

    def each(self, compute: Callable[[Tensor], Tensor], samples: Tensor, what: str, most: int | None = None) -> Tensor:
        """``compute`` of ``samples``, indices (n,), at most ``most`` in a micro-batch; errors name it ``what``."""
        results: list[Tensor] = []
        while len(samples):
            micro_batch = samples[: min(self.size, most or self.size)]
            try:
                if min(len(samples), self.size) > 1 and not self._measured and samples.device.type == "cpu":
                    self._fit(compute, samples[:1], what)
                    continue
                results.append(compute(micro_batch))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(len(micro_batch), what, error)
            else:
                samples = samples[len(micro_batch) :]
        return torch.cat(results)

    def _fit(self, compute: Callable[[Tensor], Tensor], sample: Tensor, what: str) -> None:
        self._measured = True
        free = free_memory()
        with _PeakBytes() as measured:
            compute(sample)
        if free is not None and measured.peak * self.size > _USABLE * free:
            self.size = max(1, int(_USABLE * free / measured.peak))
            text = "%s needs about %.1f MB a sample, and %.1f GB are free: %d samples at once"
            logger.info(text, what, measured.peak / 1e6, free / 1e9, self.size)

    def _shrink(self, tried: int, what: str, error: Exception) -> None:
        if tried == 1:
            text = f"{what} needs more memory than there is, for a single sample ({str(error).splitlines()[0]}): leave "
            raise OutOfMemoryError(text + "it out, or use a machine with more memory or a smaller network") from error
        self.size = (tried + 1) // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        logger.info("%s of %d samples at once does not fit into memory: using %d", what, tried, self.size)


class _PeakBytes(TorchDispatchMode):
    """Measures ``peak``, the most bytes alive at once in tensors that operators create in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        for storage in storages.difference(self._seen):
            self._seen.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self._alive += size
        self.peak = max(self.peak, self._alive)


def keep_freed_memory() -> bool:
    """Keep freed CPU memory in the process instead of returning it to the system; return whether the C library can.

    For training scripts, once, at the beginning: glibc otherwise returns memory to the system within each step, and
    page faults when it is allocated again take up to a quarter of an eager step (docs/performance.md).
    """
    with suppress(AttributeError, OSError, TypeError):  # Of other C libraries.
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` reports a lack of memory, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(_OUT_OF_MEMORY, str(error)) is not None


def free_memory(system: Path = Path("/")) -> int | None:
    """Bytes available to the process, in the system (its files below ``system``) and its control group, if known."""
    free = []
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", (system / "proc/meminfo").read_text())
        free += [int(found[1]) * 1024] if found else []
    group = system / "sys/fs/cgroup"
    with suppress(OSError, ValueError):  # Without a control group, or without a limit ("max").
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # The file cache counts as available, because the system drops it on demand.
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
        free.append(limit - used + (int(cached[1]) if cached else 0))
    return min(free, default=None)
