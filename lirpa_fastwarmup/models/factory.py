"""Networks by name: the paper's, and any that `package.module:factory` makes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.models.cnn7 import cnn7
from lirpa_fastwarmup.models.resnext import resnext
from lirpa_fastwarmup.models.wide_resnet import wide_resnet8

MODELS: dict[str, Callable[..., nn.Module]] = {"cnn7": cnn7, "wide-resnet8": wide_resnet8, "resnext": resnext}


def build(
    name: str,
    in_shape: tuple[int, int, int],
    classes: int,
    *,
    width: int | None = None,
    hidden: int = 512,
    batchnorm: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network called ``name``.

    A name `package.module:factory` stands for what that callable (a function, or a class of networks) returns. It is
    given, of ``in_shape``, ``classes`` (also as ``num_classes``), ``width``, ``hidden``, ``batchnorm``, ``mean`` and
    ``std``, those that its signature names.

    Args:
        name: one of :data:`MODELS`, or `package.module:factory`.
        in_shape: (channels, height, width) of the input, pixels from 0 to 1.
        classes: outputs.
        width, hidden: its size; ``width=None`` for its default.
        batchnorm: whether it has BatchNorm.
        mean, std: of the pixels, per channel, where the data is usually normalised.

    Raises:
        ValueError: there is no network of that name, or its output is not (batch, classes).
        ImportError: the module or the factory cannot be imported.
        TypeError: the factory wants other arguments, or makes no nn.Module.
    """
    given: dict[str, Any] = {"in_shape": in_shape, "classes": classes, "hidden": hidden, "batchnorm": batchnorm}
    given |= {"mean": mean, "std": std}
    if width is not None:
        given["width"] = width
    if name in MODELS:
        return MODELS[name](**given)
    if ":" not in name:
        raise ValueError(
            f"unknown network {name!r}; known are {', '.join(MODELS)}, or name a factory of your own as "
            "package.module:factory"
        )
    model = _call(_imported(name), name, {**given, "num_classes": classes})
    _check_output(model, name, in_shape, classes)
    return model


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"the module of the network {name!r} cannot be imported: {error}. It must be on Python's path (the current "
            "folder is)"
        ) from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ImportError(f"the module {module_name!r} has no {attribute!r}, named by the network {name!r}")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"{name!r} is a {type(factory).__name__}, and every run needs a network of its own: name a function or "
            "class that makes one"
        )
    return factory


def _call(factory: Callable[..., Any], name: str, given: dict[str, Any]) -> nn.Module:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # Some callables of C code tell none.
        signature = inspect.Signature()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {key for key, parameter in signature.parameters.items() if parameter.kind in by_name}
    arguments = {key: value for key, value in given.items() if key in taken}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"the factory {name!r} cannot be called ({error}): of its arguments, those named {', '.join(given)} are "
            "given to it, and others need defaults"
        ) from error
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory {name!r} returned a {type(model).__name__}, and not an nn.Module")
    return model


@torch.no_grad()
def _check_output(model: nn.Module, name: str, in_shape: tuple[int, int, int], classes: int) -> None:
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            output = model.eval()(torch.zeros(2, *in_shape))
    except Exception as error:
        raise ValueError(
            f"the network {name!r} cannot be run on a batch of two inputs of shape {tuple(in_shape)}: {error}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, Tensor) or output.shape != (2, classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the dataset has {classes} classes, so that the output for two inputs must be of shape (2, {classes}); "
            f"that of the network {name!r} is {found}"
        )
