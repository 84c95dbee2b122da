"""``lirpa-fastwarmup verify``: certificates for a trained network's samples."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.boxes import check_radius
from lirpa_fastwarmup.cli.options import device_named, number
from lirpa_fastwarmup.cli.subject import Subject, add_arguments, check_named, subject_of
from lirpa_fastwarmup.distributed import World, all_gather, local_device, process_group, rank_zero_first
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.experiments.data import Batches
from lirpa_fastwarmup.storage import file_sum, locked, make_folder, weights_sum, write_csv, write_json
from lirpa_fastwarmup.verification import (
    METHODS,
    Journal,
    Radius,
    UnsoundBoundError,
    Verification,
    certified_radii,
    report,
    verify,
)
from lirpa_fastwarmup.verification.journal import journals_beside
from lirpa_fastwarmup.version import __version__

_TOLERANCE = 1e-4


def add_to(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    command = commands.add_parser(
        "verify",
        help="certify and attack the test samples of a trained network",
        description="Certify and attack the test samples of a trained network. Interrupted, the same command resumes.",
    )
    command.set_defaults(command=_verify)
    add_arguments(command)
    what = command.add_argument_group("verification")
    what.add_argument("--eps", type=number, nargs="+", help="radii in pixel units; by default that of the run")
    what.add_argument("--radius", action="store_true", help="the largest certified radius of each sample instead")
    what.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["IBP", "CROWN-IBP"],
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    what.add_argument("--pgd-steps", type=int, default=50)
    what.add_argument("--restarts", type=int, default=5, help="random starts of the attack; 0 for none")
    what.add_argument("--float64", action="store_true", help="repeat the verdicts in double precision")
    what.add_argument("--batch-size", type=int, default=100, help="samples at once; halved where memory is short")
    what.add_argument("--seed", type=int, default=0, help="of the attack")
    what.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")
    what.add_argument("--out", type=Path, metavar="DIR", help="folder for the results, by default RUN_DIR")
    what.add_argument("--overwrite", action="store_true", help="replace an earlier verification in it")


def _verify(options: argparse.Namespace) -> int:
    check_named(options)
    device = local_device(device_named(options.device))
    with process_group(device) as ranks:
        out = _folder(options) if ranks.is_rank_zero else options.out or options.run
        with locked(out) if ranks.is_rank_zero else nullcontext():
            with rank_zero_first():  # Which downloads and unpacks, if need be.
                subject = subject_of(options)
            radii = options.eps or ([] if options.radius else [subject.eps])
            if None in radii:
                raise ValueError("name the radius to certify, --eps 8/255, or ask for the largest one with --radius")
            for eps in radii:  # Before hours go into the first of them.
                check_radius(eps, (0.0, 1.0))
            return _carry_out(options, subject, radii, out, device, ranks)


def _carry_out(
    options: argparse.Namespace, subject: Subject, radii: Sequence[float], out: Path, device: torch.device, ranks: World
) -> int:
    example = torch.zeros(2, *subject.samples.images.shape[1:], device=device)
    bounded = fw.BoundedModule(subject.network.to(device), example, allow_untested=subject.allow_untested)
    journal = Journal(out / (report.JOURNAL if ranks.is_rank_zero else f"{report.JOURNAL}.{ranks.rank}"))
    started = time.perf_counter()
    task = _Task(options, subject, bounded, journal, ranks)
    try:
        verifications = [task.verify(eps) for eps in radii]
        certified = task.radii() if options.radius else None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished batches are kept in {journal.path}; the same command resumes") from None
    finally:
        task.close()
    used = set().union(*all_gather(journal.used))
    if ranks.is_rank_zero:
        _write(out, options, subject, verifications, certified, bounded, time.perf_counter() - started, ranks)
        for path in journals_beside(journal.path):
            Journal(path).forget(used)
    if task.contradictions:
        raise UnsoundBoundError(task.contradictions)
    return 0


def _folder(options: argparse.Namespace) -> Path:
    """Where the results go; an earlier verification there is not touched unless that was asked for."""
    out = options.out or options.run
    if out is None:
        raise ValueError("name the folder for the results with --out DIR")
    if options.run is not None and not options.run.is_dir():
        raise FileNotFoundError(f"there is no folder {options.run}: name the folder of a training run")
    there = [name for name in report.WRITTEN if (out / name).exists()]
    if there and not options.overwrite:
        raise FileExistsError(
            f"{out} holds a verification already ({', '.join(there)}), and nothing of it was touched. Name another "
            "folder with --out, or replace it with --overwrite"
        )
    if options.run is None or options.out is not None:
        make_folder(out)
    return Path(out)


class _Task:
    """One network's verification at several radii, with a bar for each; unsound bounds stop none of them.

    Several processes share the batches, and all of them get all results; the first one prints.
    """

    def __init__(
        self, options: argparse.Namespace, subject: Subject, bounded: fw.BoundedModule, journal: Journal, ranks: World
    ) -> None:
        self._options = options
        self._samples = Batches(subject.samples, options.batch_size)
        self._bounded = bounded.eval()
        self._journal = journal
        self._ranks = ranks
        self._bar: Any = None
        self.contradictions: list[str] = []

    def _given(self, title: str) -> dict[str, Any]:
        shown = None if self._ranks.is_rank_zero else True
        samples = -(-len(self._samples.split) // self._ranks.size)
        self._bar = tqdm(total=samples, desc=title, unit="sample", leave=False, disable=shown)
        return {
            "methods": self._options.methods,
            "pgd_steps": self._options.pgd_steps,
            "restarts": self._options.restarts,
            "batch_size": self._options.batch_size,  # How methods begin, which split batches where they must.
            "seed": self._options.seed,
            "journal": self._journal,
            "progress": self._advance,
            "over_ranks": True,
        }

    def _advance(self, done: Sequence[object]) -> None:
        self._bar.update(len(done))

    def close(self) -> None:
        """Leave the line of the bar."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        self.close()
        if self._ranks.is_rank_zero:
            print(text, flush=True)

    def verify(self, eps: float) -> Verification:
        """The verification at ``eps``."""
        try:
            found = verify(
                self._bounded, self._samples, eps, float64=self._options.float64, **self._given(f"eps {eps:.5g}")
            )
        except UnsoundBoundError as error:
            found = cast("Verification", error.result)
            self.contradictions += [f"at eps {eps:g} {text}" for text in error.contradictions]
        self._print(report.as_text(found))
        return found

    def radii(self) -> list[Radius]:
        """The largest radii."""
        try:
            found = certified_radii(self._bounded, self._samples, tolerance=_TOLERANCE, **self._given("radius"))
        except UnsoundBoundError as error:
            found = cast("list[Radius]", error.result)
            self.contradictions += error.contradictions
        self._print(report.radii_as_text(report.radius_entry(found, _TOLERANCE), len(found)))
        return found


def _write(
    out: Path,
    options: argparse.Namespace,
    subject: Subject,
    verifications: Sequence[Verification],
    radii: Sequence[Radius] | None,
    bounded: fw.BoundedModule,
    seconds: float,
    ranks: World,
) -> None:
    device, weights = bounded.example[0].device, weights_sum(bounded.wrapped.state_dict())
    for name in report.WRITTEN:
        (out / name).unlink(missing_ok=True)
    content: dict[str, Any] = {
        "network": subject.name,
        "dataset": subject.dataset,
        "samples": len(subject.samples),
        "classes": subject.classes,
        "methods": options.methods,
        "pgd_steps": options.pgd_steps,
        "pgd_restarts": options.restarts,
        "seed": options.seed,
        "precision": "float32, eager, without TF32 and autocast; rounding is not bounded",
        "engine": f"auto_LiRPA {ENGINE_VERSION}",
        "torch": torch.__version__,
        "package": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": ranks.size,
        "seconds": seconds,
        "untested": list(bounded.untested),
        "weights": weights,
    }
    if verifications:
        write_csv(out / report.CERTIFICATES, report.certificate_rows(verifications, weights))
        content["results"] = [report.verification_entry(one) for one in verifications]
    if radii is not None:
        write_csv(out / report.RADII, report.radius_rows(radii, weights))
        content["certified_radius"] = report.radius_entry(radii, _TOLERANCE)
    tables = (report.CERTIFICATES, report.RADII)
    content["files"] = {name: file_sum(out / name) for name in tables if (out / name).is_file()}
    write_json(out / report.SUMMARY, content)
    print(f"written to {out}")
