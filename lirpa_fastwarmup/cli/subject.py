"""The network that a command is about, from a run or an external one, and its test samples."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup import models, storage
from lirpa_fastwarmup.cli.options import add_trust, find_factories_here, number
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training import load_model, load_weights
from lirpa_fastwarmup.experiments.training.checkpoint import MODEL, SUMMARY
from lirpa_fastwarmup.experiments.training.network import load_dataset, read_model
from lirpa_fastwarmup.models.factory import check_output
from lirpa_fastwarmup.verification import read_onnx

_SAVE = "save only the state dict, torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode on the CPU, and the dataset with its test samples."""

    network: nn.Module
    name: str  # Its file or factory.
    dataset: data.Dataset
    example: Tensor  # Inputs that it accepts, of two samples, or of one if it refuses batches.
    eps: float | None  # The radius that it was trained for; None for external networks.
    allow_untested: bool = False


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`subject_of` reads."""
    command.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR", help="folder of a training run")
    add_trust(command)
    group = command.add_argument_group("external model", "instead of RUN_DIR; needs --dataset and --out")
    known = f"{', '.join(models.MODELS)}, package.module:factory, FILE.py:factory, or FILE.onnx"
    group.add_argument("--model", metavar="NAME", help=known)
    group.add_argument("--weights", type=Path, metavar="FILE", help="its state dict, written by torch.save")
    group.add_argument("--mean", type=float, nargs="+", help="mean that its inputs are normalised by, per channel")
    group.add_argument("--std", type=float, nargs="+", help="deviation, per channel; eps stays in units of the inputs")
    group.add_argument("--allow-untested", action="store_true", help="accept untested bounds; results are marked")
    samples = command.add_argument_group("samples")
    samples.add_argument("--dataset", metavar="NAME", help="its test set, named as for train; by default the run's")
    samples.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the dataset's files")
    text = "lowest and highest valid input; by default the dataset's"
    samples.add_argument("--input-range", type=number, nargs=2, metavar="X", help=text)


def check_named(options: argparse.Namespace) -> None:
    """Raise ValueError unless the options name one network, and a folder for the results."""
    if (options.run is None) == (options.model is None):
        raise ValueError("name either the folder of a training run, or a network with --model")
    given = [f"--{name}" for name in ("weights", "mean", "std") if getattr(options, name) is not None]
    if options.run is not None and given:
        raise ValueError(f"{', '.join(given)} is for an external model, and not for the run in {options.run}")
    if options.run is None and options.out is None:
        raise ValueError("name the folder for the results with --out DIR")


def subject_of(options: argparse.Namespace) -> Subject:
    """The network that the options name, and its test samples; names and files are checked before data is loaded."""
    find_factories_here(options.model, options.dataset, trust=options.trust)
    return _external(options) if options.run is None else subject_of_run(options.run, options)


def subject_of_run(folder: Path, options: argparse.Namespace) -> Subject:
    """As :func:`subject_of`, for a run; dataset, its place ``data_dir`` and ``input_range`` replace the run's."""
    path, input_range, trust = folder / MODEL, _input_range(options), options.trust
    content = read_model(path)
    network, settings = load_model(path, trust=trust, content=content), content["settings"]
    if options.dataset is not None:
        loaded = data.load(options.dataset, options.data_dir, input_range)
    else:
        kept = settings if input_range is None else settings.replace(input_range=input_range)
        loaded = load_dataset(kept, path, options.data_dir, trust=trust)
    if not (folder / SUMMARY).is_file():
        text = "%s holds no %s, so the run may be unfinished: this is its network after epoch %s"
        logging.getLogger(__name__).warning(text, folder, SUMMARY, content.get("epoch"))
    return _subject(network, str(path), loaded, settings.eps, untested=settings.allow_untested)


def _external(options: argparse.Namespace) -> Subject:
    name, path = str(options.model), Path(options.model)
    is_onnx, weights = path.suffix == ".onnx", dict[str, Any]()
    if options.dataset is None:
        raise ValueError("an external model needs samples to verify: name --dataset")
    if (options.mean is None) != (options.std is None):
        raise ValueError("--mean and --std belong together: give both")
    if is_onnx:
        if options.weights is not None:
            raise ValueError(f"{name} holds its own weights: leave --weights out")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}")
    else:
        models.find_factory(name)
        if options.weights is None:
            raise ValueError(f"--model {name} has random weights: name its trained weights with --weights FILE")
        weights = _state_dict(options.weights)
    dataset = data.load(options.dataset, options.data_dir, _input_range(options))
    if is_onnx:
        network = read_onnx(path, dataset.in_shape)
    else:
        network = models.build(name, dataset.in_shape, dataset.classes)
        load_weights(network, weights, Path(str(options.weights)))
    if options.mean is not None:
        network = nn.Sequential(models.Normalize(options.mean, options.std), network)
    return _subject(network, name, dataset, None, untested=options.allow_untested)


def _input_range(options: argparse.Namespace) -> tuple[float, float] | None:
    return None if options.input_range is None else (float(options.input_range[0]), float(options.input_range[1]))


def _state_dict(path: Path) -> dict[str, Any]:
    content = storage.read_tensors(path, f"cannot be read as weights: {_SAVE}")
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):  # As in many checkpoints.
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: {_SAVE}")
    return content


def _subject(network: nn.Module, name: str, dataset: data.Dataset, eps: float | None, *, untested: bool) -> Subject:
    example = torch.zeros(2, *dataset.in_shape)
    try:
        check_output(network, name, example, dataset.classes)
    except ValueError:  # It may accept single samples only.
        example = example[:1]
        check_output(network, name, example, dataset.classes)
    return Subject(network.eval(), name, dataset, example, eps, untested)
