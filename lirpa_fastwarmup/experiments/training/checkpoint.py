"""The folder of a run: its lock, its files, and the checkpoint that the run resumes from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lirpa_fastwarmup.distributed import world
from lirpa_fastwarmup.experiments.training import build, loop, network, settings
from lirpa_fastwarmup.storage import is_leftover, locked, make_folder, refused, write_tensors
from lirpa_fastwarmup.verification.folder import WRITTEN as CERTIFICATES

MODEL, HISTORY, SUMMARY, CHECKPOINT, CURVES = "model.pt", "history.csv", "summary.json", "checkpoint.pt", "curves.png"

_FORMAT = 3
_ENTRIES = {"settings", "data", "objective", "optimizer", "batches", "average", "position"}
_MISFITS = (TypeError, ValueError, KeyError, AttributeError)


class OutputExistsError(FileExistsError):
    """The output folder is not empty."""


@contextmanager
def claimed(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Make and lock ``folder`` for a run, on rank 0. An earlier run in it stays until the first checkpoint."""
    if not world().is_rank_zero:
        yield
        return
    with make_folder(folder), locked(folder):
        if not overwrite and any(not is_leftover(path) for path in folder.iterdir()):
            unfinished = (folder / CHECKPOINT).is_file() and not (folder / SUMMARY).is_file()
            advice = f"replace the run in it with --overwrite{', or resume it with --resume' if unfinished else ''}"
            raise OutputExistsError(f"{folder} is not empty; nothing in it was touched. Name another, or {advice}")
        yield


def remove(folder: Path, *names: str) -> None:
    """Remove the files of an earlier run in ``folder``."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def save(folder: Path, run: build.Run, position: loop.Position, *, fresh: bool) -> None:
    """Write the state of ``run``, on rank 0; every process must call this. ``fresh``: replace an earlier run."""
    content: dict[str, Any] = {"format": _FORMAT, "settings": run.settings.as_dict(), "data": _data(run)}
    content |= {"objective": run.objective.state_dict(), "optimizer": run.optimizer.state_dict()}
    content |= {"batches": run.train_batches.state_dict(), "average": run.average and run.average.state_dict()}
    content["outputs"] = network.outputs_of(run.objective.model, run.architecture)
    content["position"] = {**vars(position), "means": position.means.state_dict()}
    if world().is_rank_zero:
        if fresh:
            remove(folder, SUMMARY)  # With it, the new run would seem finished.
        write_tensors(folder / CHECKPOINT, content)
        if fresh:
            remove(folder, *CERTIFICATES, MODEL, HISTORY, CURVES)  # Not before there is a checkpoint in its place.


def _data(run: build.Run) -> str:
    samples = run.train_batches.split
    return f"{len(samples)} training samples (digest {samples.digest}) in {len(run.train_batches)} batches"


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its settings as :class:`Settings`."""
    if not path.is_file():
        when = "a run writes one when it finishes its first epoch, or is interrupted. Start one first, without --resume"
        raise FileNotFoundError(f"{path.parent} holds no checkpoint ({path.name}) to resume from: {when}")
    content = network.read_format(path, _FORMAT)
    problem = f"this version of lirpa_fastwarmup cannot read the settings in {path}"
    with refused(problem, *_MISFITS, advice=". Use the version that wrote it, or retrain"):
        content["settings"] = settings.Settings.from_dict(content["settings"])
    if missing := _ENTRIES - content.keys():
        raise ValueError(f"{path} is not the checkpoint of a run: it lacks {', '.join(sorted(missing))}")
    return content


def restore(content: dict[str, Any], run: build.Run, position: loop.Position, path: Path) -> None:
    """Restore a run from the checkpoint in ``path``; raise ValueError if its network or data differ."""
    before, now = content["data"], _data(run)
    if before != now:
        problem = f"{path} is from a run on {before}, and {run.dataset_name} has {now} now"
        raise ValueError(f"{problem}: use the same data, and a number of processes that leaves as many batches")
    network.load_weights(run.objective, content["objective"], path)
    network.require_outputs(run.objective.model, run.architecture, content.get("outputs"), path)
    with refused(f"{path} does not fit the run of its settings", *_MISFITS, RuntimeError, advice=". Retrain"):
        run.optimizer.load_state_dict(content["optimizer"])
        run.train_batches.load_state_dict(content["batches"])
        saved = dict(content["position"])
        position.means.load_state_dict(saved.pop("means"))
        vars(position).update(saved)
    if run.average is not None:
        network.load_weights(run.average, content["average"], path)
