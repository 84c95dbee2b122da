"""The only room that knows the internals of auto_LiRPA."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ENGINE, _COMPAT = "auto_LiRPA", "lirpa_fastwarmup.engine.compat"


class _PatchingFinder(MetaPathFinder, Loader):
    """Lets the first import of auto_LiRPA, wherever it is made, go through :mod:`.compat`."""

    _spec: ModuleSpec | None = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        # compat itself imports the engine by the other finders.
        return None if name != _ENGINE or _COMPAT in sys.modules else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        importlib.import_module(_COMPAT)
        self._spec = sys.modules[_ENGINE].__spec__
        return sys.modules[_ENGINE]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # The import system has replaced it by the one above.


def patch_engine_on_import() -> None:
    """Patch auto_LiRPA when it is first imported; a process that never imports it does not load PyTorch either."""
    if sys.modules.get(_ENGINE) is not None:
        importlib.import_module(_COMPAT)
    elif not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchingFinder())
