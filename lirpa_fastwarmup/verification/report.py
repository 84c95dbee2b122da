"""Verifications as files that can be quoted, and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lirpa_fastwarmup.verification.certify import ATTACK
from lirpa_fastwarmup.verification.radius import Radius
from lirpa_fastwarmup.verification.result import Certificate, ErrorRate, Verification

CERTIFICATES, SUMMARY, RADII, JOURNAL = "certificates.csv", "verification.json", "radii.csv", "verification.partial"
WRITTEN = (CERTIFICATES, SUMMARY, RADII)
_DIGITS = len("sha256:") + 16  # Of a digest, in tables.


def certificate_rows(verifications: Sequence[Verification], weights: str) -> list[dict[str, Any]]:
    """The lines of ``certificates.csv``: one for each sample and radius, with the digest of the ``weights``."""
    return [_certificate_row(sample, one.eps, weights) for one in verifications for sample in one.certificates]


def _certificate_row(sample: Certificate, eps: Any, weights: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "index": sample.index,
        "label": sample.label,
        "prediction": sample.prediction,
        "verified": _flag(sample.verified),
        "method": sample.method or "",
        "margin_lower_bound": "" if math.isnan(sample.margin) else repr(sample.margin),
        "attacked": _flag(sample.attacked),
        "eps": eps,
    }
    if sample.float64 is not None:
        row["float64"] = sample.float64
    if sample.untested:
        row["untested"] = 1
    return {**row, "weights": weights[:_DIGITS]}


def _flag(value: bool | None) -> str:
    return "" if value is None else str(int(value))


def radius_rows(radii: Sequence[Radius], weights: str) -> list[dict[str, Any]]:
    """The lines of ``radii.csv``: one for each sample, with the digest of the ``weights``."""
    return [
        {
            "index": one.index,
            "label": one.label,
            "prediction": one.prediction,
            "certified_radius": repr(one.radius),
            "method": one.method or "",
            **({"untested": 1} if one.untested else {}),
            "weights": weights[:_DIGITS],
        }
        for one in radii
    ]


def verification_entry(one: Verification) -> dict[str, Any]:
    """What ``verification.json`` says of one radius."""
    entry: dict[str, Any] = {
        "eps": one.eps,
        "standard_error": _share(one.standard_error),
        "pgd_error": _share(one.pgd_error),
        "verified_error": _share(one.verified_error),
        "stages": {
            name: {
                "samples": stage.samples,
                "attacked" if name == ATTACK else "proved": stage.hits,
                "seconds_per_sample": stage.seconds / stage.samples,
            }
            for name, stage in one.stages.items()
        },
        "contradictions": one.contradictions,
    }
    if one.untested:
        entry["untested"] = list(one.untested)
    if one.certificates[0].float64 is not None:
        entry["changed_in_float64"] = {str(sample.index): sample.float64 for sample in one.changed_in_float64}
    return entry


def _share(share: ErrorRate | None) -> dict[str, Any] | None:
    if share is None:
        return None
    return {"value": share.value, "count": share.count, "interval_95": list(share.interval)}


def radius_entry(radii: Sequence[Radius], tolerance: float) -> dict[str, Any]:
    """What ``verification.json`` says of the radii."""
    values = [one.radius for one in radii]
    return {
        "tolerance": tolerance,
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "not_certified": sum(value == 0 for value in values),
        "contradictions": sorted(one.index for one in radii if one.attacked),
    }


def as_text(one: Verification) -> str:
    """One radius as a table."""
    pgd = one.pgd_error
    lines = [
        f"eps {one.eps}: {len(one.certificates):,} samples, errors with 95 % intervals",
        f"  standard error  {one.standard_error}",
        f"  PGD error       {'none' if pgd is None else pgd}",
        f"  verified error  {one.verified_error}",
        "  stage        samples  decided  s per sample",
    ]
    if one.untested:
        lines.insert(1, f"  rests on untested bounds of {'; '.join(one.untested)}")
    for name, stage in one.stages.items():
        lines.append(f"  {name:<11} {stage.samples:>8,} {stage.hits:>8,}  {stage.seconds / stage.samples:.4f}")
    changed = one.changed_in_float64
    if one.certificates[0].float64 is not None:
        lines.append(f"  in float64 the verdicts of {len(changed)} samples change")
    lines += [f"    sample {sample.index}: {sample.float64}" for sample in changed]
    return "\n".join(lines)


def radii_as_text(entry: Mapping[str, Any], count: int) -> str:
    """The radii as one line."""
    return (
        f"certified radius: mean {entry['mean']:.4f}, median {entry['median']:.4f} over {count:,} samples; none for "
        f"{entry['not_certified']:,} of them"
    )
