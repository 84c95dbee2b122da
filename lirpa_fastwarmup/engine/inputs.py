"""The inputs of a network as one tensor, so that boxes, attacks and checks need not know how many there are.

A single input stays as it is. Several inputs are packed: flattened, one after the other, into (batch, elements).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.boxes import Epsilon, InputRange, broadcast_to_batch, check_eps, check_input_shapes, check_pair
from lirpa_fastwarmup.engine.compat import engine

Inputs = Tensor | Sequence[Tensor]
_LARGEST = 2**24  # Integers up to here are exact in float32.


def bounded_tensor(x: Tensor, lower: Tensor, upper: Tensor, eps: Any = None) -> Any:
    """``x`` with the box from ``lower`` to ``upper`` around it."""
    # The engine's constructor does the same, but fails under the dispatch mode of `memory`.
    return with_ends(Tensor._make_subclass(engine.BoundedTensor, x, x.requires_grad), lower, upper, eps)


def with_ends(box: Any, lower: Tensor, upper: Tensor, eps: Any = None) -> Any:
    """``box``, a BoundedTensor, with other ends; the old ones are gone."""
    box.ptb = engine.PerturbationLpNorm(norm=math.inf, eps=eps, x_L=lower, x_U=upper)
    return box


class Layout:
    """The shapes and dtypes of a network's inputs, and their places in one tensor.

    Integer inputs (indices) are packed as floating-point numbers, and never perturbed.
    """

    def __init__(self, example: Sequence[Tensor]) -> None:
        self.example = tuple(example)
        self.shapes = [x.shape[1:] for x in example]
        self.is_single = len(self.example) == 1
        self._sizes = [math.prod(shape) for shape in self.shapes]
        self._floating = [x.is_floating_point() for x in example]

    @property
    def packed_shape(self) -> torch.Size:
        return self.shapes[0] if self.is_single else torch.Size([sum(self._sizes)])

    def pack(self, inputs: Inputs) -> Tensor:
        """One tensor, from one input or several; TypeError or ValueError if they do not fit, or an integer is large."""
        parts = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        check_input_shapes(parts, self.example)
        if self.is_single:
            return parts[0]
        if [part.is_floating_point() for part in parts] != self._floating:
            kinds = ", ".join(str(x.dtype) for x in self.example)
            raise TypeError(f"the network was wrapped for inputs of {kinds}; found {[part.dtype for part in parts]}")
        if len({len(part) for part in parts}) > 1:
            raise ValueError(f"inputs must have one batch size; found {[len(part) for part in parts]} samples")
        for part in parts:
            is_index = not part.is_floating_point() and part.device.type == "cpu" and part.numel() > 0
            if is_index and (largest := int(part.abs().max())) > _LARGEST:
                raise ValueError(f"integer inputs must be at most {_LARGEST}; found {largest}")
        dtype = next((part.dtype for part in parts if part.is_floating_point()), torch.get_default_dtype())
        if not all(self._floating):  # Half precision would round integers.
            dtype = torch.promote_types(dtype, torch.float32)
        return torch.cat([part.reshape(len(part), -1).to(dtype) for part in parts], 1)

    def unpack(self, packed: Tensor) -> tuple[Any, ...]:
        """The inputs in ``packed``; for a BoundedTensor, the boxes around floating-point inputs."""
        if self.is_single:
            return (packed,)
        perturbation = getattr(packed, "ptb", None)
        parts: list[Any] = self._split(packed)
        if perturbation is not None:
            each = zip(parts, self._split(perturbation.x_L), self._split(perturbation.x_U), strict=True)
            parts = [bounded_tensor(*part) if part[0].is_floating_point() else part[0] for part in each]
        return tuple(parts)

    def _split(self, packed: Tensor) -> list[Tensor]:
        return [
            (part if x.is_floating_point() else part.round().to(x.dtype)).reshape(len(part), *shape)
            for part, shape, x in zip(packed.split(self._sizes, 1), self.shapes, self.example, strict=True)
        ]

    def radii(self, eps: Any) -> list[Epsilon]:
        """The radius of each input, from a sequence of radii, or from one for all floating-point inputs."""
        if isinstance(eps, tuple | list):
            return self._one_each(eps)
        return [eps if floating else 0.0 for floating in self._floating]

    def ranges(self, input_range: Any) -> list[InputRange | None]:
        """The range of each input, from a sequence of ranges, or from one for all floating-point inputs."""
        is_sequence = isinstance(input_range, tuple | list)
        if is_sequence and all(one is None or isinstance(one, tuple | list) for one in input_range):
            return self._one_each(input_range)
        return [input_range if floating else None for floating in self._floating]

    def _one_each(self, values: Sequence[Any]) -> list[Any]:
        if len(values) != len(self.example):
            raise ValueError(f"the network has {len(self.example)} input(s); found {len(values)} values: {values}")
        return list(values)

    def pack_eps(self, eps: Any, input_range: Any = None) -> Epsilon:
        """The radius of packed inputs, from one for all floating-point inputs or one each, as :func:`check_eps`."""
        radii, ranges = self.radii(eps), self.ranges(input_range)
        for radius, one, floating in zip(radii, ranges, self._floating, strict=True):
            check_eps(radius, one)
            if not floating and bool(torch.as_tensor(radius).ne(0).any()):
                raise ValueError(f"an integer input cannot be perturbed: give it the radius 0, found {radius}")
        return radii[0] if self.is_single else self._packed(radii, "eps")

    def pack_range(self, input_range: Any) -> InputRange | None:
        """The range of packed inputs, from one for all floating-point inputs, or one per input."""
        ranges = self.ranges(input_range)
        for one in ranges:
            check_pair(one)
        if self.is_single or all(one is None for one in ranges):
            return ranges[0]
        lows, highs = zip(*[(-math.inf, math.inf) if one is None else one for one in ranges], strict=True)
        return self._packed(lows, "input_range"), self._packed(highs, "input_range")

    def _packed(self, values: Sequence[Any], what: str) -> Tensor:
        """Values per element, (elements,), or (batch, elements) where a value has a batch dimension."""
        device = next((value.device for value in values if isinstance(value, Tensor)), None)
        whole = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
        rows = max([len(v) for v, shape in zip(whole, self.shapes, strict=True) if v.ndim == len(shape) + 1], default=1)
        flat = []
        for value, shape in zip(whole, self.shapes, strict=True):
            template = torch.empty(rows, *shape, dtype=torch.float64, device=value.device)
            fitted = torch.as_tensor(broadcast_to_batch(value, template, what))
            flat.append(fitted.expand_as(template).reshape(rows, -1))
        packed = torch.cat(flat, 1)
        return packed if rows > 1 else packed[0]


class Unpacked(nn.Module):
    """A network of several inputs as a function of the packed ones."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self._layout = model, layout
        self.training = model.training

    def forward(self, packed: Tensor) -> Any:
        return self.model(*self._layout.unpack(packed))
