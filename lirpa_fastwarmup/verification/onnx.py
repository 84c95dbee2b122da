"""ONNX files, written and read; what either gives is compared with onnxruntime before it is used."""

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
_INSTALL = "pip install 'lirpa_fastwarmup[onnx]'"
# The converter imports these for operators on images, which no engine bounds.
_OF_TORCHVISION = {
    "torchvision": (),
    "torchvision.ops": ("box_convert", "deform_conv2d", "nms", "roi_align", "roi_pool"),
    "torchvision.io": ("ImageReadMode", "decode_image"),
}


def write_onnx(model: nn.Module, in_shape: Sequence[int], path: Path) -> None:
    """Write ``model``, in evaluation mode and float32, with inputs (batch, *in_shape) and outputs ``logits``.

    Raises:
        ImportError: a package of the extra ``onnx`` is missing.
        ValueError: onnxruntime computes something else from the file than ``model`` does.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    example = torch.rand(2, *in_shape, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["input"],
            output_names=["logits"],
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None  # It is one wherever dynamo=True.
        program.save(str(path), external_data=False)
    _compare(model, path, example)


def read_onnx(path: Path, in_shape: Sequence[int]) -> nn.Module:
    """The network in an ONNX file, as a module in evaluation mode that takes (batch, *in_shape).

    onnx2pytorch converts it.

    Raises:
        ImportError: a package is missing; the text says how to install it.
        OSError: the file cannot be read.
        NotImplementedError: an operator cannot be converted; the text names it.
        ValueError: the file is no ONNX network of one input and one output, the network does not take such inputs,
            or what it is converted to computes something else than onnxruntime.
    """
    _require("onnx", "onnxruntime")
    content = _loaded(path)
    converter = _converter()
    operators = sorted({node.op_type for node in content.graph.node})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = converter.ConvertModel(content, experimental=True).eval()
    except Exception as error:  # The converter fails in many ways on what it does not know.
        raise NotImplementedError(
            f"{path} cannot be converted to a PyTorch module: {error}. Its operators are {', '.join(operators)}; "
            "replace the one that is named, or give the network as package.module:factory"
        ) from error
    example = torch.rand(2, *in_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            output = model(example)
    except Exception as error:
        raise ValueError(
            f"the network in {path} cannot be run on a batch of two inputs of shape {tuple(in_shape)}, the dataset's "
            f"({type(error).__name__}: {error}): name the dataset that it was made for, and export it with a batch "
            "dimension that is free (dynamic_shapes of torch.onnx.export)"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else f"of type {type(output).__name__}"
        raise ValueError(f"the output of {path} for two inputs is {found}, and should be (2, classes)")
    _compare(model, path, example)
    return model


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
            f"{path} has the inputs {', '.join(inputs)} and {len(content.graph.output)} output(s), and certificates "
            "are for classifiers of one input and one output"
        )
    for node in content.graph.node:
        _drop_evaluation_flag(node, path)
    return content


def _drop_evaluation_flag(node: Any, path: Path) -> None:
    """BatchNormalization says since opset 14 that it is not training, an attribute that the converter stumbles over."""
    for attribute in node.attribute:
        if node.op_type == "BatchNormalization" and attribute.name == "training_mode":
            if attribute.i:
                raise ValueError(
                    f"{path} was exported in training mode ({node.name or node.op_type} normalises every batch by "
                    "itself): call model.eval() before the export"
                )
            node.attribute.remove(attribute)
            break


def _compare(model: nn.Module, path: Path, x: Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= 1e-4 * (1 + float(expected.abs().max())):
        raise ValueError(
            f"from {path} onnxruntime computes other logits than PyTorch, by up to {difference:g}: the conversion went "
            "wrong, and a certificate would be one of another network. Give the network as package.module:factory"
        )


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"ONNX files need {', '.join(missing)}, which is not installed: {_INSTALL}")


def _converter() -> Any:
    if importlib.util.find_spec("onnx2pytorch") is None:
        raise ImportError(
            "ONNX files are read by onnx2pytorch, which is not installed: pip install --no-deps onnx2pytorch==0.6.0 "
            "(without its dependencies, because torchvision would bring a torch of its own)"
        )
    with warnings.catch_warnings(), _torchvision_unless_there():
        warnings.simplefilter("ignore")
        return importlib.import_module("onnx2pytorch")


@contextmanager
def _torchvision_unless_there() -> Iterator[None]:
    """Let the converter be imported without torchvision: its names are there, and what they stand for is not."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    for name, attributes in _OF_TORCHVISION.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module
    sys.modules["torchvision"].__dict__.update(ops=sys.modules["torchvision.ops"], io=sys.modules["torchvision.io"])
    try:
        yield
    finally:
        for name in _OF_TORCHVISION:
            del sys.modules[name]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep what the loggers called ``names`` have to say below an error to themselves."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
