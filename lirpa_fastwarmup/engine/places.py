"""Names the user's layer that a node of the engine belongs to, and what to write instead of it."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.compat import engine, preserved_export_settings, silenced_warnings
from lirpa_fastwarmup.engine.precision import temporarily

_STATISTICS = "use nn.BatchNorm1d, 2d or 3d, whose statistics are constants in evaluation mode"
_SLIDING = "use nn.Conv1d, or nn.Linear over the positions, of which all methods have bounds"
# By the class of a layer, by a function (in lower case) that no release bounds, or else by an operator.
_INSTEAD = {
    "LayerNorm GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d RMSNorm LocalResponseNorm": _STATISTICS,
    "layer_norm group_norm instance_norm rms_norm linalg_vector_norm cosine_similarity var std": _STATISTICS,
    "GRU LSTM RNN GRUCell LSTMCell RNNCell MultiheadAttention scaled_dot_product_attention": _SLIDING,
    "ELU CELU SELU GELU Mish Softplus Elu Selu Erf": "use nn.SiLU, nn.GELU(approximate='tanh') or nn.LeakyReLU",
    "PReLU": "use nn.LeakyReLU, whose slope is fixed",
    "LogSigmoid": "use -F.softplus(-x)",
    "GLU": "use slices, x[:, :n] * torch.sigmoid(x[:, n:])",
    "Softsign Sqrt Log Exp Sin Cos Tan Atan Sign Round Floor": "use nn.Tanh, nn.Sigmoid, nn.Softplus or nn.ReLU",
    "Hardshrink Softshrink Threshold Greater Less Where": "use nn.LeakyReLU, nn.Hardtanh or torch.clamp",
    "softmax log_softmax": "return the logits, if it is the last layer, or use nn.Sigmoid inside the network",
    "Embedding": "pass embedded vectors to the network, or use auto_LiRPA 0.3",
    "Unflatten": "use x.view(x.shape[0], ...), or auto_LiRPA 0.7.1",
    "AdaptiveAvgPool2d aten::adaptive_avg_pool2d": "use a size that divides the input's, such as 1, or nn.AvgPool2d",
    "AdaptiveMaxPool2d aten::adaptive_max_pool2d": "use a size that divides the input's, such as 1, or nn.MaxPool2d",
    "Upsample Resize aten::upsample_nearest2d": "use nn.ConvTranspose2d with a stride, or F.pixel_shuffle",
    "ChannelShuffle": "use view, transpose and reshape",
    "einsum bilinear": "use nn.Linear, or a matrix product with a weight",
    "_WeightNorm _SpectralNorm": "use a plain weight: nn.utils.parametrize.remove_parametrizations",
    "Max": "use a + torch.relu(b - a)",
    "Min": "use a - torch.relu(a - b)",
    "ReduceMax ReduceMin": "use max pooling, such as F.adaptive_max_pool2d(x, 1)",
    "Div Reciprocal": "divide by a constant, or multiply by a gate, x * torch.sigmoid(y)",
    "Pow": "use products, x * x",
    "Expand Tile": "use broadcasting, or torch.cat([x, x], 1)",
}
ADVICE = {name: text for names, text in _INSTEAD.items() for name in names.split()}


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

    It is traced again, with every module's index as the scope of its operators: in the trace that the engine bounds,
    scopes would change the names of nodes.
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
