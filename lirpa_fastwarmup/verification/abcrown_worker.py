"""Runs α,β-CROWN in a separate process, `PYTHON abcrown_worker.py FD`, possibly in another Python environment.

It answers what it receives from the connection with the descriptor FD. First comes {"checkout", "network", "paths",
"sources", "settings"}, with the answer {"ready": True}; then tasks {"property", "point", "logits"}, the network's
outputs at a point, with the answer {"status", "points"}: the verifier's own word, and points that it offers as
counterexamples. This file is run by its path and imports nothing of this package.
"""

import contextlib
import importlib.util
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_MOST_POINTS = 100


def _points(torch: Any, stats: dict[str, Any], shape: list[int]) -> list[Any]:
    found = [value for value in stats.values() if isinstance(value, torch.Tensor) and value.shape[-len(shape) :]]
    size = torch.Size(shape).numel()
    rows = [value.reshape(-1, *shape) for value in found if value.numel() and value.numel() % size == 0]
    return torch.cat(rows)[:_MOST_POINTS].tolist() if rows else []


def main() -> None:
    """Answer tasks until the other end is closed."""
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    start = pipe.recv()
    sys.path[0] = str(Path(start["checkout"], "complete_verifier"))  # Not this folder, whose names hide others.
    sys.path += start["paths"]
    for name, file in start["sources"].items():  # Of the network's classes.
        try:
            importlib.import_module(name)
        except ImportError:
            spec = importlib.util.spec_from_file_location(name, file)
            if spec is None or spec.loader is None:
                raise
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    import arguments  # type: ignore[import-not-found]
    import torch
    from api import ABCrownSolver, ConfigBuilder, VerificationSpec  # type: ignore[import-not-found]

    network = torch.load(start["network"], map_location="cpu", weights_only=False).eval()
    config = ConfigBuilder().update(start["settings"]).to_dict()
    arguments.Config.all_args.update(config)  # Properties are read by the process's own settings.
    pipe.send({"ready": True})
    with contextlib.suppress(EOFError):
        while task := pipe.recv():
            point, logits = torch.tensor(task["point"]), torch.tensor(task["logits"])
            if not torch.allclose(network(point), logits, rtol=1e-3, atol=1e-3):
                raise RuntimeError("the network computes other outputs here: its classes come from other files")
            shape = list(point.shape[1:])
            spec = VerificationSpec.build_spec(vnnlib_path=task["property"], input_shape=[-1, *shape])
            found = ABCrownSolver(spec, network, config=config).solve(return_reference=False)
            pipe.send({"status": str(found.status), "points": _points(torch, found.stats, shape)})


if __name__ == "__main__":
    main()
