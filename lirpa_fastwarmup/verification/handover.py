"""A folder from which another verifier can go on: network, properties, and the configuration of α,β-CROWN."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from lirpa_fastwarmup.boxes import InputRange, box_ends, check_batch, check_radius
from lirpa_fastwarmup.storage import make_folder, write_atomically
from lirpa_fastwarmup.verification.onnx import write_onnx
from lirpa_fastwarmup.verification.vnnlib import robustness_property

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
) -> None:
    """Write ``network.onnx``, ``properties/*.vnnlib``, ``instances.csv`` and ``abcrown.yaml`` to ``out``.

    ``instances.csv`` lists network, property and timeout as the VNN competitions do; α,β-CROWN reads it by
    ``python abcrown.py --config OUT/abcrown.yaml``.

    Args:
        model: the plain network, on the CPU, in evaluation mode.
        x: samples ``(batch, *input)``, float32.
        y: labels (batch,), int64.
        eps: radius of the boxes, in units of the input.
        out: folder; made if absent.
        indices: what the samples are called, by default their places.
        input_range: lowest and highest valid input, to which the boxes are clipped.
        timeout: seconds for each property.

    Raises:
        ImportError: a package of the extra ``onnx`` is missing.
        OSError: ``out`` cannot be written to.
        ValueError: the network is in training mode; radius, samples or labels are none to be verified; onnxruntime
            computes something else from the file than ``model`` does.
    """
    if model.training:
        raise ValueError("the network is in training mode: call model.eval() before exporting it")
    check_radius(eps, input_range)
    classes = int(model(x[:1]).shape[1])
    check_batch(x, y, classes, input_range)
    make_folder(out / PROPERTIES)
    write_onnx(model, x.shape[1:], out / NETWORK)
    lower, upper = box_ends(x, eps, input_range)
    instances = io.StringIO()
    writer = csv.writer(instances, lineterminator="\n")
    for place, index in enumerate(range(len(x)) if indices is None else indices):
        name = f"{PROPERTIES}/{index:06d}.vnnlib"
        label = int(y[place])
        text = robustness_property(
            lower[place], upper[place], label, classes, comment=f"sample {index}, label {label}, eps {eps!r}"
        )
        write_atomically(out / name, text.encode())
        writer.writerow([NETWORK, name, timeout])
    write_atomically(out / INSTANCES, instances.getvalue().encode())
    write_atomically(out / CONFIGURATION, _configuration(x.shape[1:]).encode())


def _configuration(in_shape: Sequence[int]) -> str:
    shape = ", ".join(map(str, (-1, *in_shape)))
    return f"""\
# python abcrown.py --config THIS_FILE (add --device cpu where there is no GPU)
general:
  root_path: ${{CONFIG_PATH}}  # The folder of this file.
  csv_name: {INSTANCES}
model:
  input_shape: [{shape}]
"""
