"""The folder that a run writes to."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lirpa_fastwarmup import storage
from lirpa_fastwarmup.inspection.records import HISTORY, SUMMARY
from lirpa_fastwarmup.storage import make_folder, write_atomically
from lirpa_fastwarmup.verification import report

MODEL, CHECKPOINT, CURVES, TENSORBOARD = "model.pt", "checkpoint.pt", "curves.png", "tensorboard"
# What is known of an earlier network goes with it.
_WRITTEN = (MODEL, CHECKPOINT, HISTORY, SUMMARY, CURVES, *report.WRITTEN)


class OutputExistsError(FileExistsError):
    """The output folder holds something already."""


def prepare(folder: Path, *, overwrite: bool) -> None:
    """See, before anything is computed, that ``folder`` can be written to; make it if absent.

    An earlier run in it stays until :func:`remove_earlier_run`.

    Raises:
        OutputExistsError: it exists, is not empty, and ``overwrite`` is off.
        OSError: it cannot be made or written to; the text says why.
    """
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        unfinished = (folder / CHECKPOINT).is_file() and not (folder / SUMMARY).is_file()
        raise OutputExistsError(
            f"{folder} exists and is not empty; nothing in it was touched. Name another folder, or replace the "
            f"run in it with --overwrite{', or go on with it by --resume' if unfinished else ''}"
        )
    make_folder(folder)


def remove_certificates(folder: Path) -> None:
    """Remove what was verified of an earlier network in ``folder``."""
    for name in report.WRITTEN:
        (folder / name).unlink(missing_ok=True)


def remove_earlier_run(folder: Path) -> None:
    """Remove what an earlier run wrote to ``folder``, and nothing else."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)
    for events in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        events.unlink()


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values with ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomically(path, buffer.getvalue())


def read_tensors(path: Path, version: int) -> dict[str, Any]:
    """Read what :func:`write_tensors` wrote, on the CPU, where its entry ``format`` is ``version``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, of another program, or of another version of this one.
    """
    content = storage.read_tensors(
        path,
        "was not written by lirpa_fastwarmup, or is damaged (truncated?): restore it from a copy, or train anew",
    )
    if not isinstance(content, dict) or content.get("format") != version:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} is of format {found}, and this version of lirpa_fastwarmup reads format {version}: use the "
            "version that wrote it, or train anew"
        )
    return content
