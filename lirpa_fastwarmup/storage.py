"""Files that are, at every moment, either the old ones or the new ones, whole."""

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


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row, under a line of all rows' names; what a row has not is left blank."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write :func:`csv_text`."""
    write_atomically(path, csv_text(rows).encode())


def read_tensors(path: Path, otherwise: str) -> Any:
    """What ``torch.save`` wrote to ``path``, tensors and plain values, on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of torch's, or damaged; ``otherwise`` says what that means and what to do.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load fails in many ways on what is none of its files.
        raise ValueError(f"{path} {otherwise}") from error


def make_folder(folder: Path) -> None:
    """Make ``folder`` if absent, and see that it can be written to.

    Raises:
        OSError: it cannot be made or written to; the text says why.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"cannot write to {folder}: {error.strerror or error}. Name another folder") from error
