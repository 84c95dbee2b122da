"""Projected gradient descent (PGD; Madry et al., 2018) in a box: for verification, and within training steps."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends, check_batch, check_eps


@dataclass(frozen=True)
class Attack:
    """The result of an attack.

    Attributes:
        points: a misclassified point of each box, or else the visited one with the lowest margin: ``(batch, *input)``.
        margins: z_y − max_j z_j at these points, shape (batch,).
        succeeded: whether the point is misclassified, shape (batch,).
    """

    points: Tensor
    margins: Tensor
    succeeded: Tensor

    def or_better(self, other: "Attack", until_misclassified: bool = False) -> "Attack":
        """For each sample the result with the lower margin, or the first of the two that succeeded."""
        better = other.margins < self.margins
        if until_misclassified:
            better = ~self.succeeded & (other.succeeded | better)
        wide = better.view(-1, *[1] * (self.points.ndim - 1))
        return Attack(
            torch.where(wide, other.points, self.points),
            torch.where(better, other.margins, self.margins),
            torch.where(better, other.succeeded, self.succeeded),
        )


@dataclass(frozen=True)
class PGD:
    """An attack within training steps: it raises the cross-entropy, and does the same computation for every batch.

    Raises TypeError if a count is not an integer, and ValueError if an attribute is out of its range.

    Attributes:
        steps: gradient steps of each restart, at least 1.
        step_size: length of a step, as a fraction of the box's half-width at each coordinate.
        restarts: random starting points, uniform in the box.
        decay: a factor, and numbers of steps after which it multiplies ``step_size``, such as ``(0.1, (4, 7))``.
        scale: the attacked radius over ε; above 1 it exceeds the certified one.
        return_best: return the visited point with the highest loss, starting points included, instead of the last one.
    """

    steps: int = 1
    step_size: float = 10.0
    restarts: int = 1
    decay: tuple[float, tuple[int, ...]] | None = None
    scale: float = 1.0
    return_best: bool = False

    def __post_init__(self) -> None:
        for name, count in (("steps", self.steps), ("restarts", self.restarts)):
            if not isinstance(count, int):
                raise TypeError(f"{name} must be an integer, found {count!r}")
            if count < 1:
                raise ValueError(f"an attack needs at least one of {name}, found {count}: without, use losses.IBP")
        if not (0 < self.step_size < math.inf):
            raise ValueError(f"step_size, a fraction of the box's half-width, must be above 0, found {self.step_size}")
        if not 1 <= self.scale < math.inf:
            text = f"scale is the attacked radius over the certified one, found {self.scale}: below 1 the attack would "
            raise ValueError(text + "miss points of the box that is certified. Pass 1 or more")
        if self.decay is not None and not (0 < self.decay[0] <= 1 and all(at > 0 for at in self.decay[1])):
            raise ValueError(f"decay is a factor from 0 to 1, and numbers of steps, found {self.decay}")
        object.__setattr__(self, "decay", self.decay and (self.decay[0], tuple(self.decay[1])))  # Hashable.

    def starts(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random starts relative to the box, from 0 to 1: ``(restarts, *x.shape)``, on the device of ``x``."""
        return torch.rand((self.restarts, *x.shape), dtype=x.dtype, device=x.device, generator=generator)

    def points(self, model: Callable[[Tensor], Tensor], y: Tensor, low: Tensor, high: Tensor, starts: Tensor) -> Tensor:
        """The attack's point in each box from ``low`` to ``high``, ``(batch, *input)``, for the logits of ``model``.

        ``starts`` are from :meth:`starts`.
        """
        factor, milestones = self.decay or (1.0, ())
        sizes = [self.step_size * factor ** sum(at <= step for at in milestones) for step in range(self.steps)]
        strides = [size * (high - low) / 2 for size in sizes]
        first = (low + start * (high - low) for start in starts)
        found = (_descend(model, point, y, low, high, strides, best=self.return_best) for point in first)
        if not self.return_best and self.restarts > 1:  # The last points have not been compared yet.
            found = (_descend(model, one.points, y, low, high, []) for one in found)
        return functools.reduce(Attack.or_better, found).points


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Epsilon,
    *,
    steps: int = 50,
    restarts: int = 3,
    step_size: float = 0.1,
    input_range: InputRange | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    starts: Tensor | None = None,
) -> Attack:
    """Minimise the margin z_y − max_j z_j over an l∞ box by PGD (Madry et al., 2018); return each sample's worst point.

    Every restart begins at a random point of each box, and leaves out samples that are misclassified already.

    Args:
        model: the network, in evaluation mode.
        x: clean inputs ``(batch, *input)``.
        y: labels (batch,), int64.
        eps: radius of the box, in units of the input; may have one value per sample, shape (batch, 1, …).
        steps: gradient steps of each restart.
        restarts: random starting points; 0 to evaluate only the clean points.
        step_size: length of a step, as a fraction of the box's half-width at each coordinate.
        input_range: lowest and highest valid input; ``None`` for unclipped data.
        generator: source of the starting points, on the CPU; by default torch's own.
        starts: starting points ``(restarts, *x.shape)``, from 0 to 1 across the box, for a batch in micro-batches.

    Raises:
        TypeError: labels are not int64.
        ValueError: ``model`` is in training mode, or ``eps``, a label or ``x`` is out of its range.

    Example:
        >>> found = fw.attacks.attack(model.eval(), x, y, eps=8 / 255, restarts=3)
        >>> error = found.succeeded.float().mean()
        >>> adversarial = found.points[found.succeeded]
    """
    if model.training:
        raise ValueError("the network is in training mode, where BatchNorm adapts to the attack: call model.eval()")
    check_eps(eps)
    with torch.no_grad():
        logits = model(x)
    check_batch(x, y, logits.shape[1], input_range)
    lower, upper = box_ends(x, eps, input_range)
    found = Attack(x.clone(), _margins(logits, y), predicted(logits) != y)
    for restart in range(restarts):
        left = (~found.succeeded).nonzero().squeeze(1)
        if len(left) == 0:
            break
        box = lower[left], upper[left]
        noise = torch.rand(x.shape, generator=generator) if starts is None else starts[restart]
        start = box[0] + noise.to(x)[left] * (box[1] - box[0])
        stride = step_size * (box[1] - box[0]) / 2
        other = _descend(model, start, y[left], *box, [stride] * steps, until_misclassified=True)
        before = Attack(found.points[left], found.margins[left], found.succeeded[left])
        better = before.or_better(other, until_misclassified=True)
        found.points[left], found.margins[left], found.succeeded[left] = better.points, better.margins, better.succeeded
    return found


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: Epsilon, **options: Any) -> Tensor:
    """A misclassified point of each box where :func:`attack` finds one, and ``x`` elsewhere.

    Arguments, ``options`` among them, and errors are as in :func:`attack`.
    """
    found = attack(model, x, y, eps, **options)
    return torch.where(found.succeeded.view(-1, *[1] * (x.ndim - 1)), found.points, x)


def _descend(
    model: Callable[[Tensor], Tensor],
    point: Tensor,
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    strides: list[Tensor],
    *,
    until_misclassified: bool = False,
    best: bool = True,
) -> Attack:
    """The point with the highest cross-entropy, visited on the ascent from ``point`` along ``strides``.

    ``until_misclassified``: instead the first misclassified point, or the lowest margin's. Without ``best``: the last.
    """
    found = Attack(point.clone(), torch.full_like(point.flatten(1)[:, 0], torch.inf), torch.zeros_like(y).bool())
    for step in range(len(strides) + 1):
        point = point.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(point)
            scores = _margins(logits, y) if until_misclassified else -F.cross_entropy(logits, y, reduction="none")
        succeeded = predicted(logits.detach()) != y
        found = found.or_better(Attack(point.detach(), scores.detach(), succeeded), until_misclassified)
        # A network that computes without gradients is attacked at the start alone.
        if step == len(strides) or not scores.requires_grad or (until_misclassified and bool(found.succeeded.all())):
            break
        ones = torch.ones_like(scores)
        (gradient,) = torch.autograd.grad(scores, point, ones, allow_unused=True, materialize_grads=True)
        point = torch.min(torch.max(point.detach() - strides[step] * gradient.sign(), lower), upper)
        if not best and step == len(strides) - 1:
            return Attack(point, found.margins, found.succeeded)
    return found


def predicted(logits: Tensor) -> Tensor:
    """The class of each sample, and −1 where a logit is NaN, which is no class."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return own - others
