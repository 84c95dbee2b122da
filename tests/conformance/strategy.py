"""Random networks of the accepted operators with random attributes, in one to three dimensions, for hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conformance.cells import SqueezeExcitation, as_trained
from tests.networks import Function

Draw = Callable[[Any], Any]
_CONVOLUTION: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MAX: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEAN: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Residual(nn.Module):
    """x + f(x), or what else joins the two."""

    def __init__(self, branch: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.join = branch, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch(x))


def _convolution(draw: Draw, channels: int, rank: int) -> nn.Module:
    groups = draw(st.sampled_from([1, channels, 2 if channels % 2 == 0 else 1]))
    out = groups * draw(st.integers(1, 2))
    return _CONVOLUTION[rank](
        channels,
        out,
        draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "zeros", "circular", "replicate"]))
        if rank < 3
        else "zeros",
    )


def _transposed(draw: Draw, channels: int, rank: int) -> nn.Module:
    stride = draw(st.integers(1, 2))
    return _TRANSPOSED[rank](
        channels,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        stride=stride,
        padding=draw(st.integers(0, 1)),
        output_padding=draw(st.integers(0, stride - 1)),
        bias=draw(st.booleans()),
    )


def _pool(draw: Draw, _: int, rank: int) -> nn.Module:
    window = draw(st.integers(1, 3))
    shared = {
        "kernel_size": window,
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, window // 2)),
        "ceil_mode": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return _MAX[rank](**shared, dilation=draw(st.integers(1, 2)))
    return _MEAN[rank](**shared, count_include_pad=draw(st.booleans()))


def _activation(draw: Draw, *_: int) -> nn.Module:
    low = draw(st.floats(-1, 0.2))
    return draw(
        st.sampled_from(
            [
                nn.ReLU(),
                nn.ReLU6(),
                nn.LeakyReLU(draw(st.floats(0, 1))),
                nn.Sigmoid(),
                nn.Tanh(),
                nn.Hardtanh(low, low + draw(st.floats(0.05, 1))),
                nn.Hardsigmoid(),
                nn.Hardswish(),
                Function(lambda x: x.clamp(min=low)),
            ]
        )
    )


def _norm(draw: Draw, channels: int, rank: int) -> nn.Module:
    return as_trained(_NORM[rank](channels, affine=draw(st.booleans())))


def _branch(draw: Draw, channels: int, rank: int) -> nn.Module:
    inner = _CONVOLUTION[rank](channels, channels, 3, padding=1) if rank else nn.Linear(channels, channels)
    joins = [torch.add, torch.sub, lambda x, y: torch.cat([x, y], 1), lambda x, y: x - 2 * y, torch.mul]
    return Residual(nn.Sequential(inner, _activation(draw)), draw(st.sampled_from(joins)))


def _move(draw: Draw, channels: int, rank: int) -> nn.Module:
    keep = draw(st.integers(1, channels))
    moves: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[:, :keep],
        lambda x: x.flip(1),
        lambda x: torch.cat(x.split([1, channels - 1], 1)[::-1], 1) if channels > 1 else x,
        lambda x: 1.5 - 2 * x,
        lambda x: x[..., ::2],
        lambda x: F.pad(x, (1, 0)),
        lambda x: x.transpose(-1, -2).contiguous() if rank > 1 else x,
        lambda x: x.mean(-1, keepdim=True) + x if rank else x,
    ]
    return Function(draw(st.sampled_from(moves)))


def _gate(draw: Draw, channels: int, rank: int) -> nn.Module:
    gate = draw(st.sampled_from([nn.Sigmoid, nn.Hardsigmoid]))
    return SqueezeExcitation(gate, channels) if rank == 2 else nn.Identity()


_VECTOR = (_activation, _norm, _branch, _move)
_SPATIAL = (
    _convolution,
    _convolution,
    _transposed,
    _pool,
    _pool,
    _activation,
    _activation,
    _norm,
    _branch,
    _move,
    _gate,
)
_LARGEST = 600  # Elements of a layer: CROWN makes matrices of their squares.


@st.composite
def operator_networks(draw: Draw) -> tuple[nn.Module, Tensor]:
    """A random network of three classes, in evaluation mode, and inputs for it, in double precision."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.sampled_from([0, 1, 2, 2, 2, 3]))
    channels = draw(st.integers(1, 3))
    side = st.integers(3, 7 if rank < 3 else 4)
    # Half of them square: only there does CROWN keep coefficients as patches.
    space = [draw(side)] * rank if draw(st.booleans()) else [draw(side) for _ in range(rank)]
    shape = (channels, *space)
    x = torch.rand(2, *shape)
    layers: list[nn.Module] = [
        _CONVOLUTION[rank](channels, 4, 3, padding=1) if rank else nn.Linear(channels, draw(st.integers(2, 6)))
    ]
    for _ in range(draw(st.integers(1, 5))):
        value = nn.Sequential(*layers).eval()(x)
        layer = draw(st.sampled_from(_SPATIAL if rank else _VECTOR))(draw, value.shape[1], rank)
        if _fits(layer.eval(), value, rank):
            layers.append(layer)
    if draw(st.booleans()):
        layers.append(nn.ReLU())
    if rank and draw(st.booleans()):
        layers.append({1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[rank](1))
    layers.append(nn.Flatten())
    features = nn.Sequential(*layers).eval()(x).shape[1]
    if draw(st.booleans()):
        layers += [nn.Linear(features, 5), nn.ReLU()]
        features = 5
    layers.append(nn.Linear(features, 3, bias=draw(st.booleans())))
    return nn.Sequential(*layers).double().eval(), x.double()


def _fits(layer: nn.Module, value: Tensor, rank: int) -> bool:
    try:
        after = layer(value)
    except (RuntimeError, ValueError):  # A window larger than the image, padding beyond half a window …
        return False
    return after.ndim == rank + 2 and 0 < after[0].numel() <= _LARGEST and bool(after.isfinite().all())
