"""Standard, PGD and verified error of a classifier on a set of samples.

The true robust error lies between the PGD error, which is attained, and the verified error, which is
proved. All three are taken in evaluation mode and restore the mode that they found.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine.bounds import class_count, ibp_margins, input_box, proved
from lirpa_fastwarmup.engine.inputs import Epsilon, InputRange, check_batch, check_eps, check_input_shapes
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.precision import exact_arithmetic
from lirpa_fastwarmup.engine.soundness import PROBED, UnsoundBoundError, corners_of, escapes
from lirpa_fastwarmup.verification.attacks import pgd
from lirpa_fastwarmup.verification.reference import beyond_intervals

logger = logging.getLogger(__name__)

Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Errors:
    """Shares of the samples: misclassified, misclassified under attack, not verified.

    ``pgd`` is NaN where the attack could not be made; see :func:`evaluate`.
    """

    standard: float
    pgd: float
    verified: float


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    network = model.wrapped if isinstance(model, BoundedModule) else model
    modes = [(module, module.training) for module in network.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _share(flags: list[Tensor]) -> float:
    if not flags:
        raise ValueError("there are no samples to take an error of")
    return float(torch.cat(flags).double().mean())


@torch.no_grad()
def check_ibp(
    bounded: BoundedModule, loader: Loader, eps: Epsilon, *, input_range: InputRange | None = (0.0, 1.0)
) -> None:
    """Compare IBP bounds on some samples of the first batch with attained values and with interval arithmetic.

    Args:
        bounded: the network; it is looked at in evaluation mode.
        loader: batches (x, y).
        eps: radius of the boxes, in units of the input.
        input_range: lowest and highest valid input.

    Raises:
        UnsoundBoundError: a value lies outside its bounds, or bounds are tighter than IBP can make them.
    """
    for x, y in loader:
        check_input_shapes([x], bounded.example)
        check_batch(x, y, class_count(bounded), input_range)
        x, y = x[:PROBED], y[:PROBED]
        with _evaluating(bounded), exact_arithmetic(x.device):
            margins = ibp_margins(bounded, input_box(x, eps, input_range), y, class_count(bounded))
            found = escapes(bounded, margins, y, *corners_of(x, eps, input_range))
            if not bounded.ablated:
                found += beyond_intervals(bounded, x, eps, input_range)
        if found:
            raise UnsoundBoundError([f"sample {place} {text}, by IBP" for place, text in dict(found).items()])
        return


@torch.no_grad()
def standard_error(model: nn.Module, loader: Loader) -> float:
    """The share of samples that ``model`` misclassifies; NaN inputs and wrong labels are refused."""
    flags = []
    with _evaluating(model):
        for x, y in loader:
            logits = model(x)
            check_batch(x, y, logits.shape[1], None)
            flags.append(logits.argmax(1) != y)
        return _share(flags)


@torch.no_grad()
def verified_error(
    bounded: BoundedModule, loader: Loader, eps: Epsilon, *, input_range: InputRange | None = (0.0, 1.0)
) -> float:
    """The share of samples with an IBP margin z_y − z_j that is not proved positive over the box.

    Raises:
        TypeError: labels are not int64.
        ValueError: ``eps`` is negative or not finite, labels are no classes of the network, inputs lie
            outside their range, or there are no samples.
    """
    check_eps(eps)
    classes = class_count(bounded)
    flags = []
    with _evaluating(bounded):
        for x, y in loader:
            check_input_shapes([x], bounded.example)
            check_batch(x, y, classes, input_range)
            flags.append(~proved(ibp_margins(bounded, input_box(x, eps, input_range), y, classes)))
        return _share(flags)


def pgd_error(
    model: nn.Module,
    loader: Loader,
    eps: Epsilon,
    *,
    steps: int = 50,
    restarts: int = 3,
    input_range: InputRange | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> float:
    """The share of samples misclassified at some point that PGD found; steps are of eps/10.

    Raises:
        NotImplementedError: ``model`` is a BoundedModule with ablated BatchNorm.
    """
    if isinstance(model, BoundedModule):
        model.require_same_function("PGD")
        model = model.wrapped
    with _evaluating(model):
        flags = []
        for x, y in loader:
            point = pgd(model, x, y, eps, steps=steps, restarts=restarts, input_range=input_range, generator=generator)
            with torch.no_grad():
                flags.append(model(point).argmax(1) != y)
        return _share(flags)


def evaluate(
    bounded: BoundedModule,
    loader: Loader,
    eps: Epsilon,
    *,
    pgd_steps: int = 50,
    pgd_restarts: int = 3,
    input_range: InputRange | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Errors:
    """All three errors over the same samples.

    Where the network was bounded with BatchNorm ablated, the plain network computes another function: the
    standard error is then that of the bounded one, and PGD is left out, with a warning in the log.

    Args:
        bounded: the network.
        loader: batches (x, y), gone through four times, the first time up to the first batch.
        eps: radius of the box, in units of the input.

    Raises:
        UnsoundBoundError: see :func:`check_ibp`.
    """
    check_ibp(bounded, loader, eps, input_range=input_range)
    try:
        attacked = pgd_error(
            bounded,
            loader,
            eps,
            steps=pgd_steps,
            restarts=pgd_restarts,
            input_range=input_range,
            generator=generator,
        )
    except NotImplementedError as error:
        logger.warning("no PGD error: %s", error)
        attacked = math.nan
    return Errors(
        standard=standard_error(bounded if bounded.ablated else bounded.wrapped, loader),
        pgd=attacked,
        verified=verified_error(bounded, loader, eps, input_range=input_range),
    )
