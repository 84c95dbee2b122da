"""What changes after a network was wrapped is followed or refused; so is what bounds do not describe."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine import bounds
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.tracing import TracedPathWarning
from lirpa_fastwarmup.recipe.compiled import CompiledSteps
from lirpa_fastwarmup.verification import Journal, evaluate


def perceptron(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(16, 32), *([nn.BatchNorm1d(32)] if norm else []), nn.ReLU(), nn.Linear(32, 3)]
    return nn.Sequential(*layers)


def images(count=20):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def negated(net):
    state = {name: -value if value.is_floating_point() else value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def slower_norm(net):
    net[2].eps = 10.0


def other_activation(net):
    net[3] = nn.Tanh()


@pytest.mark.parametrize("change", [negated, slower_norm, other_activation])
def test_a_journal_serves_no_certificates_of_another_network(change, tmp_path):
    net, x = perceptron(norm=True).eval(), images()
    y = net(x).argmax(1)
    bounded = fw.BoundedModule(net, x[:2])

    def certified(journal=None):
        return [one.verified for one in fw.verify(bounded, (x, y), 0.01, restarts=0, journal=journal).certificates]

    before = certified(Journal(tmp_path / "journal"))
    change(net.eval())
    net.eval()
    assert certified(Journal(tmp_path / "journal")) == certified() != before


@pytest.mark.filterwarnings("ignore:divide by zero")  # Of the engine, for norm 1.
@pytest.mark.parametrize("norm", [1.0, 2.0])
@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
def test_balls_of_other_norms_are_refused(norm, method):
    x = images(2)
    bounded = fw.BoundedModule(nn.Sequential(nn.ReLU6(), nn.Flatten(), nn.Linear(16, 3)).eval(), x)
    ball = engine.BoundedTensor(x, engine.PerturbationLpNorm(norm=norm, eps=1.0))
    with pytest.raises(NotImplementedError, match="have not been tested, and some would be of radius 0"):
        bounded.compute_bounds(x=(ball,), method=method)


def test_an_engine_module_whose_network_changed_is_followed_or_refused():
    net, x = perceptron(norm=True).eval(), images()
    plain = engine.BoundedModule(net, x[:2])
    plain.eval()
    y = plain(x).argmax(1)
    assert fw.verify(plain, (x, y), 0.002, restarts=0).certificates
    net[2].eps = 10.0
    found = fw.verify(plain, (x, y), 0.002, restarts=0).certificates
    assert torch.equal(plain(x), net(x))
    assert [one.prediction for one in found] == plain(x).argmax(1).tolist()
    negated(net)
    with pytest.raises(ValueError, match="does not hold the parameter"):
        fw.verify(plain, (x, y), 0.002, restarts=0)


def test_a_check_of_an_engine_module_keeps_its_last_pass():
    net, x = perceptron(norm=True).eval(), images()
    plain = engine.BoundedModule(net, x)
    plain.eval()
    y = plain(x).argmax(1)
    assert evaluate(plain, (x, y), 0.01, restarts=0).certificates
    plain.compute_bounds(x=(engine_box(x, 0.02),), method="IBP")
    expected = plain.compute_bounds(x=None, method="CROWN", IBP=False)
    plain.compute_bounds(x=(engine_box(x, 0.02),), method="IBP")
    evaluate(plain, (x, y), 0.01, restarts=0)
    found = plain.compute_bounds(x=None, method="CROWN", IBP=False)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    net.double()
    plain.double()
    assert evaluate(plain, (x.double(), y), 0.01, restarts=0).certificates


def engine_box(x, eps):
    return engine.BoundedTensor(x, engine.PerturbationLpNorm(norm=float("inf"), eps=eps))


def test_other_norms_on_the_engines_own_module_keep_their_bounds():
    x = torch.rand(4, 8)
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    plain = engine.BoundedModule(net, x)
    plain.eval()

    def width():
        ball = engine.BoundedTensor(x, engine.PerturbationLpNorm(norm=2.0, eps=1.0))
        lower, upper = plain.compute_bounds(x=(ball,), method="IBP")
        return upper - lower

    before = width()
    fw.share_batchnorm_state(plain, net)
    assert torch.allclose(width(), before)
    assert bool((before > 0).all())


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(4096, 4), nn.Linear(8, 3)

    def forward(self, x, index):
        return self.last(torch.cat([x, self.table(index)], 1))


@pytest.mark.skipif(not engine.__version__.startswith("0.3"), reason="0.7 has no embeddings")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_no_indices(dtype):
    torch.manual_seed(0)
    net, x = Indexed().eval(), torch.rand(20, 4).to(dtype)
    index = torch.randint(2049, 4096, (20,)) // 2 * 2 + 1
    bounded = fw.BoundedModule(net, (x[:2].float(), index[:2]))
    y = net(x.float(), index).argmax(1)
    assert fw.verify(bounded, ((x, index), y), eps=0.01, restarts=0).standard_error.count == 0


def test_samples_that_rounding_moves_are_refused():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(-1e9 - 64)
        net[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
        net[1].bias.copy_(torch.tensor([20.0, 0.0]))
    x, y = torch.tensor([[1e9 + 33.0]], dtype=torch.float64), torch.tensor([0])
    bounded = fw.BoundedModule(net, x.float())
    with pytest.raises(ValueError, match="moves them by up to 31"):
        fw.verify(bounded, (x, y), 10.0, input_range=None)
    with pytest.raises(ValueError, match="moves them by up to 31"):
        fw.verification.certified_radii(bounded, (x, y), input_range=None, largest=100.0, tolerance=1.0)
    exact = fw.BoundedModule(copy.deepcopy(net).double(), x)
    for function in (fw.verify, evaluate):
        assert function(exact, (x, y), 10.0, input_range=None).verified_error.count == 1


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("gain", torch.tensor(1.0))

    def forward(self, x):
        return self.fc((x - 0.5) * self.gain.item())


def test_buffers_that_the_trace_holds_as_numbers_must_not_change():
    net, x = Gain().eval(), torch.rand(4, 4)
    bounded = fw.BoundedModule(net, x)
    bounded(x)
    state = net.state_dict() | {"gain": torch.tensor(100.0)}
    with pytest.raises(ValueError, match="reads its buffer 'gain' in Python, and it has changed"):
        bounded.load_state_dict(state)
    with pytest.raises(ValueError, match="reads its buffer 'gain'"):
        bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    again = fw.BoundedModule(net, x)
    assert torch.allclose(again(x), net(x))


class Reading(nn.Module):
    """Reads a buffer in Python, and may change it."""

    def __init__(self, value, change):
        super().__init__()
        self.fc, self.change = nn.Linear(4, 2), change
        self.register_buffer("state", torch.tensor(value))

    def forward(self, x):
        state = self.state.item()
        self.change(self.state)
        return self.fc(x) if state != 12345 else x


def test_a_buffer_that_marks_an_absent_value_is_a_constant():
    x = torch.rand(4, 4)
    bounded = fw.BoundedModule(Reading(float("nan"), lambda state: None), x)
    assert bounded.to(torch.float64)(x.double()).shape == (4, 2)


@pytest.mark.parametrize(
    ("value", "change"), [(0, lambda s: s.add_(1)), (False, lambda s: None if s else s.fill_(True))]
)
def test_buffers_that_the_network_itself_changes_are_reported(value, change):
    x = torch.rand(4, 4)
    with pytest.warns(TracedPathWarning, match="buffer 'state'"):
        bounded = fw.BoundedModule(Reading(value, change), x)
    assert bounded(x).shape == (4, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.last(F.relu(self.two(F.relu(self.one(x)))))


def test_weights_that_are_no_longer_tied_are_refused():
    net, x = Tied(), torch.rand(4, 8)
    bounded = fw.BoundedModule(net, x)
    bounded.to(torch.float64).to(torch.float32)
    bounded(x)
    net.two.weight = nn.Parameter(net.one.weight.detach() * 2)
    with pytest.raises(ValueError, match=r"was shared by several modules .* and is no longer"):
        bounded(x)
    assert torch.allclose(fw.BoundedModule(net, x)(x), net(x))


def test_autocast_does_not_round_bounds():
    net, x = perceptron().eval(), images()
    bounded, box = fw.BoundedModule(net, x[:2]), fw.input_box(images(), 1e-4)
    expected = bounded.compute_bounds(x=(box,), method="IBP")
    with torch.autocast("cpu", torch.bfloat16):
        found = bounded.compute_bounds(x=(box,), method="IBP")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def forward(self, x):
        return self.last(F.relu(F.batch_norm(self.first(x), self.mean, self.var, training=self.training)))


def test_a_functional_batchnorm_moves_its_statistics_as_a_module_does():
    torch.manual_seed(0)
    own, x, y = OwnNorm(), torch.rand(16, 8), torch.arange(16) % 3
    module = nn.Sequential(own.first, nn.BatchNorm1d(16, affine=False), nn.ReLU(), own.last)
    bounded = fw.BoundedModule(own, x).train()
    bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    assert torch.equal(own.mean, torch.zeros(16))
    loss = fw.losses.MTLIBP(0.5, fw.attacks.PGD(steps=3, step_size=0.5))
    for net in (own, module):
        torch.manual_seed(0)
        warmup = fw.ShortWarmup(fw.BoundedModule(net, x), fw.ConstantEpsilon(0.05), loss=loss, regularizers=())
        warmup.train()
        warmup(x, y)
    assert torch.allclose(own.mean, module[1].running_mean)
    assert torch.allclose(own.var, module[1].running_var)


def test_frozen_statistics_stay():
    net, x = perceptron(norm=True), images()
    net[2].track_running_stats = False
    bounded = fw.BoundedModule(net, x[:2]).train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    assert torch.allclose(bounded(x), net(x), atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


class Frozen(nn.BatchNorm1d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def test_a_batchnorm_with_a_mode_of_its_own_is_reported():
    net = nn.Sequential(nn.Linear(8, 16), Frozen(16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.warns(TracedPathWarning, match="something else in training mode"):
        fw.BoundedModule(net, torch.rand(4, 8))


def test_a_compiled_step_follows_attributes_of_batchnorm(monkeypatch):
    monkeypatch.setattr(CompiledSteps.__init__, "__kwdefaults__", {"batch_size": None, "backend": "eager"})
    found = []
    for compiled in (False, True):
        net, x, y = perceptron(norm=True), images(16), torch.arange(16) % 3
        warmup = fw.ShortWarmup(fw.BoundedModule(net, x), fw.ConstantEpsilon(0.05), compile=compiled, regularizers=())
        warmup.train()
        warmup(x, y)
        net[2].momentum, net[2].eps = 0.9, 1.0
        found.append((float(warmup(x, y).loss.detach()), net[2].running_mean.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.eps = [1e-5]  # Of another meaning than BatchNorm's, and not hashable.


def test_only_batchnorm_has_attributes_that_recordings_depend_on(monkeypatch):
    monkeypatch.setattr(CompiledSteps.__init__, "__kwdefaults__", {"batch_size": None, "backend": "eager"})
    net, x, y = nn.Sequential(nn.Flatten(), Scaled(16, 8), nn.ReLU(), nn.Linear(8, 3)), images(16), torch.arange(16) % 3
    warmup = fw.ShortWarmup(fw.BoundedModule(net, x), fw.ConstantEpsilon(0.05), compile=True, regularizers=())
    warmup.train()
    for _ in range(2):
        warmup(x, y)
    assert len(warmup._compiled._steps) == 1


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.back, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        with torch.no_grad():
            h = F.relu(self.back(x.flatten(1)))
        return self.head(h)


def test_networks_without_gradients_are_verified():
    torch.manual_seed(0)
    net, x = Backbone().eval(), images(8)
    y = net(x).argmax(1)
    bounded = fw.BoundedModule(net, x)
    assert fw.verify(bounded, (x, y), 0.001).certificates
    assert evaluate(bounded, (x, y), 0.001).certificates
    assert fw.verify(fw.BoundedModule(net.requires_grad_(False), x), (x, y), 0.001).certificates


def test_random_relus_are_reported():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.RReLU(), nn.Linear(8, 3))
    with pytest.warns(TracedPathWarning, match="something else in training mode"):
        fw.BoundedModule(net, images(2))


def test_a_step_that_falls_back_counts_its_batch_once(monkeypatch):
    net, x, y = perceptron(norm=True), images(16), torch.arange(16) % 3
    warmup = fw.ShortWarmup(fw.BoundedModule(net, x), fw.SmoothedEpsilon(0.1, 2, 2, 4), compile=True)
    warmup.train()
    step = warmup._compute

    def infinite(*args):
        values = step(*args)
        return values | {"loss": values["loss"] / 0}

    def recorded(function, key, x, y, eps, *rest, starts=()):
        return infinite(function.args[0], fw.input_box(x, eps), x, y, eps, *rest, *starts)

    monkeypatch.setattr(warmup._compiled, "run", recorded)
    assert warmup(x, y).loss.isfinite()
    assert warmup.fraction == 0
    assert int(net[2].num_batches_tracked) == 1


@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (3, 3, 4, 3)])
def test_a_small_box_of_one_size_with_a_radius_per_channel(shape):
    torch.manual_seed(0)
    x, y, eps = torch.rand(*shape), torch.zeros(shape[0], dtype=torch.int64), torch.tensor([0.01, 0.1, 0.2])
    bounded = fw.BoundedModule(nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)), x).train()
    box = fw.input_box(x, eps)
    step = fw.losses.LossStep(bounded, x, y, bounded(x), box, eps)
    lower, upper = fw.losses.SABR(0.4, scalar=True).small_box(step, x)
    assert bool((lower >= box.ptb.x_L - 1e-6).all())
    assert bool((upper <= box.ptb.x_U + 1e-6).all())
    inside = (x > 0.2) & (x < 0.8)
    width = (0.8 * eps.view(1, 3, 1, 1)).expand_as(x)
    assert torch.allclose((upper - lower)[inside], width[inside], atol=1e-6)


def test_an_input_that_is_not_perturbed_stays_so_while_regularisers_are_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x, z):
            return self.last(F.relu(self.a(x) + self.b(z)))

    x, z, y = torch.rand(6, 4), torch.rand(6, 4), torch.arange(6) % 3
    bounded = fw.BoundedModule(Two(), (x, z)).train()
    warmup = fw.ShortWarmup(bounded, fw.SmoothedEpsilon((0.1, 0.0), 1, 2, 4), regularizers=("tightness",))
    seen = []
    original = bounds.input_box

    def watched(*args):
        box = original(*args)
        seen.append(box.ptb.x_U - box.ptb.x_L)
        return box

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "input_box", watched)
        warmup((x, z), y)
    (width,) = seen
    assert bool((width[:, :4] > 0).all())
    assert bool((width[:, 4:] == 0).all())


def test_copies_keep_what_was_set():
    bounded = fw.BoundedModule(perceptron(norm=True), images(2)).join_ranks()
    bounded.radius_dtype = torch.bfloat16
    other = copy.deepcopy(bounded)
    assert other.over_ranks
    assert other.radius_dtype == torch.bfloat16
    nodes = [node for node in other._modules.values() if hasattr(node, "owner")]
    assert nodes
    assert all(node.over_ranks for node in nodes)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_an_offset_that_logits_share_is_no_contradiction(offset):
    net, x = perceptron().eval(), images(30)
    with torch.no_grad():
        net[3].bias += offset
    y = net(x).argmax(1)
    bounded = fw.BoundedModule(net, x[:2])
    assert fw.verify(bounded, (x, y), 0.001, ("IBP", "CROWN-IBP", "CROWN")).certificates
    assert evaluate(bounded, (x, y), 0.001).certificates


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("certify", [fw.verify, evaluate])
def test_networks_in_half_precision_are_refused(certify, dtype):
    net, x = perceptron().eval().to(dtype), images(4).to(dtype)
    bounded = fw.BoundedModule(net, x)
    with pytest.raises(TypeError, match=r"certificates are of float32 or float64 networks; '1\.weight' is"):
        certify(bounded, (x, torch.zeros(4, dtype=torch.int64)), 0.01)


def test_inference_mode_is_refused():
    net, x = perceptron().eval(), images(4)
    bounded = fw.BoundedModule(net, x)
    for certify in (fw.verify, evaluate):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="call this outside of it"):
            certify(bounded, (x, net(x).argmax(1)), 0.01)
