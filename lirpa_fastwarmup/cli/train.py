"""``lirpa-fastwarmup train``: one run, from a preset and what is changed of it, or the rest of one."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lirpa_fastwarmup.cli.options import device_named, find_factories_here, number
from lirpa_fastwarmup.data import LOADERS
from lirpa_fastwarmup.models import MODELS
from lirpa_fastwarmup.presets import PRESETS, preset
from lirpa_fastwarmup.recipe import compiled
from lirpa_fastwarmup.recipe.initialization import INITIALIZATIONS
from lirpa_fastwarmup.recipe.robust import LOSSES
from lirpa_fastwarmup.recipe.schedule import SCHEDULES
from lirpa_fastwarmup.training import METHODS, Settings, resume, settings_of_run, train
from lirpa_fastwarmup.training.files import TENSORBOARD
from lirpa_fastwarmup.training.progress import Listeners
from lirpa_fastwarmup.training.settings import Optimizer, Precision, Select
from lirpa_fastwarmup.training.tensorboard import TensorBoard

_SWITCH = argparse.BooleanOptionalAction


# The options that set a field of Settings, by group: the field (its option is spelt with dashes), and argparse's own.
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "data": {
        "dataset": {"choices": sorted(LOADERS)},
        "data_dir": {"type": Path, "metavar": "DIR", "help": "folder of the dataset's files"},
        "data_limit": {"type": int, "metavar": "N", "help": "train on N samples, drawn by the seed"},
        "validation": {"type": int, "metavar": "N", "help": "hold out N of them, and keep the best epoch on these"},
        "select": {"choices": get_args(Select), "help": "which epoch's weights are kept"},
        "flip": {"action": _SWITCH, "help": "augmentation: mirror images at random"},
        "crop_padding": {"type": int, "metavar": "P", "help": "augmentation: random windows after padding by P pixels"},
    },
    "network": {
        "model": {"metavar": "NAME", "help": f"{', '.join(MODELS)}, or package.module:factory"},
        "width": {"type": int, "help": "channels of its first stage (ResNeXt: bottleneck width)"},
        "hidden": {"type": int, "help": "features of its hidden linear layer"},
        "bn_mean": {"action": _SWITCH, "help": "ablation: BatchNorm's mean"},
        "bn_var": {"action": _SWITCH, "help": "ablation: BatchNorm's variance"},
        "bn_affine": {"action": _SWITCH, "help": "ablation: BatchNorm's affine part"},
        "precise_bn": {"action": _SWITCH, "help": "recompute BatchNorm's statistics after training"},
    },
    "objective": {
        "eps": {"type": number, "help": "target radius in pixel units, a number or a fraction"},
        "schedule": {"choices": tuple(SCHEDULES), "help": "how the radius grows"},
        "ramp_start": {"type": int, "help": "epoch, from 1, at which it begins to grow"},
        "ramp_length": {"type": int, "help": "epochs that it grows for"},
        "bound": {"choices": tuple(LOSSES), "help": "what bounds the loss"},
        "kappa": {"type": number, "help": "weight of the clean loss at the end of the ramp"},
        "reg_weight": {"type": float, "help": "weight of the paper's regularisers"},
        "tol": {"type": float, "help": "their tolerance"},
        "stability_weight": {"type": float, "help": "of the ReLU stability of Xiao et al."},
        "l1_weight": {"type": float, "help": "of the weights' absolute values"},
        "volume_weight": {"type": float, "help": "of the relaxation volume of Balunović and Vechev"},
    },
    "optimisation": {
        "epochs": {"type": int},
        "batch_size": {"type": int},
        "accumulate": {"type": int, "metavar": "PARTS", "help": "compute a batch in parts, one after the other"},
        "optimizer": {"choices": get_args(Optimizer)},
        "lr": {"type": float, "help": "learning rate"},
        "lr_milestones": {"type": int, "nargs": "*", "help": "finished epochs after which it falls"},
        "lr_factor": {"type": float, "help": "what it is multiplied by then"},
        "momentum": {"type": float, "help": "of SGD"},
        "weight_decay": {"type": float},
        "grad_clip": {"type": float, "help": "largest norm of the gradient; 0 for no limit"},
        "average_decay": {"type": float, "help": "keep an exponential average of the weights with this decay"},
        "compile": {"action": _SWITCH, "help": "compile the training step, once for each phase"},
        "precision": {"choices": get_args(Precision), "help": "of products in training (tf32: on GPUs that have it)"},
        "seed": {"type": int},
    },
    "attack after training": {"pgd_steps": {"type": int}, "pgd_restarts": {"type": int}},
}


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
    method = command.add_argument_group("method", "changes the preset's objective; the options below change the method")
    method.add_argument("--method", choices=tuple(METHODS))
    method.add_argument("--init", choices=INITIALIZATIONS, help="initialisation")
    method.add_argument("--no-init", dest="init", action="store_const", const="default", help="the network's own")
    method.add_argument("--bn", dest="batchnorm", action=_SWITCH, help="full BatchNorm")
    method.add_argument("--reg", dest="regularizers", action=_SWITCH, help="the paper's two regularisers")
    for title, fields in _OPTIONS.items():
        group = command.add_argument_group(title, "each overrides the preset's")
        for field, arguments in fields.items():
            group.add_argument(f"--{field.replace('_', '-')}", **arguments)


def _settings(options: argparse.Namespace) -> Settings:
    if options.preset is None:
        raise ValueError(f"name a preset, one of {', '.join(PRESETS)}")
    base = preset(options.preset)
    if options.method is not None:
        base = base.with_method(options.method)
    changes = {name: value for name, value in _given(options).items() if name != "method"}
    if "lr_milestones" in changes:
        changes["lr_milestones"] = tuple(changes["lr_milestones"])
    if changes.get("validation"):
        changes.setdefault("select", "validation")
    return base.replace(**changes)


def _folder(options: argparse.Namespace) -> Path:
    if options.out is None:
        raise ValueError("name the folder for the results with --out DIR")
    return Path(options.out)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were named on the command line."""
    names = [name for name in Settings.names() if name != "preset"]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


class _Console:
    """A progress bar per epoch, and a line for each that is done."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._bar: Any = None

    def close(self) -> None:
        """Leave the line of the bar, so that what comes next has one of its own."""
        if self._bar is not None:
            self._bar.close()

    def epoch_started(self, epoch: int, batches: int, done: int) -> None:
        self._bar = tqdm(total=batches, initial=done, desc=f"epoch {epoch}/{self._epochs}", leave=False, disable=None)

    def step_done(self, means: Mapping[str, float]) -> None:
        self._bar.update()
        if means:
            shown = ("eps", "loss", "clean_loss", "robust_loss", "verified_error")
            self._bar.set_postfix({name: f"{means[name]:.4g}" for name in shown}, refresh=False)

    def epoch_done(self, row: Mapping[str, float], seconds: float) -> None:
        self.close()
        print(
            f"epoch {row['epoch']:>{len(str(self._epochs))}}/{self._epochs}  eps {row['eps']:.4f}  "
            f"loss {row['loss']:7.4f}  standard error {row['standard_error']:6.2%}  "
            f"verified error {row['verified_error']:6.2%}  {seconds:.1f} s",
            flush=True,
        )


def _train(options: argparse.Namespace) -> int:
    find_factories_here()
    settings = _resumed_settings(options) if options.resume else _settings(options)
    if options.show:
        print(settings)
        return 0
    out = _folder(options)
    console = _Console(settings.epochs)
    board = TensorBoard(out / TENSORBOARD) if options.tensorboard else None
    told: dict[str, Any] = {
        "device": device_named(options.device),
        "progress": Listeners(console, board) if board else console,
    }
    # Compiling takes a minute, in which nothing else is told.
    logging.getLogger(compiled.__name__).setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            summary = _run(options, settings, out, told)
    finally:
        console.close()
        if board:
            board.close()
    print(_table(summary))
    print(f"written to {out}")
    return 0


def _run(options: argparse.Namespace, settings: Settings, out: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    if options.resume:
        return resume(out, data_dir=options.data_dir, **told)
    return train(settings, out, overwrite=options.overwrite, **told)


def _resumed_settings(options: argparse.Namespace) -> Settings:
    """The settings of the run that is resumed; other ones on the command line are refused."""
    settings = settings_of_run(_folder(options))
    saved = settings.as_dict()
    named = (_settings(options).as_dict() if options.preset else saved) | _given(options)
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
