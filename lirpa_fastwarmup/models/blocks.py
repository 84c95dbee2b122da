"""What the networks share: checks of their arguments, the first layer, BatchNorm where wanted, the head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lirpa_fastwarmup.models.normalize import Normalize


def check_sizes(in_shape: Sequence[int], classes: int, width: int | None, hidden: int) -> None:
    """Refuse sizes that no network can have; ``width=None`` stands for the default.

    Raises:
        ValueError: ``in_shape`` is not that of an image, or a size is not positive.
    """
    if len(in_shape) != 3:
        raise ValueError(
            f"found in_shape={tuple(in_shape)}, but the network's convolutions need images: give (channels, height, "
            "width), without the batch"
        )
    if min(*in_shape, classes, hidden, 1 if width is None else width) < 1:
        raise ValueError(
            f"sizes must be positive; found in_shape={tuple(in_shape)}, classes={classes}, width={width}, "
            f"hidden={hidden}"
        )


def normalisation(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> list[nn.Module]:
    """A leading :class:`Normalize`, where its figures are given.

    Raises:
        ValueError: only one of them is given, or they are not one per channel.
    """
    if (mean is None) != (std is None):
        raise ValueError("give mean and std together, or neither")
    if mean is None or std is None:
        return []
    if len(mean) != channels:
        raise ValueError(f"images of {channels} channel(s) need as many means and stds; found mean={mean}, std={std}")
    return [Normalize(mean, std)]


def convolution(
    channels: int, out: int, kernel: int, stride: int = 1, *, batchnorm: bool, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, and BatchNorm if wanted."""
    layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(out)] if batchnorm else []))


def shortcut(channels: int, out: int, stride: int, *, batchnorm: bool) -> nn.Module:
    """The identity, or a 1×1 convolution where shapes differ."""
    if channels == out and stride == 1:
        return nn.Identity()
    return convolution(channels, out, 1, stride, batchnorm=batchnorm)


def head(features: int, hidden: int, classes: int, *, batchnorm: bool) -> list[nn.Module]:
    """Flatten, a hidden linear layer, and the classification layer."""
    norm = [nn.BatchNorm1d(hidden)] if batchnorm else []
    return [nn.Flatten(), nn.Linear(features, hidden), *norm, nn.ReLU(), nn.Linear(hidden, classes)]
