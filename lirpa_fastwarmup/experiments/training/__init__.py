"""Training runs. Names load on first use: most of their modules import PyTorch and the engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lirpa_fastwarmup.experiments.training.interrupt import TrainingInterrupted
from lirpa_fastwarmup.experiments.training.settings import METHODS, Settings

if TYPE_CHECKING:
    from lirpa_fastwarmup.experiments.training.build import build_run
    from lirpa_fastwarmup.experiments.training.checkpoint import OutputExistsError
    from lirpa_fastwarmup.experiments.training.network import UntrustedError, load_model, load_weights
    from lirpa_fastwarmup.experiments.training.run import resume, settings_of_run, train

_MODULES = {
    "build": ("build_run",),
    "checkpoint": ("OutputExistsError",),
    "network": ("UntrustedError", "load_model", "load_weights"),
    "run": ("resume", "settings_of_run", "train"),
}
__all__ = ["METHODS", "OutputExistsError", "Settings", "TrainingInterrupted", "UntrustedError", "build_run"]
__all__ += ["load_model", "load_weights", "resume", "settings_of_run", "train"]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
