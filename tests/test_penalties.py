"""Penalties of constant weight, and the literature's regularisers, written out neuron by neuron."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.recipe.losses import LOSSES
from tests import networks
from tests.reference import assert_gradients_equal_finite_differences

BOUNDS_OF_RELUS = {"relu_stability": fw.regularizers.relu_stability, "volume": fw.regularizers.volume}


def objective(x, model=None, schedule=None, **arguments):
    model = networks.convolutional() if model is None else model
    schedule = schedule or fw.LinearEpsilon(0.1, start=2, length=2, steps_per_epoch=5)
    return fw.ShortWarmup(fw.BoundedModule(model, x), schedule, **arguments)


def at_step(warmup, step):
    warmup.steps_done = step
    return warmup


def after_ibp(model, x, eps=0.05):
    bounded = fw.BoundedModule(model, x)
    bounded.compute_bounds(x=(fw.input_box(x, eps),), method="IBP")
    return bounded


# The terms.


def stability_by_hand(layers):
    total = 0.0
    for lower, upper in layers:
        for low, high in zip(lower.reshape(len(lower), -1), upper.reshape(len(upper), -1), strict=True):
            total -= sum(math.tanh(1 + a * b) for a, b in zip(low, high, strict=True)) / len(lower)
    return total


def volume_by_hand(layers):
    total = 0.0
    for lower, upper in layers:
        triangles = [max(0.0, -a) * max(0.0, b) for a, b in zip(lower.ravel(), upper.ravel(), strict=True)]
        total += sum(triangles) / len(triangles)
    return total


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["convolutional", "multilayer", "residual"])
def test_stability_and_volume_are_their_formulas(name, training, x):
    bounded = after_ibp(networks.ON_8X8[name]().train(training).double(), x.double())
    layers = [(r.lower.detach().numpy(), r.upper.detach().numpy()) for r in fw.relu_bounds(bounded)]
    assert any(((lower < 0) & (upper > 0)).any() for lower, upper in layers)
    assert any(((lower > 0) | (upper < 0)).any() for lower, upper in layers)
    stability, volume = fw.regularizers.relu_stability(bounded), fw.regularizers.volume(bounded)
    assert (stability.ndim, volume.ndim) == (0, 0)
    assert float(stability.detach()) == pytest.approx(stability_by_hand(layers), rel=1e-9)
    assert float(volume.detach()) == pytest.approx(volume_by_hand(layers), rel=1e-9)


@pytest.mark.parametrize("name", networks.ON_8X8)
def test_weight_l1_adds_up_every_affine_weight_and_nothing_else(name, x):
    model = networks.ON_8X8[name]()
    affine = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    expected = sum(float(np.abs(weight.detach().numpy().astype(np.float64)).sum()) for weight in affine)
    # No bound pass is needed before it.
    assert float(fw.regularizers.weight_l1(fw.BoundedModule(model, x)).detach()) == pytest.approx(expected, rel=1e-5)


class Tied(nn.Module):
    """Two modules with one weight between them."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.other.weight = self.one.weight
        self.out = nn.Linear(64, 3)

    def forward(self, x):
        return self.out(self.other(self.one(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize("make", [networks.CalledTwice, Tied])
def test_weight_l1_counts_a_shared_weight_once(make, x):
    model = make()
    matrices = [p for p in model.parameters() if p.ndim == 2]  # Each once.
    assert len(matrices) < 4
    expected = sum(float(p.detach().abs().sum()) for p in matrices)
    assert float(fw.regularizers.weight_l1(fw.BoundedModule(model, x)).detach()) == pytest.approx(expected, rel=1e-5)


class Times(nn.Module):
    def forward(self, weight):
        return 100 * weight


def test_weight_l1_is_that_of_the_computed_weight(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Times())
    term = fw.regularizers.weight_l1(fw.BoundedModule(model, x))
    expected = float(model[1].weight.detach().abs().sum() + model[3].weight.detach().abs().sum())
    assert float(term.detach()) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(term, model[1].parametrizations.weight.original)
    assert torch.allclose(gradient.abs(), torch.tensor(100.0))


def test_without_relu_only_weight_l1_is_defined(x):
    bounded = after_ibp(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LeakyReLU(), nn.Linear(4, 3)), x)
    assert float(fw.regularizers.weight_l1(bounded).detach()) > 0
    for term in BOUNDS_OF_RELUS.values():
        with pytest.raises(fw.StructureError, match="no ReLU"):
            term(bounded)


def test_without_a_pass_there_is_a_clear_error(x):
    bounded = fw.BoundedModule(networks.convolutional(), x)
    bounded(x)
    for term in BOUNDS_OF_RELUS.values():
        with pytest.raises(RuntimeError, match="compute_bounds"):
            term(bounded)


@pytest.mark.parametrize("name", ["relu_stability", "volume", "weight_l1"])
def test_gradients_of_the_terms_equal_finite_differences(name, x):
    model = networks.convolutional().double()
    x = x.double()
    bounded = fw.BoundedModule(model, x)

    def value():
        bounded.compute_bounds(x=(fw.input_box(x, 0.02),), method="IBP")
        return getattr(fw.regularizers, name)(bounded)

    for parameter in (model[0].weight, model[1].weight, model[7].weight):
        (gradient,) = torch.autograd.grad(value(), parameter, allow_unused=True)
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        direction, step = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            parameter.add_(step * direction)
            above = float(value())
            parameter.sub_(2 * step * direction)
            below = float(value())
            parameter.add_(step * direction)
        assert float((gradient * direction).sum()) == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-6)


def test_huge_bounds_keep_the_terms_and_gradients_finite(x):
    model = networks.convolutional(batchnorm=False)
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    bounded = after_ibp(model, x)
    for term in BOUNDS_OF_RELUS.values():
        value = term(bounded)
        gradient = torch.autograd.grad(value, model[0].weight, retain_graph=True)[0]
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", ["relu_stability", "volume", "weight_l1"])
def test_terms_read_a_plain_bounded_module(name, x):
    import auto_LiRPA

    model = networks.multilayer(batchnorm=False).eval()
    plain = auto_LiRPA.BoundedModule(model, x)
    plain.compute_bounds(x=(fw.input_box(x, 0.05),), method="IBP")
    term = getattr(fw.regularizers, name)
    assert float(term(plain).detach()) == pytest.approx(float(term(after_ibp(model, x)).detach()), rel=1e-6)


# In the objective.


def test_weights_stay_the_same_over_the_ramp_and_after_it(x, y):
    weights = {"weight_l1": 1e-3, "volume": 0.2, "relu_stability": 1e-5}
    warmup = objective(x, reg_weight=0.3, penalties=weights)
    for step, fraction in ((0, 0.0), (6, 0.1), (10, 0.5), (15, 1.0), (30, 1.0)):
        out = at_step(warmup, step)(x, y)
        expected = out.clean_loss if fraction == 0 else out.robust_loss
        if fraction < 1:
            expected = expected + 0.3 * (1 - fraction) * (out.tightness + out.relu_balance)
        expected = expected + sum(weight * out.terms[name] for name, weight in weights.items())
        assert torch.allclose(out.loss, expected, rtol=1e-6)
        # At the smallest radius, no neuron of so few is undecided.
        assert all(float(out.terms[name].detach()) != 0 for name in weights if step or name != "volume")


def test_regularisers_by_name_fade_where_penalties_stay(x, y):
    fading = objective(x, regularizers=("volume",), reg_weight=2.0)
    constant = objective(x, fading.model, regularizers=(), penalties={"volume": 2.0})
    for step, fraction in ((0, 0.0), (10, 0.5), (15, 1.0)):
        out, other = at_step(fading, step)(x, y), at_step(constant, step)(x, y)
        base = other.loss - 2 * other.terms["volume"]
        rest = 2 * (1 - fraction) * other.terms["volume"]
        assert torch.allclose(out.loss, base + rest, rtol=1e-5)
    assert out.terms["volume"].isnan()
    assert not other.terms["volume"].isnan()


def test_terms_hold_every_name_in_both_modes(x, y):
    def mine(bounded):
        return fw.relu_bounds(bounded)[0].upper.mean()

    warmup = objective(x, regularizers=("tightness",), penalties={"volume": 0.1, mine: 0.5})
    out = at_step(warmup, 10)(x, y)
    assert out.terms.keys() == {"tightness", "volume", "mine"}
    expected = out.robust_loss + 0.25 * out.tightness + 0.1 * out.terms["volume"] + 0.5 * out.terms["mine"]
    assert torch.allclose(out.loss, expected)
    assert torch.equal(out.terms["tightness"], out.tightness)
    assert out.relu_balance.isnan()
    out = warmup.eval()(x, y)
    assert out.terms.keys() == {"tightness", "volume", "mine"}
    assert all(bool(value.isnan()) for value in out.terms.values())


def test_evaluation_knows_no_penalties(x, y):
    out = objective(x, penalties={"weight_l1": 1.0}).eval()(x, y)
    assert torch.equal(out.loss, out.robust_loss)
    assert out.terms["weight_l1"].isnan()


def test_the_box_keeps_a_floor_while_penalties_are_on(x, y):
    arguments = {"regularizers": (), "penalties": {"volume": 1.0}, "min_eps": 1e-4}
    out = objective(x, **arguments)(x, y)
    assert float(out.eps) == pytest.approx(1e-4)
    assert torch.allclose(out.loss, out.clean_loss + out.terms["volume"])
    slow = objective(x, schedule=fw.SmoothedEpsilon(0.1, 1, 10, 100), **arguments)
    assert float(at_step(slow, 2)(x, y).eps) == pytest.approx(1e-4)
    assert slow.schedule(2) < 1e-4
    # Nothing is floored where the schedule is above, nor without penalties.
    assert float(at_step(objective(x, **arguments), 10)(x, y).eps) == pytest.approx(0.05)
    assert float(objective(x, regularizers=())(x, y).eps) == 0.0


def test_penalties_do_not_need_the_regularisers_weight(x, y):
    out = at_step(objective(x, reg_weight=0.0, penalties={"volume": 0.5}), 10)(x, y)
    assert out.terms.keys() == {"volume"}
    assert torch.allclose(out.loss, out.robust_loss + 0.5 * out.terms["volume"])


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp", "crown-ibp-fused"])
def test_gradient_of_the_penalised_loss_equals_finite_differences(bound, x, y):
    model = networks.convolutional().double()
    x = x.double()
    weights = {"weight_l1": 1e-3, "volume": 0.3, "relu_stability": 1e-2}
    warmup = at_step(objective(x, model, loss=LOSSES[bound](), regularizers=(), penalties=weights), 8)
    assert_gradients_equal_finite_differences(lambda: warmup(x, y).loss, [model[0].weight])


def test_penalties_shrink_what_they_weigh(x, y):
    sums = []
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        warmup = objective(x, regularizers=(), penalties={"weight_l1": weight}, schedule=fw.ConstantEpsilon(0.02))
        optimizer = torch.optim.Adam(warmup.parameters(), 1e-2)
        for _ in range(15):
            warmup(x, y).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        sums.append(float(fw.regularizers.weight_l1(warmup.bounded).detach()))
    assert sums[1] < 0.9 * sums[0]


def tightness(bounded):
    """Somebody's own, of a name that is taken."""
    return torch.zeros(())


BAD = {
    "name twice": ({"penalties": {"tightness": 0.1}}, ValueError, "two regularisers are called 'tightness'"),
    "name twice, one a function": ({"penalties": {tightness: 0.1}}, ValueError, "two .* called 'tightness'"),
    "two functions of a name": (
        {"regularizers": (), "penalties": {tightness: 0.1, "tightness": 0.1}},
        ValueError,
        "two .* called 'tightness'",
    ),
    "unknown name": ({"penalties": {"l1": 0.1}}, ValueError, "unknown regulariser 'l1'; known are .*weight_l1"),
    "negative": ({"penalties": {"volume": -0.1}}, ValueError, r"finite and at least 0; found \[-0\.1\]"),
    "NaN": ({"penalties": {"volume": math.nan}}, ValueError, r"finite and at least 0; found \[nan\]"),
    "infinite": ({"penalties": {"volume": math.inf}}, ValueError, r"finite and at least 0; found \[inf\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_penalties_are_refused(case, x):
    arguments, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        objective(x, **arguments)


def test_a_network_without_relu_takes_weight_l1_alone(x, y):
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LeakyReLU(), nn.Linear(4, 3))
    for name in BOUNDS_OF_RELUS:
        with pytest.raises(fw.StructureError, match=rf"no ReLU.*{name}"):
            objective(x, smooth, regularizers=(), penalties={name: 0.1})
    out = at_step(objective(x, smooth, regularizers=(), penalties={"weight_l1": 0.1}), 10)(x, y)
    assert torch.allclose(out.loss, out.robust_loss + 0.1 * out.terms["weight_l1"])
