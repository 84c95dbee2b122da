"""The checks of bounds that verification and training make by themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.bounds import MarginBounds, ibp_margin_bounds
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.soundness import contradicted, escapes
from lirpa_fastwarmup.verification import UnsoundBoundError, evaluate
from lirpa_fastwarmup.verification.certify import beyond_intervals
from tests import networks
from tests.networks import Function

EPS = 0.05


@pytest.fixture
def bounded(x):
    return fw.BoundedModule(networks.SmallResNet(batchnorm=True).eval(), x)


def plant(monkeypatch, layer, method, wrong):
    """Let ``method`` of a node class of the engine return what ``wrong`` makes of its result."""
    cls = getattr(engine.bound_general, layer)
    original = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *args, **kwargs: wrong(original(self, *args, **kwargs)))


@pytest.mark.parametrize("end", ["lower", "upper"])
def test_a_value_outside_the_bounds_of_a_node_is_found_and_the_place_named(bounded, x, y, end):
    margins, _ = ibp_margin_bounds(bounded, fw.input_box(x, EPS), y, 3)
    corners = x.sub(EPS).clamp(min=0), x.add(EPS).clamp(max=1)
    assert escapes(bounded, margins, y, *corners) == []
    margins, _ = ibp_margin_bounds(bounded, fw.input_box(x, EPS), y, 3)
    relus = [node for node in bounded._modules.values() if type(node).__name__ == "BoundRelu"]
    node = relus[1].inputs[0]
    width = node.upper - node.lower
    setattr(node, end, node.lower + 0.6 * width if end == "lower" else node.upper - 0.6 * width)
    found = escapes(bounded, margins, y, *corners)
    assert found
    assert all("outside its bounds" in text and "block1.conv1" in text for _, text in found)


def test_a_margin_below_its_bound_is_found_by_searching(bounded, x, y):
    margins, _ = ibp_margin_bounds(bounded, fw.input_box(x, EPS), y, 3)
    corners = x.sub(EPS).clamp(min=0), x.add(EPS).clamp(max=1)
    clean = bounded.wrapped(x)
    own = clean.gather(1, y.unsqueeze(1)) - clean
    others = torch.tensor([[j for j in range(3) if j != label] for label in y.tolist()])
    # Bounds that the clean points attain: only points that are searched for lie below.
    found = escapes(bounded, own.gather(1, others).detach() - 1e-4, y, *corners)
    assert any("margin below its lower bound" in text for _, text in found)
    assert margins.shape == (8, 2)


def test_a_loose_class_hides_no_contradiction():
    lower, attained = torch.tensor([[-1e6, 2.0]]), torch.tensor([[-10.0, -50.0]])
    assert contradicted(lower, attained).tolist() == [True]
    assert contradicted(torch.tensor([[-1e6, 2.0]]), torch.tensor([[-10.0, 1.9]])).tolist() == [False]  # Rounding.


@pytest.mark.parametrize("method", ["CROWN-IBP", "CROWN", "alpha-CROWN"])
def test_wrong_relaxations_are_caught_without_an_attack(bounded, x, y, monkeypatch, method):
    def half_the_bias(result):
        sources, lower, upper = result
        return sources, lower * 0.5, upper * 0.5

    fw.verify(bounded, (x, y), EPS, (method,), restarts=0)
    plant(monkeypatch, "BoundConv", "bound_backward", half_the_bias)
    with pytest.raises(UnsoundBoundError, match=rf"(by|than) {method}"):
        fw.verify(bounded, (x, y), EPS, (method,), restarts=0)


def test_narrow_intervals_are_caught_without_an_attack(bounded, x, y, monkeypatch):
    def narrowed(interval):
        lower, upper = interval
        return lower + 0.05 * (upper - lower), upper

    plant(monkeypatch, "BoundRelu", "interval_propagate", narrowed)
    with pytest.raises(UnsoundBoundError, match=r"outside its bounds|tighter IBP bounds"):
        fw.verify(bounded, (x, y), EPS, ("IBP",), restarts=0)


def test_ibp_is_held_against_interval_arithmetic(bounded, x, monkeypatch):
    assert beyond_intervals(bounded, x, EPS, (0.0, 1.0)) == []
    plant(monkeypatch, "BoundConv", "interval_propagate", lambda ends: (ends[0] + 1e-2, ends[1]))
    assert [place for place, _ in beyond_intervals(bounded, x, EPS, (0.0, 1.0))] == list(range(8))


def test_networks_beyond_the_interval_reference_are_verified_without_it(x, y, caplog):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Function(torch.sin), nn.Linear(8, 3)).eval()
    bounded = fw.BoundedModule(model, x, allow_untested=True)
    with caplog.at_level("INFO"):
        fw.verify(bounded, (x, y), 1e-3, ("IBP",), restarts=0)
    assert "IBP is not compared with interval arithmetic" in caplog.text


def test_training_errors_rest_on_checked_bounds(bounded, x, y, monkeypatch):
    evaluate(bounded, [(x, y)], EPS, restarts=0)
    plant(monkeypatch, "BoundRelu", "interval_propagate", lambda ends: (ends[0], 0.9 * ends[1]))
    bounded.train()
    before = copy.deepcopy(bounded.state_dict())
    with pytest.raises(UnsoundBoundError, match=r"by IBP|tighter IBP bounds"):
        evaluate(bounded, [(x, y)], EPS, restarts=0)
    with pytest.raises(UnsoundBoundError, match=r"by IBP|tighter IBP bounds"):
        evaluate(bounded, [(x, y)], EPS, pgd_steps=1, restarts=1)
    assert bounded.training
    assert all(torch.equal(value, before[name]) for name, value in bounded.state_dict().items())


def test_a_verdict_in_double_precision_needs_both(bounded, x, monkeypatch):
    y = bounded.wrapped(x).argmax(1)
    assert fw.verify(bounded, (x, y), 1e-4, ("IBP",), float64=True).verified_error.count == 0
    original = MarginBounds.lower

    def lower(self, box, labels, method):
        margins = original(self, box, labels, method)
        return margins - 1e3 if self.dtype == torch.float64 and float(box.ptb.x_U.sub(box.ptb.x_L).max()) else margins

    monkeypatch.setattr(MarginBounds, "lower", lower)
    found = fw.verify(bounded, (x, y), 1e-4, ("IBP",), float64=True)
    assert found.verified_error.count == 8
    assert all(sample.method is None and sample.float64 == "verified -> not verified" for sample in found.certificates)


@pytest.mark.parametrize("outputs", [1, (3, 4)])
def test_networks_without_margins_are_refused_by_name(x, y, outputs):
    head = nn.Linear(64, math.prod(outputs) if isinstance(outputs, tuple) else outputs)
    shape = Function(lambda x: x.view(x.shape[0], *outputs)) if isinstance(outputs, tuple) else nn.Identity()
    bounded = fw.BoundedModule(nn.Sequential(nn.Flatten(), head, shape).eval(), x)
    for ask in (
        lambda: fw.verify(bounded, (x, y), EPS),
        lambda: fw.verification.certified_radii(bounded, (x, y)),
        lambda: evaluate(bounded, [(x, y)], EPS),
        lambda: fw.ShortWarmup(bounded, fw.ConstantEpsilon(EPS), regularizers=()),
    ):
        with pytest.raises(ValueError, match="expected a classifier whose output is"):
            ask()


def test_certificates_say_that_they_rest_on_untested_bounds(x):
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), Function(lambda x: F.softplus(x).exp()), nn.Linear(8, 3)
    ).eval()
    y = model(x).argmax(1)
    found = fw.verify(fw.BoundedModule(model, x, allow_untested=True), (x, y), 1e-4, ("IBP",), restarts=0)
    assert found.untested == ("Exp in module '2' (Function)",)
    assert all(sample.untested for sample in found.certificates)
    assert [row["untested"] for row in found.rows("sha256:0")] == [1] * 8
    assert found.as_dict()["untested"] == ["Exp in module '2' (Function)"]
    assert "relies on untested bounds of Exp in module '2' (Function)" in str(found)
    tested = fw.verify(
        fw.BoundedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), x), (x, y), 1e-4, ("IBP",)
    )
    assert tested.untested == ()
    assert "untested" not in {**next(tested.rows()), **tested.as_dict()}
