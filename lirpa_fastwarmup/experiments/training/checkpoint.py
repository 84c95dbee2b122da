"""Everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lirpa_fastwarmup.experiments.training import files
from lirpa_fastwarmup.experiments.training.build import Run
from lirpa_fastwarmup.experiments.training.loop import Position
from lirpa_fastwarmup.experiments.training.network import load_weights
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.storage import write_tensors

_FORMATS = (1, 2)  # Those that can be read; the last one is written.
_ENTRIES = {"settings", "train_samples", "objective", "optimizer", "batches", "average", "position"}


def save(path: Path, run: Run, position: Position) -> None:
    """Write the state of ``run`` at ``position``; until that is done, an earlier checkpoint stays whole.

    Every process must call this; the first one writes. What it writes does not depend on their number.
    """
    content = {
        "format": _FORMATS[-1],
        "settings": run.settings.as_dict(),
        "train_samples": len(run.train),
        "objective": run.objective.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "batches": run.train_batches.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "position": {**vars(position), "means": position.means.state_dict()},
    }
    if run.world.is_rank_zero:
        write_tensors(path, content)


def require(path: Path) -> None:
    """See that there is a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no checkpoint ({path.name}) to resume from: a run writes one when it finishes its "
            "first epoch, or is interrupted. Start one there first, without --resume"
        )


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; ``settings`` in it as :class:`Settings`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    require(path)
    content = files.read_tensors(path, _FORMATS)
    try:
        content["settings"] = Settings.from_dict(content["settings"])
        missing = _ENTRIES - content.keys()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the settings in {path} are not such as this version of lirpa_fastwarmup knows ({error}): use the version "
            "that wrote it, or retrain"
        ) from error
    if missing:
        raise ValueError(f"{path} is no checkpoint of a run: it lacks {', '.join(sorted(missing))}")
    return content


def restore(content: dict[str, Any], run: Run, position: Position, path: Path) -> None:
    """Put ``run`` and ``position`` in the state that :func:`read` found in ``path``.

    Raises:
        ValueError: the network or the data is another than that of the checkpoint.
    """
    if content["train_samples"] != len(run.train):
        raise ValueError(
            f"{path} is of a run on {content['train_samples']} training samples, and {run.dataset_name} has "
            f"{len(run.train)} now: give it the same data"
        )
    load_weights(run.objective, content["objective"], path)
    try:
        run.optimizer.load_state_dict(content["optimizer"])
        run.train_batches.load_state_dict(content["batches"])
        saved = dict(content["position"])
        position.means.load_state_dict(saved.pop("means"))
        for name, value in saved.items():
            setattr(position, name, value)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the run that its settings give: {error}. Retrain") from error
    if run.average is not None:
        load_weights(run.average, content["average"], path)
