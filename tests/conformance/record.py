"""The conformance table as recorded files, one per engine, and as docs/operators.md.

``python -m tests.conformance.record`` writes both for the installed engine.
"""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.methods import METHODS
from tests.conformance.cells import CELLS
from tests.conformance.oracles import verdicts

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "operators.md"
Table = dict[str, dict[str, str]]  # Of each cell, each method's verdict.

_HEAD = """# Operators

What `BoundedModule` accepts, as the conformance tests found it. Every row is a small network around one operator, and
every method was tested on it in double precision, at two radii (α-CROWN at the larger one):

- values of all bounded nodes, and of the margins, at random points, corners and the points that signed gradients of
  single neurons lead to lie within their bounds;
- IBP bounds are no tighter than an interval arithmetic that shares no code with the engine;
- CROWN's linear functions of the input, at every pre-activation and at the output, hold at random points and corners;
- around an affine operator alone, CROWN's bounds are the exact ones; with coefficients as patches they equal those with
  coefficients as matrices; α-CROWN's are no looser than CROWN's, and no margin is attained below them.

*sound* passed all of these. *refused* raises a `NotImplementedError` that names the operator. There is no third kind.
α-CROWN of the table is `alpha-CROWN` in `fw.verify`.

Beyond the table, pass `allow_untested=True` to `BoundedModule`. All methods then run as far as the engine does, and
certificates, summaries and reports name the operators whose bounds are untested.
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
