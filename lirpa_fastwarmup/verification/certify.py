"""One batch through the attack and the bounding methods, each on the samples that are still open."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.attacks import attack, random_starts
from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends
from lirpa_fastwarmup.engine.bounds import input_box, proved
from lirpa_fastwarmup.engine.methods import METHODS, MarginBounds
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import PROBED, class_margins, contradicted, find_contradictions, per_sample
from lirpa_fastwarmup.memory import MicroBatches
from lirpa_fastwarmup.verification.reference import beyond_intervals
from lirpa_fastwarmup.verification.result import Certificate, Stage

ATTACK = "PGD"
_VERDICT = {True: "verified", False: "not verified"}


@dataclass(frozen=True)
class Plan:
    """What is done to every batch.

    Attributes:
        methods: bounding methods, cheapest first.
        pgd_steps, restarts: of the attack; no attack is made where ``restarts`` is 0.
        input_range: lowest and highest valid input.
        float64: whether all verdicts are repeated in double precision.
        batch_size: samples of a batch.
        seed: of the attack.
    """

    methods: tuple[str, ...]
    pgd_steps: int
    restarts: int
    input_range: InputRange | None
    float64: bool
    batch_size: int
    seed: int


@dataclass
class BatchResult:
    """Certificates of a batch, indices counted from 0, and what was done for them.

    ``contradictions`` are pairs of an index and what is contradictory about that sample.
    """

    certificates: list[Certificate] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    contradictions: list[tuple[int, str]] = field(default_factory=list)

    def certificates_from(self, first: int) -> list[Certificate]:
        """The certificates, counted from ``first``: their places among the samples of all batches."""
        return [replace(sample, index=first + sample.index) for sample in self.certificates]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BatchResult:
        """What :meth:`as_dict` was made from."""
        return cls(
            [Certificate(**certificate) for certificate in values["certificates"]],
            {name: Stage(**stage) for name, stage in values["stages"].items()},
            [(index, text) for index, text in values["contradictions"]],
        )


@dataclass
class _Verdicts:
    """What one precision says of a batch.

    Attributes:
        predictions: the network's classes, shape (batch,).
        refuted: whether the sample itself or the attack's point is misclassified.
        method: place of the method that proved the sample in :data:`METHODS`, −1 for none.
        margin: largest lower bound on the smallest margin, NaN for none.
    """

    predictions: Tensor
    refuted: Tensor
    method: Tensor
    margin: Tensor


def ordered(methods: Sequence[str]) -> tuple[str, ...]:
    """``methods``, each once, cheapest first.

    Raises:
        ValueError: there is none, or one that is unknown.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or isinstance(methods, str):
        found = f"unknown method {unknown[0]!r}" if unknown and not isinstance(methods, str) else f"methods={methods!r}"
        raise ValueError(f"{found}; name at least one of {', '.join(METHODS)}, as a sequence")
    return tuple(method for method in METHODS if method in methods)


class Certifier:
    """Certifies one batch after the other by one plan, in exact arithmetic.

    Args:
        bounds: the network's bounds in each precision; the first one's verdicts are reported.
        plan: what to do.
        untested: whether they have not been tested.
        check: check the bounds of each method on the first samples that it sees.
    """

    def __init__(self, bounds: Sequence[MarginBounds], plan: Plan, *, untested: bool, check: bool = True) -> None:
        self.plan = plan
        self._bounds = tuple(bounds)
        self._untested = untested
        self._unchecked = {(method, one.dtype) for method in plan.methods for one in bounds} if check else set()
        self._parts = {name: MicroBatches(plan.batch_size) for name in (ATTACK, *plan.methods)}

    @torch.no_grad()
    def certify(self, x: Tensor, y: Tensor, eps: Epsilon) -> BatchResult:
        """Attack and bound the samples ``x`` with labels ``y`` in their boxes of radius ``eps``.

        Raises:
            NotImplementedError: the engine has no such bounds for the network.
            OutOfMemoryError: one sample does not fit into memory.
        """
        with exact_arithmetic(x.device):
            result = BatchResult()
            points = self._attacked_points(x.to(self._bounds[0].dtype), y, eps, result)
            first = self._verdicts(self._bounds[0], x, y, eps, points, result)
            second = None
            if len(self._bounds) > 1:
                ignored = BatchResult(contradictions=result.contradictions)
                second = self._verdicts(self._bounds[1], x, y, eps, points, ignored)
            result.certificates = self._certificates(y, first, second)
        return result

    def _attacked_points(self, x: Tensor, y: Tensor, eps: Epsilon, result: BatchResult) -> Tensor | None:
        """Of each sample the worst point that was found, in the first precision; ``None`` without an attack."""
        plan = self.plan
        if not plan.restarts:
            return None
        started = time.perf_counter()
        model = self._bounds[0].model
        # The same points whatever was done before, so that an interrupted verification goes on as it would have.
        starts = random_starts(x, plan.restarts, torch.Generator().manual_seed(plan.seed))
        radii = per_sample(eps, x)

        def points(part: Tensor) -> Tensor:
            return attack(
                model,
                x[part],
                y[part],
                radii(part),
                steps=plan.pgd_steps,
                restarts=plan.restarts,
                input_range=plan.input_range,
                starts=starts[:, part.cpu()],
            ).points

        found = self._parts[ATTACK].each(points, _all(y), ATTACK)
        hits = int((model(found).argmax(1) != y).sum())
        result.stages[ATTACK] = Stage(len(y), hits, time.perf_counter() - started)
        return found

    def _verdicts(
        self, network: MarginBounds, x: Tensor, y: Tensor, eps: Epsilon, points: Tensor | None, result: BatchResult
    ) -> _Verdicts:
        """Bound the batch by ``network``; stages and contradictions go into ``result``."""
        dtype = network.dtype
        x = x.to(dtype)
        clean = worst = network.model(x)
        attained = [class_margins(clean, y)]
        if points is not None:
            lower, upper = box_ends(x, eps, self.plan.input_range)
            points = torch.min(torch.max(points.to(dtype), lower), upper)
            worst = network.model(points)
            attained.append(class_margins(worst, y))
        predictions = clean.argmax(1)
        verdicts = _Verdicts(
            predictions,
            (predictions != y) | (worst.argmax(1) != y),
            torch.full_like(y, -1),
            torch.full(y.shape, torch.nan, dtype=dtype, device=y.device),
        )
        for place, method in enumerate(self.plan.methods):
            # The cheapest is asked of every sample, so that what must not be proved gets its chance to be.
            left = _all(y) if place == 0 else ((verdicts.method < 0) & ~verdicts.refuted).nonzero().squeeze(1)
            if len(left):
                self._bound(network, method, x, y, eps, left, points, attained, verdicts, result)
        for index in ((verdicts.method >= 0) & verdicts.refuted).nonzero().flatten().tolist():
            text = f"is proved by {METHODS[int(verdicts.method[index])]} and yet misclassified at a point of its box"
            result.contradictions.append((index, f"{text} ({_name(dtype)})"))
        return verdicts

    def _bound(
        self,
        network: MarginBounds,
        method: str,
        x: Tensor,
        y: Tensor,
        eps: Epsilon,
        samples: Tensor,
        points: Tensor | None,
        attained: Sequence[Tensor],
        verdicts: _Verdicts,
        result: BatchResult,
    ) -> None:
        """Bound the margins of ``samples`` by ``method``, and take down what that proves or contradicts."""
        started = time.perf_counter()
        radii = per_sample(eps, x)

        def bounds(part: Tensor) -> Tensor:
            return network.lower(input_box(x[part], radii(part), self.plan.input_range), y[part], method)

        lower = self._parts[method].each(bounds, samples, method)
        proves = proved(lower)
        verdicts.method[samples[proves]] = METHODS.index(method)
        verdicts.margin[samples] = torch.fmax(verdicts.margin[samples], lower.amin(1))
        result.stages[method] = Stage(len(samples), int(proves.sum()), time.perf_counter() - started)
        wrong = torch.stack([contradicted(lower, margins[samples]) for margins in attained]).any(0)
        for index in samples[wrong].tolist():
            text = f"has a smaller margin at a point of its box than {method}'s lower bound ({_name(x.dtype)})"
            result.contradictions.append((index, text))
        if (method, x.dtype) in self._unchecked:
            self._unchecked.remove((method, x.dtype))
            given = None if points is None else points[samples]
            found = self._check(network, method, x[samples], y[samples], radii(samples), given)
            for place, text in dict(found).items():
                result.contradictions.append((int(samples[place]), f"{text} ({_name(x.dtype)})"))

    def _check(
        self, network: MarginBounds, method: str, x: Tensor, y: Tensor, eps: Epsilon, points: Tensor | None
    ) -> list[tuple[int, str]]:
        """What is wrong with the bounds of ``method`` on the first samples that it sees."""
        input_range, most = self.plan.input_range, self._parts[method].size
        found = find_contradictions(network, x, y, eps, method, input_range, points=points, most=most)
        if method == "IBP":
            some = torch.arange(min(len(x), PROBED), device=x.device)
            found += beyond_intervals(network.bounded(method), x[some], per_sample(eps, x)(some), input_range)
        return found

    def _certificates(self, y: Tensor, first: _Verdicts, second: _Verdicts | None) -> list[Certificate]:
        labels, predictions, places = y.tolist(), first.predictions.tolist(), first.method.tolist()
        if second is not None:  # A verdict needs both precisions.
            places = torch.where(second.method >= 0, first.method, second.method).tolist()
        attacked = first.refuted.tolist()
        changes = [None] * len(y) if second is None else _changes(first, second)
        return [
            Certificate(
                index=index,
                label=labels[index],
                prediction=predictions[index],
                verified=places[index] >= 0,
                method=METHODS[places[index]] if places[index] >= 0 else None,
                margin=float(first.margin[index]),
                attacked=attacked[index] if self.plan.restarts else None,
                float64=changes[index],
                untested=self._untested,
            )
            for index in range(len(y))
        ]


def _all(y: Tensor) -> Tensor:
    return torch.arange(len(y), device=y.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _changes(first: _Verdicts, second: _Verdicts) -> list[str | None]:
    """For each sample, what double precision says otherwise."""
    changes: list[str | None] = []
    for index in range(len(first.method)):
        texts = []
        before, after = bool(first.method[index] >= 0), bool(second.method[index] >= 0)
        if before != after:
            texts.append(f"{_VERDICT[before]} -> {_VERDICT[after]}")
        if bool(first.refuted[index] != second.refuted[index]):
            texts.append("misclassified in only one precision at a point of its box")
        if int(first.predictions[index]) != int(second.predictions[index]):
            texts.append(f"prediction {int(first.predictions[index])} -> {int(second.predictions[index])}")
        changes.append("; ".join(texts))
    return changes
