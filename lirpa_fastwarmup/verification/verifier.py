"""Certificates for samples by a chain of methods, attacked along the way."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import lirpa_fastwarmup
from lirpa_fastwarmup.engine.bounds import class_count
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.inputs import Epsilon, InputRange, check_batch, check_input_shapes, check_radius
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError
from lirpa_fastwarmup.verification.certify import BatchResult, Certifier, Plan, ordered
from lirpa_fastwarmup.verification.journal import Journal, digest
from lirpa_fastwarmup.verification.result import Certificate, Stage, Verification

logger = logging.getLogger(__name__)

Samples = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


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
) -> Verification:
    """Certify each sample by any of ``methods``, and attack it.

    Every batch is attacked by PGD first. The cheapest method then bounds all its samples, each further one those that
    are neither proved nor misclassified yet. Whatever training used, all of this is done in float32, eager, without
    autocast and TF32, on a copy of the network. A batch that does not fit into memory is halved as often as needed.

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

    Raises:
        TypeError: ``bounded`` is no BoundedModule of this package, labels are missing or not int64, inputs are no
            floating-point numbers, or ``eps`` is no number.
        ValueError: the network is in training mode; ``eps`` is not above 0 or wider than the input range; inputs
            lie outside their range; labels are no classes of the network; a method is unknown; there are no samples.
        NotImplementedError: the engine has no such bounds for the network, or BatchNorm is ablated.
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
    classes = class_count(bounded)
    certifier = Certifier(bounded, plan)
    conditions = {**conditions_of(bounded), "plan": plan, "eps": eps}
    radius = eps.tolist() if isinstance(eps, Tensor) else float(eps)
    verification = Verification(radius, [], untested=bounded.untested)
    for x, y in batches_of(samples, batch_size):
        check_input_shapes([x], bounded.example)
        check_batch(x, y, classes, input_range)
        key = digest({**conditions, "x": x, "y": y})
        stored = journal.get(key) if journal else None
        if stored is None:
            device = bounded.example[0].device
            result = certifier.certify(x.to(device), y.to(device), eps)
            if journal:
                journal.put(key, result.as_dict())
        else:
            result = BatchResult.from_dict(stored)
        new = _take_in(verification, result)
        if progress:
            progress(new)
    if not verification.certificates:
        raise ValueError("there are no samples to verify")
    warn_of_unseen_classes([sample.label for sample in verification.certificates], classes)
    if verification.contradictions:
        raise UnsoundBoundError(verification.contradictions, verification)
    return verification


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
            "which the output for one sample hangs on the others of its batch: call bounded.eval()"
        )
    class_count(bounded)
    bounded.require_same_function("verification")


def conditions_of(bounded: BoundedModule) -> dict[str, object]:
    """What a verdict hangs on besides the sample and the plan: the network and the software."""
    return {
        "package": lirpa_fastwarmup.__version__,
        "engine": ENGINE_VERSION,
        "torch": torch.__version__,
        "network": str(bounded.wrapped),
        "options": bounded.given_options,
        "untested": bounded.untested,
        **{f"state {name}": value for name, value in bounded.wrapped.state_dict().items()},
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
    return x, y


def warn_of_unseen_classes(labels: Sequence[int], classes: int) -> None:
    """Tell where the samples say nothing of some classes."""
    unseen = sorted(set(range(classes)) - set(labels))
    if unseen:
        logger.warning(
            "no sample has the label%s %s, of the network's %d classes: the errors say nothing of these",
            *("s" if len(unseen) > 1 else "", ", ".join(map(str, unseen[:10])) + (", …" if len(unseen) > 10 else "")),
            classes,
        )


def _take_in(verification: Verification, result: BatchResult) -> list[Certificate]:
    """Add a batch to the verification; return its certificates, with their places among all samples."""
    first = len(verification.certificates)
    new = [dataclasses.replace(sample, index=first + sample.index) for sample in result.certificates]
    verification.certificates.extend(new)
    for name, stage in result.stages.items():
        verification.stages.setdefault(name, Stage()).add(stage)
    verification.contradictions.extend(f"sample {first + index} {text}" for index, text in result.contradictions)
    return new
