"""IBP in training mode, where a layer, the ReLU before it and the BatchNorm behind it are one product."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine import graph
from lirpa_fastwarmup.engine.products import LINEAR, convolution, interval_of_product
from tests import networks
from tests.architectures import ARCHITECTURES, with_random_statistics


class Branches(nn.Module):
    """A layer and a ReLU with two readers each, a layer without a bias, and one that BatchNorm normalises twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.after_up = nn.BatchNorm2d(3)
        self.grouped = nn.Conv2d(3, 6, 3, stride=2, dilation=2, groups=3, bias=False)
        self.last_norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 6 * 6, 5, bias=False)
        self.fc_norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        h = F.relu(self.one(h)) + self.other(h)
        r = F.relu(h)
        h = F.relu(self.after_up(self.up(r + F.relu(r))))
        h = F.relu(self.last_norm(self.grouped(h)))
        return self.head(F.relu(self.fc_norm(self.fc(h.flatten(1)))))


class Tokens(nn.Module):
    """Linear layers over positions, which have no BatchNorm of their features."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.mix = nn.Linear(8, 4), nn.BatchNorm1d(8), nn.Linear(4, 4)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.embed(x.squeeze(1))))
        return self.head(F.relu(self.mix(x)).flatten(1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([[2.0]]))

    def forward(self, weight):
        return weight * self.factor


def scaled(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


OTHERS = {
    **networks.ON_8X8,
    "branches": Branches,
    "tokens": Tokens,
    # The tightness term compares with the width of what the first layer reads.
    "a ReLU first": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)),
    "computed weight": lambda: nn.Sequential(
        nn.Flatten(), scaled(nn.Linear(64, 6)), nn.BatchNorm1d(6), nn.Linear(6, 3)
    ),
    "frozen statistics": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
}
# The engine lacks an operator of two of the architectures.
CASES = {name: build for name, build in ARCHITECTURES.items() if name not in ("VGG", "autoencoder")}
CASES |= {name: lambda build=build: (build(), (1, 8, 8)) for name, build in OTHERS.items()}


def margins_bounds_and_gradients(bounded, x, y):
    bounded.zero_grad()
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.02),), method="IBP")
    layers = graph.activation_bounds(bounded) if graph.read_graph(bounded).activations else []
    ends = [end for layer in layers for end in (layer.lower, layer.upper)] + [graph.input_half_width(bounded)]
    loss = (y * lower).sum() + (upper * y.flip(0)).sum() + sum((end * end).sum() for end in ends)
    loss.backward()
    grads = {name: value.grad for name, value in bounded.wrapped.named_parameters() if value.grad is not None}
    return [lower, upper, *ends], grads


@pytest.mark.parametrize("name", CASES)
def test_bounds_and_gradients_are_the_engines(name, monkeypatch):
    torch.manual_seed(0)
    model, shape = CASES[name]()
    model = with_random_statistics(model.double().train())
    if name == "frozen statistics":
        model[2].eval()
    x, y = torch.rand(4, *shape, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    bounded = fw.BoundedModule(model, x)
    found, grads = margins_bounds_and_gradients(bounded, x, y)
    monkeypatch.delattr(fw.BoundedModule, "IBP_general")
    expected, expected_grads = margins_bounds_and_gradients(bounded, x, y)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    assert grads.keys() == expected_grads.keys()
    size = max(float(grad.abs().max()) for grad in expected_grads.values())
    for parameter, grad in grads.items():
        assert torch.allclose(grad, expected_grads[parameter], rtol=1e-7, atol=1e-9 * size), parameter


def test_a_normalised_layer_forms_no_interval_of_its_own(x):
    bounded = fw.BoundedModule(networks.convolutional(), x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.02),), method="IBP")
    kinds = {type(node).__name__ for node in bounded._modules.values() if hasattr(node, "interval")}
    assert "BoundConv" not in kinds  # Each is followed by a BatchNorm.
    assert "ViewedBatchNorm" in kinds
    bounded.eval().compute_bounds(x=(fw.input_box(x, 0.02),), method="IBP")
    kinds = {type(node).__name__ for node in bounded._modules.values() if hasattr(node, "interval")}
    assert "BoundConv" in kinds  # Verification leaves every operator to the engine.


PRODUCTS = {
    "1-d": (convolution([2], [1], [1], False, [0], 1), (2, 3, 6), (4, 3, 3), (4,)),
    "grouped": (convolution([1, 1], [0, 1], [2, 1], False, [0, 0], 2), (2, 4, 6, 5), (6, 2, 3, 3), (6,)),
    "3-d": (convolution([1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1), (2, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,)),
    "linear": (LINEAR, (4, 5), (3, 5), (3,)),
}


@pytest.mark.parametrize("rectified", [False, True], ids=["as it is", "after a ReLU"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_intervals_of_products(name, with_bias, rectified):
    product, *shapes = PRODUCTS[name]
    centre, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    width = torch.rand_like(centre)
    bias = bias.requires_grad_() if with_bias else None
    lower, upper, weight = (end.requires_grad_() for end in (centre - width, centre + width, weight))

    def ends(*tensors):
        return interval_of_product(product, *tensors, rectified=rectified)

    low, high = (end.relu() if rectified else end for end in (lower, upper))
    # Where the weight is positive, the lower end depends on the lower end.
    expected_lower = product.forward(low, weight.clamp(min=0), bias) + product.forward(high, weight.clamp(max=0), None)
    expected_upper = product.forward(high, weight.clamp(min=0), bias) + product.forward(low, weight.clamp(max=0), None)
    found = ends(lower, upper, weight, bias)
    assert torch.allclose(found[0], expected_lower)
    assert torch.allclose(found[1], expected_upper)
    assert gradcheck(ends, (lower, upper, weight, bias))
    # Without gradients of the input, as at a first layer, and of frozen weights.
    for others in ((lower.detach(), upper.detach(), weight, bias), (lower, upper, weight.detach(), bias)):
        assert gradcheck(ends, others)


@pytest.mark.parametrize("name", PRODUCTS)
def test_rounded_radii_are_off_by_their_rounding_and_centres_are_not(name):
    product, *shapes = PRODUCTS[name]
    centre, weight, bias = (torch.randn(shape) for shape in shapes)
    width = torch.rand_like(centre)
    exact = interval_of_product(product, centre - width, centre + width, weight, bias)
    coarse = interval_of_product(product, centre - width, centre + width, weight, bias, radius_dtype=torch.bfloat16)
    assert torch.allclose(sum(coarse), sum(exact), atol=1e-5, rtol=1e-5)
    # Two factors and the sum, each rounded to 8 bits.
    ratio = (coarse[1] - coarse[0]) / (exact[1] - exact[0])
    assert float((ratio - 1).abs().max()) < 3 * 2**-8
    assert float((ratio - 1).abs().max()) > 1e-5


def test_second_derivatives_are_refused(x):
    bounded = fw.BoundedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)), x)
    box, weight = (fw.input_box(x, 0.02),), bounded.wrapped[3].weight
    lower, _ = bounded.compute_bounds(x=box, method="IBP")
    with pytest.raises(RuntimeError, match="no second derivatives: leave create_graph=True out"):
        torch.autograd.grad(lower.sum(), weight, create_graph=True)
    lower, _ = bounded.eval().compute_bounds(x=box, method="IBP")
    (gradient,) = torch.autograd.grad(lower.sum(), weight, create_graph=True)
    assert gradient.requires_grad


class Added(nn.Module):
    """A product plus a row, whose gradient has one row too."""

    def __init__(self):
        super().__init__()
        self.weight, self.row = nn.Parameter(torch.randn(64, 8)), nn.Parameter(torch.zeros(1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.relu(torch.addmm(self.row, x.flatten(1), self.weight)))


def test_a_bias_of_another_shape_is_left_to_the_engine(x, y):
    warmup = fw.ShortWarmup(fw.BoundedModule(Added(), x), fw.ConstantEpsilon(0.02))
    warmup(x, y).loss.backward()
    assert warmup.model.row.grad.shape == (1, 8)


def test_autocast_rounds_radii_in_training_alone(x, y):
    bounded = fw.BoundedModule(networks.convolutional(), x)
    warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.05))

    def robust_loss(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return float(copy.deepcopy(warmup)(x, y).robust_loss.detach())

    warmup.eval()
    assert robust_loss(True) == robust_loss(False)
    bounded.radius_dtype = torch.bfloat16
    assert robust_loss(False) == pytest.approx(robust_loss(True), abs=0)
    warmup.train()
    bounded.radius_dtype = None
    exact = robust_loss(False)
    assert robust_loss(True) != exact
    assert robust_loss(True) == pytest.approx(exact, rel=0.05)
    assert bounded.radius_dtype is None
