"""Settings that others published for SABR, MTL-, CC- and EXP-IBP, by dataset and radius, with their sources.

``published.csv`` has the settings of losses, ``schedules.csv`` CTBench's schedules, and ``presets.csv`` those of this
package's runs. An empty cell leaves a setting as it is; ``kappa`` is constant.
"""

import csv
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

_SOURCES = {"CTBench": "CTBench, commit 0f18162, scripts/examples"}
_SOURCES["expressive-losses"] = "expressive-losses, commit 3df64fa, README"
# How cells are read that are not JSON; κ is constant.
_READERS: dict[str, Callable[[str], Any]] = dict.fromkeys(("batchnorm_policy", "preset", "dataset"), str)
_READERS |= {"kappa": lambda cell: (float(cell),) * 2, "lr_milestones": lambda cell: tuple(map(int, cell.split()))}
_READERS["eps"] = lambda cell: float(Fraction(cell))
_SAME = 1e-3  # Radii that differ relatively by less are equal: some write 0.00784 for 2/255.


class Published(NamedTuple):
    """Settings by name, and their source."""

    settings: dict[str, Any]
    source: str


def rows(name: str, **wanted: str) -> Iterator[dict[str, str]]:
    """The rows of the table ``name`` with the ``wanted`` cells, without their empty ones."""
    with Path(__file__).with_name(f"{name}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if wanted.items() <= row.items():
                yield {column: cell for column, cell in row.items() if cell}


def settings_in(cells: dict[str, str]) -> dict[str, Any]:
    """The values of cells by the names of their settings."""
    return {name: _READERS.get(name, json.loads)(cell) for name, cell in cells.items()}


def _published(name: str, eps: float, **wanted: str) -> Published | None:
    """The settings in the row for the radius ``eps``; its other cells are their problem and their source."""
    for row in rows(name, **wanted):
        if abs(_READERS["eps"](row["eps"]) - eps) <= _SAME * eps:
            cells = {column: row[column] for column in row if column not in ("method", "dataset", "eps", "source")}
            return Published(settings_in(cells), _SOURCES[row.get("source", "CTBench")])
    return None


def loss_settings(method: str, dataset: str, eps: float) -> Published | None:
    """The settings of ``method``'s loss, its attack and its penalty; ``None`` where nobody published any."""
    return _published("published", eps, method=method, dataset=dataset)


def known_problems(name: str, **wanted: str) -> str:
    """The datasets and radii for which the table ``name`` has rows with the ``wanted`` cells, as text."""
    return ", ".join(f"{row['dataset']} at {row['eps']}" for row in rows(name, **wanted))


def ctbench_schedule(method: str, dataset: str, eps: float) -> Published:
    """CTBench's epochs, ramp, learning rate and averages for a problem; raises ValueError if it has none."""
    found = _published("schedules", eps, dataset=dataset)
    if found is None:
        problem = f"CTBench has no schedule for {dataset} at ε = {eps:g}, only for {known_problems('schedules')}"
        raise ValueError(f"{problem}: set --epochs, --ramp-length and --lr-milestones instead of --schedule ctbench")
    settings = found.settings | {"precise_bn": True, "schedule": "smoothed"}
    if method not in ("mtl-ibp", "cc-ibp", "exp-ibp"):
        settings["swa_start"] = None
    return found._replace(settings=settings)
