"""Seconds of a training epoch as `lirpa-fastwarmup train` takes it, in each phase, and of its data alone.

    python benchmarks/epoch_time.py --width 8 --samples 5000 --compile
    python benchmarks/epoch_time.py --device cuda --compile

Images are noise of CIFAR-10's shape and number: what they show does not change the time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
import torch

from lirpa_fastwarmup.experiments.presets import PRESETS
from lirpa_fastwarmup.experiments.training import Settings
from lirpa_fastwarmup.experiments.training.build import Run, build_run
from lirpa_fastwarmup.experiments.training.interrupt import StopRequest
from lirpa_fastwarmup.experiments.training.loop import EpochMeans, Position, Progress, train_epoch

PHASES = {"before the ramp": 0.0, "in the ramp": 0.5, "at full eps": 1.0}


def write_noise(folder: Path, samples: int) -> None:
    """Training and test images that the dataset ``npz`` reads."""
    random = np.random.default_rng(0)
    for name, count in (("train", samples), ("test", 250)):
        images = random.integers(256, size=(count, 3, 32, 32), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count) % 10)


def seconds_of_epoch(run: Run, progress: float) -> float:
    """An epoch at the share ``progress`` of the ramp."""
    begin = (run.settings.ramp_start - 1) * len(run.train_batches)
    length = run.settings.ramp_length * len(run.train_batches)
    run.objective.steps_done = 0 if progress == 0 else begin + int(progress * length)
    position = Position(EpochMeans(run.device))
    train_epoch(run, position, Progress(), StopRequest(Path()))
    return position.seconds


def seconds_of_data(run: Run) -> float:
    """An epoch's batches, made and left unused."""
    started = time.perf_counter()
    for _ in run.train_batches:
        pass
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="tf32")
    parser.add_argument("--repeat", type=int, default=2, help="epochs of each phase, after one that compiles")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    where = measure.machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder), options.samples)
        settings: Settings = PRESETS["cifar10"].replace(
            dataset="npz",
            data_dir=Path(folder),
            width=options.width,
            compile=options.compile,
            precision=options.precision,
        )
        run = build_run(settings, torch.device(options.device))
    rows = []
    for phase, progress in PHASES.items():
        first, *others = [seconds_of_epoch(run, progress) for _ in range(1 + options.repeat)]
        rows.append({"phase": phase, "first": first, "seconds": min(others)})
        print(f"{phase:<16} {min(others):8.2f} s   (the first one {first:.2f} s)", flush=True)
    data = min(seconds_of_data(run) for _ in range(3))
    print(f"{'data alone':<16} {data:8.2f} s   {data / rows[1]['seconds']:.1%} of an epoch in the ramp")
    measure.write(options.json, {"machine": where, "samples": options.samples, "rows": rows, "data": data})


if __name__ == "__main__":
    main()
