"""Certificates and errors of a network on samples: for users, and during training."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import check_positive
from lirpa_fastwarmup.engine.bounds import MarginBounds, class_count
from lirpa_fastwarmup.engine.graph import fingerprint
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.plain import view_of
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError
from lirpa_fastwarmup.engine.tracing import copy_of, unchanged
from lirpa_fastwarmup.verification.certify import Certifier, Plan, ordered
from lirpa_fastwarmup.verification.complete import ABCrown, CompleteVerifier
from lirpa_fastwarmup.verification.journal import Journal
from lirpa_fastwarmup.verification.pipeline import Samples, over_batches
from lirpa_fastwarmup.verification.result import COMPLETE, Certificate, Verification

logger = logging.getLogger(__name__)


def verify(
    bounded: Any,
    samples: Samples,
    eps: Any,
    methods: Sequence[str] = ("IBP", "CROWN-IBP"),
    *,
    pgd_steps: int = 50,
    restarts: int = 5,
    input_range: Any = (0.0, 1.0),
    float64: bool = False,
    rigorous: bool = False,
    abcrown: ABCrown | None = None,
    batch_size: int = 100,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    journal: Journal | None = None,
    progress: Callable[[Sequence[Certificate]], None] | None = None,
    over_ranks: bool = False,
) -> Verification:
    """Certify each sample by any of ``methods``, and attack it.

    The cheapest method bounds all samples. PGD attacks those that IBP leaves open, and some of those that it proves, as
    a check (a seeded 5 %, at least 10 in a batch); without IBP, all samples. Each further method bounds the samples
    that are neither proved nor falsified, in batches of ``batch_size`` gathered from all of them. Everything runs in
    float32, eager, without autocast and TF32, on a copy of the network, in micro-batches where a batch does not fit
    into memory.

    Args:
        bounded: the network, in evaluation mode: a BoundedModule of this package, or the engine's own.
        samples: inputs and labels (x, y), or batches of these; x is a tuple for a network of several inputs. A batch
            may be (x, y, eps), with the radius of its samples in place of ``eps``.
        eps: radius of the boxes, in units of the input: a number, one per channel, a tensor of the input's shape, or
            one value per sample, shape (samples, 1, …). For several inputs also a tuple, one for each; 0 for an
            unperturbed input. ``None`` if every batch has its own.
        methods: any of IBP, CROWN-IBP, CROWN, alpha-CROWN and abcrown, in any order and case.
        pgd_steps: steps of the attack, each of length eps/10.
        restarts: random starts of the attack; 0 for no attack.
        input_range: lowest and highest valid input, to clip boxes to, or ``None``; for several inputs also a tuple.
        float64: repeat the verdicts in double precision, and record changes.
        rigorous: of the certified samples, also prove what holds in spite of rounding, by an interval arithmetic that
            bounds all rounding errors, on the CPU (:mod:`lirpa_fastwarmup.verification.rigorous`).
        abcrown: where α,β-CROWN is, for the method "abcrown", which decides what the other methods leave open, on a
            network of one input. It runs in processes of its own; the certificates tell its outcomes, also a failure.
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
        TypeError: ``bounded`` is not a BoundedModule, labels are missing or not int64, inputs are not floating-point
            numbers, or ``eps`` is not a number.
        ValueError: the network is in training mode; ``eps`` is not above 0 or wider than the input range; inputs lie
            outside their range; labels are not classes of the network; a method is unknown; there are no samples.
        NotImplementedError: the engine has no such bounds for the network.
        OutOfMemoryError: a method does not fit into memory, for one sample.
        UnsoundBoundError: a point of a box contradicts its bounds; the error's ``result`` is the verification.
        WorkerError: α,β-CROWN does not start.

    Example:
        >>> bounded = fw.BoundedModule(model, x).eval()
        >>> found = fw.verify(bounded, (x, y), eps=8 / 255, methods=("IBP", "CROWN-IBP"))
        >>> print(found.verified_error)
        6.30% [4.96%, 7.98%]
        >>> robust = [sample.index for sample in found.certificates if sample.verified]
    """
    bounded = check_network(bounded)
    packed = None if eps is None else bounded.layout.pack_eps(eps, input_range)
    if packed is not None:
        check_positive(packed)
    if pgd_steps < 0 or restarts < 0 or batch_size < 1:
        text = "pgd_steps and restarts must be at least 0 and batch_size at least 1"
        raise ValueError(f"{text}; found {pgd_steps}, {restarts} and {batch_size}")
    packed_range = bounded.layout.pack_range(input_range)
    _check_complete(bounded, abcrown, ordered(methods), float64=float64)
    settings = "" if abcrown is None else str(abcrown.configuration())
    plan = Plan(ordered(methods), pgd_steps, restarts, packed_range, float64, batch_size, seed, rigorous, settings)
    dtypes = (torch.float32, torch.float64) if float64 else (torch.float32,)
    options = {"indices": indices, "journal": journal, "progress": progress, "over_ranks": over_ranks}
    with ExitStack() as stack:
        complete = None
        if abcrown is not None:
            plain = copy_of(bounded.wrapped).float().cpu().eval()
            complete = stack.enter_context(closing(CompleteVerifier(abcrown, plain, journal, fingerprint(bounded))))
        certifier = Certifier([MarginBounds(bounded, dtype) for dtype in dtypes], plan, bounded, complete=complete)
        return _verification(bounded, samples, eps, packed, certifier, warn=True, **options)


def _check_complete(bounded: BoundedModule, abcrown: ABCrown | None, methods: Sequence[str], *, float64: bool) -> None:
    if (COMPLETE in methods) != (abcrown is not None):
        raise ValueError(
            f"the method {COMPLETE!r} and the argument abcrown need each other: pass methods=(..., {COMPLETE!r}) and "
            f"abcrown=verification.ABCrown(checkout); found methods={methods} and abcrown={abcrown}"
        )
    if abcrown is not None and (float64 or not bounded.layout.is_single):
        what = "in one precision" if float64 else "on networks of one input"
        raise NotImplementedError(f"α,β-CROWN is run {what} only: leave {COMPLETE!r} out")


def evaluate(
    bounded: Any,
    samples: Samples,
    eps: Any,
    *,
    pgd_steps: int = 50,
    restarts: int = 3,
    input_range: Any = (0.0, 1.0),
    batch_size: int = 250,
    seed: int = 0,
    check: bool = True,
    over_ranks: bool = False,
) -> Verification:
    """Standard, PGD and verified error by IBP during training: of the network itself, without a copy.

    Runs in evaluation mode and in exact arithmetic of the network's dtype, and restores the mode of every module.
    Arguments and errors are as for :func:`verify`, except:

    Args:
        bounded: the network, in any mode.
        eps: radius of the boxes, 0 or more, in units of the input.
        check: check the bounds of some samples of the first batch, as :func:`verify` does.
    """
    bounded = view_of(bounded)
    packed = None if eps is None else bounded.layout.pack_eps(eps, input_range)
    plan = Plan(("IBP",), pgd_steps, restarts, bounded.layout.pack_range(input_range), False, batch_size, seed)
    dtype = next((value.dtype for value in bounded.wrapped.parameters()), torch.get_default_dtype())
    with unchanged(bounded.wrapped):
        network = MarginBounds(bounded.eval(), dtype, live=True)
        certifier = Certifier([network], plan, bounded, check=check)
        return _verification(bounded, samples, eps, packed, certifier, warn=False, over_ranks=over_ranks)


def _verification(
    bounded: BoundedModule, samples: Samples, eps: Any, packed: Any, certifier: Certifier, warn: bool, **options: Any
) -> Verification:
    screen = certifier.screen if certifier.plan.screens else None
    options |= {"screen": screen, "eps": packed}
    total = over_batches(bounded, samples, certifier.certify, Certificate, certifier.plan, {}, **options)
    unseen = sorted(set(range(class_count(bounded))) - {sample.label for sample in total.certificates})
    if unseen and warn:
        some = ", ".join(map(str, unseen[:10])) + (", …" if len(unseen) > 10 else "")
        text = "no sample has the label%s %s, of the network's %d classes: the errors do not cover them"
        logger.warning(text, "s" if len(unseen) > 1 else "", some, class_count(bounded))
    own = [sample.eps for sample in total.certificates if sample.eps is not None]
    found = Verification(own or _plain(eps), total.certificates, total.stages, total.sentences(), bounded.untested)
    if found.contradictions:
        raise UnsoundBoundError(found.contradictions, found)
    return found


def _plain(eps: Any) -> Any:
    """``eps`` as numbers and lists of numbers."""
    if isinstance(eps, tuple | list):
        return list(map(_plain, eps))
    # A subclass of float may print differently, such as 8/255.
    return eps.tolist() if isinstance(eps, Tensor) else eps if isinstance(eps, float) else float(eps)


def check_network(bounded: Any) -> BoundedModule:
    """Refuse a network that cannot be verified, with the errors of :func:`verify`; return this package's view of it."""
    bounded = view_of(bounded)
    training = [name or "the network itself" for name, module in bounded.wrapped.named_modules() if module.training]
    if training:
        raise ValueError(
            f"the network is in training mode ({', '.join(training[:3])}{', …' if len(training) > 3 else ''}), where "
            "the output for one sample depends on the other samples of its batch: call bounded.eval()"
        )
    class_count(bounded)
    if not bounded.any_batch and len(bounded.example[0]) > 1:  # Batches of one sample suffice.
        raise ValueError(
            f"the network accepts only batches of {len(bounded.example[0])}, but methods run on smaller batches: keep "
            "its first dimension open, x.view(len(x), …)"
        )
    return bounded
