"""Operators where an installed engine has none, or one that fails.

Release 0.3 knows two-dimensional convolutions only, and transposed ones only without padding; 0.7
adds one-dimensional ones. Everything else that PyTorch exports as ``Conv`` or ``ConvTranspose`` is
bounded here: IBP by centre and radius, W·c ± |W|·r, CROWN by the adjoint of the convolution.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine

Bound: Any = engine.bound_general.Bound
BoundConv: Any = engine.bound_general.BoundConv
BoundConvTranspose: Any = engine.bound_general.BoundConvTranspose
BoundLinear: Any = engine.bound_general.BoundLinear
BoundMatMul: Any = engine.bound_general.BoundMatMul
BoundAveragePool: Any = engine.bound_general.BoundAveragePool
BoundReshape: Any = engine.bound_general.BoundReshape
BoundConcat: Any = engine.bound_general.BoundConcat

_CONVOLUTION: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class BoundConvNd(Bound):
    """A convolution over one, two or three spatial dimensions, plain or transposed.

    Inputs are the features ``(batch, channels, *space)``, the weight and, optionally, the bias.
    """

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any, *, transposed: bool) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.rank = len(attr["kernel_shape"])
        if attr["pads"][: self.rank] != attr["pads"][self.rank :]:
            raise NotImplementedError(f"a convolution padded differently at its two ends: {attr['pads']}")
        self.transposed = transposed
        self.patches_start = False
        self.stride: list[int] = attr["strides"]
        self.padding: list[int] = attr["pads"][: self.rank]
        self.dilation: list[int] = attr["dilations"]
        self.groups: int = attr["group"]
        self.output_padding: list[int] = attr.get("output_padding", [0] * self.rank)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.transposed:
            return _TRANSPOSED[self.rank](
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return _CONVOLUTION[self.rank](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _apply_adjoint(self, coefficients: Tensor, weight: Tensor) -> Tensor:
        if self.transposed:
            return _CONVOLUTION[self.rank](
                coefficients, weight, None, self.stride, self.padding, self.dilation, self.groups
            )
        # What the strided convolution leaves of its input at the far end, so that the shapes agree.
        left_over = [
            int(self.input_shape[2 + d])
            - (int(coefficients.shape[2 + d]) - 1) * self.stride[d]
            + 2 * self.padding[d]
            - self.dilation[d] * (int(weight.shape[2 + d]) - 1)
            - 1
            for d in range(self.rank)
        ]
        return _TRANSPOSED[self.rank](
            coefficients, weight, None, self.stride, self.padding, left_over, self.groups, self.dilation
        )

    def forward(self, *x: Tensor) -> Tensor:
        return self._apply_weight(x[0], x[1], x[2] if len(x) == 3 else None)

    def interval_propagate(self, *v: Any) -> tuple[Tensor, Tensor]:
        if self.is_input_perturbed(1):
            raise NotImplementedError("bounds over perturbed convolution weights")
        lower, upper = v[0]
        weight = v[1][0]
        centre = self._apply_weight((lower + upper) / 2, weight, v[2][0] if len(v) == 3 else None)
        radius = self._apply_weight((upper - lower) / 2, weight.abs())
        return centre - radius, centre + radius

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        weight = x[1].lower

        def one_side(last_A: Any) -> tuple[Any, Any]:
            if last_A is None:
                return None, 0
            if not isinstance(last_A, Tensor):
                raise NotImplementedError(
                    f"CROWN through this convolution with coefficients of type {type(last_A).__name__}: "
                    "build the BoundedModule with bound_opts={'conv_mode': 'matrix'}, or use IBP"
                )
            next_A = self._apply_adjoint(last_A.flatten(0, 1), weight).unflatten(0, last_A.shape[:2])
            bias = last_A.flatten(3).sum(3).matmul(x[2].lower) if len(x) == 3 else 0
            return next_A, bias

        lA, lower_bias = one_side(last_lA)
        uA, upper_bias = one_side(last_uA)
        return [(lA, uA), *[(None, None)] * (len(x) - 1)], lower_bias, upper_bias


def _automatic_padding(attr: Any) -> list[int]:
    """The padding that ``padding="same"`` stands for, which neither engine works out."""
    rank = len(attr["kernel_shape"])
    if attr.get("auto_pad") not in ("SAME_UPPER", b"SAME_UPPER"):
        return [0] * (2 * rank)
    # "same" comes with stride 1 only; an odd total, of an even kernel, is padded at the far end.
    totals = [d * (k - 1) for d, k in zip(attr["dilations"], attr["kernel_shape"], strict=True)]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def _engine_first(engine_operator: Any, *, transposed: bool) -> Callable[..., Any]:
    """An operator factory: the engine's own node where it takes these attributes, else ours."""

    def build(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
        attr = {"pads": _automatic_padding(attr), **attr}
        # 0.7 builds a three-dimensional convolution without complaint, and then runs conv2d.
        if len(attr["kernel_shape"]) < 3:
            try:
                return engine_operator(attr, inputs, output_index, options)
            except (AssertionError, IndexError):
                pass
        return BoundConvNd(attr, inputs, output_index, options, transposed=transposed)

    return build


CUSTOM_OPERATORS: dict[str, Callable[..., Any]] = {
    "onnx::Conv": _engine_first(BoundConv, transposed=False),
    "onnx::ConvTranspose": _engine_first(BoundConvTranspose, transposed=True),
}


class MarginMatMul(BoundMatMul):
    """A linear layer without bias whose interval bound takes a margin matrix (0.3's takes none)."""

    def interval_propagate(self, *v: Any, C: Tensor | None = None) -> Any:
        return BoundLinear.interval_propagate(self, *v, C=C)


class LinfConcat(BoundConcat):
    """Concatenation of intervals, also where one is the input box, at which 0.7's stumbles."""

    def interval_propagate(self, *v: Any) -> Any:
        perturbations = [getattr(interval, "ptb", None) for interval in v]
        if all(ptb is None or getattr(ptb, "norm", None) == math.inf for ptb in perturbations):
            return self.forward(*(interval[0] for interval in v)), self.forward(*(interval[1] for interval in v))
        return super().interval_propagate(*v)


class BatchReshape(BoundReshape):
    """A reshape that keeps the batch dimension, whatever the batch.

    0.3's trace of ``x.view(x.shape[0], -1)`` holds the size of the example batch as a constant.

    Attributes:
        traced_batch: that size.
    """

    traced_batch: int

    def forward(self, x: Tensor, shape: Any) -> Any:
        shape = [int(size) for size in shape]
        if shape[0] == self.traced_batch:
            shape[0] = x.shape[0]
        return super().forward(x, shape)


class LinearAveragePool(BoundAveragePool):
    """Average pooling whose CROWN bounds take stride and padding into account.

    0.3's are wrong wherever the stride is not the window or there is padding, and fail on transposed coefficients.
    """

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        if all(A is None or isinstance(A, Tensor) for A in (last_lA, last_uA)):
            return [(self._adjoint(last_lA), self._adjoint(last_uA))], 0, 0
        if list(self.stride) != list(self.kernel_size) or any(self.padding):
            raise NotImplementedError(
                f"CROWN through average pooling of windows {self.kernel_size} with stride {self.stride} and padding "
                f"{self.padding}, with coefficients kept as patches: build the BoundedModule with "
                "bound_opts={'conv_mode': 'matrix'}, or use IBP"
            )
        last_lA, last_uA = (A and A.create_similar(A.patches.contiguous()) for A in (last_lA, last_uA))
        return super().bound_backward(last_lA, last_uA, *x, **kwargs)

    def _adjoint(self, coefficients: Tensor | None) -> Tensor | None:
        """Coefficients (rows, batch, channels, …) of the output, as those of the input."""
        if coefficients is None:
            return None
        channels, *space = self.input_shape[1:]
        share = 1 / math.prod(self.kernel_size)
        weight = torch.full((channels, 1, *self.kernel_size), share).to(coefficients)
        spread = F.conv_transpose2d(coefficients.flatten(0, 1), weight, None, self.stride, groups=channels)
        # From the padded input, as far as windows reach, to the input: a negative padding cuts off.
        (top, left), (high, wide) = self.padding, spread.shape[2:]
        spread = F.pad(spread, (-left, space[1] + left - wide, -top, space[0] + top - high))
        return spread.unflatten(0, coefficients.shape[:2])


def _keeps_batch(node: Any, batch: int) -> bool:
    """Whether a reshape's first dimension was the batch before and after, in the trace."""
    return bool(node.input_shape[0] == batch and node.output_shape[0] == batch)


def mend_operators(bounded: Any) -> None:
    """Put the classes above in place of the engine's, where they are needed."""
    traced_batch = len(bounded.example[0])
    takes_margins = "C" in inspect.signature(BoundMatMul.interval_propagate).parameters
    for node in bounded._modules.values():
        if type(node) is BoundMatMul and not takes_margins:
            node.__class__ = MarginMatMul
        elif type(node) is BoundConcat:
            node.__class__ = LinfConcat
        elif type(node) is BoundAveragePool and ENGINE_VERSION.startswith("0.3"):
            node.__class__ = LinearAveragePool
        elif type(node) is BoundReshape and _keeps_batch(node, traced_batch):
            node.__class__ = BatchReshape
            node.traced_batch = traced_batch
