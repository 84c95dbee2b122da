"""A table over finished runs: one row for runs that differ in their seed alone, with mean and deviation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lirpa_fastwarmup.experiments.report.records import ERRORS, read_summary

# What may differ between the runs of a row.
_NO_DIFFERENCE = ("seed", "data_dir")
_HEADS = ("standard", "PGD", "verified")


def comparison(folders: Sequence[Path]) -> list[tuple[str, ...]]:
    """The rows of the table over the runs in ``folders``, its heading first; errors are in percent.

    Runs whose settings agree but for the seed (and the place of the data) share a row, "mean ± standard deviation"
    (of the sample). Columns tell the settings that differ between rows.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_summary`.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        summary = {**read_summary(folder), "run": folder.resolve().name}
        groups.setdefault(_key(summary), []).append(summary)
    rows = list(groups.values())
    columns = _differing([summaries[0] for summaries in rows])
    table = [("dataset", *columns, "seeds", *(f"{head} %" for head in _HEADS), "runs")]
    for summaries in rows:
        first = summaries[0]
        table.append(
            (
                str(first["dataset"]),
                *(_setting(first, name) for name in columns),
                ", ".join(str(summary["seed"]) for summary in sorted(summaries, key=lambda run: int(run["seed"]))),
                *(_figure([summary[name] for summary in summaries]) for name in ERRORS),
                ", ".join(summary["run"] for summary in summaries),
            )
        )
    return table


def _key(summary: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in summary["settings"].items() if name not in _NO_DIFFERENCE}
    return json.dumps([summary["dataset"], settings], sort_keys=True)


def _differing(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for summary in summaries for name in summary["settings"])
    return [
        name
        for name in names
        if name not in (*_NO_DIFFERENCE, "dataset")
        and len({json.dumps(summary["settings"].get(name)) for summary in summaries}) > 1
    ]


def _setting(summary: Mapping[str, Any], name: str) -> str:
    value = summary["settings"].get(name)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _figure(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}"
