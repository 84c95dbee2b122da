"""Errors and certificates over many batches: one loop, with journal, processes and progress, that all of them share."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
from lirpa_fastwarmup.engine.bounds import class_count
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.graph import fingerprint
from lirpa_fastwarmup.engine.methods import MarginBounds
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError
from lirpa_fastwarmup.verification.certify import BatchResult, Certifier, Plan, ordered
from lirpa_fastwarmup.verification.journal import Journal, digest
from lirpa_fastwarmup.verification.result import Certificate, Stage, Verification
from lirpa_fastwarmup.version import __version__

logger = logging.getLogger(__name__)

Samples = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
_R = TypeVar("_R")


@dataclass(frozen=True)
class Task(Generic[_R]):
    """What is computed of each batch.

    Attributes:
        compute: takes x and y, on the network's device.
        conditions: what the result depends on besides network and batch, for the journal.
        to_json, from_json: a result as plain values for the journal, and back.
    """

    compute: Callable[[Tensor, Tensor], _R]
    conditions: Mapping[str, object]
    to_json: Callable[[_R], Any]
    from_json: Callable[[Any], _R]


def over_batches(
    bounded: BoundedModule,
    samples: Samples,
    task: Task[_R],
    *,
    batch_size: int,
    input_range: InputRange | None,
    journal: Journal | None = None,
    progress: Callable[[int, _R], None] | None = None,
    over_ranks: bool = False,
) -> list[_R]:
    """The task's results, batch by batch.

    Args:
        bounded: the network.
        samples: inputs and labels (x, y), or batches of these.
        task: what to compute.
        batch_size: samples at once, where ``samples`` are not batches already.
        input_range: lowest and highest valid input.
        journal: keeps finished batches; those that it holds are not computed again.
        progress: given the number of samples before the batch, and its result, as soon as it is known.
        over_ranks: every process of the default process group calls this with the same samples, computes its share of
            the batches, and gets all results.

    Raises:
        TypeError, ValueError: the samples are none of the network's; there are none.
    """
    ranks = world() if over_ranks else SINGLE
    device, classes = bounded.example[0].device, class_count(bounded)
    conditions = {**_network_and_software(bounded), **task.conditions} if journal else {}
    own: list[_R] = []
    count = first = 0
    with patient_group() if ranks.size > 1 else _alone() as group:
        for x, y in batches_of(samples, batch_size):
            if count % ranks.size == ranks.rank:
                check_input_shapes([x], bounded.example)
                check_batch(x, y, classes, input_range)
                key = digest({**conditions, "x": x, "y": y}) if journal else ""
                stored = journal.get(key) if journal else None
                result = task.compute(x.to(device), y.to(device)) if stored is None else task.from_json(stored)
                if journal and stored is None:
                    journal.put(key, task.to_json(result))
                own.append(result)
                if progress:
                    progress(first, result)
            count, first = count + 1, first + len(y)
        if count == 0:
            raise ValueError("there are no samples")
        parts = all_gather(own, group) if ranks.size > 1 else [own]
    return [one for turn in itertools.zip_longest(*parts, fillvalue=None) for one in turn if one is not None]


@contextmanager
def _alone() -> Iterator[None]:
    yield None


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
    journal: Journal | None = None,
    progress: Callable[[Sequence[Certificate]], None] | None = None,
    over_ranks: bool = False,
) -> Verification:
    """Certify each sample by any of ``methods``, and attack it.

    Every batch is attacked by PGD first. The cheapest method then bounds all its samples, each further one those that
    are neither proved nor misclassified yet. Whatever training used, all of this is done in float32, eager, without
    autocast and TF32, on a copy of the network. A batch that does not fit into memory is computed in parts.

    Args:
        bounded: the network, in evaluation mode.
        samples: inputs and labels (x, y), or batches of these.
        eps: radius of the boxes, in units of the input.
        methods: of IBP, CROWN-IBP, CROWN and alpha-CROWN, in any order.
        pgd_steps: steps of the attack, of eps/10 each.
        restarts: random starts of the attack; with 0 there is none.
        input_range: lowest and highest valid input, to which boxes are clipped; ``None`` for unclipped data.
        float64: repeat the verdicts in double precision, and note those that change.
        batch_size: samples at once, where ``samples`` are not batches already.
        seed: of the attack's starts.
        journal: keeps finished batches; those that it holds are not computed again.
        progress: given the certificates of each batch when it is done.
        over_ranks: every process of the default process group (torchrun) calls this with the same samples, computes its
            share of the batches, and gets all certificates.

    Raises:
        TypeError: ``bounded`` is no BoundedModule of this package, labels are missing or not int64, inputs are no
            floating-point numbers, or ``eps`` is no number.
        ValueError: the network is in training mode; ``eps`` is not above 0 or wider than the input range; inputs
            lie outside their range; labels are no classes of the network; a method is unknown; there are no samples.
        NotImplementedError: the engine has no such bounds for the network.
        OutOfMemoryError: a method does not fit into memory, for one sample.
        UnsoundBoundError: a point of some box contradicts its bounds; its ``result`` is the verification.
    """
    check_network(bounded)
    check_radius(eps, input_range)
    if pgd_steps < 0 or restarts < 0 or batch_size < 1:
        raise ValueError(
            f"pgd_steps and restarts must be at least 0 and batch_size at least 1; found {pgd_steps}, {restarts} and "
            f"{batch_size}"
        )
    plan = Plan(ordered(methods), pgd_steps, restarts, input_range, float64, batch_size, seed)
    dtypes = (torch.float32, torch.float64) if float64 else (torch.float32,)
    certifier = Certifier([MarginBounds(bounded, dtype) for dtype in dtypes], plan, untested=bool(bounded.untested))
    found = _verification(bounded, samples, eps, certifier, journal=journal, progress=progress, over_ranks=over_ranks)
    warn_of_unseen_classes([sample.label for sample in found.certificates], class_count(bounded))
    if found.contradictions:
        raise UnsoundBoundError(found.contradictions, found)
    return found


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
    """Standard, PGD and verified error by IBP, as training takes them: of the network itself, without a copy.

    It is done in evaluation mode and in exact arithmetic of the network's dtype; every module's mode is restored.

    Args:
        bounded: the network, in any mode.
        eps: radius of the boxes, 0 or more, in units of the input.
        check: check the bounds of some samples of the first batch as :func:`verify` does.
        samples, pgd_steps, restarts, input_range, batch_size, seed, over_ranks: as of :func:`verify`.

    Raises:
        Exception: as of :func:`verify`.
    """
    check_eps(eps, input_range)
    plan = Plan(("IBP",), pgd_steps, restarts, input_range, False, batch_size, seed)
    dtype = next((value.dtype for value in bounded.wrapped.parameters()), torch.get_default_dtype())
    with _evaluating(bounded):
        network = MarginBounds(bounded, dtype, live=True)
        certifier = Certifier([network], plan, untested=bool(bounded.untested), check=check)
        found = _verification(bounded, samples, eps, certifier, over_ranks=over_ranks)
    if found.contradictions:
        raise UnsoundBoundError(found.contradictions, found)
    return found


def _verification(
    bounded: BoundedModule,
    samples: Samples,
    eps: Epsilon,
    certifier: Certifier,
    *,
    journal: Journal | None = None,
    progress: Callable[[Sequence[Certificate]], None] | None = None,
    over_ranks: bool,
) -> Verification:
    plan = certifier.plan
    results = over_batches(
        bounded,
        samples,
        Task(
            lambda x, y: certifier.certify(x, y, eps),
            {"plan": dataclasses.astuple(plan), "eps": eps},
            BatchResult.as_dict,
            BatchResult.from_dict,
        ),
        batch_size=plan.batch_size,
        input_range=plan.input_range,
        journal=journal,
        progress=None if progress is None else lambda first, result: progress(result.certificates_from(first)),
        over_ranks=over_ranks,
    )
    found = Verification(eps.tolist() if isinstance(eps, Tensor) else float(eps), [], untested=bounded.untested)
    for result in results:
        first = len(found.certificates)
        found.certificates.extend(result.certificates_from(first))
        for name, stage in result.stages.items():
            found.stages.setdefault(name, Stage()).add(stage)
        found.contradictions.extend(f"sample {first + index} {text}" for index, text in result.contradictions)
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
    """Refuse what cannot be verified; errors as of :func:`verify`."""
    if not isinstance(bounded, BoundedModule):
        raise TypeError(
            f"expected a lirpa_fastwarmup.BoundedModule, found {type(bounded).__name__}: wrap the plain network, "
            "fw.BoundedModule(network, x)"
        )
    training = [name or "the network itself" for name, module in bounded.wrapped.named_modules() if module.training]
    if training:
        raise ValueError(
            f"the network is in training mode ({', '.join(training[:3])}{', …' if len(training) > 3 else ''}), in "
            "which the output for one sample depends on the others of its batch: call bounded.eval()"
        )
    class_count(bounded)
    if not bounded.any_batch:
        raise ValueError(
            f"the network takes batches of {len(bounded.example[0])} only, and methods are asked about parts of a "
            "batch: keep its first dimension open, x.view(len(x), …)"
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
    """``samples`` as checked batches, as they come, or of ``size`` where they are one pair of tensors.

    Raises:
        TypeError: labels are missing, or inputs are no floating-point numbers.
    """
    if isinstance(samples, tuple | list) and samples and all(not isinstance(part, tuple | list) for part in samples):
        x, y = _pair(samples)
        for start in range(0, len(x), size):
            yield x[start : start + size], y[start : start + size]
        return
    for batch in samples:
        yield _pair(batch)


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        found = [type(part).__name__ for part in batch] if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(
            f"expected inputs and labels, two tensors (x, y), found {found}: labels are needed, because a certificate "
            "says that a sample's own class wins everywhere in its box"
        )
    x, y = batch
    if not x.is_floating_point():
        raise TypeError(f"inputs must be floating-point numbers, found {x.dtype}: for bytes, pass x.float() / 255")
    check_shapes(x, y)
    return x, y


def warn_of_unseen_classes(labels: Sequence[int], classes: int) -> None:
    """Warn where the samples show nothing of some classes."""
    unseen = sorted(set(range(classes)) - set(labels))
    if unseen:
        logger.warning(
            "no sample has the label%s %s, of the network's %d classes: the errors say nothing of these",
            *("s" if len(unseen) > 1 else "", ", ".join(map(str, unseen[:10])) + (", …" if len(unseen) > 10 else "")),
            classes,
        )
