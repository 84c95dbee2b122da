"""Plots: they show the given data with labels, and refuse what they cannot show."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.inspection import plots
from tests.networks import convolutional

HISTORY = [
    {
        "epoch": epoch,
        "eps": 0.1 * epoch / 3,
        "loss": 3.0 / epoch,
        "robust_loss": 2.0 / epoch,
        "clean_loss": 1.0 / epoch,
        "tightness": 0.9 if epoch < 3 else math.nan,
        "relu_balance": math.nan,
        "standard_error": 0.1 / epoch,
        "verified_error": 0.9 / epoch,
        **{f"always_active/{name}": 0.1 * epoch for name in ("a", "b")},
        "always_inactive/a": 0.2,
        "always_inactive/b": 0.4,
        **{f"unstable/{name}": 0.3 for name in ("a", "b")},
        "growth/a": 10.0 / epoch,
        "growth/b": 1.0,
    }
    for epoch in (1, 2, 3)
]
RATE = {"value": 0.5, "interval_95": [0.4, 0.6]}
RESULTS = [{"eps": eps, "standard_error": RATE, "pgd_error": None, "verified_error": RATE} for eps in (0.2, 0.1)]


@pytest.fixture
def axes():
    return plots.new_figure().subplots()


@pytest.fixture(scope="module")
def found():
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bounded = fw.BoundedModule(convolutional(), x)
    return fw.inspect(bounded, x, 0.05)


def line(axes, label):
    (one,) = [one for one in axes.get_lines() if one.get_label() == label]
    return list(one.get_ydata())


def assert_readable(axes):
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    axes.figure.draw_without_rendering()
    page, drawn = axes.figure.bbox, axes.get_tightbbox()
    # Nothing that is written lies outside the page.
    assert page.x0 <= drawn.x0
    assert drawn.x1 <= page.x1
    assert page.y0 <= drawn.y0
    assert drawn.y1 <= page.y1


def test_bound_growth(axes, found):
    plots.draw_bound_growth(axes, {"one": found, "two": found}, formula=True)
    assert line(axes, "one") == [1.0, *(layer.growth for layer in found.relus)]
    expected = line(axes, "two, formula")
    assert expected[1] == pytest.approx(found.affine[0].expected_gain)
    assert expected[2] == pytest.approx(found.affine[0].expected_gain * found.affine[1].expected_gain)
    assert axes.get_yscale() == "log"
    assert_readable(axes)


def test_states_by_layer(axes, found):
    plots.draw_states_by_layer(axes, found)
    widths = [bar.get_width() for bar in axes.patches]
    layers = len(found.relus)
    for place, layer in enumerate(found.relus):
        fractions = [layer.always_active, layer.unstable, layer.always_inactive]
        assert widths[place::layers] == pytest.approx([100 * fraction for fraction in fractions])
    assert {bar.get_hatch() for bar in axes.patches} == {"", "....", "////"}  # Distinguishable without colours.
    assert_readable(axes)


def test_relu_states_over_training(axes):
    plots.draw_relu_states(axes, HISTORY)
    assert line(axes, "always active") == pytest.approx([10, 20, 30])
    assert line(axes, "always inactive") == pytest.approx([30, 30, 30])
    assert_readable(axes)
    alone = plots.new_figure().subplots()
    plots.draw_relu_states(alone, HISTORY, "b")
    assert line(alone, "always inactive") == pytest.approx([40, 40, 40])
    with pytest.raises(ValueError, match="no ReLU layer 'c'; it has a, b"):
        plots.draw_relu_states(axes, HISTORY, "c")


def test_growth_over_training(axes):
    plots.draw_growth_over_training(axes, HISTORY)
    assert line(axes, "a") == pytest.approx([10, 5, 10 / 3])
    assert_readable(axes)


@pytest.mark.parametrize("draw", [plots.draw_relu_states, plots.draw_growth_over_training])
@pytest.mark.parametrize("history", [[], [{"epoch": 1.0}]])
def test_histories_without_layers_are_refused(axes, draw, history):
    with pytest.raises(ValueError, match="no statistics of ReLUs"):
        draw(axes, history)


def test_training_curves(axes, tmp_path):
    plots.draw_losses(axes, HISTORY)
    assert line(axes, "objective") == [3.0, 1.5, 1.0]
    assert not [one for one in axes.get_lines() if one.get_label() == "ReLU balance"]  # It was never computed.
    errors = plots.new_figure().subplots()
    plots.draw_errors(errors, HISTORY)
    assert line(errors, "standard error") == pytest.approx([10, 5, 10 / 3])
    runs = plots.new_figure().subplots()
    plots.draw_errors_of_runs(runs, {"x": HISTORY, "y": HISTORY[:1]})
    assert line(runs, "x") == pytest.approx([90, 45, 30])
    for panel in (axes, errors, runs):
        assert_readable(panel)
    plots.save_training_curves(HISTORY, tmp_path / "curves.png", title="three epochs")
    plots.save_training_curves(HISTORY[:1], tmp_path / "one.png", title="one epoch")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_margins(axes):
    plots.draw_margins(axes, [-1.0, -0.5, 0.25, 0.5, 1.0, math.nan])
    counts = [bar.get_height() for bar in axes.patches]
    assert sum(counts) == 5
    # No bar lies on both sides of 0.
    assert all(bar.get_x() >= -1e-9 or bar.get_x() + bar.get_width() <= 1e-9 for bar in axes.patches)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["not certified (2)", "certified (3)"]
    assert_readable(axes)


def test_far_margins_are_gathered_at_the_edge(axes):
    plots.draw_margins(axes, [-1e6, -1.0, 1.0, 2.0])
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert min(bar.get_x() for bar in axes.patches) > -10
    assert "1 further left" in axes.get_xlabel()


def test_margins_that_are_not_known_are_refused(axes):
    with pytest.raises(ValueError, match="no verified margin"):
        plots.draw_margins(axes, [math.nan])


def test_errors_over_eps(axes):
    plots.draw_errors_over_eps(axes, RESULTS)
    assert len(axes.containers) == 2  # PGD was not run.
    assert list(axes.containers[0].lines[0].get_xdata()) == [0.1, 0.2]
    assert_readable(axes)
    with pytest.raises(ValueError, match="one number"):
        plots.draw_errors_over_eps(axes, [{**RESULTS[0], "eps": [0.1, 0.2]}])


def test_networks_without_relu_are_refused(axes):
    x = torch.rand(2, 4)
    found = fw.inspect(fw.BoundedModule(nn.Sequential(nn.Linear(4, 2)), x), x, 0.1)
    with pytest.raises(ValueError, match="no ReLU"):
        plots.draw_states_by_layer(axes, found)
    with pytest.raises(ValueError, match="no ReLU"):
        plots.draw_bound_growth(axes, {"linear": found})


def test_colours_differ_in_lightness_too():
    # Of two series with the same line style and marker there is none; of states, neither with one lightness.
    styles = {(str(one["linestyle"]), one["marker"]) for one in plots._SERIES}
    assert len(styles) == len(plots._SERIES)
    lightness = sorted(
        0.2126 * red + 0.7152 * green + 0.0722 * blue
        for red, green, blue in (to_rgb(series["color"]) for _, _, series, _ in plots._STATES)
    )
    assert len(set(lightness)) == 3


def test_without_matplotlib_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from lirpa_fastwarmup.inspection import plots\n"
        "plots.new_figure()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: plots need matplotlib: pip install 'lirpa_fastwarmup[plots]'" in done.stderr


def test_losses_are_those_that_the_run_has():
    rows = [{"epoch": epoch, "loss": 2.0, "clean_loss": 1.0, "adversarial_loss": 1.5} for epoch in (1, 2)]
    for more, expected in (({}, False), ({"robust_loss": 3.0}, True), ({"robust_loss": math.nan}, False)):
        axes = Figure().subplots()
        plots.draw_losses(axes, [{**row, **more} for row in rows])
        labels = axes.get_legend_handles_labels()[1]
        assert "adversarial cross-entropy" in labels
        assert ("robust cross-entropy" in labels) is expected
        assert not {"tightness", "ReLU balance"} & set(labels)
