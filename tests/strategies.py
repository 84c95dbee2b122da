"""Random networks, for hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

import lirpa_fastwarmup as fw
from tests.networks import ResidualBlock


@st.composite
def networks(draw):
    """A random small network on 1×6×6 inputs, and its seed."""
    batchnorm, bias = draw(st.booleans()), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        layers.append(fw.models.Normalize([0.4], [0.2]))
    activation = draw(st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh]))
    channels, size = 1, 6
    for _ in range(draw(st.integers(0, 3))):
        out, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        if draw(st.booleans()):
            layers.append(ResidualBlock(channels, out, stride, batchnorm))
        else:
            layers.append(nn.Conv2d(channels, out, 3, stride, padding=1, bias=bias))
            layers += [nn.BatchNorm2d(out)] if batchnorm else []
            layers.append(activation())
        channels, size = out, (size - 1) // stride + 1
        if size >= 3 and draw(st.booleans()):
            window, stride, padding = draw(st.sampled_from([(2, 2, 0), (3, 2, 1), (2, 1, 0), (3, 3, 1)]))
            layers.append(nn.AvgPool2d(window, stride, padding))
            size = (size + 2 * padding - window) // stride + 1
    if size > 1 and draw(st.booleans()):
        layers.append(nn.AvgPool2d(size))
        size = 1
    layers.append(nn.Flatten())
    features = channels * size * size
    if draw(st.booleans()):
        layers += [nn.Linear(features, 5), *([nn.BatchNorm1d(5)] if batchnorm else []), activation()]
        features = 5
    layers.append(nn.Linear(features, 3, bias=bias))
    model = nn.Sequential(*layers)
    for module in model.modules():  # BatchNorm as after training: any sign, any statistics.
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
    return model
