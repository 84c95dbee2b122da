"""``lirpa-fastwarmup compare``: a table over finished runs."""

import argparse
from pathlib import Path

from lirpa_fastwarmup.experiments.report.page import comparison
from lirpa_fastwarmup.experiments.report.records import read_summary
from lirpa_fastwarmup.inspection.statistics import as_markdown, as_text


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.set_defaults(command=_compare)
    command.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder of a run")
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")


def _compare(options: argparse.Namespace) -> int:
    table = comparison([(folder.resolve().name, read_summary(folder)) for folder in options.folders])
    print(as_markdown(table) if options.markdown else as_text(table))
    return 0
