"""Checks of values that cost a GPU no wait: at once on the CPU, deferred on other devices."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class ValueChecks:
    """Conditions on the values of tensors, raised at once on the CPU and on request elsewhere."""

    def __init__(self) -> None:
        self._pending: dict[str, tuple[Tensor, Callable[[], Exception]]] = {}

    def require(self, kind: str, holds: Tensor, error: Callable[[], Exception]) -> None:
        """Raise ``error()`` unless the 0-dim ``holds`` is true; off the CPU, keep it for later.

        Off the CPU the first violation of each ``kind`` is remembered together with the error of its
        latest call.
        """
        if holds.device.type == "cpu":
            if not bool(holds):
                raise error()
            return
        if kind in self._pending:
            holds = holds & self._pending[kind][0]
        self._pending[kind] = (holds, error)

    def raise_pending(self) -> None:
        """Wait for the device and raise the error of a violated check, if there is one."""
        pending, self._pending = self._pending, {}
        for holds, error in pending.values():
            if not bool(holds):
                raise error()
