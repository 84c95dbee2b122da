"""Seconds and memory of a training step, forward and backward: clean, certified, compiled, and of others' code.

python benchmarks/step_time.py --width 8 32
python benchmarks/step_time.py --device cuda --shape 3 32 32 --width 64 --tf32
python benchmarks/step_time.py --width 8 --vary batch 32 128 512 --only clean eager compiled
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from ctrain_step import ctrain_step

from lirpa_fastwarmup.engine.precision import products_in_tf32
from lirpa_fastwarmup.memory import keep_freed_memory


def in_bf16(make: Callable[[measure.Setup], measure.Step], setup: measure.Setup) -> measure.Step:
    """A step as `--precision bf16` takes it: under autocast, which rounds the clean pass and the radii of bounds."""
    step = make(setup)

    def under_autocast() -> None:
        with torch.autocast(torch.device(setup.device).type, torch.bfloat16):
            step()

    return under_autocast


STEPS: dict[str, Callable[[measure.Setup], measure.Step]] = {
    "clean": measure.clean_step,
    "clean compiled": partial(measure.clean_step, compiled=True),
    "eager": measure.certified_step,
    "eager without regularisers": partial(measure.certified_step, regularizers=False),
    "compiled": partial(measure.certified_step, compile=True),
    "compiled without regularisers": partial(measure.certified_step, compile=True, regularizers=False),
    "CROWN-IBP fused": partial(measure.certified_step, bound="crown-ibp-fused", regularizers=False),
    "CROWN-IBP fused compiled": partial(
        measure.certified_step, bound="crown-ibp-fused", regularizers=False, compile=True
    ),
    "clean bf16": partial(in_bf16, measure.clean_step),
    "eager bf16": partial(in_bf16, measure.certified_step),
    "compiled bf16": partial(in_bf16, partial(measure.certified_step, compile=True)),
    "CTRAIN Shi-IBP": ctrain_step,
}
VARIED = {"batch": "batch", "depth": "extra", "classes": "classes", "width": "width"}


def measured(setup: measure.Setup, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each step that can be made."""
    steps = {}
    for name in names:
        try:
            steps[name] = STEPS[name](setup)
        except ImportError as error:
            print(f"{name}: left out, {error}")
    times = measure.seconds_of(steps, rounds, setup.device)
    return [
        {
            "setup": str(setup),
            "step": name,
            "seconds": statistics.median(times[name]),
            "ratio": measure.ratio(times[name], times[names[0]]),
            "peak_bytes": measure.peak_bytes(step, setup.device),
        }
        for name, step in steps.items()
    ]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="cnn7")
    parser.add_argument("--width", type=int, nargs="+", default=[None])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--vary", nargs="+", metavar=("WHAT", "VALUE"), help=f"one of {', '.join(VARIED)}, and values")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="the first is the base of ratios")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tf32", action="store_true", help="let a GPU round products to TF32")
    parser.add_argument("--keep-memory", action="store_true", help="as the command line: keep_freed_memory()")
    parser.add_argument("--channels-last", action="store_true", help="images and weights in channels-last memory")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = measure.Setup(
        options.model,
        *(None, options.hidden, tuple(options.shape), options.classes, options.batch),
        device=options.device,
        channels_last=options.channels_last,
    )
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_freed_memory()
    what, *values = options.vary or ["width", *options.width]
    rows = []
    where = measure.machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    for value in values:
        changes = {"width": options.width[0], VARIED[what]: None if value is None else int(value)}
        setup = dataclasses.replace(base, **changes)
        print(f"\n{setup}\n{'step':<32}{'seconds':>9}{'ratio':>8}{'peak MB':>9}", flush=True)
        with products_in_tf32(options.tf32):
            for row in measured(setup, options.only, options.rounds):
                print(f"{row['step']:<32}{row['seconds']:>9.4f}{row['ratio']:>8.2f}{row['peak_bytes'] / 1e6:>9.0f}")
                rows.append(row)
    measure.write(options.json, {"machine": where, "command": sys.argv, "rows": rows})


if __name__ == "__main__":
    main()
