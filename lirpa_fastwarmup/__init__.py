"""Fast certified robust training with short warmup, as hooks on auto_LiRPA.

Importing this package makes the installed auto_LiRPA importable and working on the installed PyTorch.
"""

import sys
from pathlib import Path

try:
    from lirpa_fastwarmup import models
    from lirpa_fastwarmup.engine.batchnorm import share_batchnorm_state
    from lirpa_fastwarmup.engine.bounds import input_box
    from lirpa_fastwarmup.engine.graph import StructureError
    from lirpa_fastwarmup.engine.layers import LayerBounds, relu_bounds
    from lirpa_fastwarmup.engine.module import BoundedModule
    from lirpa_fastwarmup.engine.tracing import TracedPathWarning
    from lirpa_fastwarmup.inspection.layers import inspect
    from lirpa_fastwarmup.inspection.statistics import Inspection
    from lirpa_fastwarmup.recipe import regularizers
    from lirpa_fastwarmup.recipe.compiled import CompilationWarning
    from lirpa_fastwarmup.recipe.full_batchnorm import insert_batchnorm
    from lirpa_fastwarmup.recipe.initialization import LayerInit, ibp_init_, initialize_
    from lirpa_fastwarmup.recipe.objective import NonFiniteLossError, ShortWarmup, StepLoss
    from lirpa_fastwarmup.recipe.schedule import ConstantEpsilon, LinearEpsilon, Schedule, SmoothedEpsilon
    from lirpa_fastwarmup.verification.evaluate import verify
    from lirpa_fastwarmup.version import __version__
except KeyboardInterrupt:
    # Imports take seconds, and the command line cannot catch what happens before it is imported itself.
    if Path(sys.argv[0]).name == "lirpa-fastwarmup":
        sys.exit("lirpa-fastwarmup: interrupted")
    raise

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
    "__version__",
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
