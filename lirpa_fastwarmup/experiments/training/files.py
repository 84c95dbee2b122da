"""The folder that a run writes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lirpa_fastwarmup import storage
from lirpa_fastwarmup.storage import is_leftover, locked, make_folder
from lirpa_fastwarmup.verification import report

MODEL, HISTORY, SUMMARY, CHECKPOINT = "model.pt", "history.csv", "summary.json", "checkpoint.pt"
CURVES, TENSORBOARD = "curves.png", "tensorboard"
# What is known of an earlier network goes with it.
_WRITTEN = (MODEL, HISTORY, SUMMARY, CURVES, *report.WRITTEN)

_DAMAGED = "was not written by lirpa_fastwarmup, or is damaged (truncated?): restore it from a copy, or retrain"


class OutputExistsError(FileExistsError):
    """The output folder holds something already."""


@contextmanager
def claimed(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Be the one run that writes to ``folder``, for as long as the block lasts; make it if absent.

    An earlier run in it stays until :func:`remove_earlier_run`.

    Raises:
        OutputExistsError: it exists, is not empty, and ``overwrite`` is off.
        FolderInUseError: another run is writing to it.
        OSError: it cannot be made or written to; the text says why.
    """
    make_folder(folder)
    with locked(folder):
        if not overwrite and any(not is_leftover(path) for path in folder.iterdir()):
            unfinished = (folder / CHECKPOINT).is_file() and not (folder / SUMMARY).is_file()
            raise OutputExistsError(
                f"{folder} exists and is not empty; nothing in it was touched. Name another folder, or replace the "
                f"run in it with --overwrite{', or resume it with --resume' if unfinished else ''}"
            )
        yield


def remove_certificates(folder: Path) -> None:
    """Remove what was verified of an earlier network in ``folder``."""
    for name in report.WRITTEN:
        (folder / name).unlink(missing_ok=True)


def remove_earlier_run(folder: Path) -> None:
    """Remove what an earlier run wrote to ``folder``, but for its checkpoint, and nothing else."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)


def remove_events(folder: Path) -> None:
    """Remove what an earlier run in ``folder`` logged to TensorBoard."""
    for events in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        events.unlink()


def read_tensors(path: Path, versions: Sequence[int]) -> dict[str, Any]:
    """Read what :func:`lirpa_fastwarmup.storage.write_tensors` wrote, on the CPU, in one of the formats ``versions``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, of another program, or of another version of this one.
    """
    content = storage.read_tensors(path, _DAMAGED)
    if not isinstance(content, dict) or content.get("format") not in versions:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} is of format {found}, and this version of lirpa_fastwarmup reads the formats "
            f"{' and '.join(map(str, versions))}: use the version that wrote it, or retrain"
        )
    if content["format"] == versions[-1] and not storage.has_checksum(path):  # Earlier formats have none.
        raise ValueError(f"{path} {_DAMAGED} (its checksum is missing)")
    return content
