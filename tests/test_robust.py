"""The robust losses, by IBP and CROWN-IBP with and without loss fusion, against references and sampled points."""

from __future__ import annotations

import copy
import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.bounds import (
    crown_lower,
    fused_crown_loss,
    ibp_margin_bounds,
    log_sum_exp,
    margin_matrix,
    mixed_log,
)
from lirpa_fastwarmup.engine.compat import silenced_warnings
from lirpa_fastwarmup.recipe import losses
from lirpa_fastwarmup.recipe.losses import LOSSES
from tests import networks
from tests.reference import assert_gradients_equal_finite_differences
from tests.test_soundness import freeze_statistics

EPS = 0.05
BOUNDS = ("ibp", "crown-ibp", "crown-ibp-fused")


def bounded_over_box(model, x, y, eps, classes=3):
    """A BoundedModule after the IBP pass that the losses start from, and its bounds on z_j − z_y."""
    bounded = fw.BoundedModule(model, x)
    bounded(x)
    lower, upper = ibp_margin_bounds(bounded, fw.input_box(x, eps), y, classes, reuse_statistics=True)
    return bounded, -upper, -lower


def fused(model, x, y, eps, classes=3):
    bounded, lower, upper = bounded_over_box(model, x, y, eps, classes)
    return fused_crown_loss(bounded, lower, upper, y, classes)


def cross_entropy_of_margins(margins, y):
    """CE(−m, y) with m_y = 0, written out."""
    rows = []
    for bounds, label in zip(margins.tolist(), y.tolist(), strict=True):
        logits = [-bound for bound in bounds]
        logits.insert(label, 0.0)
        rows.append(logits)
    return F.cross_entropy(torch.tensor(rows, dtype=torch.float64), y, reduction="none").to(margins.dtype)


def with_zero_biases(model):
    """The same function, in a form that the engine's own loss fusion can read: it looks for biases."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is None:
            out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(torch.zeros(out))
    return twin


def engine_losses(model, x, y, eps):
    """The engine's own fused losses, IBP and CROWN-IBP, through a graph with exp and gather in it."""
    with silenced_warnings(), pytest.MonkeyPatch.context() as patch:
        # The engine's exp subtracts the largest logit, so that the two functions differ.
        patch.setattr("lirpa_fastwarmup.engine.module.check_same_function", lambda *_: True)
        patch.setattr("lirpa_fastwarmup.engine.compat._OPSET", 11)  # The first with gather.
        wrapper = importlib.import_module("auto_LiRPA.wrapper").CrossEntropyWrapper(with_zero_biases(model))
        bounded = fw.BoundedModule(wrapper, (x, y), bound_opts={"loss_fusion": True}, allow_untested=True)
        bounded(x, y)
        (exp,) = [node for node in bounded._modules.values() if type(node).__name__ == "BoundExp"]
        losses = []
        for method, options in (("IBP", {}), ("CROWN-IBP", {"bound_lower": False})):
            box = fw.input_box(x, eps)
            _, upper = bounded.compute_bounds(x=(box, y), method=method, reuse_statistics=True, **options)
            losses.append((upper.log() + exp.max_input).squeeze(1).detach())
    return losses


# Loss fusion against the engine's own.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", networks.ON_8X8)
def test_fusion_of_ibp_bounds_is_the_unfused_loss_and_the_engines_fused_one(name, training, x, y):
    model = networks.ON_8X8[name]().train(training)
    _, _, upper = bounded_over_box(model, x, y, EPS)
    loss = log_sum_exp(upper).detach()
    assert loss.shape == (8,)
    assert torch.allclose(loss, cross_entropy_of_margins(-upper.detach(), y), rtol=1e-6, atol=1e-6)
    ibp, _ = engine_losses(model, x, y, EPS)
    assert torch.allclose(loss, ibp, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", networks.ON_8X8)
def test_fused_crown_loss_is_the_engines(name, training, x, y):
    model = networks.ON_8X8[name]().train(training)
    loss = fused(model, x, y, EPS).detach()
    assert loss.shape == (8,)
    ibp, crown = engine_losses(model, x, y, EPS)
    assert torch.allclose(loss, crown, rtol=1e-4)
    assert not torch.allclose(loss, ibp, rtol=1e-4)  # The two bounds are not one.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", networks.ON_8X8)
def test_crown_bounds_of_weight_one_are_the_engines_crown_ibp(name, training, x, y):
    model = networks.ON_8X8[name]().train(training)
    bounded = fw.BoundedModule(model, x)
    bounded(x)
    box, matrix = fw.input_box(x, EPS), margin_matrix(y, 3, x.dtype)
    lower, upper = bounded.compute_bounds(x=(box,), C=matrix, method="CROWN-IBP")
    found = on_box("crown-ibp", bounded, box, y, 3, 0.0)
    expected = cross_entropy_of_margins(lower.detach(), y).mean()
    assert float(found.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    # The same margins one by one, and the upper side.
    assert torch.allclose(crown_lower(bounded, matrix), lower, rtol=1e-4, atol=1e-5)
    assert torch.allclose(crown_upper(bounded, matrix), upper, rtol=1e-4, atol=1e-5)


def test_crown_leaves_the_bounds_at_the_relus_alone(x, y):
    bounded, lower, upper = bounded_over_box(networks.convolutional(), x, y, EPS)
    before = [(layer.lower.clone(), layer.upper.clone()) for layer in fw.relu_bounds(bounded)]
    crown_lower(bounded, margin_matrix(y, 3, x.dtype))
    fused_crown_loss(bounded, lower, upper, y, 3)
    for layer, (low, high) in zip(fw.relu_bounds(bounded), before, strict=True):
        assert torch.equal(layer.lower, low)
        assert torch.equal(layer.upper, high)


# A reference of its own, in float64.


def interval_of_affine(weight, bias, lower, upper):
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    middle, reach = weight @ centre + bias, weight.abs() @ radius
    return middle - reach, middle + reach


def crown_by_hand(layers, low, high, row):
    """CROWN's lower bound on row·logits for one input box, and whether each kind of neuron occurred.

    ``layers`` are (weight, bias) with a ReLU between each two; neurons' bounds are by interval arithmetic.
    """
    bounds, ends = [], (low, high)
    for weight, bias in layers[:-1]:
        ends = interval_of_affine(weight, bias, *ends)
        bounds.append(ends)
        ends = (ends[0].clamp(min=0), ends[1].clamp(min=0))
    weight, bias = layers[-1]
    coefficients, constant = row @ weight, row @ bias
    seen = set()
    for (weight, bias), (lower, upper) in zip(layers[-2::-1], bounds[::-1], strict=True):
        through = torch.zeros_like(coefficients)
        for i, (a, below, above) in enumerate(zip(coefficients.tolist(), lower.tolist(), upper.tolist(), strict=True)):
            if below >= 0:
                through[i] = a
                seen.add("active")
            elif above <= 0:
                seen.add("inactive")
            elif a >= 0:  # From below by slope 0 or 1, whichever leaves the smaller area.
                through[i] = a if above > -below else 0.0
                seen.add("slope one" if above > -below else "slope zero")
            else:  # From above by the chord.
                through[i] = a * above / (above - below)
                constant = constant - a * above * below / (above - below)
                seen.add("chord")
        coefficients, constant = through @ weight, constant + through @ bias
    bound = constant + coefficients.clamp(min=0) @ low + coefficients.clamp(max=0) @ high
    return bound, seen


def perceptron(features, classes, scale=1.0):
    """Linear layers of the given sizes with ReLU between, on flattened inputs."""
    sizes = [*features, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        model[-1].weight.mul_(scale)
    return model


def crown_upper(bounded, directions):
    return bounded.compute_bounds(x=None, C=directions, IBP=False, method="CROWN", bound_lower=False)[1]


def affine_pairs(model):
    return [(m.weight.detach().double(), m.bias.detach().double()) for m in model if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("hidden", [(12,), (12, 9)])
@torch.no_grad()
def test_crown_equals_a_reference_written_out_neuron_by_neuron(hidden, eps):
    model = perceptron((16, *hidden), 4).double().eval()
    x, y = torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 4
    bounded, _, _ = bounded_over_box(model, x, y, eps, classes=4)
    directions = torch.cat([margin_matrix(y, 4, x.dtype), torch.randn(6, 2, 4, dtype=torch.float64)], 1)
    lower, upper = crown_lower(bounded, directions), crown_upper(bounded, directions)
    assert lower.shape == upper.shape == (6, 5)
    low, high = (x - eps).clamp(min=0).flatten(1), (x + eps).clamp(max=1).flatten(1)
    seen = set()
    for b in range(6):
        for k in range(5):
            row = directions[b, k]
            below, kinds = crown_by_hand(affine_pairs(model), low[b], high[b], row)
            above, _ = crown_by_hand(affine_pairs(model), low[b], high[b], -row)
            assert float(lower[b, k]) == pytest.approx(float(below), rel=1e-6, abs=1e-9)
            assert float(upper[b, k]) == pytest.approx(-float(above), rel=1e-6, abs=1e-9)
            seen |= kinds
    if eps == 0.1:
        assert seen == {"active", "inactive", "slope one", "slope zero", "chord"}


@pytest.mark.parametrize("scale", [1.0, 30.0])
@torch.no_grad()
def test_fused_loss_equals_chords_and_crown_by_hand(scale):
    eps, classes = 0.1, 4
    model = perceptron((16, 12), classes, scale).double().eval()
    x, y = torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % classes
    loss = fused(model, x, y, eps, classes)
    low, high = (x - eps).clamp(min=0).flatten(1), (x + eps).clamp(max=1).flatten(1)
    (first, last) = affine_pairs(model)
    for b, label in enumerate(y.tolist()):
        hidden = [end.clamp(min=0) for end in interval_of_affine(*first, low[b], high[b])]
        total, row = 1.0, torch.zeros(classes, dtype=torch.float64)
        for j in range(classes):
            if j == label:
                continue
            lower, upper = interval_of_affine(last[0][j] - last[0][label], last[1][j] - last[1][label], *hidden)
            slope = float((upper.exp() - lower.exp()) / (upper - lower))
            total += math.exp(upper) - slope * float(upper)
            row[j] += slope
            row[label] -= slope
        upper = -crown_by_hand([first, last], low[b], high[b], -row)[0]
        assert float(loss[b]) == pytest.approx(math.log(total + float(upper)), rel=1e-6)


# Soundness.


def worst_points(model, x, y, eps):
    """The highest cross-entropy found in each sample's clipped box, in float64: random points, corners, ascent."""
    model, x = copy.deepcopy(model).double().eval(), x.double()
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)

    def loss(points):
        return F.cross_entropy(model(points), y, reduction="none")

    worst = loss(x).detach()
    for trial in range(24):
        share = torch.rand_like(x)
        point = low + (high - low) * (share if trial % 2 else share.round())
        worst = torch.maximum(worst, loss(point).detach())
    for start in (x, low + (high - low) * torch.rand_like(x)):
        point = start
        for _ in range(8):
            point = point.detach().requires_grad_(True)
            value = loss(point)
            worst = torch.maximum(worst, value.detach())
            (gradient,) = torch.autograd.grad(value.sum(), point)
            point = torch.minimum(torch.maximum(point + eps / 3 * gradient.sign(), low), high)
        worst = torch.maximum(worst, loss(point).detach())
    return worst


def on_box(bound, bounded, box, y, classes, fraction):
    """The loss over ``box``, after a clean pass."""
    step = losses.LossStep(bounded, box, y, box.new_zeros(len(y), classes), box, 0.0, None, fraction, losses.RAMP)
    return losses.LOSSES[bound]()(step)


def predicted_or_not(model, x, classes):
    """Labels, of which every other one is the network's own answer."""
    with torch.no_grad():
        answer = copy.deepcopy(model).eval()(x).argmax(1)
    every_other = torch.arange(len(x)) % 2
    return (answer + every_other * torch.randint(1, classes, (len(x),))) % classes


RADII = st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]) | st.floats(1e-3, 0.5)
SCALES = st.sampled_from([1.0, 10.0, 100.0, 1000.0, 1e5])


@hypothesis_settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    classes=st.sampled_from([2, 3, 10]),
    eps=RADII,
    scale=SCALES,
    fraction=st.floats(0.001, 0.999),
    hidden=st.sampled_from([(8,), (8, 8)]),
)
def test_losses_are_upper_bounds_at_every_sampled_point(seed, classes, eps, scale, fraction, hidden):
    torch.manual_seed(seed)
    model = perceptron((16, *hidden), classes, scale).eval()
    x = torch.rand(4, 1, 4, 4)
    y = predicted_or_not(model, x, classes)
    worst = worst_points(model, x, y, eps)
    # What float32 makes of logits of this size, beside the loss.
    slack = 1e-5 * (1 + copy.deepcopy(model).double()(x.double()).abs().max().item())
    bounded, lower, upper = bounded_over_box(model, x, y, eps, classes)
    loss = fused_crown_loss(bounded, lower, upper, y, classes)
    assert bool(loss.isfinite().all())
    assert bool((loss >= worst - slack).all())
    for bound in BOUNDS:
        for share in (0.0, fraction, 1.0):
            found = on_box(bound, bounded, fw.input_box(x, eps), y, classes, share)
            assert math.isfinite(float(found.loss.detach()))
            assert float(found.loss.detach()) >= float(worst.mean()) - slack
            assert found.certified.shape == (4,)


@pytest.mark.parametrize("fraction", [0.01, 0.5])
@pytest.mark.parametrize("bound", BOUNDS)
def test_exploded_bounds_give_finite_losses_and_gradients(bound, fraction):
    model = perceptron((16, 12, 12), 10, scale=200.0)
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6)
    bounded, _, upper = bounded_over_box(model, x, y, 0.5, classes=10)
    assert float(upper.detach().max()) > 200  # exp overflows at 89 in float32.
    loss = on_box(bound, bounded, fw.input_box(x, 0.5), y, 10, fraction).loss
    assert float(loss.detach()) >= float(worst_points(model, x, y, 0.5).mean())
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert any(bool(p.grad.any()) for p in model.parameters())


def test_huge_logits_in_a_tiny_box_keep_the_fused_loss_finite_and_sound():
    for seed in range(6):
        torch.manual_seed(seed)
        model = perceptron((16, 16, 16), 10, scale=1e8).eval()
        x, y = torch.rand(8, 1, 4, 4), torch.arange(8)
        loss = fused(model, x, y, 0.0, classes=10)
        assert bool(loss.isfinite().all())
        assert bool((loss >= worst_points(model, x, y, 0.0) * (1 - 1e-4)).all())
        loss.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["convolutional", "residual"])
@torch.no_grad()
def test_training_mode_bounds_the_loss_under_the_batch_statistics(name, x, y):
    model = networks.ON_8X8[name]()
    bounded, lower, upper = bounded_over_box(model, x, y, 0.02)
    loss = fused_crown_loss(bounded, lower, upper, y, 3)
    margins = crown_lower(bounded, margin_matrix(y, 3, x.dtype))
    model.eval()
    freeze_statistics(model, x)
    for trial in range(60):
        noise = torch.rand_like(x) * 2 - 1
        point = (x + 0.02 * (noise if trial % 2 else noise.sign())).clamp(0, 1)
        entropy = F.cross_entropy(model(point), y, reduction="none")
        assert bool((loss >= entropy - 1e-4).all())
        assert bool((log_sum_exp(-margins) >= entropy - 1e-4).all())


def test_a_box_of_radius_zero_gives_the_clean_loss(x, y):
    for name in ("no BatchNorm", "residual without BatchNorm"):
        model = networks.ON_8X8[name]().eval()
        clean = F.cross_entropy(model(x), y, reduction="none")
        assert torch.allclose(fused(model, x, y, 0.0), clean, rtol=1e-5)


@torch.no_grad()
def test_what_crown_proves_is_right_and_more_than_ibp_proves():
    proved_by_ibp = proved_by_crown = 0
    for seed in range(5):
        torch.manual_seed(seed)
        model = perceptron((16, 12, 12), 3, scale=10.0).eval()
        x = torch.rand(32, 1, 4, 4)
        y = predicted_or_not(model, x, 3)
        bounded = fw.BoundedModule(model, x)
        box = fw.input_box(x, 0.03)
        found = {bound: on_box(bound, bounded, box, y, 3, 0.3).certified for bound in BOUNDS}
        assert torch.equal(found["crown-ibp-fused"], found["ibp"])
        assert bool((found["crown-ibp"] | ~found["ibp"]).all())
        for trial in range(100):
            noise = torch.rand_like(x) * 2 - 1
            point = (x + 0.03 * (noise if trial % 2 else noise.sign())).clamp(0, 1)
            assert bool((model(point).argmax(1) == y)[found["crown-ibp"]].all())
        proved_by_ibp += int(found["ibp"].sum())
        proved_by_crown += int(found["crown-ibp"].sum())
    assert 0 < proved_by_ibp < proved_by_crown < 5 * 32


# The mix of two bounds.


@pytest.mark.parametrize("weight", [1e-3, 0.3, 0.999])
def test_mixed_log_is_the_plain_formula(weight):
    one = torch.tensor([-3.0, 0.0, 2.5, 20.0], dtype=torch.float64)
    other = torch.tensor([1.0, 0.0, -2.0, 21.0], dtype=torch.float64)
    expected = (weight * one.exp() + (1 - weight) * other.exp()).log()
    assert torch.allclose(mixed_log(one, other, weight), expected, rtol=1e-12, atol=1e-15)


def test_mixed_log_does_not_overflow():
    one = torch.tensor([500.0, 500.0, 0.0, -500.0], requires_grad=True)
    other = torch.tensor([500.0, 0.0, 500.0, -500.0], requires_grad=True)
    found = mixed_log(one, other, 0.25)
    expected = torch.tensor([500.0, 500.0 + math.log(0.25), 500.0 + math.log(0.75), -500.0])
    assert torch.allclose(found, expected, rtol=1e-6)
    gradients = torch.autograd.grad(found.sum(), (one, other))
    assert torch.allclose(gradients[0], torch.tensor([0.25, 1.0, 0.0, 0.25]), atol=1e-4)
    assert torch.allclose(gradients[1], torch.tensor([0.75, 0.0, 1.0, 0.75]), atol=1e-4)


@pytest.mark.parametrize("bound", BOUNDS[1:])
def test_what_is_mixed_on_the_ramp_and_with_which_weights(bound, x, y):
    # Margins without fusion, sums of exponentials with it; CROWN's share is 1 − ε/ε_max.
    fraction = 0.3
    bounded, lower, upper = bounded_over_box(networks.convolutional(), x, y, EPS)
    if bound == "crown-ibp":
        crown = crown_lower(bounded, margin_matrix(y, 3, x.dtype))
        expected = cross_entropy_of_margins(0.7 * crown.detach() + 0.3 * -upper.detach(), y).mean()
    else:
        crown = fused_crown_loss(bounded, lower, upper, y, 3).double()
        expected = (0.7 * crown.exp() + 0.3 * log_sum_exp(upper).double().exp()).log().mean()
    bounded(x)
    found = on_box(bound, bounded, fw.input_box(x, EPS), y, 3, fraction)
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("width", [0.0, 1e-8, 9.99e-4, 1.001e-3, 0.5, 80.0, 1e30])
def test_one_class_against_another_is_the_chord_itself(width):
    # z_1 − z_0 = x·width on [0, 1], of which CROWN is exact: the chord's upper end is exp(width).
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [min(width, 600.0)]]))
        model[1].bias.zero_()
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    loss = fused(model, x, torch.tensor([0]), 0.5, classes=2)
    assert float(loss.detach()) == pytest.approx(float(F.softplus(torch.tensor(min(width, 600.0)).double())), rel=1e-9)


# In the objective.


def objective(bound, x, model=None, **arguments):
    model = networks.convolutional() if model is None else model
    schedule = fw.LinearEpsilon(0.1, start=2, length=2, steps_per_epoch=5)
    return fw.ShortWarmup(fw.BoundedModule(model, x), schedule, loss=LOSSES[bound](), **arguments)


def at_step(warmup, step):
    warmup.steps_done = step
    return warmup


@pytest.mark.parametrize("arguments", [{"regularizers": ()}, {"kappa": (1.0, 0.5)}])
@pytest.mark.parametrize("bound", BOUNDS)
def test_gradients_equal_finite_differences(bound, arguments, x, y):
    model = networks.convolutional().double()
    x = x.double()
    warmup = at_step(objective(bound, x, model, **arguments), 8)
    assert warmup.fraction == pytest.approx(0.3)
    chosen = [model[0].weight, model[1].weight, model[4].bias, model[7].weight, model[10].weight]
    assert_gradients_equal_finite_differences(lambda: warmup(x, y).loss, chosen)


def test_bounds_differ_on_the_ramp_alone(x, y):
    model = networks.convolutional()
    warmups = {bound: objective(bound, x, model) for bound in BOUNDS}

    def losses(step):
        return [float(at_step(warmup, step)(x, y).robust_loss.detach()) for warmup in warmups.values()]

    assert len(set(losses(8))) == 3
    for step in (15, 40):
        assert len(set(losses(step))) == 1
    for warmup in warmups.values():
        warmup.eval()
    for step in (0, 8, 15):
        assert len(set(losses(step))) == 1


@pytest.mark.parametrize("bound", BOUNDS)
def test_before_the_ramp_the_loss_is_the_clean_one(bound, x, y):
    out = objective(bound, x, regularizers=())(x, y)
    assert torch.equal(out.loss, out.clean_loss)
    assert out.robust_loss.isnan()
    out = objective(bound, x)(x, y)
    assert torch.allclose(out.loss, out.clean_loss + 0.5 * (out.tightness + out.relu_balance))


@pytest.mark.parametrize("step", [0, 6, 8, 14])
def test_regularisers_read_the_same_bounds_whatever_bounds_the_loss(step, x, y):
    model = networks.convolutional()
    names = ("tightness", "relu_balance", "relu_stability", "volume")
    terms = [at_step(objective(b, x, model, regularizers=names), step)(x, y).terms for b in BOUNDS]
    for name in names:
        assert bool(terms[0][name].isfinite())
        assert torch.equal(terms[0][name], terms[1][name])
        assert torch.equal(terms[0][name], terms[2][name])


def test_verified_error_is_crowns_where_its_margins_are_known(x):
    model = perceptron((64, 12, 12), 3, scale=10.0)
    x = torch.rand(64, 1, 8, 8)
    y = predicted_or_not(model, x, 3)
    found = {b: float(at_step(objective(b, x, model), 8)(x, y).verified_error) for b in BOUNDS}
    assert found["crown-ibp-fused"] == found["ibp"]
    clean = float((model(x).argmax(1) != y).double().mean())
    assert clean <= found["crown-ibp"] < found["ibp"]


def test_training_brings_every_bound_down(x, y):
    for bound in BOUNDS[1:]:
        torch.manual_seed(1)
        warmup = objective(bound, x)
        fw.ibp_init_(warmup.bounded)
        optimizer = torch.optim.Adam(warmup.parameters(), 1e-2)
        values = []
        for _ in range(15):
            out = at_step(warmup, 8)(x, y)
            values.append(float(out.loss.detach()))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert values[-1] < 0.9 * values[0]


# Gowal et al.'s mix with the clean loss.


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bound", BOUNDS)
def test_kappa_falls_from_one_along_the_ramp(bound, kappa, x, y):
    warmup = objective(bound, x, kappa=(1.0, kappa), regularizers=())
    plain = objective(bound, x, warmup.model, regularizers=())
    for step, fraction in ((6, 0.1), (8, 0.3), (14, 0.9), (15, 1.0), (30, 1.0)):
        out, without = at_step(warmup, step)(x, y), at_step(plain, step)(x, y)
        share = 1 - (1 - kappa) * fraction
        clean, hard = float(out.clean_loss.detach()), float(out.robust_loss.detach())
        assert float(out.loss.detach()) == pytest.approx(share * clean + (1 - share) * hard, rel=1e-5)
        # The robust loss itself stays what it is without.
        assert hard == pytest.approx(float(without.robust_loss.detach()), rel=1e-6)
        assert float(without.loss.detach()) == pytest.approx(hard, rel=1e-6)


def test_kappa_beside_the_regularisers(x, y):
    out = at_step(objective("ibp", x, kappa=(1.0, 0.5)), 8)(x, y)
    expected = 0.85 * out.clean_loss + 0.15 * out.robust_loss + 0.5 * 0.7 * (out.tightness + out.relu_balance)
    assert torch.allclose(out.loss, expected)


def test_evaluation_knows_no_kappa(x, y):
    out = objective("ibp", x, kappa=(1.0, 0.5)).eval()(x, y)
    assert torch.equal(out.loss, out.robust_loss)


@pytest.mark.parametrize("kappa", [-0.1, 1.1, math.nan, math.inf])
def test_bad_kappa_is_refused(kappa, x):
    with pytest.raises(ValueError, match=r"kappa must be a pair.*each from 0 to 1"):
        objective("ibp", x, kappa=(1.0, kappa))


@pytest.mark.parametrize("loss", ["ibp", losses.IBP])
def test_what_is_no_loss_is_refused(loss, x):
    with pytest.raises(TypeError, match=r"expected a loss such as losses\.IBP\(\)"):
        fw.ShortWarmup(fw.BoundedModule(networks.convolutional(), x), fw.ConstantEpsilon(0.1), loss=loss)
