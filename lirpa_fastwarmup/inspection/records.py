"""What a run left in its folder, read as far as it got."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lirpa_fastwarmup.inspection.figures import Inspection

SUMMARY, HISTORY = "summary.json", "history.csv"


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
    try:
        with path.open(newline="") as file:
            rows = [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError, AttributeError) as error:  # Text, or lines of another length.
        raise ValueError(f"{path} cannot be read as the history of a run: {error}") from error
    if rows and "epoch" not in rows[0]:
        raise ValueError(f"{path} is no history of a run: it has no column 'epoch'")
    return rows


def _number(text: str) -> float:
    return float(text) if text else math.nan


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no object.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object, but a {type(content).__name__}")
    return content


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
        record.summary = read_json(folder / SUMMARY)
        record.settings = record.summary.get("settings", {})
    return record
