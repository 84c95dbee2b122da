"""What a cell is found to be: each method's bounds sound, refused, or wrong in a way that is named."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.bounds import METHODS, MarginBounds, bounded_inputs, margin_matrix
from lirpa_fastwarmup.engine.precision import default_dtype
from lirpa_fastwarmup.engine.soundness import class_margins, escapes
from lirpa_fastwarmup.verification.intervals import UnknownOperatorError, interval_bounds
from tests.conformance.cells import Cell

RADII = (0.01, 0.15)
ROUNDING = 1e-8
BATCH = 3
# Few steps of alpha-CROWN: its bounds are as sound after two as after twenty.
OPTIONS = {"optimize_bound_args": {"iteration": 2}}


def verdicts(cell: Cell) -> dict[str, str]:
    """Of "build" and every method: "sound", "refused", or what is wrong."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Even kernels with padding="same" warn when they first run.
        model, x = cell.network(), cell.inputs(BATCH)
    y = torch.arange(BATCH) % 3
    try:
        network = MarginBounds(_bounded(model, x), torch.float64)
    except NotImplementedError:
        return dict.fromkeys(METHODS, "refused")
    matrices = _with_matrices(network, x)
    found = {}
    for method in METHODS:
        try:
            found[method] = _judge(network, matrices, model, x, y, method)
        except NotImplementedError:
            found[method] = "refused"
    if found["CROWN"] == "sound":
        found["CROWN"] = coefficients_hold(matrices or network, x) or "sound"
    if cell.linear:
        _judge_affine(cell, x, found)
    return found


def _bounded(model: nn.Module, x: Tensor, **options: object) -> fw.BoundedModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Reads of shapes are reported as reads of values.
        return fw.BoundedModule(model, x, bound_opts={**OPTIONS, **options})


def _with_matrices(network: MarginBounds, x: Tensor) -> MarginBounds | None:
    """The same with CROWN's coefficients as matrices, where they are patches."""
    bounded = network.bounded("CROWN")
    if bounded.conv_mode != "patches":
        return None
    return MarginBounds(_bounded(bounded.wrapped, x, conv_mode="matrix"), torch.float64)


def _judge(
    network: MarginBounds, matrices: MarginBounds | None, model: nn.Module, x: Tensor, y: Tensor, method: str
) -> str:
    for eps in RADII[1:] if method == "alpha-CROWN" else RADII:  # Its optimisation takes most of the time.
        crown = network.lower(fw.input_box(x, eps, None), y, "CROWN") if method == "alpha-CROWN" else None
        lower = network.lower(fw.input_box(x, eps, None), y, method)
        escaped = escapes(network.bounded(method), lower, y, x - eps, x + eps)
        if escaped:
            return f"eps {eps}: {escaped[0][1]}"
        attained = lowest_margins(model, x, y, eps)
        if bool((lower > attained + ROUNDING * (1 + attained.abs())).any()):
            return f"eps {eps}: a margin is {float((lower - attained).max()):.2g} below its bound"
        if method == "IBP":
            wrong = against_intervals(network, model, x, eps)
        elif crown is not None:
            wrong = "looser than CROWN" if bool((lower < crown - ROUNDING * (1 + crown.abs())).any()) else ""
        else:
            wrong = "" if matrices is None else _against_matrices(matrices, x, y, eps, method, lower)
        if wrong:
            return f"eps {eps}: {wrong}"
    return "sound"


def lowest_margins(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The lowest of each margin met at random points, corners, and by signed gradients, (batch, classes − 1)."""
    generator = torch.Generator().manual_seed(1)
    points = x + eps * (2 * torch.rand((20, *x.shape), generator=generator, dtype=x.dtype) - 1)
    points[:10] = x + eps * (points[:10] - x).sign()
    classes = model(x).shape[1] - 1
    ascents = [_descended(model, x, y, eps, margin) for margin in range(classes)]
    with torch.no_grad():
        margins = [class_margins(model(point), y) for point in (x, *points, *(p for path in ascents for p in path))]
    return torch.stack(margins).amin(0)


def _descended(model: nn.Module, x: Tensor, y: Tensor, eps: float, margin: int) -> list[Tensor]:
    """Points on the way down one margin: the corner that its gradient points to, from three points in turn."""
    path, point = [], x
    for _ in range(3):
        point = point.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(class_margins(model(point), y)[:, margin].sum(), point)
        point = x - eps * gradient.sign()
        path.append(point)
    return path


def against_intervals(network: MarginBounds, model: nn.Module, x: Tensor, eps: float) -> str:
    """What differs between the engine's IBP bounds on the outputs and those of interval arithmetic."""
    try:
        reference = interval_bounds(model, (x - eps, x + eps))
    except UnknownOperatorError:
        return ""  # A function that the engine takes apart into operators of other cells.
    with torch.no_grad():
        found = network.bounded("IBP").compute_bounds(x=(fw.input_box(x, eps, None),), method="IBP")
    tighter = max(float((found[0] - reference[0]).max()), float((reference[1] - found[1]).max()))
    scale = 1 + max(float(end.abs().max()) for end in reference)
    return f"tighter than interval arithmetic by {tighter:.2g}" if tighter > ROUNDING * scale else ""


def _against_matrices(matrices: MarginBounds, x: Tensor, y: Tensor, eps: float, method: str, lower: Tensor) -> str:
    other = matrices.lower(fw.input_box(x, eps, None), y, method)
    apart = float((lower - other).abs().max())
    return f"patches and matrices differ by {apart:.2g}" if apart > ROUNDING * (1 + float(lower.abs().max())) else ""


@torch.no_grad()
def coefficients_hold(network: MarginBounds, x: Tensor, eps: float = 0.1) -> str:
    """Where CROWN's linear functions of the input, at a pre-activation or the output, are no bounds at some point."""
    bounded, box = network.bounded("CROWN"), fw.input_box(x, eps, None)
    generator = torch.Generator().manual_seed(2)
    noise = 2 * torch.rand((12, *x.shape), generator=generator, dtype=x.dtype) - 1
    points = [x, *(x + eps * torch.cat([noise[:4], noise[4:].sign()]))]
    with default_dtype(x.dtype):
        for node in [*bounded_inputs(bounded), bounded.final_node()]:
            name, shape = bounded.input_name[0], node.output_shape[1:]
            every = torch.eye(shape.numel()).view(1, -1, *shape).expand(len(x), -1, *shape)  # 0.3's own is flat.
            given = {"final_node_name": node.name, "return_A": True, "needed_A_dict": {node.name: [name]}}
            found = bounded.compute_bounds(x=(box,), C=every, method="CROWN", **given)[2][node.name][name]
            for point in points:
                low, high = (
                    found[f"{side}A"].flatten(2).matmul(point.flatten(1).unsqueeze(2)).squeeze(2) + found[f"{side}bias"]
                    for side in "lu"
                )
                bounded.forward(point)
                value = node.forward_value.flatten(1)
                slack = ROUNDING * (1 + value.abs())
                if bool(((value < low - slack) | (value > high + slack)).any()):
                    return f"a linear bound at {type(node).__name__} does not hold"
    return ""


def _judge_affine(cell: Cell, x: Tensor, found: dict[str, str]) -> None:
    """Around an affine operator and no other, every method's bounds are the exact ones."""
    torch.manual_seed(1)
    model = cell.network(linear=True)
    y, eps = torch.arange(BATCH) % 3, 0.1
    margins, radius = _affine_margins(model, x, y)
    network = MarginBounds(_bounded(model, x), torch.float64)
    for method, verdict in found.items():
        if verdict != "sound":
            continue
        lower = network.lower(fw.input_box(x, eps, None), y, method)
        apart = lower - (margins - eps * radius)
        # IBP is exact for one layer only.
        off = apart.clamp(min=0) if method == "IBP" else apart.abs()
        if float(off.max()) > ROUNDING * (1 + float(margins.abs().max())):
            found[method] = f"not exact on an affine network, by {float(off.max()):.2g}"


def _affine_margins(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Margins at ``x``, and how far a box of radius 1 moves them."""
    matrix = margin_matrix(y, 3, x.dtype)
    point = copy.deepcopy(x).requires_grad_(True)
    margins = (matrix @ model(point).unsqueeze(2)).squeeze(2)
    radii: list[Tensor] = []
    for margin in range(margins.shape[1]):
        (gradient,) = torch.autograd.grad(margins[:, margin].sum(), point, retain_graph=True)
        radii.append(gradient.flatten(1).abs().sum(1))
    return margins.detach(), torch.stack(radii, 1)
