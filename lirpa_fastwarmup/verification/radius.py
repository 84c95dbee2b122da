"""The largest radius that can be certified for each sample, by doubling steps and bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import MarginBounds, input_box, proved
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import Finding, UnsoundBoundError, find_contradictions
from lirpa_fastwarmup.verification.certify import Plan, attack_samples, ordered
from lirpa_fastwarmup.verification.evaluate import Samples, check_network, over_batches
from lirpa_fastwarmup.verification.journal import Journal
from lirpa_fastwarmup.verification.result import ATTACK, BatchResult, Radius


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
    certified box, as a check.

    Args:
        largest: upper end of the search, in units of the input.
        tolerance: of the search, in units of the input; float32 limits it further.
        progress: called with the radii of each finished batch.
        bounded, samples, methods, pgd_steps, restarts, input_range, batch_size, seed, indices, journal, over_ranks:
            see :func:`lirpa_fastwarmup.verify`.

    Raises:
        ValueError: ``tolerance`` is not above 0 or not below ``largest``.
        UnsoundBoundError: a point of a certified box is misclassified; the error's ``result`` holds the radii.
        Exception: see :func:`lirpa_fastwarmup.verify`.
    """
    bounded = check_network(bounded)
    if not all(x.is_floating_point() for x in bounded.example):
        raise ValueError("radii are searched for floating-point inputs only: use verify, with radius 0 for integers")
    if not 0 < tolerance < largest < float("inf"):
        raise ValueError(
            "the search runs from 0 to largest, to within tolerance, and needs 0 < tolerance < largest; found "
            f"tolerance {tolerance} and largest {largest}"
        )
    plan = Plan(ordered(methods), pgd_steps, restarts, bounded.layout.pack_range(input_range), False, batch_size, seed)
    search = _Search(MarginBounds(bounded, torch.float32), plan, largest, tolerance, untested=bool(bounded.untested))
    conditions = {"largest": largest, "tolerance": tolerance}
    options: dict[str, Any] = {"indices": indices, "journal": journal, "progress": progress, "over_ranks": over_ranks}
    found = over_batches(bounded, samples, search.radii, Radius, plan, conditions, eps=1.0, **options)
    if found.contradictions:
        raise UnsoundBoundError(found.sentences(), found.certificates)
    return found.certificates


class _Search:
    """Finds the radii of batches, and checks the methods on the first one."""

    def __init__(self, network: MarginBounds, plan: Plan, largest: float, tolerance: float, *, untested: bool) -> None:
        self._network, self._plan = network, plan
        self._largest, self._tolerance = largest, tolerance
        self._untested = untested
        self._micro_batches = plan.micro_batches()
        self._checked = False

    @torch.no_grad()
    def radii(self, x: Tensor, y: Tensor, _: Any) -> BatchResult[Radius]:
        """The radii of a batch, and contradictions."""
        x = x.float()
        methods = self._plan.methods
        with exact_arithmetic(x.device):
            predictions = self._network.model(x).argmax(1)
            correct = (predictions == y).nonzero().squeeze(1)
            radius = torch.zeros(len(y), device=x.device)
            method = torch.full_like(y, -1)
            for place, name in enumerate(methods):
                if len(correct):
                    found = self._bisect(name, x, y, correct, radius)
                    method[correct[found > radius[correct]]] = place
                    radius[correct] = found
            eps = radius.view(-1, *[1] * (x.ndim - 1))
            columns = y, predictions, radius, method, self._falsified(x, y, eps)
            contradictions = [] if self._checked else self._contradictions(x, y, eps)
            self._checked = True
        radii = [
            Radius(index, label, prediction, size, methods[place] if place >= 0 else None, falsified, self._untested)
            for index, (label, prediction, size, place, falsified) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True)
            )
        ]
        text = "is proved by {} at {:g} and misclassified at a point of that box"
        contradictions += [(one.index, text.format(one.method, one.radius)) for one in radii if one.falsified]
        return BatchResult(radii, contradictions=contradictions)

    def _contradictions(self, x: Tensor, y: Tensor, eps: Tensor) -> list[Finding]:
        """Contradictions in the bounds of the methods over the certified boxes."""
        input_range = self._plan.input_range
        found = (find_contradictions(self._network, x, y, eps, name, input_range) for name in self._plan.methods)
        return [one for wrong in found for one in dict(wrong).items()]

    def _bisect(self, method: str, x: Tensor, y: Tensor, samples: Tensor, proven: Tensor) -> Tensor:
        """The largest radii of ``samples`` that ``method`` certifies, at least ``proven``."""
        low = proven[samples]
        ones = [1] * (x.ndim - 1)

        def margins_at(radius: Tensor) -> Callable[[Tensor], Tensor]:
            def margins(some: Tensor) -> Tensor:
                where = samples[some]
                box = input_box(x[where], radius[some].view(-1, *ones), self._plan.input_range)
                return self._network.lower(box, y[where], method)

            return margins

        # Doubling steps come first: bounds at radii far too large are the most expensive.
        step = torch.clamp(low / 8, min=16 * self._tolerance)
        failed = torch.full_like(low, torch.inf)
        while True:
            further = torch.clamp(low + step, max=self._largest)
            trial = torch.where(failed.isfinite(), (low + failed) / 2, further)
            between = (trial > low) & (trial < failed)  # False where float32 has no radius in between.
            open_ = (low < self._largest) & (failed - low > self._tolerance) & (between | ~failed.isfinite())
            left = open_.nonzero().squeeze(1)
            if len(left) == 0:
                return low
            holds = proved(self._micro_batches[method].each(margins_at(trial), left, method))
            low[left] = torch.where(holds, trial[left], low[left])
            failed[left] = torch.where(holds, failed[left], trial[left])
            step *= 2

    def _falsified(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """Whether the attack finds a misclassified point in each certified box."""
        certified = (eps.flatten() > 0).nonzero().squeeze(1)
        falsified = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        if len(certified) and self._plan.restarts:
            model, micro_batches = self._network.model, self._micro_batches[ATTACK]
            options = self._plan, micro_batches, attrgetter("succeeded")
            falsified[certified] = attack_samples(model, x, y, eps, certified, *options)
        return falsified
