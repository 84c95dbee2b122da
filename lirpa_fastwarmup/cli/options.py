"""What the options of several commands are read with."""

from __future__ import annotations

import argparse
import sys

import torch


def number(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
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


def find_factories_here(name: str | None, *, trust: bool = False) -> None:
    """Look for a user's own factory where the command is given, as python -m does, if there is one to be looked for.

    Args:
        name: of the network that the command was given.
        trust: whether one that a file names is called as well.
    """
    if (trust or ":" in (name or "")) and "" not in sys.path:
        sys.path.insert(0, "")


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add the option that lets files name code to be run."""
    command.add_argument(
        "--trust", action="store_true", help="import and call the package.module:factory that a run's files name"
    )
