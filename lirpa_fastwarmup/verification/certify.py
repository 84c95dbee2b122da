"""Certifies batches: IBP alone first, then the attack and each further method on what is still undecided."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.attacks import attack, predicted
from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends, converted, is_per_sample, radii_of
from lirpa_fastwarmup.engine import soundness
from lirpa_fastwarmup.engine.bounds import METHODS, MarginBounds, input_box, proved
from lirpa_fastwarmup.engine.equality import same_outputs
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import Finding
from lirpa_fastwarmup.memory import MicroBatches
from lirpa_fastwarmup.verification.complete import CompleteVerifier
from lirpa_fastwarmup.verification.intervals import Interval, interval_bounds
from lirpa_fastwarmup.verification.result import ATTACK, COMPLETE, RIGOROUS, BatchResult, Certificate, Stage
from lirpa_fastwarmup.verification.rigorous import RigorousMargins, box_around

logger = logging.getLogger(__name__)

NAMES = (*METHODS, COMPLETE)  # Cheapest first.
_CHECKED, _FEWEST = 0.05, 10  # The fraction, and the fewest of a batch, of proved samples that are attacked too.


@dataclass(frozen=True)
class Plan:
    """What to compute for every batch; see :func:`lirpa_fastwarmup.verify` for the fields."""

    methods: tuple[str, ...]
    pgd_steps: int
    restarts: int
    input_range: InputRange | None
    batch_size: int
    seed: int
    float64: bool = False
    rigorous: bool = False
    complete: str = ""  # The settings of the method "abcrown".

    @property
    def screens(self) -> bool:
        """Whether the first method is cheap, and decides samples before anything else runs."""
        return self.methods[0] == "IBP" and (self.restarts > 0 or len(self.methods) > 1)

    def micro_batches(self) -> dict[str, MicroBatches]:
        """One for the attack and one for each method, which differ in the memory they need."""
        return {name: MicroBatches(self.batch_size) for name in (ATTACK, *self.methods)}


def method_named(name: str) -> str:
    """The name in :data:`NAMES` that equals ``name`` up to case, otherwise ``name``."""
    return {method.lower(): method for method in NAMES}.get(str(name).lower(), name)


def ordered(methods: Sequence[str]) -> tuple[str, ...]:
    """``methods``, in any case, each once, cheapest first."""
    names = [] if isinstance(methods, str) else [method_named(method) for method in methods]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        found = f"unknown method {unknown[0]!r}" if unknown else f"methods={methods!r}"
        raise ValueError(f"{found}; name at least one of {', '.join(NAMES)}, as a sequence")
    return tuple(method for method in NAMES if method in names)


def attack_samples(
    model: nn.Module, x: Tensor, y: Tensor, eps: Epsilon, samples: Tensor, plan: Plan, micro_batches: MicroBatches
) -> Tensor:
    """The worst points that the attack finds for ``samples``, indices into the batch, in micro-batches."""
    # The starts depend on the seed and a sample's place alone, so that an interrupted run resumes with the same ones.
    starts = torch.rand((plan.restarts, *x.shape), generator=torch.Generator().manual_seed(plan.seed))
    options: dict[str, Any] = {"steps": plan.pgd_steps, "restarts": plan.restarts, "input_range": plan.input_range}

    def attacked(some: Tensor) -> Tensor:
        return attack(model, x[some], y[some], radii_of(eps, x, some), **options, starts=starts[:, some.cpu()]).points

    return micro_batches.each(attacked, samples, ATTACK)


class _Batch:
    """A batch in one precision, and what is found about it; ``points`` are the attack's, one for each sample."""

    def __init__(
        self, network: MarginBounds, x: Tensor, y: Tensor, eps: Epsilon, plan: Plan, points: Tensor | None
    ) -> None:
        self.network, self.y, self.points = network, y, points
        self.x = converted(x, network.dtype, eps)
        self.radii = partial(radii_of, eps, x)
        logits = [network.model(self.x)]  # Of the samples, and of the attack's points.
        if points is not None:
            lower, upper = box_ends(self.x, eps, plan.input_range)
            self.points = torch.min(torch.max(points.to(self.x.dtype), lower), upper)
            logits.append(network.model(self.points))
        self.attained = [soundness.attained_margins(one, y) for one in logits]
        self.predictions = predicted(logits[0])
        self.falsified = torch.stack([predicted(one) != y for one in logits]).any(0)
        self.method = torch.full_like(y, -1)  # The place in NAMES of the cheapest proof; −1 without one.
        self.outcomes: dict[int, str] = {}  # Of complete verification, by the samples' places.
        self.margin = self.x.new_full(y.shape, torch.nan)  # The largest lower bound on the smallest margin.
        self.stages: dict[str, Stage] = {}
        self.contradictions: list[Finding] = []

    def contradict(self, index: int, text: str) -> None:
        self.contradictions.append((index, f"{text} ({str(self.x.dtype).removeprefix('torch.')})"))


class Certifier:
    """Certifies batches by one plan, in exact arithmetic; of ``bounds`` in several precisions, it reports the first.

    With ``check``, it checks the bounds of each method on the first samples that it runs on, attacked or not. If the
    plan asks for it, it proves rigorous statements of ``network`` too. ``complete`` runs the method "abcrown".
    """

    def __init__(
        self,
        bounds: Sequence[MarginBounds],
        plan: Plan,
        network: BoundedModule,
        *,
        complete: CompleteVerifier | None = None,
        check: bool = True,
    ) -> None:
        self.plan, self._bounds, self._network = plan, tuple(bounds), network
        self._complete, self._checks = complete, check
        self._rigorous = RigorousMargins(network.wrapped) if plan.rigorous else None
        if self._rigorous:  # Refuses operators without rules before any sample is bounded.
            ends = [x.double().cpu() if x.is_floating_point() else x.cpu() for x in network.example]
            points = [Interval(x, x) if x.is_floating_point() else x for x in ends]
            self._rigorous.statements(points, torch.zeros(len(ends[0]), dtype=torch.int64))
        self._checked: set[tuple[str, torch.dtype, bool]] = set()  # By method, precision, and whether attacked.
        self._micro_batches = plan.micro_batches()

    @torch.no_grad()
    def screen(self, x: Tensor, y: Tensor, eps: Epsilon) -> BatchResult[Certificate]:
        """Certificates of misclassified samples, and of proved ones but a seeded few, for :meth:`certify` to attack."""
        result = self._certified(x, y, eps, self.plan.methods[:1], restarts=0)
        proved = [one for one in result.certificates if one.verified]
        count = max(_FEWEST, math.ceil(_CHECKED * len(proved))) if self.plan.restarts else 0
        drawn = torch.randperm(len(proved), generator=torch.Generator().manual_seed(self.plan.seed))
        attacked = {proved[place].index for place in drawn[:count].tolist()}
        decided = [one for one in result.certificates if (one.verified or not one.correct) and not one.float64]
        result.certificates = [one for one in decided if one.index not in attacked]
        self._state(x, eps, result)
        return result

    @torch.no_grad()
    def certify(self, x: Tensor, y: Tensor, eps: Epsilon) -> BatchResult[Certificate]:
        """Attack and bound the samples ``x`` with labels ``y`` in their boxes of radius ``eps``."""
        result = self._certified(x, y, eps, self.plan.methods, self.plan.restarts)
        if self.plan.screens:  # These samples count already.
            result.stages["IBP"] = Stage(seconds=result.stages["IBP"].seconds)
        self._state(x, eps, result)
        return result

    def _certified(
        self, x: Tensor, y: Tensor, eps: Epsilon, methods: Sequence[str], restarts: int
    ) -> BatchResult[Certificate]:
        """The certificates by ``methods`` and an attack; of a second precision, the stages are left out."""
        stages: dict[str, Stage] = {}
        with exact_arithmetic(x.device):
            points = self._attack(x.to(self._bounds[0].dtype), y, eps, stages) if restarts else None
            batches = [_Batch(network, x, y, eps, self.plan, points) for network in self._bounds]
            for batch in batches:
                self._bound_all(batch, methods)
            certificates = self._certificates(batches, eps)
        contradictions = [one for batch in batches for one in batch.contradictions]
        return BatchResult(certificates, stages | batches[0].stages, contradictions)

    def _state(self, x: Tensor, eps: Epsilon, result: BatchResult[Certificate]) -> None:
        """Add to the certificates what holds in spite of rounding, if the plan asks for it."""
        if self._rigorous is None:
            return
        started = time.perf_counter()
        proved = [place for place, one in enumerate(result.certificates) if one.verified]
        some = torch.tensor([result.certificates[place].index for place in proved], dtype=torch.int64, device=x.device)
        box = box_around(x[some], radii_of(eps, x, some), self.plan.input_range)
        ends = zip(*map(self._network.layout.unpack, (box.lower, box.upper)), strict=True)
        inputs = [Interval(low, high) if low.is_floating_point() else low for low, high in ends]
        y = torch.tensor([result.certificates[place].label for place in proved], dtype=torch.int64)
        statements = self._rigorous.statements(inputs, y) if proved else []
        for place, statement in zip(proved, statements, strict=True):
            result.certificates[place] = replace(result.certificates[place], rigorous=statement)
        hits = len(proved) - statements.count(None)
        result.stages[RIGOROUS] = Stage(len(proved), hits, time.perf_counter() - started)

    def _attack(self, x: Tensor, y: Tensor, eps: Epsilon, stages: dict[str, Stage]) -> Tensor:
        started = time.perf_counter()
        model, samples = self._bounds[0].model, torch.arange(len(y), device=y.device)
        points = attack_samples(model, x, y, eps, samples, self.plan, self._micro_batches[ATTACK])
        stages[ATTACK] = Stage(len(y), int((predicted(model(points)) != y).sum()), time.perf_counter() - started)
        return points

    def _bound_all(self, batch: _Batch, methods: Sequence[str]) -> None:
        for place, method in enumerate(methods):
            every = place == 0 and method != COMPLETE  # Falsified samples too: a proof of one shows unsound bounds.
            left = (((batch.method < 0) & ~batch.falsified) | every).nonzero().squeeze(1)
            if len(left) and method == COMPLETE:
                self._decide(batch, left)
            elif len(left):
                self._bound(batch, method, left)
            if every and self._checks:  # In micro-batches that fit the bounds, which need more memory.
                self._compare(batch, method)
        for index in ((batch.method >= 0) & batch.falsified).nonzero().flatten().tolist():
            method = NAMES[int(batch.method[index])]
            batch.contradict(index, f"is proved by {method} and yet misclassified at a point of its box")

    def _compare(self, batch: _Batch, method: str) -> None:
        """Contradict where the bounded network has other outputs than the network at a known point of a box."""
        network, every = batch.network, torch.arange(len(batch.y), device=batch.y.device)
        corners = soundness.corners_of(batch.x, batch.radii(every), self.plan.input_range)

        def same(some: Tensor, points: Tensor) -> Tensor:
            return same_outputs(network.bounded(method)(points[some]), network.model, [points[some]])

        for points in (batch.x, *corners, *([] if batch.points is None else [batch.points])):
            differ = ~self._micro_batches[method].each(partial(same, points=points), every, method)
            for index in differ.nonzero().flatten().tolist():
                batch.contradict(index, "has other outputs than the bounded network at a point of its box")

    def _decide(self, batch: _Batch, samples: Tensor) -> None:
        assert self._complete is not None
        started = time.perf_counter()
        ends = box_ends(batch.x[samples], batch.radii(samples), self.plan.input_range)
        for index, lower, upper in zip(samples.tolist(), *(end.cpu() for end in ends), strict=True):
            found = self._complete.outcome(lower, upper, int(batch.y[index]), batch.network.classes)
            batch.outcomes[index], batch.falsified[index] = found, found == "falsified"
            if found == "certified":
                batch.method[index] = NAMES.index(COMPLETE)
        hits = int((batch.method[samples] >= 0).sum())
        batch.stages[COMPLETE] = Stage(len(samples), hits, time.perf_counter() - started)

    def _bound(self, batch: _Batch, method: str, samples: Tensor) -> None:
        """Bound the margins of ``samples`` by ``method``, and record what that proves or contradicts."""
        started = time.perf_counter()
        network, x, y = batch.network, batch.x, batch.y

        def bounds(some: Tensor) -> Tensor:
            return network.lower(input_box(x[some], batch.radii(some), self.plan.input_range), y[some], method)

        lower = self._micro_batches[method].each(bounds, samples, method, network.at_once(method))
        proves = proved(lower)
        batch.method[samples[proves]] = METHODS.index(method)
        batch.margin[samples] = torch.fmax(batch.margin[samples], lower.amin(1))
        batch.stages[method] = Stage(len(samples), int(proves.sum()), time.perf_counter() - started)
        wrong = torch.stack([soundness.contradicted(lower, margins[samples]) for margins in batch.attained]).any(0)
        for index in samples[wrong].tolist():
            batch.contradict(index, f"has a smaller margin at a point of its box than {method}'s lower bound")
        key = method, x.dtype, batch.points is not None
        if self._checks and key not in self._checked:
            self._checked.add(key)
            for at, text in dict(self._check(batch, method, samples)).items():
                batch.contradict(int(samples[at]), text)

    def _check(self, batch: _Batch, method: str, samples: Tensor) -> list[Finding]:
        """Contradictions in the bounds of ``method`` on some of ``samples``, by their place among these."""
        network, input_range = batch.network, self.plan.input_range
        x, y, eps, most = batch.x[samples], batch.y[samples], batch.radii(samples), self._micro_batches[method].size
        points = None if batch.points is None else batch.points[samples]
        found = soundness.find_contradictions(network, x, y, eps, method, input_range, points=points, most=most)
        if method in ("IBP", self.plan.methods[0]):
            some = torch.arange(min(len(x), soundness.PROBED), device=x.device)
            found += beyond_intervals(network.bounded(method), x[some], radii_of(eps, x, some), input_range)
        return found

    def _certificates(self, batches: Sequence[_Batch], eps: Epsilon) -> list[Certificate]:
        first, second = batches[0], batches[-1] if len(batches) > 1 else None  # A proof needs both precisions.
        places = first.method if second is None else torch.where(second.method >= 0, first.method, second.method)
        labels, predictions, found = first.y.tolist(), first.predictions.tolist(), first.falsified.tolist()
        radii = eps.flatten(1).amax(1).expand(len(labels)).tolist() if is_per_sample(eps, first.x) else None

        def falsified(index: int) -> bool | None:
            if found[index] and (self.plan.restarts > 0 or self._complete is not None):
                return True
            # IBP alone decided the sample, or α,β-CROWN failed on it.
            unsearched = first.points is None and first.outcomes.get(index, "error").startswith("error")
            return None if unsearched else False

        return [
            Certificate(
                index=index,
                label=labels[index],
                prediction=predictions[index],
                verified=place >= 0,
                method=NAMES[place] if place >= 0 else None,
                margin=float(first.margin[index]),
                falsified=falsified(index),
                float64=None if second is None else _changes(first, second, index),
                untested=bool(self._network.untested),
                eps=None if radii is None else radii[index],
                complete=first.outcomes.get(index),
            )
            for index, place in enumerate(places.tolist())
        ]


def _changes(first: _Batch, second: _Batch, index: int) -> str:
    texts = []
    before, after = bool(first.method[index] >= 0), bool(second.method[index] >= 0)
    if before != after:
        texts.append("verified -> not verified" if before else "not verified -> verified")
    if bool(first.falsified[index] != second.falsified[index]):
        texts.append("misclassified in only one precision at a point of its box")
    if int(first.predictions[index]) != int(second.predictions[index]):
        texts.append(f"prediction {int(first.predictions[index])} -> {int(second.predictions[index])}")
    return "; ".join(texts)


@torch.no_grad()
def beyond_intervals(bounded: BoundedModule, x: Tensor, eps: Epsilon, input_range: InputRange | None) -> list[Finding]:
    """Samples whose IBP bounds are tighter than interval arithmetic: one of them is wrong. None without rules."""
    try:
        ends = zip(*map(bounded.layout.unpack, soundness.corners_of(x, eps, input_range)), strict=True)
        boxes = [(low, high) if low.is_floating_point() else low for low, high in ends]
        reference = interval_bounds(bounded.wrapped, *boxes)
    except Exception as error:  # Its trace fails in many ways.
        logger.info("IBP is not compared with interval arithmetic on this network: %s", error)
        return []
    found = bounded.compute_bounds(x=(input_box(x, eps, input_range),), method="IBP")
    above = found[0] > reference[0].to(x) + soundness.tolerance(found[0], reference[0].to(x))
    below = found[1] < reference[1].to(x) - soundness.tolerance(found[1], reference[1].to(x))
    tighter = (above | below).flatten(1).any(1).nonzero().flatten().tolist()
    return [(place, "has tighter IBP bounds on its outputs than interval arithmetic") for place in tighter]
