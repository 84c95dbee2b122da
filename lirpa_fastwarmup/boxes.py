"""The box around a batch, and checks of radii, input ranges, batches and labels: plain tensors, no engine."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

Epsilon = float | Tensor
InputRange = tuple[float | Tensor, float | Tensor]


def box_ends(x: Tensor, eps: Epsilon, input_range: InputRange | None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest corner of the box {x' : |x' − x| ≤ eps, elementwise} ∩ input_range."""
    eps = broadcast_to_batch(eps, x, "eps")
    lower, upper = x - eps, x + eps
    if input_range is not None:
        low, high = (broadcast_to_batch(end, x, "input_range") for end in input_range)
        lower, upper = lower.clamp(min=low), upper.clamp(max=high)
    return lower, upper


def check_eps(eps: Epsilon, input_range: InputRange | None = None) -> None:
    """Check that ``eps`` is a valid radius, no wider than ``input_range`` (``None`` allows any width).

    Raises TypeError if ``eps`` is neither a number nor a tensor of numbers, or as :func:`check_pair`, and ValueError if
    ``eps`` is negative, infinite, NaN, empty or wider than the range, or a lower end exceeds the upper end, or is NaN.
    """
    found = f"a tensor of {eps.dtype}" if isinstance(eps, Tensor) else type(eps).__name__
    if found in ("bool", "a tensor of torch.bool") or not isinstance(eps, numbers.Real | Tensor):
        raise TypeError(f"eps must be a number or a tensor, in units of the input; found {found}")
    values = eps.detach().flatten().tolist() if isinstance(eps, Tensor) else [float(eps)]
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"eps must be finite and at least 0, in units of the input; found {eps}")
    check_pair(input_range)
    if input_range is None:
        return
    low, high = (torch.as_tensor(end).cpu() for end in input_range)
    if not bool((low <= high).all()):
        raise ValueError(f"input_range must not begin above its end; found {input_range}")
    width = float((high - low).max())
    if max(values) > width:
        text = f"eps is {eps}, and the input range {input_range} is only {width:g} wide, so every box would be the "
        raise ValueError(text + "whole range. eps is in units of the input: for pixels from 0 to 1, write 8/255, not 8")


def check_positive(eps: Epsilon) -> None:
    """Raise ValueError if ``eps`` is 0, for every element."""
    if not bool(torch.as_tensor(eps).gt(0).any()):
        text = f"eps must be above 0, found {eps}: a box of radius 0 is the sample itself, which the standard error "
        raise ValueError(text + "covers. Pass the radius to certify, in units of the input, such as 8/255")


def check_pair(input_range: InputRange | None) -> None:
    """Raise TypeError if ``input_range`` is not a pair of numbers or tensors, without reading tensors."""
    if input_range is None:
        return
    ends = input_range if isinstance(input_range, tuple | list) else ()
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, numbers.Real | Tensor) for end in ends):
        text = "input_range must be a pair, the lowest and the highest valid input, each a number or a tensor, or None "
        raise TypeError(text + f"for data without a range; found {input_range!r}")


def broadcast_to_batch(value: float | Tensor, x: Tensor, what: str) -> float | Tensor:
    """``value`` in a shape that broadcasts over the batch ``x`` of shape ``(batch, *input)``.

    A vector is one value per channel (per feature, if inputs are vectors). Raises ValueError if the shape does not fit.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    shape = (len(value), *[1] * (x.ndim - 2)) if value.ndim == 1 else value.shape
    try:
        fits = len(shape) >= x.ndim - 1 and torch.broadcast_shapes(shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        text = f"{what} has shape {tuple(value.shape)}, which does not fit inputs of shape {tuple(x.shape[1:])}: pass "
        raise ValueError(text + "a number, one value per channel, or a tensor of the input's shape")
    return value.to(x).view(shape)


def is_per_sample(eps: Any, x: Tensor) -> TypeGuard[Tensor]:
    """Whether ``eps`` has as many dimensions as the batch ``x``, the first one for the samples."""
    return isinstance(eps, Tensor) and eps.ndim == x.ndim


def converted(x: Tensor, dtype: torch.dtype, eps: Epsilon) -> Tensor:
    """``x`` in ``dtype``; raises ValueError if rounding moves an element by more than a tenth of its radius."""
    rounded = x.to(dtype)
    if x.dtype == torch.float64 != dtype:
        moved, radius = (rounded.double() - x).abs(), torch.as_tensor(broadcast_to_batch(eps, x, "eps"))
        if bool(((moved > radius / 10) & (radius > 0)).any()):
            text = f"converting the inputs to {dtype} moves them by up to {float(moved.max()):.2g}, too far for such "
            raise ValueError(text + "small boxes: shift the data closer to 0 before, or use a larger radius")
    return rounded


def radii_of(eps: Epsilon, x: Tensor, samples: Tensor | slice) -> Epsilon:
    """The radii of ``samples``, indices into the batch ``x``: ``eps``, or its rows if it has one radius per sample."""
    return eps[samples] if is_per_sample(eps, x) and len(eps) == len(x) else eps


def labels_fit(y: Tensor, classes: int) -> Tensor:
    """Whether all labels are class numbers; a 0-dim tensor on their device."""
    return ((y >= 0) & (y < classes)).all()


def labels_error(y: Tensor, classes: int) -> ValueError:
    """The error to raise if :func:`labels_fit` is false."""
    found = f"{int(y.min())} to {int(y.max())}"
    return ValueError(f"labels must be between 0 and {classes - 1}, for a network of {classes} outputs; found {found}")


def inputs_fit(x: Tensor, input_range: InputRange | None) -> Tensor:
    """Whether all inputs are finite and within their range; a 0-dim tensor on their device."""
    if input_range is None:
        return x.isfinite().all()
    low, high = (broadcast_to_batch(end, x, "input_range") for end in input_range)
    return ((x >= low) & (x <= high)).all()


def inputs_error(x: Tensor, input_range: InputRange | None) -> ValueError:
    """The error to raise if :func:`inputs_fit` is false."""
    found = f"found values from {float(x.min()):.6g} to {float(x.max()):.6g}"
    if input_range is None:
        return ValueError(f"inputs must be finite; {found}")
    ends = (end if isinstance(end, float | int) or end.numel() < 9 else f"{end.min():g} or more" for end in input_range)
    text = f"inputs must lie in input_range ({', '.join(map(str, ends))}), to which the box is clipped; {found}. Keep "
    text += "data in its own units, normalise in the network's first layer (lirpa_fastwarmup.models.Normalize), and "
    return ValueError(text + "pass the data's range as input_range, or None for data without one")


def check_batch(x: Tensor, y: Tensor, classes: int, input_range: InputRange | None) -> None:
    """Like :func:`check_shapes`, and ValueError if a label or input is out of range; synchronises with the device."""
    check_shapes(x, y)
    if not bool(labels_fit(y, classes)):
        raise labels_error(y, classes)
    if not bool(inputs_fit(x, input_range)):
        raise inputs_error(x, input_range)


def check_input_shapes(inputs: Sequence[Tensor], example: Sequence[Tensor]) -> None:
    """Refuse inputs of another number or shapes than the example's (bounds hold for these only), and other types."""
    kinds = {type(one).__name__ for one in inputs if not isinstance(one, Tensor)}
    if kinds:
        raise TypeError(f"inputs must be tensors, found {', '.join(kinds)}: for arrays, pass torch.from_numpy(x)")
    expected, found = (", ".join(str(tuple(one.shape[1:])) for one in tensors) for tensors in (example, inputs))
    if found != expected:
        text = f"the network was wrapped for inputs of shape {expected}, batch aside; found {found}. Pass the inputs "
        raise ValueError(text + "alone, batch first, or wrap the network for these shapes")


def check_shapes(x: Tensor, y: Tensor) -> None:
    """Raise TypeError if labels are not int64, and ValueError if the batch is empty or labels are not one per input."""
    if y.dtype != torch.int64:
        raise TypeError(f"labels must be class numbers of dtype int64, found {y.dtype}: pass y.long()")
    if x.ndim == 0 or y.shape != x.shape[:1] or len(x) == 0:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"expected inputs (batch, ...) and labels (batch,) of one length ≥ 1; found {shapes}")
