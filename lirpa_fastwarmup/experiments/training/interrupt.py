"""SIGINT and SIGTERM as requests to stop between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped a run, which can go on from the checkpoint in its folder.

    Attributes:
        signal_number: the signal.
        out: the run's folder.
    """

    def __init__(self, signal_number: int, out: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"{name} stopped the run; its state is in {out}, from which it can be resumed")
        self.signal_number = signal_number
        self.out = out


class StopRequest:
    """Whether a stop of the run in ``out`` was asked for."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._signal_number: int | None = None

    def note(self, signal_number: int, frame: FrameType | None) -> None:
        """A signal's handler: remember the signal, and let a second SIGINT interrupt at once."""
        self._signal_number = signal_number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        return self._signal_number is not None

    def agree(self) -> None:
        """Another process was asked to stop, if this one was not."""
        if self._signal_number is None:
            self._signal_number = signal.SIGTERM

    def raise_if_asked(self) -> None:
        """Raise :class:`TrainingInterrupted` if a stop was asked for."""
        if self._signal_number is not None:
            raise TrainingInterrupted(self._signal_number, self._out)


@contextmanager
def deferred_signals(out: Path) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, for as long as the block lasts."""
    request = StopRequest(out)
    with _handled_by(request.note):
        yield request


@contextmanager
def raising_signals(out: Path) -> Iterator[None]:
    """Let SIGINT and SIGTERM raise :class:`TrainingInterrupted` at once: nothing is lost in this block."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise TrainingInterrupted(signal_number, out)

    with _handled_by(stop):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # Python delivers signals to the main thread only; a run in another one cannot be asked to stop.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
