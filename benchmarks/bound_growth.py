"""Width of bounds over depth in freshly initialised networks, measured and by the formula: a picture for the docs.

    python benchmarks/bound_growth.py --cifar10 DIR --mnist DIR --out docs/pictures/bound_growth.svg

CNN-7 at the paper's width and the presets' ε, Kaiming against IBP initialisation, with BatchNorm at its initial
statistics, where it changes nothing, and with those of the batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import build_run
from lirpa_fastwarmup.inspection import plots

SAMPLES = 64


def inspected(name: str, init: str, data_dir: Path, *, training: bool) -> fw.Inspection:
    """The network that ``train NAME --init INIT`` begins with."""
    run = build_run(preset(name).replace(init=init, data_dir=data_dir), torch.device("cpu"))
    inputs = data.spread(run.test_batches.split, SAMPLES).inputs
    return fw.inspect(run.objective.bounded.train(training), inputs, run.settings.eps)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mnist", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure = plots.new_figure(figsize=(10, 7))
    panels = figure.subplots(2, 2, sharex=True)
    titles = {"cifar10": "CIFAR-10 (JPEG), ε = 8/255", "mnist": "MNIST, ε = 0.4"}
    for row, (name, title) in zip(panels, titles.items(), strict=True):
        for panel, training in zip(row, (False, True), strict=True):
            networks = {
                label: inspected(name, init, getattr(options, name), training=training)
                for label, init in (("Kaiming", "kaiming"), ("IBP", "ibp"))
            }
            plots.draw_bound_growth(panel, networks, formula=not training)
            panel.set_title(f"{title}\nBatchNorm {'of the batch' if training else 'at its initial statistics'}")
            for label, found in networks.items():
                growth = ", ".join(f"{layer.growth:.3g}" for layer in found.relus)
                print(f"{name}, {label}, {'training' if training else 'evaluation'} mode: {growth}")
                print(f"    per layer {found.growth_per_layer:.3g}")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
