"""The least that a certified step could cost: its products' operations and bytes, at what the machine can do.

    python benchmarks/floor.py --width 8 32

IBP passes a centre and a radius through every layer, with the sizes of the clean pass, so that the products of a step
are three times those of a clean one. Each is counted at the larger of its operations at the machine's best rate of a
product, and of its bytes, every operand read and every result written once, at its best rate of a copy.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lirpa_fastwarmup.engine.precision import products_in_tf32

PASSES = 3  # Clean, centre, radius.


class Products(TorchDispatchMode):
    """Operations and bytes of every product under it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            operations = count(*args, **(kwargs or {}), out_val=result)
            self.found.append((operations, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return result


def best_seconds(function: Callable[[], object], device: str) -> float:
    """The shortest of ten runs."""
    return min(measure.seconds_of({"": function}, 10, device)[""])  # type: ignore[dict-item]


def rates(device: str) -> tuple[float, float]:
    """Operations per second of large products, bytes per second of a large copy: the most that are seen."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    images, weight = torch.rand(128, 128, 14, 14, device=device), torch.rand(128, 128, 3, 3, device=device)
    convolution = 2 * images.numel() * weight[0].numel()
    large = torch.rand(64 * 2**20, device=device)
    target = torch.empty_like(large)
    return (
        max(
            2 * size**3 / best_seconds(lambda: torch.mm(a, b), device),
            convolution / best_seconds(lambda: F.conv2d(images, weight, padding=1), device),
        ),
        2 * large.nbytes / best_seconds(lambda: target.copy_(large), device),
    )


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in measure.machine(options.device).items()))
    with products_in_tf32(True):
        operations_rate, bytes_rate = rates(options.device)
        print(f"large products {operations_rate / 1e9:.0f} GFLOP/s, a copy {bytes_rate / 1e9:.1f} GB/s")
        for width in options.width:
            setup = measure.Setup(width=width, shape=tuple(options.shape), batch=options.batch, device=options.device)
            step = measure.clean_step(setup)
            with Products() as counted:
                step()
            operations, traffic = (PASSES * sum(column) for column in zip(*counted.found, strict=True))
            floor = PASSES * sum(max(one / operations_rate, two / bytes_rate) for one, two in counted.found)
            times = measure.seconds_of(
                {"clean": step, "compiled": measure.certified_step(setup, compile=True)}, 9, options.device
            )
            clean, compiled = (statistics.median(times[name]) for name in ("clean", "compiled"))
            print(
                f"{setup}: {operations / 1e9:.1f} GFLOP, {traffic / 1e6:.0f} MB, floor {floor:.4f} s; compiled step "
                f"{compiled:.4f} s, {compiled / floor:.2f} floors; clean step {clean:.4f} s, "
                f"{PASSES * clean / floor:.2f} of its own",
                flush=True,
            )


if __name__ == "__main__":
    main()
