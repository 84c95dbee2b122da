"""Golden runs: record what fixed-seed runs compute, and compare it, bit for bit, after a change of the code.

    python benchmarks/golden.py record DIR
    python benchmarks/golden.py compare DIR

Trains three small networks on mnist5k (the recipe; CROWN-IBP with loss fusion; an average of weights, chosen on
held-out samples), certifies samples by all methods in both precisions, and searches for certified radii. Bits hold for
one machine, PyTorch and engine; a change that is meant to alter numbers records anew.

Compared are the columns that both sides have, timings aside, and the errors in the summaries. The exit status is 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = (
    "mnist5k --width 4 --hidden 32 --data-limit 1500 --batch-size 50 --epochs 5 --ramp-length 2 "
    "--no-compile --lr-milestones 15 18 --eps 0.02 --pgd-steps 5 --pgd-restarts 2"
)
RUNS = {
    "recipe": "",
    "crown-ibp": "--method crown-ibp --seed 1",
    "average": "--average-decay 0.9 --validation 100 --precise-bn --seed 2",
}
VERIFY = {
    "certificates": "--methods IBP CROWN-IBP CROWN alpha-CROWN --float64 --eps 0.01 0.02",
    "radii": "--radius --methods IBP CROWN-IBP --eps 0.02",
}
TABLES = ("history.csv", "certificates.csv", "radii.csv")
ERRORS = ("standard_error", "pgd_error", "verified_error")


def run(command: str) -> None:
    """Run one command of the package."""
    subprocess.run([sys.executable, "-m", "lirpa_fastwarmup", *command.split()], check=True, stdout=subprocess.DEVNULL)


def produce(folder: Path, limit: int) -> None:
    """Train and certify everything into ``folder``."""
    for name, options in RUNS.items():
        out = folder / name
        run(f"train {COMMON} {options} --out {out}")
        for kind, arguments in VERIFY.items():
            run(f"verify {out} {arguments} --limit {limit} --pgd-steps 10 --pgd-restarts 2 --out {out / kind}")


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    """What is compared, by file: rows of text."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in TABLES:
            text = path.read_text().replace(",attacked,", ",falsified,", 1)  # As earlier versions named the column.
            found[str(path.relative_to(folder))] = list(csv.DictReader(text.splitlines()))
        elif path.name == "summary.json":
            summary = json.loads(path.read_text())
            found[str(path.relative_to(folder))] = [{name: repr(summary[name]) for name in ERRORS}]
    return found


def differences(expected: Path, found: Path) -> list[str]:
    """A line for each value that is another."""
    texts = []
    old, new = tables(expected), tables(found)
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or len(old[name]) != len(new[name]):
            texts.append(f"{name}: missing, or of another length")
            continue
        for number, (before, after) in enumerate(zip(old[name], new[name], strict=True)):
            texts += [
                f"{name}, row {number}, {column}: {before[column]} -> {after[column]}"
                for column in before.keys() & after.keys()
                if before[column] != after[column]
            ]
    return texts


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=40, help="samples to certify")
    options = parser.parse_args()
    if options.action == "record":
        produce(options.folder, options.limit)
        return 0
    with tempfile.TemporaryDirectory() as there:
        produce(Path(there), options.limit)
        texts = differences(options.folder, Path(there))
    print("\n".join(texts[:40]) or "equal to the bit", f"({len(texts)} differences)")
    return bool(texts)


if __name__ == "__main__":
    sys.exit(main())
