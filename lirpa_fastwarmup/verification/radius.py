"""The largest radius that can be certified for each sample, by doubling steps and bisection."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import MarginBounds, input_box, proved
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError, find_contradictions
from lirpa_fastwarmup.verification.certify import Plan, attack_samples, ordered
from lirpa_fastwarmup.verification.evaluate import check_network
from lirpa_fastwarmup.verification.journal import Journal
from lirpa_fastwarmup.verification.pipeline import Samples, over_batches
from lirpa_fastwarmup.verification.result import ATTACK, COMPLETE, BatchResult, Radius


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
    certified box, as a check. Arguments and errors are as for :func:`lirpa_fastwarmup.verify`, and:

    Args:
        largest: upper end of the search, in units of the input.
        tolerance: of the search, in units of the input; float32 limits it further.
        progress: called with the radii of each finished batch.

    Raises:
        ValueError: ``tolerance`` is not above 0 or not below ``largest``.
        UnsoundBoundError: a point of a certified box is misclassified; the error's ``result`` holds the radii.
    """
    bounded = check_network(bounded)
    if not all(x.is_floating_point() for x in bounded.example):
        raise ValueError("radii are searched for floating-point inputs only: use verify, with radius 0 for integers")
    if not 0 < tolerance < largest < float("inf"):
        raise ValueError(
            "the search runs from 0 to largest, to within tolerance, and needs 0 < tolerance < largest; found "
            f"tolerance {tolerance} and largest {largest}"
        )
    if COMPLETE in ordered(methods):
        raise ValueError(f"radii are searched by bounds alone, not by {COMPLETE}: verify the radii of interest with it")
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
        self._network, self._plan, self._micro_batches = network, plan, plan.micro_batches()
        self._largest, self._tolerance, self._untested = largest, tolerance, untested
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
            holds = proved(self._micro_batches[method].each(partial(margins, trial), left, method))
            low[left] = torch.where(holds, trial[left], low[left])
            failed[left] = torch.where(holds, failed[left], trial[left])
            step *= 2

    def _falsified(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """Whether the attack finds a misclassified point in each certified box."""
        certified = (eps.flatten() > 0).nonzero().squeeze(1)
        falsified = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        if len(certified) and self._plan.restarts:
            model, plan = self._network.model, self._plan
            points = attack_samples(model, x, y, eps, certified, plan, self._micro_batches[ATTACK])
            falsified[certified] = model(points).argmax(1) != y[certified]
        return falsified
