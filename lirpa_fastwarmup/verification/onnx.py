"""Writes and reads ONNX files, and compares their outputs with onnxruntime."""

import importlib.machinery
import importlib.util
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_OPSET = 18
_OF_TORCHVISION = {  # onnx2pytorch imports these for operators on images, which no engine bounds.
    "torchvision": (),
    "torchvision.ops": ("box_convert", "deform_conv2d", "nms", "roi_align", "roi_pool"),
    "torchvision.io": ("ImageReadMode", "decode_image"),
}


def write_onnx(model: nn.Module, in_shape: Sequence[int], path: Path, *, original: nn.Module | None = None) -> None:
    """Write ``model``, in evaluation mode and float32, with inputs ``(batch, *in_shape)`` and outputs ``logits``.

    Raises ImportError if a package of the extra ``onnx`` is missing, and ValueError if onnxruntime's outputs for the
    file differ from the outputs of ``original`` (by default, ``model``).
    """
    _require("onnx", "onnxscript", "onnxruntime")
    example = _example(in_shape)
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"], "opset_version": _OPSET}
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings(action="ignore"), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        if "dynamic_shapes" in inspect.signature(torch.onnx.export).parameters:
            program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
            assert program is not None  # Not with dynamo=True.
            program.save(str(path), external_data=False)
        else:  # Before PyTorch 2.5.
            axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
            torch.onnx.export(model, (example,), str(path), dynamic_axes=axes, **names)
    expected = _outputs(model if original is None else original, [example], path)
    _require_equal(expected, _onnxruntime(path, example), path)


def read_onnx(path: Path, in_shape: Sequence[int]) -> nn.Module:
    """The network in an ONNX file, by onnx2pytorch, as a module in evaluation mode for ``(batch, *in_shape)``.

    A file for a single sample, with a first dimension of 1 or without one, becomes a network for batches if that
    computes the same, and otherwise one that refuses batches of more than one sample. Its input may also be the
    flattened sample, or differ from ``in_shape`` in dimensions of 1. Outputs are compared with onnxruntime's.
    """
    _require("onnx", "onnxruntime")
    content, example = _loaded(path), _example(in_shape)
    if (fixed := _fixed_shape(content, in_shape, path)) is not None:
        return _of_one_sample(content, path, fixed, example)
    model = _converted(content, path)
    output = _outputs(model, [example], path)
    if output.ndim != 2 or len(output) != len(example):
        raise ValueError(f"the output of {path} for 8 inputs is {tuple(output.shape)}, and should be (8, classes)")
    _require_equal(output, _onnxruntime(path, example), path)
    return model


def _converted(content: Any, path: Path) -> nn.Module:
    converter = _converter()
    try:
        with warnings.catch_warnings(action="ignore"):
            model: nn.Module = converter.ConvertModel(content, experimental=True).eval()
    except Exception as error:  # The converter raises many kinds of errors.
        operators = ", ".join(sorted({node.op_type for node in content.graph.node}))
        text = f"{path} cannot be converted to a PyTorch module: {error}. Its operators are {operators}: replace the "
        raise NotImplementedError(text + "one named, or pass the network as package.module:factory") from error
    return model


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[Tensor], path: Path) -> Tensor:
    try:
        return torch.cat([model(x) for x in batches])
    except Exception as error:  # Of any kind, after a conversion.
        count, *shape = batches[0].shape
        text = f"the network in {path} cannot be run on a batch of {count} input(s) of shape {tuple(shape)}: name the "
        raise ValueError(f"{text}dataset that it was trained on ({type(error).__name__}: {error})") from error


class _Reshaped(nn.Module):
    """A network whose input has a shape of its own; batches that do not fit into it raise RuntimeError."""

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.shape = network, tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.reshape(self.shape))
        # Margins are bounded together with a last layer that is followed by nothing.
        return logits if logits.ndim == 2 else logits.reshape(x.shape[0], -1)


def _fixed_shape(content: Any, in_shape: Sequence[int], path: Path) -> tuple[int, ...] | None:
    """The shape of the input in a file for a single sample; ``None`` if its first dimension is open."""
    (given,) = _inputs_of(content)
    shape = tuple(max(0, size.dim_value) for size in given.type.tensor_type.shape.dim)  # 0 for open sizes.
    if not shape or shape[0] == 0:
        return None
    if 0 in shape and len(shape) == 1 + len(in_shape):
        shape = (shape[0], *(size or expected for size, expected in zip(shape[1:], in_shape, strict=True)))
    found, expected = ([size for size in one if size != 1] for one in (shape, in_shape))
    is_flat = min(len(found), len(expected)) <= 1
    if found != expected and not (is_flat and math.prod(shape) == math.prod(in_shape)):
        text = f"the input of {path} has the shape {shape}, and a sample of the dataset {tuple(in_shape)}: name the "
        raise ValueError(text + "dataset that it was trained on, in this order; a fixed batch must be of one sample")
    return shape


def _of_one_sample(content: Any, path: Path, shape: tuple[int, ...], x: Tensor) -> nn.Module:
    """The network of a file for one sample of ``shape``: for batches, if that computes the same, or for one sample."""
    expected = torch.cat([_onnxruntime(path, one.reshape(shape)).reshape(1, -1) for one in x])
    sizes = shape[1:] if shape[0] == 1 and len(shape) > 1 else shape
    opened = _converted(_with_sizes(content, batch=True), path)
    batched = opened if sizes == x.shape[1:] else _Reshaped(opened, (-1, *sizes)).eval()
    with suppress(ValueError):
        _require_equal(_outputs(batched, [x], path), expected, path)
        return batched
    single = _Reshaped(_converted(_with_sizes(content, batch=False), path), shape).eval()
    _require_equal(_outputs(single, x.split(1), path), expected, path)
    return single


def _with_sizes(content: Any, *, batch: bool) -> Any:
    """A copy of a graph for one sample, with constant sizes of reshapes; ``batch`` opens their first dimension."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(content, data_prop=True)
    shapes = {one.name: one.type.tensor_type.shape.dim for one in (*inferred.graph.value_info, *inferred.graph.output)}
    for node in inferred.graph.node:
        sizes = [size.dim_value for size in shapes.get(node.output[0], ())]
        if node.op_type == "Reshape" and sizes and all(sizes):
            rest = sizes[1:] if sizes[0] == 1 and len(sizes) > 1 else sizes
            del node.input[1:], node.attribute[:]  # The attribute is that of before opset 5.
            node.attribute.append(onnx.helper.make_attribute("shape", [-1, *rest] if batch else sizes))
    return inferred


def _example(in_shape: Sequence[int]) -> Tensor:
    """Samples on [0, 1], and normal ones of several scales, as a wrong conversion may show far from 0 alone."""
    generator = torch.Generator().manual_seed(0)
    normal = [scale * torch.randn(2, *in_shape, generator=generator) for scale in (1, 10, 100)]
    return torch.cat([torch.rand(2, *in_shape, generator=generator), *normal])


def _loaded(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        content = onnx.load(str(path))
        onnx.checker.check_model(content)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} is no valid ONNX file: {str(error).splitlines()[0]}") from error
    inputs = [one.name for one in _inputs_of(content)]
    if len(inputs) != 1 or len(content.graph.output) != 1:
        text = f"{path} has the inputs {', '.join(inputs)} and {len(content.graph.output)} output(s); certificates "
        raise ValueError(text + "need a classifier with one input and one output")
    for node in content.graph.node:
        # The converter fails on this attribute, which BatchNormalization has since opset 14.
        modes = [one for one in node.attribute if one.name == "training_mode" and node.op_type == "BatchNormalization"]
        if any(mode.i for mode in modes):
            text = f"{path} was exported in training mode ({node.name or node.op_type} normalises by the batch's own "
            raise ValueError(text + "statistics): call model.eval() before the export")
        for mode in modes:
            node.attribute.remove(mode)
    _copy_shared_constants(content.graph)
    return content


def _copy_shared_constants(graph: Any) -> None:
    """Replace the Identity by which the TorchScript exporter names equal weights, and which would become a layer."""
    constants = {constant.name: constant for constant in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Identity" and node.input[0] in constants:
            copied = graph.initializer.add()
            copied.CopyFrom(constants[node.input[0]])
            copied.name = node.output[0]
            constants[copied.name] = copied
            graph.node.remove(node)


def _inputs_of(content: Any) -> list[Any]:
    constants = {constant.name for constant in content.graph.initializer}
    return [one for one in content.graph.input if one.name not in constants]


def _onnxruntime(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    except Exception as error:  # onnxruntime has many kinds.
        text = str(error).splitlines()[0]
        raise ValueError(f"onnxruntime cannot run {path} on an input of shape {tuple(x.shape)}: {text}") from error
    return torch.from_numpy(found)


def _require_equal(found: Tensor, expected: Tensor, path: Path) -> None:
    """Refuse outputs that differ by more than rounding explains; other shapes, and NaN, differ by infinity."""
    if found.shape == expected.shape:  # Samples may lie outside of a function's domain.
        neither = ~(found.isfinite() | expected.isfinite())
        found, expected = found.masked_fill(neither, 0.0), expected.masked_fill(neither, 0.0)
    difference = (found - expected).abs().amax(1) if found.shape == expected.shape else torch.tensor(math.nan)
    if not bool((difference <= 1e-4 * (1 + expected.abs().amax(1))).all()):
        size = float(difference.nan_to_num(math.inf).max())
        text = f"from {path} onnxruntime computes other logits than PyTorch, by up to {size:g}: the conversion is "
        raise ValueError(text + "wrong, so certificates would be of another network. Name it as package.module:factory")


def _require(*packages: str) -> None:
    if missing := ", ".join(package for package in packages if importlib.util.find_spec(package) is None):
        raise ImportError(f"ONNX files need {missing}: pip install 'lirpa_fastwarmup[onnx]'")


def _converter() -> Any:
    if importlib.util.find_spec("onnx2pytorch") is None:
        text = "ONNX files are read by onnx2pytorch, which is not installed: pip install --no-deps onnx2pytorch==0.6.0 "
        raise ImportError(text + "(without its dependencies, because torchvision would install another torch)")
    with warnings.catch_warnings(action="ignore"), _torchvision_stubs():
        return importlib.import_module("onnx2pytorch")


@contextmanager
def _torchvision_stubs() -> Iterator[None]:
    """Make the converter importable without torchvision, by modules with empty attributes."""
    missing = {} if importlib.util.find_spec("torchvision") else _OF_TORCHVISION
    with ExitStack() as stack:
        for name, attributes in missing.items():
            sys.modules[name] = module = ModuleType(name)
            stack.callback(sys.modules.pop, name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__dict__.update(dict.fromkeys(attributes))
            setattr(sys.modules["torchvision"], name.rpartition(".")[2], module)
        yield


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    with ExitStack() as stack:
        for logger in map(logging.getLogger, names):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
