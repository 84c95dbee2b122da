"""``lirpa-fastwarmup inspect``: bounds, ReLU states and weights of a network, layer by layer."""

import argparse
from pathlib import Path

from torch import Tensor

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.boxes import InputRange
from lirpa_fastwarmup.cli import options as common
from lirpa_fastwarmup.cli.subject import subject_of_run
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import DESCRIPTIONS
from lirpa_fastwarmup.experiments.training import build_run

_SAMPLES = 250
_ALSO_OF_RUNS = ("eps", "data_dir", "dataset", "input_range")


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = "Inspect a trained network, or the one that `train PRESET` with the same options starts from."
    command.set_defaults(command=_inspect)
    command.add_argument("what", metavar="RUN_DIR|PRESET", help=f"a run's folder, or one of: {', '.join(DESCRIPTIONS)}")
    command.add_argument("--samples", type=int, metavar="N", help=f"evenly spaced test samples (default: {_SAMPLES})")
    mode = command.add_mutually_exclusive_group()
    text = "BatchNorm uses the statistics of the batch, as in a training step (default for a PRESET)"
    mode.add_argument("--training", action="store_true", default=None, help=text)
    mode.add_argument("--evaluation", dest="training", action="store_false", help="BatchNorm uses running statistics")
    command.add_argument("--csv", type=Path, metavar="FILE", help="also write the statistics")
    command.add_argument("--markdown", action="store_true", help="print Markdown")
    common.add_settings(command)


def _inspect(options: argparse.Namespace) -> int:
    common.find_factories_here(options.model, options.dataset, trust=options.trust)
    bounded, x, eps, input_range = _of_preset(options) if options.what in DESCRIPTIONS else _of_run(options)
    found = fw.inspect(bounded, x, eps, input_range=input_range)
    found.to_csv(options.csv)  # Without --csv, writes nothing.
    print(found.to_markdown() if options.markdown else found)
    return 0


def _of_preset(options: argparse.Namespace) -> tuple[fw.BoundedModule, Tensor, float, InputRange | None]:
    options.preset = options.what
    settings, device = common.settings_and_origins(options)[0], common.device_named(options.device)
    run = build_run(settings.replace(regularizers=False), device)  # Nothing is trained.
    bounded = run.objective.bounded.train(options.training is not False)
    return bounded, _inputs(run.test_batches.split, options.samples).to(device), settings.eps, run.input_range


def _of_run(options: argparse.Namespace) -> tuple[fw.BoundedModule, Tensor, float, InputRange | None]:
    folder = Path(options.what)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a folder nor a preset; presets are {', '.join(DESCRIPTIONS)}")
    if fixed := [name for name in common.given_settings(options) if name not in _ALSO_OF_RUNS]:
        text = f"{', '.join(fixed)}: the network in {folder} is already trained, with its own settings"
        raise ValueError(f"{text}. Omit these options, or name a preset to inspect a fresh network")
    subject = subject_of_run(folder, options)
    samples = _inputs(subject.dataset.test, options.samples).to(common.device_named(options.device))
    bounded = fw.BoundedModule(subject.network.to(samples.device), samples[:2], allow_untested=subject.allow_untested)
    eps = subject.eps if options.eps is None else options.eps
    assert eps is not None  # Only external models have no radius of their own.
    return bounded.train(options.training is True), samples, eps, subject.dataset.input_range


def _inputs(samples: data.Split, count: int | None) -> Tensor:
    if count is not None and not 1 <= count <= len(samples):
        raise ValueError(f"the test set has {len(samples)} samples; cannot take {count}")
    return data.spread(samples, count or _SAMPLES).inputs
