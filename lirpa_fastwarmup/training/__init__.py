"""The training loop and the files that a run leaves."""

from lirpa_fastwarmup.training.files import OutputExistsError
from lirpa_fastwarmup.training.run import load_model, train
from lirpa_fastwarmup.training.settings import Settings

__all__ = ["OutputExistsError", "Settings", "load_model", "train"]
