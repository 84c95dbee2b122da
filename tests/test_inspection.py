"""What an inspection says of a network, against arithmetic of its own, and what it says of broken ones."""

from __future__ import annotations

import copy
import csv
import dataclasses
import html
import io
import math

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.inspection.statistics import history_columns
from tests.networks import ON_8X8, CalledTwice, TwoInputs, convolutional, multilayer
from tests.reference import Box, propagate

EPS = 0.05


def relu_inputs(model, x, eps):
    """The boxes at the input of every ReLU of a Sequential, in float64."""
    model, x = copy.deepcopy(model).double(), x.double()
    box = Box(x, (x - eps).clamp(min=0), (x + eps).clamp(max=1))
    boxes = []
    for module in model:
        if isinstance(module, nn.ReLU):
            boxes.append(box)
        box = propagate(module, box)
    return boxes


def finding(found, kind):
    """The one finding of this kind; there may be findings of other kinds."""
    (one,) = [one for one in found.findings if one.kind == kind]
    return one


def kinds(found):
    return [one.kind for one in found.findings]


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_statistics_of_relu_layers_match_a_float64_reference(x, training):
    model = convolutional().train(training)
    found = fw.inspect(fw.BoundedModule(model, x), x, EPS)
    before = ((x + EPS).clamp(max=1) - (x - EPS).clamp(min=0)).double().mean() / 2
    assert found.input_half_width == pytest.approx(float(before), rel=1e-5)
    at_input = before
    for layer, box in zip(found.relus, relu_inputs(model, x, EPS), strict=True):
        centre, half = (box.lower + box.upper) / 2, ((box.upper - box.lower) / 2).mean()
        active, inactive = box.lower > 0, box.upper <= 0
        units = inactive.transpose(0, 1).flatten(1).all(1)
        squares = (centre - centre.mean()) ** 2
        expected = {
            "neurons": centre[0].numel(),
            "half_width": half,
            "gain": half / before,
            "growth": half / at_input,
            "always_active": active.double().mean(),
            "always_inactive": inactive.double().mean(),
            "unstable": (~active & ~inactive).double().mean(),
            "dead": units.double().mean(),
            "mean_ratio": centre[active].sum() / -centre[inactive].sum(),
            "variance_ratio": squares[active].sum() / squares[inactive].sum(),
            "distance": centre.abs().mean(),
        }
        for name, value in expected.items():
            assert getattr(layer, name) == pytest.approx(float(value), rel=1e-3, nan_ok=True), (layer.name, name)
        before = half
    assert found.dead == pytest.approx(sum(layer.dead for layer in found.relus) / len(found.relus))
    assert found.growth_per_layer == pytest.approx(float((half / at_input) ** (1 / 3)), rel=1e-4)


def test_statistics_of_affine_layers(x):
    model = convolutional()
    bounded = fw.BoundedModule(model, x)
    given = {layer.name: layer for layer in fw.ibp_init_(bounded)}
    layers = {layer.name: layer for layer in fw.inspect(bounded, x, EPS).affine}
    assert list(layers) == ["0", "3", "7", "10"]
    assert [layer.classification for layer in layers.values()] == [False, False, False, True]
    assert [layer.batchnorm for layer in layers.values()] == [True, True, True, False]
    for name, initialised in given.items():
        layer, weight = layers[name], model[int(name)].weight.detach().double()
        assert layer.fan_in == initialised.fan_in
        assert layer.ibp_std == pytest.approx(initialised.std)
        assert layer.weight_std == pytest.approx(float(weight.std(correction=0)))
        passed = 1.0 if name == "0" else 0.5
        assert layer.expected_gain == pytest.approx(passed * layer.fan_in * float(weight.abs().mean()))


def test_formula_predicts_the_gain_of_ibp_initialised_layers_without_batchnorm():
    # Wide enough for the expectation to hold, and inputs far from the ends of their range.
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(256, 256), nn.ReLU())], nn.Linear(256, 3))
    x = 0.4 + 0.2 * torch.rand(16, 256)
    bounded = fw.BoundedModule(model, x)
    fw.initialize_(bounded, "kaiming")
    found = fw.inspect(bounded, x, 0.1)
    for layer, affine in zip(found.relus, found.affine, strict=False):
        assert layer.gain == pytest.approx(affine.expected_gain, rel=0.1)


def test_outputs_of_a_classifier(x):
    model = convolutional().eval()
    bounded = fw.BoundedModule(model, x)
    output = fw.inspect(bounded, x, 0.001).output
    logits = model(x).detach()
    top = logits.topk(2, 1).values
    assert output.gap == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), rel=1e-4)
    assert output.spread == pytest.approx(float(logits.std(0, correction=0).max()), rel=1e-4)
    certified = fw.verify(bounded, (x, logits.argmax(1)), 0.001, methods=("IBP",), restarts=0)
    assert output.certified == pytest.approx(1 - certified.verified_error.value)
    assert output.lower_bound == pytest.approx(
        sum(one.margin for one in certified.certificates) / len(x), rel=1e-3, abs=1e-6
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ON_8X8)
def test_any_network_is_inspected_and_left_as_it_was(name, training, x):
    model = ON_8X8[name]().train(training)
    bounded = fw.BoundedModule(model, x)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        found = fw.inspect(bounded, x, EPS)
    assert [layer.name for layer in found.relus] == [layer.name for layer in fw.relu_bounds(bounded)]
    assert found.training == model.training == bounded.training == training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(math.isfinite(layer.half_width) and layer.half_width > 0 for layer in found.relus)
    for layer in found.relus:
        assert layer.always_active + layer.always_inactive + layer.unstable == pytest.approx(1)
    again = fw.inspect(bounded, x, EPS)
    assert str(again) == str(found)


def test_gain_is_over_the_relus_that_a_layer_reads():
    bounded = fw.BoundedModule(TwoInputs(), (torch.rand(4, 1, 8, 8), torch.rand(4, 5)))
    found = fw.inspect(bounded, (torch.rand(4, 1, 8, 8), torch.rand(4, 5)), EPS)
    layers = {layer.name: layer for layer in found.relus}
    for name in ("image", "vector"):
        assert layers[name].gain == pytest.approx(layers[name].half_width / found.input_half_width)
    joined = (layers["image"].half_width + layers["vector"].half_width) / 2
    assert layers["joint"].gain == pytest.approx(layers["joint"].half_width / joined)
    assert found.output is not None


class Branches(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(8, 16) for _ in range(count))
        self.joint, self.out = nn.Linear(16 * count, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.joint(torch.cat([branch(x).relu() for branch in self.branches], 1)).relu())


def test_growth_per_layer_is_the_mean_gain_however_many_branches_there_are():
    model = Branches(6)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    found = fw.inspect(fw.BoundedModule(model, torch.rand(4, 8)), torch.rand(16, 8), 0.01)
    gains = [layer.gain for layer in found.relus]
    assert min(gains) <= found.growth_per_layer <= max(gains)
    assert found.growth_per_layer == pytest.approx(torch.tensor(gains).log().mean().exp().item(), rel=1e-5)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.out = nn.Linear(8, 16), nn.Linear(64, 3)

    def forward(self, x):
        return self.out(self.token(x).relu().flatten(1))


def test_units_of_a_linear_layer_are_in_the_last_dimension():
    model = Tokens()
    with torch.no_grad():
        model.token.bias[:12] = -100.0
        model.token.bias[12:] = 100.0
    found = fw.inspect(fw.BoundedModule(model, torch.rand(2, 4, 8)), torch.rand(8, 4, 8), 0.01)
    assert found.dead == pytest.approx(0.75)


def test_the_expected_gain_is_halved_behind_activations_alone():
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    found = fw.inspect(fw.BoundedModule(model, torch.rand(2, 8)), torch.rand(4, 8), 0.01)
    for layer, part, factor in zip(found.affine, (model[0], model[1], model[3]), (1, 1, 0.5), strict=True):
        mean = float(part.weight.detach().abs().mean())
        assert layer.expected_gain == pytest.approx(factor * layer.fan_in * mean, rel=1e-5)


def test_outputs_that_are_nan_are_not_called_constant(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[3].bias[1] = torch.nan
    found = fw.inspect(fw.BoundedModule(model, x), x, EPS)
    assert [finding.kind for finding in found.findings] == ["not finite"]
    assert "outputs" in found.findings[0].text


def test_radius_of_each_feature_and_boxes_of_ones_own():
    x = torch.rand(6, 64)
    bounded = fw.BoundedModule(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)), x)
    eps = torch.linspace(0.01, 0.1, 64)
    found = fw.inspect(bounded, x, eps, input_range=None)
    assert found.eps == pytest.approx(0.1)
    assert found.input_half_width == pytest.approx(float(eps.mean()))
    box = fw.input_box(x, eps, input_range=None)
    assert fw.inspect(bounded, box, 0.1).relus == found.relus


def test_columns_are_explained_below_their_table(x):
    found = fw.inspect(fw.BoundedModule(convolutional(), x), x, EPS)
    for text in (str(found), found.to_markdown(), found._repr_html_()):
        legend = " ".join(text.split())
        assert "healthy: 0.5 to 2" in legend
        assert legend.index("|centre|: mean distance") < legend.index("affine layer")


def test_notebooks_show_the_same_tables(x):
    model = multilayer()
    found = fw.inspect(fw.BoundedModule(model, x), x, EPS)
    assert html.unescape(found._repr_html_()) == f"<pre>{found}</pre>"
    for rows in found.tables():
        for row in rows:
            assert all(cell in str(found) for cell in row)


def test_tables(x):
    found = fw.inspect(fw.BoundedModule(ON_8X8["residual"](), x), x, EPS)
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["name"] for row in rows if row["kind"] == "relu"] == [layer.name for layer in found.relus]
    assert [row["name"] for row in rows if row["kind"] == "affine"] == [layer.name for layer in found.affine]
    assert float(rows[0]["half_width"]) == found.relus[0].half_width
    assert rows[0]["fan_in"] == ""
    assert float(rows[-1]["weight_std"]) == found.affine[-1].weight_std
    lines = str(found).splitlines()
    for layer in (*found.relus, *found.affine):
        assert any(line.split()[0] == layer.name for line in lines if line)
        assert f"| {layer.name} |" in found.to_markdown()


def test_csv_file(x, tmp_path):
    found = fw.inspect(fw.BoundedModule(convolutional(), x), x, EPS)
    assert found.to_csv(tmp_path / "layers.csv") == (tmp_path / "layers.csv").read_text()


def test_layers_of_one_name_have_columns_of_their_own(x):
    found = fw.inspect(fw.BoundedModule(CalledTwice(), x), x, EPS)
    assert [layer.name for layer in found.relus] == ["first", "again", "again"]
    columns = history_columns(found.relus)
    assert columns["half_width/again"] == found.relus[1].half_width
    assert columns["half_width/again#2"] == found.relus[2].half_width


# Networks broken on purpose.


def trained(x, batchnorm=True):
    """A network after some steps of the recipe on separable data, and that data."""
    torch.manual_seed(1)
    y = torch.arange(96) % 3
    x = (0.3 * torch.rand(96, 1, 8, 8) + 0.6 * torch.nn.functional.one_hot(y, 8).view(96, 1, 8, 1)).clamp(0, 1)
    model = convolutional(batchnorm)
    bounded = fw.BoundedModule(model, x)
    fw.ibp_init_(bounded)
    warmup = fw.ShortWarmup(bounded, fw.SmoothedEpsilon(EPS, 1, 1, 100))
    optimizer = torch.optim.Adam(warmup.parameters(), lr=5e-3)
    for _ in range(150):
        warmup(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
    return bounded.eval(), x


@pytest.fixture(scope="module")
def healthy():
    return trained(None)


def broken(healthy, change):
    """The inspection of a copy of the healthy network whose parameters ``change`` was applied to."""
    bounded, x = healthy
    model = copy.deepcopy(bounded.wrapped)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    return fw.inspect(fw.BoundedModule(model, x), x, EPS)


def test_nothing_is_wrong_with_a_network_that_the_recipe_trained(healthy):
    bounded, x = healthy
    found = fw.inspect(bounded, x, EPS)
    assert found.findings == ()
    assert "Nothing looks wrong." in str(found)
    assert found.output.certified > 0.9


def test_weights_times_ten_are_found(healthy):
    def change(name, parameter):
        if name.endswith("weight"):
            parameter *= 10

    one = finding(broken(healthy, change), "exploded bounds")
    assert "ibp_init_" in one.text
    assert "× per layer" in one.text
    assert "10" in one.layers or "7" in one.layers


def test_kaiming_initialisation_is_a_finding_and_ibp_initialisation_fixes_it(x):
    bounded = fw.BoundedModule(ON_8X8["no BatchNorm"](), x)
    fw.initialize_(bounded, "kaiming")
    with torch.no_grad():
        for layer in bounded.wrapped:
            if hasattr(layer, "weight"):
                layer.weight *= 2
    assert "exploded bounds" in kinds(fw.inspect(bounded, x, EPS))
    fw.ibp_init_(bounded)
    assert "exploded bounds" not in kinds(fw.inspect(bounded, x, EPS))


def test_growth_by_batchnorm_alone_is_not_blamed_on_the_weights():
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    x = torch.rand(32, 64)
    bounded = fw.BoundedModule(nn.Sequential(*layers, nn.Linear(64, 3)), x)
    fw.ibp_init_(bounded)
    one = finding(fw.inspect(bounded, x, EPS), "wide bounds")
    assert "expected before the warmup; the tightness regulariser reduces it" in one.text


def test_growth_of_deep_networks_is_a_finding_of_its_own_in_training_mode():
    torch.manual_seed(0)
    layers = [part for _ in range(20) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    x = torch.rand(32, 64)
    bounded = fw.BoundedModule(nn.Sequential(*layers, nn.Linear(64, 3)), x)
    fw.ibp_init_(bounded)
    found = fw.inspect(bounded, x, EPS)
    assert found.relus[-1].growth > 1e14
    text = finding(found, "exploded bounds").text
    assert "too deep (20 ReLU layers)" in text
    assert "fewer layers, a larger reg_weight with a longer ramp" in text
    assert "wide bounds" not in kinds(found)


def test_biases_of_minus_ten_are_found(healthy):
    def change(name, parameter):
        if name.endswith("bias"):
            parameter.fill_(-10)

    one = finding(broken(healthy, change), "inactive ReLUs")
    assert one.layers == ("0", "3", "7")
    assert "100% of layer 0 is always inactive" in one.text
    assert "raise reg_weight" in one.text
    assert "insert_batchnorm" not in one.text  # It is there.


def test_inactive_layers_without_batchnorm_are_given_that(x):
    model = convolutional(batchnorm=False)
    nn.init.constant_(model[0].bias, -10)
    assert "insert_batchnorm" in finding(fw.inspect(fw.BoundedModule(model, x), x, EPS), "inactive ReLUs").text


def test_biases_of_plus_ten_are_found(healthy):
    def change(name, parameter):
        if name.endswith("bias"):
            parameter.fill_(10)

    one = finding(broken(healthy, change), "active ReLUs")
    assert "0" in one.layers
    assert "100% of layer 0 is always active" in one.text


def test_missing_batchnorm_is_found(x):
    model = multilayer()  # Its second hidden layer has none.
    one = finding(fw.inspect(fw.BoundedModule(model, x), x, EPS), "no BatchNorm")
    assert one.layers == ("4",)
    assert "1 of 2 hidden layers" in one.text
    fw.insert_batchnorm(model, x)
    assert "no BatchNorm" not in kinds(fw.inspect(fw.BoundedModule(model, x), x, EPS))


def test_imbalance_is_found(healthy):
    def change(name, parameter):
        # Inactive by far, or active by little.
        if name == "1.bias":
            parameter.copy_(torch.tensor([-200.0, 4.0, 4.0, 4.0]))

    one = finding(broken(healthy, change), "imbalanced ReLUs")
    assert "0" in one.layers
    assert "ρ = " in one.text


def test_constant_outputs_are_found(healthy):
    def change(name, parameter):
        if name == "10.weight":
            parameter.zero_()

    assert "collapsed" in finding(broken(healthy, change), "constant outputs").text


def test_a_box_too_wide_for_the_network_is_found(x):
    bounded = fw.BoundedModule(convolutional(), x)
    fw.ibp_init_(bounded)
    assert "unstable ReLUs" in kinds(fw.inspect(bounded.eval(), x, 0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_the_only_finding(healthy, value):
    def change(name, parameter):
        if name == "3.weight":
            parameter.view(-1)[0] = value

    found = broken(healthy, change)
    assert kinds(found) == ["not finite"]
    assert found.findings[0].layers == ("3",)
    assert "checkpoint" in found.findings[0].text
    str(found)


def test_bounds_beyond_floating_point_are_found(x):
    model = convolutional(batchnorm=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e15)
    found = fw.inspect(fw.BoundedModule(model, x), x, EPS)
    assert kinds(found) == ["not finite"]
    assert "ibp_init_" in found.findings[0].text


# Bad input.


def test_networks_without_relu_or_of_one_layer_are_described_as_far_as_can_be(x):
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    found = fw.inspect(fw.BoundedModule(smooth, x), x, EPS)
    assert found.relus == ()
    assert [layer.name for layer in found.affine] == ["1", "3"]
    assert "no ReLU layers" in str(found)
    assert "no BatchNorm" in kinds(found)
    assert math.isnan(found.dead)
    alone = fw.inspect(fw.BoundedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), x), x, EPS)
    assert [layer.classification for layer in alone.affine] == [True]
    assert alone.findings == ()
    assert "not judged" in str(alone)
    assert alone.output.certified <= 1
    assert len(list(csv.DictReader(io.StringIO(alone.to_csv())))) == 1


def test_bad_arguments_are_refused(x):
    bounded = fw.BoundedModule(convolutional(), x)
    with pytest.raises(ValueError, match="eps must be above 0"):
        fw.inspect(bounded, x, 0.0)
    with pytest.raises(ValueError, match="units of the input"):
        fw.inspect(bounded, x, 8)
    with pytest.raises(ValueError, match="empty"):
        fw.inspect(bounded, x[:0], EPS)
    with pytest.raises(ValueError, match="one sample has no statistics"):
        fw.inspect(bounded, x[:1], EPS)
    with pytest.raises(ValueError, match="Pass the inputs alone"):
        fw.inspect(bounded, (x, torch.zeros(8)), EPS)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), batch aside; found \(8, 8\)"):
        fw.inspect(bounded, x[0], EPS)
    with pytest.raises(ValueError, match="input_range"):
        fw.inspect(bounded, x - 0.5, EPS)
    with pytest.raises(TypeError, match="wrap the network"):
        fw.inspect(bounded.wrapped, x, EPS)


def test_weights_of_a_parametrisation_are_not_judged(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Doubled())
    found = fw.inspect(fw.BoundedModule(model, x), x, EPS)
    assert found.affine[0].weight_std is None
    assert found.affine[0].expected_gain is None
    assert "–" in str(found)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_balance_is_the_smallest_ratio(x):
    layer = fw.inspect(fw.BoundedModule(convolutional(), x), x, EPS).relus[0]
    assert dataclasses.replace(layer, always_inactive=0.5, mean_ratio=4, variance_ratio=2).balance == 0.25
    assert dataclasses.replace(layer, always_inactive=0.5, mean_ratio=0, variance_ratio=2).balance == 0
    assert math.isnan(dataclasses.replace(layer, always_inactive=0).balance)
