"""Writes and reads ONNX files, and compares their outputs with onnxruntime."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_OPSET = 18
# onnx2pytorch imports these for operators on images, which no engine bounds.
_OF_TORCHVISION = {
    "torchvision": (),
    "torchvision.ops": ("box_convert", "deform_conv2d", "nms", "roi_align", "roi_pool"),
    "torchvision.io": ("ImageReadMode", "decode_image"),
}


def write_onnx(model: nn.Module, in_shape: Sequence[int], path: Path) -> None:
    """Write ``model``, in evaluation mode and float32, with inputs (batch, *in_shape) and outputs ``logits``.

    Raises:
        ImportError: a package of the extra ``onnx`` is missing.
        ValueError: onnxruntime's outputs for the file differ from the outputs of ``model``.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    example = _example(in_shape)
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"], "opset_version": _OPSET}
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        assert program is not None  # Not with dynamo=True.
        program.save(str(path), external_data=False)
    _compare(model, path, example)


def read_onnx(path: Path, in_shape: Sequence[int]) -> nn.Module:
    """The network in an ONNX file, converted by onnx2pytorch, as a module in evaluation mode for (batch, *in_shape).

    Raises:
        ImportError: a package is missing; the message says how to install it.
        OSError: the file cannot be read.
        NotImplementedError: an operator cannot be converted; the message names it.
        ValueError: the file is not an ONNX network with one input and one output, the network does not accept such
            inputs, or its outputs after the conversion differ from onnxruntime's.
    """
    _require("onnx", "onnxruntime")
    content = _loaded(path)
    converter = _converter()
    operators = sorted({node.op_type for node in content.graph.node})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = converter.ConvertModel(content, experimental=True).eval()
    except Exception as error:  # The converter raises many kinds of errors.
        raise NotImplementedError(
            f"{path} cannot be converted to a PyTorch module: {error}. Its operators are {', '.join(operators)}; "
            "replace the one in this message, or name the network as package.module:factory"
        ) from error
    example = _example(in_shape)
    try:
        with torch.no_grad():
            output = model(example)
    except Exception as error:
        raise ValueError(
            f"the network in {path} cannot be run on a batch of two inputs of shape {tuple(in_shape)}, the dataset's "
            f"({type(error).__name__}: {error}): name the dataset that it was trained on, and export it with an open "
            "batch dimension (dynamic_shapes of torch.onnx.export)"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else f"of type {type(output).__name__}"
        raise ValueError(f"the output of {path} for two inputs is {found}, and should be (2, classes)")
    _compare(model, path, example)
    return model


def _example(in_shape: Sequence[int]) -> Tensor:
    return torch.rand(2, *in_shape, generator=torch.Generator().manual_seed(0))


def _loaded(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        content = onnx.load(str(path))
        onnx.checker.check_model(content)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} is no valid ONNX file: {str(error).splitlines()[0]}") from error
    constants = {constant.name for constant in content.graph.initializer}
    inputs = [one.name for one in content.graph.input if one.name not in constants]
    if len(inputs) != 1 or len(content.graph.output) != 1:
        raise ValueError(
            f"{path} has the inputs {', '.join(inputs)} and {len(content.graph.output)} output(s); certificates need a "
            "classifier with one input and one output"
        )
    for node in content.graph.node:
        # The converter fails on this attribute, which BatchNormalization has since opset 14.
        modes = [one for one in node.attribute if one.name == "training_mode" and node.op_type == "BatchNormalization"]
        for mode in modes:
            if mode.i:
                raise ValueError(
                    f"{path} was exported in training mode ({node.name or node.op_type} normalises by the batch's own "
                    "statistics): call model.eval() before the export"
                )
            node.attribute.remove(mode)
    return content


def _compare(model: nn.Module, path: Path, x: Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= 1e-4 * (1 + float(expected.abs().max())):
        raise ValueError(
            f"from {path} onnxruntime computes other logits than PyTorch, by up to {difference:g}: the conversion is "
            "wrong, and certificates would be of another network. Name the network as package.module:factory"
        )


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        install = "pip install 'lirpa_fastwarmup[onnx]'"
        raise ImportError(f"ONNX files need {', '.join(missing)}, which is not installed: {install}")


def _converter() -> Any:
    if importlib.util.find_spec("onnx2pytorch") is None:
        raise ImportError(
            "ONNX files are read by onnx2pytorch, which is not installed: pip install --no-deps onnx2pytorch==0.6.0 "
            "(without its dependencies, because torchvision would install another torch)"
        )
    with warnings.catch_warnings(), _torchvision_stubs():
        warnings.simplefilter("ignore")
        return importlib.import_module("onnx2pytorch")


@contextmanager
def _torchvision_stubs() -> Iterator[None]:
    """Make the converter importable without torchvision, by modules with empty attributes."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    for name, attributes in _OF_TORCHVISION.items():
        sys.modules[name] = module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(dict.fromkeys(attributes))
    sys.modules["torchvision"].__dict__.update(ops=sys.modules["torchvision.ops"], io=sys.modules["torchvision.io"])
    try:
        yield
    finally:
        for name in _OF_TORCHVISION:
            del sys.modules[name]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Suppress the warnings of loggers."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
