"""The options that set a run's settings, shared by the commands that begin with a preset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from lirpa_fastwarmup.cli.options import number
from lirpa_fastwarmup.experiments.data import LOADERS
from lirpa_fastwarmup.experiments.presets import PRESETS, preset
from lirpa_fastwarmup.experiments.training import METHODS, Settings
from lirpa_fastwarmup.experiments.training.settings import EvaluateTest, Optimizer, Precision, Select
from lirpa_fastwarmup.models import MODELS
from lirpa_fastwarmup.recipe.initialization import INITIALIZATIONS
from lirpa_fastwarmup.recipe.losses import LOSSES
from lirpa_fastwarmup.recipe.schedule import SCHEDULES

_SWITCH = argparse.BooleanOptionalAction

# The options that set a field of Settings, by group: the field (its option is spelt with dashes), and argparse's own.
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "data": {
        "dataset": {"choices": sorted(LOADERS)},
        "data_dir": {"type": Path, "metavar": "DIR", "help": "folder of the dataset's files"},
        "data_limit": {"type": int, "metavar": "N", "help": "train on N samples, drawn by the seed"},
        "validation": {"type": int, "metavar": "N", "help": "hold out N of them, and keep the best epoch on these"},
        "select": {"choices": get_args(Select), "help": "which epoch's weights are kept"},
        "evaluate_test": {"choices": get_args(EvaluateTest), "help": "when errors on the test set are taken"},
        "flip": {"action": _SWITCH, "help": "augmentation: mirror images at random"},
        "crop_padding": {"type": int, "metavar": "P", "help": "augmentation: random windows after padding by P pixels"},
    },
    "network": {
        "model": {"metavar": "NAME", "help": f"{', '.join(MODELS)}, or package.module:factory"},
        "width": {"type": int, "help": "channels of its first stage (ResNeXt: bottleneck width)"},
        "hidden": {"type": int, "help": "features of its hidden linear layer"},
        "allow_untested": {"action": _SWITCH, "help": "accept operators whose bounds have not been tested"},
        "sync_batchnorm": {"action": _SWITCH, "help": "BatchNorm's statistics over all processes, under torchrun"},
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


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`settings_of` reads."""
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


def settings_of(options: argparse.Namespace) -> Settings:
    """The preset's settings with what the options change.

    Raises:
        ValueError: no preset is named, or an unknown one; a value is out of its range.
    """
    if options.preset is None:
        raise ValueError(f"name a preset, one of {', '.join(PRESETS)}")
    base = preset(options.preset)
    if options.method is not None:
        base = base.with_method(options.method)
    changes = {name: value for name, value in given_settings(options).items() if name != "method"}
    if "lr_milestones" in changes:
        changes["lr_milestones"] = tuple(changes["lr_milestones"])
    if changes.get("validation"):
        changes.setdefault("select", "validation")
    return base.replace(**changes)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were named on the command line."""
    names = [name for name in Settings.names() if name != "preset"]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}
