"""The perturbation radius ε as a pure function of the step number.

``schedule(step)`` is the radius at a step from 0, and ``schedule.fraction(step)`` its fraction of ``max_eps``.
"""

from dataclasses import dataclass, field
from typing import Protocol

from lirpa_fastwarmup.boxes import Epsilon, check_eps


class Schedule(Protocol):
    """The interface that :class:`lirpa_fastwarmup.ShortWarmup` needs of a schedule."""

    @property
    def max_eps(self) -> Epsilon | tuple[Epsilon, ...]:
        """The radius at the end, in units of the input."""

    def fraction(self, step: int) -> float:
        """ε/``max_eps`` at ``step``, between 0 and 1."""


@dataclass(frozen=True)
class _Schedule:
    max_eps: Epsilon | tuple[Epsilon, ...]

    def __post_init__(self) -> None:
        for eps in self.max_eps if isinstance(self.max_eps, tuple) else (self.max_eps,):
            check_eps(eps)

    def fraction(self, step: int) -> float:
        """ε/``max_eps`` at ``step``."""
        return 1.0

    def __call__(self, step: int) -> Epsilon | tuple[Epsilon, ...]:
        fraction = self.fraction(step)
        if isinstance(self.max_eps, tuple):
            return tuple(eps * fraction for eps in self.max_eps)
        return self.max_eps * fraction


@dataclass(frozen=True)
class ConstantEpsilon(_Schedule):
    """ε = ``max_eps`` at every step (so that the regularisers, weighted 1 − ε/ε_max, are off)."""


@dataclass(frozen=True)
class _Ramp(_Schedule):
    """A schedule that grows from 0 to ``max_eps`` between two steps.

    Attributes:
        max_eps: the radius at the end, in units of the input: a number, a tensor, or one of these per input.
        start: the epoch, counted from 1, at whose first step the ramp begins.
        length: epochs of the ramp; with 0, ε is ``max_eps`` from the start on.
        steps_per_epoch: batches in an epoch.
    """

    start: int
    length: int
    steps_per_epoch: int
    first_step: int = field(init=False)
    last_step: int = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 1 or self.length < 0 or self.steps_per_epoch < 1:
            text = "a schedule needs start ≥ 1 (epochs count from 1), length ≥ 0 and steps_per_epoch ≥ 1; found "
            raise ValueError(text + f"start={self.start}, length={self.length}, steps_per_epoch={self.steps_per_epoch}")
        object.__setattr__(self, "first_step", (self.start - 1) * self.steps_per_epoch)
        object.__setattr__(self, "last_step", (self.start + self.length - 1) * self.steps_per_epoch)

    def fraction(self, step: int) -> float:
        if step >= self.last_step:
            return 1.0
        done, total = step - self.first_step, self.last_step - self.first_step
        return self._rise(done, total) if done > 0 else 0.0

    def _rise(self, done: int, total: int) -> float:
        return done / total


@dataclass(frozen=True)
class LinearEpsilon(_Ramp):
    """ε grows linearly from 0 to ``max_eps``."""


@dataclass(frozen=True)
class SmoothedEpsilon(_Ramp):
    """ε grows as a·(s − s0)^beta over the fraction ``mid`` of the ramp, and linearly after it.

    Value and slope agree where the two pieces join (Gowal et al., 2018; the schedule of Shi et al.). Equal to
    ``auto_LiRPA.eps_scheduler.SmoothedScheduler`` where that is defined; linear where the first piece is empty.

    Attributes:
        mid: fraction of the ramp that follows the power law, from 0 to 1.
        beta: exponent of the power law, at least 2.
    """

    mid: float = 0.25
    beta: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.mid <= 1 and self.beta >= 2):
            raise ValueError(f"expected 0 ≤ mid ≤ 1 and beta ≥ 2; found mid={self.mid}, beta={self.beta}")

    def _rise(self, done: int, total: int) -> float:
        join = int(self.mid * total)
        # a·join^beta at the join, where the slope a·beta·join^(beta − 1) reaches 1 at the end.
        at_join = join / ((total - join) * self.beta + join)
        if done < join:
            return float(at_join * (done / join) ** self.beta)
        return at_join + (1 - at_join) * (done - join) / (total - join)


SCHEDULES: dict[str, type[LinearEpsilon | SmoothedEpsilon]] = {"smoothed": SmoothedEpsilon, "linear": LinearEpsilon}
