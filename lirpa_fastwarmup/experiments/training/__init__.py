"""Training runs. Names load on first use: most of their modules import PyTorch and the engine."""

import importlib
from typing import TYPE_CHECKING, Any

from lirpa_fastwarmup.experiments.training.interrupt import TrainingInterrupted
from lirpa_fastwarmup.experiments.training.settings import METHODS, Settings

if TYPE_CHECKING:
    from lirpa_fastwarmup.experiments.training.build import build_run
    from lirpa_fastwarmup.experiments.training.checkpoint import OutputExistsError
    from lirpa_fastwarmup.experiments.training.network import UntrustedError, load_model, load_weights
    from lirpa_fastwarmup.experiments.training.run import resume, settings_of_run, train

__all__ = ["METHODS", "OutputExistsError", "Settings", "TrainingInterrupted", "UntrustedError", "build_run"]
__all__ += ["load_model", "load_weights", "resume", "settings_of_run", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (importlib.import_module(f"{__name__}.{home}") for home in ("build", "checkpoint", "network", "run"))
    return next(getattr(module, name) for module in modules if hasattr(module, name))
