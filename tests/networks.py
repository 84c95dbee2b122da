"""Networks that the tests wrap, as somebody who does not know this package would write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, with a 1×1 convolution where shapes differ."""

    def __init__(self, channels: int, out: int, stride: int = 1, batchnorm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out) if batchnorm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(out) if batchnorm else nn.Identity()
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride != 1 or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem, two residual blocks, average pooling and two linear layers; functional activations."""

    def __init__(self, batchnorm: bool = False, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block1 = ResidualBlock(4, 8, stride=2, batchnorm=batchnorm)
        self.block2 = ResidualBlock(8, 8, batchnorm=batchnorm)
        self.hidden = nn.Linear(8 * 4, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.block2(self.block1(x))
        x = F.avg_pool2d(x, 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class SharedActivation(nn.Module):
    """One ReLU module used in several places, and a reshape by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.features = nn.ModuleList([nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3)])
        self.fc = nn.Linear(3 * 4 * 4, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = self.act(layer(x))
        x = x.view(x.shape[0], -1)
        return self.out(self.act(self.fc(x)))


class TwoInputs(nn.Module):
    """An image and a vector, each with a first layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 2, 3)
        self.vector = nn.Linear(5, 6)
        self.joint = nn.Linear(2 * 6 * 6 + 6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        a = F.relu(self.image(image)).flatten(1)
        b = F.relu(self.vector(vector))
        return self.out(F.relu(self.joint(torch.cat([a, b], 1))))


class DataDependent(nn.Module):
    """Takes one of two layers, depending on the data."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.bright = nn.Linear(64, 8)
        self.dark = nn.Linear(64, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = self.bright(x) if x.mean() > self.threshold else self.dark(x)
        return self.out(F.relu(x))


class CalledTwice(nn.Module):
    """Applies one module two times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.again = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        x = F.relu(self.again(F.relu(self.again(x))))
        return self.out(x)


class Function(nn.Module):
    """A function of a tensor, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def convolutional(batchnorm: bool = True) -> nn.Sequential:
    """A small network on 1×8×8 inputs."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        *([nn.BatchNorm2d(4)] if batchnorm else []),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        *([nn.BatchNorm2d(4)] if batchnorm else []),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        *([nn.BatchNorm1d(8)] if batchnorm else []),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def multilayer(batchnorm: bool = True) -> nn.Sequential:
    """A network of linear layers alone on 1×8×8 inputs (with BatchNorm1d alone)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 12),
        *([nn.BatchNorm1d(12)] if batchnorm else []),
        nn.ReLU(),
        nn.Linear(12, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


ON_8X8 = {
    "convolutional": convolutional,
    "multilayer": multilayer,
    "residual": lambda: SmallResNet(batchnorm=True),
    "residual without BatchNorm": SmallResNet,
    "shared activation": SharedActivation,
    "no BatchNorm": lambda: convolutional(batchnorm=False),
    "bias-free": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3, bias=False)
    ),
}
