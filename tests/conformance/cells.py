"""The table of operators and attributes whose bounds are tested: every cell is a small network around one operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import Function

SPACES = {
    0: (),
    1: (9,),
    2: (7, 7),
    3: (3, 4, 3),
}  # By rank; odd, so that windows leave something over; patches are for squares.
SMALL = (3, 4)
CHANNELS = 4


@dataclass(frozen=True)
class Cell:
    """An operator with attributes.

    Attributes:
        operator: its name in PyTorch.
        attributes: the attributes, as text.
        build: makes a module of ``CHANNELS`` channels, or features, with these attributes.
        rank: its spatial dimensions; 0 for vectors.
        linear: whether it is an affine function of its input.
        small: on an image that the window of two convolutions does not fit into.
    """

    operator: str
    attributes: str
    build: Callable[[], nn.Module]
    rank: int = 2
    linear: bool = False
    small: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, *(SMALL if self.small else SPACES[self.rank])) if self.rank else (6,)

    @property
    def name(self) -> str:
        return f"{self.operator}({self.attributes})"

    def network(self, *, linear: bool = False) -> nn.Module:
        """The operator behind one layer and, where shapes allow, before another; affine on request."""
        return surrounded(self.build(), self.rank, self.shape, activate=not linear)

    def inputs(self, batch: int) -> Tensor:
        return torch.rand(batch, *self.shape, dtype=torch.float64)


def surrounded(operator: nn.Module, rank: int, shape: tuple[int, ...], *, activate: bool = True) -> nn.Module:
    """A network of double precision, in evaluation mode, with ``operator`` inside."""
    first = _layer(rank, 2 if rank else 6, CHANNELS)
    activation = nn.ReLU if activate else nn.Identity
    layers: list[nn.Module] = [first, activation() if _is_affine(operator) else nn.Identity(), operator]
    example = torch.rand(2, *shape)
    after = nn.Sequential(*layers).eval()(example)
    layers.append(activation())
    if after.ndim == rank + 2 and rank and min(after.shape[2:]) > 1:
        layers += [_layer(rank, after.shape[1], 3), activation()]
    layers.append(nn.Flatten())
    layers.append(nn.Linear(nn.Sequential(*layers).eval()(example).shape[1], 3))
    return nn.Sequential(*layers).double().eval()


def _layer(rank: int, channels: int, out: int) -> nn.Module:
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return convolution[rank](channels, out, 3, padding=1) if rank else nn.Linear(channels, out)


def _is_affine(operator: nn.Module) -> bool:
    """Whether the operator leaves kinks to others, so that a ReLU goes before it."""
    return not isinstance(operator, Function | nn.ReLU) and type(operator).__module__ != "torch.nn.modules.activation"


class BranchSum(nn.Module):
    """Two branches, joined."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.relu(self.one(x)), self.other(x))


class SqueezeExcitation(nn.Module):
    """Channels scaled by a gate of their means."""

    def __init__(self, gate: type[nn.Module], channels: int = CHANNELS) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.excite(torch.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class Constants(nn.Module):
    """Arithmetic with a buffer of one value per channel."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("c", torch.rand(CHANNELS, 1, 1) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.c)


class Unbent(nn.Module):
    """Two padded convolutions, and what joins them, without an activation in between."""

    def __init__(self, between: Callable[[], nn.Module], join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.between, self.join = between(), join

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x))
        return self.join(x, torch.relu(self.second(x)))


def _grid(**values: tuple[object, ...]) -> Iterator[dict[str, object]]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _text(attributes: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in attributes.items())


def _of(kind: type[nn.Module], *first: object, rank: int, **attributes: object) -> Cell:
    text = ", ".join([*map(str, first), *([_text(attributes)] if attributes else [])])
    linear = not kind.__name__.startswith(("MaxPool", "AdaptiveMax"))
    return Cell(kind.__name__, text, lambda: kind(*first, **attributes), rank, linear)


def _convolutions() -> Iterator[Cell]:
    for kind, rank in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)):
        for attributes in _grid(stride=(1, 2), padding=(0, 1, 2), dilation=(1, 2), groups=(1, 2)):
            some = attributes["padding"] == 1 and attributes["stride"] == attributes["dilation"] <= 4 - rank
            if rank == 2 or some:
                yield _of(kind, CHANNELS, CHANNELS, 3, rank=rank, **attributes)
        yield _of(kind, CHANNELS, CHANNELS, 3, rank=rank, padding=1, groups=CHANNELS)
        yield _of(kind, CHANNELS, 3, 1, rank=rank, bias=False)
    yield _of(nn.Conv2d, CHANNELS, CHANNELS, 3, rank=2, padding="same")
    yield _of(nn.Conv2d, CHANNELS, CHANNELS, 2, rank=2, padding="same")
    yield _of(nn.Conv2d, CHANNELS, CHANNELS, (3, 1), rank=2, padding=(1, 0), stride=(1, 2))
    for mode in ("reflect", "replicate", "circular"):
        for kind, rank in ((nn.Conv1d, 1), (nn.Conv2d, 2)):
            yield _of(kind, CHANNELS, CHANNELS, 3, rank=rank, padding=1, padding_mode=mode)


def _transposed() -> Iterator[Cell]:
    for kind, rank in ((nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)):
        for attributes in _grid(stride=(1, 2), padding=(0, 1), output_padding=(0, 1), dilation=(1, 2)):
            if attributes["output_padding"] == 1 and attributes["stride"] == attributes["dilation"] == 1:
                continue  # PyTorch asks for less output padding than stride or dilation.
            if rank == 2 or (attributes["padding"] == 1 and attributes["dilation"] == 1):
                yield _of(kind, CHANNELS, 2, 3, rank=rank, **attributes)
        yield _of(kind, CHANNELS, CHANNELS, 2, rank=rank, stride=2, groups=2)
    yield _of(nn.ConvTranspose2d, CHANNELS, 2, 2, rank=2, stride=2, bias=False)


def _pools() -> Iterator[Cell]:
    windows = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 1, 0), (3, 3, 0), (2, 3, 1), (2, 2, 1)]
    for rank, mean, maximum in (
        (1, nn.AvgPool1d, nn.MaxPool1d),
        (2, nn.AvgPool2d, nn.MaxPool2d),
        (3, nn.AvgPool3d, nn.MaxPool3d),
    ):
        for (window, stride, padding), ceil_mode in itertools.product(
            windows[: 3 if rank != 2 else None], (False, True)
        ):
            yield _of(mean, window, stride, padding, rank=rank, ceil_mode=ceil_mode)
            yield _of(maximum, window, stride, padding, rank=rank, ceil_mode=ceil_mode)
        yield _of(mean, 3, 2, 1, rank=rank, count_include_pad=False)
        yield _of(maximum, 2, 1, rank=rank, dilation=2)
        yield _of(maximum, 2, 2, rank=rank, dilation=2)
    yield _of(nn.AvgPool2d, 2, rank=2, divisor_override=3)
    yield _of(nn.AvgPool2d, 2, rank=2, divisor_override=4)
    yield _of(nn.AvgPool2d, (2, 3), (1, 2), rank=2)
    yield _of(nn.MaxPool2d, (2, 3), (1, 2), rank=2)
    for size in (1, (7, 1), (7, 7), 3, (None, 1)):
        yield _of(nn.AdaptiveAvgPool2d, size, rank=2)
    for size in (1, (7, 1), 4):
        yield _of(nn.AdaptiveMaxPool2d, size, rank=2)
    yield _of(nn.AdaptiveAvgPool1d, 1, rank=1)
    yield _of(nn.AdaptiveAvgPool1d, 3, rank=1)
    yield _of(nn.AdaptiveAvgPool3d, 1, rank=3)


def _activations() -> Iterator[Cell]:
    modules: list[tuple[str, str, Callable[[], nn.Module]]] = [
        ("ReLU", "", nn.ReLU),
        ("ReLU", "inplace=True", lambda: nn.ReLU(inplace=True)),
        ("ReLU6", "", nn.ReLU6),
        *(
            ("LeakyReLU", str(slope), lambda slope=slope: nn.LeakyReLU(slope))
            for slope in (-0.3, 0.0, 0.01, 0.5, 1.0, 1.5)
        ),
        *(
            ("Hardtanh", f"{low}, {high}", lambda low=low, high=high: nn.Hardtanh(low, high))
            for low, high in ((-1, 1), (-0.1, 0.2), (0.1, 0.3))
        ),
        ("Hardsigmoid", "", nn.Hardsigmoid),
        ("Hardswish", "", nn.Hardswish),
        *(
            (kind.__name__, "", kind)
            for kind in (
                nn.Sigmoid,
                nn.Tanh,
                nn.Softplus,
                nn.ELU,
                nn.CELU,
                nn.SELU,
                nn.GELU,
                nn.SiLU,
                nn.Mish,
                nn.LogSigmoid,
                nn.Softsign,
                nn.Hardshrink,
                nn.PReLU,
            )
        ),
        ("GELU", "approximate='tanh'", lambda: nn.GELU(approximate="tanh")),
        *(("ELU", f"alpha={alpha}", lambda alpha=alpha: nn.ELU(alpha)) for alpha in (-1.5, 0.3)),
        ("Softmax", "1", lambda: nn.Softmax(1)),
    ]
    for name, attributes, build in modules:
        for rank in (0, 2):
            yield Cell(name, f"{attributes}{', ' if attributes else ''}{'image' if rank else 'vector'}", build, rank)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "clamp(min=-0.1)": lambda x: x.clamp(min=-0.1),
        "clamp(max=0.1)": lambda x: x.clamp(max=0.1),
        "abs": torch.abs,
        "exp": torch.exp,
        "log(|x| + 1)": lambda x: torch.log(x.abs() + 1),
        "sqrt(|x| + 0.1)": lambda x: torch.sqrt(x.abs() + 0.1),
        "x**2": lambda x: x**2,
        "x**3": lambda x: x**3,
        "x*x": lambda x: x * x,
        "1/(|x| + 1)": lambda x: 1 / (x.abs() + 1),
        "x/(|x|.sum() + 1)": lambda x: x / (x.abs().flatten(1).sum(1).view(-1, 1, 1, 1) + 1),
        "erf": torch.erf,
        "-softplus(-x)": lambda x: -F.softplus(-x),
        "x[:, :2] * sigmoid(x[:, 2:])": lambda x: x[:, :2] * torch.sigmoid(x[:, 2:]),
        "sin": torch.sin,
        "atan": torch.atan,
        "maximum(x, 0.1x)": lambda x: torch.maximum(x, 0.1 * x),
        "minimum(x, 0.1x)": lambda x: torch.minimum(x, 0.1 * x),
        "where(x > 0)": lambda x: torch.where(x > 0, x, 0.1 * x),
        "amax": lambda x: x.amax((2, 3), keepdim=True) + x,
    }
    for name, function in functions.items():
        yield Cell("function", name, lambda function=function: Function(function))


def _normalisations() -> Iterator[Cell]:
    for kind, rank in ((nn.BatchNorm1d, 0), (nn.BatchNorm1d, 1), (nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3)):
        for affine in (True, False):
            yield Cell(
                kind.__name__,
                f"affine={affine}, rank {rank}",
                lambda kind=kind, affine=affine: as_trained(kind(CHANNELS, affine=affine)),
                rank,
                True,
            )
    yield _of(nn.LayerNorm, [CHANNELS], rank=0)
    yield _of(nn.GroupNorm, 2, CHANNELS, rank=2)
    yield _of(nn.InstanceNorm2d, CHANNELS, rank=2)
    yield _of(nn.LocalResponseNorm, 2, rank=2)


def as_trained(norm: nn.Module) -> nn.Module:
    """A BatchNorm as after training: statistics, and weights of both signs."""
    nn.init.normal_(norm.running_mean, std=0.3)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def _moves() -> Iterator[Cell]:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "flatten(1)": lambda x: x.flatten(1),
        "flatten(2)": lambda x: x.flatten(2),
        "view": lambda x: x.view(x.shape[0], -1),
        "reshape to channels": lambda x: x.reshape(x.size(0), 2, -1, 7),
        "permute": lambda x: x.permute(0, 2, 3, 1),
        "transpose(1, 2)": lambda x: x.transpose(1, 2),
        "transpose of the batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "unsqueeze, squeeze": lambda x: x.unsqueeze(2).squeeze(2),
        "concatenation of channels": lambda x: torch.cat([x, torch.relu(x)], 1),
        "concatenation of rows": lambda x: torch.cat([x, -x], 2),
        "concatenation with a constant": lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1),
        "stack": lambda x: torch.stack([x, 2 * x], 2).flatten(1, 2),
        "slice of channels": lambda x: x[:, 1:3],
        "slice with a step": lambda x: x[:, :, ::2, 1::2],
        "slice from the end": lambda x: x[:, :, -3:],
        "one channel": lambda x: x[:, 1],
        "last column": lambda x: x[..., -1],
        "chosen channels": lambda x: x[:, [2, 0, 2]],
        "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        "split": lambda x: x.split([1, 3], 1)[1],
        "flip": lambda x: x.flip(1),
        "roll": lambda x: x.roll(1, 2),
        "channel shuffle": lambda x: x.view(x.shape[0], 2, 2, 7, 7).transpose(1, 2).reshape(x.shape[0], 4, 7, 7),
        "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
        "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
        "repeat": lambda x: x.repeat(1, 2, 1, 1),
        "mean over space": lambda x: x.mean((2, 3)),
        "mean over space, kept": lambda x: x.mean((2, 3), keepdim=True),
        "mean over channels": lambda x: x.mean(1),
        "mean over negative dims": lambda x: x.mean((-1, -2)),
        "sum over rows": lambda x: x.sum(2),
        "sum over space, kept": lambda x: x.sum((2, 3), keepdim=True),
        "zero padding": lambda x: F.pad(x, (1, 0, 2, 1)),
        "padding by 0.5": lambda x: F.pad(x, (1, 1, 1, 1), value=0.5),
        "cropping": lambda x: F.pad(x, (-1, 0, 0, -1)),
        "reflection": lambda x: F.pad(x, (1, 1, 1, 2), mode="reflect"),
        "replication": lambda x: F.pad(x, (1, 0, 2, 1), mode="replicate"),
        "nearest upsampling": lambda x: F.interpolate(x, scale_factor=2),
        "bilinear upsampling": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
        "dropout": lambda x: F.dropout(x, 0.5, False),
    }
    linear = {name for name in functions if name not in ("concatenation of channels",)}
    for name, function in functions.items():
        yield Cell("moving elements", name, lambda function=function: Function(function), 2, name in linear)


def _arithmetic() -> Iterator[Cell]:
    joins: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "a + b": lambda a, b: a + b,
        "a - b": lambda a, b: a - b,
        "b - 2a": lambda a, b: torch.sub(b, a, alpha=2),
        "a * b": lambda a, b: a * b,
        "a / (|b| + 1)": lambda a, b: a / (b.abs() + 1),
        "a + b + a": lambda a, b: a + b + a,
        "a + relu(b - a)": lambda a, b: a + torch.relu(b - a),
        "a - relu(a - b)": lambda a, b: a - torch.relu(a - b),
        "a @ b": lambda a, b: a @ b.transpose(2, 3),
    }
    for name, join in joins.items():
        yield Cell("two branches", name, lambda join=join: BranchSum(join))
    between: dict[str, Callable[[], nn.Module]] = {
        "nothing": nn.Identity,
        "BatchNorm": lambda: as_trained(nn.BatchNorm2d(CHANNELS)),
        "a shift": lambda: Function(lambda x: x + 0.5),
        "ReLU": nn.ReLU,
        "LeakyReLU": nn.LeakyReLU,
        "Sigmoid": nn.Sigmoid,
    }
    chains: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"b": lambda a, b: b, "a - b": lambda a, b: a - b}
    for (name, build), (text, join), small in itertools.product(between.items(), chains.items(), (False, True)):
        yield Cell(
            "two convolutions",
            f"{name} between them, {text}, {'small' if small else 'large'} image",
            lambda build=build, join=join: Unbent(build, join),
            small=small,
        )
    for gate in (nn.Sigmoid, nn.Hardsigmoid, nn.ReLU):
        yield Cell("squeeze-excitation", gate.__name__, lambda gate=gate: SqueezeExcitation(gate))
    constants: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "x + c": lambda x, c: x + c,
        "c - x": lambda x, c: c - x,
        "x * c": lambda x, c: x * c,
        "x / c": lambda x, c: x / c,
        "c / (x + 9)": lambda x, c: c / (x + 9),
        "(x - c) / sqrt(c)": lambda x, c: (x - c) / torch.sqrt(c),
        "-x": lambda x, c: -x,
        "3 x - 1": lambda x, c: 3 * x - 1,
        "x * c over columns": lambda x, c: x * c[:1].expand(1, 7, 7).cumsum(2),
    }
    for name, function in constants.items():
        linear = name != "c / (x + 9)"
        yield Cell("constants", name, lambda function=function: Constants(function), 2, linear)


def _linear() -> Iterator[Cell]:
    for bias in (True, False):
        yield Cell("Linear", f"bias={bias}", lambda bias=bias: nn.Linear(CHANNELS, 5, bias=bias), 0, True)
        yield Cell("Linear", f"bias={bias}, over positions", lambda bias=bias: nn.Linear(9, 5, bias=bias), 1, True)
    yield Cell("Linear", "over columns of images", lambda: nn.Linear(7, 5), 2, True)
    yield Cell(
        "Linear", "weight times a scale", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(CHANNELS, 5)), 0, True
    )


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in itertools.chain(
        _convolutions(), _transposed(), _pools(), _linear(), _normalisations(), _activations(), _moves(), _arithmetic()
    )
}
