"""The paper's results, from training to certificates: run by run, each taken up where it was left.

    python benchmarks/results.py cifar10 --data-dir DIR
    python benchmarks/results.py cifar10 --data-dir DIR --data-limit 2000 --epochs 3 --width 8 --pgd-steps 2  # A trial.

A run is trained, verified and looked at layer by layer, by the commands that anybody would give; what is finished is
not done again. Weights stay in ``--work``; text and pictures are copied to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KEPT = ("summary.json", "history.csv", "curves.png", "verification.json", "layers.csv")
LOOKED_AT = 1000  # Test samples.
VERIFICATION = ("--methods", "IBP", "CROWN-IBP", "--pgd-restarts", "5")


@dataclass(frozen=True)
class Planned:
    """A run: its name, its preset, and the options that change it."""

    name: str
    preset: str
    options: tuple[str, ...] = ()


RUNS = {
    "cifar10": [
        Planned("cifar10-fast-0", "cifar10"),
        Planned("cifar10-ibp-0", "cifar10", ("--method", "ibp")),
        Planned("cifar10-fast-1", "cifar10", ("--seed", "1")),
        Planned("cifar10-fast-2", "cifar10", ("--seed", "2")),
        Planned("cifar10-crown-ibp-0", "cifar10", ("--method", "crown-ibp")),
    ],
    "mnist": [Planned("mnist-fast-0", "mnist")],
}


def command(*arguments: object) -> None:
    """``lirpa-fastwarmup`` with these arguments, shown before it runs.

    Raises:
        CalledProcessError: it failed.
    """
    words = [str(argument) for argument in arguments]
    print("lirpa-fastwarmup", *words, flush=True)
    subprocess.run([sys.executable, "-m", "lirpa_fastwarmup", *words], check=True)


def changes_of(options: argparse.Namespace) -> list[str]:
    """The options that make every run a smaller one."""
    changes = ["--data-dir", str(options.data_dir)]
    for name in ("data_limit", "width", "pgd_steps"):
        if getattr(options, name) is not None:
            changes += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.epochs is not None:  # A ramp that leaves an epoch before and one after it.
        ramp = max(1, options.epochs - 2)
        changes += ["--epochs", str(options.epochs), "--ramp-start", "2", "--ramp-length", str(ramp)]
    return [*changes, "--no-compile" if options.eager else "--compile"]


def carry_out(planned: Planned, options: argparse.Namespace) -> None:
    """Train, verify and measure one run, as far as that is not done yet."""
    run = options.work / planned.name
    device = ["--device", options.device] if options.device else []
    if not (run / "summary.json").exists():
        if (run / "checkpoint.pt").exists():
            command("train", "--resume", "--out", run, *device)
        else:
            command("train", planned.preset, *planned.options, *changes_of(options), "--out", run, *device)
    if not (run / "verification.json").exists():
        limit = ["--limit", options.verify_limit] if options.verify_limit else []
        command("verify", run, *VERIFICATION, "--pgd-steps", options.pgd_steps or 50, *limit, *device)
    if not (run / "layers.csv").exists():
        command("inspect", run, "--samples", LOOKED_AT, "--csv", run / "layers.csv", *device)
    kept = options.out / planned.name
    kept.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (run / name).exists():
            shutil.copy(run / name, kept / name)
    summary = json.loads((kept / "summary.json").read_text())
    summary["settings"]["data_dir"] = None  # Where the data lay is nobody's business.
    (kept / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def main() -> None:
    """Carry out the runs and compare them."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the dataset's files")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="some of the runs, by name")
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="folder of the runs, with weights")
    parser.add_argument("--out", type=Path, default=here / "results", help="folder of what is kept")
    parser.add_argument("--device")
    parser.add_argument("--eager", action="store_true", help="do not compile steps")
    parser.add_argument("--data-limit", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--pgd-steps", type=int, help="of the attacks after training and in verification")
    parser.add_argument("--verify-limit", type=int, help="verify the first so many test samples only")
    options = parser.parse_args()
    runs = [run for run in RUNS[options.what] if not options.only or run.name in options.only]
    unknown = set(options.only or ()) - {run.name for run in runs}
    if unknown:
        parser.error(
            f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in RUNS[options.what])}"
        )
    for run in runs:
        carry_out(run, options)
    command("compare", "--markdown", *(options.work / run.name for run in runs))


if __name__ == "__main__":
    main()
