"""``lirpa-fastwarmup report``: one self-contained page over one run or several."""

import argparse
from pathlib import Path

from lirpa_fastwarmup.cli.options import add_trust, find_factories_here
from lirpa_fastwarmup.experiments.report.page import render
from lirpa_fastwarmup.experiments.report.records import read_record
from lirpa_fastwarmup.storage import make_folder, write_atomically


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.set_defaults(command=_report)
    command.add_argument("folders", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run, finished or not")
    command.add_argument("--out", type=Path, metavar="FILE", help="by default report.html in the first RUN_DIR")
    add_trust(command)
    command.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the dataset's files, if it has moved")


def _report(options: argparse.Namespace) -> int:
    find_factories_here(None, trust=options.trust)
    out = options.out or options.folders[0] / "report.html"
    records = [read_record(folder, options.data_dir, trust=options.trust) for folder in options.folders]
    names = [record.name for record in records]
    for record, folder in zip(records, options.folders, strict=True):
        if names.count(record.name) > 1:
            record.name = str(folder)
    with make_folder(out.parent):
        write_atomically(out, render(records).encode())
    for text in (text for record in records for text in record.missing):
        print(f"not in the report: {text}")
    print(f"written to {out}")
    return 0
