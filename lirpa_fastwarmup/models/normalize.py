"""Normalisation as a network's first layer, so that ε stays in units of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x − mean)/std, channel by channel.

    Args:
        mean, std: a value per channel of the input ``(batch, channels, *space)``.

    Raises:
        ValueError: the two differ in length, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"expected one mean and one positive std per channel; found mean={mean}, std={std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))  # No batch dimension, which the engine would ask about.
        return (x - self.mean.view(shape)) / self.std.view(shape)
