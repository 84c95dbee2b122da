"""The engine's own BoundedModule, where one of this package is expected."""

import copy
import subprocess
import sys

import auto_LiRPA
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw

EPS = 0.05


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(36, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)),
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(10, 1, 8, 8, generator=generator)
    return x, torch.randint(3, (10,), generator=generator)


def plain_of(model, x, **options):
    return auto_LiRPA.BoundedModule(model, x[:2], **options)


def eps_ball(x):
    ends = {"x_L": (x - EPS).clamp(0, 1), "x_U": (x + EPS).clamp(0, 1)}
    return auto_LiRPA.BoundedTensor(x, auto_LiRPA.PerturbationLpNorm(norm=float("inf"), eps=EPS, **ends))


def train_with_the_engine(plain, x, y, steps=3):
    """A loop as in the engine's examples, which never looks at the nn.Module again."""
    plain.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(steps):
        box = eps_ball(x)
        plain(box)
        _, upper = plain.compute_bounds(x=(box,), method="IBP")
        optimizer.zero_grad()
        F.cross_entropy(upper, y).backward()
        optimizer.step()
    plain.eval()


def test_the_objective_on_a_plain_module_is_the_one_on_ours(batch):
    x, y = batch
    model, twin = network(), network()
    schedule = fw.SmoothedEpsilon(EPS, start=1, length=1, steps_per_epoch=4)
    plain, ours = plain_of(model, x), fw.BoundedModule(twin, x[:2])
    with torch.no_grad():  # Building the engine's own moves the running statistics; the view undoes that.
        warmups = [fw.ShortWarmup(bounded, schedule).train() for bounded in (plain, ours)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (model, twin)]
    for _ in range(5):
        losses = []
        for warmup, optimizer in zip(warmups, optimizers, strict=True):
            step = warmup(x, y)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            warmup.step()
            losses.append(step.loss.detach())
        assert torch.equal(*losses)
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_the_engine_sees_what_the_objective_trained(batch):
    x, y = batch
    model = network()
    plain = plain_of(model, x)
    warmup = fw.ShortWarmup(plain, fw.ConstantEpsilon(EPS)).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)  # Of the engine's module, as its scripts do.
    for _ in range(3):
        optimizer.zero_grad()
        warmup(x, y).loss.backward()
        optimizer.step()
    warmup.eval()
    plain.eval()
    assert torch.allclose(plain(x), model(x), atol=1e-5)
    plain.compute_bounds(x=(eps_ball(x),), method="IBP")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("trained", ["neither", "engine", "model"])
def test_certificates_are_of_the_network_that_was_trained(batch, trained):
    x, y = batch
    model = network()
    plain = plain_of(model, x)
    if trained == "engine":
        train_with_the_engine(plain, x, y)
    elif trained == "model":
        model.train()
        model(x)
        model.eval()
    plain.eval()
    expected = plain(x).detach().clone() if trained != "model" else model(x).detach().clone()
    found = fw.verify(plain, (x, y), EPS, ("IBP", "CROWN-IBP"))
    assert [one.prediction for one in found.certificates] == expected.argmax(1).tolist()
    assert torch.allclose(plain(x), expected, atol=1e-5)
    assert torch.allclose(model.eval()(x), expected, atol=1e-5)
    ours = fw.BoundedModule(copy.deepcopy(model), x[:2]).eval()
    assert found.certificates == fw.verify(ours, (x, y), EPS, ("IBP", "CROWN-IBP")).certificates


def test_statistics_that_both_moved_are_refused(batch):
    x, y = batch
    model = network()
    plain = plain_of(model, x)
    train_with_the_engine(plain, x, y, steps=1)
    model.train()(x)
    model.eval()
    with pytest.raises(ValueError, match=r"both changed '1\.running_mean'.*share_batchnorm_state"):
        fw.verify(plain, (x, y), EPS)
    shared = plain_of(model, x)
    fw.share_batchnorm_state(shared, model)
    train_with_the_engine(shared, x, y, steps=1)
    fw.verify(shared, (x, y), EPS)


def test_hooks_on_a_plain_module(batch):
    x, y = batch
    model = network()
    plain = plain_of(model, x)
    fw.ibp_init_(plain)
    plain(x)
    plain.compute_bounds(x=(eps_ball(x),), method="IBP")
    assert fw.regularizers.tightness(plain).isfinite()
    assert fw.regularizers.relu_balance(plain).isfinite()
    plain(x)
    step = fw.losses.LossStep(plain, x, y, plain(x), fw.input_box(x, EPS), EPS)
    loss = fw.losses.IBP()(step).loss
    loss.backward()
    assert loss.isfinite()
    found = fw.inspect(plain, x, EPS)
    assert [layer.name for layer in found.relus] == ["0", "4"]
    plain.eval()
    assert fw.verification.certified_radii(plain, (x, y), ("IBP",), restarts=0)
    assert fw.verification.evaluate(plain, (x, y), EPS, restarts=0).certificates
    with pytest.raises(TypeError, match="before"):
        fw.insert_batchnorm(plain, x)


def test_a_plain_module_in_training_mode_is_not_certified(batch):
    x, y = batch
    plain = plain_of(network(), x)
    plain.train()
    with pytest.raises(ValueError, match="in training mode"):
        fw.verify(plain, (x, y), EPS)


class WeirdPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.linear = nn.AvgPool2d(2, divisor_override=3), nn.Linear(16, 3)

    def forward(self, x):
        return self.linear(self.pool(x).flatten(1))


def test_another_function_than_the_models_is_refused(batch):
    x, y = batch
    plain = plain_of(WeirdPool(), x)
    plain.eval()
    with pytest.raises(NotImplementedError, match="another function than the model"):
        fw.verify(plain, (x, y), EPS)
    model = network()
    plain = plain_of(model, x)
    plain.eval()
    model[2] = nn.Identity()
    with pytest.raises(ValueError, match="another function than the network that it was built from"):
        fw.verify(plain, (x, y), EPS)


def test_an_operator_without_proved_bounds_is_refused_by_name(batch):
    x, _ = batch
    plain = plain_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.LeakyReLU(1.5)), x)
    with pytest.raises(NotImplementedError, match=r"LeakyRelu .*its slope is 1\.5"):
        fw.ShortWarmup(plain, fw.ConstantEpsilon(EPS), regularizers=())


def test_a_data_parallel_wrapper_is_refused(batch):
    x, y = batch
    wrapped = nn.DataParallel(plain_of(network(), x))
    with pytest.raises(TypeError, match=r"pass its \.module"):
        fw.verify(wrapped, (x, y), EPS)


BEFORE = """
import torch, {first}
import {second}
import lirpa_fastwarmup as fw
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
x, y = torch.rand(4, 2, 2), torch.zeros(4, dtype=torch.int64)
plain = auto_LiRPA.BoundedModule(net, x)
plain.eval()
print(len(fw.verify(plain, (x, y), 0.01, restarts=0).certificates))
"""


@pytest.mark.parametrize("order", [("auto_LiRPA", "lirpa_fastwarmup"), ("lirpa_fastwarmup", "auto_LiRPA")])
def test_either_order_of_imports(order):
    if order[0] == "auto_LiRPA" and not auto_LiRPA.__version__.startswith("0.7"):
        pytest.skip("0.3 cannot be imported first on this PyTorch")
    code = BEFORE.format(first=order[0], second=order[1])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("4"), done.stderr


def test_a_module_that_was_built_before_the_import_is_refused(batch):
    x, y = batch
    plain = plain_of(network(), x)
    del plain.__dict__["_fastwarmup_record"]
    with pytest.raises(ValueError, match="import lirpa_fastwarmup at the top of the script"):
        fw.verify(plain, (x, y), EPS)
