"""Robustness of one sample as a VNN-LIB property (the standard of the VNN competitions)."""

from __future__ import annotations

from torch import Tensor


def robustness_property(lower: Tensor, upper: Tensor, label: int, classes: int, *, comment: str = "") -> str:
    """The property whose counterexamples are the points of a box at which ``label`` does not win alone.

    Inputs X_0, X_1, … are those of the flattened box, in row-major order. Its ends are written with all their digits,
    so that the property is about exactly this box. A verifier that answers "unsat" has certified the sample.

    Args:
        lower, upper: ends of the box, of the input's shape, without a batch dimension.
        label: the class that should win.
        classes: outputs Y_0, Y_1, …
        comment: put on top, a line each.

    Raises:
        ValueError: ``label`` is no class, or the box is empty.
    """
    if not 0 <= label < classes:
        raise ValueError(f"label {label} is none of the {classes} classes, 0 to {classes - 1}")
    if not bool((lower <= upper).all()):
        raise ValueError("the box is empty: its lower end is not below its upper one")
    lows, highs = lower.double().flatten().tolist(), upper.double().flatten().tolist()
    lines = [f"; {line}" for line in comment.splitlines()]
    lines += [f"(declare-const X_{place} Real)" for place in range(len(lows))]
    lines += [f"(declare-const Y_{place} Real)" for place in range(classes)]
    for place, (low, high) in enumerate(zip(lows, highs, strict=True)):
        lines += [f"(assert (>= X_{place} {_decimal(low)}))", f"(assert (<= X_{place} {_decimal(high)}))"]
    others = [f"    (and (>= Y_{other} Y_{label}))" for other in range(classes) if other != label]
    return "\n".join([*lines, "(assert (or", *others, "))", ""])


def _decimal(value: float) -> str:
    """All digits of ``value``, without an exponent, which VNN-LIB's parsers do not all read."""
    return format(value, "f") if float(format(value, "f")) == value else f"{value:.60f}".rstrip("0")
