"""Where a training step's time goes: the top operators, and how often the host waits for the device.

python benchmarks/profile_step.py --step compiled --width 8
python benchmarks/profile_step.py --step compiled --device cuda --shape 3 32 32 --width 64
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
from step_time import STEPS
from torch.profiler import ProfilerActivity, profile

from lirpa_fastwarmup.engine.precision import products_in_tf32

# What makes the host wait for the device, by the names that the profiler gives it.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
STEPS_RECORDED = 5


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS, default="compiled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="cnn7")
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rows", type=int, default=20)
    options = parser.parse_args()
    setup = measure.Setup(
        options.model, options.width, shape=tuple(options.shape), batch=options.batch, device=options.device
    )
    on_gpu = options.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with products_in_tf32(True):
        step = STEPS[options.step](setup)
        for _ in range(measure.WARM_UP):
            step()
        with profile(activities=activities) as recorded:
            for _ in range(STEPS_RECORDED):
                step()
    events = recorded.key_averages()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(f"{setup}, step {options.step!r}, per step")
    print_table(events, own, options.rows)
    if on_gpu:
        waits = sum(event.count for event in events if event.key in WAITS)
        # The profiler itself waits once, at its end.
        print(f"waits of the host for the device: {max(0, waits - 1) / STEPS_RECORDED:g} per step")


def print_table(events: Any, own: str, rows: int) -> None:
    """The operators that take most of the time themselves."""
    total = sum(getattr(event, own) for event in events)
    print(f"{'operator':<64}{'calls':>8}{'ms':>9}{'share':>8}")
    for event in sorted(events, key=lambda event: -getattr(event, own))[:rows]:
        microseconds = getattr(event, own)
        print(
            f"{event.key[:63]:<64}{event.count / STEPS_RECORDED:>8g}{microseconds / STEPS_RECORDED / 1e3:>9.3f}"
            f"{microseconds / total:>8.1%}"
        )


if __name__ == "__main__":
    main()
