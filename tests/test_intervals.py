"""The interval reference: its bounds contain every output, and are exact where interval arithmetic is."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.verification import intervals
from lirpa_fastwarmup.verification.intervals import UnknownOperatorError, interval_bounds
from tests.architectures import ARCHITECTURES
from tests.networks import CalledTwice, DataDependent, SharedActivation, TwoInputs
from tests.reference import output_bounds
from tests.strategies import networks


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def as_module(entry):
    return entry() if isinstance(entry, type | Builder) else Function(entry)


class Builder:
    """Makes a module when it is called, after the seed is set."""

    def __init__(self, kind, *args, **kwargs):
        self.kind, self.args, self.kwargs = kind, args, kwargs

    def __call__(self):
        module = self.kind(*self.args, **self.kwargs)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        for name, buffer in module.named_buffers():
            if name.startswith("running"):
                nn.init.uniform_(buffer, 0.5, 2.0)
        return module


def random_box(shape, low=-2.0, high=2.0):
    """A box whose sides differ in length; a fifth of them have length 0."""
    ends = low + (high - low) * torch.rand(2, *shape, dtype=torch.float64)
    lower, upper = ends.amin(0), ends.amax(0)
    return lower, torch.where(torch.rand(shape) < 0.2, lower, upper)


def extreme_points(model, lower, upper):
    """The corners that the signed gradient of random outputs points at."""
    for _ in range(4):
        centre = (lower + (upper - lower) * torch.rand_like(lower)).requires_grad_(True)
        output = model(centre.clone())
        (slope,) = torch.autograd.grad(output.flatten()[torch.randint(output.numel(), (1,))].sum(), centre)
        yield torch.where(slope > 0, lower, upper)
        yield torch.where(slope > 0, upper, lower)


def points_of(model, lower, upper, count=8):
    yield lower
    yield upper
    for _ in range(count):
        yield torch.where(torch.rand_like(lower) < 0.5, lower, upper)
        yield torch.minimum(lower + (upper - lower) * torch.rand_like(lower), upper)
    yield from extreme_points(model, lower, upper)


def assert_sound(model, box, *more):
    """The bounds contain every output found, and at radius 0 are the output."""
    lower, upper = interval_bounds(model, box, *more)
    assert lower.dtype == upper.dtype == torch.float64
    assert bool((lower <= upper).all())
    reference = copy.deepcopy(model).double().eval()
    slack = 1e-10 * (1 + torch.maximum(lower.abs(), upper.abs()))
    for point in points_of(reference, *box):
        output = reference(point.clone()).detach()
        assert output.shape == lower.shape
        assert bool(((output >= lower - slack) & (output <= upper + slack)).all())
    middle = (box[0] + box[1]) / 2
    output = reference(middle.clone()).detach()
    for end in interval_bounds(model, (middle, middle)):
        assert torch.allclose(end, output, rtol=1e-12, atol=1e-12)
    return lower, upper


def affine_bounds(function, lower, upper):
    """Exact bounds of an affine function, attained at the corners given by the signs of its Jacobian."""
    offset = function(torch.zeros_like(lower))
    units = torch.eye(lower.numel(), dtype=lower.dtype).view(-1, *lower.shape)
    jacobian = torch.stack([(function(unit) - offset).flatten() for unit in units])
    low, high = lower.flatten().unsqueeze(1), upper.flatten().unsqueeze(1)
    sums = [torch.where(choice, low, high) * jacobian for choice in (jacobian > 0, jacobian <= 0)]
    return tuple(total.sum(0).view(offset.shape) + offset for total in sums)


CHANNELS = torch.tensor([1.5, -0.5, 0.0, -2.0], dtype=torch.float64).view(4, 1, 1)
MATRIX = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4).sin()
SHAPE = (2, 4, 5, 5)


def overwritten(x):
    out = x.new_zeros(2, 5, 5, 5)
    out[:, 1:] = x
    out[:, 0] = 2
    out[:, 3, 1:4].mul_(-1)
    return out


def written_at_indices(x):
    out = x.clone()
    out[:, torch.tensor([2, 0])] = -x[:, :2]
    out.diagonal(0, 2, 3).add_(1)
    return out.diagonal(1, 1, 2)


def doubled_in_place(x):
    x[:, :2] *= -2
    return x


AFFINE = {
    "conv2d": Builder(nn.Conv2d, 4, 3, 3),
    "conv2d, stride, padding and dilation": Builder(nn.Conv2d, 4, 2, 3, (2, 1), (1, 2), (1, 2)),
    "conv2d, groups": Builder(nn.Conv2d, 4, 6, 2, groups=2, bias=False),
    "conv2d, same": Builder(nn.Conv2d, 4, 2, 3, padding="same"),
    "conv2d, circular": Builder(nn.Conv2d, 4, 2, 3, padding=1, padding_mode="circular"),
    "transposed conv2d": Builder(nn.ConvTranspose2d, 4, 2, 3, stride=2, padding=1, output_padding=(1, 0)),
    "transposed conv2d, groups": Builder(nn.ConvTranspose2d, 4, 4, 2, dilation=2, groups=4),
    "conv1d": Builder(lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 3, 4, 3, 2))),
    "transposed conv1d": Builder(lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(4, 2, 3, 2, 1))),
    "conv3d": Builder(lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2, 1, 1))),
    "convolution with a computed kernel": lambda x: F.conv2d(torch.ones(1, 1, 6, 6).double(), x[:, :1]),
    "batchnorm2d": Builder(nn.BatchNorm2d, 4),
    "batchnorm2d, no weights": Builder(nn.BatchNorm2d, 4, affine=False),
    "batchnorm1d": Builder(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(100))),
    "linear": Builder(lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 7))),
    "linear without bias": Builder(lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 7, bias=False))),
    "linear on the last dimension": Builder(nn.Linear, 5, 3),
    "matmul": lambda x: x @ MATRIX,
    "matmul from the left": lambda x: MATRIX.T @ x,
    "matrix and vector": lambda x: x.flatten(1) @ MATRIX.repeat(5, 1)[:, 1].repeat(4),
    "mm from the left": lambda x: MATRIX @ x[0, 0, :4],
    "bmm": lambda x: torch.bmm(x[0], MATRIX.expand(4, 5, 4)),
    "dot": lambda x: torch.dot(x[0, 0, 0], MATRIX[:, 0]),
    "addmm": lambda x: torch.addmm(MATRIX[0], x[0, 0], MATRIX, beta=3, alpha=-2),
    "addmm, bias": lambda x: torch.addmm(x[0, 0, :, :4], MATRIX, MATRIX[:4], beta=-1),
    "baddbmm": lambda x: torch.baddbmm(x[1], x[0], (MATRIX @ MATRIX.T).expand(4, 5, 5), alpha=0.5),
    "addmv": lambda x: torch.addmv(MATRIX[:, 1], x[0, 0], MATRIX[:, 0], alpha=-1),
    "einsum": lambda x: torch.einsum("bchw,wd->bdhc", x, MATRIX),
    "normalize": Builder(fw.models.Normalize, [0.5, 0.1, 0.2, 0.3], [0.2, 2.0, 1.0, 0.5]),
    "x + c": lambda x: x + CHANNELS,
    "c - x": lambda x: CHANNELS - x,
    "1 - x": lambda x: 1 - x,
    "rsub": lambda x: torch.rsub(x, 2, alpha=-3),
    "alpha": lambda x: torch.add(x[:, :2], x[:, 2:], alpha=-2),
    "sub, alpha": lambda x: torch.sub(CHANNELS, x, alpha=0.5),
    "x - y": lambda x: x[0] - x[1],
    "x + x": lambda x: x + x,
    "-x": lambda x: -x,
    "x * c": lambda x: x * CHANNELS,
    "c * x": lambda x: -3 * (CHANNELS * x),
    "x / c": lambda x: x / (CHANNELS - 0.25),
    "x / -2": lambda x: x / -2,
    "avg_pool2d": Builder(nn.AvgPool2d, 2),
    "avg_pool2d, padding and ceil_mode": Builder(nn.AvgPool2d, 3, 2, 1, ceil_mode=True),
    "avg_pool2d, valid entries": Builder(nn.AvgPool2d, 2, 2, 1, count_include_pad=False),
    "avg_pool2d, divisor": Builder(nn.AvgPool2d, 2, divisor_override=-3),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1),
    "avg_pool3d": lambda x: F.avg_pool3d(x.unsqueeze(1), (2, 2, 3), 1, divisor_override=5),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 4),
    "adaptive_avg_pool2d": Builder(nn.AdaptiveAvgPool2d, (3, 2)),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x.unsqueeze(1), (3, 2, 4)),
    "global average": Builder(nn.AdaptiveAvgPool2d, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "mean of all": lambda x: x.mean(),
    "sum": lambda x: x.sum((1, 3)),
    "view": lambda x: x.view(2, -1, 2),
    "permute and flatten": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "transpose and reshape": lambda x: x.transpose(1, 2).reshape(2, -1),
    "channels_last": lambda x: (
        (x.contiguous(memory_format=torch.channels_last) * CHANNELS).permute(0, 2, 3, 1).view(-1)
    ),
    "t": lambda x: x[0, 0].t(),
    "expand": lambda x: x[:, :1].expand(2, 3, 5, 5),
    "squeeze and unsqueeze": lambda x: x[:, :1].squeeze(1).unsqueeze(2).unsqueeze(0).squeeze((0, 2)),
    "select and slice": lambda x: x[:, 1, ::2, 1:4],
    "cat": lambda x: torch.cat([x[:, 2:], CHANNELS.expand(2, 4, 5, 5), -x], 1),
    "stack": lambda x: torch.stack([x[0], CHANNELS.expand(4, 5, 5), x[1]], 1),
    "split": lambda x: torch.cat(x.split(3, 1)[::-1], 1),
    "split of sizes": lambda x: x.split([1, 2, 2], 3)[1],
    "chunk": lambda x: x.chunk(2, 1)[1] - x.chunk(2, 1)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "where": lambda x: torch.where(CHANNELS > 0, x, -x),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0, 2])),
    "index": lambda x: x[:, torch.tensor([3, 1])],
    "gather": lambda x: x.gather(1, torch.tensor([3, 1, 1]).view(1, 3, 1, 1).expand(2, 3, 5, 5)),
    "flip and roll": lambda x: x.flip(3).roll(2, 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "pixel_shuffle": Builder(nn.PixelShuffle, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :4, :4], 2),
    "channel_shuffle": Builder(nn.ChannelShuffle, 2),
    "unfold": Builder(nn.Unfold, 3, stride=2),
    "fold": lambda x: F.fold(F.unfold(x, 2), (5, 5), 2),
    "tensor.unfold": lambda x: x.unfold(3, 3, 2),
    "constant padding": lambda x: F.pad(x, (1, 0, -1, 2), value=0.5),
    "reflection padding": lambda x: F.pad(x, (1, 2, 0, 3), mode="reflect"),
    "replication padding": lambda x: F.pad(x, (1, 2, 0, 3), mode="replicate"),
    "reflection padding 1-d": lambda x: F.pad(x.flatten(2), (1, 2), mode="reflect"),
    "replication padding 3-d": lambda x: F.pad(x.unsqueeze(1), (1, 2, 0, 1, 1, 0), mode="replicate"),
    "circular padding": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"),
    "upsample, nearest": Builder(nn.Upsample, scale_factor=2),
    "upsample, nearest-exact": Builder(nn.Upsample, size=(7, 3), mode="nearest-exact"),
    "upsample, bilinear": Builder(nn.Upsample, scale_factor=1.5, mode="bilinear"),
    "upsample, aligned corners": Builder(nn.Upsample, size=(8, 3), mode="bilinear", align_corners=True),
    "upsample, linear": lambda x: F.interpolate(x.flatten(2), 30, mode="linear"),
    "upsample, trilinear": lambda x: F.interpolate(x.unsqueeze(1), (6, 6, 3), mode="trilinear"),
    "upsample, nearest 1-d": lambda x: F.interpolate(x.flatten(2), 30),
    "upsample, nearest 3-d": lambda x: F.interpolate(x.unsqueeze(1), (6, 6, 3)),
    "dropout": nn.Dropout,
    "identity": nn.Identity,
    "written into zeros": overwritten,
    "written at indices": written_at_indices,
    "in place": doubled_in_place,
    "copies": lambda x: x.clone().to(torch.float64, copy=True).detach(),
    "zeros_like": lambda x: torch.cat([torch.zeros_like(x), torch.full_like(x, 2), x.new_ones(2, 4, 5, 5) - x]),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_operators_are_bounded_exactly(name):
    model, box = as_module(AFFINE[name]), random_box(SHAPE)
    reference = copy.deepcopy(model).double().eval()
    found = interval_bounds(model, box)
    with torch.no_grad():
        for end, exact in zip(found, affine_bounds(lambda x: reference(x.clone()), *box), strict=True):
            assert torch.allclose(end, exact, rtol=1e-10, atol=1e-10)
        middle = box[0]
        for end in interval_bounds(model, (middle, middle)):
            assert torch.allclose(end, reference(middle.clone()), rtol=1e-12, atol=1e-12)


# Functions of single elements, and the range of inputs on which they are bounded.
ELEMENTWISE = {
    "relu": (torch.relu, -2, 2),
    "relu, in place": (torch.relu_, -2, 2),
    "leaky_relu": (Builder(nn.LeakyReLU, 0.2), -2, 2),
    "leaky_relu, negative slope": (Builder(nn.LeakyReLU, -0.7), -2, 2),
    "leaky_relu, steep": (Builder(nn.LeakyReLU, 1.8, inplace=True), -2, 2),
    "prelu": (Builder(nn.PReLU, 4), -2, 2),
    "elu": (Builder(nn.ELU, 1.5), -2, 2),
    "elu, negative alpha": (Builder(nn.ELU, -1.5), -2, 2),
    "selu": (nn.SELU, -2, 2),
    "celu": (Builder(nn.CELU, 0.4), -2, 2),
    "hardtanh": (Builder(nn.Hardtanh, -0.5, 1.5), -2, 2),
    "relu6": (nn.ReLU6, -3, 8),
    "clamp": (lambda x: x.clamp(min=-0.3).clamp(CHANNELS - 1, CHANNELS + 1), -2, 2),
    "sigmoid": (torch.sigmoid, -4, 4),
    "tanh": (torch.tanh, -2, 2),
    "exp": (torch.exp, -2, 2),
    "log": (torch.log, 0.1, 2),
    "sqrt": (torch.sqrt, 0, 2),
    "rsqrt": (torch.rsqrt, 0.3, 2),
    "abs": (torch.abs, -2, 2),
    "neg": (torch.neg, -2, 2),
    "reciprocal": (torch.reciprocal, 0.2, 2),
    "reciprocal of negatives": (torch.reciprocal, -2, -0.2),
    "c / x": (lambda x: CHANNELS / x, -2, -0.2),
    "floor of a quotient": (lambda x: torch.div(x, -0.5, rounding_mode="floor"), -2, 2),
    "square": (torch.square, -2, 2),
    "x * x": (lambda x: x * x, -2, 2),
    "x ** 3": (lambda x: x**3, -2, 2),
    "x ** 4": (lambda x: x**4, -2, 2),
    "x ** 0": (lambda x: x**0, -2, 2),
    "x ** -1": (lambda x: x**-1, -2, -0.3),
    "x ** -2": (lambda x: x**-2, 0.3, 2),
    "x ** 1.5": (lambda x: x**1.5, 0, 2),
    "x ** -0.5": (lambda x: x**-0.5, 0.3, 2),
    "hardsigmoid": (F.hardsigmoid, -5, 5),
    "hardswish": (F.hardswish, -5, 5),
    "hardswish, left of its minimum": (F.hardswish, -5, -1.6),
    "silu": (F.silu, -5, 2),
    "silu, left of its minimum": (F.silu, -5, -1.3),
    "gelu": (F.gelu, -3, 2),
    "gelu, left of its minimum": (F.gelu, -3, -0.8),
    "gelu, by tanh": (nn.GELU("tanh"), -3, 2),
    "erf": (torch.erf, -2, 2),
    "maximum": (lambda x: torch.maximum(x, CHANNELS), -2, 2),
    "minimum": (lambda x: torch.minimum(CHANNELS, x), -2, 2),
    "softplus": (F.softplus, -4, 4),
    "softplus, beta": (lambda x: F.softplus(x, 3.0), -2, 2),
    "softplus, threshold": (lambda x: F.softplus(x, 2.0, 1.0), -1, 2),
    "softplus, negative beta": (lambda x: F.softplus(x, -2.0, 1.0), -1, 2),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions_are_bounded_exactly(name):
    entry, low, high = ELEMENTWISE[name]
    model, box = as_module(entry), random_box(SHAPE, low, high)
    lower, upper = assert_sound(model, box)
    reference = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        grid = torch.linspace(low, high, 2001, dtype=torch.float64)  # Kinks lie on it.
        values = torch.stack([reference(box[0].clamp(min=point).minimum(box[1])) for point in (-1e9, *grid, 1e9)])
    jumps = "threshold" in name or "negative beta" in name  # The limit at a jump lies up to a step from the grid.
    tolerance = 5e-3 if jumps else 1e-5
    assert torch.allclose(lower, values.amin(0), atol=tolerance, rtol=0)
    assert torch.allclose(upper, values.amax(0), atol=tolerance, rtol=0)


def test_both_sides_of_softplus_jump_are_contained():
    # ATen returns x itself beyond the threshold, which is less than log(1 + exp(x)) just below it.
    jump = torch.tensor([[0.5]], dtype=torch.float64)
    model = Function(lambda x: F.softplus(x, 2.0, 1.0))
    lower, upper = interval_bounds(model, (jump - 1e-3, jump + 1e-3))
    assert lower <= model(torch.nextafter(jump, jump + 1))
    assert upper >= model(jump)


OF_TWO = {
    "product": (lambda x, y: x * y, -2, 2),
    "product of two broadcasts": (lambda x, y: x.unsqueeze(0) * y.unsqueeze(0), -2, 2),
    "quotient": (lambda x, y: x / (y + 3), -2, 2),
    "quotient by a negative": (lambda x, y: x / (y - 3), -2, 2),
    "sum": (torch.add, -2, 2),
    "difference": (torch.sub, -2, 2),
    "multiple": (lambda x, y: torch.sub(x, y, alpha=-0.5), -2, 2),
    "maximum": (torch.maximum, -2, 2),
    "minimum": (torch.minimum, -2, 2),
    "bounds of a clamp": (lambda x, y: torch.clamp(x, max=y), -2, 2),
    "choice": (lambda x, y: torch.where(CHANNELS > 0, x, y), -2, 2),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_operators_of_two_intervals_attain_their_bounds_at_corners(name):
    function, low, high = OF_TWO[name]
    first, second = random_box(SHAPE, low, high), random_box(SHAPE, low, high)
    for boxes in ((first, second), (first, second[0]), (first[0], second)):
        corners = [function(*ends) for ends in itertools.product(*(b if isinstance(b, tuple) else (b,) for b in boxes))]
        lower, upper = interval_bounds(Function(function), *boxes)
        assert torch.allclose(lower, torch.stack(corners).amin(0), atol=1e-12)
        assert torch.allclose(upper, torch.stack(corners).amax(0), atol=1e-12)


INCREASING = {
    "max_pool2d": Builder(nn.MaxPool2d, 3, 2, 1),
    "max_pool2d, dilation and ceil_mode": Builder(nn.MaxPool2d, 2, 2, dilation=2, ceil_mode=True),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1),
    "max_pool3d": lambda x: F.max_pool3d(x.unsqueeze(1), (2, 3, 2), stride=1),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 4),
    "adaptive_max_pool2d": Builder(nn.AdaptiveMaxPool2d, (2, 3)),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x.unsqueeze(1), (2, 3, 2)),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "amin": lambda x: x.amin(1),
    "max": lambda x: x.max(2).values,
    "min": lambda x: x.min(2, keepdim=True)[0],
    "max of all": lambda x: x.max(),
    "largest of three": lambda x: torch.max(torch.max(x[:, 0], x[:, 1]), x[:, 2]),
}


@pytest.mark.parametrize("name", INCREASING)
def test_increasing_operators_map_ends_to_ends(name):
    model, (lower, upper) = as_module(INCREASING[name]), random_box(SHAPE)
    found = assert_sound(model, (lower, upper))
    assert torch.equal(found[0], model(lower))
    assert torch.equal(found[1], model(upper))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_architectures_are_bounded(name):
    model, shape = ARCHITECTURES[name]()
    lower, upper = random_box((2, *shape), 0.0, 1.0)
    assert_sound(model, (lower, lower + 0.1 * (upper - lower)))


@pytest.mark.parametrize("kind", [CalledTwice, SharedActivation])
def test_modules_called_several_times(kind):
    assert_sound(kind(), random_box((2, 1, 8, 8), 0.0, 1.0))


def test_each_input_has_a_box_or_is_constant():
    model, image, vector = TwoInputs(), random_box((2, 1, 8, 8)), random_box((2, 5))
    reference = copy.deepcopy(model).double()
    lower, upper = interval_bounds(model, image, vector)
    for _ in range(50):
        points = [torch.where(torch.rand_like(box[0]) < 0.5, *box) for box in (image, vector)]
        output = reference(*points).detach()
        assert bool(((lower <= output) & (output <= upper)).all())
    constant = interval_bounds(model, image, vector[0])
    for end, other in zip(constant, interval_bounds(model, image, (vector[0], vector[0])), strict=True):
        assert torch.allclose(end, other, atol=1e-12)
    output = reference(image[0], vector[0])
    for end in interval_bounds(model, image[0], vector[0]):
        assert torch.equal(end, output)


@hypothesis_settings(max_examples=30)
@given(model=networks(), eps=st.floats(0, 0.5), batch=st.integers(1, 3))
@torch.no_grad()
def test_random_networks_have_the_bounds_of_the_other_reference(model, eps, batch):
    x = torch.rand(batch, 1, 6, 6)
    model.eval()
    expected = output_bounds(model, x, eps)
    wide = x.double()
    found = interval_bounds(model, ((wide - eps).clamp(min=0), (wide + eps).clamp(max=1)))
    for end, reference in zip(found, expected, strict=True):
        assert torch.allclose(end, reference, rtol=1e-11, atol=float(1e-11 * (1 + reference.abs().max())))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


UNKNOWN = {
    "softmax": (nn.Softmax(1), "_softmax"),
    "sin": (torch.sin, "aten.sin.default"),
    "layer norm": (nn.LayerNorm(5), "native_layer_norm"),
    "group norm": (nn.GroupNorm(2, 4), "native_group_norm"),
    "batch statistics": (nn.BatchNorm2d(4, track_running_stats=False), "batch_norm"),
    "instance norm": (nn.InstanceNorm2d(4), "batch_norm"),
    "standard deviation": (lambda x: x.std(1), "aten.std.correction"),
    "comparison": (lambda x: torch.where(x > 0, x, -x), "aten.gt.Scalar"),
    "position of the maximum": (lambda x: x + x.max(1, keepdim=True)[1], "getitem"),
    "product of two matrices": (lambda x: x[0] @ x[1], "aten.bmm"),
    "addmm of two intervals": (lambda x: torch.addmm(MATRIX[:, :1], x[0, 0], x[0, 1]), "aten.addmm"),
    "computed kernel": (lambda x: F.conv2d(x, x[:, :, :2, :2]), "aten.convolution"),
    "computed bias": (
        lambda x: F.conv2d(x[:, :1], MATRIX[:1, :1].view(1, 1, 1, 1), x[0, 0, 0, :1]),
        "aten.convolution",
    ),
    "computed slope": (lambda x: F.prelu(x, x[0, :, 0, 0]), "prelu"),
    "computed exponent": (lambda x: 2**x, "aten.pow"),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), "upsample_bicubic2d"),
    "integers": (lambda x: x.to(torch.int64), "_to_copy"),
    "bits": (lambda x: x.view(torch.int64), "aten.view"),
    "random": (lambda x: x + torch.rand(5), "aten.rand"),
    "dropout in training mode": (lambda x: F.dropout(x, training=True), "aten"),
    "a buffer that counts": (Counter(), "aten.add_"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_without_a_rule_are_named(name):
    model, operator = UNKNOWN[name]
    model = model if isinstance(model, nn.Module) else Function(model)
    with pytest.raises(UnknownOperatorError, match=operator):
        interval_bounds(model, random_box(SHAPE))


def test_the_message_names_the_last_parameter_and_unused_operators_need_no_rule(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Softmax(1))
    with pytest.raises(UnknownOperatorError, match=r"1\.bias"):
        interval_bounds(model, (x, x + 0.1))

    def unused(x):
        torch.softmax(x, 1)
        return -x

    lower, _ = interval_bounds(Function(unused), (x, x + 0.5))
    assert torch.equal(lower, -(x + 0.5).double())


UNBOUNDED = {
    "log": (torch.log, 0.0, 1.0),
    "sqrt": (torch.sqrt, -0.1, 1.0),
    "rsqrt": (torch.rsqrt, 0.0, 1.0),
    "reciprocal": (torch.reciprocal, -0.1, 0.1),
    "quotient": (lambda x: 1 / x, 0.0, 0.1),
    "quotient of tensors": (lambda x: torch.ones(2) / x, 0.0, 0.1),
    "negative power": (lambda x: x**-2, -1.0, 1.0),
    "root": (lambda x: x**0.5, -1.0, 1.0),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_intervals_on_which_an_operator_is_unbounded_are_refused(name):
    function, low, high = UNBOUNDED[name]
    box = torch.full((1, 2), low), torch.full((1, 2), high)
    with pytest.raises(ValueError, match="undefined or unbounded on part of its interval"):
        interval_bounds(Function(function), box)


def test_boxes_and_outputs_are_checked(x):
    model = nn.Flatten()
    with pytest.raises(ValueError, match=r"differ in shape: \(8, 1, 8, 8\) and \(1, 8, 8\)"):
        interval_bounds(model, (x, x[0]))
    with pytest.raises(ValueError, match="exceeds the upper end"):
        interval_bounds(model, (x, x - 0.1))
    with pytest.raises(ValueError, match="is NaN"):
        interval_bounds(model, (x, x * float("nan")))
    with pytest.raises(NotImplementedError, match="type tuple; return one tensor"):
        interval_bounds(Function(lambda x: (x, x)), (x, x))
    with pytest.raises(RuntimeError, match="control flow"):
        interval_bounds(DataDependent(), (x, x))
    with pytest.raises(ArithmeticError, match="is NaN"):
        interval_bounds(Function(lambda x: (1e200 * x * 1e200) - (1e200 * x * 1e200)), (x + 1, x + 2))


def snapshot(model):
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return modes, state, grads


def assert_same(before: tuple, after: tuple):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, tensor in before[1].items():
        assert tensor.dtype == after[1][name].dtype
        assert torch.equal(tensor, after[1][name])
    for (required, grad), (still_required, same) in zip(before[2], after[2], strict=True):
        assert required == still_required
        assert grad is same is None or torch.equal(grad, same)


@pytest.mark.parametrize("last", [nn.ReLU, nn.Softmax, Counter, DataDependent])
def test_the_model_and_random_state_are_left_unchanged(last, x):
    ending = [nn.Softmax(1)] if last is nn.Softmax else [last()]
    features = [nn.ReLU(inplace=True), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten()]
    model = nn.Sequential(*features, nn.Linear(72, 64), *ending)
    model(x.clone()).sum().backward()
    model[2].eval()
    model[1].bias.requires_grad_(False)
    box, before, state = (x - 0.1, x + 0.1), snapshot(model), torch.get_rng_state()
    kept = [end.clone() for end in box]
    if last is nn.ReLU:
        lower, upper = interval_bounds(model, box)
        assert not lower.requires_grad
        assert not upper.requires_grad
    else:
        with pytest.raises(RuntimeError):  # NotImplementedError is one.
            interval_bounds(model, box)
    assert_same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(end, same) for end, same in zip(box, kept, strict=True))


def test_random_operators_leave_the_random_state(x):
    state = torch.get_rng_state()
    with pytest.raises(UnknownOperatorError):
        interval_bounds(Function(lambda x: x + torch.rand(8)), (x, x))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_contexts_of_the_caller_make_no_difference(context, x):
    model, _ = ARCHITECTURES["CNN-7"]()
    expected = interval_bounds(model, (x, x + 0.1))
    with context():
        found = interval_bounds(model, (x.clone(), x + 0.1))
    assert all(torch.equal(end, other) for end, other in zip(found, expected, strict=True))


def test_nothing_is_shared_with_the_engine():
    lines = Path(intervals.__file__).read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported <= {"torch", *sys.stdlib_module_names}
