"""CNN-7, the network of the paper's main results."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lirpa_fastwarmup.models.blocks import check_sizes, head, normalisation


def cnn7(
    in_shape: tuple[int, int, int],
    classes: int,
    width: int = 64,
    hidden: int = 512,
    *,
    batchnorm: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Five 3×3 convolutions and two linear layers, with ReLU, and BatchNorm after all but the last.

    Channels are ``width`` (twice) and 2·``width`` (three times), the third convolution has stride 2; on
    64×64 inputs the last one has, too.

    Args:
        in_shape: (channels, height, width) of the input.
        classes: outputs.
        width: channels of the first convolution; the paper's network has 64.
        hidden: features of the hidden linear layer; the paper's network has 512.
        batchnorm: whether layers are followed by BatchNorm.
        mean, std: per channel, of a leading :class:`Normalize`; both or neither.

    Raises:
        ValueError: ``in_shape`` has not three sizes, a size is not positive, or only one of ``mean`` and ``std`` is
            given.
    """
    check_sizes(in_shape, classes, width, hidden)
    channels, height, breadth = in_shape
    layers = normalisation(channels, mean, std)
    last_stride = 2 if height >= 64 else 1
    for out, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, last_stride)):
        layers.append(nn.Conv2d(channels, out, 3, stride, padding=1))
        layers += [nn.BatchNorm2d(out), nn.ReLU()] if batchnorm else [nn.ReLU()]
        channels, height, breadth = out, (height - 1) // stride + 1, (breadth - 1) // stride + 1
    return nn.Sequential(*layers, *head(channels * height * breadth, hidden, classes, batchnorm=batchnorm))
