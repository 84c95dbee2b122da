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

_ARGUMENTS = "in_shape, classes (or num_classes), width, hidden, batchnorm, mean, std"


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
    ``std``, those that its signature names: ``**kwargs`` names none, and a ``width`` of None is left out. What it
    returns is run once, on zeros, which leaves its modes and torch's random numbers as they were.

    Args:
        name: one of :data:`MODELS`, or `package.module:factory`.
        in_shape: (channels, height, width) of the input, pixels from 0 to 1.
        classes: outputs.
        width, hidden: its size; ``width=None`` for its default.
        batchnorm: whether it has BatchNorm.
        mean, std: of the pixels, per channel, where the data is usually normalised.

    Raises:
        ValueError: there is no network of that name, it cannot be run on two inputs of ``in_shape``, or its output is
            not (batch, classes).
        ImportError: the module cannot be imported, or has no such factory.
        TypeError: what is named is no factory, wants other arguments, or makes no nn.Module.
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
    model = _made(_imported(name), name, {**given, "num_classes": classes})
    _check_output(model, name, in_shape, classes)
    return model


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # Whatever the user's code raises on import, from a syntax error on.
        raise ImportError(
            f"the module {module_name!r} of the network {name!r} cannot be imported ({type(error).__name__}: {error}). "
            "Write it with dots, as in an import statement, from a folder on Python's path, and see that it can be "
            "imported by itself"
        ) from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ImportError(
                f"the module {module_name!r} has no {attribute!r}, named by the network {name!r}: after the colon, "
                "name a function or class of that module which makes the network"
            )
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"{name!r} is a network ({type(factory).__name__}) already, with weights that a second run would go on "
            "with, and every run needs a fresh one: name a function or class that makes one"
        )
    if not callable(factory):
        raise TypeError(
            f"{name!r} is of type {type(factory).__name__}, which cannot be called to make a network: name a function "
            "or class that makes one"
        )
    return factory


def _made(factory: Callable[..., Any], name: str, given: dict[str, Any]) -> nn.Module:
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
            f"the factory {name!r} cannot be called ({error}): it may take {_ARGUMENTS}, by these names (width only "
            "where the run sets one). Give any other argument a default"
        ) from error
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the factory {name!r} returned an object of type {type(model).__name__}, which has no layers to train: "
            "return an nn.Module"
        )
    return model


@torch.no_grad()
def _check_output(model: nn.Module, name: str, in_shape: tuple[int, int, int], classes: int) -> None:
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            output = model.eval()(torch.zeros(2, *in_shape))
    except Exception as error:
        raise ValueError(
            f"the network {name!r} cannot be run on a batch of two inputs of shape {tuple(in_shape)}, the dataset's "
            f"({type(error).__name__}: {error}): let the factory take in_shape, or fit it to these inputs"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, Tensor) or output.shape != (2, classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else f"of type {type(output).__name__}"
        raise ValueError(
            f"the dataset has {classes} classes, the network's output is {found}, and training needs a score per "
            f"class: make {name!r} return a tensor of shape (batch, {classes}), or let it take classes"
        )
