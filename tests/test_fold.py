"""fold_batchnorm: the author's class with the author's keys and the same function, or an error that names the layer."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import warnings

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli, verification
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training.network import build_network, save_model
from tests import networks


def between(layer, shape):
    """``layer`` between a ReLU and a classification layer."""
    features = layer(torch.zeros(shape)).flatten(1).shape[1]
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(features, 3)), shape


class Odd(nn.Module):
    """A sequence, attributes, a layer under two names, and a residual sum; keys that are not in order of use."""

    def __init__(self, bias=True):
        super().__init__()
        self.blocks = nn.ModuleDict({"10": nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=bias), "2": nn.Identity()})
        self.z_first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular", bias=bias)
        self.stem = nn.Sequential(self.z_first, nn.ReLU())
        self.written = nn.Sequential(nn.Conv2d(4, 4, 1, bias=bias), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=bias)
        self.head = nn.Linear(6 * 256, 3, bias=bias)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.blocks["10"](x))
        x = torch.relu(self.up(self.written(x)))
        return self.head(x.flatten(1))


IMAGE = (8, 1, 8, 8)
NETWORKS = {
    "linear": lambda: between(nn.Linear(6, 5), (8, 6)),
    "linear without bias": lambda: between(nn.Linear(6, 5, bias=False), (8, 6)),
    "conv1d": lambda: between(nn.Conv1d(4, 6, 3, groups=2, stride=2), (8, 4, 9)),
    "conv2d dilated": lambda: between(nn.Conv2d(2, 4, 3, dilation=2, padding=1, bias=False), (8, 2, 7, 7)),
    "conv2d depthwise": lambda: between(nn.Conv2d(3, 6, 3, groups=3), (8, 3, 7, 7)),
    "conv3d": lambda: between(nn.Conv3d(2, 4, 2, groups=2), (8, 2, 4, 4, 4)),
    "transposed 1d": lambda: between(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (8, 4, 5)),
    "transposed 2d": lambda: between(nn.ConvTranspose2d(2, 5, 3, stride=2, output_padding=1), (8, 2, 5, 5)),
    "transposed 3d": lambda: between(nn.ConvTranspose3d(4, 8, 2, groups=4, bias=False), (8, 4, 3, 3, 3)),
    "residual": lambda: (networks.SmallResNet(), IMAGE),
    "functional": lambda: (networks.SharedActivation(), IMAGE),
    "author's BatchNorm": lambda: (networks.SmallResNet(batchnorm=True), IMAGE),
    "odd": lambda: (Odd(), IMAGE),
    "odd without bias": lambda: (Odd(bias=False), IMAGE),
}


def trained(model, shape, dtype=torch.float32):
    """``model`` with inserted BatchNorm whose weights and statistics a few steps of training have moved."""
    model.to(dtype)
    fw.insert_batchnorm(model, torch.zeros(shape, dtype=dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(6):
        x = 2 * torch.rand(shape, dtype=dtype) - 0.5
        nn.functional.cross_entropy(model.train()(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():  # Signs, scales and a channel that is almost off, as long training leaves them.
                module.weight.mul_(torch.linspace(-2, 3, len(module.weight))).add_(1e-3)
                module.running_var.mul_(torch.logspace(-2, 2, len(module.weight)))
    return model.eval()


def network(name, dtype=torch.float32):
    return trained(*NETWORKS[name](), dtype), NETWORKS[name]()[1]


def assert_same(folded, model, x, tolerance=1e-5):
    expected = model(x)
    assert (folded(x) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_the_same_function_with_the_authors_class_and_keys(name, dtype, tolerance):
    model, shape = network(name, dtype)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.train().modules()]
    folded = fw.fold_batchnorm(model)
    assert type(folded) is type(model)
    assert not any(module.training for module in folded.modules())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh, _ = NETWORKS[name]()
    biases = {
        f"{layer}.bias" for layer, module in model.named_modules(remove_duplicate=False) if hasattr(module, "batchnorm")
    }
    assert set(folded.state_dict()) == set(fresh.state_dict()) | biases
    assert not any(module._forward_hooks for module in folded.modules())
    for scale in (0.1, 1.0, 50.0):
        assert_same(folded, model.eval(), scale * torch.randn(shape, dtype=dtype), tolerance)
    if biases <= fresh.state_dict().keys():
        fresh.to(dtype).load_state_dict(folded.state_dict())
        assert_same(fresh.eval(), folded, torch.randn(shape, dtype=dtype), 1e-15)


def test_rounds_no_more_than_the_result_needs():
    model, _ = network("conv2d depthwise")
    folded = fw.fold_batchnorm(model)[0]
    exact = fw.fold_batchnorm(copy.deepcopy(model).double())[0]
    assert torch.equal(folded.weight, exact.weight.float())
    assert torch.equal(folded.bias, exact.bias.float())


def test_a_network_built_with_biases_loads_what_was_folded_without():
    model = trained(Odd(bias=False), IMAGE)
    folded = fw.fold_batchnorm(model)
    with_bias = Odd(bias=True).eval()
    missing = with_bias.load_state_dict(folded.state_dict(), strict=False)
    assert missing.missing_keys == ["written.0.bias", "head.bias"]  # BatchNorm follows, or nothing does: not folded.
    assert missing.unexpected_keys == []


def test_frozen_weights_stay_frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    fw.insert_batchnorm(model, torch.rand(IMAGE))
    assert not any(parameter.requires_grad for parameter in fw.fold_batchnorm(model).parameters())


@pytest.mark.parametrize("build", [nn.Identity, networks.SmallResNet, lambda: networks.SmallResNet(batchnorm=True)])
def test_without_inserted_batchnorm_the_copy_is_unchanged(build):
    model = build()
    folded = fw.fold_batchnorm(model)
    assert folded is not model
    assert type(folded) is type(model)
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in folded.state_dict().items())


def test_later_hooks_of_the_author_see_the_same():
    model, shape = network("conv1d")
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(args[2]))
    x = torch.randn(shape)
    fw.fold_batchnorm(model)(x)
    model(x)
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


# Deployment without this package.

MODULE = """
import torch
from torch import nn

class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2)
        self.hidden = nn.Linear(36, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.out(torch.relu(self.hidden(x.flatten(1))))
"""
ALONE = """
import sys
sys.modules["lirpa_fastwarmup"] = sys.modules["auto_LiRPA"] = None  # Importing them fails.
import torch
import authors_networks
x, expected = torch.load("outputs.pt")
loaded = torch.load("network.pt", weights_only=False)
assert type(loaded) is authors_networks.MyNet
fresh = authors_networks.MyNet().eval()
fresh.load_state_dict(torch.load("weights.pt"))
for network in (loaded, fresh, torch.export.load("network.pt2").module()):
    assert torch.allclose(network(x), expected, atol=1e-5)
"""


@pytest.fixture
def my_net(tmp_path, monkeypatch):
    path = tmp_path / "authors_networks.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return trained(module.MyNet(), IMAGE)


def test_runs_where_this_package_is_not_installed(my_net, tmp_path):
    folded, x = fw.fold_batchnorm(my_net), torch.randn(5, 1, 8, 8)
    torch.save(folded, tmp_path / "network.pt")
    torch.save(folded.state_dict(), tmp_path / "weights.pt")
    torch.save((x, my_net(x)), tmp_path / "outputs.pt")
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(folded, (x,), dynamic_shapes=shapes), tmp_path / "network.pt2")
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compile_", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 1, 8, 8))])
def test_torchscript_takes_the_folded_network(my_net, compile_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still deployed.
        scripted = compile_(fw.fold_batchnorm(my_net))
    assert "batchnorm" not in str(scripted.state_dict().keys())
    assert_same(scripted, my_net, torch.randn(IMAGE))


def test_why_folding_is_needed(my_net):
    fresh = type(my_net)().eval()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"first.batchnorm.weight\""):
        fresh.load_state_dict(my_net.state_dict())
    fresh.load_state_dict(my_net.state_dict(), strict=False)
    x = torch.randn(IMAGE)
    assert not torch.allclose(fresh(x), my_net(x), atol=1e-2)
    fresh.load_state_dict(fw.fold_batchnorm(my_net).state_dict())
    assert_same(fresh, my_net, x)


# Bounds.


@torch.no_grad()
def check_bounds(folded, model, x):
    box = (fw.input_box(x, 0.1, input_range=None),)
    lower, upper = fw.BoundedModule(folded, x).compute_bounds(x=box, method="IBP")
    slack = 1e-5 * float(upper.abs().max())
    for _ in range(50):
        inside = folded(x + 0.1 * (2 * torch.rand_like(x) - 1).sign())
        assert (lower - slack <= inside).all()
        assert (inside <= upper + slack).all()
    expected = fw.BoundedModule(model, x).compute_bounds(x=box, method="IBP")
    assert torch.allclose(lower, expected[0], atol=slack, rtol=1e-4)
    assert torch.allclose(upper, expected[1], atol=slack, rtol=1e-4)


@pytest.mark.parametrize("name", ["residual", "odd without bias", "transposed 1d"])
def test_bounds_of_the_folded_network_hold_and_are_those_of_the_original(name):
    model, shape = network(name)
    check_bounds(fw.fold_batchnorm(model), model, torch.rand(shape))


# Refusals.


class BoundedWeights(nn.Conv2d):
    """Not affine in the weight."""

    def forward(self, x):
        return self._conv_forward(x, torch.tanh(self.weight), self.bias)


class BoundedWeightsToo(nn.Conv2d):
    """The same in the other method."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, torch.tanh(weight), bias)


class Renamed(nn.Conv2d):
    """A class of the author's own that computes what its base computes."""

    def extra_repr(self):
        return "mine"


class TiedByCode(nn.Module):
    """Code of the network that reads a weight or bias beside its layer."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x) + self.read(self.conv)).flatten(1))


def small():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def changed(change):
    """A trained network whose first layer ``change`` was called with."""

    def build():
        model = trained(small(), IMAGE)
        change(model)
        return model

    return build


def inserted(model):
    fw.insert_batchnorm(model, torch.rand(IMAGE))
    return model


def with_layer(layer):
    return lambda: inserted(nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))


def through_tanh(layer):
    return parametrize.register_parametrization(layer, "weight", nn.Tanh())


def clamp_weight(module, args):
    module.weight.data.clamp_(-1, 1)


PERMANENT = "'0': its weight or bias is computed from other parameters"
HOOK = "'0': another hook runs before its BatchNorm"
REFUSED = {
    "weight_norm": (changed(lambda m: parametrizations.weight_norm(m[0])), PERMANENT),
    "spectral_norm": (changed(lambda m: parametrizations.spectral_norm(m[0])), PERMANENT),
    "parametrised bias": (changed(lambda m: parametrize.register_parametrization(m[0], "bias", nn.Tanh())), PERMANENT),
    "parametrised before": (with_layer(through_tanh(nn.Conv2d(1, 4, 3))), PERMANENT),
    "spectral_norm by hooks": (changed(lambda m: nn.utils.spectral_norm(m[0])), PERMANENT),
    "pruned": (changed(lambda m: prune.l1_unstructured(m[0], "weight", 0.5)), PERMANENT),
    "pruned bias": (changed(lambda m: prune.random_unstructured(m[0], "bias", 1)), PERMANENT),
    "shared weight": (changed(lambda m: setattr(m, "other", _holding(m[2].weight))), "'2': .* shared with 'other'"),
    "shared bias": (changed(lambda m: setattr(m[2], "bias", m[0].bias)), "'0': .* shared with '2'"),
    "hook before": (changed(lambda m: m[0].register_forward_hook(lambda *a: a[2] + 1, prepend=True)), HOOK),
    "hook on the input": (changed(lambda m: m[0].register_forward_pre_hook(clamp_weight)), HOOK),
    "hook on BatchNorm": (
        changed(lambda m: m[0].batchnorm.register_forward_hook(lambda *a: a[2] + 1)),
        "'0': its BatchNorm has hooks",
    ),
    "replaced": (changed(lambda m: m[0].add_module("batchnorm", nn.Identity())), "'0': its child .* is now a Identity"),
    "removed": (changed(lambda m: delattr(m[0], "batchnorm")), "'0': its child .* is now a NoneType"),
    "no statistics": (changed(lambda m: m[0].add_module("batchnorm", _batchnorm())), "'0': .* no running statistics"),
    "subclass": (with_layer(BoundedWeights(1, 4, 3)), "'0': BoundedWeights has a forward of its own"),
    "subclass by another method": (
        with_layer(BoundedWeightsToo(1, 4, 3)),
        "'0': BoundedWeightsToo has a forward of its own",
    ),
    "patched forward": (changed(lambda m: setattr(m[0], "forward", m[0].forward)), "'0': Conv2d has a forward of its"),
    "weight read elsewhere": (
        lambda: inserted(TiedByCode(lambda c: c.weight.detach()[0, 0, 0, 0])),
        "'conv': other code",
    ),
    "bias read elsewhere": (lambda: inserted(TiedByCode(lambda c: c.bias.view(1, -1, 1, 1))), "'conv': other code"),
}


def _holding(parameter):
    holder = nn.Module()
    holder.register_parameter("table", parameter)
    return holder


def _batchnorm():
    return nn.BatchNorm2d(4, track_running_stats=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_refused_by_name(name):
    build, message = REFUSED[name]
    model = build()
    before = list(model.state_dict())
    with pytest.raises(fw.StructureError, match=f"BatchNorm cannot be folded into {message}"):
        fw.fold_batchnorm(model)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("apply", "remove", "first"),
    [
        (parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight"), False),
        (parametrizations.spectral_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight"), False),
        (through_tanh, lambda layer: parametrize.remove_parametrizations(layer, "weight"), True),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, False),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight"), True),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight"), False),
    ],
    ids=["weight_norm", "spectral_norm", "tanh", "spectral_norm by hooks", "pruned before insertion", "pruned"],
)
def test_made_permanent_it_can_be_folded(apply, remove, first):
    model = small()
    if first:
        apply(model[0])
    trained(model, IMAGE)
    if not first:
        apply(model[0])
    model(torch.rand(IMAGE))
    remove(model.eval()[0])
    assert_same(fw.fold_batchnorm(model), model, torch.randn(IMAGE))


@pytest.mark.parametrize("read", [lambda c: c.weight.shape[0], lambda c: len(c.bias)])
def test_reading_shapes_does_no_harm(read):
    model = trained(TiedByCode(read), IMAGE)
    assert_same(fw.fold_batchnorm(model), model, torch.randn(IMAGE))


def test_subclasses_that_compute_the_same_are_folded():
    model = trained(nn.Sequential(Renamed(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), IMAGE)
    folded = fw.fold_batchnorm(model)
    assert type(folded[0]) is Renamed
    assert_same(folded, model, torch.randn(IMAGE))


def test_batchnorm_without_parameters_is_folded():
    model = trained(small(), IMAGE)
    for layer in (model[0], model[2]):
        layer.batchnorm.weight = layer.batchnorm.bias = None
    assert_same(fw.fold_batchnorm(model), model, torch.randn(IMAGE))


def test_what_is_not_the_network_is_refused(x):
    model = trained(small(), IMAGE)
    bounded = fw.BoundedModule(model, x)
    warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.1))
    for other in (bounded, warmup, engine.BoundedModule(small(), x), model.state_dict()):
        with pytest.raises(TypeError, match=f"found {type(other).__name__}: pass the nn.Module that insert_batch"):
            fw.fold_batchnorm(other)
    assert_same(fw.fold_batchnorm(bounded.wrapped), model, x)


# Export.


def ran(folder, x):
    (found,) = onnxruntime.InferenceSession(str(folder / "network.onnx")).run(None, {"input": x.numpy()})
    return torch.from_numpy(found)


def test_export_writes_the_folded_network(x, y, tmp_path):
    model = trained(networks.SmallResNet(), IMAGE)
    note = verification.export(model, x, y, 0.1, tmp_path)
    assert note.startswith("network.onnx is the folded network")
    assert f"# {note}\n" in (tmp_path / "abcrown.yaml").read_text()
    written = onnx.load(tmp_path / "network.onnx")
    assert "BatchNormalization" not in {node.op_type for node in written.graph.node}
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in written.graph.initializer}
    assert not any("batchnorm" in name for name in tensors)
    folded = fw.fold_batchnorm(model)
    for key in ("stem.weight", "stem.bias", "block1.conv1.weight", "hidden.bias"):  # To the bit: by us, in float64.
        assert torch.equal(tensors[key], folded.get_parameter(key)), key
    assert_same(lambda _: ran(tmp_path, x), model, x)


def test_export_of_what_cannot_be_folded_says_so(x, y, tmp_path):
    model = inserted(TiedByCode(lambda conv: conv.bias.view(1, -1, 1, 1))).eval()
    note = verification.export(model, x, y, 0.1, tmp_path)
    assert note.startswith("network.onnx contains the inserted BatchNorm: BatchNorm cannot be folded into 'conv'")
    assert f"# {note}\n" in (tmp_path / "abcrown.yaml").read_text()
    assert torch.allclose(ran(tmp_path, x), model(x), atol=1e-5)
    assert verification.export(networks.SmallResNet(batchnorm=True).eval(), x, y, 0.1, tmp_path) == ""


@pytest.mark.parametrize("foldable", [True, False])
def test_a_leading_normalize_of_images_is_handed_over_as_batchnorm(foldable, x, y, tmp_path):
    """The patches of another verifier refuse its constants; asymmetric ones show an error in either."""
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    if not foldable:
        inner = inserted(TiedByCode(lambda conv: conv.bias.view(1, -1, 1, 1)))
    model = nn.Sequential(fw.models.Normalize([0.3], [0.07]), inner).eval()
    note = verification.export(model, x, y, 0.1, tmp_path)
    assert note.startswith("network.onnx contains the inserted BatchNorm: ") is not foldable
    assert note.endswith("network.onnx has a BatchNorm in place of its Normalize, which changes rounding")
    assert "folded network" not in note
    kinds = [node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node]
    assert next(kind for kind in kinds if kind != "Constant") == "BatchNormalization"
    assert not {"Sub", "Div"} & set(kinds)
    assert torch.allclose(ran(tmp_path, x), model(x), rtol=1e-4, atol=1e-4)
    assert type(model[0]) is fw.models.Normalize


class Reading(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self[0].mean.sum()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(fw.models.Normalize([0.3, 0.2], [0.07, 2.0]), nn.Linear(2, 3)), (4, 2)),
        (Reading(fw.models.Normalize([0.3], [0.07]), nn.Conv2d(1, 2, 3), nn.Flatten()), (4, 1, 8, 8)),
    ],
    ids=["features", "read by other code"],
)
def test_another_normalize_is_handed_over_as_it_is(model, shape):
    other, note = verification.handover.handed_over(model.eval(), shape)
    assert (type(other[0]), note) == (fw.models.Normalize, "")
    assert other is not model


def test_one_mean_for_all_channels_is_handed_over_for_each():
    model = nn.Sequential(fw.models.Normalize([0.3], [0.07]), nn.Conv2d(3, 2, 3), nn.Flatten()).eval()
    x = torch.rand(4, 3, 8, 8)
    other, _ = verification.handover.handed_over(model, x.shape)
    assert len(other[0].running_mean) == 3
    assert torch.allclose(other(x), model(x), rtol=1e-4, atol=1e-4)


def test_export_compares_with_the_network_before_folding(x, y, tmp_path, monkeypatch):
    model = trained(networks.SmallResNet(), IMAGE)
    wrong = fw.fold_batchnorm(model)
    with torch.no_grad():
        wrong.head.bias.add_(0.1)
    monkeypatch.setattr(verification.handover, "fold_batchnorm", lambda _: wrong)
    with pytest.raises(ValueError, match="onnxruntime computes other logits than PyTorch"):
        verification.export(model, x, y, 0.1, tmp_path)


FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 2, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(162, 10))
"""


def test_the_command_prints_what_it_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factories.py").write_text(FACTORY)
    settings = preset("mnist5k").replace(model="factories.py:make", eps=0.1)
    architecture = {"model": settings.model, "in_shape": [1, 28, 28], "classes": 10, "width": 1, "hidden": 1}
    architecture |= {"batchnorm": True, "mean": None, "std": None}
    model = trained(build_network(architecture), (8, 1, 28, 28))
    save_model(tmp_path / "model.pt", model, architecture, settings, epoch=1)
    assert cli.main(["export", ".", "--trust", "--samples", "3", "990"]) == 0
    assert "network.onnx is the folded network" in capsys.readouterr().out
    x = torch.rand(2, 1, 28, 28)
    assert_same(lambda _: ran(tmp_path / "export", x), model, x)
