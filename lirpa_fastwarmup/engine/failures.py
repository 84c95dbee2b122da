"""Failures of the engine while it bounds, as errors that name the method and the place in the user's network."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.operators import operator_of
from lirpa_fastwarmup.memory import is_out_of_memory

Bound: Any = engine.bound_general.Bound
_OURS = ("auto_LiRPA", "lirpa_fastwarmup")


@contextmanager
def named_failures(bounded: Any, method: str) -> Iterator[None]:
    """Turn an exception of the engine into one that says where in the network it came from.

    Raises:
        NotImplementedError: the engine failed. Exceptions of the user's own operators, and of memory that does not
            suffice, pass as they are.
    """
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if is_out_of_memory(error) or not _of_the_engine(frames):
            raise
        cause = f"({type(error).__name__}: {error})"
        raise NotImplementedError(
            f"auto_LiRPA {ENGINE_VERSION} failed in {method} {_place(bounded, frames)} {cause}: use another method, or "
            "write the network with other operators"
        ) from error


def _of_the_engine(frames: list[FrameType]) -> bool:
    """Whether the innermost code, libraries aside, is the engine's or this package's, and not the user's."""
    for frame in reversed(frames):
        if _package(frame) not in ("torch", *sys.stdlib_module_names) or _package(frame) == "__main__":
            return _package(frame) in _OURS
    return True


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _place(bounded: Any, frames: list[FrameType]) -> str:
    nodes = {id(node) for node in bounded._modules.values()}
    for frame in reversed([frame for frame in frames if _package(frame) in _OURS]):
        for name in ("self", "l", "node"):
            found = frame.f_locals.get(name)
            if isinstance(found, Bound) and id(found) in nodes:
                return f"at {operator_of(found)} {read_graph(bounded).place_of(found)}"
    return "on this network"
