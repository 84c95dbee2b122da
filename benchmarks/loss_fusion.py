"""Seconds of a training step for few and for many classes: what loss fusion saves.

Steps of both networks alternate in one process, and the ratio is the median over pairs, so that a machine that is
busy with other things slows both alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.recipe.losses import LOSSES


def make_step(bound: str, classes: int, options: argparse.Namespace) -> Callable[[], float]:
    """A function that takes a training step in the middle of the ramp and returns its seconds."""
    torch.manual_seed(0)
    x = torch.rand(options.batch, 3, 32, 32)
    y = torch.arange(options.batch) % classes
    model = fw.models.cnn7((3, 32, 32), classes, options.width, options.hidden)
    bounded = fw.BoundedModule(model, x[:2])
    fw.ibp_init_(bounded)
    warmup = fw.ShortWarmup(
        bounded, fw.LinearEpsilon(8 / 255, 1, 2, steps_per_epoch=1), loss=LOSSES[bound](), regularizers=()
    )
    warmup.step()
    optimizer = torch.optim.Adam(warmup.parameters(), 5e-4)

    def step() -> float:
        started = time.perf_counter()
        warmup(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--bounds", nargs="+", default=["ibp", "crown-ibp-fused", "crown-ibp"])
    options = parser.parse_args()
    print(
        f"CNN-7 of width {options.width}, hidden {options.hidden}, 3×32×32, batch {options.batch}; torch "
        f"{torch.__version__}, auto_LiRPA {ENGINE_VERSION}, {torch.get_num_threads()} thread(s), {platform.machine()}"
    )
    print(f"{'bound':<16}  {options.few:>4} classes  {options.many:>4} classes  ratio")
    for bound in options.bounds:
        few, many = (make_step(bound, classes, options) for classes in (options.few, options.many))
        few(), many()
        pairs = [(few(), many()) for _ in range(options.pairs)]
        ratio = statistics.median(after / before for before, after in pairs)
        seconds = [statistics.median(times) for times in zip(*pairs, strict=True)]
        print(f"{bound:<16}  {seconds[0]:>10.3f} s  {seconds[1]:>10.3f} s  {ratio:5.2f}", flush=True)


if __name__ == "__main__":
    main()
