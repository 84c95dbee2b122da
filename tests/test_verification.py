from __future__ import annotations

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import verification
from tests import networks


def linear_classifier():
    """z = (w·x, −w·x) with w = (1, −2): the margin at x is ±2 w·x, and its worst case in a box is exact."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [-1.0, 2.0]]))
    return model.eval()


# w·x: 0.5, 0.2, −0.6, 0.05; each label is right but the last one.
POINTS = torch.tensor([[0.9, 0.2], [0.4, 0.1], [0.2, 0.4], [0.45, 0.2]])
LABELS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(("eps", "share"), [(0.0, 0.25), (0.05, 0.25), (0.1, 0.5), (0.18, 0.75)])
def test_errors_of_a_classifier_whose_margins_are_known(eps, share):
    # |w·x| > 3ε decides.
    model = linear_classifier()
    errors = verification.evaluate(
        fw.BoundedModule(model, POINTS), [(POINTS[:3], LABELS[:3]), (POINTS[3:], LABELS[3:])], eps, input_range=None
    )
    found = (errors.standard_error.value, errors.pgd_error.value, errors.verified_error.value)
    assert found == (0.25, share, share)


def test_attack_stays_in_the_clipped_box_and_finds_what_it_returns(x, y):
    model = networks.convolutional(batchnorm=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    labels = model(x).argmax(1)
    point = verification.pgd(model, x, labels, 0.3, steps=20, restarts=2)
    assert bool(((point - x).abs() <= 0.3 + 1e-6).all())
    assert bool(((point >= 0) & (point <= 1)).all())
    moved = (point != x).flatten(1).any(1)
    assert bool(moved.any())
    assert torch.equal(model(point).argmax(1) != labels, moved)


def test_order_of_the_errors_and_modes_restored(x, y):
    model = networks.convolutional()
    bounded = fw.BoundedModule(model, x)
    model[1].eval()
    errors = verification.evaluate(bounded, [(x, y)], 0.02, pgd_steps=5, restarts=1)
    assert errors.standard_error.count <= errors.pgd_error.count <= errors.verified_error.count
    assert model.training
    assert not model[1].training
    assert int(model[4].num_batches_tracked) == 0


def test_attack_works_where_gradients_are_off(x):
    model = networks.convolutional().eval()
    labels = model(x).argmax(1)
    expected = verification.pgd(model, x, labels, 0.3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = verification.pgd(model, x, labels, 0.3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, expected)


def test_attack_is_repeatable(x, y):
    model = networks.convolutional().eval()

    def attack():
        return verification.pgd(model, x, y, 0.05, steps=2, generator=torch.Generator().manual_seed(1))

    assert torch.equal(attack(), attack())


def test_nan_proves_nothing(x, y):
    model = networks.convolutional().eval()
    with torch.no_grad():
        model[10].weight.fill_(torch.nan)
    found = verification.evaluate(fw.BoundedModule(model, x), [(x, y)], 0.01, check=False)
    assert found.verified_error.value == 1.0


def test_data_outside_its_range_gets_no_certificate(x, y):
    error = verification.evaluate
    bounded = fw.BoundedModule(networks.convolutional().eval(), x)
    with pytest.raises(ValueError, match="inputs must lie in input_range"):
        error(bounded, [(4 * x - 2, y)], 0.1)
    with pytest.raises(ValueError, match="labels must be between 0 and 2"):
        error(bounded, [(x, y - 1)], 0.1)
    with pytest.raises(ValueError, match="inputs must lie in input_range"):
        fw.input_box(3 * x, 0.1)
    with pytest.raises(ValueError, match="eps must be finite"):
        fw.input_box(x, -0.1)
    with pytest.raises(TypeError, match="eps must be a number or a tensor"):
        fw.input_box(x, "0.1")


def test_bad_input(x, y):
    model = networks.convolutional()
    with pytest.raises(ValueError, match="in training mode"):
        verification.pgd(model, x, y, 0.1)
    with pytest.raises(ValueError, match="eps must be finite"):
        verification.pgd(model.eval(), x, y, -0.1)
    bounded = fw.BoundedModule(model, x)
    with pytest.raises(ValueError, match="no samples"):
        verification.evaluate(bounded, [], 0.1)
    with pytest.raises(ValueError, match="eps must be finite"):
        verification.evaluate(bounded, [(x, y)], float("nan"))


def test_ties_are_no_success_of_the_attack(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    y = torch.zeros(8, dtype=torch.long)  # What argmax answers where all logits are equal.
    assert torch.equal(verification.pgd(model, x, y, 0.1, steps=2), x)


ASKED_WITH_LABELS = {
    "pgd": lambda model, x, y: verification.pgd(model, x, y, 0.1),
    "evaluate": lambda model, x, y: verification.evaluate(fw.BoundedModule(model, x), [(x, y)], 0.1),
    "verify": lambda model, x, y: fw.verify(fw.BoundedModule(model, x), (x, y), 0.1),
    "certified_radii": lambda model, x, y: verification.certified_radii(fw.BoundedModule(model, x), (x, y)),
}


@pytest.mark.parametrize("function", ASKED_WITH_LABELS)
def test_labels_are_checked_everywhere(function, x, y):
    model = networks.convolutional().eval()
    for labels, kind in (
        (y + 9, ValueError),
        (y.float(), TypeError),
        (y.unsqueeze(1), ValueError),
        (y[:3], ValueError),
        (y[0], ValueError),
    ):
        with pytest.raises(kind, match="labels"):
            ASKED_WITH_LABELS[function](model, x, labels)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"eps": True}, TypeError, "eps must be a number or a tensor, in units of the input; found bool"),
        ({"eps": torch.tensor([True])}, TypeError, "found a tensor of torch.bool"),
        ({"eps": 8.0}, ValueError, "for pixels from 0 to 1, write 8/255, not 8"),
        ({"eps": torch.tensor([0.1, 8.0])}, ValueError, "for pixels from 0 to 1"),
        ({"eps": 0.1, "input_range": (0,)}, TypeError, "input_range must be a pair"),
        ({"eps": 0.1, "input_range": (0, 1, 2)}, TypeError, "input_range must be a pair"),
        ({"eps": 0.1, "input_range": "01"}, TypeError, "input_range must be a pair"),
        ({"eps": 0.1, "input_range": (False, True)}, TypeError, "input_range must be a pair"),
        ({"eps": 0.1, "input_range": (1.0, 0.0)}, ValueError, "must not begin above its end"),
        ({"eps": 0.1, "input_range": (0.0, float("nan"))}, ValueError, "must not begin above its end"),
    ],
)
def test_radii_and_ranges_are_checked_alike_everywhere(given, kind, said, x, y):
    bounded = fw.BoundedModule(networks.convolutional().eval(), x)
    given = {"input_range": (0.0, 1.0), **given}
    eps = given.pop("eps")
    for ask in (
        lambda: fw.verify(bounded, (x, y), eps, **given),
        lambda: verification.evaluate(bounded, (x, y), eps, **given),
        lambda: fw.ShortWarmup(bounded, fw.ConstantEpsilon(eps), **given),
        lambda: fw.inspect(bounded, x, eps, **given),
    ):
        with pytest.raises(kind, match=said):
            ask()


class Tiny(nn.Module):
    """Class 0 by 1 − 10·(x − 0.5), beside numbers that float32 rounds to multiples of 8."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[-10.0], [0.0]]))
            self.linear.bias.copy_(torch.tensor([1e8 + 6, 1e8], dtype=torch.float64))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("asked", [False, True])
def test_float64_networks_are_verified_in_float64(asked):
    x = torch.tensor([[0.55]], dtype=torch.float64)  # The class changes at 0.6.
    bounded, y = fw.BoundedModule(Tiny().eval(), x), torch.tensor([0])
    wide, narrow = (fw.verify(bounded, (x, y), eps, float64=asked).certificates[0] for eps in (0.1, 0.04))
    assert (wide.verified, wide.falsified, narrow.verified) == (False, True, True)
    assert wide.margin == pytest.approx(-0.5)
    (radius,) = verification.certified_radii(bounded, (x, y), largest=0.4)
    assert radius.radius == pytest.approx(0.05, abs=2e-4)


class HalfTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([[1.0, 1.0], [1.0, 0.996]]).bfloat16(), persistent=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_networks_with_buffers_in_half_precision_are_refused():
    x = torch.rand(2, 2).bfloat16()
    bounded = fw.BoundedModule(HalfTable().eval(), x)
    for function in (fw.verify, verification.evaluate):
        with pytest.raises(TypeError, match=r"'weight' is torch\.bfloat16"):
            function(bounded, (x.float(), torch.tensor([0, 1])), 0.01)
