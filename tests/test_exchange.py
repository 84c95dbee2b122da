"""Networks survive ONNX, properties say what they should, and files that cannot be used are refused by name."""

from __future__ import annotations

import csv
import re

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import verification
from lirpa_fastwarmup.boxes import box_ends
from lirpa_fastwarmup.verification import METHODS, pgd
from lirpa_fastwarmup.verification import onnx as onnx_file
from tests import networks

NETWORKS = {
    **networks.ON_8X8,
    "cnn7": lambda: fw.models.cnn7((1, 8, 8), 3, width=4, hidden=16, mean=(0.4,), std=(0.2,)),
    "average pooling": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 3)
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    model = NETWORKS[request.param]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def test_onnx_agrees_with_torch_for_every_batch_size(network, tmp_path):
    path = tmp_path / "network.onnx"
    verification.write_onnx(network, (1, 8, 8), path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path))
    assert [one.name for one in session.get_inputs()] == ["input"]
    assert [one.name for one in session.get_outputs()] == ["logits"]
    for count in (1, 2, 5):
        x = torch.rand(count, 1, 8, 8)
        (found,) = session.run(None, {"input": x.numpy()})
        assert torch.allclose(torch.from_numpy(found), network(x), atol=1e-5)


# The exporter of PyTorch 2.4 writes x.view(x.shape[0], -1) as a shape that is computed, which the converter reads.
@pytest.mark.filterwarnings(*["ignore:the network's path.*onnx2pytorch"] * (torch.__version__ < "2.5"))
def test_what_is_read_back_has_the_same_bounds(network, x, tmp_path):
    path = tmp_path / "network.onnx"
    verification.write_onnx(network, (1, 8, 8), path)
    read = verification.read_onnx(path, (1, 8, 8))
    assert not read.training
    assert torch.allclose(read(x), network(x), atol=1e-5)
    box = fw.input_box(x, 0.03)
    for method in ("IBP", "CROWN-IBP"):
        found = fw.BoundedModule(read, x).compute_bounds(x=(box,), method=method)
        expected = fw.BoundedModule(network, x).compute_bounds(x=(box,), method=method)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-4), method
    y = network(x).argmax(1)
    certificates = fw.verify(fw.BoundedModule(read, x), (x, y), 0.01, METHODS, float64=True, restarts=1).certificates
    direct = fw.verify(fw.BoundedModule(network, x), (x, y), 0.01, METHODS, restarts=1).certificates
    assert [one.verified for one in certificates] == [one.verified for one in direct]


def onnx_model(nodes, constants, path, outputs=("y",), inputs=("x",), shape=("batch", 3)):
    """An ONNX file of a graph over inputs (batch, 1, 8, 8)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 8, 8]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("my.own", 1)], ir_version=8
    )
    onnx.save(model, str(path))
    return path


LINEAR = [
    helper.make_node("Flatten", ["h"], ["f"]),
    helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1),
]


def weights():
    return {"w": torch.randn(3, 64), "b": torch.randn(3)}


@pytest.mark.parametrize("mode", [0, 1])
def test_batchnorm_of_a_foreign_file(mode, x, tmp_path):
    norm = nn.BatchNorm2d(1).eval()
    norm.running_mean.fill_(0.3)
    constants = {"s": norm.weight, "o": norm.bias, "m": norm.running_mean, "v": norm.running_var, **weights()}
    outputs = ["h"] if mode == 0 else ["h", "m2", "v2"]
    node = helper.make_node("BatchNormalization", ["x", "s", "o", "m", "v"], outputs, training_mode=mode)
    path = onnx_model([node, *LINEAR], constants, tmp_path / "bn.onnx")
    if mode:
        with pytest.raises(ValueError, match="was exported in training mode"):
            verification.read_onnx(path, (1, 8, 8))
        return
    read = verification.read_onnx(path, (1, 8, 8))
    expected = norm(x).flatten(1) @ constants["w"].T + constants["b"]
    assert torch.allclose(read(x), expected, atol=1e-5)


def test_an_operator_that_the_engine_lacks_is_named(tmp_path):
    nodes = [helper.make_node("Round", ["x"], ["h"]), *LINEAR]
    read = verification.read_onnx(onnx_model(nodes, weights(), tmp_path / "round.onnx"), (1, 8, 8))
    with pytest.raises(NotImplementedError, match=r"has no bounds for the operator\(s\) .*[Rr]ound"):
        fw.BoundedModule(read, torch.rand(2, 1, 8, 8))


def test_an_operator_that_cannot_be_converted_is_named(tmp_path):
    nodes = [helper.make_node("Frobnicate", ["x"], ["h"], domain="my.own"), *LINEAR]
    path = onnx_model(nodes, weights(), tmp_path / "own.onnx")
    with pytest.raises(NotImplementedError, match="Frobnicate"):
        verification.read_onnx(path, (1, 8, 8))


def test_files_that_are_no_networks(tmp_path):
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"this is no protobuf at all")
    with pytest.raises(ValueError, match="is no valid ONNX file"):
        verification.read_onnx(garbage, (1, 8, 8))
    with pytest.raises(FileNotFoundError):
        verification.read_onnx(tmp_path / "absent.onnx", (1, 8, 8))
    two = [helper.make_node("Add", ["x", "z"], ["h"]), *LINEAR]
    with pytest.raises(ValueError, match=r"has the inputs x, z and 1 output"):
        verification.read_onnx(onnx_model(two, weights(), tmp_path / "two.onnx", inputs=("x", "z")), (1, 8, 8))
    image = [helper.make_node("Identity", ["x"], ["y"])]
    with pytest.raises(ValueError, match=r"output of .* for 8 inputs is \(8, 1, 8, 8\)"):
        verification.read_onnx(onnx_model(image, {}, tmp_path / "image.onnx", shape=("batch", 1, 8, 8)), (1, 8, 8))
    fine = onnx_model([helper.make_node("Relu", ["x"], ["h"]), *LINEAR], weights(), tmp_path / "fine.onnx")
    with pytest.raises(ValueError, match=r"cannot be run on a batch of 8 input\(s\) of shape \(3, 32, 32\)"):
        verification.read_onnx(fine, (3, 32, 32))


def test_a_wrong_conversion_is_noticed(x, tmp_path, monkeypatch):
    path = tmp_path / "network.onnx"
    model = networks.multilayer(batchnorm=False).eval()
    verification.write_onnx(model, (1, 8, 8), path)
    converter = onnx_file._converter()

    class Wrong(nn.Module):
        def __init__(self, content, **kwargs):
            super().__init__()
            self.right = converter.ConvertModel(content, **kwargs)

        def forward(self, x):
            return self.right(x) + 0.01

    monkeypatch.setattr(onnx_file, "_converter", lambda: type("Module", (), {"ConvertModel": Wrong}))
    with pytest.raises(ValueError, match=r"onnxruntime computes other logits than PyTorch, by up to 0\.01"):
        verification.read_onnx(path, (1, 8, 8))


def test_a_conversion_that_is_wrong_far_from_0_is_noticed(tmp_path):
    """onnx2pytorch takes every alpha near 1/6 for 1/6, which samples on [0, 1] do not show behind a small weight."""
    small = {**weights(), "scale": torch.tensor(0.01)}
    nodes = [helper.make_node("Mul", ["x", "scale"], ["s"]), helper.make_node("HardSigmoid", ["s"], ["h"], alpha=0.16)]
    path = onnx_model([*nodes, *LINEAR], small, tmp_path / "hard.onnx")
    with pytest.raises(ValueError, match="onnxruntime computes other logits than PyTorch"):
        verification.read_onnx(path, (1, 8, 8))


@pytest.mark.parametrize("operator", ["Sqrt", "Exp"])
def test_samples_outside_of_a_functions_domain_are_no_difference(operator, tmp_path):
    path = onnx_model([helper.make_node(operator, ["x"], ["h"]), *LINEAR], weights(), tmp_path / "partial.onnx")
    x = torch.rand(4, 1, 8, 8)
    (expected,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    assert torch.allclose(verification.read_onnx(path, (1, 8, 8))(x), torch.from_numpy(expected), atol=1e-5)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = onnx_file.importlib.util.find_spec
    for package, message in (
        ("onnx2pytorch", "pip install --no-deps onnx2pytorch"),
        ("onnxruntime", r"ONNX files need onnxruntime: .*lirpa_fastwarmup\[onnx\]"),
    ):
        path = tmp_path / f"{package}.onnx"
        verification.write_onnx(networks.multilayer(batchnorm=False).eval(), (1, 8, 8), path)
        with monkeypatch.context() as patch:
            patch.setattr(onnx_file.importlib.util, "find_spec", lambda n, p=package: None if n == p else find(n))
            with pytest.raises(ImportError, match=message):
                verification.read_onnx(path, (1, 8, 8))


def read_property(text):
    """A reader of its own for what :func:`verification.robustness_property` writes: bounds, and pairs Y_a >= Y_b."""
    lower, upper, pairs = {}, {}, []
    for sign, name, value in re.findall(r"\(assert \(([<>])= X_(\d+) (-?[\d.]+)\)\)", text):
        (lower if sign == ">" else upper)[int(name)] = float(value)
    disjunction = text.split("(assert (or")[1]
    for one, other in re.findall(r"\(and \(>= Y_(\d+) Y_(\d+)\)\)", disjunction):
        pairs.append((int(one), int(other)))
    assert text.count("(") == text.count(")")
    assert "e-" not in text.replace("declare-const", "")  # No exponents.
    return lower, upper, pairs


@pytest.mark.parametrize("eps", [0.1, 8 / 255, 1e-7])
def test_a_property_is_about_exactly_the_box_and_the_label(eps):
    torch.manual_seed(3)
    model = networks.multilayer(batchnorm=False).eval()
    x = torch.rand(4, 1, 8, 8)
    x[0, 0, 0, 0] = 1e-9
    y = model(x).argmax(1)
    lower, upper = box_ends(x, eps, (0.0, 1.0))
    text = verification.robustness_property(lower[0], upper[0], int(y[0]), 3, comment="two\nlines")
    assert text.startswith("; two\n; lines\n")
    assert text.count("(declare-const X_") == 64
    assert text.count("(declare-const Y_") == 3
    lows, highs, pairs = read_property(text)
    assert [lows[i] for i in range(64)] == lower[0].flatten().double().tolist()
    assert [highs[i] for i in range(64)] == upper[0].flatten().double().tolist()

    def violated(logits):
        return any(bool(logits[one] >= logits[other]) for one, other in pairs)

    assert not violated(model(x)[0])
    adversarial = pgd(model, x, y, 1.0)  # In a box this large there is a counterexample.
    moved = (adversarial != x).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved
    for index in moved:
        pairs = read_property(verification.robustness_property(lower[0], upper[0], int(y[index]), 3))[2]
        assert violated(model(adversarial)[index])


def test_bad_properties():
    with pytest.raises(ValueError, match="label 3 is none of the 3 classes"):
        verification.robustness_property(torch.zeros(2), torch.ones(2), 3, 3)
    with pytest.raises(ValueError, match="the box is empty"):
        verification.robustness_property(torch.ones(2), torch.zeros(2), 0, 3)


def test_the_folder_for_other_verifiers(x, y, tmp_path):
    model = networks.convolutional().eval()
    out = tmp_path / "a" / "b"
    verification.export(model, x[:3], y[:3], 0.1, out, indices=[4, 70, 1234567], timeout=60)
    with (out / "instances.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["network.onnx"] * 3
    assert [row[1] for row in rows] == [f"properties/{name}.vnnlib" for name in ("000004", "000070", "1234567")]
    assert [row[2] for row in rows] == ["60"] * 3
    for place, row in enumerate(rows):
        assert (out / row[0]).is_file()
        lows, highs, pairs = read_property((out / row[1]).read_text())
        assert len(lows) == len(highs) == 64
        assert {other for _, other in pairs} == {int(y[place])}
    configuration = (out / "abcrown.yaml").read_text()
    assert "root_path: ${CONFIG_PATH}" in configuration
    assert "csv_name: instances.csv" in configuration
    assert "input_shape: [-1, 1, 8, 8]" in configuration


def test_bad_exports_write_nothing(x, y, tmp_path):
    model = networks.convolutional()
    out = tmp_path / "out"
    for arguments, message in (
        ((model.train(), x, y, 0.1), "in training mode"),
        ((model.eval(), x, y, 0.0), "eps must be above 0"),
        ((model.eval(), x * 2, y, 0.1), "inputs must lie in input_range"),
        ((model.eval(), x, y + 9, 0.1), "labels must be between"),
    ):
        if message != "in training mode":
            model.eval()
        else:
            model.train()
        with pytest.raises(ValueError, match=message):
            verification.export(*arguments, out)
    assert not out.exists()
