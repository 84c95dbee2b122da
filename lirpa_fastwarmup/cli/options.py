"""What the options of several commands are read with."""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction

import torch


def number(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number, nor a fraction such as 8/255") from None


def device_named(name: str | None) -> torch.device:
    """The device called ``name``; by default a GPU if there is one.

    Raises:
        ValueError: there is none of that name, or it does not work.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def find_factories_here() -> None:
    """Look for a user's own factories where the command is given, as python -m does."""
    if "" not in sys.path:
        sys.path.insert(0, "")
