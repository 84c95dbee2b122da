"""The network of a run: how it is made, and the file that it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lirpa_fastwarmup import models
from lirpa_fastwarmup.experiments.training import files
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.recipe.full_batchnorm import insert_batchnorm
from lirpa_fastwarmup.storage import write_tensors

_FORMATS = (2, 3)  # Those that can be read; the last one is written.
_ARCHITECTURE = {"model", "in_shape", "classes", "width", "hidden", "batchnorm"}


class UntrustedError(ValueError):
    """A file names code to be run, and the user has not said that the file is to be trusted."""


def architecture_of(settings: Settings, dataset: Any) -> dict[str, Any]:
    """What a network is made from by :func:`build_network`: plain values."""
    return {
        "model": settings.model,
        "in_shape": list(dataset.in_shape),
        "classes": dataset.classes,
        "width": settings.width,
        "hidden": settings.hidden,
        "batchnorm": settings.batchnorm,
        "mean": dataset.mean,
        "std": dataset.std,
    }


def build_network(architecture: Mapping[str, Any]) -> nn.Module:
    """A network of freshly drawn weights; a user's own gets the BatchNorm that it lacks.

    Raises:
        ValueError: an unknown network, or one whose outputs are not the classes.
        ImportError, TypeError: a factory that cannot be imported, or makes no nn.Module.
        StructureError: BatchNorm cannot be inserted everywhere.
    """
    values = dict(architecture)
    name, in_shape = values.pop("model"), tuple(values.pop("in_shape"))
    model = models.build(name, in_shape, **values)
    if architecture["batchnorm"] and name not in models.MODELS:
        insert_batchnorm(model, torch.zeros(2, *in_shape))
    return model


def save_model(path: Path, model: nn.Module, architecture: Mapping[str, Any], settings: Settings, epoch: int) -> None:
    """Write the plain network, and all that it takes to build it again."""
    content = {
        "format": _FORMATS[-1],
        "epoch": epoch,
        "architecture": dict(architecture),
        "settings": settings.as_dict(),
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    write_tensors(path, content)


def load_model(path: Path, *, trust: bool = False) -> nn.Module:
    """The trained network of a run, in evaluation mode on the CPU, from its ``model.pt``.

    Args:
        path: the file.
        trust: call the factory that the file names, where the network is none of this package's. That runs the code
            of the module that it names: leave it off for files of strangers.

    Raises:
        OSError: the file cannot be read.
        UntrustedError: it names a factory, and ``trust`` is off.
        ValueError: the file is no such model, damaged, of a format that this version does not know, or of another
            architecture than its factory makes now.
    """
    content = _read_model(path)
    _settings_in(content, path)  # Those of networks that this version does not build are refused.
    require_trust(str(content["architecture"]["model"]), path, trust=trust)
    try:
        model = build_network(content["architecture"])
    except (TypeError, AttributeError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path} names an architecture that cannot be built: {error}") from error
    load_weights(model, content["state_dict"], path)
    return model.eval()


def settings_of_model(path: Path) -> Settings:
    """The settings of the run that wrote ``model.pt``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no such model, or damaged.
    """
    return _settings_in(_read_model(path), path)


def _settings_in(content: Mapping[str, Any], path: Path) -> Settings:
    try:
        return Settings.from_dict(content["settings"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no settings of a run: {error}") from error


def require_trust(name: str, path: Path, *, trust: bool) -> None:
    """Refuse to call a factory that a file names, and not the user.

    Raises:
        UntrustedError: ``name`` is none of this package's networks, and ``trust`` is off.
    """
    if name not in models.MODELS and not trust:
        raise UntrustedError(
            f"{path} names the network {name!r}, whose code would be imported and run. If you know where the file is "
            "from, trust it: --trust, or trust=True"
        )


def _read_model(path: Path) -> dict[str, Any]:
    content = files.read_tensors(path, _FORMATS)
    wanted = {"architecture": dict, "settings": dict, "state_dict": dict}
    for name, kind in wanted.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path} is no model of a run: it lacks {name}")
    architecture = content["architecture"]
    missing = _ARCHITECTURE - architecture.keys()
    if missing:
        raise ValueError(f"{path} is no model of a run: its architecture lacks {', '.join(sorted(missing))}")
    return content


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], path: Path) -> None:
    """Load weights that were read from ``path``.

    Raises:
        ValueError: they are those of another architecture.
    """
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds the weights of another architecture than {type(model).__name__} has now: {error}. Restore "
            "the code that the run was made with"
        ) from error


def load_kept_weights(model: nn.Module, path: Path) -> None:
    """Load the weights that :func:`save_model` wrote to ``path`` into ``model``."""
    load_weights(model, _read_model(path)["state_dict"], path)
