"""Bounds contain every sampled output, and IBP equals an interval arithmetic of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.bounds import ibp_margin_bounds, margin_matrix
from tests.reference import output_bounds
from tests.strategies import networks

EPS = st.floats(1e-3, 0.5)


def outputs_in_box(model: nn.Module, x: Tensor, eps: float, clean_statistics: bool, count: int = 200) -> Tensor:
    """Outputs at points of the box, its corners among them; with statistics of the clean batch, on request."""
    model.eval()
    if clean_statistics:
        freeze_statistics(model, x)
    noise = torch.rand(count, *x.shape, dtype=x.dtype) * 2 - 1
    noise[: count // 2] = noise[: count // 2].sign()
    points = (x + eps * noise).clamp(0, 1)
    return model(points.flatten(0, 1)).view(count, len(x), -1)


def freeze_statistics(model: nn.Module, x: Tensor) -> None:
    """Let BatchNorm in evaluation mode use the statistics of the clean batch ``x``."""

    def take(module: _BatchNorm, inputs: tuple[Tensor]) -> None:
        dims = [0, *range(2, inputs[0].ndim)]
        module.running_mean = inputs[0].mean(dims)
        module.running_var = inputs[0].var(dims, unbiased=False)

    handles = [module.register_forward_pre_hook(take) for module in model.modules() if isinstance(module, _BatchNorm)]
    model(x)
    for handle in handles:
        handle.remove()


@hypothesis_settings(max_examples=40)
@given(model=networks(), eps=EPS, training=st.booleans(), method=st.sampled_from(["IBP", "CROWN-IBP"]))
@torch.no_grad()
def test_no_sampled_output_leaves_the_bounds(model, eps, training, method):
    x = torch.rand(3, 1, 6, 6)
    bounded = fw.BoundedModule(model.train(training), x)
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, eps),), method=method)
    outputs = outputs_in_box(model, x, eps, clean_statistics=training)
    slack = 1e-4 * (1 + outputs.abs().max())
    assert bool((outputs >= lower - slack).all())
    assert bool((outputs <= upper + slack).all())


@hypothesis_settings(max_examples=40)
@given(model=networks(), eps=EPS, training=st.booleans())
@torch.no_grad()
def test_ibp_equals_the_float64_reference(model, eps, training):
    x = torch.rand(3, 1, 6, 6)
    model.train(training)
    expected = output_bounds(model, x, eps)
    bounded = fw.BoundedModule(model, x)
    found = bounded.compute_bounds(x=(fw.input_box(x, eps),), method="IBP")
    scale = max(end.abs().max() for end in expected)
    for end, reference in zip(found, expected, strict=True):
        assert torch.allclose(end.double(), reference, rtol=1e-4, atol=float(1e-4 * scale))


@hypothesis_settings(max_examples=20)
@given(model=networks(), eps=EPS)
@torch.no_grad()
def test_margins_lie_between_those_of_the_outputs_and_of_separate_bounds(model, eps):
    x, y = torch.rand(3, 1, 6, 6), torch.tensor([0, 2, 1])
    bounded = fw.BoundedModule(model.eval(), x)
    margins, _ = ibp_margin_bounds(bounded, fw.input_box(x, eps), y, classes=3)
    outputs = outputs_in_box(model, x, eps, clean_statistics=False)
    sampled = torch.einsum("bmk,nbk->nbm", margin_matrix(y, 3, x.dtype), outputs).amin(0)
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, eps),), method="IBP")
    others = torch.tensor([[1, 2], [0, 1], [0, 2]])
    separate = lower.gather(1, y.unsqueeze(1)) - upper.gather(1, others)
    slack = 1e-4 * (1 + margins.abs().max())
    assert bool((margins <= sampled + slack).all())
    assert bool((margins >= separate - slack).all())


def test_a_wrong_bound_is_noticed(x):
    # The sampling test can fail: bounds of a smaller box do not contain the outputs of a larger one.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    bounded = fw.BoundedModule(model, x)
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.001),), method="IBP")
    outputs = outputs_in_box(model, x, 0.3, clean_statistics=False)
    assert not bool(((outputs >= lower) & (outputs <= upper)).all())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_convolutions_of_every_rank(rank, transposed, groups):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    conv = kind(2, 4, 3, stride=2, padding=1, groups=groups, dilation=2 if rank == 1 else 1)
    x = torch.rand(2, 2, *[7] * rank)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(conv(x).flatten(1).shape[1], 3)).eval()
    bounded = fw.BoundedModule(model, x, bound_opts={"conv_mode": "matrix"})
    assert torch.allclose(bounded(x), model(x), atol=1e-6)
    outputs = outputs_in_box(model, x, 0.1, clean_statistics=False)
    bounds = {}
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        lower, upper = bounds[method] = bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method=method)
        assert bool(((outputs >= lower - 1e-5) & (outputs <= upper + 1e-5)).all()), method
    # With one ReLU layer, whose bounds IBP and CROWN share, backward bounds differ only by rounding.
    assert torch.allclose(bounds["CROWN-IBP"][0], bounds["CROWN"][0], atol=1e-5)
    # IBP of the convolution alone is exact: attained at a corner of the box.
    first = fw.BoundedModule(nn.Sequential(conv, nn.Flatten()), x)
    lower, _ = first.compute_bounds(x=(fw.input_box(x, 0.1, None),), method="IBP")
    probe = x.clone().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(conv(probe).flatten(1)[:, 0].sum(), probe)
    assert torch.allclose(lower[:, 0], conv(x - 0.1 * slope.sign()).flatten(1)[:, 0], atol=1e-5)


ARITHMETIC = {
    "x - m": lambda s, x: x - s.m,
    "m - x": lambda s, x: s.m - x,
    "x + m": lambda s, x: x + s.m,
    "x * m": lambda s, x: x * s.m,
    "x / m": lambda s, x: x / s.m,
    "x * 2m": lambda s, x: x * (2 * s.m),
    "x * md": lambda s, x: x * (s.m * s.d),
    "x * (m + d)": lambda s, x: x * (s.m + s.d),
    "x * (1 / m)": lambda s, x: x * (1 / s.m),
    "x * (m / d)": lambda s, x: x * (s.m / s.d),
    "x + (-m)": lambda s, x: x + (-s.m),
    "-d * x": lambda s, x: -s.d * x,
    "(x - m) / sqrt d": lambda s, x: (x - s.m) / torch.sqrt(s.d + 1e-5),
    "parameter": lambda s, x: s.p * x - s.p.exp(),
    "number": lambda s, x: 3 * (1 - x) / 2,
}
SHAPES = [(1, 2, 1, 1), (2, 1, 1), (1,), (), (1, 6, 6), (2, 6, 6)]


class Arithmetic(nn.Module):
    def __init__(self, expression, shape):
        super().__init__()
        self.register_buffer("m", torch.rand(shape) + 0.5)
        self.register_buffer("d", torch.rand(shape) + 0.5)
        self.p = nn.Parameter(torch.randn(shape))
        self.expression = ARITHMETIC[expression]

    def forward(self, x):
        return self.expression(self, x)


def exact_bounds(model, x, eps):
    """Bounds of an affine network, from its Jacobian."""
    centre = model(x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model(one.unsqueeze(0)).squeeze(0)))(x)
    radius = eps * jacobian.flatten(2).abs().sum(2)
    return centre - radius, centre + radius


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("expression", ARITHMETIC)
@torch.no_grad()
def test_arithmetic_with_constants_is_exact(expression, shape, batch):
    # A plain auto_LiRPA 0.3 is wrong in many of these, IBP included; the batch may equal the channels.
    x = torch.rand(batch, 2, 6, 6)
    model = nn.Sequential(Arithmetic(expression, shape), nn.Flatten(), nn.Linear(72, 3)).eval()
    bounded = fw.BoundedModule(model, x)
    assert torch.allclose(bounded(x), model(x), atol=1e-5)
    exact = exact_bounds(model, x, 0.1)
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        found = bounded.compute_bounds(x=(fw.input_box(x, 0.1, None),), method=method)
        for end, right in zip(found, exact, strict=True):
            assert torch.allclose(end, right, atol=1e-4), method


@pytest.mark.parametrize("conv_mode", ["patches", "matrix"])
@pytest.mark.parametrize("channels", [1, 2, 3])
@torch.no_grad()
def test_normalisation_before_convolutions(channels, conv_mode):
    x = torch.rand(2, channels, 8, 8)
    model = nn.Sequential(
        fw.models.Normalize([0.5, 0.4, 0.3][:channels], [0.2, 0.3, 0.1][:channels]),
        nn.Conv2d(channels, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).eval()
    outputs = outputs_in_box(model, x, 0.02, clean_statistics=False)
    bounded = fw.BoundedModule(model, x, bound_opts={"conv_mode": conv_mode})
    widths = []
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.02),), method=method)
        assert bool(((outputs >= lower - 1e-4) & (outputs <= upper + 1e-4)).all()), method
        widths.append(float((upper - lower).mean()))
    assert widths[2] < widths[0]  # And CROWN is worth its price.


def test_operands_made_to_the_inputs_shape_are_refused():
    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("m", torch.rand(2, 1, 1))

        def forward(self, x):
            return (x - self.m.expand_as(x)).flatten(1)

    model, x = nn.Sequential(Expanded(), nn.Linear(72, 3)).eval(), torch.rand(4, 2, 6, 6)
    with pytest.raises(NotImplementedError, match="use broadcasting instead"):
        fw.BoundedModule(model, x)


def test_box_is_clipped_and_takes_radii_per_channel_and_feature():
    x = torch.tensor([[[[0.0, 0.5]], [[1.0, 0.9]]]])
    box = fw.input_box(x, torch.tensor([0.2, 0.3]))
    assert torch.allclose(box.ptb.x_L, torch.tensor([[[[0.0, 0.3]], [[0.7, 0.6]]]]))
    assert torch.allclose(box.ptb.x_U, torch.tensor([[[[0.2, 0.7]], [[1.0, 1.0]]]]))
    free = fw.input_box(x, 0.2, None)
    assert torch.allclose(free.ptb.x_L, x - 0.2)
    table = torch.tensor([[0.0, 10.0], [5.0, -3.0]])
    box = fw.input_box(table, torch.tensor([1.0, 2.0]), (torch.tensor([0.0, -4.0]), torch.tensor([5.5, 10.0])))
    assert torch.equal(box.ptb.x_L, torch.tensor([[0.0, 8.0], [4.0, -4.0]]))
    assert torch.equal(box.ptb.x_U, torch.tensor([[1.0, 10.0], [5.5, -1.0]]))
    with pytest.raises(ValueError, match=r"eps has shape \(3,\), which does not fit"):
        fw.input_box(table, torch.ones(3), None)


class SumOfHeads(nn.Module):
    """Ends in a sum, into which no margin can be merged."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, x):
        return torch.relu(self.one(x.flatten(1))) + self.other(x.flatten(1))


ENDS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)),
    "linear without bias": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)
    ),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()),
    "sum": SumOfHeads,
    "batchnorm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3)),
}


@pytest.mark.parametrize("end", ENDS)
def test_margins_are_those_of_the_full_matrix_whatever_the_network_ends_in(end, x, y):
    model = ENDS[end]()
    bounded = fw.BoundedModule(model, x)
    box = fw.input_box(x, 0.05)
    found = ibp_margin_bounds(bounded, box, y, 3)
    matrix = margin_matrix(y, 3, x.dtype)
    expected = bounded.compute_bounds(x=(box,), C=matrix, method="IBP")
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor
        assert torch.allclose(one, other, atol=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(bounds[0].sum(), parameters, retain_graph=True) for bounds in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_margin_matrix_rows():
    matrix = margin_matrix(torch.tensor([1, 0]), 3, torch.float32)
    assert matrix.tolist() == [[[-1, 1, 0], [0, 1, -1]], [[1, -1, 0], [1, 0, -1]]]
