"""``lirpa-fastwarmup info``: what is installed, and whether its bounds hold."""

import argparse
import platform

import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ACTIVE_PATCHES, ENGINE_VERSION
from lirpa_fastwarmup.verification import UnsoundBoundError
from lirpa_fastwarmup.version import __version__


def add_to(command: argparse.ArgumentParser) -> None:
    """Set the command's function; it has no options."""
    command.set_defaults(command=_info)


def _info(options: argparse.Namespace) -> int:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = fw.models.cnn7((1, 8, 8), 3, width=4, hidden=16).eval()
    sound = True
    try:
        fw.verify(fw.BoundedModule(model, x), (x, torch.tensor([0, 1, 2, 0])), 0.05, pgd_steps=10, restarts=1)
    except UnsoundBoundError:
        sound = False
    rows = [
        ("lirpa_fastwarmup", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
        ("engine", f"auto_LiRPA {ENGINE_VERSION}"),
        ("patches", ", ".join(ACTIVE_PATCHES) or "none needed"),
        ("bounds", "contain all outputs found" if sound else "DO NOT CONTAIN all outputs found: do not trust them"),
    ]
    for name, value in rows:
        print(f"{name:<17} {value}")
    return 0 if sound else 1
