"""Computing in parts that fit into memory."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate|not enough memory|bad_alloc|could not create a primitive", re.I
)
_SHARE = 0.9  # Of the memory that is free.


class OutOfMemoryError(RuntimeError):
    """A single sample does not fit into memory."""


class Parts:
    """Splits batches, into halves of halves where a part did not fit into memory.

    Attributes:
        size: samples of a part, as far as is known by now; it only shrinks.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def each(self, compute: Callable[[Tensor], Tensor], samples: Tensor, what: str) -> Tensor:
        """``compute(part)`` of each part of ``samples``, joined.

        Args:
            compute: takes indices (part,) and returns one row for each.
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
                with _limited_memory(samples.device):
                    results.append(compute(part))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(len(part), what, error)
            else:
                done += len(part)
        return torch.cat(results)

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """Let allocations on the CPU fail before the system ends the process for them (Linux only)."""
    free = _free_memory() if device.type == "cpu" and sys.platform == "linux" else None
    if free is None:
        yield
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ours = used + int(_SHARE * free)
    limits = [limit for limit in (ours, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _free_memory() -> int | None:
    """Bytes that can still be had: what the system has left, or the process's control group."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = [int(found[1]) * 1024] if found else []
    except OSError:
        free = []
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # No control group, or one without a limit ("max").
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free, default=None)
