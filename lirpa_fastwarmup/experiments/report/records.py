"""The record of a run: what its folder holds, and the inspection of its network."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training import load_model, settings_of_run
from lirpa_fastwarmup.experiments.training.checkpoint import CHECKPOINT, HISTORY, MODEL, SUMMARY
from lirpa_fastwarmup.experiments.training.network import load_dataset, read_model
from lirpa_fastwarmup.inspection import layers, statistics
from lirpa_fastwarmup.storage import file_sum, read_csv, read_json, read_tensors, refused, weights_sum
from lirpa_fastwarmup.verification import OutOfMemoryError, UnsoundBoundError, evaluate
from lirpa_fastwarmup.verification import folder as verified

logger = logging.getLogger(__name__)

ERRORS = ("standard_error", "pgd_error", "verified_error")
_BOUNDED = 1000  # Test samples to bound if there are no certificates.
_INSPECTED = 250
_SHOWN = 6
_SAME = 1e-12  # Radii that differ by less are equal.

Image = np.ndarray[Any, np.dtype[np.uint8]]

_EXPECTED = (OSError, ValueError, ImportError, TypeError, NotImplementedError, UnsoundBoundError, OutOfMemoryError)


@dataclass(frozen=True)
class Sample:
    """A test sample. ``margin`` is the lower bound on min_j z_y − z_j over the box: above 0 is certified."""

    index: int
    label: int
    prediction: int
    margin: float


@dataclass
class RunRecord:
    """A run, finished or not; ``summary`` and ``verification`` are the contents of the JSON files of these names."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    verification: Mapping[str, Any] | None = None
    samples: list[Sample] = field(default_factory=list)  # In ascending order of margins.
    eps: float | None = None  # Of these margins.
    inspection: statistics.Inspection | None = None
    images: list[tuple[Sample, Image]] = field(default_factory=list)  # Of extreme margins, (height, width, channels).
    missing: list[str] = field(default_factory=list)  # What is missing and why, one sentence each.


class _SavedModel:
    """The ``model.pt`` of a run, read at first use and once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODEL

    @cached_property
    def content(self) -> Any:
        return read_tensors(self.path, "is damaged: restore a copy, or retrain") if self.path.is_file() else None

    @cached_property
    def checked(self) -> dict[str, Any]:
        return read_model(self.path, self.content)

    @cached_property
    def weights(self) -> str:
        return weights_sum(self.content.get("state_dict", {}) if isinstance(self.content, dict) else {})


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a ``history.csv``; blanks are NaN. Raises OSError or ValueError if it is not the history of a run."""
    rows = read_csv(path, ("epoch",), "the history of a run")
    with refused(f"{path} cannot be read as the history of a run", ValueError):
        return [{name: float(text) if text else math.nan for name, text in row.items()} for row in rows]


def read_summary(folder: Path, model: _SavedModel | None = None) -> dict[str, Any]:
    """The ``summary.json`` of the run in ``folder``; ``model`` is its network, if it was read before."""
    path = folder / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no finished run (no {path.name})")
    with refused(f"{path} is not the summary of a run", ValueError):
        summary = read_json(path)
        if missing := [name for name in (*ERRORS, "dataset", "seed", "settings") if name not in summary]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        known = (int, float, type(None))
        if not isinstance(summary["settings"], dict) or any(type(summary[name]) not in known for name in ERRORS):
            raise ValueError("its settings or errors are of another type")
    _check_origin(path, summary, model or _SavedModel(folder))
    return summary


def _check_origin(path: Path, content: Mapping[str, Any], model: _SavedModel) -> None:
    """Raise ValueError if the ``content`` of ``path`` names other weights or tables than the files beside it."""
    weights, files = content.get("weights"), content.get("files") or {}
    if weights is not None and model.path.is_file() and model.weights != weights:
        raise ValueError(f"{path} belongs to other weights than {model.path}: verify or train again")
    for name, expected in files.items():
        file = path.parent / name
        if file.is_file() and file_sum(file) != expected:
            raise ValueError(f"{file} is not the file that {path.name} was written with: restore it, or run that again")


def read_record(folder: Path, data_dir: Path | None = None, *, trust: bool = False) -> RunRecord:
    """Read the run in ``folder``, inspect its network, and bound test samples if there are no certificates."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name the folder of a training run")
    record, model = RunRecord(name=folder.resolve().name), _SavedModel(folder)
    if (folder / HISTORY).is_file():
        record.history = read_history(folder / HISTORY)
    if (folder / SUMMARY).is_file():
        record.summary = read_summary(folder, model)
        record.settings = record.summary["settings"]
    else:
        record.missing.append("The run is not finished: lirpa-fastwarmup train --resume --out RUN_DIR resumes it.")
    record.settings = record.settings or _saved_settings(folder, model)
    if not record.settings and not record.history:
        raise FileNotFoundError(f"{folder} holds no run: neither a summary, nor a history, nor a checkpoint")
    if (folder / verified.SUMMARY).is_file():
        record.verification = read_json(folder / verified.SUMMARY)
        _check_origin(folder / verified.SUMMARY, record.verification, model)
    else:
        record.missing.append("There are no certificates: lirpa-fastwarmup verify RUN_DIR computes them.")
    if (folder / verified.CERTIFICATES).is_file():
        record.eps, record.samples = certified_samples(folder / verified.CERTIFICATES, record.settings.get("eps", 0.0))
    try:
        _inspect_network(record, model, data_dir, trust=trust)
    except _EXPECTED as error:
        record.missing.append(f"The network could not be inspected: {error}.")
    return record


def _saved_settings(folder: Path, model: _SavedModel) -> dict[str, Any]:
    try:
        if model.path.is_file():
            return dict(model.checked["settings"].as_dict())
        if (folder / CHECKPOINT).is_file():
            return settings_of_run(folder).as_dict()
    except ValueError as error:
        logger.warning("%s", error)
    return {}


def certified_samples(path: Path, eps: float) -> tuple[float, list[Sample]]:
    """The samples with a margin in ``certificates.csv`` at ``eps``, or else at the smallest radius, and that radius."""
    whole, margin = ("index", "label", "prediction"), "margin_lower_bound"
    rows = [row for row in read_csv(path, (*whole, margin, "eps"), "certificates") if row[margin]]
    with refused(f"{path} cannot be read as certificates", ValueError):
        radii = {float(row["eps"]) for row in rows}
        chosen = next((radius for radius in radii if abs(radius - eps) <= _SAME), min(radii, default=eps))
        rows = [row for row in rows if float(row["eps"]) == chosen]
        samples = [Sample(**{name: int(row[name]) for name in whole}, margin=float(row[margin])) for row in rows]
    return chosen, sorted(samples, key=attrgetter("margin"))


def _inspect_network(record: RunRecord, model: _SavedModel, data_dir: Path | None, *, trust: bool) -> None:
    network, settings = load_model(model.path, trust=trust, content=model.checked), model.checked["settings"]
    dataset = load_dataset(settings, model.path, data_dir, trust=trust)
    shape, classes = tuple(model.checked["architecture"]["in_shape"]), model.checked["architecture"]["classes"]
    if (shape, classes) != (dataset.in_shape, dataset.classes):
        problem = f"it was trained on samples {shape} of {classes} classes"
        raise ValueError(f"{problem}; {dataset.name} has {dataset.in_shape} and {dataset.classes}")
    bounded = BoundedModule(network, torch.zeros(2, *dataset.in_shape), allow_untested=settings.allow_untested)
    inputs = data.spread(dataset.test, _INSPECTED).inputs
    record.inspection = layers.inspect(bounded, inputs, settings.eps, input_range=dataset.input_range)
    if not record.samples:
        indices = data.spread_indices(len(dataset.test), _BOUNDED)
        batches = data.Batches(dataset.test.take(indices), _INSPECTED)
        found = evaluate(bounded, batches, settings.eps, restarts=0, input_range=dataset.input_range, check=False)
        samples = [Sample(int(indices[one.index]), one.label, one.prediction, one.margin) for one in found.certificates]
        record.eps, record.samples = settings.eps, sorted(samples, key=attrgetter("margin"))
    elif record.verification is not None and record.verification.get("dataset") != dataset.name:
        name = record.verification.get("dataset")
        record.missing.append(f"The certificates are for {name}; the run does not have its samples.")
        return
    if dataset.test.images.dtype != torch.uint8:  # No pictures.
        return
    for sample in (*record.samples[:_SHOWN], *record.samples[_SHOWN:][-_SHOWN:]):
        pixels = dataset.test.images[sample.index]
        pixels = pixels if len(pixels) in (1, 3) else pixels[:1]  # Neither grey nor RGB: the first channel.
        record.images.append((sample, pixels.permute(1, 2, 0).numpy()))
