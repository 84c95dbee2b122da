"""Plots of bounds, training and certificates (the extra ``plots`` installs matplotlib).

Every ``draw_`` function draws into the given Axes, in colours and styles that suit the colour-blind and grey.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lirpa_fastwarmup.inspection.statistics import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _PURPLE, _BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"  # Okabe and Ito's.
_COLORS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _BLACK, "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (6, 2)))
_STYLES = tuple(zip(_COLORS, _LINES, "os^DvPX", strict=True))
_SERIES: list[dict[str, Any]] = [{"color": one, "linestyle": line, "marker": mark} for one, line, mark in _STYLES]
_STATES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("always_active", "always active", _SERIES[0], ""),
    ("unstable", "unstable", _SERIES[2], "...."),
    ("always_inactive", "always inactive", _SERIES[1], "////"),
)
_LOSSES = (  # Columns of a history: name, label, colour, line style and marker.
    ("loss", "objective", _BLACK, "-"),
    ("robust_loss", "robust cross-entropy", _ORANGE, "--"),
    ("clean_loss", "clean cross-entropy", _BLUE, ":"),
    ("adversarial_loss", "adversarial cross-entropy", _GREEN, "-."),
)
_REGULARISERS = (("tightness", "tightness", _GREEN, "-o"), ("relu_balance", "ReLU balance", _PURPLE, "-s"))
_VERIFIED = ("verified_error", "verified error (IBP, at the target ε)", _ORANGE, "--")
_STANDARD = ("standard_error", "standard error", _BLUE, "-")

History = Sequence[Mapping[str, float]]


def new_figure(**arguments: Any) -> Figure:
    """A matplotlib Figure that needs no display, with constrained layout; raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lirpa_fastwarmup[plots]'") from error
    return Figure(layout="constrained", **arguments)


def draw_bound_growth(axes: Axes, networks: Mapping[str, Inspection], *, formula: bool = False) -> None:
    """Draw Δ_i/Δ_0 over the ReLU layers of networks, by name (as figure 1 of Shi et al., NeurIPS 2021).

    ``formula``: also draw the product of the layers' expected gains, as thin lines with crosses. The formula assumes a
    sequential network without BatchNorm. Raises ValueError if none of the networks has a ReLU.
    """
    deepest = max((len(one.relus) for one in networks.values()), default=0)
    if not deepest:
        raise ValueError("the networks have no ReLU layers to draw")
    for (name, found), series in zip(networks.items(), itertools.cycle(_SERIES), strict=False):
        axes.plot([1.0, *(layer.growth for layer in found.relus)], **series, markersize=5, label=name)
        if formula:
            gains = {layer.name: layer.expected_gain or math.nan for layer in found.affine}
            factors = (gains.get(layer.name, math.nan) for layer in found.relus)
            expected = list(itertools.accumulate(factors, operator.mul, initial=1.0))
            style = {"color": series["color"], "linewidth": 0.9, "marker": "x", "markersize": 9}
            axes.plot(expected, **style, label=f"{name}, formula")
    labels: dict[str, Any] = {"xlabel": "ReLU layer (0: input)", "ylabel": "mean half-width of bounds, Δᵢ/Δ₀"}
    _finish(axes, yscale="log", xticks=range(deepest + 1), **labels)


def draw_states_by_layer(axes: Axes, found: Inspection) -> None:
    """Draw the fractions of neurons by state as a bar per ReLU layer; raises ValueError if there is none."""
    if not found.relus:
        raise ValueError("the network has no ReLU layers to draw")
    places = range(len(found.relus))
    left = [0.0] * len(found.relus)
    for name, label, series, hatch in _STATES:
        percent = [100 * getattr(layer, name) for layer in found.relus]
        axes.barh(places, percent, left=left, color=series["color"], hatch=hatch, edgecolor="white", label=label)
        left = [sum(pair) for pair in zip(left, percent, strict=True)]
    axes.set_yticks(places, [layer.name or "(the network)" for layer in found.relus])
    axes.invert_yaxis()  # The first layer on top.
    legend = {"ncols": 3, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    _finish(axes, legend, xlabel="neurons (%)", ylabel="ReLU layer", xlim=(0, 100))


def _column(history: History, name: str, scale: float = 1) -> list[float]:
    return [scale * row.get(name, math.nan) for row in history]


def _relu_layers(history: History) -> list[str]:
    names = [name.partition("/")[2] for name in history[-1] if name.startswith("always_active/")] if history else []
    if not names:
        raise ValueError("the history has no statistics of ReLUs: the network has none, or an earlier version wrote it")
    return names


def draw_relu_states(axes: Axes, history: History, layer: str | None = None) -> None:
    """Draw the fractions of neurons by state over the epochs, of ``layer`` or the mean (as figure 2 of Shi et al.).

    Raises ValueError if the history has no such layer.
    """
    names = _relu_layers(history)
    chosen = names if layer is None else [layer]
    if chosen[0] not in names:
        raise ValueError(f"the history has no ReLU layer {layer!r}; it has {', '.join(names)}")
    for state, label, series, _ in _STATES:
        fractions = [_column(history, f"{state}/{name}") for name in chosen]
        means = [100 * math.fsum(values) / len(chosen) for values in zip(*fractions, strict=True)]
        axes.plot(_column(history, "epoch"), means, **series, markersize=3, label=label)
    _finish(axes, xlabel="epoch", ylabel="neurons (%)", ylim=(0, 100))


def draw_growth_over_training(axes: Axes, history: History) -> None:
    """Draw Δ_i/Δ_0 of every ReLU layer over the epochs; raises ValueError if there is none."""
    epochs = _column(history, "epoch")
    for name, series in zip(_relu_layers(history), itertools.cycle(_SERIES), strict=False):
        axes.plot(epochs, _column(history, f"growth/{name}"), **series, markersize=3, label=name or "(the network)")
    legend = {"ncols": 2, "title": "ReLU layer", "title_fontsize": "small"}
    _finish(axes, legend, yscale="log", xlabel="epoch", ylabel="Δᵢ/Δ₀ at the target ε")


def draw_losses(axes: Axes, history: History) -> None:
    """Draw the losses over the epochs, and the regularisers that were on."""
    for columns, style in ((_LOSSES, {}), (_REGULARISERS, {"markersize": 3, "linewidth": 0.8})):
        known = [column for column in columns if not all(map(math.isnan, _column(history, column[0])))]
        _draw_columns(axes, history, known, **style)
    _finish(axes, xlabel="epoch", ylabel="mean over the training set", ylim=(-0.02, None))


def draw_errors(axes: Axes, history: History) -> None:
    """Draw the standard error and the verified error at the target ε, on the test set."""
    _draw_columns(axes, history, (_VERIFIED, _STANDARD), scale=100)
    _finish(axes, xlabel="epoch", ylabel="error on the test set (%)", ylim=(0, 102))


def _draw_columns(
    axes: Axes, history: History, columns: Sequence[tuple[str, str, str, str]], *, scale: float = 1, **style: Any
) -> None:
    for name, label, color, line in columns:
        shown = line if len(history) > 1 else "o"  # A curve of one point would be invisible without a marker.
        axes.plot(_column(history, "epoch"), _column(history, name, scale), shown, color=color, label=label, **style)


def draw_errors_of_runs(axes: Axes, histories: Mapping[str, History], column: str = "verified_error") -> None:
    """Draw one error, "verified_error" or "standard_error", of several runs (by name) over the epochs."""
    for (name, history), series in zip(histories.items(), itertools.cycle(_SERIES), strict=False):
        axes.plot(_column(history, "epoch"), _column(history, column, 100), **series, markersize=3, label=name)
    _finish(axes, xlabel="epoch", ylabel=f"{column.replace('_', ' ')} on the test set (%)", ylim=(0, 102))


def draw_radius(axes: Axes, history: History) -> None:
    """Draw the radius ε at the end of each epoch."""
    _draw_columns(axes, history, [("eps", "ε", _BLACK, "-")])
    axes.set(xlabel="epoch", ylabel="ε (input units)", ylim=(0, None))


def save_training_curves(history: History, path: Path, *, title: str) -> None:
    """Write errors, losses and ε of a run as one picture; raises ImportError without matplotlib."""
    figure = new_figure(figsize=(12, 3.8))
    axes = figure.subplots(1, 3, width_ratios=(2, 2, 1.2))
    for panel, draw in zip(axes, (draw_errors, draw_losses, draw_radius), strict=True):
        draw(panel, history)
        count_epochs(panel)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def count_epochs(axes: Axes) -> None:
    """Label the horizontal axis with whole numbers, and remove the frame without an axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)


def draw_margins(axes: Axes, margins: Sequence[float], *, bins: int = 40) -> None:
    """Draw a histogram of the known (not NaN) verified margins, bounds on min_j z_y − z_j; ValueError without any."""
    known = sorted(margin for margin in margins if math.isfinite(margin))
    if not known:
        raise ValueError("no verified margin is known: run verify with a bounding method")
    # A long tail of samples that are not certified would hide the shape of the rest.
    low = max(known[0], -3 * max(abs(known[-1]), 1e-12)) if known[0] < 0 else 0.0
    width = max(known[-1] - low, 1e-12) / bins
    first = math.floor(low / width)
    edges = [width * place for place in range(first, first + bins + 2)]  # One of them is 0.
    for certified, label, color, hatch in ((False, "not certified", _ORANGE, "////"), (True, "certified", _BLUE, "")):
        chosen = [max(margin, low) for margin in known if (margin > 0) is certified]
        if chosen:
            label += f" ({len(chosen):,})"
            axes.hist(chosen, bins=edges, color=color, hatch=hatch, edgecolor="white", label=label)
    axes.axvline(0, color=_BLACK, linewidth=1)
    further = sum(margin < low for margin in known)
    tail = f"; {further:,} further left, at the edge" if further else ""
    _finish(axes, xlabel=f"verified margin (logits){tail}", ylabel="samples")


def draw_errors_over_eps(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw errors over ε with 95 % intervals, from ``results`` of verification.json; ValueError if no ε is a number."""
    chosen = sorted((one for one in results if isinstance(one["eps"], int | float)), key=lambda one: float(one["eps"]))
    if not chosen:
        raise ValueError("no result has a radius that is one number")
    for name, series in (("verified_error", _SERIES[1]), ("pgd_error", _SERIES[2]), ("standard_error", _SERIES[0])):
        known = [(one["eps"], one[name]["value"], *one[name]["interval_95"]) for one in chosen if one[name] is not None]
        if known:
            radii, values, low, high = zip(*known, strict=True)
            below, above = ([100 * abs(a - b) for a, b in zip(values, ends, strict=True)] for ends in (low, high))
            style = {**series, "markersize": 4, "capsize": 3, "label": name.replace("_", " ").replace("pgd", "PGD")}
            axes.errorbar(radii, [100 * value for value in values], yerr=(below, above), **style)
    _finish(axes, xlabel="ε (input units)", ylabel="error (%)", ylim=(0, None))


def _finish(axes: Axes, legend: Mapping[str, Any] | None = None, **properties: Any) -> None:
    axes.set(**properties)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, **(legend or {}))
