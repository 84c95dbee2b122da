"""``lirpa-fastwarmup compare``: a table over finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lirpa_fastwarmup.experiments.report.comparison import comparison
from lirpa_fastwarmup.inspection.table import as_markdown, as_text


def add_to(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    command = commands.add_parser("compare", help="a table over finished runs, mean ± deviation over their seeds")
    command.set_defaults(command=_compare)
    command.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder of a run")
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")


def _compare(options: argparse.Namespace) -> int:
    table = comparison(options.folders)
    print(as_markdown(table) if options.markdown else as_text(table))
    return 0
