"""A self-contained page over runs (the extra ``plots`` installs matplotlib and jinja2), and a table to compare them."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lirpa_fastwarmup.experiments.report.records import ERRORS, Image, RunRecord, Sample
from lirpa_fastwarmup.inspection import plots
from lirpa_fastwarmup.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Picture = dict[str, Any]  # Its source, a data URL, its caption, and whether it is two columns wide.
_MODEL = {"model": "", "width": "width ", "hidden": "hidden "}
_LOSS = {"loss": "", "alpha": "α = ", "ratio": "ratio "}
# Settings that may differ within a row of the comparison, and those that always have a column.
_WITHIN_ROW = ("seed", "data_dir", "compile", "compiled_phases")
_ALWAYS = ("method", "eps")


def render(records: Sequence[RunRecord]) -> str:
    """The page over ``records`` as HTML, with a comparison table if several runs are finished."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'lirpa_fastwarmup[plots]'") from error
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True)
    finished = [(record.name, record.summary) for record in records if record.summary is not None]
    histories = {record.name: record.history for record in records if record.history}
    errors = ("verified_error", "standard_error") if len(histories) > 1 else ()
    heads = [(f"{name.replace('_', ' ').capitalize()} on the test set", name) for name in errors]
    curves = [_panel(head, plots.draw_errors_of_runs, histories, name, epochs=True) for head, name in heads]
    table = comparison(finished) if len(finished) > 1 else []
    template = environment.get_template("report.html.jinja")
    return template.render(runs=list(map(_run, records)), comparison=table, curves=curves, version=__version__)


def _run(record: RunRecord) -> dict[str, Any]:
    return {
        **vars(record),
        "headline": _headline(record),
        "facts": _facts(record),
        "errors": _error_table(record),
        "training": _training_pictures(record),
        "certificates": _certificate_pictures(record),
        "settings": {name: setting_text(value) for name, value in record.settings.items() if value is not None},
    }


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    settings, summary = record.settings, record.summary or {}
    trained = "finished after" if record.summary else f"not finished: {len(record.history)} of"
    facts = {
        "method": settings.get("method"),
        "model": ", ".join(f"{text}{settings[name]}" for name, text in _MODEL.items() if settings.get(name)),
        "loss": ", ".join(f"{text}{settings[name]}" for name, text in _LOSS.items() if settings.get(name) is not None),
        "dataset": summary.get("dataset", settings.get("dataset")),
        "ε": _radius(settings.get("eps")),
        "epochs": f"{trained} {settings.get('epochs', 'an unknown number of')} epochs",
        "test samples": _text(summary.get("test_samples"), ","),
        "seconds per epoch": _text(summary.get("train_seconds_per_epoch"), ".1f"),
        "operators with untested bounds": "; ".join(summary.get("untested", ())),
        **{name: summary.get(name) for name in ("seed", "device", "engine", "torch")},
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "", "–")]


def _headline(record: RunRecord) -> str:
    """The certified fraction of the test samples in a sentence: of certificates, the summary, or the last epoch."""
    eps, verification = record.settings.get("eps"), record.verification or {}
    results = [one for one in verification.get("results", ()) if isinstance(one["eps"], int | float)]
    result = next((one for one in results if one["eps"] == eps), results[0] if results else None)
    source = record.summary or (record.history or [{}])[-1]
    error, count, methods = source.get("verified_error"), source.get("test_samples"), ["IBP"]
    when = "" if record.summary else f" after epoch {len(record.history)}"
    if result is not None:
        error, count, eps, when = result["verified_error"]["value"], verification.get("samples"), result["eps"], ""
        methods = verification.get("methods", [])
    if error is None or math.isnan(error) or eps is None:
        return ""
    images = "the test samples" if count is None else f"{count:,} test samples"
    certified, by = f"{100 * (1 - error):.1f} % of {images} are certified", " and ".join(methods)
    return f"{certified} at ε = {_radius(eps)} by {by}{when}."


def _error_table(record: RunRecord) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    head = ("computed", "bounds", "PGD", "test samples", "ε", "standard error", "PGD error", "verified error")
    source = "after training" if record.summary else f"after epoch {len(record.history)}"
    if summary := record.summary or (record.history or [{}])[-1]:
        about = _attack(record.settings if record.summary else {}), _text(summary.get("test_samples"), ",")
        errors = (_text(summary.get(name), ".2%") for name in ERRORS)
        rows.append((source, "IBP", *about, _radius(record.settings.get("eps")), *errors))
    verification = record.verification or {}
    for one in verification.get("results", ()):
        stages = one["stages"].items()
        decided = ", ".join(f"{name} {done['proved' if 'proved' in done else 'falsified']:,}" for name, done in stages)
        source = f"by verify on {verification.get('dataset', 'test data')} (decided: {decided})"
        methods, samples = ", ".join(verification.get("methods", ())), _text(verification.get("samples"), ",")
        rates = ((rate["value"], *rate["interval_95"]) if rate else () for rate in (one[name] for name in ERRORS))
        errors = ("{:.2%} [{:.2%}, {:.2%}]".format(*rate) if rate else "–" for rate in rates)
        rows.append((source, methods, _attack(verification), samples, _radius(one["eps"]), *errors))
    return [head, *rows] if rows else []


def _attack(content: Mapping[str, Any]) -> str:
    steps, restarts = content.get("pgd_steps"), content.get("pgd_restarts")
    return f"{steps} steps × {restarts}" if steps and restarts else "–"


def _text(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def _radius(eps: Any) -> str:
    return setting_text(eps) if isinstance(eps, int | float | None) else "one per channel or element"


def comparison(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """The table over finished runs (name, ``summary.json``), its heading first; errors are in percent."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, summary in runs:
        same = {setting: value for setting, value in summary["settings"].items() if setting not in _WITHIN_ROW}
        key = json.dumps([summary["dataset"], same], sort_keys=True)
        groups.setdefault(key, []).append((name, summary))
    # The settings that differ between rows and have no column of their own.
    settings, elsewhere = [group[0][1]["settings"] for group in groups.values()], {*_WITHIN_ROW, *_ALWAYS, "dataset"}
    names = dict.fromkeys(name for one in settings for name in one if name not in elsewhere)
    columns = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
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


def _picture(figure: Figure, caption: str, *, wide: bool = False) -> _Picture:
    text = io.BytesIO()  # SVG stays sharp at any size.
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(text.getvalue()).decode()}"
    return {"source": source, "caption": caption, "wide": wide}


def _panel(caption: str, draw: Callable[..., None], *arguments: Any, epochs: bool = False) -> _Picture:
    figure = plots.new_figure(figsize=(5.2, 3.4))
    axes = figure.subplots()
    draw(axes, *arguments)
    if epochs:
        plots.count_epochs(axes)
    return _picture(figure, caption)


def _training_pictures(record: RunRecord) -> list[_Picture]:
    history, found = record.history, record.inspection
    over_epochs: dict[str, Callable[..., None]] = {
        "Errors on the test set, the verified one at the target ε": plots.draw_errors,
        "Losses and regularisers, means over the training set": plots.draw_losses,
        "The radius at the end of each epoch": plots.draw_radius,
    }
    if history and any(name.startswith("always_active/") for name in history[-1]):
        over_epochs["States of ReLUs at the target ε, mean over layers"] = plots.draw_relu_states
        over_epochs["Width of bounds at the target ε over that of the input"] = plots.draw_growth_over_training
    pictures = [_panel(caption, draw, history, epochs=True) for caption, draw in over_epochs.items() if history]
    if found is not None and found.relus:
        pictures.append(_panel("States of ReLUs of the trained network, by layer", plots.draw_states_by_layer, found))
    return pictures


def _certificate_pictures(record: RunRecord) -> list[_Picture]:
    pictures = []
    results = (record.verification or {}).get("results", [])
    if len([one for one in results if isinstance(one["eps"], int | float)]) > 1:
        pictures.append(_panel("Errors over ε, with 95 % intervals", plots.draw_errors_over_eps, results))
    margins = [sample.margin for sample in record.samples]
    if any(map(math.isfinite, margins)):
        source = "of certificates" if record.verification else f"by IBP, of {len(margins):,} test samples"
        pictures.append(_panel(f"Verified margins at ε = {_radius(record.eps)}, {source}", plots.draw_margins, margins))
    return [*pictures, _samples_picture(record.images)] if record.images else pictures


def _samples_picture(images: Sequence[tuple[Sample, Image]]) -> _Picture:
    columns = (len(images) + 1) // 2
    figure = plots.new_figure(figsize=(1.2 * columns, 3.1))
    for panel in figure.subplots(2, columns, squeeze=False).flat:
        panel.axis("off")
    for panel, (sample, image) in zip(figure.axes, images, strict=False):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        title = f"#{sample.index}: {sample.label} → {sample.prediction}\nmargin {sample.margin:.3g}"
        panel.set_title(title, fontsize="small")
    caption = "Class → predicted class of the samples with the smallest verified margins, then with the largest"
    return _picture(figure, caption, wide=True)
