"""Projected gradient descent (PGD): searches a box for the lowest margin, and so for misclassified points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends, broadcast_to_batch, check_batch, check_eps


@dataclass(frozen=True)
class Attack:
    """The result of an attack.

    Attributes:
        points: for each sample a misclassified point of its box if one was found, otherwise the visited point with the
            lowest margin; shape ``(batch, *input)``.
        margins: z_y − max_j z_j at these points, shape (batch,).
        succeeded: whether the point is misclassified, shape (batch,).
    """

    points: Tensor
    margins: Tensor
    succeeded: Tensor

    def replace(self, samples: Tensor, other: Attack) -> None:
        """Overwrite the results of ``samples`` where ``other`` succeeded or has the lower margin."""
        worse = other.succeeded | (other.margins < self.margins[samples])
        where = samples[worse]
        self.points[where] = other.points[worse]
        self.margins[where] = other.margins[worse]
        self.succeeded[where] = other.succeeded[worse]


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
    """Minimise the margin z_y − max_j z_j over an l∞ box by PGD (Madry et al., 2018).

    Every restart begins at a random point of the box. Samples that are misclassified, at the clean point or later, are
    left out of further restarts.

    Args:
        model: the network, in evaluation mode.
        x: clean inputs ``(batch, *input)``.
        y: labels (batch,), int64.
        eps: radius of the box, in units of the input; may have one value per sample, shape (batch, 1, …).
        steps: gradient steps of each restart.
        restarts: random starting points; 0 to evaluate only the clean points.
        step_size: length of a step as a fraction of ``eps``.
        input_range: lowest and highest valid input; ``None`` for unclipped data.
        generator: source of the starting points, on the CPU; by default torch's own.
        starts: starting points from :func:`random_starts` instead, for a batch attacked in micro-batches.

    Returns:
        The worst point found for each sample.

    Raises:
        TypeError: labels are not int64.
        ValueError: ``model`` is in training mode, ``eps`` is negative or not finite, labels are not classes, or ``x``
            lies outside its range.

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
    eps = broadcast_to_batch(eps, x, "eps")
    lower, upper = box_ends(x, eps, input_range)
    found = Attack(x.clone(), _margins(logits, y), logits.argmax(1) != y)
    for restart in range(restarts):
        left = (~found.succeeded).nonzero().squeeze(1)
        if len(left) == 0:
            break
        box = lower[left], upper[left]
        noise = random_starts(x, 1, generator)[0] if starts is None else starts[restart]
        start = box[0] + noise.to(x)[left] * (box[1] - box[0])
        stride = step_size * (eps.expand_as(x)[left] if isinstance(eps, Tensor) else eps)
        found.replace(left, _descend(model, start, y[left], *box, steps, stride))
    return found


def random_starts(x: Tensor, restarts: int, generator: torch.Generator | None) -> Tensor:
    """Starting points relative to the box, from 0 to 1: shape (restarts, batch, *input), on the CPU.

    A sample's starts depend only on the generator and its place in the batch.
    """
    return torch.rand((restarts, *x.shape), generator=generator)


def pgd(
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
) -> Tensor:
    """A misclassified point of each box where :func:`attack` finds one, and ``x`` elsewhere.

    Arguments and errors are as in :func:`attack`.

    Example:
        >>> adversarial = fw.attacks.pgd(model.eval(), x, y, eps=8 / 255, steps=50, restarts=3)
        >>> error = (model(adversarial).argmax(1) != y).float().mean()
    """
    options: dict[str, Any] = {"steps": steps, "restarts": restarts, "step_size": step_size, "generator": generator}
    found = attack(model, x, y, eps, input_range=input_range, **options)
    return torch.where(found.succeeded.view(-1, *[1] * (x.ndim - 1)), found.points, x)


def _descend(
    model: nn.Module, point: Tensor, y: Tensor, lower: Tensor, upper: Tensor, steps: int, stride: Epsilon
) -> Attack:
    """The first misclassified point visited on the descent from ``point``, or else the one with the lowest margin."""
    found = Attack(point.clone(), torch.full_like(point.flatten(1)[:, 0], torch.inf), torch.zeros_like(y).bool())
    everything = torch.arange(len(y), device=y.device)
    for step in range(steps + 1):
        point = point.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(point)
            margins = _margins(logits, y)
        left = everything[~found.succeeded]
        succeeded = logits.detach().argmax(1) != y
        found.replace(left, Attack(point.detach()[left], margins.detach()[left], succeeded[left]))
        if step == steps or bool(found.succeeded.all()):
            break
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(margins.sum(), point)
        point = torch.min(torch.max(point.detach() - stride * gradient.sign(), lower), upper)
    return found


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return own - others
