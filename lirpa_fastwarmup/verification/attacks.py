"""Projected gradient descent: a search for misclassified points of the box."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.bounds import box_ends
from lirpa_fastwarmup.engine.inputs import Epsilon, InputRange, broadcast_to_batch, check_batch, check_eps


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
    """Attack a classifier within an l∞ box (Madry et al., 2018), on the margin z_y − max_j z_j.

    Every restart begins at a random point of the box; samples that have been misclassified once, the
    clean point included, are left out from then on.

    Args:
        model: the network, in evaluation mode.
        x: clean inputs (batch, *input).
        y: labels (batch,), int64.
        eps: radius of the box, in units of the input.
        steps: gradient steps of each restart.
        restarts: random starting points.
        step_size: length of a step as a share of ``eps``.
        input_range: lowest and highest valid input; ``None`` for unclipped data.
        generator: source of the starting points, on the CPU; by default torch's own.

    Returns:
        For each sample a misclassified point of the box where one was found, and ``x`` elsewhere.

    Raises:
        TypeError: labels are not int64.
        ValueError: ``model`` is in training mode, ``eps`` is negative or not finite, labels are no classes,
            or ``x`` lies outside its range.
    """
    if model.training:
        raise ValueError("the network is in training mode, in which BatchNorm follows the attack: call model.eval()")
    check_eps(eps)
    with torch.no_grad():
        logits = model(x)
    check_batch(x, y, logits.shape[1], input_range)
    eps = broadcast_to_batch(eps, x, "eps")
    lower, upper = box_ends(x, eps, input_range)
    found = x.clone()
    open_samples = (logits.argmax(1) == y).nonzero().squeeze(1)
    for _ in range(restarts):
        if len(open_samples) == 0:
            break
        box = lower[open_samples], upper[open_samples]
        noise = torch.rand(box[0].shape, generator=generator, dtype=x.dtype).to(x.device)
        start = box[0] + noise * (box[1] - box[0])
        labels = y[open_samples]
        stride = step_size * (eps.expand_as(x)[open_samples] if isinstance(eps, Tensor) else eps)
        points, succeeded = _descend(model, start, labels, *box, steps, stride)
        found[open_samples[succeeded]] = points[succeeded]
        open_samples = open_samples[~succeeded]
    return found


def _descend(
    model: nn.Module, point: Tensor, y: Tensor, lower: Tensor, upper: Tensor, steps: int, stride: Epsilon
) -> tuple[Tensor, Tensor]:
    """The first misclassified point met on the way down from ``point``, and whether there was one."""
    worst, succeeded = point.clone(), torch.zeros_like(y, dtype=torch.bool)
    for step in range(steps + 1):
        point = point.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(point)
            margins = _margins(logits, y)
        new = (logits.detach().argmax(1) != y) & ~succeeded
        worst[new] = point.detach()[new]
        succeeded |= new
        if step == steps or bool(succeeded.all()):
            break
        (gradient,) = torch.autograd.grad(margins.sum(), point)
        point = torch.min(torch.max(point.detach() - stride * gradient.sign(), lower), upper)
    return worst, succeeded


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return own - others
