"""That the processes of one run compute one run."""

from __future__ import annotations

import json

import torch
from torch.nn.parallel import DistributedDataParallel

from lirpa_fastwarmup.distributed import all_gather
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.experiments.training.build import Run
from lirpa_fastwarmup.version import __version__


def join_ranks(run: Run) -> None:
    """Let all processes train one network: gradients are averaged over them from now on; alone, nothing changes.

    Raises:
        ValueError: they have not the same code, settings, data or network; the text says which process differs from the
            first one, and in what. It is raised on every process.
    """
    if run.world.size > 1:
        _require_same(run)
        devices = None if run.device.type == "cpu" else [run.device]
        run.trained = DistributedDataParallel(run.objective, device_ids=devices)


def _require_same(run: Run) -> None:
    own = {
        "versions": f"{__version__}, auto_LiRPA {ENGINE_VERSION}, torch {torch.__version__}",
        "settings": json.dumps({**run.settings.as_dict(), "data_dir": None}),
        "data": f"{run.dataset_name}, {len(run.train)} training samples, labels {int(run.train.labels.long().sum())}",
        "network": str({name: tuple(value.shape) for name, value in run.objective.model.state_dict().items()}),
    }
    first, *others = all_gather(own)
    for rank, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                raise ValueError(
                    f"the processes do not compute one run: rank {rank} has other {name} than rank 0 ({value}; rank 0: "
                    f"{first[name]}). Give all machines the same code and data"
                )
