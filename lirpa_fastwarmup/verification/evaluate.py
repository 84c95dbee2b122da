"""Errors and certificates over many batches: the loop with journal, processes and progress that all of them share."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import (
    Epsilon,
    InputRange,
    check_batch,
    check_eps,
    check_input_shapes,
    check_radius,
    check_shapes,
)
from lirpa_fastwarmup.distributed import SINGLE, all_gather, patient_group, world
from lirpa_fastwarmup.engine.bounds import MarginBounds, class_count
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.graph import fingerprint
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError
from lirpa_fastwarmup.verification.certify import Certifier, Plan, ordered
from lirpa_fastwarmup.verification.journal import Journal, digest
from lirpa_fastwarmup.verification.result import BatchResult, Certificate, Result, Verification
from lirpa_fastwarmup.version import __version__

logger = logging.getLogger(__name__)

Samples = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def over_batches(
    bounded: BoundedModule,
    samples: Samples,
    compute: Callable[[Tensor, Tensor], BatchResult[Result]],
    kind: type[Result],
    plan: Plan,
    conditions: Mapping[str, object],
    *,
    indices: Sequence[int] | None = None,
    journal: Journal | None = None,
    progress: Callable[[Sequence[Result]], None] | None = None,
    over_ranks: bool = False,
) -> BatchResult[Result]:
    """The results of all batches.

    Args:
        compute: the function of a batch, x and y on the network's device.
        kind: the class of its results.
        conditions: what the results depend on besides network, plan and batch, for the journal.
        bounded, samples, indices, journal, progress, over_ranks: see :func:`verify`.

    Raises:
        TypeError, ValueError: the samples do not fit the network, or there are none.
    """
    ranks = world() if over_ranks else SINGLE
    device, classes = bounded.example[0].device, class_count(bounded)
    described = {**_network_and_software(bounded), "plan": dataclasses.astuple(plan), **conditions} if journal else {}
    own: list[BatchResult[Result]] = []
    count = first = 0
    with patient_group() if ranks.size > 1 else nullcontext() as group:
        for x, y in batches_of(samples, plan.batch_size):
            numbers = _numbers(indices, first, len(y))  # Checked on every rank, so that none waits for another.
            if count % ranks.size == ranks.rank:
                check_input_shapes([x], bounded.example)
                check_batch(x, y, classes, plan.input_range)
                key = digest({**described, "x": x, "y": y}) if journal else ""
                stored = journal.get(key) if journal else None
                result = compute(x.to(device), y.to(device)) if stored is None else BatchResult.from_dict(kind, stored)
                if journal and stored is None:
                    journal.put(key, result.as_dict())
                own.append(result.numbered(numbers))
                if progress:
                    progress(own[-1].certificates)
            count, first = count + 1, first + len(y)
        if count == 0:
            raise ValueError("there are no samples")
        if indices is not None and len(indices) != first:
            raise ValueError(f"pass one index per sample; found {len(indices)} indices for {first} samples")
        by_rank = all_gather(own, group) if ranks.size > 1 else [own]
    total: BatchResult[Result] = BatchResult()
    for turn in itertools.zip_longest(*by_rank):
        for one in turn:
            if one is not None:
                total.add(one)
    return total


def _numbers(indices: Sequence[int] | None, first: int, count: int) -> Sequence[int]:
    if indices is None:
        return range(first, first + count)
    found = indices[first : first + count]
    if len(found) != count:
        raise ValueError(f"pass one index per sample; found only {len(indices)} indices")
    return found


def verify(
    bounded: BoundedModule,
    samples: Samples,
    eps: Epsilon,
    methods: Sequence[str] = ("IBP", "CROWN-IBP"),
    *,
    pgd_steps: int = 50,
    restarts: int = 5,
    input_range: InputRange | None = (0.0, 1.0),
    float64: bool = False,
    batch_size: int = 100,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    journal: Journal | None = None,
    progress: Callable[[Sequence[Certificate]], None] | None = None,
    over_ranks: bool = False,
) -> Verification:
    """Certify each sample by any of ``methods``, and attack it.

    PGD attacks every batch first. The cheapest method then bounds all samples, and each further method the samples
    that are neither proved nor falsified. Everything runs in float32, eager, without autocast and TF32, on a copy of
    the network, in micro-batches where a batch does not fit into memory.

    Args:
        bounded: the network, in evaluation mode.
        samples: inputs and labels (x, y), or batches of these.
        eps: radius of the boxes, in units of the input.
        methods: any of IBP, CROWN-IBP, CROWN and alpha-CROWN, in any order and case.
        pgd_steps: steps of the attack, each of length eps/10.
        restarts: random starts of the attack; 0 for no attack.
        input_range: lowest and highest valid input, to which boxes are clipped; ``None`` for unclipped data.
        float64: repeat the verdicts in double precision, and record changes.
        batch_size: samples per batch, unless ``samples`` are batches.
        seed: of the attack's starts.
        indices: a number for each sample, such as its index in the test set; by default its place.
        journal: stores finished batches; stored ones are not computed again.
        progress: called with the certificates of each finished batch.
        over_ranks: every process of the default process group (torchrun) calls this with the same samples, computes
            its part of the batches, and returns all certificates.

    Returns:
        The certificates, errors and stages; it prints as a table.

    Raises:
        TypeError: ``bounded`` is not a BoundedModule of this package, labels are missing or not int64, inputs are not
            floating-point numbers, or ``eps`` is not a number.
        ValueError: the network is in training mode; ``eps`` is not above 0 or wider than the input range; inputs lie
            outside their range; labels are not classes of the network; a method is unknown; there are no samples.
        NotImplementedError: the engine has no such bounds for the network.
        OutOfMemoryError: a method does not fit into memory, for one sample.
        UnsoundBoundError: a point of a box contradicts its bounds; the error's ``result`` is the verification.

    Example:
        >>> bounded = fw.BoundedModule(model, x).eval()
        >>> found = fw.verify(bounded, (x, y), eps=8 / 255, methods=("IBP", "CROWN-IBP"))
        >>> print(found.verified_error)
        6.30% [4.96%, 7.98%]
        >>> robust = [sample.index for sample in found.certificates if sample.verified]
    """
    check_network(bounded)
    check_radius(eps, input_range)
    if pgd_steps < 0 or restarts < 0 or batch_size < 1:
        found_values = f"{pgd_steps}, {restarts} and {batch_size}"
        raise ValueError(f"pgd_steps and restarts must be at least 0 and batch_size at least 1; found {found_values}")
    plan = Plan(ordered(methods), pgd_steps, restarts, input_range, float64, batch_size, seed)
    dtypes = (torch.float32, torch.float64) if float64 else (torch.float32,)
    certifier = Certifier([MarginBounds(bounded, dtype) for dtype in dtypes], plan, untested=bool(bounded.untested))
    options = {"indices": indices, "journal": journal, "progress": progress, "over_ranks": over_ranks}
    found = _verification(bounded, samples, eps, certifier, **options)
    _warn_of_unseen_classes([sample.label for sample in found.certificates], class_count(bounded))
    return _without_contradictions(found)


def evaluate(
    bounded: BoundedModule,
    samples: Samples,
    eps: Epsilon,
    *,
    pgd_steps: int = 50,
    restarts: int = 3,
    input_range: InputRange | None = (0.0, 1.0),
    batch_size: int = 250,
    seed: int = 0,
    check: bool = True,
    over_ranks: bool = False,
) -> Verification:
    """Standard, PGD and verified error by IBP during training: of the network itself, without a copy.

    Runs in evaluation mode and in exact arithmetic of the network's dtype, and restores the mode of every module.

    Args:
        bounded: the network, in any mode.
        eps: radius of the boxes, 0 or more, in units of the input.
        check: check the bounds of some samples of the first batch, as :func:`verify` does.
        samples, pgd_steps, restarts, input_range, batch_size, seed, over_ranks: see :func:`verify`.

    Raises:
        Exception: see :func:`verify`.
    """
    check_eps(eps, input_range)
    plan = Plan(("IBP",), pgd_steps, restarts, input_range, False, batch_size, seed)
    dtype = next((value.dtype for value in bounded.wrapped.parameters()), torch.get_default_dtype())
    with _evaluating(bounded):
        network = MarginBounds(bounded, dtype, live=True)
        certifier = Certifier([network], plan, untested=bool(bounded.untested), check=check)
        return _without_contradictions(_verification(bounded, samples, eps, certifier, over_ranks=over_ranks))


def _verification(
    bounded: BoundedModule, samples: Samples, eps: Epsilon, certifier: Certifier, **options: Any
) -> Verification:
    def certify(x: Tensor, y: Tensor) -> BatchResult[Certificate]:
        return certifier.certify(x, y, eps)

    conditions = {"eps": eps if isinstance(eps, Tensor) else float(eps)}
    total = over_batches(bounded, samples, certify, Certificate, certifier.plan, conditions, **options)
    # A subclass of float may print differently, such as 8/255.
    shown = eps.tolist() if isinstance(eps, Tensor) else eps if isinstance(eps, float) else float(eps)
    return Verification(shown, total.certificates, total.stages, total.sentences(), bounded.untested)


def _without_contradictions(found: Verification) -> Verification:
    if found.contradictions:
        raise UnsoundBoundError(found.contradictions, found)
    return found


@contextmanager
def _evaluating(bounded: BoundedModule) -> Iterator[None]:
    modes = [(module, module.training) for module in bounded.wrapped.modules()]
    bounded.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_network(bounded: BoundedModule) -> None:
    """Refuse a network that cannot be verified, with the errors of :func:`verify`."""
    if not isinstance(bounded, BoundedModule):
        raise TypeError(
            f"expected a lirpa_fastwarmup.BoundedModule, found {type(bounded).__name__}: wrap the plain network, "
            "fw.BoundedModule(network, x)"
        )
    training = [name or "the network itself" for name, module in bounded.wrapped.named_modules() if module.training]
    if training:
        raise ValueError(
            f"the network is in training mode ({', '.join(training[:3])}{', …' if len(training) > 3 else ''}), where "
            "the output for one sample depends on the other samples of its batch: call bounded.eval()"
        )
    class_count(bounded)
    if not bounded.any_batch:
        raise ValueError(
            f"the network accepts only batches of {len(bounded.example[0])}, but methods run on smaller batches: keep "
            "its first dimension open, x.view(len(x), …)"
        )


def _network_and_software(bounded: BoundedModule) -> dict[str, object]:
    return {
        "package": __version__,
        "engine": ENGINE_VERSION,
        "torch": torch.__version__,
        "network": fingerprint(bounded),
        "options": bounded.given_options,
        "untested": bounded.untested,
    }


def batches_of(samples: Samples, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``samples`` as checked batches: the given batches, or batches of ``size`` from one pair of tensors.

    Raises:
        TypeError: labels are missing, or inputs are not floating-point numbers.
    """
    if isinstance(samples, tuple | list) and samples and all(not isinstance(part, tuple | list) for part in samples):
        x, y = _pair(samples)
        yield from ((x[start : start + size], y[start : start + size]) for start in range(0, len(x), size))
    else:
        yield from map(_pair, samples)


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        found = [type(part).__name__ for part in batch] if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(
            f"expected inputs and labels, two tensors (x, y), found {found}: labels are needed, because a certificate "
            "states that a sample's own class wins everywhere in its box"
        )
    x, y = batch
    if not x.is_floating_point():
        raise TypeError(f"inputs must be floating-point numbers, found {x.dtype}: for bytes, pass x.float() / 255")
    check_shapes(x, y)
    return x, y


def _warn_of_unseen_classes(labels: Sequence[int], classes: int) -> None:
    unseen = sorted(set(range(classes)) - set(labels))
    if unseen:
        some = ", ".join(map(str, unseen[:10])) + (", …" if len(unseen) > 10 else "")
        text = "no sample has the label%s %s, of the network's %d classes: the errors do not cover them"
        logger.warning(text, "s" if len(unseen) > 1 else "", some, classes)
