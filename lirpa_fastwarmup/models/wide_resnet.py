"""Wide-ResNet-8: a residual network of three wide stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.models.blocks import check_sizes, convolution, head, normalisation, shortcut

_STEM = 16


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; ReLU after the first convolution and after the sum."""

    def __init__(self, channels: int, out: int, stride: int, *, batchnorm: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            convolution(channels, out, 3, stride, batchnorm=batchnorm),
            nn.ReLU(),
            convolution(out, out, 3, batchnorm=batchnorm),
        )
        self.shortcut = shortcut(channels, out, stride, batchnorm=batchnorm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def wide_resnet8(
    in_shape: tuple[int, int, int],
    classes: int,
    width: int | None = None,
    hidden: int = 512,
    *,
    batchnorm: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """A stem, three stages of one basic block, a hidden linear layer and a classification layer.

    Channels are 16 in the stem, then ``width``, 2·``width`` and 4·``width``, with strides 1, 2 and 2. There is no
    pooling.

    Args:
        in_shape: (channels, height, width) of the input.
        classes: outputs.
        width: channels of the first stage; by default the paper's, 128, and 160 for inputs of 64×64.
        hidden: features of the hidden linear layer; the paper's network has 512.
        batchnorm: whether convolutions and the hidden layer are followed by BatchNorm.
        mean, std: per channel, of a leading :class:`~lirpa_fastwarmup.models.Normalize`; both or neither.

    Raises:
        ValueError: ``in_shape`` has not three sizes, a size is not positive, or only one of ``mean`` and ``std`` is
            given.
    """
    check_sizes(in_shape, classes, width, hidden)
    channels, height, breadth = in_shape
    width = width if width is not None else (160 if height >= 64 else 128)
    layers = [*normalisation(channels, mean, std), convolution(channels, _STEM, 3, batchnorm=batchnorm), nn.ReLU()]
    channels = _STEM
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        layers.append(BasicBlock(channels, out, stride, batchnorm=batchnorm))
        channels, height, breadth = out, (height - 1) // stride + 1, (breadth - 1) // stride + 1
    return nn.Sequential(*layers, *head(channels * height * breadth, hidden, classes, batchnorm=batchnorm))
