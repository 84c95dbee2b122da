"""What a verification comes to: a certificate for each sample, and the errors that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_Z = 1.959963984540054  # The normal distribution's 97.5 % quantile.


@dataclass(frozen=True)
class Certificate:
    """What is known of one sample.

    Attributes:
        index: its place among the samples.
        label, prediction: its class, and the network's.
        verified: whether some method proved that every point of its box is classified as ``label``; where double
            precision was asked for, in both precisions.
        method: the method that proved it, the cheapest; ``None`` if none did.
        margin: the largest lower bound on min_j z_y − z_j over the box that any method gave; NaN if all were NaN.
        attacked: whether a misclassified point of the box was found; ``None`` if none was looked for.
        float64: how the verdicts change in double precision, "" if they do not; ``None`` if that was not asked for.
        untested: whether it rests on bounds that have not been tested.
    """

    index: int
    label: int
    prediction: int
    verified: bool
    method: str | None
    margin: float
    attacked: bool | None
    float64: str | None = None
    untested: bool = False

    @property
    def correct(self) -> bool:
        """Whether the sample itself is classified as its label."""
        return self.prediction == self.label


@dataclass(frozen=True)
class ErrorRate:
    """A share of samples, with Wilson's 95 % confidence interval (Wilson 1927).

    Attributes:
        count: samples that it is the share of, among ``samples``.
        samples: all of them.
    """

    count: int
    samples: int

    @property
    def value(self) -> float:
        return self.count / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the interval."""
        n, p = self.samples, self.value
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        # At no sample and at all of them the interval's end is the share itself, which rounding would miss.
        low = 0.0 if self.count == 0 else max(0.0, centre - half)
        high = 1.0 if self.count == n else min(1.0, centre + half)
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2%} [{low:.2%}, {high:.2%}]"


@dataclass
class Stage:
    """What one part of the verification, the attack or a method, had to do and did.

    Attributes:
        samples: how many samples it was given.
        hits: how many of them it decided: proved, or attacked with success.
        seconds: how long it took.
    """

    samples: int = 0
    hits: int = 0
    seconds: float = 0.0

    def add(self, other: Stage) -> None:
        """Take in another part of the same stage."""
        self.samples += other.samples
        self.hits += other.hits
        self.seconds += other.seconds


@dataclass(frozen=True)
class Verification:
    """All samples' certificates at one radius.

    Attributes:
        eps: the radius, in units of the input: a number, or nested lists of one value per channel or element.
        certificates: one per sample, in order.
        stages: "PGD" and each method, in the order in which they ran.
        contradictions: what was found that cannot be if all bounds are sound, one sentence each.
        untested: operators of the network whose bounds have not been tested, and on which every certificate rests.
    """

    eps: float | list[float]
    certificates: list[Certificate]
    stages: dict[str, Stage] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    untested: tuple[str, ...] = ()

    @property
    def standard_error(self) -> ErrorRate:
        """Samples that are misclassified."""
        return self._share([not sample.correct for sample in self.certificates])

    @property
    def pgd_error(self) -> ErrorRate | None:
        """Samples for which a misclassified point was found; ``None`` if none was looked for."""
        found = [sample.attacked for sample in self.certificates if sample.attacked is not None]
        return self._share(found) if found else None

    @property
    def verified_error(self) -> ErrorRate:
        """Samples that no method proved."""
        return self._share([not sample.verified for sample in self.certificates])

    @property
    def changed_in_float64(self) -> list[Certificate]:
        """The samples of which a verdict changes in double precision."""
        return [sample for sample in self.certificates if sample.float64]

    def proved_by(self, method: str) -> int:
        """How many samples ``method`` was the cheapest to prove."""
        return sum(sample.method == method for sample in self.certificates)

    @staticmethod
    def _share(flags: Sequence[bool]) -> ErrorRate:
        return ErrorRate(sum(flags), len(flags))
