"""The conformance table as recorded files, one per engine, and as docs/operators.md.

``python -m tests.conformance.record`` writes both for the installed engine.
"""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from lirpa_fastwarmup.engine.bounds import METHODS
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from tests.conformance.cells import CELLS
from tests.conformance.oracles import verdicts

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "operators.md"
Table = dict[str, dict[str, str]]  # The verdict of each method, by cell.

_HEAD = """# Operators

`BoundedModule` accepts the operators and attributes that pass the conformance tests. Each row is a small network around
one operator. Every method is tested on it in double precision at two radii (alpha-CROWN at the larger one):

- The values of all bounded nodes, and the margins, lie within their bounds at random points, at corners, and at points
  that follow the signed gradients of single neurons.
- IBP bounds are no tighter than an independent interval arithmetic.
- CROWN's linear functions of the input, at every pre-activation and at the output, hold at random points and corners.
- Around a single affine operator, CROWN's bounds are exact, and coefficients in patch and matrix form give the same
  bounds.
- alpha-CROWN's bounds are no looser than CROWN's, and no attained margin is below them.

*sound* means that all methods pass. *refused* means that `BoundedModule` or the method raises a `NotImplementedError`
that names the operator. If only some methods pass, the cell lists them.

Pass `allow_untested=True` to `BoundedModule` to accept other operators. Methods then run as far as auto_LiRPA supports
them, and certificates, summaries and reports name the operators whose bounds are untested.
"""


def recorded(engine: str) -> Table:
    """The recorded table of an engine."""
    table: Table = json.loads((FOLDER / f"auto_LiRPA-{engine}.json").read_text())
    return table


def engines() -> list[str]:
    """The engines with a recorded table."""
    return sorted(path.stem.removeprefix("auto_LiRPA-") for path in FOLDER.glob("auto_LiRPA-*.json"))


def page() -> str:
    """docs/operators.md, from the recorded tables."""
    names = engines()
    tables = [recorded(engine) for engine in names]
    lines = [_HEAD]
    for operator in dict.fromkeys(cell.operator for cell in CELLS.values()):
        lines += [f"## {operator}", "", "| attributes | " + " | ".join(f"auto_LiRPA {name}" for name in names) + " |"]
        lines.append("| --- |" + " --- |" * len(names))
        for cell in (cell for cell in CELLS.values() if cell.operator == operator):
            found = " | ".join(_summary(table[cell.name]) for table in tables)
            lines.append(
                f"| `{cell.attributes or 'none'}` | {found} |".replace("|x|", "\\|x\\|").replace("|b|", "\\|b\\|")
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _summary(row: dict[str, str]) -> str:
    sound = [method for method in METHODS if row[method] == "sound"]
    if len(sound) == len(METHODS):
        return "sound"
    return f"sound: {', '.join(sound)}; refused: the others" if sound else "refused"


def dump(table: Table) -> str:
    """A table as JSON, one cell a line."""
    rows = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    found = {name: verdicts(CELLS[name]) for name in tqdm(CELLS)}
    (FOLDER / f"auto_LiRPA-{ENGINE_VERSION}.json").write_text(dump(found))
    PAGE.write_text(page())
