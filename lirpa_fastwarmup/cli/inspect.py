"""``lirpa-fastwarmup inspect``: bounds, ReLU states and weights of a network, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.cli.options import add_trust, device_named, find_factories_here
from lirpa_fastwarmup.cli.settings import add_settings, given_settings, settings_of
from lirpa_fastwarmup.cli.subject import subject_of_run
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import PRESETS
from lirpa_fastwarmup.experiments.training import build_run

_SAMPLES = 250
# What of a run may be named anew.
_OF_RUN = ("eps", "data_dir", "dataset")


def add_to(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    command = commands.add_parser(
        "inspect",
        help="bounds, ReLU states and weights of a network, layer by layer",
        description="Look at a trained network, or at what `train PRESET` with the same options would begin with.",
    )
    command.set_defaults(command=_inspect)
    command.add_argument("what", metavar="RUN_DIR|PRESET", help=f"folder of a run, or one of: {', '.join(PRESETS)}")
    command.add_argument(
        "--samples", type=int, metavar="N", help=f"of the test set, at even distances; by default {_SAMPLES}"
    )
    mode = command.add_mutually_exclusive_group()
    mode.add_argument(
        "--training",
        action="store_true",
        default=None,
        help="with BatchNorm's statistics of the batch, as a training step sees it (default for a PRESET)",
    )
    mode.add_argument(
        "--evaluation",
        dest="training",
        action="store_false",
        help="with BatchNorm's running statistics, as a certificate sees it (default for a run)",
    )
    command.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures")
    command.add_argument("--markdown", action="store_true", help="print Markdown")
    command.add_argument("--device", help="cpu, cuda, cuda:1 …; by default a GPU if there is one")
    add_trust(command)
    add_settings(command)


def _inspect(options: argparse.Namespace) -> int:
    find_factories_here(options.model, trust=options.trust)
    bounded, samples, eps = _of_preset(options) if options.what in PRESETS else _of_run(options)
    found = fw.inspect(bounded, samples, eps)
    if options.csv is not None:
        found.to_csv(options.csv)
    print(found.to_markdown() if options.markdown else found)
    return 0


def _of_preset(options: argparse.Namespace) -> tuple[BoundedModule, Tensor, float]:
    options.preset = options.what
    settings = settings_of(options)
    device = device_named(options.device)
    run = build_run(settings.replace(regularizers=False), device)  # Nothing is trained.
    bounded = run.objective.bounded.train(options.training is not False)
    return bounded, _inputs(run.test_batches.split, options.samples).to(device), settings.eps


def _of_run(options: argparse.Namespace) -> tuple[BoundedModule, Tensor, float]:
    folder = Path(options.what)
    if not folder.is_dir():
        raise FileNotFoundError(f"{options.what} is neither a folder nor a preset; presets are {', '.join(PRESETS)}")
    fixed = [name for name in given_settings(options) if name not in _OF_RUN]
    if fixed:
        raise ValueError(
            f"{', '.join(fixed)}: the network in {folder} is trained already, with settings of its own. Leave the "
            f"option{'s' * (len(fixed) > 1)} out, or name a preset to look at a fresh network"
        )
    subject = subject_of_run(folder, dataset=options.dataset, data_dir=options.data_dir, trust=options.trust)
    device = device_named(options.device)
    samples = _inputs(subject.samples, options.samples).to(device)
    bounded = fw.BoundedModule(subject.network.to(device), samples[:2], allow_untested=subject.allow_untested)
    bounded.train(options.training is True)
    eps = subject.eps if options.eps is None else options.eps
    if eps is None:
        raise ValueError("name the radius with --eps")
    return bounded, samples, eps


def _inputs(samples: data.Split, count: int | None) -> Tensor:
    if count is not None and not 1 <= count <= len(samples):
        raise ValueError(f"the test set has {len(samples)} samples; cannot take {count}")
    return data.spread(samples, count or _SAMPLES).inputs
