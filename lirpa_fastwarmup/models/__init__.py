"""The paper's networks, plain nn.Modules that know nothing of bounds."""

from lirpa_fastwarmup.models.cnn7 import cnn7
from lirpa_fastwarmup.models.normalize import Normalize

__all__ = ["Normalize", "cnn7"]
