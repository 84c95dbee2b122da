from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.boxes import labels_error, labels_fit
from lirpa_fastwarmup.recipe.objective import ValueChecks
from tests import networks
from tests.reference import Box, assert_gradients_equal_finite_differences, propagate

EPS = 0.1


def objective(model=None, x=None, schedule=None, **arguments):
    model = networks.convolutional() if model is None else model
    x = torch.rand(8, 1, 8, 8) if x is None else x
    schedule = schedule or fw.LinearEpsilon(EPS, start=2, length=2, steps_per_epoch=5)
    return fw.ShortWarmup(fw.BoundedModule(model, x), schedule, **arguments)


def at_step(warmup, step):
    warmup.steps_done = step
    return warmup


@torch.no_grad()
def reference_margins(model, x, y, eps):
    """Lower bounds on z_y − z_j, in float64: the last layer's rows are subtracted before bounding."""
    model, x = copy.deepcopy(model).double(), x.double()
    box = propagate(model[:-1], Box(x, (x - eps).clamp(min=0), (x + eps).clamp(max=1)))
    weight, bias = model[-1].weight, model[-1].bias
    rows, offsets = weight[y].unsqueeze(1) - weight, bias[y].unsqueeze(1) - bias
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    return (rows @ centre.unsqueeze(2)).squeeze(2) + offsets - (rows.abs() @ radius.unsqueeze(2)).squeeze(2)


def test_step_on_the_ramp_is_the_formula(x, y):
    model = networks.convolutional()
    reference = copy.deepcopy(model)
    warmup = at_step(objective(model, x, reg_weight=0.3), 8)  # fraction 3/10
    out = warmup(x, y)
    margins = reference_margins(reference, x, y, 0.3 * EPS)
    robust = F.cross_entropy(-margins, y)
    assert float(out.eps) == pytest.approx(0.3 * EPS)
    assert float(out.robust_loss.detach()) == pytest.approx(float(robust), rel=1e-4)
    assert float(out.clean_loss.detach()) == pytest.approx(float(F.cross_entropy(reference(x), y).detach()), rel=1e-4)
    assert float(out.verified_error) == pytest.approx(float(((margins <= 0).sum(1) > 1).double().mean()))
    assert float(out.clean_error) == pytest.approx(float((reference(x).argmax(1) != y).double().mean()))
    expected = out.robust_loss + 0.3 * 0.7 * (out.tightness + out.relu_balance)
    assert torch.allclose(out.loss, expected)
    assert out.terms.keys() == {"tightness", "relu_balance"}
    for name in ("loss", "robust_loss", "tightness", "eps", "clean_error", "verified_error"):
        assert getattr(out, name).ndim == 0


def test_before_the_ramp_the_clean_loss_takes_over_and_the_box_keeps_a_floor(x, y):
    warmup = objective(x=x, min_eps=1e-4)
    out = warmup(x, y)
    assert float(out.eps) == pytest.approx(1e-4)
    assert torch.allclose(out.loss, out.clean_loss + 0.5 * (out.tightness + out.relu_balance))
    assert math.isfinite(float(out.tightness.detach()))
    # And in the first steps of the ramp, while ε is smaller still.
    slow = objective(x=x, schedule=fw.SmoothedEpsilon(EPS, 1, 10, 100))
    assert float(at_step(slow, 2)(x, y).eps) == pytest.approx(1e-6)
    assert slow.schedule(2) < 1e-6


def test_without_regularisers_there_is_no_floor_and_no_pass_before_the_ramp(x, y):
    for arguments in ({"regularizers": ()}, {"reg_weight": 0.0}):
        out = objective(x=x, **arguments)(x, y)
        assert torch.equal(out.loss, out.clean_loss)
        assert float(out.eps) == 0.0
        assert out.robust_loss.isnan()
        assert out.verified_error.isnan()
        assert out.tightness.isnan()


def test_at_full_radius_the_regularisers_are_off(x, y):
    out = at_step(objective(x=x), 15)(x, y)
    assert torch.equal(out.loss, out.robust_loss)
    assert out.tightness.isnan()
    assert out.terms["relu_balance"].isnan()
    assert float(out.eps) == pytest.approx(EPS)


def test_evaluation_is_at_the_largest_radius(x, y):
    warmup = objective(x=x)
    warmup(x, y)
    before = copy.deepcopy(warmup.state_dict())
    out = warmup.eval()(x, y)
    assert float(out.eps) == pytest.approx(EPS)
    assert torch.equal(out.loss, out.robust_loss)
    after = warmup.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_mode_switches_all_three(x):
    warmup = objective(x=x)
    for mode in (False, True):
        assert warmup.train(mode) is warmup
        assert warmup.training is warmup.bounded.training is warmup.model.training is mode
    assert not objective(networks.convolutional().eval(), x).training
    frozen = networks.convolutional()
    frozen[1].eval()
    objective(frozen, x)
    assert frozen.training
    assert not frozen[1].training


def test_gradient_equals_finite_differences(x, y):
    model = networks.convolutional().double()
    x = x.double()
    warmup = at_step(objective(model, x), 8)
    parameters = [model[0].weight, model[4].bias, model[10].weight]
    assert_gradients_equal_finite_differences(lambda: warmup(x, y).loss, parameters)


def test_state_dict_is_the_step_and_the_models_own_keys(x, y):
    warmup = objective(x=x)
    for _ in range(3):
        warmup(x, y)
        warmup.step()
    saved = copy.deepcopy(warmup.state_dict())
    assert list(saved) == ["step", *warmup.model.state_dict()]
    assert int(saved["step"]) == 3
    other = objective(x=x)
    result = other.load_state_dict(saved)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert other.steps_done == 3
    assert torch.equal(other.eval()(x, y).loss, warmup.eval()(x, y).loss)
    # The plain model takes its part of it, and a module around the objective nests it.
    plain = networks.convolutional()
    plain.load_state_dict({name: value for name, value in saved.items() if name != "step"})
    around = nn.ModuleDict({"objective": objective(x=x)})
    around.load_state_dict({f"objective.{name}": value for name, value in saved.items()})
    assert around["objective"].steps_done == 3
    assert list(around.state_dict()) == [f"objective.{name}" for name in saved]
    with pytest.raises(RuntimeError, match="step"):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**saved, "step": torch.tensor(99), "0.bias": torch.zeros(9)})
    assert other.steps_done == 3


class Versioned(nn.Linear):
    """Whose weights were stored halved in version 1."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_states_keep_the_versions_of_modules(x):
    bounded = fw.BoundedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), Versioned(8, 3)), x)
    warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.1))
    before = warmup.model[3].weight.clone()
    file = io.BytesIO()
    torch.save(warmup.state_dict(), file)
    file.seek(0)
    warmup.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(warmup.model[3].weight, before)


def test_a_loss_may_have_an_attack_that_draws_no_starts(x, y):
    class Own:
        def attack(self, step):
            return step.x

        def __call__(self, step):
            return fw.losses.LossValue(step.ibp_margins().neg().exp().sum(1).mean())

    bounded = fw.BoundedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)), x)
    assert fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.1), loss=Own())(x, y).loss.isfinite()


def test_moves_and_copies_as_one(x, y):
    warmup = objective(x=x).double()
    assert warmup(x.double(), y).loss.dtype == torch.float64
    twin = copy.deepcopy(warmup)
    with torch.no_grad():
        twin.model[0].weight.zero_()
    assert bool(warmup.model[0].weight.any())
    assert twin.bounded.wrapped is twin.model


def test_a_regulariser_of_ones_own(x, y):
    def widest(bounded):
        return torch.stack([(layer.upper - layer.lower).max() for layer in fw.relu_bounds(bounded)]).max()

    out = objective(x=x, regularizers=("tightness", widest))(x, y)
    assert out.terms.keys() == {"tightness", "widest"}
    assert torch.allclose(out.loss, out.clean_loss + 0.5 * (out.tightness + out.terms["widest"]))
    assert out.relu_balance.isnan()


def test_radius_per_channel_and_range_as_tensors(y):
    x = torch.rand(8, 2, 8, 8)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))
    eps = torch.tensor([0.0, 0.2])
    warmup = objective(model, x, fw.ConstantEpsilon(eps), input_range=(torch.zeros(2), torch.ones(2)), regularizers=())
    out = warmup(x, y)
    assert float(out.eps) == pytest.approx(0.2)
    assert float(out.robust_loss.detach()) == pytest.approx(
        float(F.cross_entropy(-reference_margins(model, x, y, eps.double().view(2, 1, 1)), y)), rel=1e-4
    )


def test_unclipped_data(y):
    x = 5 * torch.randn(8, 1, 8, 8)
    out = objective(x=x, schedule=fw.ConstantEpsilon(0.1), input_range=None)(x, y)
    assert bool(out.robust_loss.isfinite())


def test_training_with_it_lowers_the_verified_error(x, y):
    torch.manual_seed(0)
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    fw.ibp_init_(bounded)
    warmup = fw.ShortWarmup(bounded, fw.SmoothedEpsilon(0.02, start=1, length=40, steps_per_epoch=1))
    optimizer = torch.optim.Adam(warmup.parameters(), 1e-2)
    before = float(warmup.eval()(x, y).verified_error)
    warmup.train()
    for _ in range(80):
        warmup(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
    assert before > 0.5
    assert float(warmup.eval()(x, y).verified_error) == 0.0


BAD_BATCHES = {
    "labels too high": (lambda x, y: (x, y + 1), ValueError, r"between 0 and 2.*found 1 to 3"),
    "labels negative": (lambda x, y: (x, y - 1), ValueError, r"found -1 to 1"),
    "labels float": (lambda x, y: (x, y.float()), TypeError, r"int64, found torch\.float32.*y\.long\(\)"),
    "labels one-hot": (lambda x, y: (x, F.one_hot(y)), ValueError, r"labels \(batch,\)"),
    "labels too few": (lambda x, y: (x, y[:-1]), ValueError, r"of one length"),
    "empty": (lambda x, y: (x[:0], y[:0]), ValueError, r"length ≥ 1"),
    "above the range": (lambda x, y: (x * 3, y), ValueError, r"input_range.*found values from .*models\.Normalize"),
    "below the range": (lambda x, y: (x - 0.5, y), ValueError, r"found values from -0\.\d+"),
    "NaN": (lambda x, y: (x.log().log(), y), ValueError, r"found values from nan"),
    "other size": (
        lambda x, y: (x[..., :7], y),
        ValueError,
        r"wrapped for inputs of shape \(1, 8, 8\), batch aside; found \(1, 8, 7\)",
    ),
    "one sample": (lambda x, y: (x[:1], y[:1]), ValueError, r"one sample cannot train BatchNorm"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_told_and_lose_nothing(case, x, y):
    change, kind, message = BAD_BATCHES[case]
    warmup = at_step(objective(x=x), 7)
    before = copy.deepcopy(warmup.state_dict())
    with pytest.raises(kind, match=message):
        warmup(*change(x, y))
    after = warmup.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert bool(warmup(x, y).loss.isfinite())


def test_one_sample_is_fine_in_evaluation(x, y):
    assert bool(objective(x=x).eval()(x[:1], y[:1]).loss.isfinite())


def test_nan_loss_names_step_and_radius(x, y):
    warmup = at_step(objective(x=x), 9)
    with torch.no_grad():
        warmup.model[0].weight.fill_(torch.nan)
    with pytest.raises(fw.NonFiniteLossError, match=r"loss is nan at step 9, eps 0\.04"):
        warmup(x, y)


BAD_ARGUMENTS = [
    ({"reg_weight": -1.0}, ValueError, "reg_weight ≥ 0"),
    ({"tol": 0.0}, ValueError, "tol > 0"),
    ({"regularizers": ("tight",)}, ValueError, "unknown regulariser 'tight'; known are tightness, relu_balance"),
    ({"regularizers": ("tightness", "tightness")}, ValueError, "two regularisers are called 'tightness'"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, kind, message, x):
    with pytest.raises(kind, match=message):
        objective(x=x, **arguments)


def test_networks_that_the_objective_cannot_take(x):
    with pytest.raises(TypeError, match=r"fastwarmup\.BoundedModule\(model, example_inputs\)"):
        fw.ShortWarmup(networks.multilayer(False), fw.ConstantEpsilon(0.1))
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LeakyReLU(), nn.Linear(4, 3))
    with pytest.raises(fw.StructureError, match=r"no ReLU.*relu_balance.*regularizers=\('tightness',\)"):
        objective(smooth, x)
    assert objective(smooth, x, regularizers=("tightness",))(x, torch.zeros(len(x)).long()).tightness.isfinite()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(fw.StructureError, match=r"no activation.*tightness.*regularizers=\(\)"):
        objective(linear, x)
    objective(smooth, x, regularizers=())
    objective(smooth, x, reg_weight=0.0)
    objective(smooth, x, regularizers=(lambda bounded: torch.zeros(()),))
    with pytest.raises(TypeError, match=r"expected a schedule such as .* found 0\.1$"):
        objective(x=x, schedule=0.1)
    with pytest.raises(ValueError, match=r"output is \(batch, classes ≥ 2\), found \(8, 1\)"):
        objective(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), x, regularizers=())

    class Stepper(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x.flatten(1)[:, :3] + self.step

    with pytest.raises(ValueError, match="an entry called 'step'"):
        objective(Stepper(), x, regularizers=())


def test_off_the_cpu_checks_wait_to_be_asked_and_tell_the_batch_that_failed_first():
    checks = ValueChecks()
    for labels in ([0, 1, 2], [0, 7, 1], [2, 2, 2], [9, 9, 9]):
        y = torch.tensor(labels)
        checks.defer("labels", labels_fit(y, 3), [y], partial(labels_error, classes=3))
    with pytest.raises(ValueError, match="found 0 to 7"):
        checks.raise_pending()
    checks.raise_pending()


def test_a_loss_that_is_not_finite_off_the_cpu_is_told_with_its_own_step(x, y, monkeypatch):
    monkeypatch.setattr(ValueChecks, "require", ValueChecks.defer)
    warmup = objective(networks.convolutional(), x)
    for step in range(4):
        if step == 1:
            saved = copy.deepcopy(warmup.model.state_dict())
            with torch.no_grad():
                next(warmup.model.parameters()).fill_(torch.inf)
        if step == 2:
            warmup.load_state_dict({**saved, "step": torch.tensor(warmup.steps_done)})
        warmup(x, y)
        warmup.step()
    with pytest.raises(fw.NonFiniteLossError, match="at step 1,"):
        warmup.raise_pending_errors()


def test_autocast_reaches_the_clean_pass_alone(x, y):
    model = networks.SmallResNet(batchnorm=True)
    exact, coarse = (at_step(objective(copy.deepcopy(model), x), 8) for _ in range(2))
    expected = exact(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = coarse(x, y)
    assert found.loss.dtype == torch.float32
    assert all(layer.lower.dtype == torch.float32 for layer in fw.relu_bounds(coarse.bounded))
    assert not torch.equal(found.clean_loss, expected.clean_loss)
    for name in ("clean_loss", "robust_loss", "tightness"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=0.05), name
    found.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in coarse.parameters())
