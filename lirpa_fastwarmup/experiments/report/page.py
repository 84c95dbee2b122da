"""One self-contained page over one run or several (needs matplotlib and jinja2, of the extra ``plots``)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lirpa_fastwarmup.experiments.report.records import Image, RunRecord, Sample
from lirpa_fastwarmup.inspection import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Picture:
    """A picture inside the page: its source as a data URL, and what it shows."""

    source: str
    caption: str


def render(records: Sequence[RunRecord], comparison: Sequence[Sequence[str]], version: str) -> str:
    """The page, as HTML.

    Args:
        records: the runs.
        comparison: a table over the finished ones, its heading first; empty for none.
        version: of the package.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'lirpa_fastwarmup[plots]'") from error
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True)
    return environment.get_template(_TEMPLATE).render(
        runs=[_run(record) for record in records],
        comparison=comparison,
        curves=_comparing_picture(records),
        version=version,
    )


def _run(record: RunRecord) -> dict[str, Any]:
    found = record.inspection
    return {
        "name": record.name,
        "state": _state(record),
        "figures": _figures(record),
        "missing": record.missing,
        "training": _training_pictures(record),
        "network": [] if found is None or not found.relus else [_states_picture(record)],
        "inspection": found,
        "tables": [] if found is None else found.tables(),
        "certificates": _certificate_rows(record.verification),
        "certificate_pictures": _certificate_pictures(record),
        "samples": [_samples_picture(record.images)] if record.images else [],
        "settings": {name: value for name, value in record.settings.items() if value is not None},
    }


def _state(record: RunRecord) -> str:
    planned = record.settings.get("epochs", "an unknown number")
    if record.summary is not None:
        return f"finished after {planned} epochs"
    return f"not finished: {len(record.history)} of {planned} epochs"


def _figures(record: RunRecord) -> list[tuple[str, str]]:
    """The run's errors, or those of its last finished epoch."""
    summary = record.summary
    if summary is None:
        last = record.history[-1] if record.history else {}
        names = {"standard error": "standard_error", "verified error (IBP)": "verified_error"}
        return [(f"{head}, epoch {last['epoch']:.0f}", f"{last[name]:.2%}") for head, name in names.items() if last]
    rows = [
        ("dataset", str(summary["dataset"])),
        ("ε", f"{summary['eps']:.6g}"),
        ("standard error", _percent(summary["standard_error"])),
        ("PGD error", _percent(summary["pgd_error"])),
        ("verified error (IBP)", _percent(summary["verified_error"])),
        ("seconds per epoch", f"{summary['train_seconds_per_epoch']:.1f}"),
    ]
    if summary.get("untested"):
        rows.append(("rests on untested bounds of", "; ".join(summary["untested"])))
    rows += [(name, str(summary[name])) for name in ("seed", "device", "engine", "torch", "git") if name in summary]
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _certificate_rows(verification: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    if verification is None or not verification.get("results"):
        return []
    rows: list[tuple[str, ...]] = [("ε", "samples", "standard", "PGD", "verified", "decided by")]
    for one in verification["results"]:
        stages = one["stages"].items()
        decided = ", ".join(f"{name} {stage.get('proved', stage.get('attacked')):,}" for name, stage in stages)
        shares = (one[name] for name in ("standard_error", "pgd_error", "verified_error"))
        rows.append((_radius(one["eps"]), _samples(verification), *(_interval(share) for share in shares), decided))
    return rows


def _samples(verification: Mapping[str, Any]) -> str:
    return f"{verification['samples']:,}" if "samples" in verification else "–"


def _radius(eps: Any) -> str:
    return f"{eps:.6g}" if isinstance(eps, int | float) else "one for each channel or element"


def _interval(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "–"
    low, high = share["interval_95"]
    return f"{share['value']:.2%} [{low:.2%}, {high:.2%}]"


# Pictures.


def _picture(figure: Figure, caption: str) -> Picture:
    # Vectors stay sharp at any size; letters as outlines need no font on the reader's machine.
    text = io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(text.getvalue()).decode()}", caption)


def _panel(caption: str, draw: Callable[[Axes], None], *, over_epochs: bool = False) -> Picture:
    figure = plots.new_figure(figsize=(5.2, 3.4))
    axes = figure.subplots()
    draw(axes)
    if over_epochs:
        plots.count_epochs(axes)
    return _picture(figure, caption)


def _comparing_picture(records: Sequence[RunRecord]) -> list[Picture]:
    histories = {record.name: record.history for record in records if record.history}
    if len(histories) < 2:
        return []
    return [
        _panel(f"{head} error on the test set", _errors_drawn(histories, column), over_epochs=True)
        for head, column in (("Verified", "verified_error"), ("Standard", "standard_error"))
    ]


def _errors_drawn(histories: Mapping[str, plots.History], column: str) -> Callable[[Axes], None]:
    return lambda axes: plots.draw_errors_of_runs(axes, histories, column)


def _training_pictures(record: RunRecord) -> list[Picture]:
    history = record.history
    if not history:
        return []
    drawn: list[tuple[str, Callable[[Axes, plots.History], None]]] = [
        ("Errors on the test set, the verified one at the target ε", plots.draw_errors),
        ("Losses and regularisers, means over the training set", plots.draw_losses),
        ("The radius at the end of each epoch", plots.draw_radius),
    ]
    if any(name.startswith("always_active/") for name in history[-1]):
        drawn += [
            ("States of ReLUs at the target ε, mean over layers", plots.draw_relu_states),
            ("Width of each layer's bounds at the target ε, over that of the input", plots.draw_growth_over_training),
        ]
    return [_panel(caption, lambda axes, draw=draw: draw(axes, history), over_epochs=True) for caption, draw in drawn]  # type: ignore[misc]


def _states_picture(record: RunRecord) -> Picture:
    found = record.inspection
    assert found is not None
    return _panel("States of the ReLUs of each layer", lambda axes: plots.draw_states_by_layer(axes, found))


def _certificate_pictures(record: RunRecord) -> list[Picture]:
    pictures = []
    results = record.verification.get("results", []) if record.verification else []
    if len([one for one in results if isinstance(one["eps"], int | float)]) > 1:
        pictures.append(_panel("Errors over ε, with 95 % intervals", lambda a: plots.draw_errors_over_eps(a, results)))
    margins = [sample.margin for sample in record.samples]
    if any(map(math.isfinite, margins)):
        pictures.append(
            _panel(f"Verified margins at ε = {record.eps:.5g}", lambda axes: plots.draw_margins(axes, margins))
        )
    return pictures


def _samples_picture(images: Sequence[tuple[Sample, Image]]) -> Picture:
    columns = (len(images) + 1) // 2
    figure = plots.new_figure(figsize=(1.1 * columns, 3.1))
    for panel in figure.subplots(2, columns, squeeze=False).flat:
        panel.axis("off")
    for panel, (sample, image) in zip(figure.axes, images, strict=False):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set_title(
            f"#{sample.index}: {sample.label} → {sample.prediction}\nmargin {sample.margin:.3g}", fontsize="small"
        )
    return _picture(figure, "Sample: its class → the predicted one. The smallest verified margins, then the largest")
