"""Samples per second of training over several processes, and what they say to one another.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/scale.py --width 8

A step is forward and backward of the objective in its ramp, with the averaging of gradients, on a global batch that
stays the same. ``--bytes`` prints how much CNN-7 and Wide-ResNet-8 send instead.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.distributed import all_reduce, local_device, process_group

LINKS = {
    "NVLink 4 (450 GB/s)": 450e9,
    "InfiniBand NDR (50 GB/s)": 50e9,
    "100 Gb Ethernet": 12.5e9,
    "10 Gb Ethernet": 1.25e9,
}


def print_bytes() -> None:
    """What a ring all-reduce of float32 gradients sends per process and step, and the least time it takes."""
    for name, model in (
        ("CNN-7", fw.models.cnn7((3, 32, 32), 10)),
        ("Wide-ResNet-8", fw.models.wide_resnet8((3, 32, 32), 10)),
    ):
        size = 4 * sum(parameter.numel() for parameter in model.parameters())
        for gpus in (8, 64):
            sent = 2 * (gpus - 1) / gpus * size
            times = ", ".join(f"{link}: {1e3 * sent / speed:.2f} ms" for link, speed in LINKS.items())
            print(f"{name}, {gpus} GPUs: gradients {size / 1e6:.1f} MB, sent {sent / 1e6:.1f} MB; {times}")


def main() -> None:
    """Measure, on whatever torchrun has started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--sync-batchnorm", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.bytes:
        print_bytes()
        return
    device = local_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with process_group(device) as ranks:
        torch.manual_seed(0)
        bounded = fw.BoundedModule(
            fw.models.cnn7((1, 28, 28), 10, width=options.width).to(device), torch.zeros(2, 1, 28, 28, device=device)
        )
        fw.ibp_init_(bounded)
        if options.sync_batchnorm:
            bounded.join_ranks()
        warmup = fw.ShortWarmup(bounded, fw.SmoothedEpsilon(0.1, 1, 10, 100), compile=options.compile)
        warmup.steps_done = 600
        trained: nn.Module = nn.parallel.DistributedDataParallel(warmup) if ranks.size > 1 else warmup
        x = torch.rand(options.batch_size // ranks.size, 1, 28, 28, device=device)
        y = torch.randint(10, (len(x),), device=device)
        seconds = []
        for _ in range(options.rounds + 3):
            all_reduce(torch.zeros(1, device=device)).item()  # Begin together.
            begun = time.perf_counter()
            trained(x, y).loss.backward()
            all_reduce(torch.zeros(1, device=device)).item()
            seconds.append(time.perf_counter() - begun)
            warmup.zero_grad()
        if ranks.is_rank_zero:
            step = statistics.median(seconds[3:])
            print(
                f"{ranks.size} process(es) on {device.type}, width {options.width}, global batch {options.batch_size}: "
                f"{1e3 * step:.0f} ms a step, {options.batch_size / step:.0f} samples/s"
            )


if __name__ == "__main__":
    main()
