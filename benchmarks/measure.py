"""What the benchmarks share: networks, steps, times and memory measured alike, and where it was."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.recipe.losses import LOSSES

Step = Callable[[], None]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler tells of every recording.
WARM_UP = 3  # Rounds before those that count.


@dataclass(frozen=True)
class Setup:
    """A network and a batch of noise for it.

    Attributes:
        model: cnn7, wide-resnet8 or resnext.
        width, hidden: its size; ``width=None`` for the paper's.
        shape: of an image.
        classes: outputs.
        batch: samples.
        extra: convolutions, with BatchNorm and ReLU, that deepen CNN-7.
        device: where.
        channels_last: images and weights in channels-last memory.
    """

    model: str = "cnn7"
    width: int | None = 32
    hidden: int = 512
    shape: tuple[int, int, int] = (1, 28, 28)
    classes: int = 10
    batch: int = 128
    extra: int = 0
    device: str = "cpu"
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """How images lie in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def batch_of_noise(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels, the same every time."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch, *self.shape, generator=generator)
        return x.to(self.device, memory_format=self.memory_format), (torch.arange(self.batch) % self.classes).to(
            self.device
        )

    def network(self) -> nn.Module:
        """The network, with its own initialisation, the same every time."""
        torch.manual_seed(0)
        sizes = {} if self.width is None else {"width": self.width}
        if self.model == "cnn7":
            sizes["hidden"] = self.hidden
        model: nn.Module = fw.models.MODELS[self.model](self.shape, self.classes, **sizes)
        model = _deepened(model, self.extra) if self.extra else model
        return model.to(self.device, memory_format=self.memory_format)

    def __str__(self) -> str:
        deeper = f" and {self.extra} more convolutions" if self.extra else ""
        return (
            f"{self.model}{deeper}, width {self.width or 'of the paper'}, {'×'.join(map(str, self.shape))}, "
            f"{self.classes} classes, batch {self.batch}"
        )


def _deepened(model: nn.Module, extra: int) -> nn.Module:
    """CNN-7 with ``extra`` blocks of 3×3 convolution, BatchNorm and ReLU before its first linear layer."""
    layers = list(model.children())
    end = next(place for place, layer in enumerate(layers) if isinstance(layer, nn.Flatten))
    channels = next(layer.out_channels for layer in reversed(layers[:end]) if isinstance(layer, nn.Conv2d))
    blocks = [
        layer
        for _ in range(extra)
        for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
    ]
    return nn.Sequential(*layers[:end], *blocks, *layers[end:])


def clean_step(setup: Setup, *, compiled: bool = False) -> Step:
    """Forward pass, cross-entropy and backward pass of the plain network."""
    x, y = setup.batch_of_noise()
    model = setup.network()
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(forward(x), y).backward()

    return step


def certified_step(setup: Setup, *, compile: bool = False, bound: str = "ibp", regularizers: bool = True) -> Step:  # noqa: A002
    """The objective in the middle of the ramp, forward and backward."""
    x, y = setup.batch_of_noise()
    bounded = fw.BoundedModule(setup.network(), x[:2])
    fw.ibp_init_(bounded)
    objective = fw.ShortWarmup(
        bounded,
        fw.LinearEpsilon(8 / 255, start=1, length=2, steps_per_epoch=1),
        loss=LOSSES[bound](),
        reg_weight=0.5 if regularizers else 0.0,
        compile=compile,
    )
    objective.step()

    def step() -> None:
        objective.zero_grad()
        objective(x, y).loss.backward()

    return step


def seconds_of(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step in each round; the steps alternate, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + rounds):
        for name, step in steps.items():
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: list[float], base: list[float]) -> float:
    """The median over the rounds of time over base."""
    return statistics.median(one / other for one, other in zip(times, base, strict=True))


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that ``step`` takes beyond what there was before it."""
    step()
    if device.startswith("cuda"):
        _wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        _wait(device)
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results: Any = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "engine": f"auto_LiRPA {ENGINE_VERSION}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def write(path: Path | None, content: Any) -> None:
    """``content`` as JSON, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
