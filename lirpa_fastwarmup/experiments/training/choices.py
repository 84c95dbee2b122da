"""Chooses, once for a run, what pays on this machine: the precision, if it is "auto", and the phases to compile."""

import logging
import time

import torch

from lirpa_fastwarmup.distributed import broadcast
from lirpa_fastwarmup.engine.precision import products_in_tf32, temporarily
from lirpa_fastwarmup.engine.tracing import unchanged
from lirpa_fastwarmup.experiments.training.build import Run, micro_batch_size
from lirpa_fastwarmup.recipe.losses import FULL, RAMP, START
from lirpa_fastwarmup.recipe.objective import NonFiniteLossError

logger = logging.getLogger(__name__)

_SAVED = 0.2  # The fraction of an eager step that a compiled one saves at least (docs/performance.md).
_COST = 50.0  # Seconds to compile phases that share a recording.
_FASTER = 0.95  # Less would not repay the rounding.


def choose(run: Run) -> None:
    """Settle what the settings of ``run`` leave open, by the time of eager steps; every process must call this."""
    if run.settings.precision == "auto":
        exact, rounded = (broadcast(_eager_seconds(run, precision)) for precision in ("tf32", "bf16"))
        precision = "bf16" if 0 < rounded < _FASTER * exact else "tf32"
        run.settings = run.settings.replace(precision=precision)
        logger.info("a step takes %.2g s, and %.2g s with bfloat16: --precision %s", exact, rounded, precision)
    if run.settings.compile is None:
        run.objective.compiled_phases = _phases_that_pay(run)
        run.settings = run.settings.replace(compiled_phases=run.objective.compiled_phases)


def _phases_that_pay(run: Run) -> tuple[str, ...]:
    settings = run.settings
    if run.objective.bounded.over_ranks:  # Such steps cannot be recorded.
        return ()
    start = min(settings.epochs, settings.ramp_start - 1)
    ramp = min(settings.epochs - start, settings.ramp_length)
    epochs = {START: start, RAMP: ramp, FULL: settings.epochs - start - ramp}
    seconds = broadcast(_eager_seconds(run, settings.precision))
    saved = len(run.train_batches) * settings.accumulate * seconds * _SAVED  # In an epoch.
    together = dict.fromkeys(map(run.objective.phases_recorded_with, epochs))
    paying = [phases for phases in together if sum(epochs[phase] for phase in phases) * saved > _COST]
    chosen = tuple(phase for phases in paying for phase in phases if epochs[phase])
    which = f"steps {' and '.join(chosen)} are compiled" if chosen else "there are too few to repay compiling them"
    logger.info("a training step takes %.2g s: %s (--compile or --no-compile to choose)", seconds, which)
    return chosen


def _eager_seconds(run: Run, precision: str) -> float:
    objective, settings = run.objective, run.settings
    size = micro_batch_size(settings, objective.model, run.train_batches)
    x = run.inspected[torch.arange(size) % len(run.inspected)]
    y = torch.zeros(size, dtype=torch.int64, device=x.device)
    done, objective.steps_done = objective.steps_done, (settings.ramp_start - 1) * len(run.train_batches) + 1
    try:
        eager = temporarily([objective], "compiled_phases", ())
        with unchanged(objective.model), products_in_tf32(precision != "float32"), eager:
            objective.train()
            for _ in range(2):  # The first one also prepares and allocates.
                started = time.perf_counter()
                with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = objective(x, y).loss
                loss.backward()
                objective.raise_pending_errors()  # Waits for a GPU.
            return time.perf_counter() - started
    except NonFiniteLossError:  # To be raised in training, if it occurs there.
        return 0.0
    finally:
        objective.steps_done = done
        objective.zero_grad()
