"""The training loop and the files that a run leaves."""

from lirpa_fastwarmup.experiments.training.build import build_run
from lirpa_fastwarmup.experiments.training.files import OutputExistsError
from lirpa_fastwarmup.experiments.training.interrupt import TrainingInterrupted
from lirpa_fastwarmup.experiments.training.methods import METHODS
from lirpa_fastwarmup.experiments.training.network import UntrustedError, load_model, load_weights, settings_of_model
from lirpa_fastwarmup.experiments.training.run import resume, settings_of_run, train
from lirpa_fastwarmup.experiments.training.settings import Settings

__all__ = [
    "METHODS",
    "OutputExistsError",
    "Settings",
    "TrainingInterrupted",
    "UntrustedError",
    "build_run",
    "load_model",
    "load_weights",
    "resume",
    "settings_of_model",
    "settings_of_run",
    "train",
]
