from __future__ import annotations

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize(("channels", "size", "flat"), [(3, 32, 16), (1, 28, 14), (3, 64, 16)])
def test_cnn7_has_the_papers_size(channels, size, flat, batchnorm):
    with torch.device("meta"):
        model = fw.models.cnn7((channels, size, size), 10, batchnorm=batchnorm)
    convolutions = (9 * channels + 1) * 64 + (9 * 64 + 1) * 64 + (9 * 64 + 1) * 128 + 2 * (9 * 128 + 1) * 128
    linear = (128 * flat**2 + 1) * 512 + 513 * 10
    norms = 2 * (2 * 64 + 3 * 128 + 512) if batchnorm else 0
    assert sum(p.numel() for p in model.parameters()) == convolutions + linear + norms


def test_cnn7_layers():
    model = fw.models.cnn7((1, 28, 28), 10, width=8, hidden=64)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [
        *((1, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1))
    ]
    assert sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model) == 6
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    plain = fw.models.cnn7((1, 28, 28), 10, width=8, hidden=64, batchnorm=False)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in plain)


def test_normalisation_is_the_first_layer():
    model = fw.models.cnn7((3, 32, 32), 10, width=2, hidden=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    x = torch.rand(2, 3, 32, 32)
    shape = (1, 3, 1, 1)
    expected = (x - torch.tensor([0.5, 0.4, 0.3]).view(shape)) / torch.tensor([0.2, 0.2, 0.1]).view(shape)
    assert torch.allclose(model[0](x), expected)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"sizes must be positive.*width=0"):
        fw.models.cnn7((1, 28, 28), 10, width=0)
    with pytest.raises(ValueError, match="mean and std together"):
        fw.models.cnn7((1, 28, 28), 10, mean=(0.5,))
    with pytest.raises(ValueError, match="one positive std per channel"):
        fw.models.Normalize([0.5], [0.0])
