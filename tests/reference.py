"""An interval arithmetic of its own, in float64, over the modules that the random networks are made of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.networks import ResidualBlock


class Box:
    """Clean values and the interval around them, which BatchNorm in training mode needs together."""

    def __init__(self, clean: Tensor, lower: Tensor, upper: Tensor) -> None:
        self.clean, self.lower, self.upper = clean, lower, upper

    def map(self, function) -> Box:  # type: ignore[no-untyped-def]
        return Box(function(self.clean), function(self.lower), function(self.upper))


def _affine(module: nn.Module, box: Box) -> Box:
    positive, negative = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        positive.weight.clamp_(min=0)
        negative.weight.clamp_(max=0)
        if module.bias is not None:
            negative.bias.zero_()
    return Box(
        module(box.clean),
        positive(box.lower) + negative(box.upper),
        positive(box.upper) + negative(box.lower),
    )


def _batchnorm(module: nn.BatchNorm2d, box: Box) -> Box:
    shape = (1, -1, *[1] * (box.clean.ndim - 2))
    if module.training:
        dims = [0, *range(2, box.clean.ndim)]
        mean, var = box.clean.mean(dims), box.clean.var(dims, unbiased=False)
    else:
        mean, var = module.running_mean, module.running_var
    scale = (module.weight / (var + module.eps).sqrt()).view(shape)
    shift = module.bias.view(shape) - mean.view(shape) * scale
    one, other = box.lower * scale + shift, box.upper * scale + shift
    return Box(box.clean * scale + shift, torch.minimum(one, other), torch.maximum(one, other))


def propagate(module: nn.Module, box: Box) -> Box:
    """The interval of ``module``'s output, in the dtype of ``box``."""
    if isinstance(module, nn.Sequential):
        for child in module:
            box = propagate(child, box)
        return box
    if isinstance(module, ResidualBlock):
        branch = propagate(nn.Sequential(module.conv1, module.bn1, nn.ReLU(), module.conv2, module.bn2), box)
        other = propagate(module.shortcut, box)
        total = Box(branch.clean + other.clean, branch.lower + other.lower, branch.upper + other.upper)
        return total.map(torch.relu)
    if isinstance(module, nn.Linear | nn.Conv2d):
        return _affine(module, box)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return _batchnorm(module, box)
    return box.map(module)


@torch.no_grad()
def output_bounds(
    model: nn.Module, x: Tensor, eps: float, low: float = 0.0, high: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Bounds on the output of ``model`` over the clipped box around ``x``, in float64."""
    model = copy.deepcopy(model).double()
    x = x.double()
    box = propagate(model, Box(x, (x - eps).clamp(min=low), (x + eps).clamp(max=high)))
    return box.lower, box.upper


def assert_gradients_equal_finite_differences(loss, parameters) -> None:  # type: ignore[no-untyped-def]
    """Compare the gradient of ``loss()`` with central differences, in a random direction of each of ``parameters``."""
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, step = torch.randn_like(parameter), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            values.append(float(loss().detach()))
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        numeric = (values[0] - values[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-7)
