"""The only room that knows the internals of auto_LiRPA."""

import copy
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ENGINE = "auto_LiRPA"


class _PatchingFinder(MetaPathFinder, Loader):
    """Lets the first import of auto_LiRPA, wherever it is made, go through :mod:`.compat`."""

    _used = False
    _spec: ModuleSpec | None = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name != _ENGINE or self._used:
            return None
        self._used = True
        try:
            importlib.import_module("lirpa_fastwarmup.engine.compat")
        except BaseException:
            self._used = False
            raise
        engine = sys.modules.get(name)
        if engine is None or engine.__spec__ is None:
            return None  # compat itself is importing it.
        # The import system loads what the module's own spec says: this one keeps it from being executed again.
        self._spec, engine.__spec__ = engine.__spec__, copy.copy(engine.__spec__)
        engine.__spec__.loader = self
        return engine.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def patch_engine_on_import() -> None:
    """Patch auto_LiRPA when it is first imported; a process that never imports it does not load PyTorch either."""
    if sys.modules.get(_ENGINE) is not None:
        importlib.import_module("lirpa_fastwarmup.engine.compat")
    elif not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchingFinder())
