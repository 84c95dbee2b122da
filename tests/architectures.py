"""Whole architectures at tiny width, as users bring them: each builder returns a network and its input's shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lirpa_fastwarmup as fw

Architecture = tuple[nn.Module, tuple[int, ...]]


def with_random_statistics(model: nn.Module) -> nn.Module:
    """Give every BatchNorm weights of both signs and the running statistics of some other data."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
    return model


def _classifier(features: nn.Module, shape: tuple[int, ...], *between: nn.Module, classes: int = 3) -> Architecture:
    features = nn.Sequential(features, *between, nn.Flatten())
    with torch.no_grad():
        width = features.eval()(torch.zeros(1, *shape)).shape[1]
    return with_random_statistics(nn.Sequential(features, nn.Linear(width, classes)).train()), shape


def _conv_bn(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Residual(nn.Module):
    """x + branch(x), with ReLU in place on request."""

    def __init__(self, branch: nn.Module, *, relu: bool = False) -> None:
        super().__init__()
        self.branch, self.relu = branch, relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x
        return F.relu_(out) if self.relu else out


class Dense(nn.Module):
    """The input, and what a pre-activation convolution makes of it, side by side."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x), inplace=True))], 1)


class SqueezeExcitation(nn.Module):
    """Channels scaled by a gate that is computed from their means: a product of two intervals."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


def cnn7() -> Architecture:
    model = fw.models.cnn7((1, 8, 8), 3, width=2, hidden=6, mean=[0.4], std=[0.3])
    return with_random_statistics(model), (1, 8, 8)


def wide_resnet8() -> Architecture:
    return with_random_statistics(fw.models.wide_resnet8((3, 8, 8), 3, width=1, hidden=6)), (3, 8, 8)


def resnext() -> Architecture:
    return with_random_statistics(fw.models.resnext((3, 8, 8), 3, width=2, hidden=6)), (3, 8, 8)


def resnet() -> Architecture:
    stem = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )
    branch = nn.Sequential(_conv_bn(4, 4, 3), nn.ReLU(inplace=True), _conv_bn(4, 4, 3))
    return _classifier(nn.Sequential(stem, Residual(branch, relu=True)), (3, 16, 16), nn.AdaptiveAvgPool2d(1))


def vgg() -> Architecture:
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(),
    )
    return _classifier(features, (3, 10, 10))


def densenet() -> Architecture:
    transition = nn.Sequential(_conv_bn(7, 4), nn.ReLU(), nn.AvgPool2d(2))
    features = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Dense(3, 2), Dense(5, 2), transition, Dense(4, 2))
    return _classifier(features, (3, 8, 8), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def mobilenet_v2() -> Architecture:
    inverted = nn.Sequential(
        _conv_bn(4, 8), nn.ReLU6(inplace=True), _conv_bn(8, 8, 3, groups=8), nn.ReLU6(inplace=True)
    )
    features = nn.Sequential(_conv_bn(3, 4, 3, 2), nn.ReLU6(), Residual(nn.Sequential(inverted, _conv_bn(8, 4))))
    return _classifier(features, (3, 8, 8), nn.AdaptiveAvgPool2d(1))


def mobilenet_v3() -> Architecture:
    depthwise = nn.Sequential(_conv_bn(8, 8, 5, groups=8), SqueezeExcitation(8, 2), nn.Hardswish(inplace=True))
    block = nn.Sequential(_conv_bn(4, 8), nn.Hardswish(inplace=True), depthwise, _conv_bn(8, 4))
    features = nn.Sequential(_conv_bn(3, 4, 3, 2), nn.Hardswish(inplace=True), Residual(block))
    return _classifier(features, (3, 8, 8), nn.AdaptiveAvgPool2d(1))


def audio() -> Architecture:
    features = nn.Sequential(
        nn.Conv1d(2, 4, 5, stride=2, padding=2),
        nn.BatchNorm1d(4),
        nn.LeakyReLU(0.1),
        nn.MaxPool1d(3, 2, 1),
        nn.Conv1d(4, 4, 3, dilation=2, padding=2),
        nn.ELU(),
        nn.AvgPool1d(2),
    )
    return _classifier(features, (2, 24))


def video() -> Architecture:
    features = nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1),
        nn.BatchNorm3d(3),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(3, 3, 2, stride=(1, 2, 2)),
        nn.Tanh(),
        nn.AvgPool3d((1, 1, 2), stride=1),
    )
    return _classifier(features, (1, 4, 8, 8))


def autoencoder() -> Architecture:
    """An encoder and a decoder with transposed convolution and upsampling; its output is an image."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
        nn.Softplus(),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(2, 1, 1),
        nn.Sigmoid(),
    )
    return model, (1, 6, 6)


def _padded(mode: str) -> Architecture:
    features = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), nn.ReLU(), nn.Conv2d(3, 2, 3, 2, 1, padding_mode=mode)
    )
    return _classifier(features, (2, 6, 6))


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "CNN-7": cnn7,
    "Wide-ResNet-8": wide_resnet8,
    "ResNeXt": resnext,
    "ResNet": resnet,
    "VGG": vgg,
    "DenseNet": densenet,
    "MobileNetV2": mobilenet_v2,
    "MobileNetV3": mobilenet_v3,
    "1-d": audio,
    "3-d": video,
    "autoencoder": autoencoder,
    "circular padding": lambda: _padded("circular"),
    "reflection padding": lambda: _padded("reflect"),
    "replication padding": lambda: _padded("replicate"),
}
