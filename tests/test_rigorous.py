"""Certificates that hold in floating point: against exact rational arithmetic, and float32 sums in any order."""

import copy
import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.verification.intervals import Interval, UnknownOperatorError
from lirpa_fastwarmup.verification.rigorous import RigorousMargins, box_around
from tests.networks import SmallResNet, TwoInputs, convolutional

ROOT_BITS = 600


def fraction_root(value: Fraction) -> Fraction:
    """The square root, to far more digits than any bound has."""
    scaled = (value.numerator << ROOT_BITS) // value.denominator
    return Fraction(math.isqrt(scaled << ROOT_BITS), 1 << ROOT_BITS)


def fractions_of(tensor) -> np.ndarray:
    return np.vectorize(lambda value: Fraction(float(value)), otypes=[object])(tensor.detach().double().numpy())


def matrix_of(function, shape) -> np.ndarray:
    """The matrix of a linear function whose columns have one product each, and are therefore exact."""
    count = math.prod(shape)
    return fractions_of(function(torch.eye(count, dtype=torch.float64).view(count, *shape)).flatten(1)).T


def exact(module, x, shape):
    """The output of ``module`` at ``x``, an array of fractions, and its shape; in exact arithmetic."""
    if isinstance(module, nn.Sequential):
        for child in module:
            x, shape = exact(child, x, shape)
        return x, shape
    if isinstance(module, SmallResNet):
        raise NotImplementedError
    plain = copy.deepcopy(module).double()
    after = plain.eval()(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
    if isinstance(module, nn.Linear | nn.Conv2d):
        bias = fractions_of(plain.bias if plain.bias is not None else torch.zeros(after[0]))
        plain.bias = None
        found = matrix_of(plain, shape) @ x
        return found + np.repeat(bias, len(found) // len(bias)), after
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        mean, var, weight, bias = map(
            fractions_of, (module.running_mean, module.running_var, module.weight, module.bias)
        )
        scale = np.array([w / fraction_root(v + Fraction(module.eps)) for w, v in zip(weight, var, strict=True)])
        each = len(x) // len(mean)
        return (x - np.repeat(mean, each)) * np.repeat(scale, each) + np.repeat(bias, each), after
    if isinstance(module, fw.models.Normalize):
        mean, std = (np.repeat(fractions_of(one), len(x) // len(one)) for one in (module.mean, module.std))
        return (x - mean) / std, after
    if isinstance(module, nn.AvgPool2d):
        sums = matrix_of(lambda z: F.avg_pool2d(z, module.kernel_size, divisor_override=1), shape)
        return (sums @ x) * Fraction(1, module.kernel_size**2), after
    slope = Fraction(module.negative_slope) if isinstance(module, nn.LeakyReLU) else Fraction(0)
    if isinstance(module, nn.ReLU | nn.LeakyReLU):
        return np.array([value if value > 0 else slope * value for value in x]), after
    assert isinstance(module, nn.Flatten)
    return x, after


def shuffled(module, x, shape, rng):
    """The output of ``module`` in float32, with products added in a random order."""
    if isinstance(module, nn.Sequential):
        for child in module:
            x, shape = shuffled(child, x, shape, rng)
        return x, shape
    after = module(torch.zeros(1, *shape)).shape[1:]
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return module(torch.from_numpy(x).view(1, *shape)).flatten().detach().numpy(), after
    plain = copy.deepcopy(module)
    plain.bias = None
    columns = plain(torch.eye(len(x)).view(len(x), *shape)).flatten(1).detach().numpy().T
    bias = np.zeros(after[0], np.float32) if module.bias is None else module.bias.detach().numpy()
    found = np.repeat(bias, len(columns) // len(bias))
    for row, weights in enumerate(columns):
        terms = [np.float32(one) for one in weights * x if one != 0] + [found[row]]
        rng.shuffle(terms)
        total = np.float32(0)
        for term in terms:
            total = np.float32(total + term)
        found[row] = total
    return found, after


def boxes_of(lower, upper):
    return [Interval(lower.double(), upper.double())]


def bounds_on_logits(model, lower, upper, arithmetic):
    """Bounds on the logits themselves."""
    found = RigorousMargins(model).bounds(boxes_of(lower, upper), arithmetic)
    return found.lower, found.upper


def scaled(module, factor):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= factor
    return module


def cancelling(count=6):
    """Large terms of both signs, whose sum is small."""
    layer = nn.Linear(count, 4)
    with torch.no_grad():
        layer.weight[:, ::2] = layer.weight[:, 1::2] * -1 + 2.0**-20
        layer.weight *= 2.0**25
        layer.bias.copy_(torch.tensor([2.0**25, -(2.0**25), 1.0, 2.0**-149]))
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 3))


def normalised():
    norm = nn.BatchNorm2d(2)
    norm.running_mean.copy_(torch.tensor([1000.0, -0.1]))
    norm.running_var.copy_(torch.tensor([1e-12, 3.0]))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.Sequential(nn.Conv2d(1, 2, 2), norm, nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3))


def of_inputs(shape):
    """A network that normalises its inputs, of images or vectors."""
    linear = nn.Linear(math.prod(shape), 3)
    return nn.Sequential(fw.models.Normalize([0.1, -3.0], [0.3, 0.007]), nn.Flatten(), linear)


SHAPED = {
    "normalised inputs": (lambda: of_inputs((2, 3, 2)), (2, 3, 2)),
    "normalised features": (lambda: of_inputs((2,)), (2,)),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)), (3,)),
    "cancelling": (cancelling, (6,)),
    "subnormal": (lambda: scaled(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)), 2.0**-75), (3,)),
    "large": (lambda: scaled(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)), 2.0**40), (3,)),
    "normalised": (normalised, (1, 4, 4)),
    "strided": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (2, 4, 4),
    ),
}


def points_in(lower, upper, generator, count):
    for _ in range(count):
        share = torch.rand(lower.shape, generator=generator)
        share = torch.where(torch.rand(lower.shape, generator=generator) < 0.6, share.round(), share)
        yield torch.minimum(torch.maximum(lower + share * (upper - lower), lower), upper)


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_bounds_hold_exact_and_computed_outputs(name, eps):
    make, shape = SHAPED[name]
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        torch.manual_seed(seed)
        model = make().eval()
        x = torch.rand(1, *shape, generator=generator)
        lower, upper = x - eps, x + eps
        exactly, computed = (bounds_on_logits(model, lower, upper, name) for name in ("exact", "float32"))
        assert bool((computed[0] <= exactly[0]).all())
        assert bool((exactly[1] <= computed[1]).all())
        for point in points_in(lower, upper, generator, 3):
            value, _ = exact(model, fractions_of(point.flatten()), shape)
            for one, low, high in zip(value, *(end[0].tolist() for end in exactly), strict=True):
                assert Fraction(low) <= one <= Fraction(high)
            rng = random.Random(seed)
            found, _ = shuffled(model, point.flatten().numpy(), shape, rng)
            for logits in (torch.from_numpy(found), model(point)[0].detach()):
                assert bool((computed[0][0] <= logits.double()).all())
                assert bool((logits.double() <= computed[1][0]).all())


@pytest.mark.parametrize("name", SHAPED)
def test_bounds_are_tight_where_nothing_is_rounded_much(name):
    make, shape = SHAPED[name]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.rand(1, *shape)
    lower, upper = bounds_on_logits(model, x, x, "exact")
    value = copy.deepcopy(model).double()(x.double()).detach()
    assert bool((upper - lower <= 1e-6 * (1 + value.abs().amax())).all())


def false_in_float32():
    """Certified by ordinary bounds, and misclassified in exact arithmetic."""
    first, last = nn.Linear(1, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [0.0]]))
        first.bias.fill_(2.0**25)
        last.weight.copy_(torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
        last.bias.copy_(torch.tensor([0.3, 0.0]))
    return nn.Sequential(first, nn.ReLU(), last)


def test_a_certificate_that_rounding_makes_is_not_rigorous():
    model, x, y = false_in_float32().eval(), torch.tensor([[0.9]]), torch.tensor([0])
    value, _ = exact(model, fractions_of(x[0]), (1,))
    assert value[0] < value[1]
    with pytest.raises(fw.verification.UnsoundBoundError, match="tighter IBP bounds") as refused:  # In a first batch.
        fw.verify(fw.BoundedModule(model, x), (x, y), 1e-3, ("IBP",), restarts=0, rigorous=True)
    (found,) = refused.value.result.certificates
    assert found.verified
    assert found.rigorous is None


def test_statements_are_part_of_certificates_and_tables():
    torch.manual_seed(0)
    model = convolutional(batchnorm=True).eval()
    x = torch.rand(30, 1, 8, 8)
    y = model(x).argmax(1)
    bounded, options = fw.BoundedModule(model, x), {"methods": ("IBP",), "restarts": 0}
    found = fw.verify(bounded, (x, y), 0.003, **options, rigorous=True)
    expected = RigorousMargins(model).statements([box_around(x, 0.003, (0.0, 1.0))], y)
    assert [one.rigorous for one in found.certificates] == [
        statement if one.verified else None for one, statement in zip(found.certificates, expected, strict=True)
    ]
    counts = Counter(one.rigorous for one in found.certificates)
    assert found.as_dict()["rigorous"] == {"exact": counts["exact"], "float32": counts["float32"]}
    assert found.stages["rigorous"].samples == sum(one.verified for one in found.certificates)
    assert f"{counts['float32']} also as computed in float32" in str(found)
    assert [row["rigorous"] for row in found.rows()] == [one.rigorous or "" for one in found.certificates]
    assert "rigorous" not in next(fw.verify(bounded, (x, y), 0.003, **options).rows())
    nothing = fw.verify(bounded, (x, (y + 1) % 3), 0.003, **options, rigorous=True)
    assert nothing.stages["rigorous"].per_sample >= 0
    assert nothing.rigorous("exact", "float32") == 0


def test_networks_that_normalise_their_inputs():
    torch.manual_seed(0)
    model, x = (
        fw.models.cnn7((3, 8, 8), 5, width=2, hidden=8, mean=[0.5] * 3, std=[0.2] * 3).eval(),
        torch.rand(6, 3, 8, 8),
    )
    bounded = fw.BoundedModule(model, x[:2])
    found = fw.verify(bounded, (x, model(x).argmax(1)), 1e-6, ("IBP",), restarts=0, rigorous=True)
    assert found.verified_error.count == 0
    assert found.rigorous("float32") == 6


def test_a_network_without_rules_is_refused_before_any_sample():
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval(), []
    samples = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    bounded = fw.BoundedModule(model, samples[0])
    with pytest.raises(UnknownOperatorError, match="leave rigorous out"):
        fw.verify(bounded, samples, 0.01, rigorous=True, progress=seen.append)
    assert not seen


def test_boxes_contain_their_real_ends():
    x = torch.tensor([[0.1, 0.9, 0.0]])
    for eps in (8 / 255, 1e-9, torch.tensor([0.1, 0.2, 0.3])):
        box = box_around(x, eps, (0.0, 0.95))
        radii = [Fraction(one) for one in (eps.double().tolist() if isinstance(eps, torch.Tensor) else [eps] * 3)]
        for place, (value, radius) in enumerate(zip(x[0].double().tolist(), radii, strict=True)):
            low = max(Fraction(value) - radius, Fraction(0))
            high = min(Fraction(value) + radius, Fraction(0.95))
            assert Fraction(float(box.lower[0, place])) <= low <= high <= Fraction(float(box.upper[0, place]))


def test_several_inputs():
    torch.manual_seed(0)
    model = TwoInputs().eval()
    x = torch.rand(4, 1, 8, 8), torch.rand(4, 5)
    y = model(*x).argmax(1)
    bounded = fw.BoundedModule(model, x)
    found = fw.verify(bounded, (x, y), (0.001, 0.0), methods=("IBP",), restarts=0, rigorous=True)
    assert found.rigorous("float32") == found.rigorous("exact", "float32") > 0


def test_no_false_certificate_in_ten_thousand():
    """Margins within a few roundings of 0, over all corners of boxes in two dimensions."""
    generator, counts = random.Random(0), dict.fromkeys((None, "exact", "float32"), 0)
    total = 0
    for seed in range(100):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        scaled(model, 2.0 ** generator.choice([0, 0, 12, 24]))
        x = torch.rand(100, 2)
        y = torch.zeros(100, dtype=torch.int64)
        eps = generator.choice([0.0, 2.0**-20, 2.0**-10])
        boxes = Interval(x.double() - eps, x.double() + eps)
        # The last bias puts the smallest margin of the first boxes near 0.
        margins = RigorousMargins(model).bounds([boxes], "exact")
        worst = (margins.lower[:, 0] - margins.upper[:, 1])[seed]
        with torch.no_grad():
            model[2].bias[0] -= worst.float()
            model[2].bias[0] *= 1 + generator.choice([-2, -1, 0, 1, 2]) * 2.0**-23
        statements = RigorousMargins(model).statements([boxes], y)
        total += len(statements)
        for place, statement in enumerate(statements):
            counts[statement] += 1
            if statement is None or (place % 10 and place != seed):
                continue
            ends = ((boxes.lower[place, axis], boxes.upper[place, axis]) for axis in range(2))
            for corner in itertools.product(*ends):
                value, _ = exact(model, fractions_of(torch.stack(corner)), (2,))
                assert value[0] > value[1]
                if statement == "float32":
                    point = torch.stack(corner).float()
                    within = (point.double() >= boxes.lower[place]) & (point.double() <= boxes.upper[place])
                    point = torch.where(within, point, point.nextafter(x[place]))
                    found, _ = shuffled(model, point.numpy(), (2,), generator)
                    assert found[0] > found[1]
                    logits = model(point.unsqueeze(0))[0]
                    assert logits[0] > logits[1]
    assert total == 10_000
    assert min(counts.values()) > 50


def test_what_is_proved_in_float32_is_proved_exactly():
    torch.manual_seed(0)
    model = convolutional(batchnorm=True).eval()
    x = torch.rand(40, 1, 8, 8)
    y = model(x).argmax(1)
    proofs = RigorousMargins(model)
    boxes = [Interval(x.double() - 0.003, x.double() + 0.003)]
    exactly, computed = (proofs.proved(boxes, y, name) for name in ("exact", "float32"))
    assert bool((exactly | ~computed).all())
    assert 0 < int(computed.sum()) <= int(exactly.sum())
    statements = proofs.statements(boxes, y)
    assert [one == "float32" for one in statements] == computed.tolist()
    assert [one is not None for one in statements] == exactly.tolist()


def test_residual_networks():
    torch.manual_seed(0)
    model = SmallResNet(batchnorm=True).eval()
    x = torch.rand(8, 1, 8, 8)
    lower, upper = bounds_on_logits(model, x - 1e-3, x + 1e-3, "float32")
    for point in points_in(x - 1e-3, x + 1e-3, torch.Generator().manual_seed(0), 10):
        for value in (model(point).detach().double(), model.double()(point.double()).detach()):
            assert bool(((lower <= value) & (value <= upper)).all())
        model.float()


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(2, 3))

    def forward(self, x):
        return self.function(x, self.weight)


REFUSED = {
    "tanh": lambda x, w: torch.tanh(x @ w.t()),
    "exp": lambda x, w: torch.exp(x @ w.t()),
    "gelu": lambda x, w: F.gelu(x @ w.t()),
    "a computed weight": lambda x, w: x @ (w * 0.1).t(),
    "a factor in a sum": lambda x, w: torch.add(x, x, alpha=3) @ w.t(),
    "a divisor below 0": lambda x, w: F.avg_pool2d(x.view(-1, 1, 1, 3), 1, divisor_override=-2).flatten(1) @ w.t(),
    "half precision inside": lambda x, w: x.half().to(w.dtype) @ w.t(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operators_without_bounded_errors_are_refused_by_name(name):
    model, x = Function(REFUSED[name]), torch.rand(4, 3)
    with pytest.raises(UnknownOperatorError, match="no interval rule covers"):
        RigorousMargins(model).statements([Interval(x.double(), x.double())], torch.zeros(4, dtype=torch.int64))


def cancelling():
    """Partial sums of ±2e38 overflow in float32 in some orders, though their sum is 0."""
    first, last = nn.Linear(8, 1, bias=False), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2e38, -2e38] * 4]))
        last.weight.copy_(torch.tensor([[1e-38], [0.0]]))
        last.bias.copy_(torch.tensor([0.0, 1.0]))
    return nn.Sequential(first, nn.ReLU(), last).eval(), torch.ones(1, 8)


class Scaled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.last = function, nn.Linear(1, 2)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[0.0], [0.0]]))
            self.last.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, x):
        return self.last(self.function(x))


OVERFLOWING = {
    "a sum": cancelling,
    "a mean": lambda: (Scaled(lambda x: x.mean(1, keepdim=True) * 1e-38), torch.full((1, 8), 1e38)),
    "a number": lambda: (Scaled(lambda x: x * 1e39 * 1e-39), torch.full((1, 1), 1e-6)),
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_what_may_overflow_on_the_way_is_not_proved_in_float32(name):
    model, x = OVERFLOWING[name]()
    (statement,) = RigorousMargins(model.eval()).statements([Interval(x.double(), x.double())], torch.tensor([1]))
    assert statement == "exact"


MADE = {
    "full": lambda x: x - torch.full((1,), 0.1, dtype=x.dtype),
    "linspace": lambda x: x - torch.linspace(0.1, 1, 2, dtype=x.dtype)[:1],
    "arange": lambda x: x - torch.arange(0.1, 1, dtype=x.dtype),
    "an attribute": lambda x: x - torch.tensor(0.1, dtype=torch.float64),
}


@pytest.mark.parametrize("name", MADE)
def test_constants_that_float32_rounds_are_refused(name):
    box = [Interval(torch.zeros(1, 1).double(), torch.ones(1, 1).double())]
    with pytest.raises(UnknownOperatorError, match="may differ in float32"):
        RigorousMargins(Scaled(MADE[name]).eval()).statements(box, torch.tensor([1]))
    exact_in_both = Scaled(lambda x: x - torch.full((1,), 0.25, dtype=x.dtype) + torch.arange(1, dtype=x.dtype))
    assert RigorousMargins(exact_in_both.eval()).statements(box, torch.tensor([1])) == ["float32"]


BY_PRECISION = {
    "a limit": lambda x: x.clamp(min=torch.finfo(x.dtype).eps),
    "a branch": lambda x: x if x.dtype == torch.float32 else -x,
}


@pytest.mark.parametrize("name", BY_PRECISION)
def test_networks_that_read_their_precision_are_refused(name):
    box = [Interval(torch.zeros(1, 1).double(), torch.ones(1, 1).double())]
    with pytest.raises(UnknownOperatorError, match="something else in float64"):
        RigorousMargins(Scaled(BY_PRECISION[name]).eval()).statements(box, torch.tensor([1]))


ODD = 2**24 + 1  # Which float32 does not hold.
NOT_HELD = {
    "clamp": lambda x, _: x.clamp(max=ODD),
    "hardtanh": lambda x, _: F.hardtanh(x, 0, ODD),
    "pad": lambda x, _: F.pad(x, (1, 0), value=ODD)[:, :1] + 0 * x,
    "pad of a parameter": lambda x, w: F.pad(w, (1, 0), value=ODD)[:1, :1] + 0 * x,
}


class Difference(nn.Module):
    """Class 0 where the function exceeds 2²⁴, by a bias that float32 holds."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight, self.last = function, nn.Parameter(torch.ones(1, 1)), nn.Linear(1, 2)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[1.0], [0.0]]))
            self.last.bias.copy_(torch.tensor([-(2.0**24), 0.5]))

    def forward(self, x):
        return self.last(self.function(x, self.weight))


@pytest.mark.parametrize("name", NOT_HELD)
def test_whole_numbers_that_float32_rounds_are_not_proved_in_it(name):
    model, x = Difference(NOT_HELD[name]).eval(), torch.full((1, 1), 2.0**25)
    assert model(x).argmax() == 1
    assert model.double()(x.double()).argmax() == 0
    model.float()
    box = [Interval(x.double(), x.double())]
    assert RigorousMargins(model).statements(box, torch.tensor([0])) in (["exact"], [None])


def test_slices_of_parameters_are_no_rounded_numbers():
    model, x = Function(lambda x, w: F.linear(x, w[1:].flip(1)[:, 1:].t())), torch.rand(4, 1)
    found = RigorousMargins(model).statements([Interval(x.double(), x.double())], model(x).argmax(1))
    assert set(found) <= {"float32", "exact", None}


def test_integers_that_float32_rounds_are_refused():
    model = Difference(lambda x, _: x + torch.tensor([ODD])).eval()
    with pytest.raises(UnknownOperatorError, match="may differ in float32"):
        RigorousMargins(model).statements(
            [Interval(torch.zeros(1, 1).double(), torch.ones(1, 1).double())], torch.tensor([0])
        )


def test_networks_that_cannot_be_traced_are_refused_by_name():
    model = Function(lambda x, w: x @ w.data.t())
    with pytest.raises(UnknownOperatorError, match="cannot be traced to PyTorch's own operators"):
        RigorousMargins(model).statements(
            [Interval(torch.zeros(1, 3).double(), torch.ones(1, 3).double())], torch.tensor([0])
        )


def test_a_pruned_network_is_refused_by_name():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(4, 3)
    prune.l1_unstructured(model[0], "weight", 0.5)
    y = model.eval()(x).argmax(1)  # Now the pruned weight is no leaf, which torch does not copy.
    with pytest.raises(UnknownOperatorError, match="no interval rule covers"):
        fw.verify(fw.BoundedModule(model, x), (x, y), 0.01, rigorous=True)


ROUNDED = {
    "a constant that is no float32": lambda x, w: (x + 0.1) @ w.t(),
    "a difference that cancels": lambda x, w: (x - 100000.1 + 100000.0) @ w.t(),
    "a factor": lambda x, w: (x * 0.1) @ w.t(),
    "a divisor": lambda x, w: (x / 0.3) @ w.t(),
    "a clamp": lambda x, w: x.clamp(0.1, 0.7) @ w.t(),
    "a mean": lambda x, w: (x @ w.t()) - x.mean(1, keepdim=True),
    "a product": lambda x, w: (x * x) @ w.t(),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_elementwise_operators(name):
    torch.manual_seed(0)
    model = Function(ROUNDED[name])
    x = torch.rand(64, 3) * 2 - 0.5
    for eps in (0.0, 1e-3):
        lower, upper = bounds_on_logits(model, x - eps, x + eps, "float32")
        exactly = bounds_on_logits(model, x - eps, x + eps, "exact")
        for point in points_in(x - eps, x + eps, torch.Generator().manual_seed(0), 20):
            value = model(point).detach().double()
            assert bool(((lower <= value) & (value <= upper)).all())
            double = copy.deepcopy(model).double()(point.double()).detach()
            slack = 1e-12 * (1 + double.abs())  # float64 is not exact.
            assert bool(((exactly[0] - slack <= double) & (double <= exactly[1] + slack)).all())


def test_overflow_proves_nothing():
    model = scaled(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), 2.0**70)
    x = torch.rand(4, 3)
    y = model(x).argmax(1)
    found = RigorousMargins(model).statements([Interval(x.double(), x.double())], y)
    assert set(found) <= {"exact", None}


def test_a_float64_network_has_no_statement_about_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.rand(4, 3, dtype=torch.float64)
    assert set(RigorousMargins(model).statements([Interval(x, x)], model(x).argmax(1))) == {"exact"}
