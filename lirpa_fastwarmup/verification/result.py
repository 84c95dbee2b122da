"""Certificates, certified radii and errors, and the tables and JSON entries made from them."""

from __future__ import annotations

import html
import math
import operator
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Generic, TypeVar

ATTACK, COMPLETE, RIGOROUS = "PGD", "abcrown", "rigorous"  # Their names among the stages.
_Z = 1.959963984540054  # The normal distribution's 97.5 % quantile.
_DIGITS = len("sha256:") + 16  # Of a digest, in tables.


@dataclass(frozen=True)
class Certificate:
    """The verdicts on one sample.

    Attributes:
        index: its number in the test set, or its place among the samples.
        label, prediction: its class, and the class that the network predicts.
        verified: whether a method proved that every point of its box is classified as ``label``; with ``float64``, in
            both precisions.
        method: the cheapest method that proved it; ``None`` without a proof.
        margin: the largest lower bound on min_j z_y − z_j over the box that any method computed; NaN without one.
        falsified: whether a misclassified point of the box was found; ``None`` if the box was not searched: there was
            no attack, or IBP had already certified the sample.
        float64: how double precision changes the verdicts, "" for no change; ``None`` without ``float64``.
        untested: whether the certificate relies on bounds that have not been tested.
        eps: its own radius (the largest of its elements), where samples differ; otherwise ``None``.
        rigorous: what was proved in spite of rounding: "exact", that exact arithmetic gives every real point of the box
            its label; "float32", that PyTorch's float32 arithmetic does too, at every float32 point; ``None`` for
            neither, or without ``rigorous``.
        complete: the outcome of α,β-CROWN: "certified", "falsified", "timeout", or "error: " and why; ``None`` if it
            did not run.
    """

    index: int
    label: int
    prediction: int
    verified: bool
    method: str | None
    margin: float
    falsified: bool | None
    float64: str | None = None
    untested: bool = False
    eps: float | None = None
    rigorous: str | None = None
    complete: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the sample itself is classified as its label."""
        return self.prediction == self.label


@dataclass(frozen=True)
class Radius:
    """The largest certified radius of one sample; fields are otherwise as in :class:`Certificate`."""

    index: int
    label: int
    prediction: int
    radius: float  # In units of the input; 0 for a misclassified sample, or without a proof.
    method: str | None  # The cheapest that proves it.
    falsified: bool  # A misclassified point was found in the certified box: the bounds are unsound.
    untested: bool = False

    def row(self, weights: str) -> dict[str, Any]:
        """Its row of ``radii.csv``, with the beginning of the digest ``weights``."""
        row: dict[str, Any] = {"index": self.index, "label": self.label, "prediction": self.prediction}
        row |= {"certified_radius": repr(self.radius), "method": self.method or ""}
        return {**row, **({"untested": 1} if self.untested else {}), "weights": weights[:_DIGITS]}


def radii_entry(radii: Sequence[Radius], tolerance: float) -> dict[str, Any]:
    """The entry of ``verification.json`` for ``radii``."""
    values = [one.radius for one in radii]
    return {
        "tolerance": tolerance,
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "not_certified": sum(value == 0 for value in values),
        "contradictions": sorted(one.index for one in radii if one.falsified),
    }


@dataclass(frozen=True)
class ErrorRate:
    """The fraction ``count`` / ``samples`` of a test set, with Wilson's 95 % confidence interval (Wilson 1927)."""

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
        # At 0 and 1 the interval ends exactly at the rate, which rounding would miss.
        return 0.0 if self.count == 0 else centre - half, 1.0 if self.count == n else centre + half

    def as_dict(self) -> dict[str, Any]:
        """Its entry in ``verification.json``."""
        return {"value": self.value, "count": self.count, "interval_95": list(self.interval)}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2%} [{low:.2%}, {high:.2%}]"


@dataclass
class Stage:
    """The attack, or one method: samples it ran on, samples it decided (falsified or proved), and seconds."""

    samples: int = 0
    hits: int = 0
    seconds: float = 0.0

    @property
    def per_sample(self) -> float:
        return self.seconds / max(1, self.samples)


Result = TypeVar("Result", Certificate, Radius)


@dataclass
class BatchResult(Generic[Result]):
    """The certificates or radii of a batch, its stages, and contradictions as pairs (index, text)."""

    certificates: list[Result] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    contradictions: list[tuple[int, str]] = field(default_factory=list)

    def numbered(self, numbers: Sequence[int]) -> BatchResult[Result]:
        """The same with ``numbers`` in place of the indices 0, 1, ..."""
        certificates = [replace(sample, index=numbers[sample.index]) for sample in self.certificates]
        return BatchResult(certificates, self.stages, [(numbers[index], text) for index, text in self.contradictions])

    def add(self, other: BatchResult[Result]) -> None:
        self.certificates += other.certificates
        self.contradictions += other.contradictions
        for name, stage in other.stages.items():
            sums = map(operator.add, astuple(self.stages.get(name, Stage())), astuple(stage))
            self.stages[name] = Stage(*sums)

    def sentences(self) -> list[str]:
        """The contradictions, with the samples they are about."""
        return [f"sample {index} {text}" for index, text in self.contradictions]

    @classmethod
    def from_dict(cls, kind: type[Result], values: dict[str, Any]) -> BatchResult[Result]:
        """The inverse of :func:`dataclasses.asdict`, also from JSON, for results of class ``kind``."""
        stages = {name: Stage(**stage) for name, stage in values["stages"].items()}
        contradictions = [(index, text) for index, text in values["contradictions"]]
        return BatchResult([kind(**row) for row in values["certificates"]], stages, contradictions)


@dataclass(frozen=True)
class Verification:
    """The certificates of all samples at one radius. Prints as a table.

    Attributes:
        eps: the radius in units of the input: a number, or lists of one value per input, channel, element or sample.
        certificates: one per sample, in order.
        stages: IBP, "PGD" and further methods, in the order in which they ran.
        contradictions: findings that are impossible if all bounds are sound, one sentence each.
        untested: operators of the network whose bounds have not been tested; every certificate relies on them.
    """

    eps: float | list[Any]
    certificates: list[Certificate]
    stages: dict[str, Stage] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    untested: tuple[str, ...] = ()

    @property
    def standard_error(self) -> ErrorRate:
        """Misclassified samples."""
        return ErrorRate(sum(not sample.correct for sample in self.certificates), len(self.certificates))

    @property
    def pgd_error(self) -> ErrorRate | None:
        """Falsified samples, α,β-CROWN's counterexamples among them; ``None`` if nothing searched for any."""
        found = [sample.falsified for sample in self.certificates]
        return None if found.count(None) == len(found) else ErrorRate(found.count(True), len(found))

    @property
    def checked(self) -> int:
        """The number of samples that were proved and attacked nevertheless, as a check of the bounds."""
        return sum(sample.verified and sample.falsified is not None for sample in self.certificates)

    @property
    def verified_error(self) -> ErrorRate:
        """Samples that no method proved."""
        return ErrorRate(sum(not sample.verified for sample in self.certificates), len(self.certificates))

    @property
    def changed_in_float64(self) -> list[Certificate]:
        """The samples whose verdicts change in double precision."""
        return [sample for sample in self.certificates if sample.float64]

    def proved_by(self, method: str) -> int:
        """The number of samples for which ``method`` was the cheapest that proved them."""
        return sum(sample.method == method for sample in self.certificates)

    def rows(self, weights: str = "") -> Iterator[dict[str, Any]]:
        """The rows of ``certificates.csv``, with the beginning of the digest ``weights``."""
        for sample in self.certificates:
            row: dict[str, Any] = {"index": sample.index, "label": sample.label, "prediction": sample.prediction}
            row |= {"verified": int(sample.verified), "method": sample.method or ""}
            row["margin_lower_bound"] = "" if math.isnan(sample.margin) else repr(sample.margin)
            row["falsified"] = "" if sample.falsified is None else int(sample.falsified)
            own = self.eps if sample.eps is None else sample.eps
            row["eps"] = own if isinstance(own, list) else float(own)
            row |= {} if sample.float64 is None else {"float64": sample.float64}
            row |= {"complete": sample.complete or ""} if COMPLETE in self.stages else {}
            row |= {"rigorous": sample.rigorous or ""} if RIGOROUS in self.stages else {}
            row |= {"untested": 1} if sample.untested else {}
            yield {**row, "weights": weights[:_DIGITS]}

    def as_dict(self) -> dict[str, Any]:
        """The entry of ``verification.json``."""
        stages: dict[str, Any] = {}
        for name, stage in self.stages.items():
            hits = {"falsified" if name == ATTACK else "proved": stage.hits}
            stages[name] = {"samples": stage.samples, **hits, "seconds_per_sample": stage.per_sample}
        entry: dict[str, Any] = {
            "eps": self.eps,
            "standard_error": self.standard_error.as_dict(),
            "pgd_error": self.pgd_error.as_dict() if self.pgd_error else None,
            "verified_error": self.verified_error.as_dict(),
            "stages": stages,
            "proved_and_attacked": self.checked,
            "contradictions": self.contradictions,
        }
        entry |= {"untested": list(self.untested)} if self.untested else {}
        entry |= {"outcomes": self.outcomes()} if COMPLETE in self.stages else {}
        stated = {name: self.rigorous(name) for name in ("exact", "float32")}
        entry |= {"rigorous": stated} if RIGOROUS in self.stages else {}
        changed = {str(sample.index): sample.float64 for sample in self.changed_in_float64}
        return entry | ({"changed_in_float64": changed} if self._has_float64() else {})

    def rigorous(self, *statements: str) -> int:
        """The number of samples of which one of ``statements``, "exact" and "float32", was proved."""
        return sum(sample.rigorous in statements for sample in self.certificates)

    def outcomes(self) -> dict[str, int]:
        """The number of samples by α,β-CROWN's outcome."""
        words = Counter(one.complete.partition(":")[0] for one in self.certificates if one.complete)
        return {name: words[name] for name in ("certified", "falsified", "timeout", "error")}

    def _has_float64(self) -> bool:
        return any(sample.float64 is not None for sample in self.certificates)

    def __str__(self) -> str:
        own = [sample.eps for sample in self.certificates if sample.eps is not None]
        eps = f"{min(own):g} to {max(own):g}" if own else self.eps
        lines = [f"eps {eps}: {len(self.certificates):,} samples, errors with 95 % intervals"]
        if self.untested:
            lines.append(f"relies on untested bounds of {'; '.join(self.untested)}")
        rates = {"standard": self.standard_error, "PGD": self.pgd_error, "verified": self.verified_error}
        lines += [f"{f'{name} error':<14}  {'none' if rate is None else rate}" for name, rate in rates.items()]
        lines.append("stage        samples  decided  s per sample")
        for name, one in self.stages.items():
            lines.append(f"{name:<11} {one.samples:>8,} {one.hits:>8,}  {one.per_sample:.4f}")
        if ATTACK in self.stages:
            lines.append(f"{ATTACK} attacked {self.checked:,} proved samples, as a check of the bounds")
        if COMPLETE in self.stages:
            lines.append(", ".join(f"{count:,} {name}" for name, count in self.outcomes().items()) + f" by {COMPLETE}")
        failed = [one for one in self.certificates if (one.complete or "").startswith("error")]
        lines += [f"  sample {one.index}: {one.complete}" for one in failed]
        if RIGOROUS in self.stages:
            both, exact = self.rigorous("float32"), self.rigorous("exact", "float32")
            lines.append(f"in spite of rounding: {exact:,} in exact arithmetic, {both:,} also as computed in float32")
        if self._has_float64():
            lines.append(f"float64 changes the verdicts of {len(self.changed_in_float64)} samples")
        lines += [f"  sample {sample.index}: {sample.float64}" for sample in self.changed_in_float64]
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
