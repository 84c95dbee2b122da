"""Margins of many classes: bounded one sample after the other, with the values and gradients of the whole array."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine import margins
from lirpa_fastwarmup.engine.bounds import ibp_margin_bounds
from lirpa_fastwarmup.recipe.compiled import CompiledSteps
from tests.reference import assert_gradients_equal_finite_differences

CLASSES, EPS = 7, 0.05


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    # Labels occur twice, or not at all.
    return torch.rand(5, 1, 6, 6, generator=generator, dtype=dtype), torch.tensor([3, 0, 3, 6, 1])


def bounds(model, x, y):
    bounded = fw.BoundedModule(model, x)
    bounded(x)
    return ibp_margin_bounds(bounded, fw.input_box(x, EPS), y, CLASSES, reuse_statistics=True)


@pytest.fixture
def one_by_one(monkeypatch):
    calls = []
    original = margins._centres_and_radii
    monkeypatch.setattr(margins, "_MANY", 0)
    monkeypatch.setattr(margins, "_centres_and_radii", lambda *given: calls.append(1) or original(*given))
    return calls


def by_hand(model, x, y):
    """Equation by equation, in a loop over samples and classes."""
    lower, upper = (x - EPS).clamp(0, 1).flatten(1), (x + EPS).clamp(0, 1).flatten(1)
    first, last = model[1], model[3]
    centre, radius = (
        F.linear((lower + upper) / 2, first.weight, first.bias),
        (upper - lower) / 2 @ first.weight.abs().t(),
    )
    low, high = (centre - radius).relu(), (centre + radius).relu()
    rows = []
    for sample, label in enumerate(y.tolist()):
        others = [j for j in range(CLASSES) if j != label]
        weight = last.weight[label] - last.weight[others]
        middle = weight @ (low[sample] + high[sample]) / 2 + last.bias[label] - last.bias[others]
        spread = weight.abs() @ (high[sample] - low[sample]) / 2
        rows.append(torch.stack([middle - spread, middle + spread]))
    return torch.stack(rows, 1)


def test_bounds_are_those_of_the_definition(one_by_one):
    model, (x, y) = network(), batch()
    found = bounds(model, x, y)
    assert one_by_one
    for one, expected in zip(found, by_hand(model, x, y), strict=True):
        assert torch.allclose(one, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_finite_differences(one_by_one):
    model, (x, y) = network(), batch()
    weights = torch.randn(2, 5, CLASSES - 1, dtype=torch.float64)

    def loss():
        lower, upper = bounds(model, x, y)
        return (torch.stack([lower, upper]) * weights).sum()

    assert_gradients_equal_finite_differences(loss, list(model.parameters()))
    assert one_by_one


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_recorded_steps_equal_eager_ones(one_by_one, backend):
    model, (x, y) = network(torch.float32), batch(torch.float32)
    schedule = fw.ConstantEpsilon(EPS)
    eager = fw.ShortWarmup(fw.BoundedModule(copy.deepcopy(model), x), schedule)
    compiled = fw.ShortWarmup(fw.BoundedModule(model, x), schedule, compile=True)
    compiled._compiled = CompiledSteps(compiled.bounded, compiled.input_range, None, backend)
    for start in (x, x.flip(0)):
        one, other = eager(start, y), compiled(start, y)
        assert torch.allclose(one.loss, other.loss, rtol=1e-5)
        one.loss.backward()
        other.loss.backward()
    assert len(compiled._compiled._steps) == 1
    for first, second in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(first.grad, second.grad, rtol=1e-4, atol=1e-6)


LAST = {"linear": nn.Linear(36, CLASSES), "no bias": nn.Linear(36, CLASSES, bias=False)}


@pytest.mark.parametrize("last", [*LAST, "relu"])
def test_bounds_hold_for_other_last_layers(one_by_one, last):
    x, y = batch()
    layers = (LAST["linear"], nn.ReLU()) if last == "relu" else (LAST[last],)
    model = nn.Sequential(nn.Flatten(), *layers).double()
    lower, upper = bounds(model, x, y)
    assert bool(one_by_one) is (last != "relu")
    own, others = model(x).gather(1, y[:, None]), model(x)
    attained = (own - others)[F.one_hot(y, CLASSES) == 0].view(5, -1)
    assert bool(((lower <= attained) & (attained <= upper)).all())


def test_verdicts_do_not_depend_on_it(one_by_one):
    model, (x, _) = network(torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    found = fw.verify(fw.BoundedModule(model, x).eval(), (x, y), 0.004)
    assert one_by_one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(margins, "_MANY", 2**40)
        expected = fw.verify(fw.BoundedModule(model, x).eval(), (x, y), 0.004)
    for one, other in zip(found.certificates, expected.certificates, strict=True):
        assert (one.verified, one.method, one.falsified) == (other.verified, other.method, other.falsified)
        assert one.margin == pytest.approx(other.margin, rel=1e-5)
