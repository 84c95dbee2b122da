"""Networks whose bounded function, or whose batch, is another than it seems: refused by name, or bounded soundly."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.bounds import METHODS, MarginBounds
from lirpa_fastwarmup.engine.soundness import class_margins
from lirpa_fastwarmup.verification.certify import Certifier
from tests.test_soundness import outputs_in_box


class Written(nn.Module):
    """A network of one line, with modules, parameters and buffers by name."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            buffer = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            (self.register_buffer if buffer else self.__setattr__)(name, part)

    def forward(self, x):
        return self._forward(self, x)


def linear(*sizes):
    torch.manual_seed(0)
    return nn.Linear(*sizes)


MIXING = {
    "flip": (lambda s, x: s.l(x) + x.flip(0)[:, :3], (2, 4)),
    "mean of the batch": (lambda s, x: s.l(x - x.mean(0, keepdim=True)), (2, 4)),
    "mean of the batch, one example": (lambda s, x: s.l(x - x.mean(0, keepdim=True)), (1, 4)),
    "first sample": (lambda s, x: s.l(x) + s.l(x[:1]), (1, 4)),
    "sum over a batch as large as the channels": (lambda s, x: s.l(x.sum(0)), (4, 4, 4)),
    "transposed square": (lambda s, x: s.l(x.t()), (4, 4)),
    "sorted": (lambda s, x: s.l(x.sort(0).values), (2, 4)),
    "normalised by the batch": (lambda s, x: s.l(x / x.norm()), (2, 4)),
}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_depend_on_one_another_are_refused(name):
    forward, shape = MIXING[name]
    model = Written(forward, l=linear(4, 3)).eval()
    with pytest.raises(NotImplementedError):
        fw.BoundedModule(model, torch.rand(shape))


def test_the_refusal_of_a_mixed_batch_says_so():
    with pytest.raises(NotImplementedError, match="depends on the other samples of its batch"):
        fw.BoundedModule(Written(lambda s, x: s.l(x) + 2 * x.flip(0), l=linear(2, 2)).eval(), torch.rand(2, 2))


def test_a_product_with_a_matrix_as_large_as_the_batch_is_refused():
    with pytest.raises(NotImplementedError, match="depends on the other samples of its batch"):
        fw.BoundedModule(
            Written(lambda s, x: s.l(s.a @ x), l=linear(4, 3), a=torch.randn(3, 3)).eval(), torch.rand(3, 4)
        )


def test_a_network_of_one_batch_size_is_not_verified_in_parts():
    model = Written(lambda s, x: s.l(x.view(4, 8)), l=linear(8, 3)).eval()
    bounded = fw.BoundedModule(model, torch.rand(4, 2, 4))
    with pytest.raises(ValueError, match="accepts only batches of 4"):
        fw.verify(bounded.eval(), (torch.rand(4, 2, 4), torch.zeros(4, dtype=torch.long)), 0.01)


@pytest.mark.parametrize(
    "first", [nn.ReLU(inplace=True), nn.Hardtanh(0.2, 0.8, inplace=True)], ids=lambda m: type(m).__name__
)
def test_inputs_that_change_in_place_are_refused(first):
    with pytest.raises(NotImplementedError, match="changes its input in place"):
        fw.BoundedModule(nn.Sequential(first, nn.Flatten(), linear(4, 3)).eval(), torch.rand(2, 4))


def clipped_view():
    def forward(s, x):
        h = s.a(x)
        F.hardtanh(h.view(-1, 1), -40.0, 40.0, inplace=True)  # Clips h itself; the trace loses that.
        return torch.cat([h, s.b(x)], 1)

    model = Written(forward, a=nn.Linear(1, 1), b=nn.Linear(1, 1)).eval()
    with torch.no_grad():
        for layer, bias in ((model.a, 1.0), (model.b, 0.0)):
            layer.weight.fill_(10.0)
            layer.bias.fill_(bias)
    return model


def test_a_clip_of_a_view_far_from_zero_is_refused():
    with pytest.raises(NotImplementedError, match="hardtanh, which changes in place what cat then reads"):
        fw.BoundedModule(clipped_view(), torch.rand(2, 1))


def test_guards_look_at_the_model_and_not_at_the_bounded_network_alone(monkeypatch):
    """The two part only beyond 40, inside the box and at none of the samples; there is no attack."""
    monkeypatch.setattr("lirpa_fastwarmup.engine.module.check_same_function", lambda *_: True)
    monkeypatch.setattr(Certifier, "_compare", lambda *_: None)
    model = Written(lambda s, x: s.l(x).clamp(-40, 40) if len(x) == 1 else s.l(x), l=nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model.l.weight.copy_(torch.tensor([[10.0], [9.0]]))
        model.l.bias.copy_(torch.tensor([0.0, 3.0]))
    bounded = fw.BoundedModule(model, torch.rand(2, 1))
    with pytest.raises(fw.verification.UnsoundBoundError, match="margin below its lower bound"):
        fw.verify(bounded, (torch.tensor([[3.8]]), torch.tensor([0])), 0.5, ["CROWN"], input_range=None, restarts=0)


@pytest.mark.parametrize("call", [nn.Softplus(threshold=3.0), lambda h: F.softplus(h, 1.0, 3.0)], ids=["module", "F"])
def test_a_threshold_of_softplus_that_the_export_drops_is_refused(call):
    with pytest.raises(NotImplementedError, match="softplus with a threshold below 20"):
        fw.BoundedModule(Written(lambda s, x: call(s.l(x)), l=linear(4, 3)).eval(), torch.rand(2, 4))


def test_dropout_that_is_always_on_is_refused():
    model = Written(lambda s, x: s.l(F.dropout(x, 1e-6, True)), l=linear(4, 3)).eval()
    with pytest.raises(NotImplementedError, match="dropout that is on in evaluation mode"):
        fw.BoundedModule(model, torch.rand(2, 4))


@pytest.mark.parametrize("factors", [{"alpha": -0.5}, {"alpha": 2.0}, {"beta": -2.0}], ids=str)
def test_linear_layers_with_factors_that_crown_leaves_out_are_refused(factors):
    weight, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    model = Written(lambda s, x: torch.addmm(s.b, x, s.w, **factors), w=weight, b=bias).eval()
    with pytest.raises(NotImplementedError, match="scale the weights instead"):
        fw.BoundedModule(model, torch.rand(2, 4))


@pytest.mark.parametrize(
    "model",
    [
        Written(lambda s, x: s.o((s.w @ x).relu().flatten(1)), w=nn.Parameter(torch.randn(5, 6)), o=nn.Linear(20, 3)),
        Written(lambda s, x: s.o(F.leaky_relu(s.l(x), 0.6).flatten(1)), l=nn.Linear(4, 4), o=nn.Linear(24, 3)),
    ],
    ids=["constant times activation", "LeakyReLU"],
)
def test_what_crown_gets_wrong_has_ibp_bounds_alone(model):
    bounded, x = fw.BoundedModule(model.eval(), torch.rand(2, 6, 4)), torch.rand(4, 6, 4)
    lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    for _ in range(50):
        outputs = model((x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1))
        assert bool((outputs >= lower - 1e-5).all() and (outputs <= upper + 1e-5).all())
    with pytest.raises(NotImplementedError, match=r"has only IBP bounds for (MatMul|LeakyRelu)"):
        bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="CROWN")


@pytest.mark.parametrize("method", ["CROWN", "alpha-CROWN"])
@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh], ids=lambda f: f.__name__)
def test_lines_of_saturating_functions_hold_far_from_zero(function, method):
    """0.3 cuts the interval at ±500, and draws the chord of what is left."""
    ends = torch.tensor([-2000.0, -871.0, -600.0, -510.0, -400.0, -1.0, 0.0, 3.0, 499.0, 501.0, 700.0, 1500.0])
    low, high = (pair.flatten() for pair in torch.meshgrid(ends, ends, indexing="ij"))
    low, high = low[low < high], high[low < high]
    model = Written(
        lambda s, x: function(x * s.one) + s.slope * x, one=torch.ones(len(low)), slope=torch.zeros(1)
    ).eval()
    for slope in (0.0, -1e-3, 1e-3):  # CROWN's slope is added to it, so that lines that cross the function show.
        model.slope = nn.Parameter(torch.tensor([slope]))
        x = ((low + high) / 2).unsqueeze(0)
        bounded = fw.BoundedModule(model, x)
        box = fw.input_box(x, (high - low) / 2, input_range=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 0.7 calls such bounds too loose.
            lower, upper = bounded.compute_bounds(x=(box,), method=method)
        for share in torch.linspace(0, 1, 101):
            value = model((low + share * (high - low)).unsqueeze(0))
            slack = 1e-4 * (1 + value.abs())
            assert bool((value >= lower - slack).all()), (slope, float(share))
            assert bool((value <= upper + slack).all()), (slope, float(share))


def test_products_with_more_than_a_matrix_are_refused():
    model = Written(lambda s, x: s.o(F.relu(s.w @ x).flatten(1)), w=torch.randn(2, 5, 6), o=nn.Linear(60, 3)).eval()
    with pytest.raises(NotImplementedError, match="constant of more than two dimensions"):
        fw.BoundedModule(model, torch.rand(2, 2, 6, 6))


def pruned():
    layer = linear(4, 6)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 3)), (3, 4)


def masked_convolution(rank):
    convolution = (F.conv1d, F.conv2d)[rank - 1]
    weight = nn.Parameter(torch.randn(4, 2, *[3] * rank))
    mask, bias = (torch.rand_like(weight) < 0.5).float(), nn.Parameter(torch.randn(4))
    model = Written(
        lambda s, x: s.o(F.relu(convolution(x, s.w * s.m, s.b * -2)).flatten(1)),
        w=weight,
        m=mask,
        b=bias,
        o=nn.Linear(4 * 4**rank, 3),
    )
    return model, (3, 2, *[6] * rank)


def computed_batchnorm():
    def forward(s, x):
        return s.o(F.batch_norm(s.l(x), s.m, s.v, s.w * 2, s.b - 1))

    torch.manual_seed(1)
    values = {"m": torch.randn(6), "v": torch.rand(6) + 0.5}
    weights = {"w": nn.Parameter(torch.randn(6)), "b": nn.Parameter(torch.randn(6))}
    return Written(forward, l=linear(4, 6), o=nn.Linear(6, 3), **values, **weights), (3, 4)


COMPUTED = {
    "pruned": pruned,
    "masked convolution": lambda: masked_convolution(2),
    "masked convolution, 1-d": lambda: masked_convolution(1),
    "clamp between exchanged ends": lambda: (Written(lambda s, x: s.l(x).clamp(0.3, 0.1), l=linear(4, 3)), (3, 4)),
    "squeezed": lambda: (
        Written(lambda s, x: torch.stack([s.l(x).squeeze(1), s.m(x).squeeze(1)], 1), l=linear(4, 1), m=nn.Linear(4, 1)),
        (3, 4),
    ),
    "dilated along one axis": lambda: (
        nn.Sequential(nn.Conv2d(1, 3, 3, dilation=(1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        (3, 1, 6, 6),
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_computed_weights_and_other_rare_forms_are_bounded_soundly(name, eps):
    torch.manual_seed(2)
    model, shape = COMPUTED[name]()
    x, y = torch.rand(shape), torch.arange(shape[0]) % 3 if name != "squeezed" else torch.arange(shape[0]) % 2
    bounded = fw.BoundedModule(model.eval(), x).eval()
    outputs = outputs_in_box(model, x, eps, clean_statistics=False)
    for parameters in (None, 0.5):
        if parameters is not None:  # As after a step of the optimiser.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameters * torch.randn_like(parameter))
            outputs = outputs_in_box(model, x, eps, clean_statistics=False)
        lower, upper = bounded.compute_bounds(x=(fw.input_box(x, eps),), method="IBP")
        assert bool(((outputs >= lower - 1e-4) & (outputs <= upper + 1e-4)).all())
    model(x).sum().backward()  # Pruned weights then hold the graph of a pass.
    attained = torch.stack([class_margins(one, y) for one in outputs]).amin(0)
    network = MarginBounds(bounded, torch.float32)
    for method in METHODS:
        lower = network.lower(fw.input_box(x, eps), y, method)
        assert bool((lower <= attained + 1e-4 * (1 + attained.abs())).all()), method
    fw.verify(bounded, (x, y), eps, METHODS, restarts=0)


def test_copies_of_a_pruned_network_compute_the_same():
    model, shape = pruned()
    x = torch.rand(shape)
    model(x).sum().backward()
    bounded = fw.BoundedModule(model.eval(), x)
    assert torch.allclose(copy.copy(bounded.rebuilt(torch.float64))(x.double()).float(), model(x), atol=1e-6)


def test_a_network_without_parameters_is_verified():
    x = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    found = fw.verify(fw.BoundedModule(nn.Flatten().eval(), x), (x, torch.tensor([1, 0])), 0.1, METHODS)
    assert found.verified_error.count == 0


def test_a_parameter_that_is_read_in_python_warns():
    """Bounds keep the value that it had when the network was wrapped; training changes it."""
    model = Written(lambda s, x: s.l(x).clamp(max=float(s.a)), l=linear(4, 3), a=nn.Parameter(torch.tensor(2.0)))
    with pytest.warns(fw.TracedPathWarning, match=r"reads the value of a tensor at .*test_functions\.py"):
        fw.BoundedModule(model.eval(), torch.rand(2, 4))


@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda x: x.unsqueeze(0).squeeze(), "Squeeze"),
        (lambda x: x[:, [-1, 0, 1, 2]], "Gather"),
        (lambda x: torch.einsum("bi,ij->bj", x, torch.eye(4)), "(bi,ij->bj|Einsum)"),
    ],
)
def test_failed_conversions_name_the_operator(call, operator):
    """Where a release takes the form, the bounds are those of the model."""
    model = Written(lambda s, x: s.l(call(x)), l=linear(4, 3)).eval()
    x = torch.rand(2, 4)
    try:
        bounded = fw.BoundedModule(model, x)
    except NotImplementedError as error:
        assert re.search(operator, str(error))  # noqa: PT017 (releases differ in what they take)
    else:
        assert torch.allclose(bounded(x), model(x), atol=1e-6)
