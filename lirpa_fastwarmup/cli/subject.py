"""What a command is about: a trained network, of a run or from elsewhere, and the samples that it is tried on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup import models
from lirpa_fastwarmup.cli.options import add_trust, find_factories_here
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training import load_model, load_weights, settings_of_model
from lirpa_fastwarmup.experiments.training.files import MODEL
from lirpa_fastwarmup.storage import read_tensors
from lirpa_fastwarmup.verification import read_onnx

_SAVE = "save the state dict alone, torch.save(model.state_dict(), FILE)"
_TAKEN_FROM_RUN = ("model", "weights", "mean", "std")


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode on the CPU, its samples, and where both are from.

    Attributes:
        network: the plain network.
        name: where it is from.
        dataset: name of the dataset.
        samples: of its test set.
        classes: of the dataset.
        eps: the radius that it was trained for, where that is known.
        allow_untested: whether operators of it whose bounds have not been tested are accepted.
    """

    network: nn.Module
    name: str
    dataset: str
    samples: data.Split
    classes: int
    eps: float | None
    allow_untested: bool = False


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`subject_of` reads."""
    command.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR", help="folder of a training run")
    add_trust(command)
    group = command.add_argument_group("network from elsewhere", "instead of RUN_DIR; needs --dataset and --out")
    group.add_argument(
        "--model", metavar="NAME", help=f"{', '.join(models.MODELS)}, package.module:factory, or FILE.onnx"
    )
    group.add_argument("--weights", type=Path, metavar="FILE", help="its state dict, as torch.save wrote it")
    group.add_argument("--mean", type=float, nargs="+", help="it expects inputs less this mean, one per channel …")
    group.add_argument("--std", type=float, nargs="+", help="… divided by this deviation; eps stays in pixel units")
    group.add_argument(
        "--allow-untested", action="store_true", help="accept operators whose bounds have not been tested, and say so"
    )
    samples = command.add_argument_group("samples")
    samples.add_argument("--dataset", choices=sorted(data.LOADERS), help="by default that of the run; its test set")
    samples.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the dataset's files")
    samples.add_argument("--limit", type=int, metavar="N", help="only the first N samples of the test set")


def check_named(options: argparse.Namespace) -> None:
    """Refuse options that name no network, or two.

    Raises:
        ValueError: they do.
    """
    if (options.run is None) == (options.model is None):
        raise ValueError("name either the folder of a training run, or a network with --model")


def subject_of(options: argparse.Namespace) -> Subject:
    """What the options name.

    Raises:
        ValueError: they name no network, or two; network, weights and dataset do not fit together.
        OSError, ImportError, TypeError, NotImplementedError: as of the functions that load them.
    """
    check_named(options)
    find_factories_here(options.model, trust=options.trust)
    return _of_run(options) if options.run is not None else _from_elsewhere(options)


def _of_run(options: argparse.Namespace) -> Subject:
    given = [f"--{name}" for name in _TAKEN_FROM_RUN if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} is for a network from elsewhere; that of a run is all in {options.run}")
    return subject_of_run(
        options.run, dataset=options.dataset, data_dir=options.data_dir, limit=options.limit, trust=options.trust
    )


def subject_of_run(
    folder: Path,
    *,
    dataset: str | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    trust: bool = False,
) -> Subject:
    """The network that a run kept, and its test samples, or the first ``limit`` of them.

    Args:
        folder: of the run.
        dataset, data_dir: other data than that of the run, or the place where that is now.
        limit: number of samples.
        trust: call the factory that the run's files name, where the network is none of this package's.

    Raises:
        OSError: ``folder`` holds no network, or files are missing.
        ValueError, ImportError, TypeError, NotImplementedError: as of the functions that load them.
    """
    path = folder / MODEL
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no trained network ({MODEL}): name the folder of a training run that finished an epoch"
        )
    network, settings = load_model(path, trust=trust), settings_of_model(path)
    given = data_dir or (None if dataset else settings.data_dir)
    loaded, samples = _samples(dataset or settings.dataset, given, limit)
    _check_output(network, str(path), loaded)
    return Subject(
        network, str(path), loaded.name, samples, loaded.classes, settings.eps, allow_untested=settings.allow_untested
    )


def _from_elsewhere(options: argparse.Namespace) -> Subject:
    if options.dataset is None:
        raise ValueError("a network from elsewhere needs the samples that it is verified on: name --dataset")
    dataset, samples = _samples(options.dataset, options.data_dir, options.limit)
    name = options.model
    if name.endswith(".onnx"):
        if options.weights is not None:
            raise ValueError(f"{name} holds its weights itself: leave --weights out")
        network = read_onnx(Path(name), dataset.in_shape)
    elif options.weights is None:
        raise ValueError(f"--model {name} makes a network of random weights: name its trained ones with --weights FILE")
    else:
        network = models.build(name, dataset.in_shape, dataset.classes)
        load_weights(network, _state_dict(options.weights), options.weights)
    if (options.mean is None) != (options.std is None):
        raise ValueError("--mean and --std belong together: give both")
    if options.mean is not None:
        network = nn.Sequential(models.Normalize(options.mean, options.std), network)
    _check_output(network, name, dataset)
    return Subject(
        network.eval(), name, dataset.name, samples, dataset.classes, None, allow_untested=options.allow_untested
    )


def _samples(name: str, data_dir: Path | None, limit: int | None) -> tuple[data.Dataset, data.Split]:
    dataset = data.load(name, data_dir)
    test = dataset.test
    if limit is None:
        return dataset, test
    if not 1 <= limit <= len(test):
        raise ValueError(f"the test set of {dataset.name} has {len(test)} samples; cannot take {limit}")
    return dataset, data.Split(test.images[:limit], test.labels[:limit])


def _state_dict(path: Path) -> dict[str, Any]:
    content = read_tensors(path, f"cannot be read as weights: {_SAVE}")
    # Checkpoints often hold it beside the optimiser's.
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: {_SAVE}")
    return content


@torch.no_grad()
def _check_output(network: nn.Module, name: str, dataset: data.Dataset) -> None:
    try:
        outputs = network.eval()(torch.zeros(2, *dataset.in_shape))
    except RuntimeError as error:
        raise ValueError(
            f"the network {name} cannot be run on images of {dataset.name}, of shape {dataset.in_shape}: {error}"
        ) from error
    if outputs.shape != (2, dataset.classes):
        raise ValueError(
            f"{dataset.name} has labels of {dataset.classes} classes, and the network {name} gives "
            f"{tuple(outputs.shape)} for two samples: a certificate needs one score per class"
        )
