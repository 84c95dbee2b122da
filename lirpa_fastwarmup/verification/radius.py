"""The largest radius that can be certified for each sample, by doubling steps and bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from lirpa_fastwarmup.attacks import attack, random_starts
from lirpa_fastwarmup.boxes import InputRange
from lirpa_fastwarmup.engine.bounds import input_box, proved
from lirpa_fastwarmup.engine.methods import MarginBounds
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError, find_contradictions
from lirpa_fastwarmup.memory import MicroBatches
from lirpa_fastwarmup.verification.certify import ATTACK, ordered
from lirpa_fastwarmup.verification.evaluate import Samples, Task, check_network, over_batches
from lirpa_fastwarmup.verification.journal import Journal


@dataclass(frozen=True)
class Radius:
    """The largest certified radius of one sample.

    Attributes:
        index: its place among the samples.
        label, prediction: its class, and the network's.
        radius: in units of the input; 0 where the sample is misclassified, or nothing could be proved.
        method: the cheapest method that proves it; ``None`` for none.
        attacked: whether a misclassified point was found in a box that was proved; then the bounds are not sound.
        untested: whether it rests on bounds that have not been tested.
    """

    index: int
    label: int
    prediction: int
    radius: float
    method: str | None
    attacked: bool
    untested: bool = False


@dataclass(frozen=True)
class _Plan:
    methods: tuple[str, ...]
    input_range: InputRange | None
    largest: float
    tolerance: float
    pgd_steps: int
    restarts: int
    batch_size: int
    seed: int


_Found = tuple[list[Radius], list[tuple[int, str]]]  # Radii of a batch, and contradictions; indices from 0.


def certified_radii(
    bounded: BoundedModule,
    samples: Samples,
    methods: Sequence[str] = ("IBP", "CROWN-IBP"),
    *,
    largest: float = 1.0,
    tolerance: float = 1e-4,
    pgd_steps: int = 50,
    restarts: int = 1,
    input_range: InputRange | None = (0.0, 1.0),
    batch_size: int = 100,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[Sequence[Radius]], None] | None = None,
    over_ranks: bool = False,
) -> list[Radius]:
    """For each sample the largest radius, to ``tolerance``, at which one of ``methods`` certifies it.

    Each method goes on from what a cheaper one has proved, in doubling steps, and then bisects. The radius that is
    given was itself certified; so are all smaller ones, whose boxes lie within. PGD then attacks each of these boxes,
    as a check.

    Args:
        bounded: the network, in evaluation mode.
        samples: inputs and labels (x, y), or batches of these.
        methods: as of :func:`lirpa_fastwarmup.verify`.
        largest: where the search ends, in units of the input.
        tolerance: how close to the largest certified radius it comes, as far as float32 tells radii apart.
        pgd_steps, restarts: of the attack.
        input_range, batch_size, seed, journal, over_ranks: as of :func:`lirpa_fastwarmup.verify`.
        progress: given the radii of each batch when it is done.

    Raises:
        ValueError: ``tolerance`` is not above 0 or not below ``largest``.
        UnsoundBoundError: a point of some certified box is misclassified; ``result`` holds the radii.
        Exception: as :func:`lirpa_fastwarmup.verify`.
    """
    check_network(bounded)
    if not 0 < tolerance < largest < float("inf"):
        raise ValueError(
            f"the radius is searched for from 0 to largest, to within tolerance, so that 0 < tolerance < largest; "
            f"found tolerance {tolerance} and largest {largest}"
        )
    plan = _Plan(ordered(methods), input_range, largest, tolerance, pgd_steps, restarts, batch_size, seed)
    search = _Search(MarginBounds(bounded, torch.float32), plan, untested=bool(bounded.untested))
    results = over_batches(
        bounded,
        samples,
        Task(
            search.radii,
            {"radius": asdict(plan)},
            lambda found: [[asdict(one) for one in found[0]], found[1]],
            lambda stored: ([Radius(**one) for one in stored[0]], [(index, text) for index, text in stored[1]]),
        ),
        batch_size=batch_size,
        input_range=input_range,
        journal=journal,
        progress=None if progress is None else lambda first, found: progress(_counted_from(first, found[0])),
        over_ranks=over_ranks,
    )
    radii: list[Radius] = []
    contradictions: list[str] = []
    for found, wrong in results:
        contradictions += [f"sample {len(radii) + index} {text}" for index, text in wrong]
        radii += _counted_from(len(radii), found)
    if contradictions:
        raise UnsoundBoundError(contradictions, radii)
    return radii


def _counted_from(first: int, radii: Sequence[Radius]) -> list[Radius]:
    return [replace(one, index=first + one.index) for one in radii]


class _Search:
    """Finds the radii of one batch after the other, and checks the methods in the first one."""

    def __init__(self, network: MarginBounds, plan: _Plan, *, untested: bool) -> None:
        self._network = network
        self._plan = plan
        self._untested = untested
        self._parts = {name: MicroBatches(plan.batch_size) for name in (ATTACK, *plan.methods)}
        self._checked = False

    @torch.no_grad()
    def radii(self, x: Tensor, y: Tensor) -> _Found:
        """The radii of a batch, and what contradicts them."""
        x = x.float()
        methods = self._plan.methods
        with exact_arithmetic(x.device):
            predictions = self._network.model(x).argmax(1)
            right = (predictions == y).nonzero().squeeze(1)
            radius = torch.zeros(len(y), device=x.device)
            method = torch.full_like(y, -1)
            for place, name in enumerate(methods):
                if len(right):
                    found = self._bisect(name, x, y, right, radius)
                    method[right[found > radius[right]]] = place
                    radius[right] = found
            attacked = self._attacked(x, y, radius).tolist()
            wrong = [] if self._checked else self._contradictions(x, y, radius)
            self._checked = True
        labels, places = y.tolist(), method.tolist()
        radii = [
            Radius(
                index=index,
                label=labels[index],
                prediction=int(predictions[index]),
                radius=float(radius[index]),
                method=methods[places[index]] if places[index] >= 0 else None,
                attacked=attacked[index],
                untested=self._untested,
            )
            for index in range(len(y))
        ]
        text = "is proved by {} at {:g} and misclassified at a point of that box"
        wrong += [(one.index, text.format(one.method, one.radius)) for one in radii if one.attacked]
        return radii, wrong

    def _contradictions(self, x: Tensor, y: Tensor, radius: Tensor) -> list[tuple[int, str]]:
        """What is wrong with the methods in the boxes that were certified."""
        eps = radius.view(-1, *[1] * (x.ndim - 1))
        found: list[tuple[int, str]] = []
        for method in self._plan.methods:
            wrong = find_contradictions(self._network, x, y, eps, method, self._plan.input_range)
            found += dict(wrong).items()
        return found

    def _bisect(self, method: str, x: Tensor, y: Tensor, samples: Tensor, proven: Tensor) -> Tensor:
        """The largest radii of ``samples`` that ``method`` certifies, or ``proven`` where that is more."""
        plan, parts = self._plan, self._parts[method]
        low = proven[samples]
        ones = [1] * (x.ndim - 1)

        def margins_at(radius: Tensor) -> Callable[[Tensor], Tensor]:
            def margins(part: Tensor) -> Tensor:
                where = samples[part]
                box = input_box(x[where], radius[part].view(-1, *ones), plan.input_range)
                return self._network.lower(box, y[where], method)

            return margins

        # Steps that double come first: bounds far beyond what can be proved are the most expensive of all.
        step = torch.clamp(low / 8, min=16 * plan.tolerance)
        failed = torch.full_like(low, torch.inf)
        while True:
            further = torch.clamp(low + step, max=plan.largest)
            trial = torch.where(failed.isfinite(), (low + failed) / 2, further)
            between = (trial > low) & (trial < failed)  # Not where float32 has no radius in between.
            open_ = (low < plan.largest) & (failed - low > plan.tolerance) & (between | ~failed.isfinite())
            left = open_.nonzero().squeeze(1)
            if len(left) == 0:
                return low
            holds = proved(parts.each(margins_at(trial), left, method))
            low[left] = torch.where(holds, trial[left], low[left])
            failed[left] = torch.where(holds, failed[left], trial[left])
            step *= 2

    def _attacked(self, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
        """Whether a misclassified point lies in each certified box."""
        plan = self._plan
        certified = (radius > 0).nonzero().squeeze(1)
        attacked = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        if len(certified) == 0 or not plan.restarts:
            return attacked
        starts = random_starts(x, plan.restarts, torch.Generator().manual_seed(plan.seed))

        def succeeded(part: Tensor) -> Tensor:
            return attack(
                self._network.model,
                x[part],
                y[part],
                radius[part].view(-1, *[1] * (x.ndim - 1)),
                steps=plan.pgd_steps,
                restarts=plan.restarts,
                input_range=plan.input_range,
                starts=starts[:, part.cpu()],
            ).succeeded

        attacked[certified] = self._parts[ATTACK].each(succeeded, certified, ATTACK)
        return attacked
