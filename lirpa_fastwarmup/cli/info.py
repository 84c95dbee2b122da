"""``lirpa-fastwarmup info``: what is installed, and whether its bounds hold."""

from __future__ import annotations

import argparse
import platform

import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ACTIVE_PATCHES, ENGINE_VERSION
from lirpa_fastwarmup.version import __version__


def add_to(command: argparse.ArgumentParser) -> None:
    """Set the command's function; it has no options."""
    command.set_defaults(command=_info)


def _info(options: argparse.Namespace) -> int:
    sound = bounds_contain_samples()
    rows = [
        ("lirpa_fastwarmup", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
        ("engine", f"auto_LiRPA {ENGINE_VERSION}"),
        ("patches", ", ".join(ACTIVE_PATCHES) or "none needed"),
        ("bounds", "contain all sampled outputs" if sound else "DO NOT CONTAIN all sampled outputs: do not trust them"),
    ]
    for name, value in rows:
        print(f"{name:<17} {value}")
    return 0 if sound else 1


@torch.no_grad()
def bounds_contain_samples() -> bool:
    """Whether IBP and CROWN-IBP bounds of a small network contain its outputs at points of the box."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 8, 8, generator=generator)
    model = fw.models.cnn7((1, 8, 8), 3, width=4, hidden=16).eval()
    bounded = fw.BoundedModule(model, x)
    box = fw.input_box(x, 0.05)
    noise = 0.05 * (2 * torch.rand(64, *x.shape, generator=generator) - 1)
    outputs = model((x + noise).clamp(0, 1).flatten(0, 1)).view(64, len(x), -1)
    for method in ("IBP", "CROWN-IBP"):
        lower, upper = bounded.compute_bounds(x=(box,), method=method)
        slack = 1e-5 * (1 + outputs.abs().max())
        if not bool(((outputs >= lower - slack) & (outputs <= upper + slack)).all()):
            return False
    return True
