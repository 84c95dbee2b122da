"""Compiled steps compute what the engine does, or tell why they cannot."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.recipe.compiled import CompilationWarning, CompiledSteps
from tests import networks

EPS = 0.1
STARTING, RAMPING, FULL = 2, 7, 12  # Steps of the three phases, under the schedule below.


def schedule():
    return fw.LinearEpsilon(EPS, start=2, length=1, steps_per_epoch=5)


def pair(model, x, *, backend="eager", batch_size=None, step=RAMPING, **arguments):
    """An eager and a compiled objective on copies of one network. The backend "eager" only replays the recording."""
    arguments = {"schedule": schedule(), **arguments}
    eager = fw.ShortWarmup(fw.BoundedModule(copy.deepcopy(model), x), **arguments)
    compiled = fw.ShortWarmup(fw.BoundedModule(model, x), compile=True, **arguments)
    compiled._compiled = CompiledSteps(compiled.bounded, compiled.input_range, batch_size, backend)
    eager.steps_done = compiled.steps_done = step
    return eager, compiled


def gradients(objective, loss):
    objective.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in objective.model.named_parameters()}


def assert_same_step(eager, compiled, x, y, tolerance=1e-4):
    one, other = eager(x, y), compiled(x, y)
    for name in ("loss", "clean_loss", "robust_loss", "tightness", "eps", "clean_error", "verified_error"):
        expected, found = getattr(one, name).detach(), getattr(other, name).detach()
        assert torch.allclose(found, expected, rtol=tolerance, atol=1e-7, equal_nan=True), name
    assert other.terms.keys() == one.terms.keys()
    expected, found = gradients(eager, one.loss), gradients(compiled, other.loss)
    norms = [grad.norm() for grad in expected.values() if grad is not None]
    largest = torch.stack(norms).norm()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            # Rounding is all there is of some: the bias of a convolution before BatchNorm has no gradient.
            assert (found[name] - grad).norm() <= tolerance * grad.norm() + 1e-5 * largest, name
    for (name, expected_buffer), (_, buffer) in zip(
        eager.model.named_buffers(), compiled.model.named_buffers(), strict=True
    ):
        assert torch.allclose(buffer, expected_buffer, rtol=1e-5), name


def assert_compiled(compiled, count=1):
    assert len(compiled._compiled._steps) == count


def test_fifty_states_of_a_run():
    model = networks.SmallResNet(batchnorm=True)
    data = torch.Generator().manual_seed(0)
    x, y = torch.rand(50, 8, 1, 8, 8, generator=data), torch.randint(3, (50, 8), generator=data)
    ramp = fw.LinearEpsilon(EPS, start=2, length=3, steps_per_epoch=10)
    eager, compiled = pair(model, x[0], backend="inductor", schedule=ramp, step=0)
    optimizer = torch.optim.Adam(eager.parameters(), 1e-3)
    for step in range(50):
        compiled.load_state_dict(eager.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error", CompilationWarning)
            assert_same_step(eager, compiled, x[step], y[step])
        optimizer.step()
        eager.step()
    assert_compiled(compiled)


def own_regularizer(bounded):
    return fw.regularizers.volume(bounded)


STEPS = {"before the ramp": STARTING, "in the ramp": RAMPING, "at full ε": FULL}
SHARED = {
    "the recipe": ({}, 1),
    "with the clean loss": ({"kappa": (1.0, 0.5)}, 1),
    "no regularisers": ({"regularizers": ()}, 2),  # Steps before the ramp cost a third of the others.
    "an attack": ({"loss": fw.losses.MTLIBP()}, 2),  # They do not attack either.
    "a loss that changes": ({"loss": fw.losses.CrownIBP()}, 3),
    "a regulariser of one's own": ({"regularizers": (own_regularizer,)}, 3),  # Whose cost is unknown.
}


@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("name", SHARED)
def test_phases_share_a_recording(name, first, x, y):
    options, recordings = SHARED[name]
    eager, compiled = pair(networks.convolutional(), x, **options)
    eager.generator, compiled.generator = torch.Generator(), torch.Generator()
    for phase in (first, *STEPS):
        eager.steps_done = compiled.steps_done = STEPS[phase]
        compiled.load_state_dict(eager.state_dict())
        assert_same_step(eager, compiled, x, y)
        assert phase in compiled.phases_recorded_with(phase)
    assert_compiled(compiled, recordings)
    assert len(set(map(compiled.phases_recorded_with, STEPS))) == recordings


def test_terms_that_a_phase_lacks_may_be_infinite(x, y):
    schedule = fw.ConstantEpsilon(EPS)
    eager, compiled = pair(networks.convolutional(batchnorm=False), x, schedule=schedule, step=FULL)
    assert_same_step(eager, compiled, x, y)
    for objective in (eager, compiled):
        with torch.no_grad():  # The variances of the second layer overflow, and its outputs do not.
            objective.model[2].weight.mul_(1e22)
            objective.model[5].weight.mul_(1e-20)
    one, other = eager(x, y), compiled(x, y)
    assert one.loss.isfinite()
    assert torch.allclose(one.loss, other.loss)


def test_the_precision_of_radii_belongs_to_a_recording(x, y):
    eager, compiled = pair(networks.convolutional(), x)
    for dtype in (None, torch.bfloat16):
        eager.bounded.radius_dtype = compiled.bounded.radius_dtype = dtype
        compiled.load_state_dict(eager.state_dict())
        assert_same_step(eager, compiled, x, y, tolerance=1e-3)
    assert_compiled(compiled, 2)


def test_a_view_in_training_under_an_objective_in_evaluation(x, y):
    eager, compiled = pair(networks.convolutional(batchnorm=False), x, kappa=(1.0, 0.5))
    for objective in (eager, compiled):
        objective.eval()
        objective.model.train()
    assert torch.allclose(eager(x, y).loss, compiled(x, y).loss)


class TiedWeights(nn.Module):
    """A linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.again = self.shared
        self.out = nn.Linear(64, 3)

    def forward(self, x):
        return self.out(self.again(self.shared(x.flatten(1)).relu()).relu())


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


def parametrised():
    layer = parametrize.register_parametrization(nn.Linear(64, 16), "weight", Doubled())
    return nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


NETWORKS = {
    "convolutional": networks.convolutional,
    "residual": lambda: networks.SmallResNet(batchnorm=True),
    "reshaped": networks.SharedActivation,
    "tied": TiedWeights,
    "parametrised": parametrised,
    "normalised": lambda: nn.Sequential(fw.models.Normalize((0.5,), (0.2,)), *networks.convolutional()),
    "cnn7": lambda: fw.models.cnn7((1, 8, 8), 3, 2, 8),
    "wide-resnet8": lambda: fw.models.wide_resnet8((1, 8, 8), 3, 2, 8),
    "resnext": lambda: fw.models.resnext((1, 8, 8), 3, 2, 8),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("step", [STARTING, RAMPING, FULL])
def test_any_network(name, step, x, y, monkeypatch):
    if step != RAMPING:  # The ramp's recording holds what the others do, and is the one that Dynamo traces, too.
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    eager, compiled = pair(NETWORKS[name](), x, step=step)
    assert_same_step(eager, compiled, x, y)
    assert_same_step(eager, compiled, x.flip(0), y.flip(0))
    assert_compiled(compiled)


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": fw.losses.CrownIBP()},
        {"loss": fw.losses.CrownIBP(fused=True)},
        {"kappa": (1.0, 0.5)},
        {"regularizers": ()},
        {"penalties": {"weight_l1": 1e-3, "relu_stability": 1e-2}},
        {"input_range": None},
        {"schedule": fw.LinearEpsilon(torch.full((1, 8, 8), EPS), start=2, length=1, steps_per_epoch=5)},
    ],
    ids=str,
)
def test_any_objective(arguments, x, y):
    eager, compiled = pair(networks.convolutional(), x, **arguments)
    assert_same_step(eager, compiled, x, y)
    for objective in (eager, compiled):
        objective.step()
    assert_same_step(eager, compiled, x.flip(0), y.flip(0))
    assert_compiled(compiled)


def test_new_values_of_parameters_and_buffers_are_seen(x, y):
    eager, compiled = pair(networks.convolutional(), x)
    assert_same_step(eager, compiled, x, y)
    state = {name: value + 0.1 if value.is_floating_point() else value for name, value in eager.state_dict().items()}
    for objective in (eager, compiled):
        objective.load_state_dict(state)
        for parameter in objective.parameters():
            parameter.data = parameter.data.clone() * 0.9
    assert_same_step(eager, compiled, x, y)
    assert_compiled(compiled)


def test_frozen_parameters_and_modes_are_told_apart(x, y):
    eager, compiled = pair(networks.SmallResNet(batchnorm=True), x)
    assert_same_step(eager, compiled, x, y)
    for objective in (eager, compiled):
        objective.model.stem.weight.requires_grad_(False)
        objective.model.block1.bn1.eval()
    assert_same_step(eager, compiled, x, y)
    assert_compiled(compiled, 2)


def test_gradients_scale_and_add_up(x, y):
    eager, compiled = pair(networks.convolutional(), x)
    for objective in (eager, compiled):
        objective.zero_grad()
        (3 * objective(x, y).loss).backward()
        objective(x.flip(0), y).loss.backward()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * (1 + one.grad.norm())


def test_two_steps_may_come_before_their_backward_pass(x, y):
    eager, compiled = pair(networks.convolutional(), x)
    for objective in (eager, compiled):
        (objective(x, y).loss + objective(x.flip(0) * 0.5, y).loss).backward()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * (1 + one.grad.norm())


def test_evaluation_and_passes_without_gradient_stay_eager(x, y):
    eager, compiled = pair(networks.convolutional(), x)
    with torch.no_grad():
        assert torch.equal(eager(x, y).loss, compiled(x, y).loss)
    eager.eval()
    compiled.eval()
    assert torch.equal(eager(x, y).loss, compiled(x, y).loss)
    assert_compiled(compiled, 0)


def test_only_batches_of_the_size_asked_for(x, y):
    _, compiled = pair(networks.convolutional(), x, batch_size=8)
    compiled(x[:5], y[:5]).loss.backward()
    assert_compiled(compiled, 0)
    compiled(x, y).loss.backward()
    assert_compiled(compiled)


def test_inputs_with_gradient_stay_eager(x, y):
    eager, compiled = pair(networks.convolutional(), x)
    found = []
    for objective in (eager, compiled):
        point = x.clone().requires_grad_()
        found.append(torch.autograd.grad(objective(point, y).clean_loss, point)[0])
    assert torch.equal(*found)


def test_nothing_is_left_at_the_nodes(x, y):
    _, compiled = pair(networks.convolutional(), x)
    compiled(x, y)
    with pytest.raises(RuntimeError, match="holds no layer bounds"):
        fw.regularizers.tightness(compiled.bounded)


def reads_a_value(bounded):
    term = fw.regularizers.tightness(bounded)
    return term * 2 if float(term.detach()) > 1e9 else term


@pytest.mark.parametrize("why", ["value", "momentum", "compiler"])
def test_what_cannot_be_compiled_is_taken_eagerly_with_one_warning(why, x, y):
    model = networks.SmallResNet(batchnorm=True)
    if why == "momentum":
        model.block1.bn1.momentum = None  # The average over all batches: their number is read.
    arguments = {"regularizers": [reads_a_value]} if why == "value" else {}
    eager, compiled = pair(model, x, backend="no-such-compiler" if why == "compiler" else "eager", **arguments)
    with pytest.warns(CompilationWarning, match="run eagerly, as this one cannot be compiled: ") as caught:
        assert_same_step(eager, compiled, x, y)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for objective in (eager, compiled):
            objective.steps_done = FULL
        assert_same_step(eager, compiled, x, y)


@dataclasses.dataclass  # Without a hash.
class Hinge:
    margin: float = 1.0

    def __call__(self, step):
        return fw.losses.LossValue((self.margin - step.ibp_margins()).clamp(min=0).sum(1).mean())


def test_a_loss_without_a_hash_is_taken_eagerly(x, y):
    eager, compiled = pair(networks.SmallResNet(batchnorm=True), x, loss=Hinge())
    for objective in (eager, compiled):
        objective.steps_done = FULL
    with pytest.warns(CompilationWarning, match="unhashable"):
        assert_same_step(eager, compiled, x, y)
    assert hash(fw.attacks.PGD(decay=(0.1, [4, 7]))) == hash(fw.attacks.PGD(decay=(0.1, (4, 7))))


@pytest.mark.parametrize(("on_loss", "on_gradient"), [(1.01, 1.0), (1.0, 1.1)])
def test_a_compiler_that_miscalculates_is_found_out(on_loss, on_gradient, x, y, monkeypatch):
    def compiler(graph, **_):
        def compiled(*tensors):
            values, grads = graph(*tensors)
            return values * on_loss, [None if grad is None else grad * on_gradient for grad in grads]

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    eager, compiled = pair(networks.convolutional(), x)
    expected = f"differs from the engine's by {on_loss - 1:.1e} and its gradient by {on_gradient - 1:.1e}"
    with pytest.warns(CompilationWarning, match=re.escape(expected)):
        assert_same_step(eager, compiled, x, y)


def test_a_loss_that_is_not_finite_is_refused(x, y):
    _, compiled = pair(networks.convolutional(), x)
    with torch.no_grad():
        compiled.model[0].weight.mul_(float("inf"))
    with pytest.raises(FloatingPointError, match="loss is nan at step"):
        compiled(x, y)


def test_a_copy_compiles_anew(x, y):
    eager, compiled = pair(networks.convolutional(), x)
    assert_same_step(eager, compiled, x, y)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert_compiled(other, 0)
        other.load_state_dict(eager.state_dict())
        assert_same_step(eager, other, x, y)
        assert_compiled(other)


def test_under_autocast(x, y):
    eager, compiled = pair(networks.SmallResNet(batchnorm=True), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(eager, compiled, x, y, tolerance=1e-2)
    assert_same_step(eager, compiled, x, y)
    assert_compiled(compiled, 2)
