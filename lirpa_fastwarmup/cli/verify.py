"""``lirpa-fastwarmup verify``: certificates for the test samples of a trained network."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from tqdm import tqdm

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.boxes import check_eps, check_positive
from lirpa_fastwarmup.cli.options import device_named, number
from lirpa_fastwarmup.cli.subject import Subject, add_arguments, check_named, subject_of
from lirpa_fastwarmup.distributed import all_gather, local_device, process_group, rank_zero_first, world
from lirpa_fastwarmup.experiments.data import Batches, spread_indices
from lirpa_fastwarmup.verification import ABCrown, Journal, UnsoundBoundError, certified_radii, verify
from lirpa_fastwarmup.verification.certify import NAMES, method_named
from lirpa_fastwarmup.verification.folder import JOURNAL, results_folder, write_results
from lirpa_fastwarmup.verification.result import radii_entry

_RADII = "certified radius: mean {mean:.4f}, median {median:.4f} of {count:,} samples; {not_certified:,} have none"
_TOLERANCE = 1e-4  # Of the width of the input range.
_R = TypeVar("_R")


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = "Certify and attack the test samples of a network. After an interruption, rerun to resume."
    command.set_defaults(command=_verify)
    add_arguments(command)
    what = command.add_argument_group("verification")
    what.add_argument("--limit", type=int, metavar="N", help="only N samples, evenly spaced over the test set")
    what.add_argument("--eps", type=number, nargs="+", help="radii in units of the inputs; by default the run's")
    what.add_argument("--radius", action="store_true", help="the largest certified radius of each sample instead")
    methods: dict[str, Any] = {"type": method_named, "choices": NAMES, "metavar": "METHOD", "nargs": "+"}
    text = f"any of {', '.join(NAMES)} (default: IBP CROWN-IBP)"
    what.add_argument("--methods", default=["IBP", "CROWN-IBP"], help=text, **methods)
    what.add_argument("--abcrown", type=Path, metavar="DIR", help="checkout of alpha-beta-CROWN, for that method")
    what.add_argument("--abcrown-python", default=sys.executable, metavar="PYTHON", help="its interpreter, if another")
    what.add_argument("--time-limit", type=number, default=100.0, metavar="S", help="seconds a sample (default: 100)")
    what.add_argument("--pgd-steps", type=int, default=50, help="steps of the attack (default: 50)")
    what.add_argument("--pgd-restarts", type=int, default=5, help="its random starts; 0 for no attack (default: 5)")
    what.add_argument("--float64", action="store_true", help="repeat the verdicts in double precision")
    what.add_argument("--rigorous", action="store_true", help="find the certificates that hold despite rounding")
    what.add_argument("--batch-size", type=int, default=100, help="halved if memory does not suffice (default: 100)")
    what.add_argument("--seed", type=int, default=0, help="of the attack (default: 0)")
    what.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")
    what.add_argument("--out", type=Path, metavar="DIR", help="folder for the results, by default RUN_DIR")
    what.add_argument("--overwrite", action="store_true", help="replace an earlier verification in it")


def _verify(options: argparse.Namespace) -> int:
    check_named(options)
    out = options.out or options.run
    if options.run is not None and not options.run.is_dir():
        raise FileNotFoundError(f"there is no folder {options.run}: name the folder of a training run")
    for eps in options.eps or ():
        check_eps(eps)
        check_positive(eps)
    if options.radius and not options.eps and (options.rigorous or options.float64 or options.abcrown):
        text = "--rigorous, --float64 and --abcrown do not apply to --radius: leave them out, or add radii with --eps"
        raise ValueError(text)
    device = local_device(device_named(options.device))
    with (
        process_group(device) as ranks,
        results_folder(out, overwrite=options.overwrite) if ranks.is_rank_zero else nullcontext(),
    ):
        with rank_zero_first():  # Rank 0 downloads and unpacks the data.
            subject = subject_of(options)
        radii = options.eps or ([] if options.radius else [subject.eps])
        if None in radii:
            raise ValueError("name the radius to certify, --eps 8/255, or ask for the largest one with --radius")
        return _run(options, subject, radii, out, device)


def _run(options: argparse.Namespace, subject: Subject, radii: Sequence[float], out: Path, device: torch.device) -> int:
    ranks, total, limit = world(), len(subject.dataset.test), options.limit
    if limit is not None and not 1 <= limit <= total:
        raise ValueError(f"the test set of {subject.dataset.name} has {total} samples; cannot take {limit}")
    indices = spread_indices(total, limit or total)
    chosen = subject.dataset.test if limit is None else subject.dataset.test.take(indices)
    network, example = subject.network.to(device), subject.example.to(device)
    bounded = fw.BoundedModule(network, example, allow_untested=subject.allow_untested).eval()
    samples, journal = Batches(chosen, options.batch_size), Journal.of_rank(out / JOURNAL)
    plan = {name: getattr(options, name) for name in ("methods", "pgd_steps", "seed")}
    given = {**plan, "restarts": options.pgd_restarts, "batch_size": options.batch_size, "journal": journal}
    given |= {"indices": indices.tolist(), "input_range": subject.dataset.input_range}
    x, ends = chosen.inputs, subject.dataset.input_range
    # The widest box worth certifying: the input range, or what the samples of unclipped data span.
    low, high = (x.min(), x.max()) if ends is None else map(torch.as_tensor, ends)
    largest = float((high - low).max()) or 1.0
    tolerance = _TOLERANCE * largest
    given_abcrown = options.abcrown, options.abcrown_python, float(options.time_limit), device.type
    abcrown = None if options.abcrown is None else ABCrown(*given_abcrown)
    started, contradictions = time.perf_counter(), list[str]()

    def computed(title: str, compute: Callable[..., _R], text: Callable[[_R], str]) -> _R:
        count, hidden = -(-len(chosen) // ranks.size), None if ranks.is_rank_zero else True
        with tqdm(total=count, desc=title, unit="sample", leave=False, disable=hidden) as bar:
            try:
                found = compute(**given, over_ranks=True, progress=lambda done: bar.update(len(done)))
            except UnsoundBoundError as error:  # Raised at the end, when all radii are done and written.
                found = cast("_R", error.result)
                contradictions.extend(f"{title}, {sentence}" for sentence in error.contradictions)
        if ranks.is_rank_zero:
            print(text(found), flush=True)
        return found

    try:
        at = partial(verify, bounded, samples, float64=options.float64, rigorous=options.rigorous, abcrown=abcrown)
        search = partial(certified_radii, bounded, samples, largest=largest, tolerance=tolerance)
        text = lambda found: _RADII.format(count=len(found), **radii_entry(found, tolerance))  # noqa: E731
        certified = computed("radius", search, text) if options.radius else None
        verifications = [computed(f"eps {eps}", partial(at, eps), str) for eps in radii]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished batches are kept in {journal.path}; the same command resumes") from None
    used = set[str]().union(*all_gather(journal.used))  # Before rank 0 writes: if that fails, no other rank waits.
    if ranks.is_rank_zero:
        about = {"network": subject.name, "dataset": subject.dataset.name, "samples": len(chosen)}
        about |= {"classes": subject.dataset.classes, **plan, "pgd_restarts": options.pgd_restarts}
        about["input_range"] = None if ends is None else [torch.as_tensor(end).tolist() for end in ends]
        about["seconds"] = time.perf_counter() - started
        write_results(out, bounded, verifications, certified, tolerance, about)
        journal.forget(used)
        print(f"written to {out}")
    if contradictions:
        raise UnsoundBoundError(contradictions)
    return 0
