"""A folder for another verifier: the network, its properties in VNN-LIB, and the configuration of α,β-CROWN."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lirpa_fastwarmup.boxes import InputRange, box_ends, check_batch, check_eps, check_positive
from lirpa_fastwarmup.engine.graph import StructureError
from lirpa_fastwarmup.engine.tracing import copy_of
from lirpa_fastwarmup.models import Normalize
from lirpa_fastwarmup.recipe.full_batchnorm import fold_batchnorm
from lirpa_fastwarmup.storage import make_folder, write_atomically
from lirpa_fastwarmup.verification.onnx import write_onnx

NETWORK, PROPERTIES, INSTANCES, CONFIGURATION = "network.onnx", "properties", "instances.csv", "abcrown.yaml"


def export(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    out: Path,
    *,
    indices: Sequence[int] | None = None,
    input_range: InputRange | None = (0.0, 1.0),
    timeout: int = 120,
) -> str:
    """Write ``network.onnx``, ``properties/*.vnnlib``, ``instances.csv`` and ``abcrown.yaml`` to ``out``.

    ``instances.csv`` lists network, property and timeout as in the VNN competitions. α,β-CROWN reads it with
    ``python abcrown.py --config OUT/abcrown.yaml``. In ``network.onnx``, inserted BatchNorm is folded into the weights
    (``fold_batchnorm``), and a leading ``Normalize`` of images is a BatchNorm, which changes the outputs by rounding.

    Args:
        model: the plain network, on the CPU, in evaluation mode.
        x, y: samples ``(batch, *input)``, float32, and labels (batch,), int64.
        eps: radius of the boxes, in units of the input.
        out: folder; made if absent.
        indices: numbers of the samples in file names, by default their places.
        input_range: lowest and highest valid input, to which the boxes are clipped.
        timeout: seconds for each property.

    Returns:
        What was changed, or could not be folded, in a sentence that ``abcrown.yaml`` repeats, or "".

    Raises:
        ImportError: a package of the extra ``onnx`` is missing.
        OSError: ``out`` cannot be written to.
        TypeError: ``model`` is a BoundedModule.
        ValueError: the network is in training mode; radius, samples or labels cannot be verified; onnxruntime's
            outputs differ from the outputs of ``model`` (before folding).
    """
    if model.training:
        raise ValueError("the network is in training mode: call model.eval() before exporting it")
    check_eps(eps, input_range)
    check_positive(eps)
    classes = int(model(x[:1]).shape[1])
    check_batch(x, y, classes, input_range)
    lower, upper = box_ends(x, eps, input_range)
    instances = []
    written, note = handed_over(model, x.shape)
    with make_folder(out / PROPERTIES):
        write_onnx(written, x.shape[1:], out / NETWORK, original=model)
        for place, index in enumerate(range(len(x)) if indices is None else indices):
            name, label = f"{PROPERTIES}/{index:06d}.vnnlib", int(y[place])
            comment = f"sample {index}, label {label}, eps {eps!r}"
            text = robustness_property(lower[place], upper[place], label, classes, comment=comment)
            write_atomically(out / name, text.encode())
            instances.append(f"{NETWORK},{name},{timeout}\n")
        write_atomically(out / INSTANCES, "".join(instances).encode())
        shape, comment = [-1, *x.shape[1:]], f"# {note}\n" if note else ""
        write_atomically(out / CONFIGURATION, _CONFIGURATION.format(comment, INSTANCES, shape).encode())
    return note


def handed_over(model: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, str]:
    """A copy of ``model`` for another verifier, for batches like ``shape``, and what was changed; "" for nothing.

    Inserted BatchNorm is folded if possible; α,β-CROWN's patches (December 2025) refuse the constants of ``Normalize``.
    """
    notes = []
    try:
        written: Any = fold_batchnorm(model)
    except StructureError as error:
        written = copy_of(model).eval()
        notes.append(f"{NETWORK} contains the inserted BatchNorm: {error}")
    if written.state_dict().keys() != model.state_dict().keys():
        notes.append(f"{NETWORK} is the folded network: inserted BatchNorm is in its weights, which changes rounding")
    if len(shape) == 4 and type(written).forward is nn.Sequential.forward and type(written[0]) is Normalize:
        mean, var = (one.expand(shape[1]).clone() for one in (written[0].mean, written[0].std.square()))
        written[0] = nn.BatchNorm2d(shape[1], eps=0.0, affine=False).eval()
        written[0].running_mean, written[0].running_var = mean, var
        notes.append(f"{NETWORK} has a BatchNorm in place of its Normalize, which changes rounding")
    return written, "; ".join(notes)


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


_CONFIGURATION = """\
# python abcrown.py --config THIS_FILE (add --device cpu on a machine without a GPU)
{}general:
  root_path: ${{CONFIG_PATH}}  # The folder of this file.
  csv_name: {}
model:
  input_shape: {}
"""
