"""Fast certified robust training with short warmup, as hooks on auto_LiRPA.

Importing this package makes the installed auto_LiRPA importable and working on the installed PyTorch.
"""

from lirpa_fastwarmup import models
from lirpa_fastwarmup.engine.bounds import input_box
from lirpa_fastwarmup.engine.graph import StructureError
from lirpa_fastwarmup.engine.layers import LayerBounds, relu_bounds
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.sharing import share_batchnorm_state
from lirpa_fastwarmup.engine.tracing import TracedPathWarning
from lirpa_fastwarmup.inspection.figures import Inspection
from lirpa_fastwarmup.inspection.inspect import inspect
from lirpa_fastwarmup.recipe import regularizers
from lirpa_fastwarmup.recipe.batchnorm import insert_batchnorm
from lirpa_fastwarmup.recipe.compiled import CompilationWarning
from lirpa_fastwarmup.recipe.initialization import LayerInit, ibp_init_, initialize_
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError, ShortWarmup, StepLoss
from lirpa_fastwarmup.recipe.schedule import ConstantEpsilon, LinearEpsilon, Schedule, SmoothedEpsilon
from lirpa_fastwarmup.verification.verifier import verify

__version__ = "0.1.0"

__all__ = [
    "BoundedModule",
    "CompilationWarning",
    "ConstantEpsilon",
    "Inspection",
    "LayerBounds",
    "LayerInit",
    "LinearEpsilon",
    "NonFiniteLossError",
    "Schedule",
    "ShortWarmup",
    "SmoothedEpsilon",
    "StepLoss",
    "StructureError",
    "TracedPathWarning",
    "ibp_init_",
    "initialize_",
    "input_box",
    "insert_batchnorm",
    "inspect",
    "models",
    "regularizers",
    "relu_bounds",
    "share_batchnorm_state",
    "verify",
]
