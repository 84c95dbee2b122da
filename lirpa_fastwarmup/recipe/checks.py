"""Checks of values that cost a GPU no wait: at once on the CPU, deferred on other devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Error = Callable[..., Exception]


class ValueChecks:
    """Conditions on the values of tensors, raised at once on the CPU and on request elsewhere."""

    def __init__(self) -> None:
        self._pending: dict[str, tuple[Tensor, list[Tensor], Error]] = {}

    def require(self, kind: str, holds: Tensor, values: Sequence[Tensor], error: Error) -> None:
        """Raise ``error(*values)`` unless the 0-dim ``holds`` is true; off the CPU, keep it for later.

        Off the CPU, of each ``kind`` the first violation is kept, with the smallest and the largest of each of its
        values: the batch that caused it may be gone when it is raised.
        """
        if holds.device.type != "cpu":
            self.defer(kind, holds, values, error)
        elif not bool(holds):
            raise error(*values)

    def defer(self, kind: str, holds: Tensor, values: Sequence[Tensor], error: Error) -> None:
        """Keep a check for :meth:`raise_pending`, without a wait for the device."""
        ends = [torch.stack([value.amin(), value.amax()]) for value in values]
        if kind in self._pending:
            so_far, first, _ = self._pending[kind]
            ends = [torch.where(so_far, new, old) for new, old in zip(ends, first, strict=True)]
            holds = holds & so_far
        self._pending[kind] = (holds, ends, error)

    def raise_pending(self) -> None:
        """Wait for the device and raise the error of a violated check, if there is one."""
        pending, self._pending = self._pending, {}
        for holds, ends, error in pending.values():
            if not bool(holds):
                raise error(*ends)
