"""ResNeXt: a residual network of grouped bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.models.blocks import check_sizes, convolution, head, normalisation, shortcut

_CARDINALITY = 2
_EXPANSION = 2


class GroupedBottleneck(nn.Module):
    """1×1, grouped 3×3 and 1×1 convolutions and a shortcut; the last convolution doubles the group width.

    ReLU comes after the first two convolutions and after the sum.
    """

    def __init__(self, channels: int, group_width: int, stride: int, *, batchnorm: bool) -> None:
        super().__init__()
        out = _EXPANSION * group_width
        self.branch = nn.Sequential(
            convolution(channels, group_width, 1, batchnorm=batchnorm),
            nn.ReLU(),
            convolution(group_width, group_width, 3, stride, batchnorm=batchnorm, groups=_CARDINALITY),
            nn.ReLU(),
            convolution(group_width, out, 1, batchnorm=batchnorm),
        )
        self.shortcut = shortcut(channels, out, stride, batchnorm=batchnorm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnext(
    in_shape: tuple[int, int, int],
    classes: int,
    width: int | None = None,
    hidden: int = 512,
    *,
    batchnorm: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """A stem, three stages of grouped bottlenecks of cardinality 2, a hidden linear and a classification layer.

    Bottleneck widths are ``width``, 2·``width`` and 4·``width``, with strides 1, 2 and 2; the stem has 2·``width``
    channels. A stage has one block, and two for inputs of 64×64. There is no pooling.

    Args:
        in_shape: (channels, height, width) of the input.
        classes: outputs.
        width: bottleneck width of the first stage; by default the paper's, 32, and 8 for inputs of 64×64.
        hidden: features of the hidden linear layer; the paper's network has 512.
        batchnorm: whether convolutions and the hidden layer are followed by BatchNorm.
        mean, std: per channel, of a leading :class:`~lirpa_fastwarmup.models.Normalize`; both or neither.

    Raises:
        ValueError: ``in_shape`` has not three sizes, a size is not positive, or only one of ``mean`` and ``std`` is
            given.
    """
    check_sizes(in_shape, classes, width, hidden)
    channels, height, breadth = in_shape
    large = height >= 64
    width = width if width is not None else (8 if large else 32)
    stem = _CARDINALITY * width
    layers = [*normalisation(channels, mean, std), convolution(channels, stem, 3, batchnorm=batchnorm), nn.ReLU()]
    channels = stem
    for factor, first_stride in ((1, 1), (2, 2), (4, 2)):
        for stride in (first_stride, 1) if large else (first_stride,):
            layers.append(GroupedBottleneck(channels, _CARDINALITY * factor * width, stride, batchnorm=batchnorm))
            channels = _EXPANSION * _CARDINALITY * factor * width
            height, breadth = (height - 1) // stride + 1, (breadth - 1) // stride + 1
    return nn.Sequential(*layers, *head(channels * height * breadth, hidden, classes, batchnorm=batchnorm))
