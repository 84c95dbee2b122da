"""A comparison table: one row per group of runs that differ in their seed only, with mean and standard deviation."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lirpa_fastwarmup.experiments.report.records import ERRORS

# Settings that may differ within a row.
_WITHIN_ROW = ("seed", "data_dir", "compile", "compiled_phases")
_ALWAYS = ("method", "eps")


def comparison(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """The table over finished runs (name, ``summary.json``), its heading first; errors are in percent."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, summary in runs:
        settings = {setting: value for setting, value in summary["settings"].items() if setting not in _WITHIN_ROW}
        key = json.dumps([summary["dataset"], settings], sort_keys=True)
        groups.setdefault(key, []).append((name, summary))
    columns = _differing([group[0][1] for group in groups.values()])
    heads = ("dataset", "method", "ε", *columns, "seeds", "standard %", "PGD %", "verified %", "runs")
    return [heads, *(_row(group, columns) for group in groups.values())]


def _row(group: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str]) -> tuple[str, ...]:
    summaries = [summary for _, summary in group]
    settings = summaries[0]["settings"]
    return (
        str(summaries[0]["dataset"]),
        *(setting_text(settings.get(name)) for name in (*_ALWAYS, *columns)),
        ", ".join(map(str, sorted(int(summary["seed"]) for summary in summaries))),
        *(_error([summary[name] for summary in summaries]) for name in ERRORS),
        ", ".join(name for name, _ in group),
    )


def _differing(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that differ between rows and have no column of their own."""
    settings, elsewhere = [summary["settings"] for summary in summaries], {*_WITHIN_ROW, *_ALWAYS, "dataset"}
    names = dict.fromkeys(name for one in settings for name in one if name not in elsewhere)
    return [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]


def setting_text(value: Any) -> str:
    """The value of a setting: short decimals as they are, multiples of 1/255 as fractions, other numbers rounded."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    pixels = round(value * 255)
    is_fraction = 0 < pixels < 255 and abs(value * 255 - pixels) < 1e-9 and float(f"{value:.4g}") != value
    return f"{pixels}/255" if is_fraction else f"{value:.4g}"


def _error(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    deviation = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{deviation}"
