"""``lirpa-fastwarmup report``: one self-contained page over one run or several."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.cli.options import add_trust, find_factories_here
from lirpa_fastwarmup.cli.subject import Subject, subject_of_run
from lirpa_fastwarmup.engine.bounds import ibp_margins, input_box
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.report.comparison import comparison
from lirpa_fastwarmup.experiments.report.page import render
from lirpa_fastwarmup.experiments.report.records import Image, RunRecord, Sample, check_origin, read_record
from lirpa_fastwarmup.experiments.training import settings_of_model, settings_of_run
from lirpa_fastwarmup.experiments.training.files import CHECKPOINT, MODEL
from lirpa_fastwarmup.storage import make_folder, read_csv, read_json, write_atomically
from lirpa_fastwarmup.verification import report as certificates
from lirpa_fastwarmup.version import __version__

logger = logging.getLogger(__name__)

REPORT = "report.html"
_SAMPLES = 1000  # Of the test set, bounded where no certificates are there.
_INSPECTED = 250
_SHOWN = 6
_SAME = 1e-12  # Radii that differ by less are one.


def add_to(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    command = commands.add_parser("report", help="a page over one run or several, with pictures inside")
    command.set_defaults(command=_report)
    command.add_argument("folders", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run, finished or not")
    command.add_argument("--out", type=Path, metavar="FILE", help=f"by default {REPORT} in the first RUN_DIR")
    add_trust(command)
    command.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the dataset's files, if it was moved")


def _report(options: argparse.Namespace) -> int:
    find_factories_here(None, trust=options.trust)
    out = options.out or options.folders[0] / REPORT
    records = [_record(folder, options.data_dir, options.trust) for folder in options.folders]
    _tell_apart(records, options.folders)
    finished = [folder for folder, one in zip(options.folders, records, strict=True) if one.summary is not None]
    page = render(records, comparison(finished) if len(finished) > 1 else [], __version__)
    make_folder(out.parent)
    write_atomically(out, page.encode())
    print(f"written to {out}")
    return 0


def _tell_apart(records: Sequence[RunRecord], folders: Sequence[Path]) -> None:
    """Call runs by the paths of their folders where these end in the same name."""
    names = [record.name for record in records]
    for record, folder in zip(records, folders, strict=True):
        if names.count(record.name) > 1:
            record.name = str(folder)


def _record(folder: Path, data_dir: Path | None, trust: bool) -> RunRecord:
    """All that is known of the run in ``folder``; what cannot be had is told in the record.

    Raises:
        FileNotFoundError: it holds no run.
        ValueError: a text file in it is damaged.
    """
    record = read_record(folder)
    if not record.settings:
        record.settings = _settings(folder)
    if not record.settings and not record.history:
        raise FileNotFoundError(f"{folder} holds no run: neither a summary, nor a history, nor a checkpoint")
    if (folder / certificates.SUMMARY).is_file():
        record.verification = read_json(folder / certificates.SUMMARY)
        check_origin(folder / certificates.SUMMARY, record.verification, folder)
    else:
        record.missing.append("There are no certificates: lirpa-fastwarmup verify RUN_DIR makes them.")
    if record.summary is None:
        record.missing.append(
            "The run has not come to its end; lirpa-fastwarmup train --resume --out RUN_DIR goes on with it."
        )
    path = folder / certificates.CERTIFICATES
    if path.is_file():
        record.eps, record.samples = _certified_samples(path, record.settings.get("eps", 0.0))
    if record.verification and record.summary:
        few, all_of_them = record.verification.get("samples"), record.summary.get("test_samples")
        if few != all_of_them:
            record.missing.append(f"Certificates are of {few} of the {all_of_them} test samples, the first ones.")
    try:
        _look_at_network(record, subject_of_run(folder, data_dir=data_dir, trust=trust))
    except (OSError, ValueError, ImportError, TypeError, NotImplementedError) as error:
        record.missing.append(f"The network could not be looked at: {error}.")
    return record


def _settings(folder: Path) -> dict[str, Any]:
    try:
        if (folder / MODEL).is_file():
            return settings_of_model(folder / MODEL).as_dict()
        if (folder / CHECKPOINT).is_file():
            return settings_of_run(folder).as_dict()
    except ValueError as error:
        logger.warning("%s", error)
    return {}


def _certified_samples(path: Path, eps: float) -> tuple[float, list[Sample]]:
    """The samples with a margin in ``certificates.csv``, at the run's radius, or else at the smallest there."""
    needed = ("index", "label", "prediction", "margin_lower_bound", "eps")
    rows = [row for row in read_csv(path, needed, "certificates") if row["margin_lower_bound"]]
    try:
        chosen = min((float(row["eps"]) for row in rows), key=lambda one: (abs(one - eps) > _SAME, one), default=eps)
        samples = [
            Sample(int(row["index"]), int(row["label"]), int(row["prediction"]), float(row["margin_lower_bound"]))
            for row in rows
            if float(row["eps"]) == chosen
        ]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as certificates: {error}") from error
    return chosen, sorted(samples, key=_margin)


def _margin(sample: Sample) -> float:
    return sample.margin


def _look_at_network(record: RunRecord, subject: Subject) -> None:
    """Inspect the network, and take the images of the samples that are hardest and easiest to certify."""
    eps = subject.eps
    assert eps is not None  # A run has one.
    example = torch.zeros(2, *subject.samples.images.shape[1:])
    bounded = fw.BoundedModule(subject.network, example, allow_untested=subject.allow_untested)
    record.inspection = fw.inspect(bounded, data.spread(subject.samples, _INSPECTED).inputs, eps)
    if not record.samples:
        record.eps, record.samples = eps, _bounded_samples(subject, bounded, eps)
    elif record.verification is not None and record.verification.get("dataset") != subject.dataset:
        record.missing.append(
            f"Certificates are of {record.verification.get('dataset')}, whose images the run does not have."
        )
        return
    few = len(record.samples) <= 2 * _SHOWN
    shown = record.samples if few else [*record.samples[:_SHOWN], *record.samples[-_SHOWN:]]
    record.images = [(sample, _image(subject.samples.images[sample.index])) for sample in shown]


@torch.no_grad()
def _bounded_samples(subject: Subject, bounded: fw.BoundedModule, eps: float) -> list[Sample]:
    """Test samples with the margins that IBP proves."""
    samples: list[Sample] = []
    indices = data.spread_indices(len(subject.samples), _SAMPLES)
    for x, y in data.Batches(subject.samples.take(indices), _INSPECTED):
        predictions = subject.network(x).argmax(1).tolist()
        margins = ibp_margins(bounded, input_box(x, eps), y, subject.classes).amin(1).tolist()
        for label, prediction, margin in zip(y.tolist(), predictions, margins, strict=True):
            samples.append(Sample(int(indices[len(samples)]), label, prediction, margin))
    return sorted(samples, key=_margin)


def _image(pixels: Tensor) -> Image:
    if len(pixels) not in (1, 3):  # Neither grey nor colours.
        pixels = pixels[:1]
    return pixels.permute(1, 2, 0).numpy()
