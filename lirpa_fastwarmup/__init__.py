"""Fast certified robust training with short warmup, as hooks on auto_LiRPA.

Names load on first use. After this import, ``import auto_LiRPA`` works on the installed PyTorch.
"""

import importlib
from typing import Any

from lirpa_fastwarmup.engine import patch_engine_on_import
from lirpa_fastwarmup.version import __version__

_MODULES = {
    "engine.batchnorm": ("share_batchnorm_state",),
    "engine.bounds": ("input_box",),
    "engine.graph": ("LayerBounds", "StructureError", "relu_bounds"),
    "engine.module": ("BoundedModule",),
    "engine.tracing": ("TracedPathWarning",),
    "inspection.layers": ("inspect",),
    "inspection.statistics": ("Inspection",),
    "recipe.compiled": ("CompilationWarning",),
    "recipe.full_batchnorm": ("fold_batchnorm", "insert_batchnorm"),
    "recipe.initialization": ("LayerInit", "ibp_init_", "initialize_"),
    "recipe.objective": ("NonFiniteLossError", "ShortWarmup", "StepLoss"),
    "recipe.schedule": ("ConstantEpsilon", "LinearEpsilon", "Schedule", "SmoothedEpsilon"),
    "verification.evaluate": ("verify",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = {"losses": "recipe.losses", "regularizers": "recipe.regularizers"}
_SUBMODULES |= {name: name for name in ("attacks", "experiments", "inspection", "models", "verification")}

__all__ = ["__version__", *_HOME, *_SUBMODULES]

patch_engine_on_import()


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        value: Any = importlib.import_module(f"{__name__}.{_SUBMODULES[name]}")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
