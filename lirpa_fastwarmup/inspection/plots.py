"""Pictures of bounds, of training and of certificates (matplotlib comes with the extra ``plots``).

Every ``draw_`` function draws into an Axes that it is given. Colours are told apart by the colour-blind; line styles,
markers and hatching tell the same apart in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lirpa_fastwarmup.inspection.statistics import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette.
_BLACK, _BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _AMBER = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
)
_SERIES: tuple[dict[str, Any], ...] = (
    {"color": _BLUE, "linestyle": "-", "marker": "o"},
    {"color": _ORANGE, "linestyle": "--", "marker": "s"},
    {"color": _GREEN, "linestyle": "-.", "marker": "^"},
    {"color": _PURPLE, "linestyle": ":", "marker": "D"},
    {"color": _BLACK, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": _AMBER, "linestyle": (0, (1, 1)), "marker": "P"},
    {"color": _SKY, "linestyle": (0, (6, 2)), "marker": "X"},
)
_STATES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("always_active", "always active", _SERIES[0], ""),
    ("unstable", "unstable", _SERIES[2], "...."),
    ("always_inactive", "always inactive", _SERIES[1], "////"),
)

History = Sequence[Mapping[str, float]]


def new_figure(**arguments: Any) -> Figure:
    """A matplotlib Figure that needs no display, laid out so that nothing is cut off.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lirpa_fastwarmup[plots]'") from error
    return Figure(layout="constrained", **arguments)


# Networks.


def draw_bound_growth(axes: Axes, networks: Mapping[str, Inspection], *, formula: bool = False) -> None:
    """Δ_i/Δ_0 over the ReLU layers of several networks, by name (as figure 1 of Shi et al., NeurIPS 2021).

    Args:
        axes: to draw into.
        networks: their inspections, by the names to call them.
        formula: also draw the product of the layers' expected gains, as thin lines with crosses. The formula assumes a
            sequential network without BatchNorm.

    Raises:
        ValueError: none of the networks has a ReLU.
    """
    deepest = max((len(one.relus) for one in networks.values()), default=0)
    if not deepest:
        raise ValueError("there are no ReLU layers whose bounds could be drawn")
    for series, (name, found) in zip(_cycled(len(networks)), networks.items(), strict=True):
        growth = [1.0, *(layer.growth for layer in found.relus)]
        axes.plot(range(len(growth)), growth, **series, markersize=5, label=name)
        if formula:
            expected = _expected_growth(found)
            style = {"color": series["color"], "linewidth": 0.9, "marker": "x", "markersize": 9}
            axes.plot(range(len(expected)), expected, **style, label=f"{name}, formula")
    axes.set_yscale("log")
    axes.set(xlabel="ReLU layer (0: input)", ylabel="mean half-width of bounds, Δᵢ/Δ₀", xticks=range(deepest + 1))
    _finish(axes)


def _expected_growth(found: Inspection) -> list[float]:
    gains = {layer.name: layer.expected_gain for layer in found.affine}
    growth = [1.0]
    for layer in found.relus:
        growth.append(growth[-1] * (gains.get(layer.name) or math.nan))
    return growth


def draw_states_by_layer(axes: Axes, found: Inspection) -> None:
    """Shares of always-active, unstable and always-inactive neurons in each ReLU layer, as bars.

    Raises:
        ValueError: the network has no ReLU.
    """
    if not found.relus:
        raise ValueError("the network has no ReLU layers, whose states could be drawn")
    places = range(len(found.relus))
    left = [0.0] * len(found.relus)
    for name, label, series, hatch in _STATES:
        shares = [100 * getattr(layer, name) for layer in found.relus]
        axes.barh(places, shares, left=left, color=series["color"], hatch=hatch, edgecolor="white", label=label)
        left = [sum(pair) for pair in zip(left, shares, strict=True)]
    axes.set_yticks(places, [layer.name or "(the network)" for layer in found.relus])
    axes.invert_yaxis()  # The first layer on top.
    axes.set(xlabel="neurons (%)", ylabel="ReLU layer", xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


# Training.


def _column(history: History, name: str) -> list[float]:
    return [row.get(name, math.nan) for row in history]


def layers_of(history: History) -> list[str]:
    """The ReLU layers that a history tells of.

    Raises:
        ValueError: it tells of none.
    """
    names = [name.partition("/")[2] for name in history[-1] if name.startswith("always_active/")] if history else []
    if not names:
        raise ValueError(
            "this history has no figures of ReLU layers: the network has none, or an earlier version wrote it"
        )
    return names


def draw_relu_states(axes: Axes, history: History, layer: str | None = None) -> None:
    """Shares of neurons by state over the epochs, of one layer or the mean over all (as figure 2 of Shi et al.).

    Raises:
        ValueError: the history tells of no such layer.
    """
    names = layers_of(history)
    if layer is not None and layer not in names:
        raise ValueError(f"the history tells of no ReLU layer {layer!r}; it has {', '.join(names)}")
    chosen = names if layer is None else [layer]
    epochs = _column(history, "epoch")
    for state, label, series, _ in _STATES:
        shares = [_column(history, f"{state}/{name}") for name in chosen]
        means = [100 * math.fsum(values) / len(chosen) for values in zip(*shares, strict=True)]
        axes.plot(epochs, means, **series, markersize=3, label=label)
    axes.set(xlabel="epoch", ylabel="neurons (%)", ylim=(0, 100))
    _finish(axes)


def draw_growth_over_training(axes: Axes, history: History) -> None:
    """Δ_i/Δ_0 of every ReLU layer over the epochs.

    Raises:
        ValueError: the history tells of no ReLU layer.
    """
    names = layers_of(history)
    epochs = _column(history, "epoch")
    for series, name in zip(_cycled(len(names)), names, strict=True):
        axes.plot(epochs, _column(history, f"growth/{name}"), **series, markersize=3, label=name or "(the network)")
    axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="Δᵢ/Δ₀ at the target ε")
    _finish(axes, ncols=2, title="ReLU layer", title_fontsize="small")


def draw_losses(axes: Axes, history: History) -> None:
    """The losses over the epochs, and the regularisers while they are on."""
    epochs = _column(history, "epoch")
    for name, label, color, style in (
        ("loss", "objective", _BLACK, "-"),
        ("robust_loss", "robust cross-entropy", _ORANGE, "--"),
        ("clean_loss", "clean cross-entropy", _BLUE, ":"),
    ):
        values = _column(history, name)
        axes.plot(epochs, values, color=color, linestyle=style, marker=_lone(values), label=label)
    for name, label, color, marker in (
        ("tightness", "tightness", _GREEN, "o"),
        ("relu_balance", "ReLU balance", _PURPLE, "s"),
    ):
        values = _column(history, name)
        if not all(map(math.isnan, values)):  # A run without regularisers has nothing to show of them.
            axes.plot(epochs, values, color=color, marker=marker, markersize=3, linewidth=0.8, label=label)
    axes.set(xlabel="epoch", ylabel="mean over the training set")
    axes.set_ylim(bottom=-0.02)
    _finish(axes)


def draw_errors(axes: Axes, history: History) -> None:
    """Standard error and verified error at the target ε, on the test set."""
    epochs = _column(history, "epoch")
    for name, color, style, label in (
        ("verified_error", _ORANGE, "--", "verified error (IBP, at the target ε)"),
        ("standard_error", _BLUE, "-", "standard error"),
    ):
        errors = [100 * value for value in _column(history, name)]
        axes.plot(epochs, errors, color=color, linestyle=style, marker=_lone(errors), label=label)
    axes.set(xlabel="epoch", ylabel="error on the test set (%)", ylim=(0, 102))
    _finish(axes)


def draw_errors_of_runs(axes: Axes, histories: Mapping[str, History], column: str = "verified_error") -> None:
    """One error of several runs over the epochs, by the runs' names: "verified_error" or "standard_error"."""
    for series, (name, history) in zip(_cycled(len(histories)), histories.items(), strict=True):
        errors = [100 * value for value in _column(history, column)]
        axes.plot(_column(history, "epoch"), errors, **series, markersize=3, label=name)
    axes.set(xlabel="epoch", ylabel=f"{column.replace('_', ' ')} on the test set (%)", ylim=(0, 102))
    _finish(axes)


def draw_radius(axes: Axes, history: History) -> None:
    """The radius ε at the end of each epoch."""
    values = _column(history, "eps")
    axes.plot(_column(history, "epoch"), values, color=_BLACK, marker=_lone(values))
    axes.set(xlabel="epoch", ylabel="ε (input units)")
    axes.set_ylim(bottom=0)


def save_training_curves(history: History, path: Path, *, title: str) -> None:
    """Draw errors, losses and ε of a run into one picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(figsize=(12, 3.8))
    axes = figure.subplots(1, 3, width_ratios=(2, 2, 1.2))
    for panel, draw in zip(axes, (draw_errors, draw_losses, draw_radius), strict=True):
        draw(panel, history)
        count_epochs(panel)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def count_epochs(axes: Axes) -> None:
    """Whole numbers along the epochs, and no frame where there is no axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)


# Certificates.


def draw_margins(axes: Axes, margins: Sequence[float], *, bins: int = 40) -> None:
    """A histogram of the samples' verified margins: lower bounds on min_j z_y − z_j over the box; above 0 is certified.

    Margins that are NaN (no bound) are left out.

    Raises:
        ValueError: no margin is known.
    """
    known = sorted(margin for margin in margins if math.isfinite(margin))
    if not known:
        raise ValueError("no verified margin is known: run verify with a bounding method")
    # The far tail of what is not certified would squeeze the rest together.
    low = max(known[0], -3 * max(abs(known[-1]), 1e-12)) if known[0] < 0 else 0.0
    width = max(known[-1] - low, 1e-12) / bins
    first = math.floor(low / width)
    edges = [width * place for place in range(first, first + bins + 2)]  # One of them is 0.
    for chosen, label, color, hatch in (
        ([max(margin, low) for margin in known if margin <= 0], "not certified", _ORANGE, "////"),
        ([margin for margin in known if margin > 0], "certified", _BLUE, ""),
    ):
        if chosen:
            name = f"{label} ({len(chosen):,})"
            axes.hist(chosen, bins=edges, color=color, hatch=hatch, edgecolor="white", label=name)
    axes.axvline(0, color=_BLACK, linewidth=1)
    further = sum(margin < low for margin in known)
    axes.set(
        xlabel="verified margin (logits)" + (f"; {further:,} further left, at the edge" if further else ""),
        ylabel="samples",
    )
    _finish(axes)


def draw_errors_over_eps(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Standard, PGD and verified error over ε, with 95 % intervals: the ``results`` of a ``verification.json``.

    Raises:
        ValueError: there are none at a radius that is one number.
    """
    chosen = sorted((one for one in results if isinstance(one["eps"], int | float)), key=lambda one: float(one["eps"]))
    if not chosen:
        raise ValueError("there are no results at a radius that is one number")
    for name, label, series in (
        ("verified_error", "verified error", _SERIES[1]),
        ("pgd_error", "PGD error", _SERIES[2]),
        ("standard_error", "standard error", _SERIES[0]),
    ):
        points = [(one["eps"], one[name]) for one in chosen if one[name] is not None]
        if not points:
            continue
        values = [100 * share["value"] for _, share in points]
        ends = [[100 * end for end in share["interval_95"]] for _, share in points]
        below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
        above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
        radii = [eps for eps, _ in points]
        axes.errorbar(radii, values, yerr=(below, above), **series, markersize=4, capsize=3, label=label)
    axes.set(xlabel="ε (input units)", ylabel="error (%)")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _lone(values: Sequence[float]) -> str:
    """A marker for a curve of one point, which would not be seen otherwise."""
    return "o" if len(values) == 1 else ""


def _cycled(count: int) -> list[dict[str, Any]]:
    return [_SERIES[place % len(_SERIES)] for place in range(count)]


def _finish(axes: Axes, **legend: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, **legend)
