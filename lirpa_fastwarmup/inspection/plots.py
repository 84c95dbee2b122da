"""Pictures of a training run (needs matplotlib, of the extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by the colour-blind; line styles tell them apart in grey.
_BLUE, _ORANGE, _GREEN, _PURPLE, _BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"

History = Sequence[Mapping[str, float]]


def _column(history: History, name: str) -> list[float]:
    return [row[name] for row in history]


def draw_losses(axes: Axes, history: History) -> None:
    """The losses over the epochs, and the regularisers while they are on."""
    epochs = _column(history, "epoch")
    axes.plot(epochs, _column(history, "loss"), color=_BLACK, label="objective")
    axes.plot(epochs, _column(history, "robust_loss"), color=_ORANGE, linestyle="--", label="robust cross-entropy")
    axes.plot(epochs, _column(history, "clean_loss"), color=_BLUE, linestyle=":", label="clean cross-entropy")
    for name, label, color, marker in (
        ("tightness", "tightness", _GREEN, "o"),
        ("relu_balance", "ReLU balance", _PURPLE, "s"),
    ):
        values = _column(history, name)
        if not all(map(math.isnan, values)):  # A run without regularisers has nothing to show of them.
            axes.plot(epochs, values, color=color, marker=marker, markersize=3, linewidth=0.8, label=label)
    axes.set(xlabel="epoch", ylabel="mean over the training set")
    axes.set_ylim(bottom=-0.02)
    axes.legend(fontsize="small", frameon=False)


def draw_errors(axes: Axes, history: History) -> None:
    """Standard error and verified error at the target ε, on the test set."""
    epochs = _column(history, "epoch")
    for name, color, style, label in (
        ("verified_error", _ORANGE, "--", "verified error (IBP, at the target ε)"),
        ("standard_error", _BLUE, "-", "standard error"),
    ):
        axes.plot(epochs, [100 * value for value in _column(history, name)], color=color, linestyle=style, label=label)
    axes.set(xlabel="epoch", ylabel="error on the test set (%)", ylim=(0, 102))
    axes.legend(fontsize="small", frameon=False)


def draw_radius(axes: Axes, history: History) -> None:
    """The radius ε at the end of each epoch."""
    axes.plot(_column(history, "epoch"), _column(history, "eps"), color=_BLACK)
    axes.set(xlabel="epoch", ylabel="ε (input units)")
    axes.set_ylim(bottom=0)


def save_training_curves(history: History, path: Path, *, title: str) -> None:
    """Draw errors, losses and ε of a run into one picture."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(2, 2, 1.2))
    draw_errors(axes[0], history)
    draw_losses(axes[1], history)
    draw_radius(axes[2], history)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
