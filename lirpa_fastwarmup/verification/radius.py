"""The largest radius that can be certified for each sample, by doubling steps and bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.engine.bounds import class_count, input_box, proved
from lirpa_fastwarmup.engine.inputs import InputRange, check_batch, check_input_shapes
from lirpa_fastwarmup.engine.methods import MarginBounds
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError, find_contradictions
from lirpa_fastwarmup.memory import Parts
from lirpa_fastwarmup.verification.attacks import attack
from lirpa_fastwarmup.verification.certify import ATTACK, ordered
from lirpa_fastwarmup.verification.journal import Journal, digest
from lirpa_fastwarmup.verification.verifier import Samples, batches_of, check_network, conditions_of


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
class _Search:
    network: MarginBounds
    untested: bool
    methods: tuple[str, ...]
    input_range: InputRange | None
    largest: float
    tolerance: float
    pgd_steps: int
    restarts: int
    seed: int


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
        tolerance: how close to the largest certified radius it comes.
        pgd_steps, restarts: of the attack.
        input_range, batch_size, seed, journal: as of :func:`lirpa_fastwarmup.verify`.
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
    search = _Search(
        MarginBounds(bounded, torch.float32),
        bool(bounded.untested),
        ordered(methods),
        input_range,
        largest,
        tolerance,
        pgd_steps,
        restarts,
        seed,
    )
    parts = {name: Parts(batch_size) for name in (ATTACK, *search.methods)}
    conditions = {**conditions_of(bounded), "radius": replace(search, network=None)}  # type: ignore[arg-type]
    radii: list[Radius] = []
    contradictions: list[str] = []
    probed = False
    for x, y in batches_of(samples, batch_size):
        check_input_shapes([x], bounded.example)
        check_batch(x, y, class_count(bounded), input_range)
        key = digest({**conditions, "x": x, "y": y})
        stored: list[dict[str, Any]] | None = journal.get(key) if journal else None
        if stored is None:
            device = bounded.example[0].device
            x, y = x.to(device).float(), y.to(device)
            new = _radii(search, parts, x, y)
            if not probed:
                contradictions += _contradictions(search, x, y, new, len(radii))
                probed = True
            if journal:
                journal.put(key, [asdict(one) for one in new])
        else:
            new = [Radius(**one) for one in stored]
        new = [replace(one, index=len(radii) + one.index) for one in new]
        radii += new
        if progress:
            progress(new)
    if not radii:
        raise ValueError("there are no samples to find the radius of")
    contradictions += [
        f"sample {one.index} is proved by {one.method} at {one.radius:g} and misclassified at a point of that box"
        for one in radii
        if one.attacked
    ]
    if contradictions:
        raise UnsoundBoundError(contradictions, radii)
    return radii


def _contradictions(search: _Search, x: Tensor, y: Tensor, radii: Sequence[Radius], first: int) -> list[str]:
    """What is wrong with the methods in the boxes that were certified; samples count from ``first``."""
    texts = []
    eps = torch.tensor([one.radius for one in radii], device=x.device).view(-1, *[1] * (x.ndim - 1))
    with exact_arithmetic(x.device):
        for method in search.methods:
            found = find_contradictions(search.network, x, y, eps, method, search.input_range)
            texts += [f"sample {first + place} {text}" for place, text in dict(found).items()]
    return texts


def _radii(search: _Search, parts: dict[str, Parts], x: Tensor, y: Tensor) -> list[Radius]:
    with exact_arithmetic(x.device):
        with torch.no_grad():
            predictions = search.network.model(x).argmax(1)
        right = (predictions == y).nonzero().squeeze(1)
        radius = torch.zeros(len(y), device=x.device)
        method = torch.full_like(y, -1)
        for place, name in enumerate(search.methods):
            if len(right):
                found = _bisect(search, parts[name], name, x, y, right, radius)
                method[right[found > radius[right]]] = place
                radius[right] = found
        attacked = _attacked(search, parts[ATTACK], x, y, radius)
    labels, places = y.tolist(), method.tolist()
    return [
        Radius(
            index=index,
            label=labels[index],
            prediction=int(predictions[index]),
            radius=float(radius[index]),
            method=search.methods[places[index]] if places[index] >= 0 else None,
            attacked=attacked[index],
            untested=search.untested,
        )
        for index in range(len(y))
    ]


def _bisect(
    search: _Search, parts: Parts, method: str, x: Tensor, y: Tensor, samples: Tensor, proven: Tensor
) -> Tensor:
    """The largest radii of ``samples`` that ``method`` certifies, or ``proven`` where that is more."""
    low = proven[samples]
    ones = [1] * (x.ndim - 1)

    def margins_at(radius: Tensor) -> Callable[[Tensor], Tensor]:
        def margins(part: Tensor) -> Tensor:
            where = samples[part]
            box = input_box(x[where], radius[part].view(-1, *ones), search.input_range)
            return search.network.lower(box, y[where], method)

        return margins

    # Steps that double come first: bounds far beyond what can be proved are the dearest of all.
    step = torch.clamp(low / 8, min=16 * search.tolerance)
    failed = torch.full_like(low, torch.inf)
    while len(left := ((low < search.largest) & (failed - low > search.tolerance)).nonzero().squeeze(1)):
        further = torch.clamp(low + step, max=search.largest)
        trial = torch.where(failed.isfinite(), (low + failed) / 2, further)
        holds = proved(parts.each(margins_at(trial), left, method))
        low[left] = torch.where(holds, trial[left], low[left])
        failed[left] = torch.where(holds, failed[left], trial[left])
        step *= 2
    return low


def _attacked(search: _Search, parts: Parts, x: Tensor, y: Tensor, radius: Tensor) -> list[bool]:
    """Whether a misclassified point lies in each certified box."""
    certified = (radius > 0).nonzero().squeeze(1)
    attacked = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    if len(certified) == 0 or not search.restarts:
        return attacked.tolist()
    generator = torch.Generator().manual_seed(search.seed)

    def succeeded(part: Tensor) -> Tensor:
        return attack(
            search.network.model,
            x[part],
            y[part],
            radius[part].view(-1, *[1] * (x.ndim - 1)),
            steps=search.pgd_steps,
            restarts=search.restarts,
            input_range=search.input_range,
            generator=generator,
        ).succeeded

    attacked[certified] = parts.each(succeeded, certified, ATTACK)
    return attacked.tolist()
