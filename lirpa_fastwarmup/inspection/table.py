"""Tables of text, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def as_text(table: Sequence[Sequence[str]]) -> str:
    """The table in columns of equal width."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """The table in GitHub's Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])
