"""``lirpa-fastwarmup train``: one run, from a preset and what is changed of it, or the rest of one."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lirpa_fastwarmup.cli.options import add_trust, device_named, find_factories_here
from lirpa_fastwarmup.cli.settings import add_settings, given_settings, settings_of
from lirpa_fastwarmup.distributed import World, local_device, process_group
from lirpa_fastwarmup.experiments.presets import PRESETS
from lirpa_fastwarmup.experiments.training import Settings, resume, settings_of_run, train
from lirpa_fastwarmup.experiments.training.files import CHECKPOINT, TENSORBOARD
from lirpa_fastwarmup.experiments.training.progress import Listeners
from lirpa_fastwarmup.experiments.training.tensorboard import TensorBoard
from lirpa_fastwarmup.recipe import compiled


def add_to(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    command = commands.add_parser("train", help="train and evaluate a network, or go on with a run")
    command.set_defaults(command=_train)
    command.add_argument("preset", metavar="PRESET", nargs="?", help=f"one of: {', '.join(PRESETS)}")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    command.add_argument("--resume", action="store_true", help="go on with the run in DIR, with its own settings")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    command.add_argument("--show", action="store_true", help="print the settings and stop")
    command.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")
    command.add_argument("--tensorboard", action="store_true", help=f"also log to DIR/{TENSORBOARD}")
    add_trust(command)
    add_settings(command)


def _folder(options: argparse.Namespace) -> Path:
    if options.out is None:
        raise ValueError("name the folder for the results with --out DIR")
    return Path(options.out)


class _Console:
    """A progress bar per epoch, and a line for each that is done."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._bar: Any = None
        self._dead: dict[str, str] = {}

    def close(self) -> None:
        """Leave the line of the bar, so that what comes next has one of its own."""
        if self._bar is not None:
            self._bar.close()

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        self._bar = tqdm(total=batches, initial=done, desc=f"epoch {epoch}/{self._epochs}", leave=False, disable=None)

    def step_done(self, means: Mapping[str, float]) -> None:
        self._bar.update()
        if means:
            shown = ("eps", "loss", "clean_loss", "robust_loss", "clean_error", "verified_error")
            self._bar.set_postfix({name: f"{means[name]:.4g}" for name in shown} | self._dead, refresh=False)

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        self.close()
        dead = "" if math.isnan(row["dead"]) else f"dead {row['dead']:5.1%}  "
        self._dead = {"dead": f"{row['dead']:.1%}"} if dead else {}  # Shown until the next epoch's.
        errors = f"standard error {row['standard_error']:6.2%}  verified error {row['verified_error']:6.2%}  "
        if math.isnan(row["verified_error"]):  # Taken at the end alone.
            errors = ""
        print(
            f"epoch {row['epoch']:>{len(str(self._epochs))}}/{self._epochs}  eps {row['eps']:.4f}  "
            f"loss {row['loss']:7.4f}  {errors}{dead}{seconds:.1f} s",
            flush=True,
        )


def _train(options: argparse.Namespace) -> int:
    find_factories_here(options.model, trust=options.trust)
    if options.show:
        print(_resumed_settings(options) if options.resume else settings_of(options))
        return 0
    device = local_device(device_named(options.device))
    with process_group(device) as ranks:
        _go_on_after_restart(options)
        settings = _resumed_settings(options) if options.resume else settings_of(options)
        summary = _with_progress(options, settings, device, ranks)
        if ranks.is_rank_zero:
            print(_table(summary))
            print(f"written to {_folder(options)}")
    return 0


def _go_on_after_restart(options: argparse.Namespace) -> None:
    """After torchrun has restarted the processes, the same command goes on from the last checkpoint."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and options.preset is not None:
        out = _folder(options)
        options.resume, options.overwrite = (out / CHECKPOINT).is_file(), True


def _with_progress(
    options: argparse.Namespace, settings: Settings, device: torch.device, ranks: World
) -> dict[str, Any]:
    out = _folder(options)
    if not ranks.is_rank_zero:
        return _run(options, settings, out, {"device": device})
    console = _Console(settings.epochs)
    board = TensorBoard(out / TENSORBOARD) if options.tensorboard else None
    told = {"device": device, "progress": Listeners(console, board) if board else console}
    # Compiling takes a minute, in which nothing else is told.
    logging.getLogger(compiled.__name__).setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            return _run(options, settings, out, told)
    finally:
        console.close()
        if board:
            board.close()


def _run(options: argparse.Namespace, settings: Settings, out: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    if options.resume:
        # A factory that this command names is the user's own.
        return resume(out, data_dir=options.data_dir, trust=options.trust or options.model == settings.model, **told)
    return train(settings, out, overwrite=options.overwrite, **told)


def _resumed_settings(options: argparse.Namespace) -> Settings:
    """The settings of the run that is resumed; other ones on the command line are refused."""
    settings = settings_of_run(_folder(options))
    saved = settings.as_dict()
    named = (settings_of(options).as_dict() if options.preset else saved) | given_settings(options)
    names = [name for name in saved if name != "data_dir" and named[name] != saved[name]]
    if names:
        raise ValueError(
            f"a resumed run keeps the settings that it was begun with, and the run in {options.out} has other ones: "
            f"{', '.join(f'{name} {saved[name]}, not {named[name]}' for name in names)}. Leave them out, or begin a "
            "new run in another folder"
        )
    return settings


def _table(summary: Mapping[str, Any]) -> str:
    attacked = summary["pgd_error"]
    rows = [
        ("dataset", f"{summary['dataset']}, {summary['test_samples']:,} test images"),
        ("eps", f"{summary['eps']:.6g}"),
        ("standard error", f"{summary['standard_error']:.2%}"),
        ("PGD error (lower bound)", "none" if attacked is None else f"{attacked:.2%}"),
        ("verified error (IBP)", f"{summary['verified_error']:.2%}"),
        ("training", f"{summary['train_seconds_per_epoch']:.1f} s per epoch"),
        ("in all", f"{summary['seconds']:.0f} s"),
    ]
    if summary["settings"]["select"] != "last":
        rows.insert(2, ("weights", f"of epoch {summary['selected_epoch']}, {summary['selected_by']}"))
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])
