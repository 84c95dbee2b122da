from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from tests import networks


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (networks.convolutional(batchnorm=False), ["0", "2", "5"]),
        (networks.multilayer(batchnorm=False), ["1", "3"]),
        (networks.multilayer(), ["4"]),
        (
            networks.SmallResNet(),
            ["stem", "block1.conv1", "block1.conv2", "block1.shortcut", "block2.conv1", "block2.conv2", "hidden"],
        ),
        (networks.SharedActivation(), ["features.0", "features.1", "fc"]),
    ],
    ids=["convolutional", "linear", "linear with BatchNorm", "residual", "functional"],
)
def test_inserts_after_every_hidden_layer_that_lacks_it(model, names, x):
    before, kind = state(model), type(model)
    assert fw.insert_batchnorm(model, x) == names
    assert type(model) is kind
    after = state(model)
    assert before.keys() < after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(after) - set(before) == {
        f"{name}.batchnorm.{key}"
        for name in names
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert fw.insert_batchnorm(model, x) == []
    assert state(model).keys() == after.keys()


def test_computes_what_a_network_written_with_it_computes(x):
    written, plain = networks.convolutional(), networks.convolutional(batchnorm=False)
    for source, target in zip((0, 3, 7, 10), (0, 2, 5, 7), strict=True):
        plain[target].load_state_dict(written[source].state_dict())
    fw.insert_batchnorm(plain, x)
    assert torch.allclose(plain(x), written(x), atol=1e-6)
    assert torch.allclose(plain.eval()(x), written.eval()(x), atol=1e-6)
    # And its bounds are the same.
    box = (fw.input_box(x, 0.05),)
    for mode in (True, False):
        one = fw.BoundedModule(plain.train(mode), x).compute_bounds(x=box, method="IBP")
        other = fw.BoundedModule(written.train(mode), x).compute_bounds(x=box, method="IBP")
        assert torch.allclose(one[0], other[0], atol=1e-5)


def test_batchnorm_behind_a_sum_serves_both_branches(x):
    class AfterSum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Conv2d(1, 4, 3, padding=1)
            self.right = nn.Conv2d(1, 4, 1)
            self.bn = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4 * 64, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = torch.relu(self.bn(self.left(x) + self.right(x)))
            return self.head(torch.relu(self.fc(x.flatten(1))))

    assert fw.insert_batchnorm(AfterSum(), x) == ["fc"]


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Conv1d(2, 4, 3), (4, 2, 9), nn.BatchNorm1d),
        (nn.Conv3d(2, 4, 3), (4, 2, 5, 5, 5), nn.BatchNorm3d),
        (nn.ConvTranspose1d(2, 4, 3, stride=2), (4, 2, 5), nn.BatchNorm1d),
        (nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1), (4, 2, 5, 5), nn.BatchNorm2d),
        (nn.ConvTranspose3d(2, 4, 2), (4, 2, 3, 3, 3), nn.BatchNorm3d),
        (nn.Linear(6, 4, bias=False), (4, 6), nn.BatchNorm1d),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_every_kind_of_layer(layer, shape, kind):
    x = torch.rand(shape)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(layer(x).flatten(1).shape[1], 3))
    assert fw.insert_batchnorm(model, x) == ["0"]
    assert isinstance(layer.batchnorm, kind)
    bounded = fw.BoundedModule(model, x)
    assert torch.allclose(bounded(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: _through_torch_save(m),
        lambda m: torch.jit.trace(m, torch.rand(8, 1, 8, 8)),
        lambda m: torch.export.export(m, (torch.rand(8, 1, 8, 8),)).module(),
    ],
    ids=["deepcopy", "pickle", "torch.save", "jit.trace", "torch.export"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")  # Since PyTorch 2.15; it still works.
def test_survives_copying_and_export(copier, x):
    model = networks.SmallResNet()
    fw.insert_batchnorm(model, x)
    model(torch.rand(32, 1, 8, 8))
    model.eval()
    expected = model(x)
    twin = copier(model)
    assert torch.allclose(twin(x), expected, atol=1e-6)
    if isinstance(twin, networks.SmallResNet):
        with torch.no_grad():
            model.stem.batchnorm.weight.add_(1.0)  # The copy keeps a BatchNorm of its own.
        assert torch.allclose(twin(x), expected, atol=1e-6)
    fresh = networks.SmallResNet()
    fw.insert_batchnorm(fresh, x)
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh.eval()(x), model(x), atol=1e-6)


def _through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_trace_holds_the_batchnorms(x):
    model = networks.SmallResNet()
    fw.insert_batchnorm(model, x)
    trace, _ = torch.jit._get_trace_graph(model.eval(), (x,))
    assert str(trace).count("aten::batch_norm") == 7


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_take_after_their_layer(training, x):
    model = networks.convolutional(batchnorm=False).double().train(training)
    fw.insert_batchnorm(model, x.double())
    assert model[0].batchnorm.weight.dtype == torch.float64
    assert model[0].batchnorm.training is training
    assert model[0].bias is not None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (networks.DataDependent(), r"path is not fixed: it reads the value of a tensor at .*networks\.py:\d+"),
        (networks.CalledTwice(), "again: called in several places"),
    ],
)
def test_structures_that_cannot_be_followed_are_refused_whole(model, message, x):
    before = state(model)
    with pytest.raises(fw.StructureError, match=message):
        fw.insert_batchnorm(model, x)
    assert state(model).keys() == before.keys()
    assert not any(module._forward_hooks for module in model.modules())


def test_linear_layers_over_positions_are_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(fw.StructureError, match="'0' works on an output of 3 dimensions"):
        fw.insert_batchnorm(model, torch.rand(4, 3, 6))


def test_branches_on_shapes_are_no_obstacle(x):
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(64, 8), nn.Linear(8, 3)

        def forward(self, x):
            assert x.shape[1] == 1
            if x.shape[0] > 1:
                x = x * 1.0
            return self.out(torch.relu(self.fc(x.reshape(x.size(0), -1))))

    assert fw.insert_batchnorm(Checked(), x) == ["fc"]


def test_a_network_with_several_inputs(x):
    assert fw.insert_batchnorm(networks.TwoInputs(), x, torch.rand(8, 5)) == ["image", "vector", "joint"]


class Subclass(nn.Linear):
    """Returns more than the output of its weight."""

    def __init__(self, features, out, returns):
        super().__init__(features, out)
        self.returns = returns

    def forward(self, x):
        return self.returns(super().forward(x))


def weight_used_elsewhere():
    class Borrowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(64, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(torch.relu(nn.functional.linear(x.flatten(1), self.fc.weight, self.fc.bias)))

    return Borrowed()


def called_twice_on_one_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(64, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.out(torch.relu(self.fc(x)) + torch.tanh(self.fc(x)))

    return Twice()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (weight_used_elsewhere, "fc: the module does not return"),
        (called_twice_on_one_input, "fc: called in several places"),
        (
            lambda: nn.Sequential(nn.Flatten(), Subclass(64, 8, torch.relu), nn.Linear(8, 3)),
            "1: the module does not return",
        ),
    ],
)
def test_what_could_only_be_done_by_half_is_refused_whole(build, message, x):
    model = build()
    before = state(model)
    with pytest.raises(fw.StructureError, match=message):
        fw.insert_batchnorm(model, x)
    assert state(model).keys() == before.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sums_of_three_and_reshapes_before_the_batchnorm(x):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(1, 2, 3, padding=1) for _ in range(3))
            self.bn, self.out = nn.BatchNorm1d(128), nn.Linear(128, 3)

        def forward(self, x):
            return self.out(torch.relu(self.bn((self.a(x) + self.b(x) + self.c(x)).flatten(1))))

    assert fw.insert_batchnorm(Three(), x) == []


@pytest.mark.parametrize("scale", ["left", "right", "matrix"])
def test_scaled_logits_are_still_the_classification_layer(scale, x):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(64, 8), nn.Linear(8, 3)
            self.temperature = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            logits = self.head(torch.relu(self.body(x.flatten(1))))
            if scale == "matrix":
                return logits @ torch.eye(3)
            return self.temperature * logits if scale == "left" else logits * self.temperature

    assert fw.insert_batchnorm(Scaled(), x) == ["body"]
    assert [init.name for init in fw.ibp_init_(fw.BoundedModule(Scaled(), x))] == ["body"]
