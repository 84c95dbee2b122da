"""Bound widths and ReLU states of a trained network, layer by layer: ``layers.csv`` in a run's folder."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import data
from lirpa_fastwarmup.training import load_model, settings_of_run

SAMPLES = 1000  # Of the test set.


@torch.no_grad()
def write_layers(run: Path) -> Path:
    """Write the mean half-width of the bounds at each ReLU's input, and the shares of its neurons by state.

    Over the first test samples, at the run's radius, in evaluation mode.
    """
    settings = settings_of_run(run)
    images = data.load(settings.dataset, settings.data_dir).test.images[:SAMPLES].float() / 255
    bounded = fw.BoundedModule(load_model(run / "model.pt").eval(), images[:2])
    bounded.compute_bounds(x=(fw.input_box(images, settings.eps),), method="IBP")
    path = run / "layers.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "half_width", "always_active", "always_inactive", "unstable"])
        for layer in fw.relu_bounds(bounded):
            active = float((layer.lower > 0).double().mean())
            inactive = float((layer.upper < 0).double().mean())
            half_width = float((layer.upper - layer.lower).double().mean() / 2)
            writer.writerow(
                [
                    layer.name,
                    f"{half_width:.6g}",
                    *(f"{share:.4f}" for share in (active, inactive, 1 - active - inactive)),
                ]
            )
    return path


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(write_layers(Path(folder)))
