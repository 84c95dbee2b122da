"""Certificates, errors and certified radii of a network on samples: for users, and during training."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.attacks import predicted
from lirpa_fastwarmup.boxes import check_positive, converted
from lirpa_fastwarmup.engine.bounds import MarginBounds, class_count, input_box, proved
from lirpa_fastwarmup.engine.graph import fingerprint
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.plain import view_of
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError, find_contradictions
from lirpa_fastwarmup.engine.tracing import copy_of, unchanged
from lirpa_fastwarmup.verification.certify import Certifier, Plan, attack_samples, ordered
from lirpa_fastwarmup.verification.complete import ABCrown, CompleteVerifier
from lirpa_fastwarmup.verification.folder import Journal
from lirpa_fastwarmup.verification.pipeline import Samples, over_batches
from lirpa_fastwarmup.verification.result import ATTACK, COMPLETE, BatchResult, Certificate, Radius, Verification

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
    float32 (a float64 network's in float64), eager, without autocast and TF32, on a copy of the network, in
    micro-batches where memory is short.

    Args:
        bounded: the network, in evaluation mode: a BoundedModule of this package, or the engine's own.
        samples: inputs and labels (x, y), or batches of these; x is a tuple for a network of several inputs. A batch
            may be (x, y, eps), with the radius of its samples in place of ``eps``.
        eps: radius of the boxes, in units of the input: a number, one per channel, a tensor of the input's shape, or
            one value per sample, shape (samples, 1, …). For several inputs also a tuple, one for each; 0 for an
            unperturbed input. ``None`` if every batch has its own.
        methods: any of IBP, CROWN-IBP, CROWN, alpha-CROWN and abcrown, in any order and case.
        pgd_steps: steps of the attack, each a tenth of the clipped box's half-width at every coordinate.
        restarts: random starts of the attack; 0 for no attack.
        input_range: lowest and highest valid input, to clip boxes to, or ``None``; for several inputs also a tuple.
        float64: repeat the verdicts in double precision, and record changes.
        rigorous: of the certified samples, also prove what holds in spite of rounding, by an interval arithmetic that
            bounds all rounding errors, on the CPU (:mod:`lirpa_fastwarmup.verification.rigorous`).
        abcrown: how to run α,β-CROWN, for the method "abcrown", which decides the samples that the other methods leave
            open, on a network of one input. Certificates record its outcomes, including failures.
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
    attack_and_data = pgd_steps, restarts, bounded.layout.pack_range(input_range), batch_size, seed
    kinds = {_precision_of(bounded): None} | ({torch.float64: None} if float64 else {})
    _check_complete(bounded, abcrown, ordered(methods), float64=torch.float64 in kinds)
    settings = "" if abcrown is None else str(abcrown.configuration())
    plan = Plan(ordered(methods), *attack_and_data, float64=float64, rigorous=rigorous, complete=settings)
    options = {"indices": indices, "journal": journal, "progress": progress, "over_ranks": over_ranks}
    bounds = [MarginBounds(bounded, kind) for kind in kinds]
    with ExitStack() as stack:
        complete = None
        if abcrown is not None:
            given = copy_of(bounded.wrapped).float().cpu().eval(), bounded.example[0], journal
            verifier = CompleteVerifier(abcrown, *given, fingerprint(bounds[0].bounded("IBP")))
            complete = stack.enter_context(closing(verifier))
        certifier = Certifier(bounds, plan, bounded, complete=complete)
        return _verification(bounds[0].bounded("IBP"), samples, eps, packed, certifier, warn=True, **options)


def _check_complete(bounded: BoundedModule, abcrown: ABCrown | None, methods: Sequence[str], *, float64: bool) -> None:
    if (COMPLETE in methods) != (abcrown is not None):
        text = f"the method {COMPLETE!r} and the argument abcrown=verification.ABCrown(checkout) need each other; "
        raise ValueError(text + f"found methods={methods} and abcrown={abcrown}")
    if abcrown is not None and (float64 or not bounded.layout.is_single):
        what = "in float32" if float64 else "on networks of one input"
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
    plan = Plan(("IBP",), pgd_steps, restarts, bounded.layout.pack_range(input_range), batch_size, seed)
    with unchanged(bounded.wrapped):
        network = MarginBounds(bounded.eval(), _precision_of(bounded), live=True)
        certifier = Certifier([network], plan, bounded, check=check)
        return _verification(bounded, samples, eps, packed, certifier, warn=False, over_ranks=over_ranks)


def _verification(
    bounded: BoundedModule, samples: Samples, eps: Any, packed: Any, certifier: Certifier, warn: bool, **options: Any
) -> Verification:
    options |= {"screen": certifier.screen if certifier.plan.screens else None, "eps": packed}
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
    if isinstance(eps, tuple | list):
        return list(map(_plain, eps))
    # A subclass of float may print differently, such as 8/255.
    return eps.tolist() if isinstance(eps, Tensor) else eps if isinstance(eps, float) else float(eps)


def _precision_of(bounded: BoundedModule) -> torch.dtype:
    """The dtype of the network's certificates: float64 if any of its state is, else float32; TypeError for others."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("the checks need gradients, which torch.inference_mode() forbids: call this outside of it")
    state = dict(bounded.wrapped.named_parameters()) | dict(bounded.wrapped.named_buffers())
    for name, value in state.items():
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"certificates are of float32 or float64 networks; {name!r} is {value.dtype}: use .float()")
    return torch.float64 if any(value.dtype == torch.float64 for value in state.values()) else torch.float32


def check_network(bounded: Any) -> BoundedModule:
    """Refuse a network that cannot be verified, with the errors of :func:`verify`; return this package's view of it."""
    bounded = view_of(bounded)
    _precision_of(bounded)
    training = [name or "the network itself" for name, module in bounded.wrapped.named_modules() if module.training]
    if training:
        text = f"the network is in training mode ({', '.join(training[:3])}{', …' if len(training) > 3 else ''}), "
        raise ValueError(text + "where a sample's output depends on the rest of its batch: call bounded.eval()")
    class_count(bounded)
    if not bounded.any_batch and len(bounded.example[0]) > 1:  # Batches of one sample suffice.
        text = f"the network accepts only batches of {len(bounded.example[0])}, but methods run on smaller batches: "
        raise ValueError(text + "keep its first dimension open, x.view(len(x), …)")
    return bounded


def certified_radii(
    bounded: Any,
    samples: Samples,
    methods: Sequence[str] = ("IBP", "CROWN-IBP"),
    *,
    largest: float = 1.0,
    tolerance: float = 1e-4,
    pgd_steps: int = 50,
    restarts: int = 1,
    input_range: Any = (0.0, 1.0),
    batch_size: int = 100,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    journal: Journal | None = None,
    progress: Callable[[Sequence[Radius]], None] | None = None,
    over_ranks: bool = False,
) -> list[Radius]:
    """For each sample the largest radius, to within ``tolerance``, at which one of ``methods`` certifies it.

    Each method starts from the radius that a cheaper one proved, increases it in doubling steps, and then bisects. The
    returned radius was itself certified, and so are all smaller ones, whose boxes lie within. PGD then attacks each
    box, as a check. Arguments and errors are as for :func:`lirpa_fastwarmup.verify` (``progress`` gets radii), and:

    Args:
        largest: upper end of the search, in units of the input.
        tolerance: of the search, in units of the input; the precision limits it further.

    Raises:
        ValueError: ``tolerance`` is not above 0 or not below ``largest``.
        UnsoundBoundError: a point of a certified box is misclassified; the error's ``result`` holds the radii.
    """
    bounded = check_network(bounded)
    if not all(x.is_floating_point() for x in bounded.example):
        raise ValueError("radii are searched for floating-point inputs only: use verify, with radius 0 for integers")
    if not 0 < tolerance < largest < float("inf"):
        raise ValueError(f"the search needs 0 < tolerance < largest; found tolerance {tolerance}, largest {largest}")
    if COMPLETE in ordered(methods):
        raise ValueError(f"radii are searched by bounds alone, not by {COMPLETE}: verify the radii of interest with it")
    plan = Plan(ordered(methods), pgd_steps, restarts, bounded.layout.pack_range(input_range), batch_size, seed)
    bounds = MarginBounds(bounded, _precision_of(bounded))
    search = _Search(bounds, plan, largest, tolerance, untested=bool(bounded.untested))
    conditions = {"largest": largest, "tolerance": tolerance}
    options: dict[str, Any] = {"indices": indices, "journal": journal, "progress": progress, "over_ranks": over_ranks}
    found = over_batches(bounds.bounded("IBP"), samples, search.radii, Radius, plan, conditions, eps=1.0, **options)
    if found.contradictions:
        raise UnsoundBoundError(found.sentences(), found.certificates)
    return found.certificates


class _Search:
    """Finds the radii of batches, and checks the methods on the first one."""

    def __init__(self, network: MarginBounds, plan: Plan, largest: float, tolerance: float, *, untested: bool) -> None:
        self._network, self._plan, self._micro_batches = network, plan, plan.micro_batches()
        self._largest, self._tolerance, self._untested, self._checked = largest, tolerance, untested, False

    @torch.no_grad()
    def radii(self, x: Tensor, y: Tensor, _: Any) -> BatchResult[Radius]:
        x = converted(x, self._network.dtype, 10 * self._tolerance)
        methods = self._plan.methods
        with exact_arithmetic(x.device):
            predictions = predicted(self._network.model(x))
            correct = (predictions == y).nonzero().squeeze(1)
            radius, method = torch.zeros(len(y), device=x.device), torch.full_like(y, -1)
            for place, name in enumerate(methods):
                if len(correct):
                    found = self._bisect(name, x, y, correct, radius)
                    method[correct[found > radius[correct]]] = place
                    radius[correct] = found
            eps = radius.view(-1, *[1] * (x.ndim - 1))
            columns = torch.arange(len(y)), y, predictions, radius, method, self._falsified(x, y, eps)
            check = partial(find_contradictions, self._network, x, y, eps, input_range=self._plan.input_range)
            unchecked = () if self._checked else methods
            contradictions = [one for name in unchecked for one in dict(check(method=name)).items()]
            self._checked = True
        names = {-1: None, **dict(enumerate(methods))}
        radii = [
            Radius(index, label, prediction, size, names[place], falsified, self._untested)
            for index, label, prediction, size, place, falsified in zip(*(one.tolist() for one in columns), strict=True)
        ]
        text = "is proved by {} at {:g} and misclassified at a point of that box"
        contradictions += [(one.index, text.format(one.method, one.radius)) for one in radii if one.falsified]
        return BatchResult(radii, contradictions=contradictions)

    def _bisect(self, method: str, x: Tensor, y: Tensor, samples: Tensor, proven: Tensor) -> Tensor:
        """The largest radii of ``samples`` that ``method`` certifies, at least ``proven``."""
        low = proven[samples]

        def margins(radius: Tensor, some: Tensor) -> Tensor:
            where, eps = samples[some], radius[some].view(-1, *[1] * (x.ndim - 1))
            return self._network.lower(input_box(x[where], eps, self._plan.input_range), y[where], method)

        step = torch.clamp(low / 8, min=16 * self._tolerance)  # It doubles, as bounds at far too large radii cost most.
        failed = torch.full_like(low, torch.inf)
        while True:
            trial = torch.where(failed.isfinite(), (low + failed) / 2, (low + step).clamp(max=self._largest))
            between = (trial > low) & (trial < failed)  # False where there is no radius in between.
            open_ = (low < self._largest) & (failed - low > self._tolerance) & (between | ~failed.isfinite())
            left = open_.nonzero().squeeze(1)
            if len(left) == 0:
                return low
            at_once = self._network.at_once(method)
            holds = proved(self._micro_batches[method].each(partial(margins, trial), left, method, at_once))
            low[left] = torch.where(holds, trial[left], low[left])
            failed[left] = torch.where(holds, failed[left], trial[left])
            step *= 2

    def _falsified(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        certified = (eps.flatten() > 0).nonzero().squeeze(1)
        falsified = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        if len(certified) and self._plan.restarts:
            model, plan = self._network.model, self._plan
            points = attack_samples(model, x, y, eps, certified, plan, self._micro_batches[ATTACK])
            falsified[certified] = predicted(model(points)) != y[certified]
        return falsified
