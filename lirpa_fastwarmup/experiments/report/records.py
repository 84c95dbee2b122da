"""What a run left in its folder, read as far as it got."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lirpa_fastwarmup.experiments.training.files import HISTORY, MODEL, SUMMARY
from lirpa_fastwarmup.inspection.statistics import Inspection
from lirpa_fastwarmup.storage import file_sum, read_csv, read_json, read_tensors, weights_sum

ERRORS = ("standard_error", "pgd_error", "verified_error")


Image = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Sample:
    """A test sample and what is known of it.

    Attributes:
        index: its place in the test set.
        label, prediction: its class, and the network's.
        margin: the lower bound on min_j z_y − z_j over the box: above 0 is certified.
    """

    index: int
    label: int
    prediction: int
    margin: float


@dataclass
class RunRecord:
    """A run, finished or not.

    Attributes:
        name: to call it by.
        settings: by name; empty if unknown.
        summary: of a finished run.
        history: a row for each finished epoch.
        verification: the content of ``verification.json``.
        samples: those whose margin is known, the smallest margin first.
        eps: the radius that the margins hold at.
        inspection: of the kept network.
        images: of the samples with the smallest and with the largest margins, (height, width, channels), bytes.
        missing: what there is not, and why, one sentence each.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    verification: Mapping[str, Any] | None = None
    samples: list[Sample] = field(default_factory=list)
    eps: float | None = None
    inspection: Inspection | None = None
    images: list[tuple[Sample, Image]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a ``history.csv``; a blank is NaN.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no history of a run.
    """
    rows = read_csv(path, ("epoch",), "the history of a run")
    try:
        return [{name: _number(text) for name, text in row.items()} for row in rows]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as the history of a run: {error}") from error


def _number(text: str) -> float:
    return float(text) if text else math.nan


def check_origin(path: Path, content: Mapping[str, Any], folder: Path) -> None:
    """Refuse what says something of other weights, or of other tables, than those that lie beside it.

    Args:
        path: the file, for the message.
        content: what it holds: ``weights``, a digest, and ``files``, checksums by name; either may be missing.
        folder: of the run.

    Raises:
        OSError: a file cannot be read.
        ValueError: they are other ones.
    """
    weights, model, files = content.get("weights"), folder / MODEL, content.get("files") or {}
    if weights is not None and model.is_file():
        kept = read_tensors(model, "is damaged: restore it from a copy, or retrain")
        if not isinstance(kept, dict) or weights_sum(kept.get("state_dict", {})) != weights:
            raise ValueError(f"{path} is of other weights than those in {model}: verify or train again")
    for name, expected in files.items():
        if (path.parent / name).is_file() and file_sum(path.parent / name) != expected:
            raise ValueError(
                f"{path.parent / name} is not the file that {path.name} was written with: restore it, or verify or "
                "train again"
            )


def read_summary(folder: Path) -> dict[str, Any]:
    """The ``summary.json`` of the run in ``folder``.

    Raises:
        FileNotFoundError: there is none, because the run is not finished or the folder holds no run.
        ValueError: it is no summary of a run.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no finished run (no {path.name})")
    try:
        summary = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; a run's summary was expected") from error
    missing = [name for name in (*ERRORS, "dataset", "seed", "settings") if name not in summary]
    if missing:
        raise ValueError(f"{path} is not the summary of a run: it lacks {', '.join(missing)}")
    known = (int, float, type(None))
    if not isinstance(summary["settings"], dict) or any(type(summary[name]) not in known for name in ERRORS):
        raise ValueError(f"{path} is not the summary of a run: its settings or errors are of another type")
    check_origin(path, summary, folder)
    return summary


def read_record(folder: Path) -> RunRecord:
    """What the text files in ``folder`` tell; what there is not is among what is missing.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a run in it.
        ValueError: a file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name the folder of a training run")
    record = RunRecord(name=folder.resolve().name)
    if (folder / HISTORY).is_file():
        record.history = read_history(folder / HISTORY)
    if (folder / SUMMARY).is_file():
        record.summary = read_summary(folder)
        record.settings = record.summary["settings"]
    return record
