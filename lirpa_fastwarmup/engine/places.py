"""Names the user's layer that a node of the engine belongs to, and what to write instead of it."""

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.compat import engine, preserved_export_settings, silenced_warnings
from lirpa_fastwarmup.engine.precision import temporarily

# By the class of a layer, by a function (in lower case) that no release bounds, or else by an operator.
with Path(__file__).with_name("advice.csv").open(newline="", encoding="utf-8") as _file:
    ADVICE = {name: row["advice"] for row in csv.DictReader(_file) for name in row["names"].split()}


@dataclass(frozen=True)
class Layer:
    """A module: its qualified name, the classes from its own to the network's, and the functions that it calls."""

    name: str
    kinds: tuple[str, ...]
    calls: tuple[str, ...]

    def __str__(self) -> str:
        return f"module {self.name!r} ({self.kinds[0]})" if self.name else f"the network itself ({self.kinds[0]})"

    def advice(self, operator: str) -> list[str]:
        """Sentences that say what to write instead of ``operator`` in this layer."""
        kinds, calls = ([name for name in names if name in ADVICE] for names in (self.kinds, self.calls))
        return [f" Instead of {name}, {ADVICE[name]}." for name in kinds[:1] or calls or [operator] if name in ADVICE]


class Places:
    """The layers of ``model`` that operators belong to.

    A trace of its own has every module's index as the scope of its operators: scopes would change the engine's names.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._modules, parser = dict(model.named_modules()), engine.parse_graph
        graph = self._scoped(lambda: parser.torch.jit._get_trace_graph(model, tuple(inputs))[0].nodes())
        self._calls = [(node.kind(), node.scopeName().rpartition("/")[2]) for node in graph]
        nodes = self._scoped(lambda: parser.parse_module(model, tuple(inputs))[0])
        self._scopes = {f"/{node.name.split('/')[-1]}": node.name.split("/")[-2] for node in nodes}

    def _scoped(self, trace: Callable[[], Any]) -> list[Any]:
        with suppress(Exception), ExitStack() as hooks, quiet_engine():  # The failure of the first trace is reported.
            for index, module in enumerate(self._modules.values()):
                hooks.enter_context(module.register_forward_pre_hook(partial(_enter, str(index))))
                hooks.enter_context(module.register_forward_hook(_leave))
            return list(trace())
        return []

    def of_node(self, name: str) -> Layer | None:
        """The layer of the engine's node ``name``, which it extends by "/split/..." where it splits an operator."""
        return self._layer(self._scopes.get("/".join(name.split("/")[:2]), ""))

    def of_call(self, words: Sequence[str]) -> tuple[str, Layer | None]:
        """The first function called whose name is among ``words``, and its layer."""
        found = ((kind, self._layer(scope)) for kind, scope in self._calls if kind.rpartition("::")[2] in words)
        return next(found, ("the network", None))

    def _layer(self, scope: str) -> Layer | None:
        if not scope:
            return None
        name = list(self._modules)[int(scope)]
        parts = name.split(".") if name else []
        outwards = [self._modules[".".join(parts[:depth])] for depth in range(len(parts), -1, -1)]
        calls = dict.fromkeys(kind.removeprefix("aten::") for kind, place in self._calls if place == scope)
        return Layer(name, tuple(type(module).__name__ for module in outwards), tuple(calls))


def _enter(scope: str, *_: Any) -> None:
    if state := torch._C._get_tracing_state():
        state.push_scope(scope)


def _leave(*_: Any) -> None:
    if state := torch._C._get_tracing_state():
        state.pop_scope()


def by_place(found: Iterable[tuple[str, str]]) -> list[str]:
    """Operators grouped by their places: "Pow, Sqrt in module 'norm' (LayerNorm)"."""
    at: dict[str, dict[str, None]] = {}
    for operator, place in found:
        at.setdefault(place, {})[operator] = None
    return [f"{', '.join(operators)} {place}".strip() for place, operators in at.items()]


@contextmanager
def quiet_engine() -> Iterator[None]:
    """Silence the engine's log, warnings and output, and restore the exporter's settings."""
    no_log = temporarily([logging.getLogger("auto_LiRPA.utils")], "disabled", True)
    with preserved_export_settings(), silenced_warnings(), redirect_stdout(io.StringIO()), no_log:
        yield
