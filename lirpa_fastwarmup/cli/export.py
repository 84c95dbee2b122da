"""``lirpa-fastwarmup export``: a trained network and its samples for other verifiers."""

import argparse
from pathlib import Path

import torch

from lirpa_fastwarmup.cli.options import number
from lirpa_fastwarmup.cli.subject import add_arguments, check_named, subject_of
from lirpa_fastwarmup.verification import export


def _indices(text: str) -> range:
    first, dash, last = text.partition("-")
    try:
        return range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an index nor a range such as 0-99") from None


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.set_defaults(command=_export)
    add_arguments(command)
    what = command.add_argument_group("properties")
    what.add_argument("--eps", type=number, help="radius in units of the inputs; by default the run's")
    what.add_argument("--samples", type=_indices, nargs="+", metavar="I", default=[range(10)], help="0 5 10-19 …")
    what.add_argument("--timeout", type=int, default=120, help="seconds for each property (default: 120)")
    what.add_argument("--out", type=Path, metavar="DIR", help="folder for the files, by default RUN_DIR/export")


def _export(options: argparse.Namespace) -> int:
    check_named(options)
    subject = subject_of(options)
    eps = subject.eps if options.eps is None else options.eps
    if eps is None:
        raise ValueError("name the radius of the properties with --eps")
    dataset, count = subject.dataset, len(subject.dataset.test)
    for given in options.samples:  # Before a long range is listed.
        if not given or not 0 <= given[0] <= given[-1] < count:
            shown = f"{given.start}-{given.stop - 1}" if len(given) != 1 else given.start
            raise ValueError(f"there is no sample {shown}: {dataset.name} has {count} test samples, from index 0")
    indices = list(dict.fromkeys(index for given in options.samples for index in given))
    chosen = dataset.test.take(torch.tensor(indices))
    out = options.out or options.run / "export"
    given = {"indices": indices, "input_range": dataset.input_range, "timeout": options.timeout}
    note = export(subject.network, chosen.inputs, chosen.labels, eps, out, **given)
    print(f"{len(indices)} properties at eps {eps} written to {out}")
    if note:
        print(note)
    return 0
