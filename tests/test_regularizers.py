"""The regularisers against the formulas, written out neuron by neuron."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.graph import LayerBounds, activation_bounds, read_graph
from lirpa_fastwarmup.recipe.regularizers import _imbalance, undefined
from tests import networks
from tests.reference import Box, propagate


def expected_tightness(box, layers, tol):
    delta_0 = ((box[1] - box[0]) / 2).mean()
    terms = []
    for lower, upper in layers:
        delta = max(float(((upper - lower) / 2).mean()), 1e-12)
        terms.append(max(0.0, tol - float(delta_0) / delta) / tol)
    return sum(terms) / len(terms)


def expected_balance(layers, tol):
    total = 0.0
    for lower, upper in layers:
        centre = ((lower + upper) / 2).flatten().tolist()
        active = (lower > 0).flatten().tolist()
        inactive = (upper < 0).flatten().tolist()
        n, mean = len(centre), sum(centre) / len(centre)
        if not any(inactive):
            continue  # The term is infinite or NaN.
        rho = sum(c for c, on in zip(centre, active, strict=True) if on) / n
        rho /= -sum(c for c, off in zip(centre, inactive, strict=True) if off) / n
        s = sum((c - mean) ** 2 for c, on in zip(centre, active, strict=True) if on)
        s /= sum((c - mean) ** 2 for c, off in zip(centre, inactive, strict=True) if off)
        for ratio in (rho, s):
            total += max(0.0, tol - min(ratio, 1 / max(ratio, 1e-12))) / tol
    return total / len(layers)


def relu_inputs(model, box):
    """The bounds at every ReLU's input of a Sequential, by the reference, and at the first affine layer's."""
    layers, first = [], None
    for module in model:
        if first is None and isinstance(module, nn.Linear | nn.Conv2d):
            first = (box.lower, box.upper)
        if isinstance(module, nn.ReLU):
            layers.append((box.lower, box.upper))
        box = propagate(module, box)
    return first, layers


@torch.no_grad()
def unbalance(model):
    """Weights and biases under which every layer has active, inactive and undecided neurons."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias.normal_(-0.2, 1.0)


@pytest.mark.parametrize("tol", [0.5, 0.8])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, {"rel": 1e-6}), (torch.float32, {"abs": 1e-5})])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_equal_the_formulas(batchnorm, dtype, tolerance, training, tol, x):
    model = nn.Sequential(fw.models.Normalize([0.5], [0.2]), *networks.convolutional(batchnorm)).train(training)
    unbalance(model)
    bounded = fw.BoundedModule(model, x).to(dtype)
    eps = 0.02
    bounded.compute_bounds(x=(fw.input_box(x.to(dtype), eps),), method="IBP")
    with torch.no_grad():
        wide = x.double()
        box = Box(wide, (wide - eps).clamp(min=0), (wide + eps).clamp(max=1))
        first, layers = relu_inputs(copy.deepcopy(model).double(), box)
    assert any(bool((upper < 0).any()) for _, upper in layers)
    tight, balance = fw.regularizers.tightness(bounded, tol), fw.regularizers.relu_balance(bounded, tol)
    assert (tight.ndim, balance.ndim) == (0, 0)
    assert float(tight.detach()) == pytest.approx(expected_tightness(first, layers, tol), **tolerance)
    assert float(balance.detach()) == pytest.approx(expected_balance(layers, tol), **tolerance)


def test_width_at_the_start_is_taken_after_normalisation():
    # One affine layer of weight 1: Δ_1 = Δ_0 = 5ε. Taken before the normalisation, Δ_0 would be ε.
    model = nn.Sequential(fw.models.Normalize([0.5], [0.2]), nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    nn.init.ones_(model[2].weight)
    x = torch.full((4, 1, 1, 1), 0.5)
    bounded = fw.BoundedModule(model, x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    assert float(fw.regularizers.tightness(bounded).detach()) == 0.0
    with torch.no_grad():
        model[2].weight.fill_(4.0)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    assert float(fw.regularizers.tightness(bounded).detach()) == pytest.approx((0.5 - 0.25) / 0.5, abs=1e-5)


@pytest.mark.parametrize("regularizer", [fw.regularizers.tightness, fw.regularizers.relu_balance])
def test_gradients_equal_finite_differences(regularizer, x):
    model = networks.convolutional().double()
    unbalance(model)
    x = x.double()
    bounded = fw.BoundedModule(model, x)

    def value():
        bounded.compute_bounds(x=(fw.input_box(x, 0.02),), method="IBP")
        return regularizer(bounded)

    for parameter in (model[0].weight, model[1].weight, model[7].bias):
        (gradient,) = torch.autograd.grad(value(), parameter)
        direction = torch.randn_like(parameter)
        step = 1e-6
        with torch.no_grad():
            parameter.add_(step * direction)
            above = value()
            parameter.sub_(2 * step * direction)
            below = value()
            parameter.add_(step * direction)
        numeric = float((above - below).detach()) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-7)


def imbalance(lower, upper):
    lower, upper = (torch.tensor(end, requires_grad=True) for end in (lower, upper))
    (term,) = _imbalance([LayerBounds("", lower, upper)], tol=0.5)
    gradients = torch.autograd.grad(term, (lower, upper))
    return float(term.detach()) / 0.5, [float(g.abs().sum()) for g in gradients]


def test_only_inactive_neurons_add_two_without_gradient():
    value, gradients = imbalance([-3.0, -2.0, -1.0], [-1.0, -1.5, 2.0])
    assert value == 2.0
    assert gradients == [0.0, 0.0]


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ([1.0, 2.0, -1.0], [2.0, 3.0, 1.0]),  # Active and undecided.
        ([-1.0, -2.0], [1.0, 0.5]),  # Undecided alone.
        ([1.0, 1.0], [1.0, 1.0]),  # All alike.
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_no_inactive_neuron_adds_nothing(lower, upper):
    assert imbalance(lower, upper) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ([-2.0, -2.0], [-1.0, -1.0]),  # No spread at all.
        ([1.0, -2.0], [2.0, -1.0]),
        ([1e-20, -1.0], [1e-20, -1.0]),
        ([1e15, -1e-20], [1e15, -1e-20]),
    ],
)
def test_gradients_are_finite_everywhere(lower, upper):
    value, gradients = imbalance(lower, upper)
    assert math.isfinite(value)
    assert all(map(math.isfinite, gradients))


def test_vanished_bounds_keep_tightness_finite(x):
    model = networks.multilayer(batchnorm=False)
    nn.init.zeros_(model[1].weight)
    bounded = fw.BoundedModule(model, x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    value = fw.regularizers.tightness(bounded)
    assert float(value.detach()) == 0.0
    value.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_without_a_pass_there_is_a_clear_error(x):
    bounded = fw.BoundedModule(networks.convolutional(), x)
    bounded(x)
    for regularizer in (fw.regularizers.tightness, fw.regularizers.relu_balance):
        with pytest.raises(RuntimeError, match="compute_bounds"):
            regularizer(bounded)


def test_every_relu_counts_once_and_is_named_by_its_layer_or_the_module_of_its_sum(x):
    model = networks.SmallResNet(batchnorm=True)
    bounded = fw.BoundedModule(model, x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    names = [layer.name for layer in fw.relu_bounds(bounded)]
    assert names == ["stem", "block1.conv1", "block1", "block2.conv1", "block2", "hidden"]
    shared = fw.BoundedModule(networks.SharedActivation(), x)
    shared.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    assert [layer.name for layer in fw.relu_bounds(shared)] == ["features.0", "features.1", "fc"]


class Sum(nn.Module):
    """relu(x + f(x)), or of each of several functions in turn."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = nn.ModuleList(functions)

    def forward(self, x):
        for function in self.functions:
            x = torch.relu(x + function(x))
        return x


@pytest.mark.parametrize(
    ("features", "names"),
    [
        (Sum(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))), ["2.functions.0.0", "2"]),
        (Sum(nn.Linear(8, 8), nn.Linear(8, 8)), ["2.functions.0", "2.functions.1"]),
        (nn.Sequential(Sum(nn.Linear(8, 8)), nn.BatchNorm1d(8), nn.ReLU()), ["2.0", "2.0.functions.0"]),
    ],
)
def test_relus_of_residual_sums_have_names_of_their_own(features, names):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), features, nn.Linear(8, 2)).eval(), torch.rand(2, 4)
    bounded = fw.BoundedModule(model, x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    assert [layer.name for layer in fw.relu_bounds(bounded)] == ["0", *names]


def test_no_relu_no_regulariser(x):
    bounded = fw.BoundedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LeakyReLU(), nn.Linear(4, 3)), x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    with pytest.raises(fw.StructureError, match="no ReLU"):
        fw.regularizers.relu_balance(bounded)


ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "Tanh": nn.Tanh,
    "LeakyReLU": nn.LeakyReLU,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU(approximate="tanh"),
    "Mish": nn.Mish,
    "Hardswish": nn.Hardswish,
    "ELU": nn.ELU,
    "ReLU6": nn.ReLU6,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_tightness_takes_the_pre_activations_of_any_activation(x, name):
    layers = [nn.Linear(64, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    model = nn.Sequential(
        nn.Flatten(), layers[0], ACTIVATIONS[name](), layers[1], nn.BatchNorm1d(5), ACTIVATIONS[name](), layers[2]
    ).eval()
    model.requires_grad_(True)
    nn.init.normal_(layers[0].weight)
    bounded = fw.BoundedModule(model, x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1, None),), method="IBP")
    found = fw.regularizers.tightness(bounded)
    first = 0.1 * layers[0].weight.abs().sum(1).mean()
    layer = activation_bounds(bounded)[0]
    assert float((layer.upper - layer.lower).detach().mean() / 2) == pytest.approx(float(first.detach()), rel=1e-4)
    assert [one.name for one in activation_bounds(bounded)] == ["1", "3"]
    second = activation_bounds(bounded)[1]
    ratios = [0.1 / first, 0.1 / ((second.upper - second.lower).mean() / 2)]
    expected = sum((0.5 - ratio).clamp(min=0) for ratio in ratios) / 2 / 0.5
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    found.backward()
    assert bool(layers[0].weight.grad.isfinite().all())
    assert bool(layers[0].weight.grad.any())


def test_pre_activations_of_relu_networks_are_those_of_the_relus():
    x = torch.rand(2, 3, 16, 16)
    for model in (fw.models.cnn7((3, 16, 16), 10, width=2, hidden=4), fw.models.wide_resnet8((3, 16, 16), 10, width=1)):
        bounded = fw.BoundedModule(model, x)
        bounded.compute_bounds(x=(fw.input_box(x, 0.01),), method="IBP")
        pairs = zip(fw.relu_bounds(bounded), activation_bounds(bounded), strict=True)
        for relu, activation in pairs:
            assert relu.name == activation.name
            assert relu.lower is activation.lower
            assert relu.upper is activation.upper


def test_gates_of_other_tensors_are_activations_of_their_own(x):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.last(self.one(x) * torch.sigmoid(self.other(x)))

    graph = read_graph(fw.BoundedModule(Gated(), x))
    assert [name for name, _ in graph.activations] == ["other"]


def test_regularisers_that_a_network_has_no_activations_for_are_named(x):
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 3))
    names = ("tightness", "relu_balance", "volume", "weight_l1", "mine")
    assert undefined(fw.BoundedModule(smooth, x), names) == ["relu_balance", "volume"]
    affine = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert undefined(fw.BoundedModule(affine, x), names) == ["tightness", "relu_balance", "volume"]
    relus = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    assert undefined(fw.BoundedModule(relus, x), names) == []
    bounded = fw.BoundedModule(affine, x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    with pytest.raises(fw.StructureError, match="no activation"):
        fw.regularizers.tightness(bounded)


def test_nothing_is_read_to_the_host(x):
    from torch.overrides import TorchFunctionMode

    class NoReads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            assert name not in {"__bool__", "item", "tolist", "__float__", "__int__", "nonzero"}, name
            return func(*args, **(kwargs or {}))

    bounded = fw.BoundedModule(networks.convolutional(), x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    with NoReads():
        fw.regularizers.tightness(bounded)
        fw.regularizers.relu_balance(bounded)


def test_a_branch_that_nothing_perturbed_leads_to_counts_with_width_zero(x):
    model, vector = networks.TwoInputs(), torch.rand(8, 5)
    bounded = fw.BoundedModule(model, (x, vector))
    bounded.compute_bounds(x=(fw.input_box(x, 0.1), vector), method="IBP")
    layers = {layer.name: layer for layer in fw.relu_bounds(bounded)}
    assert torch.equal(layers["vector"].lower, layers["vector"].upper)
    assert bool(fw.regularizers.tightness(bounded).isfinite())
