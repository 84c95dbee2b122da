"""ONNX files for a single sample, as other tools write them: read, compared sample by sample, and verified."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli, verification
from lirpa_fastwarmup.verification import METHODS

IMAGE, VECTOR = (1, 6, 6), (5,)
CLASSES = 3


def draw(*shape, scale=0.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


C, CB = draw(2, 1, 3, 3), draw(2)  # (1, 6, 6) -> (2, 4, 4).
W, B = draw(CLASSES, 32), draw(CLASSES)
V, VB, U, UB = draw(8, 5), draw(8), draw(CLASSES, 8), draw(CLASSES)
G = torch.tensor([0.7, 1.6])
MEAN = torch.tensor([0.5, 0.1, -0.2, 0.0, 1.0])


class Shift(nn.Module):
    def forward(self, x):
        return x - MEAN


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def with_values(layer, weight, bias):
    layer.weight, layer.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    return layer


def convolution():
    return with_values(nn.Conv2d(1, 2, 3), C, CB), nn.ReLU()


def linear(weight, bias):
    return with_values(nn.Linear(*weight.shape[::-1]), weight, bias)


def same_everywhere(value):
    norm = with_values(nn.BatchNorm2d(len(value)), value, value)
    norm.running_mean, norm.running_var = value.clone(), value.clone()
    return norm


conv_net = nn.Sequential(*convolution(), nn.Flatten(), linear(W, B))
normalized_net = nn.Sequential(convolution()[0], same_everywhere(G), nn.ReLU(), nn.Flatten(), linear(W, B)).eval()
pooled_net = nn.Sequential(*convolution(), Pool(), linear(W[:, :2], B))
vector_net = nn.Sequential(Shift(), linear(V, VB), nn.ReLU(), linear(U, UB))
CONV = [("Conv", ["x", C, CB]), ("Relu", ["h0"])]
HIDDEN = [("MatMul", [None, V.T]), ("Add", [None, VB]), ("Relu", [None]), ("MatMul", [None, U.T]), ("Add", [None, UB])]
GEMMS = [
    ("Gemm", [None, V, VB], {"transB": 1}),
    ("Relu", [None]),
    ("Gemm", [None, U, UB], {"transB": 1}),
]
# Input shape of the file, shape of a sample, nodes (None is the result of the node before), the same function in torch,
# and whether the network that is read accepts batches.
FILES = {
    "flatten": (
        (1, *IMAGE),
        IMAGE,
        [*CONV, ("Flatten", [None]), ("Gemm", [None, W, B], {"transB": 1})],
        conv_net,
        True,
    ),
    "reshape [1, -1]": (
        (1, *IMAGE),
        IMAGE,
        [*CONV, ("Reshape", [None, [1, -1]]), ("Gemm", [None, W, B], {"transB": 1})],
        conv_net,
        True,
    ),
    "reshape [1, 32], MatMul and Add": (
        (1, *IMAGE),
        IMAGE,
        [*CONV, ("Reshape", [None, [1, 32]]), ("MatMul", [None, W.T]), ("Add", [None, B])],
        conv_net,
        True,
    ),
    "reshape [-1]": (
        (1, *IMAGE),
        IMAGE,
        [*CONV, ("Reshape", [None, [-1]]), ("MatMul", [None, W.T]), ("Add", [None, B])],
        conv_net,
        True,
    ),
    # For a larger batch this computes the mean over all samples, without an error.
    "mean that would mix a batch": (
        (1, *IMAGE),
        IMAGE,
        [
            *CONV,
            ("Reshape", [None, [1, 2, -1]]),
            ("ReduceMean", [None], {"axes": [2], "keepdims": 0}),
            ("Gemm", [None, W[:, :2], B], {"transB": 1}),
        ],
        pooled_net,
        True,
    ),
    # A constant of one sample, which fits no batch of several.
    "concatenation": (
        (1, *IMAGE),
        IMAGE,
        [
            *CONV,
            ("Reshape", [None, [1, 32]]),
            ("Concat", [None, torch.ones(1, 1)], {"axis": 1}),
            ("Gemm", [None, torch.cat([W, B.view(3, 1)], 1), 0 * B], {"transB": 1}),
        ],
        conv_net,
        False,
    ),
    "ACAS Xu": ((1, 1, 1, 5), VECTOR, [("Sub", ["x", MEAN]), ("Flatten", [None]), *HIDDEN], vector_net, True),
    "ACAS Xu, as an image": (
        (1, 1, 1, 5),
        (1, 1, 5),
        [("Sub", ["x", MEAN]), ("Flatten", [None]), *HIDDEN],
        nn.Sequential(nn.Flatten(), vector_net),
        True,
    ),
    "no batch dimension": (VECTOR, VECTOR, [("Sub", ["x", MEAN]), *HIDDEN], vector_net, True),
    "no batch dimension, reshape [1, 5]": (
        VECTOR,
        VECTOR,
        [("Sub", ["x", MEAN]), ("Reshape", [None, [1, 5]]), *GEMMS],
        vector_net,
        True,
    ),
    # As the TorchScript exporter writes weights that are equal: here the statistics and weights of a BatchNorm.
    "one constant under several names": (
        (1, *IMAGE),
        IMAGE,
        [
            ("Identity", [G]),
            ("Identity", ["h0"]),
            ("Conv", ["x", C, CB]),
            ("BatchNormalization", [None, "h0", G, "h1", G]),
            ("Relu", [None]),
            ("Flatten", [None]),
            ("Gemm", [None, W, B], {"transB": 1}),
        ],
        normalized_net,
        True,
    ),
    "vectors of a file for images": (
        (36,),
        IMAGE,
        [
            ("Reshape", ["x", [1, *IMAGE]]),
            ("Conv", [None, C, CB]),
            ("Relu", [None]),
            ("Flatten", [None]),
            ("Gemm", [None, W, B], {"transB": 1}),
        ],
        conv_net,
        True,
    ),
}


def write(path, shape, nodes, opset=13):
    made, constants, last = [], [], None
    for number, (kind, inputs, *attributes) in enumerate(nodes):
        names = []
        for place, given in enumerate(inputs):
            name = last if given is None else given
            if not isinstance(name, str):
                value = given.numpy() if isinstance(given, torch.Tensor) else np.array(given, dtype=np.int64)
                name = f"c{number}_{place}"
                constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
            names.append(name)
        last = "y" if number == len(nodes) - 1 else f"h{number}"
        made.append(helper.make_node(kind, names, [last], **(attributes[0] if attributes else {})))
    graph = helper.make_graph(
        made,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return path


@pytest.mark.parametrize("name", FILES)
def test_files_for_one_sample_are_read_and_verified(name, tmp_path):
    shape, sample, nodes, reference, any_batch = FILES[name]
    path = write(tmp_path / "network.onnx", shape, nodes)
    x = torch.rand(5, *sample, generator=torch.Generator().manual_seed(0))
    read = verification.read_onnx(path, sample)
    session = onnxruntime.InferenceSession(str(path))
    for one in x:
        (found,) = session.run(None, {"x": one.reshape(shape).numpy()})
        assert np.allclose(found.reshape(1, -1), read(one[None]).detach().numpy(), atol=1e-5)
    logits = torch.cat([read(one[None]) for one in x]).detach()
    assert torch.allclose(logits, reference(x), atol=1e-5)
    y = logits.argmax(1)
    bounded = fw.BoundedModule(read, x[:2] if any_batch else x[:1]).eval()
    assert bounded.any_batch is any_batch
    expected = fw.BoundedModule(reference, x[:2]).eval()
    certificates = [fw.verify(one, (x, y), 0.06, pgd_steps=5, restarts=1).certificates for one in (bounded, expected)]
    for one, other in zip(*certificates, strict=True):
        assert (one.index, one.verified) == (other.index, other.verified)
        assert one.margin == pytest.approx(other.margin, abs=1e-4)


def test_radii_and_methods_of_a_network_for_one_sample(tmp_path):
    shape, sample, nodes, reference, _ = FILES["concatenation"]
    read = verification.read_onnx(write(tmp_path / "network.onnx", shape, nodes), sample)
    x = torch.rand(3, *sample)
    y = reference(x).argmax(1)
    bounded, expected = fw.BoundedModule(read, x[:1]).eval(), fw.BoundedModule(reference, x[:2]).eval()
    found = fw.verify(bounded, [(x, y)], 0.03, METHODS, float64=True, restarts=1, pgd_steps=5)  # The batch is split.
    direct = fw.verify(expected, (x, y), 0.03, METHODS, restarts=1, pgd_steps=5)
    assert [one.verified for one in found.certificates] == [one.verified for one in direct.certificates]
    radii = [verification.certified_radii(one, (x, y), methods=("IBP",), restarts=0) for one in (bounded, expected)]
    for one, other in zip(*radii, strict=True):
        assert one.radius == pytest.approx(other.radius, abs=3e-4)


def test_a_file_for_one_sample_refuses_others(tmp_path):
    shape, sample, nodes, *_ = FILES["concatenation"]
    read = verification.read_onnx(write(tmp_path / "network.onnx", shape, nodes), sample)
    with pytest.raises(RuntimeError):
        read(torch.rand(2, *sample))


@pytest.mark.parametrize(
    ("shape", "sample"), [((1, 6, 6, 3), (3, 6, 6)), ((2, *IMAGE), IMAGE), ((1, 3, 6, 6), IMAGE), ((7,), VECTOR)]
)
def test_files_for_other_samples_are_refused(shape, sample, tmp_path):
    path = write(tmp_path / "network.onnx", shape, [("Relu", ["x"])])
    with pytest.raises(ValueError, match=r"the input of .*network\.onnx has the shape .* and a sample of the dataset"):
        verification.read_onnx(path, sample)


def test_what_onnxruntime_cannot_run_is_an_error_in_a_line(tmp_path):
    path = write(tmp_path / "network.onnx", VECTOR, [("MatMul", ["x", V.T]), ("Add", [None, VB])])
    content = onnx.load(str(path))
    content.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    onnx.save(content, str(path))
    with pytest.raises(ValueError, match=r"onnxruntime cannot run .*network\.onnx"):
        verification.read_onnx(path, VECTOR)


@pytest.mark.parametrize("name", ["flatten", "concatenation"])
def test_verify_reads_files_for_one_sample(name, tmp_path, capsys):
    shape, sample, nodes, reference, _ = FILES[name]
    path = write(tmp_path / "network.onnx", shape, nodes)
    x = torch.rand(20, *sample)
    for part in ("train", "test"):
        labels = reference(x).argmax(1).numpy()
        labels[0] = CLASSES - 1
        np.savez(tmp_path / f"{part}.npz", inputs=x.numpy(), labels=labels, low=0.0, high=1.0)
    out = tmp_path / "out"
    command = ["verify", "--model", str(path), "--dataset", str(tmp_path), "--eps", "0.01", "--out", str(out)]
    assert cli.main([*command, "--limit", "10", "--pgd-steps", "3", "--device", "cpu"]) == 0
    found = json.loads((out / "verification.json").read_text())
    assert found["samples"] == 10
    assert found["input_range"] == [0.0, 1.0]
    expected = fw.verify(fw.BoundedModule(reference, x[:2]).eval(), (x[::2], torch.from_numpy(labels[::2])), 0.01)
    assert found["results"][0]["verified_error"]["value"] == pytest.approx(expected.verified_error.value)
