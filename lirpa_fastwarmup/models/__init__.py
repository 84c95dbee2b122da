"""The paper's networks, plain nn.Modules that know nothing of bounds."""

from lirpa_fastwarmup.models.factory import MODELS, build, find_factory
from lirpa_fastwarmup.models.networks import Normalize, cnn7, resnext, wide_resnet8

__all__ = ["MODELS", "Normalize", "build", "cnn7", "find_factory", "resnext", "wide_resnet8"]
