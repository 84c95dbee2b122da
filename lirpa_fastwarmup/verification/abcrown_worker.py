"""A process that runs α,β-CROWN: `PYTHON abcrown_worker.py`, in an environment that has neither to be this one.

It reads lines of JSON and answers each with one. The first line is {"checkout", "network", "paths", "sources",
"settings"}, the answer {"ready": true}. Each further one is a task {"property", "shape"}, with the answer {"status",
"points"}: the verifier's own word, and points that it offers as counterexamples. What the verifier prints goes to
stderr. This file is run by its path and imports nothing of this package.
"""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

_MOST_POINTS = 100


def _import_sources(sources: dict[str, str]) -> None:
    """Load the modules of the network's classes that cannot be imported by name from their files."""
    for name, file in sources.items():
        try:
            importlib.import_module(name)
        except ImportError:
            spec = importlib.util.spec_from_file_location(name, file)
            if spec is None or spec.loader is None:
                raise
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


def _update(config: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict):
            _update(config.setdefault(name, {}), value)
        else:
            config[name] = value


def _points(torch: Any, stats: dict[str, Any], shape: list[int]) -> list[Any]:
    """What the attack left, as inputs of the network."""
    found = [value for value in stats.values() if isinstance(value, torch.Tensor) and value.shape[-len(shape) :]]
    size = torch.Size(shape).numel()
    rows = [value.reshape(-1, *shape) for value in found if value.numel() and value.numel() % size == 0]
    return torch.cat(rows)[:_MOST_POINTS].tolist() if rows else []


def main() -> None:
    """Answer tasks until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    start = json.loads(sys.stdin.readline())
    # In place of this file's own folder, whose modules have names that others look for.
    sys.path[0] = str(Path(start["checkout"], "complete_verifier"))
    sys.path += start["paths"]
    _import_sources(start["sources"])
    import arguments  # type: ignore[import-not-found]
    import torch
    from api import ABCrownSolver, VerificationSpec, default_config  # type: ignore[import-not-found]

    network = torch.load(start["network"], map_location="cpu", weights_only=False).eval()
    config = default_config()
    _update(config, start["settings"])
    # The property is read by the process's own settings.
    _update(arguments.Config.all_args, start["settings"])
    answer({"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        spec = VerificationSpec.build_spec(vnnlib_path=task["property"], input_shape=[-1, *task["shape"]])
        with contextlib.redirect_stdout(sys.stderr):
            found = ABCrownSolver(spec, network, config=config).solve(return_reference=False)
        answer({"status": str(found.status), "points": _points(torch, found.stats, task["shape"])})


if __name__ == "__main__":
    main()
