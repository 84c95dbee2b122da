"""The command ``lirpa-fastwarmup``."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.data import LOADERS
from lirpa_fastwarmup.engine.compat import ACTIVE_PATCHES, ENGINE_VERSION
from lirpa_fastwarmup.presets import PRESETS, preset
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError
from lirpa_fastwarmup.training import Settings, train

_PROGRAM = "lirpa-fastwarmup"
# Mistakes of the user and of the world: told in one line, without a traceback.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, NonFiniteLossError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except _EXPECTED as error:
        if options.traceback:
            raise
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 1


def _number(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number, nor a fraction such as 8/255") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Fast certified robust training with short warmup, on auto_LiRPA."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--version", action="version", version=fw.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, active patches, and a quick check of the engine's bounds")
    info.set_defaults(command=_info)
    _add_train(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = commands.add_parser("train", help="train and evaluate a network")
    command.set_defaults(command=_train)
    command.add_argument("preset", metavar="PRESET", help=f"one of: {', '.join(PRESETS)}")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    command.add_argument("--show", action="store_true", help="print the settings and stop")
    command.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")
    settings = command.add_argument_group("settings", "each overrides the preset's")
    settings.add_argument("--eps", type=_number, help="target radius in pixel units, a number or a fraction")
    settings.add_argument("--epochs", type=int)
    settings.add_argument("--batch-size", type=int)
    settings.add_argument("--ramp-start", type=int, help="epoch, from 1, at which ε begins to grow")
    settings.add_argument("--ramp-length", type=int, help="epochs that ε grows for")
    settings.add_argument("--lr", type=float, help="Adam's learning rate")
    settings.add_argument("--lr-milestones", type=int, nargs="*", help="finished epochs after which it falls")
    settings.add_argument("--reg-weight", type=float, help="weight of the regularisers")
    settings.add_argument("--width", type=int, help="channels of the first convolution")
    settings.add_argument("--hidden", type=int, help="features of the hidden linear layer")
    settings.add_argument("--seed", type=int)
    settings.add_argument("--dataset", choices=sorted(LOADERS))
    settings.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the dataset's files")
    settings.add_argument("--data-limit", type=int, metavar="N", help="train on N samples, drawn by the seed")
    settings.add_argument("--pgd-steps", type=int)
    settings.add_argument("--pgd-restarts", type=int)
    for remedy, field in (("init", "init"), ("bn", "batchnorm"), ("reg", "regularizers")):
        settings.add_argument(
            f"--no-{remedy}", dest=field, action="store_const", const=False, help=f"switch the remedy {field!r} off"
        )


def _settings(options: argparse.Namespace) -> Settings:
    base = preset(options.preset)
    given = {name: getattr(options, name, None) for name in base.as_dict() if name != "preset"}
    changes = {name: value for name, value in given.items() if value is not None}
    if "lr_milestones" in changes:
        changes["lr_milestones"] = tuple(changes["lr_milestones"])
    return base.replace(**changes)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


class _Console:
    """A progress bar per epoch, and a line for each that is done."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._bar: Any = None

    def close(self) -> None:
        """Leave the line of the bar, so that what comes next has one of its own."""
        if self._bar is not None:
            self._bar.close()

    def epoch_started(self, epoch: int, batches: int) -> None:
        self._bar = tqdm(total=batches, desc=f"epoch {epoch}/{self._epochs}", leave=False, disable=None)

    def step_done(self, means: Mapping[str, float]) -> None:
        self._bar.update()
        if means:
            shown = ("eps", "loss", "clean_loss", "robust_loss", "verified_error")
            self._bar.set_postfix({name: f"{means[name]:.4g}" for name in shown}, refresh=False)

    def epoch_done(self, row: Mapping[str, float]) -> None:
        self.close()
        print(
            f"epoch {row['epoch']:>{len(str(self._epochs))}}/{self._epochs}  eps {row['eps']:.4f}  "
            f"loss {row['loss']:7.4f}  standard error {row['standard_error']:6.2%}  "
            f"verified error {row['verified_error']:6.2%}  {row['seconds']:.1f} s",
            flush=True,
        )


def _train(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if options.show:
        print(settings)
        return 0
    if options.out is None:
        raise ValueError("name the folder for the results with --out DIR")
    console = _Console(settings.epochs)
    try:
        summary = train(
            settings, options.out, overwrite=options.overwrite, device=_device(options.device), progress=console
        )
    finally:
        console.close()
    print(_table(summary))
    print(f"written to {options.out}")
    return 0


def _table(summary: Mapping[str, Any]) -> str:
    rows = [
        ("dataset", f"{summary['dataset']}, {summary['test_samples']:,} test images"),
        ("eps", f"{summary['eps']:.6g}"),
        ("standard error", f"{summary['standard_error']:.2%}"),
        ("PGD error (lower bound)", f"{summary['pgd_error']:.2%}"),
        ("verified error (IBP)", f"{summary['verified_error']:.2%}"),
        ("training", f"{summary['train_seconds_per_epoch']:.1f} s per epoch"),
        ("in all", f"{summary['seconds']:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])


def _info(options: argparse.Namespace) -> int:
    sound = bounds_contain_samples()
    rows = [
        ("lirpa_fastwarmup", fw.__version__),
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
