"""The folder that a run writes to."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MODEL, HISTORY, SUMMARY, CURVES = "model.pt", "history.csv", "summary.json", "curves.png"
_WRITTEN = (MODEL, HISTORY, SUMMARY, CURVES)


class OutputExistsError(FileExistsError):
    """The output folder holds something already."""


def prepare(folder: Path, *, overwrite: bool) -> None:
    """See, before anything is computed, that ``folder`` can be written to; make it if absent.

    An earlier run in it stays until :func:`remove_earlier_run`.

    Raises:
        OutputExistsError: it exists, is not empty, and ``overwrite`` is off.
        OSError: it cannot be made or written to; the text says why.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise OutputExistsError(
                f"{folder} exists and is not empty; nothing in it was touched. Name another folder, or replace the "
                "run in it with --overwrite"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OutputExistsError:
        raise
    except OSError as error:
        raise type(error)(f"cannot write to {folder}: {error.strerror or error}. Name another folder") from error


def remove_earlier_run(folder: Path) -> None:
    """Remove what an earlier run wrote to ``folder``, and nothing else."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is, at every moment, either the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as indented JSON."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def write_history(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write one line per epoch, under a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values with ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomically(path, buffer.getvalue())
