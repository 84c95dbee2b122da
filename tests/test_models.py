from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import models
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import network

BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d)
AFFINE = (nn.Conv2d, nn.Linear)

# With and without BatchNorm, for 1×28×28 and 10 classes, 3×32×32 and 10, 3×64×64 and 200.
PARAMETERS = {
    "cnn7": [(13_259_338, 13_257_290), (17_192_650, 17_190_602), (17_290_120, 17_288_072)],
    "wide-resnet8": [(17_615_434, 17_609_002), (21_547_882, 21_541_450), (91_424_776, 91_417_000)],
    "resnext": [(13_677_706, 13_671_178), (17_611_018, 17_604_490), (16_981_960, 16_978_664)],
}
DATA = [((1, 28, 28), 10), ((3, 32, 32), 10), ((3, 64, 64), 200)]


def layers_by_hand(name, in_shape):
    """(inputs, outputs, kernel area, groups) of the convolutions, and the features after them; from the paper."""
    channels, size, _ = in_shape
    large = size >= 64
    if name == "cnn7":
        outs = [64, 64, 128, 128, 128]
        side = size // (4 if large else 2)
        return [(i, o, 9, 1) for i, o in zip([channels, *outs[:-1]], outs, strict=True)], 128 * side**2
    side = size // 4
    if name == "wide-resnet8":
        convolutions = [(channels, 16, 9, 1)]
        before = 16
        for out in (160, 320, 640) if large else (128, 256, 512):
            convolutions += [(before, out, 9, 1), (out, out, 9, 1), (before, out, 1, 1)]
            before = out
        return convolutions, before * side**2
    before = 16 if large else 64
    convolutions = [(channels, before, 9, 1)]
    for bottleneck in (8, 16, 32) if large else (32, 64, 128):
        for block in range(2 if large else 1):
            inner = 2 * bottleneck
            convolutions += [(before, inner, 1, 1), (inner, inner, 9, 2), (inner, 2 * inner, 1, 1)]
            # Only the first block of a stage changes the shape, and so has a convolution as its shortcut.
            if block == 0:
                convolutions.append((before, 2 * inner, 1, 1))
            before = 2 * inner
    return convolutions, before * side**2


@pytest.mark.parametrize("data", range(3))
@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_papers_size(name, data):
    (in_shape, classes), pinned = DATA[data], PARAMETERS[name][data]
    convolutions, features = layers_by_hand(name, in_shape)
    plain = sum((i // groups * area + 1) * o for i, o, area, groups in convolutions)
    plain += (features + 1) * 512 + 513 * classes
    norms = 2 * (sum(o for _, o, _, _ in convolutions) + 512)
    assert pinned == (plain + norms, plain)
    for batchnorm, count in zip((True, False), pinned, strict=True):
        with torch.device("meta"):
            model = models.build(name, in_shape, classes, batchnorm=batchnorm)
            assert model(torch.empty(2, *in_shape)).shape == (2, classes)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        found = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert [
            (c.in_channels, c.out_channels, c.kernel_size[0] * c.kernel_size[1], c.groups) for c in found
        ] == convolutions


def small(name, in_shape=(1, 12, 12), classes=3, **arguments):
    return models.MODELS[name](in_shape, classes, 2, 6, **arguments)


@pytest.mark.parametrize("name", models.MODELS)
def test_batchnorm_comes_after_all_but_the_last(name):
    model = small(name)
    affine = [module for module in model.modules() if isinstance(module, AFFINE)]
    assert sum(isinstance(module, BATCHNORM) for module in model.modules()) == len(affine) - 1
    assert all(module.bias is not None for module in affine)
    leaves = [module for module in model.modules() if not list(module.children())]
    for layer, after in itertools.pairwise(leaves):
        if isinstance(layer, AFFINE):
            assert isinstance(after, BATCHNORM)
            assert after.num_features == layer.weight.shape[0]
    assert leaves[-1] is affine[-1]
    bare = small(name, batchnorm=False)
    assert not any(isinstance(module, BATCHNORM) for module in bare.modules())
    assert all(module.bias is not None for module in bare.modules() if isinstance(module, AFFINE))
    # Nothing is left to insert.
    assert fw.insert_batchnorm(model, torch.zeros(2, 1, 12, 12)) == []


@pytest.mark.parametrize("name", models.MODELS)
def test_networks_without_batchnorm_get_it_inserted(name):
    model = small(name, batchnorm=False)
    inserted = fw.insert_batchnorm(model, torch.zeros(2, 1, 12, 12))
    affine = [module_name for module_name, module in model.named_modules() if isinstance(module, AFFINE)]
    # Nothing had BatchNorm behind it or behind its sum, so that every layer, of either branch, gets its own.
    assert sorted(inserted) == sorted(affine[:-1])
    count = sum(isinstance(module, BATCHNORM) for module in model.modules())
    assert count == sum(isinstance(module, BATCHNORM) for module in small(name).modules())


@pytest.mark.parametrize(("size", "batchnorm"), [(12, True), (12, False), (64, True)])
@pytest.mark.parametrize("name", models.MODELS)
def test_bounds_contain_the_outputs_at_points_of_the_box(name, size, batchnorm):
    model = small(name, (3, size, size), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1), batchnorm=batchnorm).train()
    x = torch.rand(4, 3, size, size)
    model(x)
    model.eval()
    bounded = fw.BoundedModule(model, x)
    fw.ibp_init_(bounded)
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.05),), method="IBP")
    for _ in range(20):
        output = model((x + 0.05 * (2 * torch.rand_like(x) - 1)).clamp(0, 1))
        assert bool(((output >= lower - 1e-4) & (output <= upper + 1e-4)).all())


def test_cnn7_layers():
    model = fw.models.cnn7((1, 28, 28), 10, width=8, hidden=64)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [
        *((1, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1))
    ]
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(("name", "groups"), [("wide-resnet8", {1}), ("resnext", {1, 2})])
def test_residual_networks_have_strides_shortcuts_and_groups(name, groups):
    model = small(name)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {c.groups for c in convolutions} == groups
    blocks = [m for m in model if hasattr(m, "branch")]
    assert len(blocks) == 3
    strides = [[c.stride[0] for c in block.branch.modules() if isinstance(c, nn.Conv2d)] for block in blocks]
    first, second = ([1, 1], [2, 1]) if name == "wide-resnet8" else ([1, 1, 1], [1, 2, 1])
    assert strides == [first, second, second]
    # Seen from outside, a block is its branch and its shortcut, and nothing below 0.
    x = torch.randn(2, blocks[1].shortcut[0].in_channels, 6, 6)
    block = blocks[1].eval()
    assert torch.equal(block(x), (block.branch(x) + block.shortcut(x)).clamp(min=0))
    large = [m for m in small(name, (3, 64, 64)) if hasattr(m, "branch")]
    assert [type(block.shortcut).__name__ == "Identity" for block in large] == (
        [False] * 3 if name == "wide-resnet8" else [False, True] * 3
    )


def test_normalisation_is_the_first_layer():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    x = torch.rand(2, 3, 32, 32)
    shape = (1, 3, 1, 1)
    expected = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    for name in models.MODELS:
        model = small(name, (3, 32, 32), mean=mean, std=std)
        assert torch.allclose(model[0](x), expected)
        assert not isinstance(small(name)[0], fw.models.Normalize)


@pytest.mark.parametrize("name", models.MODELS)
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=r"sizes must be positive.*width=0"):
        models.MODELS[name]((1, 28, 28), 10, width=0)
    with pytest.raises(ValueError, match=r"images \(channels, height, width\), .*found in_shape=\(28, 28\)"):
        models.MODELS[name]((28, 28), 10)
    with pytest.raises(ValueError, match="mean and std together"):
        small(name, mean=(0.5,))
    with pytest.raises(ValueError, match=r"3 channel\(s\) need as many means"):
        small(name, (3, 12, 12), mean=(0.5,), std=(0.2,))
    with pytest.raises(ValueError, match="one positive std per channel"):
        fw.models.Normalize([0.5], [0.0])


# Networks by name

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=5, width=3):
        super().__init__()
        self.hidden, self.out = nn.LazyLinear(width), nn.Linear(width, num_classes)

    def forward(self, x):
        if not self.training:
            torch.rand(1)
        return self.out(torch.relu(self.hidden(x.flatten(1))))

def everything(in_shape, classes, *, width=7, hidden, batchnorm, mean, std, **kwargs):
    net = nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], classes))
    net.given = (width, hidden, batchnorm, mean, std, kwargs)
    return net

def nothing():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def positional(classes, /):
    return nothing()

def needy(layers, classes):
    return nothing()

def text():
    return "net"

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm2d(1), nn.BatchNorm2d(1).eval()
        self.out = nn.Linear(64, 3)

    def forward(self, x):
        assert not self.norm.training
        return self.out(self.frozen(self.norm(x + 5)).flatten(1))

instance = nothing()
number = 3

class inner:
    factory = nothing
"""


@pytest.fixture(autouse=True)
def _factories(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "broken_module.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "broken_syntax.py").write_text("def net(:")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_factory_is_given_what_it_names():
    model = models.build("factories:everything", (1, 8, 8), 3, hidden=9, batchnorm=False, mean=(0.1,), std=(0.2,))
    assert model.given == (7, 9, False, (0.1,), (0.2,), {})
    assert models.build("factories:everything", (1, 8, 8), 3, width=4).given[0] == 4
    net = models.build("factories:Net", (1, 8, 8), 3)
    assert (net.hidden.in_features, net.hidden.out_features, net.out.out_features) == (64, 3, 3)
    assert isinstance(models.build("factories:nothing", (1, 8, 8), 3), nn.Sequential)
    assert isinstance(models.build("factories:inner.factory", (1, 8, 8), 3), nn.Sequential)


def test_a_factory_may_be_named_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    path = tmp_path / "nets" / "torch.py"  # Its stem may be the name of another module.
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom factories import *\n"
        "@dataclasses.dataclass\nclass Config:\n    width: int = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("nets/torch.py", str(path)):
        net = models.build(f"{name}:Net", (1, 8, 8), 3)
        assert (net.hidden.in_features, net.out.out_features) == (64, 3)
        assert isinstance(models.build(f"{name}:inner.factory", (1, 8, 8), 3), nn.Sequential)
    assert sys.modules["torch"] is torch
    with pytest.raises(ImportError, match=r"the file 'nets/torch\.py' has no 'other', named by"):
        models.build("nets/torch.py:other", (1, 8, 8), 3)
    with pytest.raises(TypeError, match=r"'nets/torch\.py:number' is of type int"):
        models.find_factory("nets/torch.py:number")
    for _ in range(2):  # A failed import leaves nothing behind.
        with pytest.raises(ImportError, match=r"the file 'broken_module\.py' of .*a file as its path") as caught:
            models.build("broken_module.py:net", (1, 8, 8), 3)
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_saved_network_keeps_the_file_that_it_was_made_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = preset("mnist5k").replace(model="factories.py:Net", width=4)
    architecture = {"model": settings.model, "in_shape": [1, 8, 8], "classes": 3, "width": 4, "hidden": 6}
    architecture |= {"batchnorm": False, "mean": None, "std": None}
    network.save_model(tmp_path / "model.pt", network.build_network(architecture), architecture, settings, epoch=1)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["architecture"] == architecture
    assert network.load_model(tmp_path / "model.pt", trust=True).hidden.out_features == 4


def test_the_check_does_not_shift_the_callers_random_numbers():
    torch.manual_seed(0)
    net = models.build("factories:Net", (1, 8, 8), 3)
    after = torch.get_rng_state()
    from factories import Net

    # The check fills in the lazy layer and draws a number of its own, neither of which a factory alone does.
    torch.manual_seed(0)
    alone = Net(3)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(alone.out.weight, net.out.weight)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_check_restores_the_mode_of_every_module():
    net = models.build("factories:Modes", (1, 8, 8), 3)
    assert [module.training for module in (net, net.norm, net.frozen, net.out)] == [True, True, False, True]
    assert net.norm.running_mean.item() == 0
    assert net.norm.num_batches_tracked.item() == 0


@pytest.mark.parametrize("name", models.MODELS)
def test_known_networks_draw_what_their_function_draws(name):
    torch.manual_seed(0)
    built = models.build(name, (1, 12, 12), 3, width=2, hidden=6)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    direct = small(name)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), direct.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "cnn8",
            ValueError,
            "unknown network 'cnn8'; known are cnn7, wide-resnet8, resnext, or .*package.module:factory",
        ),
        ("no.such.module:net", ImportError, r"'no\.such\.module:net' cannot be imported.*path"),
        ("folder/factories:net", ImportError, "cannot be imported.*Write a module with dots"),
        ("folder/factories.py:net", ImportError, r"the file .*\(FileNotFoundError.*a file as its path"),
        (":net", ImportError, "module '' of the network ':net' cannot be imported"),
        ("broken_syntax:net", ImportError, "cannot be imported .SyntaxError.*imported by itself"),
        ("broken_module:net", ImportError, "a_package_that_is_not_there"),
        ("factories:other", ImportError, "module 'factories' has no 'other'"),
        ("factories:", ImportError, "has no ''"),
        ("factories:instance", TypeError, "is of type Sequential, and every run needs a fresh network"),
        ("factories:number", TypeError, "is of type int, and every run needs a fresh network: name a function"),
        ("factories:needy", TypeError, "missing a required argument: 'layers'.*give all but in_shape, classes.*width"),
        ("factories:positional", TypeError, "argument: 'classes'.*give all but in_shape, .* a default"),
        ("factories:text", TypeError, "returned an object of type str, not an nn.Module"),
        ("factories:pair", ValueError, r"network's output is of type tuple.*'factories:pair'.*\(batch, 3\)"),
    ],
)
def test_factories_that_do_not_fit_are_told(name, kind, message):
    with pytest.raises(kind, match=message):
        models.build(name, (1, 8, 8), 3)


@pytest.mark.parametrize("name", ["broken_module:net", "broken_syntax:net"])
def test_the_cause_of_a_failed_import_is_kept(name):
    with pytest.raises(ImportError) as caught:
        models.build(name, (1, 8, 8), 3)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError | SyntaxError)


def test_other_classes_and_inputs_are_told():
    with pytest.raises(ValueError, match=r"the dataset has 4 classes, the network's output is \(2, 3\)"):
        models.build("factories:nothing", (1, 8, 8), 4)
    with pytest.raises(
        ValueError, match=r"cannot be run on a batch of 2 input\(s\) of shape \(1, 9, 9\).*mat1"
    ) as caught:
        models.build("factories:nothing", (1, 9, 9), 3)
    assert isinstance(caught.value.__cause__, RuntimeError)
