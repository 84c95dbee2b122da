"""Seconds and memory of bounds on a batch's margins, by each method of verification.

python benchmarks/margins.py --classes 10 100 1000 --batch 32 --methods CROWN-IBP CROWN alpha-CROWN
python benchmarks/margins.py --classes 1000 --coefficients 22 40   # In blocks of rows, and all rows at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import measure
import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine import bounds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=bounds.METHODS, default=list(bounds.METHODS))
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--eps", type=float, default=0.01)
    parser.add_argument("--coefficients", nargs="+", type=int, default=[22], help="of a layer at once, as powers of 2")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    setup = measure.Setup(width=args.width, hidden=512, batch=args.batch, device=args.device)
    print(measure.machine(args.device))
    print("| classes | method | coefficients | s | peak MB |\n| --- | --- | --- | --- | --- |")
    for classes in args.classes:
        one = dataclasses.replace(setup, classes=classes)
        x, y = one.batch_of_noise()
        margins = bounds.MarginBounds(fw.BoundedModule(one.network().eval(), x), torch.float32)
        box = fw.input_box(x, args.eps)
        for method in args.methods:
            found = {}
            for power in args.coefficients:
                bounds.COEFFICIENTS = 1 << power
                start = time.process_time()
                found[power] = margins.lower(box, y, method)
                seconds = time.process_time() - start
                peak = measure.peak_bytes(lambda: margins.lower(box, y, method), args.device) / 1e6  # noqa: B023
                print(f"| {classes} | {method} | 2^{power} | {seconds:.2f} | {peak:.0f} |", flush=True)
            first, *others = found.values()
            for other in others:
                torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
