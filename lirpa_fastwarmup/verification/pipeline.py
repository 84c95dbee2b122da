"""Results over many batches: the loop with journal, processes and progress that verification and radii share."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import broadcast_to_batch, check_batch, check_shapes, is_per_sample, radii_of
from lirpa_fastwarmup.distributed import SINGLE, World, all_gather, patient_group, world
from lirpa_fastwarmup.engine.bounds import class_count
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.graph import fingerprint
from lirpa_fastwarmup.engine.inputs import Inputs, Layout
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.verification.certify import Plan
from lirpa_fastwarmup.verification.folder import Journal, digest
from lirpa_fastwarmup.verification.result import BatchResult, Result
from lirpa_fastwarmup.version import __version__

Samples = tuple[Inputs, Tensor] | Iterable[tuple[Inputs, Tensor] | tuple[Inputs, Tensor, Any]]
Batch = tuple[Tensor, Tensor, Any]  # Packed inputs, labels, and their radius.
Compute = Callable[[Tensor, Tensor, Any], BatchResult[Result]]  # Of a batch.
ComputePart = Callable[["_Part"], BatchResult[Result]]


def over_batches(
    bounded: BoundedModule,
    samples: Samples,
    compute: Compute[Result],
    kind: type[Result],
    plan: Plan,
    conditions: Mapping[str, object],
    *,
    screen: Compute[Result] | None = None,
    eps: Any = None,
    indices: Sequence[int] | None = None,
    journal: Journal | None = None,
    progress: Callable[[Sequence[Result]], None] | None = None,
    over_ranks: bool = False,
) -> BatchResult[Result]:
    """The results, of class ``kind``, that ``compute`` gives for x and y, on the network's device, and their radius.

    ``screen`` decides some samples of every batch; ``compute`` then runs on the others, in full batches. ``conditions``
    are what results depend on besides network, plan and batch, for the journal. ``eps`` is packed. ``bounded`` is the
    copy that ``compute`` certifies, as modules and weights of the original may have been replaced since it was wrapped.
    """
    ranks = world() if over_ranks else SINGLE
    size = plan.batch_size if bounded.any_batch else 1
    parts = _own_parts(batches_of(samples, size, bounded.layout, eps), class_count(bounded), plan, indices, ranks)
    described: dict[str, object] = {}
    if journal:
        software = {"package": __version__, "engine": ENGINE_VERSION, "torch": torch.__version__}
        network = {"network": fingerprint(bounded), "options": bounded.given_options, "untested": bounded.untested}
        described = {**software, **network, "plan": dataclasses.astuple(plan), **conditions}
    device = bounded.example[0].device

    def computed(function: Compute[Result], part: _Part) -> BatchResult[Result]:
        if not part.places:
            return BatchResult()
        about = {**described, "screened": function is screen, "x": part.x, "y": part.y, "eps": part.radius}
        key = digest(about) if journal else ""
        if stored := journal.get(key) if journal else None:
            return BatchResult.from_dict(kind, stored).numbered(part.places)
        result = function(part.x.to(device), part.y.to(device), part.radius)
        # Another attempt may avoid an error of α,β-CROWN.
        if journal and not any(str(getattr(one, "complete", "")).startswith("error") for one in result.certificates):
            journal.put(key, dataclasses.asdict(result))
        return result.numbered(part.places)

    own: BatchResult[Result] = BatchResult()
    number = range(sys.maxsize) if indices is None else indices
    decide = partial(computed, compute)
    results = _screened(parts, partial(computed, screen), decide, size) if screen else map(decide, parts)
    group = patient_group() if ranks.size > 1 else None
    for result in results:
        own.add(result)
        if progress and result.certificates:
            progress(result.numbered(number).certificates)
    total: BatchResult[Result] = BatchResult()
    for one in all_gather(own, group) if ranks.size > 1 else [own]:
        total.add(one)
    total.certificates.sort(key=attrgetter("index"))
    total.contradictions = list(dict.fromkeys(total.contradictions))  # Screened samples may be bounded again.
    return total.numbered(number)


class _Part(NamedTuple):
    x: Tensor
    y: Tensor
    radius: Any
    places: list[int]

    def some(self, which: Sequence[int]) -> Self:
        rows = torch.tensor(which, dtype=torch.int64)
        radius = radii_of(self.radius, self.x, rows)
        return type(self)(self.x[rows], self.y[rows], radius, [self.places[one] for one in which])

    def joined(self, other: Self) -> Self:
        radius = torch.cat([self.radius, other.radius]) if is_per_sample(self.radius, self.x) else self.radius
        x, y = torch.cat([self.x, other.x]), torch.cat([self.y, other.y])
        return type(self)(x, y, radius, self.places + other.places)


def _own_parts(
    batches: Iterable[Batch], classes: int, plan: Plan, indices: Sequence[int] | None, ranks: World
) -> Iterator[_Part]:
    """The batches of this process. Every process reads all of them, so an invalid radius is an error in each."""
    count = 0
    for number, (x, y, radius) in enumerate(batches):
        first, count = count, count + len(y)
        if indices is not None and len(indices) < count:
            raise ValueError(f"pass one index per sample; found only {len(indices)} indices")
        if number % ranks.size == ranks.rank:
            check_batch(x, y, classes, plan.input_range)
            yield _Part(x, y, radius, list(range(first, count)))
    if count == 0:
        raise ValueError("there are no samples")
    if indices is not None and len(indices) != count:
        raise ValueError(f"pass one index per sample; found {len(indices)} indices for {count} samples")


def _screened(
    parts: Iterable[_Part], screen: ComputePart[Result], compute: ComputePart[Result], size: int
) -> Iterator[BatchResult[Result]]:
    """What ``screen`` decides of each part, and ``compute`` of the others, gathered in batches of ``size``."""
    left: _Part | None = None
    for part in parts:
        result = screen(part)
        yield result
        decided = {one.index for one in result.certificates}
        others = part.some([at for at, place in enumerate(part.places) if place not in decided])
        per_sample = left is not None and all(is_per_sample(one.radius, one.x) for one in (left, others))
        if left is not None and left.radius is not others.radius and not per_sample:
            yield compute(left)
            left = None
        left = others if left is None else left.joined(others)
        while len(left.y) >= size:
            yield compute(left.some(range(size)))
            left = left.some(range(size, len(left.y)))
    if left is not None:
        yield compute(left)


def batches_of(samples: Samples, size: int, layout: Layout, eps: Any) -> Iterator[Batch]:
    """Checked, packed batches and their radii: the given ones (split if ``size`` is 1), or of ``size`` from tensors."""
    is_whole = isinstance(samples, tuple | list) and bool(samples) and isinstance(samples[-1], Tensor)
    first = 0
    for batch in [samples] if is_whole else samples:
        x, y, own = _batch(batch, layout)
        if own is not None and not is_per_sample(own, x):  # Batches with other radii may be joined with this one.
            own = torch.as_tensor(broadcast_to_batch(own, x, "eps")).expand_as(x)
        radius = _rows(eps, x, first) if own is None else _rows(own, x, 0)
        step = size if is_whole or size == 1 else len(x)
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            yield x[part], y[part], radii_of(radius, x, part)
        first += len(x)
    if isinstance(eps, Tensor) and eps.ndim == 1 + len(layout.packed_shape) and len(eps) not in (1, first):
        raise ValueError(f"eps has a radius for each of {len(eps)} samples; found {first} samples")


def _rows(eps: Any, x: Tensor, first: int) -> Any:
    """The radii of the samples ``x``, from number ``first`` on, where ``eps`` has one per sample."""
    if eps is None:
        raise ValueError("there is no radius: pass eps, or batches (x, y, eps)")
    if not is_per_sample(eps, x):
        return eps
    rows = eps if len(eps) == 1 else eps[first : first + len(x)]
    if len(rows) not in (1, len(x)):
        raise ValueError(f"eps has radii for {len(eps)} samples only: pass one value, or one per sample")
    if not bool((rows.flatten(1).amax(1) > 0).all()):
        raise ValueError("eps is 0 for some samples: their boxes are the samples themselves. Leave these samples out")
    return rows.to(x).expand_as(x)


def _batch(batch: Any, layout: Layout) -> Batch:
    parts = list(batch) if isinstance(batch, tuple | list) else []
    inputs = parts[0] if parts and isinstance(parts[0], tuple | list) else parts[:1]
    if not (len(parts) in (2, 3) and all(isinstance(one, Tensor) for one in (*inputs, parts[1])) and len(inputs)):
        found = [type(part).__name__ for part in parts] if parts else type(batch).__name__
        text = f"expected inputs and labels, tensors (x, y), found {found}: labels are needed, as certificates are "
        raise TypeError(text + "about a sample's own class; for arrays, pass torch.from_numpy(x)")
    for x, example in zip(inputs, layout.example, strict=False):
        if example.is_floating_point() and not x.is_floating_point():
            raise TypeError(f"inputs must be floating-point numbers, found {x.dtype}: for bytes, pass x.float() / 255")
    check_shapes(inputs[0], parts[1])
    return layout.pack(inputs), parts[1], layout.pack_eps(parts[2]) if len(parts) == 3 else None
