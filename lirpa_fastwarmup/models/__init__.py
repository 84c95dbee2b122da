"""The paper's networks, plain nn.Modules that know nothing of bounds."""

from lirpa_fastwarmup.models.cnn7 import cnn7
from lirpa_fastwarmup.models.factory import MODELS, build
from lirpa_fastwarmup.models.normalize import Normalize
from lirpa_fastwarmup.models.resnext import resnext
from lirpa_fastwarmup.models.wide_resnet import wide_resnet8

__all__ = ["MODELS", "Normalize", "build", "cnn7", "resnext", "wide_resnet8"]
