"""The paper's networks: CNN-7, Wide-ResNet-8 and ResNeXt."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x − mean)/std, channel by channel. As a network's first layer, it keeps ε in units of the input.

    Both have a value per channel. Raises ValueError if they differ in length, or a std is not positive.
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
        shape = (-1, *[1] * (x.ndim - 2))  # No batch dimension, so that the engine need not guess whether it is one.
        return (x - self.mean.view(shape)) / self.std.view(shape)


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

    Channels: ``width`` twice, 2·``width`` three times. The third layer has stride 2, on 64×64 inputs also the last.
    Raises ValueError if sizes are not three or not positive, or only one of ``mean`` and ``std`` is given.

    Args:
        in_shape: (channels, height, width) of the input.
        width: channels of the first convolution; 64 in the paper.
        hidden: features of the hidden linear layer; 512 in the paper.
        batchnorm: whether layers are followed by BatchNorm.
        mean, std: per channel, of a leading :class:`~lirpa_fastwarmup.models.Normalize`; both or neither.
    """
    layers = _normalisation(in_shape, (classes, width, hidden), mean, std)
    channels, last = in_shape[0], 2 if in_shape[1] >= 64 else 1
    for out, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, last)):
        layers += [*_conv(channels, out, 3, stride, batchnorm=batchnorm), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, *_head(in_shape, channels, 2 * last, hidden, classes, batchnorm))


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
    """A stem, three residual blocks of two 3×3 convolutions, a hidden linear and a classification layer.

    Channels are 16 in the stem, then ``width``, 2·``width`` and 4·``width``, with strides 1, 2 and 2. There is no
    pooling. ``width`` defaults to the paper's: 128, and 160 for 64×64 inputs. See :func:`cnn7` for the rest.
    """
    layers = _normalisation(in_shape, (classes, width, hidden), mean, std)
    width, channels = width or (160 if in_shape[1] >= 64 else 128), 16
    layers += [_conv(in_shape[0], channels, 3, batchnorm=batchnorm), nn.ReLU()]
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        first = _conv(channels, out, 3, stride, batchnorm=batchnorm)
        branch = nn.Sequential(first, nn.ReLU(), _conv(out, out, 3, batchnorm=batchnorm))
        layers.append(_Residual(branch, channels, out, stride, batchnorm=batchnorm))
        channels = out
    return nn.Sequential(*layers, *_head(in_shape, channels, 4, hidden, classes, batchnorm))


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
    channels. A stage has one block, and two for 64×64 inputs. There is no pooling. ``width`` defaults to the paper's:
    32, and 8 for 64×64 inputs. Arguments and errors are otherwise as for :func:`cnn7`.
    """
    layers = _normalisation(in_shape, (classes, width, hidden), mean, std)
    large = in_shape[1] >= 64
    width = width or (8 if large else 32)
    channels = 2 * width
    layers += [_conv(in_shape[0], channels, 3, batchnorm=batchnorm), nn.ReLU()]
    for inner, first_stride in ((2 * width, 1), (4 * width, 2), (8 * width, 2)):
        for stride in (first_stride, 1) if large else (first_stride,):
            first = _conv(channels, inner, 1, batchnorm=batchnorm)
            middle = _conv(inner, inner, 3, stride, batchnorm=batchnorm, groups=2)
            last = _conv(inner, 2 * inner, 1, batchnorm=batchnorm)
            branch = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
            layers.append(_Residual(branch, channels, 2 * inner, stride, batchnorm=batchnorm))
            channels = 2 * inner
    return nn.Sequential(*layers, *_head(in_shape, channels, 4, hidden, classes, batchnorm))


class _Residual(nn.Module):
    """ReLU of the sum of a branch and a shortcut: the identity, or a 1×1 convolution where shapes differ."""

    def __init__(self, branch: nn.Module, channels: int, out: int, stride: int, *, batchnorm: bool) -> None:
        super().__init__()
        self.branch = branch
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else _conv(channels, out, 1, stride, batchnorm=batchnorm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def _normalisation(
    in_shape: Sequence[int], sizes: Sequence[int | None], mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[nn.Module]:
    """A leading :class:`Normalize` if there are ``mean`` and ``std``; ``sizes`` are classes, width and hidden."""
    if len(in_shape) != 3:
        problem = f"cnn7, wide-resnet8 and resnext need images (channels, height, width), no batches; found {in_shape=}"
        raise ValueError(f"{problem}: name --model file.py:factory, with factory(in_shape, classes) -> nn.Module")
    if min(*in_shape, *(size for size in sizes if size is not None)) < 1:
        found = "in_shape={}, classes={}, width={}, hidden={}".format(tuple(in_shape), *sizes)
        raise ValueError(f"sizes must be positive; found {found}")
    if mean is None and std is None:
        return []
    if mean is None or std is None:
        raise ValueError("give mean and std together, or neither")
    if len(mean) != in_shape[0]:
        raise ValueError(f"images of {in_shape[0]} channel(s) need as many means and stds; found {mean=}, {std=}")
    return [Normalize(mean, std)]


def _conv(channels: int, out: int, kernel: int, stride: int = 1, *, batchnorm: bool, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups)
    return nn.Sequential(convolution, nn.BatchNorm2d(out)) if batchnorm else nn.Sequential(convolution)


def _head(in_shape: Sequence[int], channels: int, stride: int, hidden: int, classes: int, bn: bool) -> list[nn.Module]:
    """Flatten, a hidden linear layer, and the classification layer, after convolutions of ``stride`` altogether."""
    features = channels * -(-in_shape[1] // stride) * -(-in_shape[2] // stride)
    norm = [nn.BatchNorm1d(hidden)] if bn else []
    return [nn.Flatten(), nn.Linear(features, hidden), *norm, nn.ReLU(), nn.Linear(hidden, classes)]
