"""Computing in parts that fit into memory."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate|not enough memory|bad_alloc|could not create a primitive", re.I
)
_SHARE = 0.8  # Of the memory that is free; the rest is for what operators use inside.


class OutOfMemoryError(RuntimeError):
    """A single sample does not fit into memory."""


class MicroBatches:
    """Splits batches into parts that fit into memory.

    A GPU says when something does not fit, and a part is halved then. The CPU's system ends the process instead; there
    the tensors that one sample takes are counted first, and parts are made as large as the free memory allows.

    Attributes:
        size: samples of a part, as far as is known by now; it only shrinks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._counted = False

    def each(self, compute: Callable[[Tensor], Tensor], samples: Tensor, what: str) -> Tensor:
        """``compute(part)`` of each part of ``samples``, joined.

        Args:
            compute: takes indices (part,) and returns one row for each; on the CPU it is also called with one sample
                beforehand, whose row is thrown away.
            samples: indices (n,), n ≥ 1.
            what: what is computed, for the log.

        Raises:
            OutOfMemoryError: one sample alone does not fit.
        """
        results: list[Tensor] = []
        done = 0
        while done < len(samples):
            part = samples[done : done + self.size]
            try:
                if len(part) > 1 and not self._counted and part.device.type == "cpu":
                    self._fit(compute, part[:1], what)
                    continue
                results.append(compute(part))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(len(part), what, error)
            else:
                done += len(part)
        return torch.cat(results)

    def _fit(self, compute: Callable[[Tensor], Tensor], one: Tensor, what: str) -> None:
        """Make parts as large as the free memory allows, by what one sample takes."""
        self._counted = True
        free = free_memory()
        with _PeakBytes() as counted:
            compute(one)
        if free is not None and counted.peak * self.size > _SHARE * free:
            self.size = max(1, int(_SHARE * free / counted.peak))
            logger.info(
                "%s takes about %.1f MB a sample, and %.1f GB are free: %d samples at once",
                *(what, counted.peak / 1e6, free / 1e9, self.size),
            )

    def _shrink(self, tried: int, what: str, error: Exception) -> None:
        if tried == 1:
            raise OutOfMemoryError(
                f"{what} needs more memory than there is, for a single sample: leave the method out, use a machine "
                f"with more memory, or a smaller network ({str(error).splitlines()[0]})"
            ) from error
        self.size = (tried + 1) // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        logger.info("%s of %d samples at once does not fit into memory: going on with %d", what, tried, self.size)


class _PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at once, of those that operators make in the block.

    Attributes:
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self._alive -= size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def free_memory(system: Path = Path("/")) -> int | None:
    """Bytes that are still available in the system or in the process's control group; ``None`` if not known.

    The file cache of a control group counts as available: the system drops it when memory is asked for.

    Args:
        system: the root of the file system.
    """
    free = []
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", (system / "proc/meminfo").read_text())
        free += [int(found[1]) * 1024] if found else []
    group = system / "sys/fs/cgroup"
    with suppress(OSError, ValueError):  # No control group, or one without a limit ("max").
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
        free.append(limit - used + (int(cached[1]) if cached else 0))
    return min(free, default=None)
