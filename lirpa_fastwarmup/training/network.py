"""The network of a run: how it is made, and the file that it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lirpa_fastwarmup import models
from lirpa_fastwarmup.recipe.batchnorm import insert_batchnorm
from lirpa_fastwarmup.training import files
from lirpa_fastwarmup.training.settings import Settings

_FORMAT = 2


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
        "format": _FORMAT,
        "epoch": epoch,
        "architecture": dict(architecture),
        "settings": settings.as_dict(),
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    files.write_tensors(path, content)


def load_model(path: Path) -> nn.Module:
    """The trained network of a run, in evaluation mode on the CPU, from its ``model.pt``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no such model, damaged, of a format that this version does not know, or of another
            architecture than its factory makes now.
        NotImplementedError: the run ablated BatchNorm, so that the plain network computes another function than
            the one that was trained.
    """
    content = files.read_tensors(path, _FORMAT)
    left_out = [name for name in ("bn_mean", "bn_var", "bn_affine") if not content["settings"].get(name, True)]
    if left_out:
        raise NotImplementedError(
            f"{path} was trained with part of BatchNorm left out ({', '.join(left_out)} off). The plain network leaves "
            "nothing out and computes another function"
        )
    model = build_network(content["architecture"])
    load_weights(model, content["state_dict"], path)
    return model.eval()


def settings_of_model(path: Path) -> Settings:
    """The settings of the run that wrote ``model.pt``; errors as of :func:`load_model`."""
    return Settings.from_dict(files.read_tensors(path, _FORMAT)["settings"])


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], path: Path) -> None:
    """Load weights that were read from ``path``.

    Raises:
        ValueError: they are those of another architecture.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds the weights of another architecture than {type(model).__name__} has now: {error}. Restore "
            "the code that the run was made with"
        ) from error


def load_kept_weights(model: nn.Module, path: Path) -> None:
    """Load the weights that :func:`save_model` wrote to ``path`` into ``model``."""
    load_weights(model, files.read_tensors(path, _FORMAT)["state_dict"], path)
