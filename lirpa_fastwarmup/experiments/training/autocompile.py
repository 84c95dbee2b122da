"""Chooses, once for a run, the phases whose training steps repay being compiled."""

import logging
import math
import time
from functools import partial

import torch

from lirpa_fastwarmup.distributed import broadcast, world
from lirpa_fastwarmup.engine.precision import products_in_tf32
from lirpa_fastwarmup.engine.tracing import unchanged
from lirpa_fastwarmup.experiments.training.build import Run
from lirpa_fastwarmup.recipe.losses import FULL, RAMP, START
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError

logger = logging.getLogger(__name__)

_SAVED = 0.3  # The fraction of an eager step that a compiled one saves at least (docs/performance.md).
_COST = 45.0  # Seconds to compile a phase.


def phases_that_pay(run: Run) -> tuple[str, ...]:
    """The phases to compile, by the time of an eager step; every process must call this. The run stays as it is."""
    settings = run.settings
    if run.objective.bounded.over_ranks:  # Such steps cannot be recorded.
        return ()
    start = min(settings.epochs, settings.ramp_start - 1)
    ramp = min(settings.epochs - start, settings.ramp_length)
    epochs = {START: start, RAMP: ramp, FULL: settings.epochs - start - ramp}
    seconds = broadcast(_eager_seconds(run))
    steps = len(run.train_batches) * settings.accumulate
    chosen = tuple(phase for phase, count in epochs.items() if count * steps * seconds * _SAVED > _COST)
    which = f"steps {' and '.join(chosen)} are compiled" if chosen else "there are too few to repay compiling them"
    logger.info("a training step takes %.2g s: %s (--compile or --no-compile to choose)", seconds, which)
    return chosen


def _eager_seconds(run: Run) -> float:
    """Seconds of an eager step in the ramp, forward and backward, on samples of the test set."""
    objective, settings = run.objective, run.settings
    size = math.ceil(math.ceil(settings.batch_size / world().size) / settings.accumulate)
    x = run.inspected[torch.arange(size) % len(run.inspected)]
    y = torch.zeros(size, dtype=torch.int64, device=x.device)
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    done, objective.steps_done = objective.steps_done, (settings.ramp_start - 1) * len(run.train_batches) + 1
    try:
        with unchanged(objective.model), products_in_tf32(settings.precision != "float32"):
            objective.train()
            for _ in range(2):  # The first one also prepares and allocates.
                started = time.perf_counter()
                with autocast():
                    loss = objective(x, y).loss
                loss.backward()
                objective.raise_pending_errors()  # Waits for a GPU.
            return time.perf_counter() - started
    except NonFiniteLossError:  # To be raised in training, if it occurs there.
        return 0.0
    finally:
        objective.steps_done = done
        objective.zero_grad()
