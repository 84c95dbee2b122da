"""What a BoundedModule accepts: the same function, tested operators, and a refusal by name of everything else."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, _exporter_module, engine
from lirpa_fastwarmup.engine.operators import OPERATORS
from tests.networks import Function

METHODS = ("IBP", "CROWN-IBP", "CROWN")


def around(operator: nn.Module, x: torch.Tensor) -> nn.Sequential:
    """``operator`` between a convolution and a linear layer."""
    features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), operator)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(features(x).flatten(1).shape[1], 3)).eval()


@pytest.fixture
def image():
    return torch.rand(3, 2, 8, 8)


@pytest.mark.parametrize(
    ("operator", "place"),
    [
        (nn.AvgPool2d(2, divisor_override=3), "avg_pool2d in module '0.2'"),
        (Function(lambda x: F.avg_pool2d(x, 2, divisor_override=5) + x[:, :, ::2, ::2]), "avg_pool2d in module '0.2'"),
    ],
)
def test_another_function_than_the_models_is_refused_where_the_two_part(operator, place, image):
    with pytest.raises(NotImplementedError, match="computes another function than the model") as refused:
        fw.BoundedModule(around(operator, image), image)
    assert place in str(refused.value)


def test_a_function_that_differs_at_another_batch_size_is_refused(image):
    class OfItsBatch(nn.Module):
        def forward(self, x):
            return x * float(x.shape[0])

    with pytest.raises(NotImplementedError, match="computes another function than the model"):
        fw.BoundedModule(around(OfItsBatch(), image), image)


def test_networks_for_one_batch_size_are_accepted(image):
    class Fixed(nn.Module):
        def forward(self, x):
            assert len(x) == 3
            return x

    assert fw.BoundedModule(around(Fixed(), image), image)(image).shape == (3, 3)


def test_networks_that_refuse_random_inputs_are_compared_on_the_example(image):
    class Pixels(nn.Module):
        def forward(self, x):
            if x.min() < 0:
                raise ValueError("these are no pixels")
            return x

    model = nn.Sequential(Pixels(), around(nn.Identity(), image))
    with pytest.warns(fw.TracedPathWarning):
        assert torch.allclose(fw.BoundedModule(model, image)(image), model(image))


def test_the_check_leaves_model_and_random_state_alone(image):
    model = nn.Sequential(around(nn.BatchNorm2d(4), image)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    bounded = fw.BoundedModule(model, image)
    assert bounded.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_large_outputs_differ_by_their_own_rounding_alone(image):
    model = around(nn.Identity(), image)
    with torch.no_grad():
        model[2].weight.mul_(1e6)
        model[2].weight[:, ::2] = -model[2].weight[:, 1::2]
    fw.BoundedModule(model, image)


@pytest.mark.parametrize(
    ("operator", "named"),
    [
        (nn.LeakyReLU(1.5), "LeakyRelu in module '0.2' (LeakyReLU) (its slope is 1.5"),
        (nn.LeakyReLU(-0.3), "LeakyRelu in module '0.2' (LeakyReLU) (its slope is -0.3"),
        (Function(lambda x: torch.sqrt(x.abs() + 0.1)), "Sqrt in module '0.2' (Function)"),
        (Function(lambda x: x / (x.abs().sum((1, 2, 3), keepdim=True) + 1)), "Instead of "),
        (Function(lambda x: x.sin()), "Sin in module '0.2' (Function)"),
        (Function(lambda x: x.transpose(0, 1).flip(2).transpose(0, 1)), "does not begin with the batch, of 3"),
    ],
)
def test_untested_operators_are_refused_by_name(operator, named, image):
    with pytest.raises(NotImplementedError, match="have not been tested for") as refused:
        fw.BoundedModule(around(operator, image), image)
    assert named in str(refused.value)
    assert "allow_untested=True" in str(refused.value)


class Attention(nn.Module):
    """Attention over the columns of an image, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = x.flatten(1, 2)
        return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1) @ self.value(x)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.heads(*3 * [x.flatten(1, 2)])[0]


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.cell = kind(8, 4, batch_first=True)

    def forward(self, x):
        return self.cell(x.flatten(1, 2))[0]


REFUSED = {
    "GroupNorm": (nn.GroupNorm(2, 4), "(GroupNorm). Instead of GroupNorm, use nn.BatchNorm1d"),
    "InstanceNorm": (nn.InstanceNorm2d(4), "(InstanceNorm2d). Instead of InstanceNorm2d, use nn.BatchNorm1d"),
    "LayerNorm": (nn.LayerNorm(8), "(LayerNorm). Instead of LayerNorm, use nn.BatchNorm1d"),
    "PReLU": (nn.PReLU(4), "(PReLU). Instead of PReLU, use nn.LeakyReLU"),
    "CELU": (nn.CELU(), "(CELU). Instead of CELU, use nn.SiLU, nn.GELU(approximate='tanh')"),
    "Softmax": (nn.Softmax(1), "Instead of softmax, return the logits"),
    "attention": (Attention(), "in module '0.2' (Attention)"),
    "MultiheadAttention": (Heads(), "in module '0.2.heads' (MultiheadAttention). Instead of MultiheadAttention, use"),
    "GRU": (Recurrent(nn.GRU), "GRU in module '0.2.cell' (GRU). Instead of GRU, use nn.Conv1d"),
    "LSTM": (Recurrent(nn.LSTM), "LSTM in module '0.2.cell' (LSTM). Instead of LSTM, use nn.Conv1d"),
    "RNN": (Recurrent(nn.RNN), "in module '0.2.cell' (RNN)"),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(3), "(AdaptiveAvgPool2d). Instead of AdaptiveAvgPool2d, use a size"),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(3), "(AdaptiveMaxPool2d). Instead of AdaptiveMaxPool2d, use a size"),
    "normalize": (Function(F.normalize), "in module '0.2' (Function)"),
    "x ** 3": (Function(lambda x: x**3), "Pow in module '0.2' (Function). Instead of Pow, use products"),
    "exp": (Function(torch.exp), "Exp in module '0.2' (Function). Instead of Exp, use nn.Tanh"),
    "log": (Function(lambda x: (x + 1).log()), "Log in module '0.2' (Function)"),
    "where": (Function(lambda x: torch.where(x > 0, x, 0.1 * x)), "Greater in module '0.2' (Function). Instead of"),
    "einsum": (Function(lambda x: torch.einsum("bchw,cd->bdhw", x, torch.ones(4, 2))), "Instead of einsum, use nn.Lin"),
    "maximum": (Function(lambda x: torch.maximum(x, 1 - x)), "Max in module '0.2' (Function). Instead of Max, use a +"),
    "amax": (Function(lambda x: x.amax((2, 3))), "ReduceMax in module '0.2' (Function). Instead of ReduceMax, use max"),
    "nearest": (nn.Upsample(scale_factor=2), "in module '0.2' (Upsample). Instead of Upsample, use nn.ConvTranspose2d"),
    "size": (
        nn.Upsample(size=5, mode="bilinear"),
        "in module '0.2' (Upsample). Instead of Upsample, use nn.ConvTransp",
    ),
    "value": (nn.ConstantPad2d(1, 0.5), "in module '0.2' (ConstantPad2d) (padding of the batch, or with other numbers"),
    "GLU": (nn.GLU(1), "(GLU). Instead of GLU, use slices"),
    "weight_norm": (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "use a plain weight"),
}


@pytest.mark.filterwarnings("ignore:the network's path")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("silent", [False, True])
def test_layers_are_refused_by_the_users_name_with_something_to_write_instead(name, silent, image):
    operator, text = REFUSED[name]
    logging.disable(logging.CRITICAL if silent else logging.NOTSET)
    try:
        with pytest.raises(NotImplementedError, match=r"0\.\d|operators\.md") as refused:
            fw.BoundedModule(around(operator, image), image)
    finally:
        logging.disable(logging.NOTSET)
    assert text in str(refused.value)
    assert "Error" not in str(refused.value)
    assert "module '0.2" in str(refused.value)


def test_an_embedding_is_accepted_or_refused_with_the_release_that_accepts_it():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(7, 4), nn.Linear(12, 3)

        def forward(self, words):
            return self.linear(self.embedding(words).flatten(1))

    words = torch.randint(0, 7, (2, 3))
    if ENGINE_VERSION.startswith("0.3"):
        assert fw.BoundedModule(Words(), words)(words).shape == (2, 3)
        return
    with pytest.raises(NotImplementedError, match=r"module 'embedding' \(Embedding\)\. Instead .* use auto_LiRPA 0\.3"):
        fw.BoundedModule(Words(), words)


def test_operators_of_one_layer_are_named_together(image):
    with pytest.raises(NotImplementedError, match=r"\w+, \w+ in module '0\.2' \(LayerNorm\)\. Instead"):
        fw.BoundedModule(around(nn.LayerNorm(8), image), image)


@pytest.mark.parametrize("operator", [nn.GELU(), nn.ELU(), nn.SELU()])
def test_layers_with_ibp_bounds_alone_say_what_crown_bounds(operator, image):
    bounded = fw.BoundedModule(around(operator, image), image)
    lower, upper = bounded.compute_bounds(x=(fw.input_box(image, 0.1),), method="IBP")
    points = [(image + 0.1 * (2 * torch.rand_like(image) - 1)).clamp(0, 1) for _ in range(50)]
    assert all(bool((lower <= bounded(point)).all() and (bounded(point) <= upper).all()) for point in points)
    with pytest.raises(NotImplementedError, match=r"in module '0\.2' .* Instead of .*GELU\(approximate='tanh'\)"):
        bounded.compute_bounds(x=(fw.input_box(image, 0.1),), method="CROWN")


def test_intervals_of_elu_are_exact_and_have_the_gradient_of_their_ends():
    elu = OPERATORS["Elu"].classes[0]({"alpha": -1.5}, [], 0, None)
    lower, upper = torch.tensor([-2.0, -1.0, 0.5, -1.0]), torch.tensor([-1.0, 2.0, 1.0, -1.0])
    ends = lower.requires_grad_(True), upper.requires_grad_(True)
    low, high = elu.interval_propagate(ends)
    grid = torch.stack([lower + (upper - lower) * step / 1000 for step in range(1001)])
    values = F.elu(grid, -1.5)
    assert torch.allclose(low, values.amin(0), atol=5e-3)
    assert torch.allclose(high, values.amax(0), atol=5e-3)
    (slope,) = torch.autograd.grad(high.sum(), lower, retain_graph=True)
    assert torch.allclose(slope[:1], torch.tensor([-1.5]) * lower[:1].exp())


def test_allowed_untested_operators_are_named_by_the_bounded_module_and_its_copies(image):
    bounded = fw.BoundedModule(around(Function(torch.sin), image), image, allow_untested=True)
    for one in (bounded, copy.deepcopy(bounded), bounded.rebuilt(torch.float64)):
        assert one.untested == ("Sin in module '0.2' (Function)",)
    assert fw.BoundedModule(around(nn.Tanh(), image), image).untested == ()


def test_users_own_operators_are_untested(image):
    class MyTanh(engine.bound_general.BoundTanh):
        pass

    model, operators = around(nn.Tanh(), image), {"onnx::Tanh": MyTanh}
    with pytest.raises(NotImplementedError, match=r"have not been tested for MyTanh in module '0\.2' \(Tanh\)"):
        fw.BoundedModule(model, image, custom_ops=operators)
    bounded = fw.BoundedModule(model, image, custom_ops=operators, allow_untested=True)
    assert len(bounded.untested) == 1


def test_operators_with_ibp_bounds_alone_are_refused_by_crown(image):
    bounded = fw.BoundedModule(around(nn.Softplus(), image), image)
    box = fw.input_box(image, 0.01)
    bounded.compute_bounds(x=(box,), method="IBP")
    for method in ("CROWN", "CROWN-IBP"):
        with pytest.raises(NotImplementedError, match=r"has only IBP bounds for Softplus in module '0\.2'"):
            bounded.compute_bounds(x=(box,), method=method)


def test_perturbed_weights_are_refused(image):
    model = around(nn.Identity(), image)
    perturbation = engine.PerturbationLpNorm(norm=float("inf"), eps=0.1)
    model[2].weight = engine.BoundedParameter(model[2].weight.data, perturbation)
    with pytest.raises(NotImplementedError, match=r"perturbed weights \(2\.weight\)"):
        fw.BoundedModule(model, image)


@pytest.mark.parametrize(
    ("spatial", "mode"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3, 1, 2, dilation=2), nn.ReLU()), "matrix"),
        (nn.Sequential(nn.ConvTranspose2d(4, 2, 2, 2), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()), "matrix"),
        (nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 2, 3), nn.ReLU()), "matrix"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(2)), "patches"),  # No convolution below.
        (nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()), "patches"),
    ],
)
def test_coefficients_are_matrices_where_patches_are_wrong(spatial, mode, image):
    bounded = fw.BoundedModule(around(spatial, image), image)
    assert bounded.conv_mode == mode
    assert bounded.given_options == {}


def test_every_listed_operator_is_one_of_the_installed_engine_and_has_classes_of_its_own():
    classes = [cls for operator in OPERATORS.values() for cls in operator.classes]
    assert all(operator.classes for operator in OPERATORS.values())
    assert len(set(classes)) == len(classes)  # A class of two operators would have the attributes of the last.


def test_pickled_modules_keep_what_was_allowed(image):
    bounded = fw.BoundedModule(around(nn.LeakyReLU(1.5), image), image, allow_untested=True)
    assert len(bounded.untested) == 1
    assert pickle.loads(pickle.dumps(bounded)).untested == bounded.untested
    tested = fw.BoundedModule(around(nn.ReLU6(), image), image)
    assert pickle.loads(pickle.dumps(tested)).untested == ()


def test_a_failure_of_the_users_own_operator_is_raised_as_it_is(image):
    class Failing(engine.bound_general.BoundTanh):
        def interval_propagate(self, *v):
            raise LookupError("no table for these")

    model = around(nn.Tanh(), image)
    bounded = fw.BoundedModule(model, image, custom_ops={"onnx::Tanh": Failing}, allow_untested=True)
    with pytest.raises(LookupError, match="no table for these"):
        bounded.compute_bounds(x=(fw.input_box(image, 0.1),), method="IBP")


def test_a_failure_of_the_engine_names_the_layer(image, monkeypatch):
    bounded = fw.BoundedModule(around(nn.Conv2d(4, 4, 3), image), image)
    general = engine.bound_general
    monkeypatch.setattr(general.BoundConv, "interval_propagate", general.Bound.interval_propagate)
    with pytest.raises(NotImplementedError, match=r"failed in IBP at Conv in module '0\.0' \(NotImplementedError"):
        bounded.compute_bounds(x=(fw.input_box(image, 0.1),), method="IBP")


@pytest.mark.parametrize(
    "operator",
    [
        nn.ReLU6(),
        nn.Hardtanh(-0.1, 0.2),
        Function(lambda x: x.clamp(min=0.1)),
        Function(lambda x: x.clamp(max=0.1)),
        Function(lambda x: F.pad(x, (1, 0, 2, 1))),
        Function(lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect")),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        Function(lambda x: x[:, :, ::2].mean((2, 3), keepdim=True)),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    ],
)
def test_newer_tables_of_the_exporter_give_the_same_bounds(operator, image):
    model, box = around(operator, image), fw.input_box(image, 0.05)
    before = fw.BoundedModule(model, image).compute_bounds(x=(box,), method="CROWN")
    for opset in (11, 12):
        _exporter_module(f"symbolic_opset{opset}")
    bounded = fw.BoundedModule(model, image)
    for method in METHODS:
        lower, upper = bounded.compute_bounds(x=(box,), method=method)
        assert bool((lower <= model(image)).all() and (model(image) <= upper).all())
    after = bounded.compute_bounds(x=(box,), method="CROWN")
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(before, after, strict=True))


ONE = torch.ones(1)
# By operator: a function of a constant and of the one feature h, shape (1,), as another operand.
COMPUTED = {
    "a convolution's bias": lambda h: F.conv2d(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1), h),
    "a convolution's weight": lambda h: F.conv2d(torch.ones(1, 1, 2, 2), h.view(1, 1, 1, 1)),
    "a bias in one dimension": lambda h: F.conv1d(torch.zeros(1, 1, 4), torch.ones(1, 1, 1), h),
    "a transposed convolution's bias": lambda h: F.conv_transpose2d(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1), h),
    "BatchNorm's weight": lambda h: F.batch_norm(torch.ones(1, 1, 2, 2), 0 * ONE, ONE, h, 0 * ONE),
    "BatchNorm's bias": lambda h: F.batch_norm(torch.zeros(1, 1, 2, 2), 0 * ONE, ONE, ONE, h),
    "a linear layer's bias": lambda h: F.linear(torch.zeros(1, 1), torch.ones(1, 1), h),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_operands_of_which_bounds_read_one_end_are_refused(name):
    function = COMPUTED[name]
    model = nn.Sequential(nn.Linear(3, 1), Function(lambda h: function(h.view(1)).flatten(1)))
    with pytest.raises(NotImplementedError, match="depends on the input: use a constant"):
        fw.BoundedModule(model.eval(), torch.rand(1, 3))


def test_margins_of_a_last_bias_that_is_no_vector():
    weight, bias = torch.randn(4, 3), torch.tensor([[0.1, -0.2, 0.3]])
    head = Function(lambda h: torch.addmm(bias, h, weight))
    body, x, y = nn.Sequential(nn.Linear(5, 4), nn.ReLU()), torch.rand(3, 5), torch.tensor([0, 1, 2])
    last = nn.Linear(4, 3)
    last.weight, last.bias = nn.Parameter(weight.t()), nn.Parameter(bias[0])
    found, expected = (
        [one.margin for one in fw.verify(fw.BoundedModule(net, x).eval(), (x, y), 0.1, ("IBP",)).certificates]
        for net in (nn.Sequential(body, head), nn.Sequential(body, last))
    )
    # Without a vector, the layer is not merged with the margins.
    assert all(one <= other + 1e-6 for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ["forward", "Forward+Backward"])
def test_methods_of_the_engine_that_go_forward_are_refused(method):
    x = torch.rand(2, 3)
    bounded = fw.BoundedModule(nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.3), nn.Linear(4, 2)).eval(), x)
    with pytest.raises(NotImplementedError, match="have not been tested: use IBP"):
        bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method=method)


def test_patches_are_kept_on_square_images_and_for_one_group_alone():
    def mode(*convolutions, shape):
        model = nn.Sequential(*convolutions, nn.Flatten())
        return fw.BoundedModule(model.eval(), torch.rand(2, 2, *shape)).conv_mode

    plain = nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
    assert mode(*plain, shape=(6, 6)) == "patches"
    assert mode(*plain, shape=(3, 8)) == "matrix"
    assert mode(*plain, shape=(8, 3)) == "matrix"
    for odd in (
        nn.Conv2d(2, 4, (3, 1), padding=(1, 0)),
        nn.Conv2d(2, 4, 3, stride=(2, 1), padding=1),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
    ):
        assert mode(odd, nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), shape=(6, 6)) == "matrix"


def test_wide_images_get_no_certificate_from_patches():
    # Both releases put patches that outgrow the image in the wrong places of a matrix, unless the image is square.
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24, 3)),
    ).eval()
    x, eps = torch.rand(2, 1, 3, 8), 0.05
    bounds = []
    for options in ({}, {"conv_mode": "patches"}, {"conv_mode": "matrix"}):
        bounded = fw.BoundedModule(model, x, bound_opts=options)
        bounds.append(bounded.compute_bounds(x=(fw.input_box(x, eps),), method="CROWN"))
    corners = (x + eps * torch.randn(500, *x.shape).sign()).clamp(0, 1)
    outputs = model(corners.flatten(0, 1)).view(500, 2, 3)
    for lower, upper in bounds:
        assert bool(((outputs >= lower - 1e-5) & (outputs <= upper + 1e-5)).all())
        assert torch.allclose(lower, bounds[-1][0], atol=1e-5)
