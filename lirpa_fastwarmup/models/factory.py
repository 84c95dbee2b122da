"""Networks by name: the paper's, and your own by the factory that makes them."""

import hashlib
import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.models.networks import cnn7, resnext, wide_resnet8

MODELS: dict[str, Callable[..., nn.Module]] = {"cnn7": cnn7, "wide-resnet8": wide_resnet8, "resnext": resnext}


def build(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    width: int | None = None,
    hidden: int = 512,
    batchnorm: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Build a network: one of :data:`MODELS`, or a factory, `package.module:factory` or `path/to/file.py:factory`.

    A factory gets these arguments, and ``classes`` also as ``num_classes``, if its signature names them (``**kwargs``
    names none; a ``width`` of None is left out). Its network is run once on zeros, which changes no global state.
    """
    given: dict[str, Any] = {"in_shape": in_shape, "classes": classes, "hidden": hidden, "batchnorm": batchnorm}
    given |= {"mean": mean, "std": std} | ({} if width is None else {"width": width})
    factory = find_factory(name)
    if name in MODELS:
        return factory(**given)
    model = _made(factory, name, {**given, "num_classes": classes})
    check_output(model, name, torch.zeros(2, *in_shape), classes)
    return model


def find_factory(name: str, makes: str = "network") -> Callable[..., Any]:
    """Return the callable that makes the network (or what ``makes`` says) ``name``; raises as :func:`build`."""
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        known = f"{', '.join(MODELS)}, or name your own factory as package.module:factory or path/to/file.py:factory"
        raise ValueError(f"unknown {makes} {name!r}; known are {known}")
    source, _, inner = name.rpartition(":")
    is_file = source.endswith(".py")
    where = f"the {'file' if is_file else 'module'} {source!r}"
    try:
        factory: Any = _imported_file(Path(source)) if is_file else importlib.import_module(source)
    except Exception as error:  # The user's code may raise anything on import, even a syntax error.
        problem = f"{where} of the {makes} {name!r} cannot be imported ({type(error).__name__}: {error})"
        forms = "a module with dots, from a folder on Python's path, and a file as its path from the current folder"
        raise ImportError(f"{problem}. Write {forms}, and check that it can be imported by itself") from error
    try:
        factory = operator.attrgetter(inner)(factory)
    except AttributeError as error:
        raise ImportError(f"{where} has no {inner!r}, named by the {makes} {name!r}: name a function in it") from error
    if isinstance(factory, nn.Module) or not callable(factory):
        problem = f"{name!r} is of type {type(factory).__name__}, and every run needs a fresh {makes}"
        raise TypeError(f"{problem}: name a function or class that makes one")
    return factory


def _imported_file(path: Path) -> ModuleType:
    """The file as a module, run once per process, under a name made from its path, so that it replaces no other."""
    path = path.resolve(strict=True)
    name = f"file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec: Any = spec_from_file_location(name, path)
        sys.modules[name] = module = module_from_spec(spec)  # Before it runs: dataclasses look their module up.
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _made(factory: Callable[..., Any], name: str, given: dict[str, Any]) -> nn.Module:
    signature = inspect.signature(factory)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    arguments = {key: given[key] for key, one in signature.parameters.items() if key in given and one.kind in by_name}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        known = "in_shape, classes or num_classes, width (only if set), hidden, batchnorm, mean and std"
        raise TypeError(f"the factory {name!r} cannot be called ({error}): give all but {known} a default") from error
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory {name!r} returned an object of type {type(model).__name__}, not an nn.Module")
    return model


@torch.no_grad()
def check_output(model: nn.Module, name: str, x: Tensor, classes: int) -> None:
    """Raise ValueError unless the network ``name`` returns a score per class for the inputs ``x``."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            output = model.eval()(x)
    except Exception as error:
        shape = f"{tuple(x.shape[1:])}, the dataset's ({type(error).__name__}: {error})"
        problem = f"the network {name!r} cannot be run on a batch of {len(x)} input(s) of shape {shape}"
        raise ValueError(f"{problem}: fit it to these inputs, or let a factory take in_shape") from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, Tensor) or output.shape != (len(x), classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else f"of type {type(output).__name__}"
        advice = f"make {name!r} return a score per class, (batch, {classes}), let it take classes, or name other data"
        raise ValueError(f"the dataset has {classes} classes, the network's output is {found}: {advice}")
