"""BoundedModule is a view of the model: one state, one mode, nothing changed by building it."""

from __future__ import annotations

import copy
import pickle
import warnings

import auto_LiRPA
import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.sharing import BoundBatchNormalization
from tests import networks


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", networks.ON_8X8)
def test_building_changes_and_prints_nothing(name, training, x, capfd):
    model = networks.ON_8X8[name]().train(training)
    first = next(model.parameters()).requires_grad_(False)
    before, random_state = state(model), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounded = fw.BoundedModule(model, x)
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training is training
    assert bounded.training is training
    assert not first.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not first)
    assert capfd.readouterr() == ("", "")


def test_mode_of_single_modules_survives_building(x):
    model = networks.convolutional()
    model[1].eval()
    fw.BoundedModule(model, x)
    assert model.training
    assert not model[1].training


def test_is_an_engine_module(x):
    assert isinstance(fw.BoundedModule(networks.convolutional(), x), auto_LiRPA.BoundedModule)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("name", ["convolutional", "multilayer", "residual"])
def test_training_forward_moves_the_models_statistics_as_its_own_would(name, momentum, x):
    model = networks.ON_8X8[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = momentum
    plain = copy.deepcopy(model)
    bounded = fw.BoundedModule(model, x)
    for _ in range(3):
        batch = torch.rand(8, 1, 8, 8)
        assert torch.allclose(bounded(batch), plain(batch), atol=1e-6)
    for key, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key
    assert torch.allclose(bounded.eval()(x), plain.eval()(x), atol=1e-6)
    assert torch.allclose(bounded.eval()(x), model.eval()(x), atol=0)


def test_frozen_batchnorm_stays_frozen(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    model[1].eval()
    before = model[1].running_mean.clone()
    assert torch.allclose(bounded(x), model(x), atol=1e-6)
    assert torch.equal(model[1].running_mean, before)


def test_several_engine_nodes_of_one_batchnorm(x):
    # A Dropout makes the engine trace in training mode, in which 0.3 makes five nodes of one BatchNorm.
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)
    )
    plain = copy.deepcopy(model)
    before = state(model)
    bounded = fw.BoundedModule(model, x)
    assert same(state(model), before)
    assert any(type(node).__name__ == "BoundDropout" for node in bounded._modules.values())
    bounded(x)
    plain(x)
    for key, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key
    assert torch.allclose(bounded.eval()(x), model.eval()(x), atol=1e-6)


def test_loading_into_either_shows_in_the_other(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    source = networks.convolutional()
    source(torch.rand(32, 1, 8, 8))
    assert bounded.load_state_dict(source.state_dict()).missing_keys == []
    assert same(state(model), state(source))
    assert torch.allclose(bounded.eval()(x), source.eval()(x), atol=1e-6)
    other = networks.convolutional()
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.allclose(bounded(x), other.eval()(x), atol=1e-6)
    assert list(bounded.state_dict()) == list(model.state_dict())
    assert dict(bounded.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_moving_either_moves_both(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x).to(torch.float64)
    assert next(model.parameters()).dtype == torch.float64
    assert model[1].running_mean.dtype == torch.float64
    bounded(x.double())
    moved = model[1].running_mean.clone()
    bounded(x.double())
    assert not torch.equal(model[1].running_mean, moved)
    model.float()
    assert bounded.eval()(x).dtype == torch.float32
    assert torch.equal(bounded(x), model(x))


def test_mode_is_the_wrapped_models_always(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model.eval(), x)
    for mode, switch in ((True, bounded.train), (False, bounded.eval), (True, model.train), (False, model.eval)):
        switch()
        assert bounded.training is model.training is mode
        bounded(x)
        nodes = [node for node in bounded._modules.values() if isinstance(node, BoundBatchNormalization)]
        assert nodes
        assert all(node.training is mode for node in nodes)
    assert bounded.train() is bounded
    assert bounded.eval() is bounded


def test_requires_grad_is_the_users(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    model[0].weight.requires_grad_(False)
    bounded.train()(x)
    assert not model[0].weight.requires_grad
    bounded.eval()(x)
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    assert model[3].weight.requires_grad


def bounds(bounded, x, eps=0.05):
    return bounded.compute_bounds(x=(fw.input_box(x, eps),), method="IBP")


def test_training_bounds_use_the_statistics_of_their_own_batch(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    batch = torch.rand(8, 1, 8, 8) * 0.3
    bounded(batch)
    right = bounds(bounded, batch)
    bounded(x)  # Another batch comes between.
    late = bounds(bounded, batch)
    assert torch.allclose(right[0], late[0], atol=1e-5)
    assert torch.allclose(right[1], late[1], atol=1e-5)
    with torch.no_grad():  # The weights change.
        model[0].weight.mul_(-1)
    lower, upper = bounds(bounded, batch)
    clean = copy.deepcopy(model)(batch)
    assert bool(((lower <= clean) & (clean <= upper)).all())


def test_a_batch_changed_in_place_is_another_batch(x):
    bounded = fw.BoundedModule(networks.convolutional(), x)
    buffer = torch.rand(8, 1, 8, 8)
    bounded(buffer)
    buffer.copy_(x * 0.1)
    stale = bounds(bounded, buffer)
    fresh = bounds(fw.BoundedModule(bounded.wrapped, x), buffer)
    assert torch.allclose(stale[0], fresh[0], atol=1e-5)


def test_clean_pass_is_made_once_and_with_gradient(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    bounded(x)
    bounds(bounded, x)
    assert int(model[1].num_batches_tracked) == 1
    with torch.no_grad():
        bounded(x)
    lower, _ = bounds(bounded, x)
    (gradient,) = torch.autograd.grad(lower.sum(), model[0].weight)
    fresh, _ = bounds(fw.BoundedModule(copy.deepcopy(model), x), x)
    reference = copy.deepcopy(model)
    other = fw.BoundedModule(reference, x)
    (expected,) = torch.autograd.grad(bounds(other, x)[0].sum(), reference[0].weight)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(lower, fresh, atol=1e-6)


def test_evaluation_bounds_use_running_statistics(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x).eval()
    alone = bounds(bounded, x[:1])
    together = bounds(bounded, x)
    assert torch.allclose(alone[0], together[0][:1], atol=1e-5)
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(copier, x):
    bounded = fw.BoundedModule(networks.convolutional(), x)
    bounds(bounded, x)
    twin = copier(bounded)
    assert same(state(twin), state(bounded))
    with torch.no_grad():
        twin.wrapped[0].weight.zero_()
    assert bool(bounded.wrapped[0].weight.any())
    assert torch.allclose(twin.eval()(x), twin.wrapped.eval()(x))


def test_several_inputs(x):
    model, vector = networks.TwoInputs(), torch.rand(8, 5)
    bounded = fw.BoundedModule(model, (x, vector))
    assert torch.allclose(bounded(x, vector), model(x, vector), atol=1e-6)
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.1), fw.input_box(vector, 0.2)), method="IBP")
    for _ in range(50):
        a = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        b = (vector + 0.2 * (2 * torch.rand_like(vector) - 1)).clamp(0, 1)
        out = model(a, b)
        assert bool(((lower - 1e-5 <= out) & (out <= upper + 1e-5)).all())
    # Only one of the two perturbed.
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.1), vector), method="IBP")
    assert bool((lower <= model(x, vector)).all())


def test_sharing_for_a_plain_engine_module(x):
    model = networks.convolutional().eval()
    bounded = auto_LiRPA.BoundedModule(model, x)
    names = fw.share_batchnorm_state(bounded, model)
    assert {"1.running_mean", "1.running_var", "8.running_var"} <= set(names)
    bounded.train()
    plain = copy.deepcopy(model).train()
    bounded(x)
    plain(x)
    for key, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key
    with pytest.raises(ValueError, match="pass the nn"):
        fw.share_batchnorm_state(bounded, nn.Linear(2, 2))


def test_wrapping_a_bounded_module_is_refused(x):
    with pytest.raises(TypeError, match="share_batchnorm_state"):
        fw.BoundedModule(fw.BoundedModule(networks.convolutional(), x), x)


def test_unsupported_operator_is_named(x, capfd):
    class Erf(nn.Module):
        def forward(self, x):
            return torch.erf(x.flatten(1))

    with pytest.raises(NotImplementedError, match=r"no bounds for the operator\(s\) onnx::Erf.*It supports: .*Conv"):
        fw.BoundedModule(nn.Sequential(Erf(), nn.Linear(64, 3)), x)
    assert capfd.readouterr() == ("", "")


def test_data_dependent_control_flow_warns(x):
    with pytest.warns(fw.DataDependentControlFlowWarning, match=r"networks\.py:\d+"):
        fw.BoundedModule(networks.DataDependent(), x)
