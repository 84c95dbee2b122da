"""Robustness of one sample as a VNN-LIB property (the standard of the VNN competitions)."""

from torch import Tensor


def robustness_property(lower: Tensor, upper: Tensor, label: int, classes: int, *, comment: str = "") -> str:
    """The property whose counterexamples are the points of a box at which another class reaches the score of ``label``.

    Inputs X_0, X_1, … are the flattened box in row-major order, without a batch dimension. Bounds are written with all
    digits, so that the property describes exactly this box. The answer "unsat" certifies the sample.
    """
    if not 0 <= label < classes:
        raise ValueError(f"label {label} is none of the {classes} classes, 0 to {classes - 1}")
    if not bool((lower <= upper).all()):
        raise ValueError("the box is empty: its lower end is not below its upper end")
    lows, highs = lower.double().flatten().tolist(), upper.double().flatten().tolist()
    lines = [f"; {line}" for line in comment.splitlines()]
    lines += [f"(declare-const X_{place} Real)" for place in range(len(lows))]
    lines += [f"(declare-const Y_{place} Real)" for place in range(classes)]
    for place, (low, high) in enumerate(zip(lows, highs, strict=True)):
        lines += [f"(assert (>= X_{place} {_decimal(low)}))", f"(assert (<= X_{place} {_decimal(high)}))"]
    others = [f"    (and (>= Y_{other} Y_{label}))" for other in range(classes) if other != label]
    return "\n".join([*lines, "(assert (or", *others, "))", ""])


def _decimal(value: float) -> str:
    """All digits of ``value``, without an exponent, which not every VNN-LIB parser accepts."""
    return format(value, "f") if float(format(value, "f")) == value else f"{value:.60f}".rstrip("0")
