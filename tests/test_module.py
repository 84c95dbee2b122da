"""BoundedModule is a view of the model: one state, one mode, nothing changed by building it."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import auto_LiRPA
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.batchnorm import BoundBatchNormalization
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from tests import networks
from tests.reference import output_bounds


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
    # A plain engine traces this in training mode, in which 0.3 makes five nodes of one BatchNorm.
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    plain = copy.deepcopy(model)
    warnings.simplefilter("ignore")  # The plain engine's.
    bounded = auto_LiRPA.BoundedModule(model, x)
    nodes = [node for node in bounded._modules.values() if isinstance(node, BoundBatchNormalization)]
    assert len(nodes) == (5 if ENGINE_VERSION == "0.3" else 1)
    fw.share_batchnorm_state(bounded, model)
    bounded.train()  # Whatever bounded.training says: the nodes are in evaluation mode so far.
    for _ in range(2):
        bounded(x)
        plain(x)
    for key, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key


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


def bounds(bounded, x, eps=0.05, **arguments):
    return bounded.compute_bounds(x=(fw.input_box(x, eps, None),), method="IBP", **arguments)


def off(found, model, x, eps=0.05):
    """How far bounds are from the float64 reference, in training mode, relative to their size."""
    expected = output_bounds(model, x, eps, -math.inf, math.inf)
    scale = float(max(end.abs().max() for end in expected))
    pairs = zip(found, expected, strict=True)
    return max(float((end.detach().double() - right).abs().max()) for end, right in pairs) / scale


BEFORE_THE_BOUNDS = {
    "nothing": lambda model, bounded, x: None,
    "a forward pass": lambda model, bounded, x: bounded(x),
    "another batch": lambda model, bounded, x: bounded(torch.rand(8, 1, 8, 8) * 3),
    "evaluation": lambda model, bounded, x: (bounded.eval()(x), bounded.train()),
    "frozen statistics": lambda model, bounded, x: (model[1].eval(), bounded(x), model[1].train()),
    "other content": lambda model, bounded, x: (bounded(x), x.data.mul_(0.1)),
    "other weights": lambda model, bounded, x: (bounded(x), model[0].weight.data.mul_(-3)),
    "a fused optimiser": lambda model, bounded, x: fused_step(model, bounded, x),
    "no gradient": lambda model, bounded, x: torch.no_grad()(bounded)(x),
}


def fused_step(model, bounded, x):
    bounded(x).square().sum().backward()
    torch.optim.Adam(model.parameters(), lr=0.5, fused=True).step()


@pytest.mark.parametrize("before", BEFORE_THE_BOUNDS)
def test_training_bounds_use_the_statistics_of_their_own_batch(before, x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    BEFORE_THE_BOUNDS[before](model, bounded, x)
    assert off(bounds(bounded, x), model, x) < 1e-4


def test_a_reused_buffer_is_read_anew(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    buffer = torch.rand(8, 1, 8, 8)
    box = fw.input_box(buffer, 0.05, None)
    bounded(box)
    buffer.copy_(x * 0.1)
    assert off(bounds(bounded, buffer), model, buffer) < 1e-4


def test_bounds_leave_the_running_statistics(x):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    before = state(model)
    bounds(bounded, x)
    assert same(state(model), before)
    bounded(x)
    bounds(bounded, x)
    assert int(model[1].num_batches_tracked) == 1


def test_statistics_carry_gradient_and_can_be_reused(x):
    model = networks.convolutional().double()
    x = x.double()
    bounded = fw.BoundedModule(model, x)
    weight = model[0].weight

    def value(**arguments):
        return bounds(bounded, x, **arguments)[0].sum()

    (own,) = torch.autograd.grad(value(), weight)
    bounded(x)
    (reused,) = torch.autograd.grad(value(reuse_statistics=True), weight)
    assert torch.allclose(own, reused)
    direction, step, ends = torch.randn_like(weight), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            ends.append(float(value()))
            weight.sub_(sign * step * direction)
    assert float((own * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)
    # Two passes over one batch, each with a backward pass of its own.
    for _ in range(2):
        bounds(bounded, x)[0].sum().backward()


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
    for other in (nn.Linear(2, 2), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="does not hold the parameter"):
            fw.share_batchnorm_state(bounded, other)


def test_wrapping_a_bounded_module_is_refused(x):
    with pytest.raises(TypeError, match="share_batchnorm_state"):
        fw.BoundedModule(fw.BoundedModule(networks.convolutional(), x), x)


def test_unsupported_operator_is_named(x, capfd):
    class Arcsine(nn.Module):
        def forward(self, x):
            return torch.asin(x.flatten(1))

    with pytest.raises(NotImplementedError, match=r"no bounds for the operator\(s\) Asin in module '0' \(Arcsine\)"):
        fw.BoundedModule(nn.Sequential(Arcsine(), nn.Linear(64, 3)), x)
    assert capfd.readouterr() == ("", "")


def test_paths_that_a_trace_cannot_follow_warn(x):
    with pytest.warns(fw.TracedPathWarning, match=r"reads the value of a tensor at .*networks\.py:\d+"):
        fw.BoundedModule(networks.DataDependent(threshold=1e6), x)
    with (
        pytest.warns(fw.TracedPathWarning),
        pytest.raises(NotImplementedError, match="another function than the model"),  # On larger random inputs.
    ):
        fw.BoundedModule(networks.DataDependent(), x)

    class TrainsOtherwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Linear(64, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            x = self.bn(self.fc(x.flatten(1)))
            return F.dropout(x, 0.5, training=self.training)

    with pytest.warns(fw.TracedPathWarning, match="something else in training mode"):
        fw.BoundedModule(TrainsOtherwise(), x)


def test_dropout_is_off_in_everything_that_is_bounded(x):
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    bounded = fw.BoundedModule(model, x)
    assert torch.allclose(bounded.eval()(x), model(x), atol=1e-6)
    bounds(bounded, x)
    bounded.train()
    assert model[4].training
    without = copy.deepcopy(model)
    without[4].eval()
    assert torch.allclose(bounded(x), without(x), atol=1e-6)
    lower, upper = bounds(bounded, x)
    assert bool((lower <= bounded(x)).all() and (bounded(x) <= upper).all())
    with pytest.warns(UserWarning, match=r"Dropout \(4\) is off in certified training"):
        warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.01), regularizers=())
    assert warmup(x, torch.zeros(len(x), dtype=torch.int64)).loss.isfinite()


def test_batchnorm_without_statistics_is_refused(x):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(72, 3)
    )
    with pytest.raises(NotImplementedError, match=r"'1' normalises every batch by itself"):
        fw.BoundedModule(model, x)


def test_outputs_that_are_no_tensor_are_refused(x):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="returns a tuple"):
        fw.BoundedModule(Pair(), x)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding, x):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=padding, dilation=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(x)
    assert torch.allclose(fw.BoundedModule(model, x)(x), model(x), atol=1e-6)
    warnings.simplefilter("ignore")  # Torch's own remark on even kernels.
    even = nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.Flatten())
    with pytest.raises(NotImplementedError, match="padded differently at its two ends"):
        fw.BoundedModule(even, x)


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP"])
def test_the_input_concatenated_with_features(method, x):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(3 * 64, 3)

        def forward(self, x):
            return self.fc(torch.cat([x, torch.relu(self.conv(x))], 1).flatten(1))

    model = Dense()
    lower, upper = fw.BoundedModule(model, x).compute_bounds(x=(fw.input_box(x, 0.1),), method=method)
    for _ in range(20):
        out = model((x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1))
        assert bool(((lower - 1e-5 <= out) & (out <= upper + 1e-5)).all())


def test_a_plain_module_is_told_to_be_wrapped(x):
    with pytest.raises(TypeError, match=r"wrap the network first, bounded = lirpa_fastwarmup\.BoundedModule"):
        fw.ibp_init_(networks.convolutional())


class Reads(nn.Module):
    """A linear layer, and code around it that looks at tensors."""

    def __init__(self, read):
        super().__init__()
        self.fc, self.read, self.mask = nn.Linear(64, 3), read, None
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        self.read(self, x)
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    "read",
    [
        lambda s, x: torch.equal(x, x),
        lambda s, x: len(x[x > 0.5]),
        lambda s, x: len(torch.where(x > 0.5)[0]),
        lambda s, x: 0.123 in x,
        lambda s, x: np.asarray(x.detach().mean()),
        lambda s, x: F.batch_norm(x, torch.zeros(1), torch.ones(1), training=False),
        lambda s, x: F.batch_norm(x, torch.zeros(1), torch.ones(1), training=True),
    ],
)
def test_whatever_a_trace_would_freeze_warns(read, x):
    with pytest.warns(fw.TracedPathWarning):
        fw.BoundedModule(Reads(read), x)


def build_mask(model, x):
    if model.mask is None:
        model.mask = torch.ones(8, 8)


@pytest.mark.parametrize(
    "read",
    [
        lambda s, x: float(s.scale),
        lambda s, x: build_mask(s, x),
        lambda s, x: x.shape[0] > 1,
        lambda s, x: F.batch_norm(x, torch.zeros(1), torch.ones(1), training=s.training),
    ],
)
def test_harmless_code_does_not_warn(read, x):
    fw.BoundedModule(Reads(read), x)
    fw.BoundedModule(Reads(read), x[:1])


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
def test_no_method_moves_the_running_statistics(method, x):
    class Both(networks.TwoInputs):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, image, vector):
            return super().forward(image, self.norm(vector))

    vector = torch.rand(8, 5)
    pairs = [
        (networks.multilayer(), (x,), (fw.input_box(x, 0.01),)),
        (Both(), (x, vector), (fw.input_box(x, 0.01), vector)),
    ]
    for model, inputs, box in pairs:
        bounded = fw.BoundedModule(model, inputs)
        bounded(*inputs)
        before = state(model)
        bounded.compute_bounds(x=box, method=method)
        assert same(state(model), before)


def test_optimised_bounds_in_evaluation(x):
    model = networks.convolutional().eval()
    # Without this option 0.3 fails wherever a neuron is stable over the whole batch.
    bounded = fw.BoundedModule(model, x, bound_opts={"sparse_features_alpha": False})
    before = state(model)
    crown, _ = bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="CROWN")
    optimised, _ = bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="alpha-CROWN")
    assert same(state(model), before)
    assert bool((optimised >= crown - 1e-4).all())
    assert bool((optimised <= model(x) + 1e-4).all())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("network", networks.ON_8X8)
@torch.no_grad()
def test_bounds_of_any_batch_size(network, training, x):
    # A network that reads its batch size, x.view(x.shape[0], -1), has that of the example in its trace.
    model = networks.ON_8X8[network]().train(training)
    bounded = fw.BoundedModule(model, x[:2])
    for count in (8, 3, 2):
        for method in ("IBP", "CROWN-IBP", "CROWN"):
            lower, upper = bounded.compute_bounds(x=(fw.input_box(x[:count], 1e-6),), method=method)
            assert lower.shape == (count, 3)
            if not training:
                assert torch.allclose(lower, model(x[:count]), atol=1e-3)
                assert torch.allclose(upper, model(x[:count]), atol=1e-3)


def test_building_under_autocast(x):
    model = networks.SmallResNet(batchnorm=True).eval()
    with torch.autocast("cpu", torch.bfloat16):
        bounded = fw.BoundedModule(model, x)
    assert torch.allclose(bounded(x), model(x))
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.01),), method="IBP")
    assert (lower <= model(x)).all()
    assert (model(x) <= upper).all()


def test_copies_share_no_options(x):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    bounded = fw.BoundedModule(net, x, bound_opts={"optimize_bound_args": {"iteration": 3}})
    other = copy.deepcopy(bounded)
    other.given_options["optimize_bound_args"]["iteration"] = 7
    bounded.given_options["conv_mode"] = "matrix"
    assert bounded.given_options == {"optimize_bound_args": {"iteration": 3}}
    with pytest.raises(AttributeError):
        bounded.untested = ()


@pytest.mark.parametrize("use", [fw.BoundedModule, fw.insert_batchnorm], ids=lambda use: use.__name__)
def test_a_compiled_module_is_refused_with_what_to_pass_instead(use):
    compiled = torch.compile(networks.convolutional(batchnorm=False), backend="eager")
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(NotImplementedError, match=r"the network is wrapped by torch\.compile.*compiled\._orig_mod"):
        use(compiled, x)
    use(compiled._orig_mod, x)
