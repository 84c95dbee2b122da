"""Networks of several inputs, and a radius for each sample."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.verification import Journal, certified_radii, evaluate


class Fusion(nn.Module):
    """An image and a vector."""

    def __init__(self, batchnorm=True):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4) if batchnorm else nn.Identity()
        self.vector = nn.Linear(5, 12)
        self.joint, self.head = nn.Linear(36 + 12, 10), nn.Linear(10, 3)

    def forward(self, image, vector):
        image = self.norm(self.conv(image)).relu().flatten(1)
        return self.head(self.joint(torch.cat([image, self.vector(vector).relu()], 1)).relu())


class Indexed(nn.Module):
    """A vector, and an index that selects what is added to it."""

    def __init__(self):
        super().__init__()
        self.first, self.table, self.last = nn.Linear(6, 8), nn.Embedding(4, 8), nn.Linear(8, 3)

    def forward(self, x, index):
        return self.last((self.first(x) + self.table(index)).relu())


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(12, 1, 8, 8, generator=generator), torch.randn(12, 5, generator=generator)
    return x, torch.randint(3, (12,), generator=generator)


RANGES = ((0.0, 1.0), None)
EPS = (0.03, 0.1)


def fusion(data, **options):
    torch.manual_seed(0)
    (image, vector), _ = data
    return fw.BoundedModule(Fusion(**options), (image[:2], vector[:2]))


def trained(data, eps=EPS, steps=30):
    bounded = fusion(data)
    x, y = data
    warmup = fw.ShortWarmup(bounded, fw.SmoothedEpsilon(eps, 1, 2, 10), input_range=RANGES).train()
    optimizer = torch.optim.Adam(bounded.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        step = warmup(x, y)
        step.loss.backward()
        optimizer.step()
        warmup.step()
    return bounded.eval(), step


def corners(x, eps, ranges, generator):
    """Random points of the boxes, most of them corners."""
    moved = []
    for one, radius, limits in zip(x, eps, ranges, strict=True):
        side = torch.rand(one.shape, generator=generator).sub(0.5).mul(4).clamp(-1, 1)
        point = one + radius * side
        moved.append(point if limits is None else point.clamp(*limits))
    return moved


def test_training_lowers_the_loss_and_certificates_hold(data):
    x, y = data
    bounded, step = trained(data)
    assert step.loss < 1.0
    assert step.tightness.isnan()
    found = fw.verify(bounded, (x, y), EPS, ("IBP", "CROWN-IBP", "alpha-CROWN"), input_range=RANGES, float64=True)
    assert found.eps == list(EPS)
    certified = [one.index for one in found.certificates if one.verified]
    assert certified
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        predictions = bounded.wrapped(*corners(x, EPS, RANGES, generator)).argmax(1)
        assert torch.equal(predictions[certified], y[certified])


def test_errors_are_those_of_boxes_made_by_hand(data):
    x, y = data
    bounded, _ = trained(data)
    boxes = fw.input_box(x, EPS, RANGES)
    lower, _ = bounded.compute_bounds(x=boxes, C=margins(y, 3), method="IBP")
    proved = (lower > 0).all(1)
    found = evaluate(bounded, (x, y), EPS, input_range=RANGES, restarts=0)
    assert [one.verified for one in found.certificates] == proved.tolist()
    batches = [((x[0][i : i + 5], x[1][i : i + 5]), y[i : i + 5]) for i in range(0, 12, 5)]
    again = evaluate(bounded, batches, EPS, input_range=RANGES, restarts=0)
    for one, other in zip(
        again.certificates, found.certificates, strict=True
    ):  # Products of batches round differently.
        assert one.margin == pytest.approx(other.margin, rel=1e-5)
        assert replace(one, margin=0.0) == replace(other, margin=0.0)


def margins(y, classes):
    rows = [[F.one_hot(a, classes) - F.one_hot(b, classes) for b in torch.arange(classes) if b != a] for a in y]
    return torch.stack([torch.stack(row) for row in rows]).float()


def test_an_input_of_radius_0_is_not_perturbed(data):
    x, y = data
    bounded, _ = trained(data)
    point = fw.input_box(x, (0.0, 0.1), RANGES)
    lower, upper = point[0].ptb.x_L, point[0].ptb.x_U
    assert torch.equal(lower, upper)
    free = fw.verify(bounded, (x, y), (0.0, 0.1), ("IBP",), input_range=RANGES)
    both = fw.verify(bounded, (x, y), (0.03, 0.1), ("IBP",), input_range=RANGES)
    pairs = zip(free.certificates, both.certificates, strict=True)
    assert all(one.margin > two.margin for one, two in pairs)
    with pytest.raises(ValueError, match="eps must be above 0"):
        fw.verify(bounded, (x, y), (0.0, 0.0), input_range=RANGES)


def test_radii_and_inspection(data):
    x, y = data
    bounded, _ = trained(data)
    radii = certified_radii(bounded, (x, y), ("IBP",), input_range=RANGES, largest=0.5, tolerance=1e-3)
    assert any(one.radius > 0 for one in radii)
    generator = torch.Generator().manual_seed(0)
    eps = torch.tensor([one.radius for one in radii])
    for _ in range(100):
        each = (eps.view(-1, 1, 1, 1), eps.view(-1, 1))
        predictions = bounded.wrapped(*corners(x, each, RANGES, generator)).argmax(1)
        assert bool((predictions == y)[eps > 0].all())
    found = fw.inspect(bounded, x, EPS, input_range=RANGES)
    assert found.eps == 0.1
    assert [layer.name for layer in found.relus] == ["conv", "vector", "joint"]
    assert found.output is not None


def test_gradients_of_the_objective(data):
    x, y = data
    bounded = fusion(data, batchnorm=False).double()
    x = tuple(one.double() for one in x)
    warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(EPS), input_range=RANGES).train()
    weight = bounded.wrapped.vector.weight
    loss = warmup(x, y).loss
    (gradient,) = torch.autograd.grad(loss, weight)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        weight += step * direction
        above = warmup(x, y).loss
        weight -= 2 * step * direction
        below = warmup(x, y).loss
    assert float((gradient * direction).sum()) == pytest.approx(float((above - below) / (2 * step)), rel=1e-5)


def test_compiled_steps_are_the_eager_ones(data):
    x, y = data
    losses = []
    for compiled in (False, True):
        bounded = fusion(data)
        warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(EPS), input_range=RANGES, compile=compiled).train()
        step = warmup(x, y)
        step.loss.backward()
        if compiled:
            assert warmup._compiled._steps
        losses.append((step.loss.detach(), bounded.wrapped.vector.weight.grad))
    assert torch.allclose(losses[0][0], losses[1][0], rtol=1e-4)
    assert torch.allclose(losses[0][1], losses[1][1], rtol=1e-2, atol=1e-5)


def test_an_index_is_never_perturbed():
    torch.manual_seed(0)
    model = Indexed()
    x = torch.rand(8, 6), torch.arange(8) % 4
    example = x[0][:2], x[1][:2]
    if ENGINE_VERSION.startswith("0.7"):  # It cannot convert an embedding.
        with pytest.raises(NotImplementedError, match=r"module 'table' \(Embedding\)"):
            fw.BoundedModule(model, example, allow_untested=True)
        return
    bounded = fw.BoundedModule(model, example, allow_untested=True).eval()
    y = model(*x).argmax(1)
    found = fw.verify(bounded, (x, y), 0.02, ("IBP",))
    certified = [one.index for one in found.certificates if one.verified]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        point = (x[0] + 0.02 * (2 * torch.rand(x[0].shape, generator=generator) - 1)).clamp(0, 1)
        assert torch.equal(model(point, x[1]).argmax(1)[certified], y[certified])
    with pytest.raises(ValueError, match="integer input cannot be perturbed"):
        fw.verify(bounded, (x, y), (0.02, 1.0))
    with pytest.raises(ValueError, match="floating-point inputs only"):
        certified_radii(bounded, (x, y), ("IBP",))


def test_what_does_not_fit_is_refused(data):
    x, y = data
    bounded, _ = trained(data, steps=1)
    with pytest.raises(ValueError, match=r"2 input\(s\); found 3 values"):
        fw.verify(bounded, (x, y), (0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="wrapped for inputs of shape"):
        fw.verify(bounded, (x[::-1], y), EPS, input_range=RANGES)
    with pytest.raises(ValueError, match="one batch size"):
        fw.verify(bounded, ((x[0], x[1][:3]), y), EPS, input_range=RANGES)
    with pytest.raises(ValueError, match="input_range"):  # The vector is not within [0, 1].
        fw.verify(bounded, (x, y), EPS)
    with pytest.raises(ValueError, match="is only 1 wide"):
        fw.verify(bounded, (x, y), (8.0, 0.1), input_range=RANGES)


# A radius for each sample.


def single(data):
    torch.manual_seed(1)
    x = data[0][0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3))
    bounded = fw.BoundedModule(model, x[:2])
    return bounded, x, model(x).argmax(1)


def test_each_sample_has_its_own_certificate(data, tmp_path):
    bounded, x, y = single(data)
    bounded.eval()
    eps = torch.linspace(0.001, 0.05, 12).view(-1, 1, 1, 1)
    options = {"restarts": 1, "batch_size": 5}
    together = fw.verify(bounded, (x, y), eps, **options)
    assert together.eps == pytest.approx(eps.flatten().tolist())
    for index, one in enumerate(together.certificates):
        radius = float(eps[index])
        alone = fw.verify(bounded, (x[index : index + 1], y[index : index + 1]), radius, restarts=1)
        assert (one.verified, one.method) == (alone.certificates[0].verified, alone.certificates[0].method)
        assert one.margin == pytest.approx(alone.certificates[0].margin, abs=1e-5)
        assert one.eps == pytest.approx(radius)
    batches = [(x[i : i + 5], y[i : i + 5], eps[i : i + 5]) for i in range(0, 12, 5)]
    assert fw.verify(bounded, batches, None, **options).certificates == together.certificates
    journal = tmp_path / "journal"
    for _ in range(2):
        again = fw.verify(bounded, (x, y), eps, journal=Journal(journal), **options)
        assert again.certificates == together.certificates
    other = fw.verify(bounded, (x, y), eps.flip(0), journal=Journal(journal), **options)
    assert other.certificates != together.certificates
    rows = [float(row["eps"]) for row in together.rows()]
    assert rows == pytest.approx(eps.flatten().tolist())
    assert "eps 0.001 to 0.05" in str(together)


def test_a_step_with_a_radius_per_sample(data):
    bounded, x, y = single(data)
    warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.1), regularizers=()).train()
    eps = torch.linspace(0.001, 0.05, 12).view(-1, 1, 1, 1)
    together = warmup(x, y, max_eps=eps)
    alone = [warmup(x[i : i + 1], y[i : i + 1], max_eps=float(eps[i])).robust_loss.detach() for i in range(12)]
    assert float(together.robust_loss.detach()) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5)
    assert float(together.eps) == pytest.approx(0.05)


def test_a_vector_is_one_radius_per_channel_and_never_per_sample(data):
    bounded, x, y = single(data)
    bounded.eval()
    with pytest.raises(ValueError, match="one value per channel"):
        fw.verify(bounded, (x, y), torch.full((12,), 0.01))


@pytest.mark.parametrize(("count", "message"), [(11, "radii for 11 samples only"), (13, "found 12 samples")])
def test_as_many_radii_as_samples(data, count, message):
    bounded, x, y = single(data)
    bounded.eval()
    with pytest.raises(ValueError, match=message):
        fw.verify(bounded, (x, y), torch.full((count, 1, 1, 1), 0.01), ("IBP",), restarts=0)


def test_no_radius_and_a_radius_of_0(data):
    bounded, x, y = single(data)
    bounded.eval()
    with pytest.raises(ValueError, match="there is no radius"):
        fw.verify(bounded, (x, y), None)
    eps = torch.full((12, 1, 1, 1), 0.01)
    eps[3] = 0
    with pytest.raises(ValueError, match="eps is 0 for some samples"):
        fw.verify(bounded, (x, y), eps)


def test_every_combination_of_given_forms(data):
    """Pairs and batches, tuples and lists, of one and of two inputs."""
    bounded, _ = trained(data)
    x, y = data
    forms = [(x, y), [list(x), y], [((x[0], x[1]), y)], iter([(list(x), y)])]
    found = [fw.verify(bounded, form, EPS, ("IBP",), input_range=RANGES, restarts=0).certificates for form in forms]
    assert all(one == two for one, two in itertools.pairwise(found))
