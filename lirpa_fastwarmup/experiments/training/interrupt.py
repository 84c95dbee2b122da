"""SIGINT and SIGTERM as requests to stop between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType


class TrainingInterrupted(KeyboardInterrupt):
    """The signal ``signal_number`` stopped a run, which can resume from the checkpoint in its folder ``out``."""

    def __init__(self, signal_number: int, out: Path) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} stopped the run; it can be resumed from {out}")
        self.signal_number, self.out = signal_number, out


@dataclass
class StopRequest:
    """The signal that asked the run in ``out`` to stop, 0 for none; two methods are signal handlers."""

    out: Path
    signal_number: int = 0

    def defer(self, signal_number: int, frame: FrameType | None) -> None:
        """Record the signal, and let a second SIGINT interrupt at once."""
        self.signal_number = signal_number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(self, signal_number: int, frame: FrameType | None = None) -> None:
        """Raise :class:`TrainingInterrupted`."""
        raise TrainingInterrupted(signal_number, self.out)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let ``handler`` handle SIGINT and SIGTERM within the block, if this is the main thread."""
    # Python delivers signals to the main thread only, and lets only that thread set handlers.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
