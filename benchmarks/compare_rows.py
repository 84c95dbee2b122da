"""Whether a remedy lowers an error: differences of rows with confidence intervals, for the results.

    python benchmarks/compare_rows.py benchmarks/results/cifar10-jpeg-width8

Reads ``NAME-seedN/summary.json`` and takes all seeds of a NAME as one row. An interval uses Student's t with the
standard deviation pooled over all rows with more than one seed, so a row with one seed gets an interval too.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import groupby
from pathlib import Path

import numpy as np

CONFIDENCE = 0.95
ERRORS = ("standard", "pgd", "verified")


def read_rows(runs: Path) -> dict[str, list[dict[str, float]]]:
    """The errors in percent of each row, one entry per seed."""
    paths = sorted(runs.glob("*-seed*/summary.json"))
    groups = groupby(paths, key=lambda path: path.parent.name.rpartition("-seed")[0])
    return {
        name: [{error: 100 * summary[f"{error}_error"] for error in ERRORS} for summary in map(_read, group)]
        for name, group in groups
    }


def _read(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())


def pooled_deviation(rows: list[np.ndarray]) -> tuple[float, int]:
    """The standard deviation within rows, and its degrees of freedom."""
    freedom = sum(len(row) - 1 for row in rows)
    squares = sum(float(((row - row.mean()) ** 2).sum()) for row in rows)
    return math.sqrt(squares / freedom), freedom


def quantile(freedom: int) -> float:
    """Student's two-sided quantile, from its density by the trapezoidal rule."""
    points, step = np.linspace(0, 50, 500_001, retstep=True)
    density = (1 + points**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) * step / 2)])
    return float(np.interp(CONFIDENCE / 2, below, points))


def main() -> None:
    """Print each row's means, then the differences from the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--reference", default="recipe", metavar="NAME", help="the row subtracted from (recipe)")
    options = parser.parse_args()
    rows = read_rows(options.runs)
    for name, seeds in rows.items():
        print(f"{name:14} {len(seeds)} seeds ", *(f"{e} {np.mean([s[e] for s in seeds]):.2f}" for e in ERRORS))
    for error in ERRORS:
        values = {name: np.array([seed[error] for seed in seeds]) for name, seeds in rows.items()}
        deviation, freedom = pooled_deviation(list(values.values()))
        print(f"{error} error, reference minus row: pooled deviation {deviation:.2f}, {freedom} degrees of freedom")
        reference = values.pop(options.reference)
        for name, row in values.items():
            half = quantile(freedom) * deviation * math.sqrt(1 / len(reference) + 1 / len(row))
            difference = reference.mean() - row.mean()
            print(f"  {name:14} {difference:+.2f} [{difference - half:.2f}, {difference + half:.2f}]")


if __name__ == "__main__":
    main()
