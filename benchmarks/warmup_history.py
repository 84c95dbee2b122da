"""Bounds and ReLU states over the epochs: two pictures for the results, and a table over all rows.

    python benchmarks/warmup_history.py benchmarks/results/cifar10-jpeg-width8 --out docs/pictures

Reads ``NAME-seed*/history.csv``; the pictures are of the runs ``recipe`` and ``ibp``. Values are means over the seeds;
in the table, that of the growth up to the last ReLU layer is the geometric one.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean

from lirpa_fastwarmup.experiments.report.records import read_history
from lirpa_fastwarmup.inspection import plots

RUNS = {"recipe": ("the recipe", "#0072B2", "-"), "ibp": ("plain IBP with BatchNorm", "#D55E00", "--")}
FULL_EPS = 21.5  # After the ramp's last epoch.
EPOCHS = (1, 5, 21, 70)  # Of the table.


def mean_history(runs: Path, name: str) -> tuple[list[dict[str, float]], int]:
    """The history of a run, averaged over its seeds, and their number."""
    histories = [read_history(path) for path in sorted(runs.glob(f"{name}-seed*/history.csv"))]
    complete = [rows for rows in histories if len(rows) == max(map(len, histories))]
    columns = set.intersection(*(set(rows[-1]) for rows in complete))
    means = [
        {column: sum(float(row[column]) for row in rows) / len(rows) for column in columns}
        for rows in zip(*complete, strict=True)
    ]
    return means, len(complete)


def print_table(runs: Path) -> None:
    """Print the growth of bounds, the states of ReLUs and the standard error of every row at some epochs."""
    print(f"{'row':10} {'epoch':>5}  {'growth':>8}  active  inactive  dead  standard error")
    for name in sorted({path.parent.name.rpartition("-seed")[0] for path in runs.glob("*-seed*/history.csv")}):
        histories = [read_history(path) for path in sorted(runs.glob(f"{name}-seed*/history.csv"))]
        last = [column for column in histories[0][-1] if column.startswith("growth/")][-1]
        for epoch in EPOCHS:
            rows = [history[epoch - 1] for history in histories]
            growth = math.exp(mean(math.log(row[last]) for row in rows))
            active, inactive = (
                mean(row[column] for row in rows for column in row if column.startswith(f"{state}/"))
                for state in ("always_active", "always_inactive")
            )
            dead, error = (mean(row[column] for row in rows) for column in ("dead", "standard_error"))
            print(f"{name:10} {epoch:5}  {growth:8.3g}  {active:6.1%}  {inactive:8.1%}  {dead:4.0%}  {error:6.2%}")


def draw_growth(histories: dict[str, list[dict[str, float]]], out: Path) -> None:
    """Half-widths at the first and the last ReLU layer, relative to the input's."""
    figure = plots.new_figure(figsize=(9, 3.2))
    layers = [name for name in histories["recipe"][-1] if name.startswith("growth/")]
    layers.sort(key=lambda name: int(name.partition("/")[2]))
    places = (("first", layers[0]), ("last", layers[-1]))
    for axes, (place, layer) in zip(figure.subplots(1, 2, sharey=True), places, strict=True):
        for name, history in histories.items():
            label, color, style = RUNS[name]
            epochs = [row["epoch"] for row in history]
            axes.plot(epochs, [row[layer] for row in history], color=color, linestyle=style, linewidth=2, label=label)
        axes.axvline(FULL_EPS, color="#888888", linewidth=0.8)
        axes.set(xlabel="epoch", yscale="log", title=f"{place} ReLU layer")
        axes.grid(alpha=0.3)
        plots.count_epochs(axes)
    figure.axes[0].set_ylabel("half-width over the input's")
    figure.axes[1].annotate("full ε", (FULL_EPS, 1e4), xytext=(4, 0), textcoords="offset points", fontsize="small")
    figure.axes[1].legend(frameon=False)
    figure.savefig(out)


def draw_states(histories: dict[str, list[dict[str, float]]], out: Path) -> None:
    """The fractions of ReLUs by state, averaged over the layers."""
    figure = plots.new_figure(figsize=(9, 3.4))
    for axes, (name, history) in zip(figure.subplots(1, 2, sharey=True), histories.items(), strict=True):
        plots.draw_relu_states(axes, history)
        axes.axvline(FULL_EPS, color="#888888", linewidth=0.8)
        axes.set_title(RUNS[name][0])
    figure.axes[1].set_ylabel("")
    figure.savefig(out)


def main() -> None:
    """Read the histories and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    found = {name: mean_history(options.runs, name) for name in RUNS}
    for name, (history, seeds) in found.items():
        last = {column: value for column, value in history[-1].items() if column.endswith("error")}
        print(f"{name}: {seeds} seeds, {len(history)} epochs, {last}")
    histories = {name: history for name, (history, _) in found.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    draw_growth(histories, options.out / "cifar10_bounds.svg")
    draw_states(histories, options.out / "cifar10_states.svg")
    print_table(options.runs)


if __name__ == "__main__":
    main()
