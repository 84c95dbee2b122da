from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from tests import networks


def std(fan_in):
    return math.sqrt(2 * math.pi) / fan_in


def test_formula_names_and_what_is_left_alone(x):
    model = fw.models.cnn7((1, 8, 8), 10, width=16, hidden=256)
    before = copy.deepcopy(model.state_dict())
    inits = fw.ibp_init_(fw.BoundedModule(model, x))
    fan_ins = {"0": 9, "3": 144, "6": 144, "9": 288, "12": 288, "16": 512}
    assert {init.name: init.fan_in for init in inits} == fan_ins
    for init in inits:
        assert init.std == pytest.approx(std(init.fan_in))
        assert not init.halved
        weight = model.get_parameter(f"{init.name}.weight")
        count = weight.numel()
        # Three standard errors of a sample's standard deviation, and of its mean.
        assert float(weight.detach().std()) == pytest.approx(init.std, rel=3 / math.sqrt(2 * count))
        assert abs(float(weight.detach().mean())) < 3.5 * init.std / math.sqrt(count)
    drawn = {f"{name}.weight" for name in fan_ins}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in drawn), name


@pytest.mark.parametrize(
    ("layer", "shape", "fan_in"),
    [
        (nn.Conv1d(4, 6, 5), (2, 4, 9), 20),
        (nn.Conv2d(4, 6, 3), (2, 4, 5, 5), 36),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 18),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), 9),
        (nn.Conv3d(2, 3, 3), (2, 2, 4, 4, 4), 54),
        (nn.ConvTranspose1d(4, 6, 4, stride=2), (2, 4, 5), 8),
        (nn.ConvTranspose2d(4, 6, 4, stride=2), (2, 4, 3, 3), 16),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2), (2, 4, 3, 3), 8),
        (nn.ConvTranspose2d(4, 6, 4, stride=(2, 1), padding=1), (2, 4, 3, 3), 32),
        (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 3, 3), 2),
        (nn.Linear(7, 5), (2, 7), 7),
        (nn.Linear(7, 5, bias=False), (2, 7), 7),
        (nn.Linear(7, 5), (2, 3, 7), 7),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else None,
)
def test_fan_in_of_every_kind_of_layer(layer, shape, fan_in):
    x = torch.rand(shape)
    features = layer(x).flatten(1).shape[1]
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(features, 3))
    (init,) = fw.ibp_init_(fw.BoundedModule(model, x))
    assert (init.name, init.fan_in, init.std) == ("0", fan_in, pytest.approx(std(fan_in)))


def test_layers_behind_the_relu_of_a_sum_are_halved(x):
    for batchnorm in (False, True):
        model = networks.SmallResNet(batchnorm=batchnorm)
        inits = {init.name: init for init in fw.ibp_init_(fw.BoundedModule(model, x))}
        # block2.conv1 reads the ReLU of block1's sum; `hidden` does so only through pooling.
        assert [name for name, init in inits.items() if init.halved] == ["block2.conv1"]
        assert inits["block2.conv1"].std == pytest.approx(std(72) / 2)
        weight = model.block2.conv1.weight.detach()
        assert float(weight.std()) == pytest.approx(std(72) / 2, rel=0.1)
        assert "head" not in inits


def test_classification_layers_are_found_from_the_graph(x):
    class Odd(nn.Module):
        """Registers its layers in another order than it uses them, and has two heads that are added."""

        def __init__(self):
            super().__init__()
            self.head_a = nn.Linear(8, 3)
            self.head_b = nn.Linear(64, 3)
            self.scale = nn.BatchNorm1d(3)
            self.body = nn.Linear(64, 8)

        def forward(self, x):
            x = x.flatten(1)
            return self.scale(self.head_a(torch.relu(self.body(x))) * 0.5 + self.head_b(x))

    inits = fw.ibp_init_(fw.BoundedModule(Odd(), x))
    assert [init.name for init in inits] == ["body"]


def test_generator_makes_it_repeatable(x):
    def drawn(seed):
        model = networks.convolutional()
        fw.ibp_init_(fw.BoundedModule(model, x), generator=torch.Generator().manual_seed(seed))
        return model[0].weight.detach().clone()

    state = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.set_rng_state(state)


def test_computed_weights_are_refused_before_anything_is_drawn(x):
    model = networks.convolutional()

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model[3], "weight", Doubled())
    before = model[0].weight.detach().clone()
    with pytest.raises(fw.StructureError, match=r"'3' is computed from .* by a parametrisation"):
        fw.ibp_init_(fw.BoundedModule(model, x))
    assert torch.equal(model[0].weight, before)


def test_bounds_grow_by_default_and_not_after(x):
    torch.manual_seed(3)
    model = fw.models.cnn7((1, 8, 8), 10, width=16, hidden=64, batchnorm=False)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    bounded = fw.BoundedModule(model, x)

    def growth():
        bounded.compute_bounds(x=(fw.input_box(x, 0.01, None),), method="IBP")
        layers = fw.relu_bounds(bounded)
        first, last = ((layer.upper - layer.lower).mean() for layer in (layers[0], layers[-1]))
        return float((last / first).detach())

    assert growth() > 100
    fw.ibp_init_(bounded)
    assert 0.2 < growth() < 5
