"""Builds a run from its settings: data, network, objective and optimiser."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils._pytree import tree_map_only

from lirpa_fastwarmup import models
from lirpa_fastwarmup.attacks import PGD
from lirpa_fastwarmup.boxes import InputRange
from lirpa_fastwarmup.distributed import rank_zero_first, world
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.data.dataset import seed_of
from lirpa_fastwarmup.experiments.training.network import build_network
from lirpa_fastwarmup.experiments.training.settings import NEEDED, Settings
from lirpa_fastwarmup.recipe import initialization, losses
from lirpa_fastwarmup.recipe.objective import ShortWarmup
from lirpa_fastwarmup.recipe.schedule import SCHEDULES

_EVALUATION_BATCH = 250
_INSPECTED = 250
_AUGMENTATION = 2  # The stream of random numbers for augmentation; shuffling has its own.


@dataclass
class Run:
    """The parts of a run, on its device."""

    settings: Settings
    architecture: dict[str, Any]  # The arguments of `build_network`.
    dataset_name: str  # In reports.
    input_range: InputRange | None  # To which boxes are clipped.
    train_batches: data.Batches
    validation_batches: data.Batches | None  # Held out from the training samples.
    test_batches: data.Batches
    inspected: torch.Tensor  # Inputs, evenly spaced over the test set, for the statistics of the layers.
    objective: ShortWarmup
    trained: nn.Module  # Computes the loss: the objective, or DistributedDataParallel around it.
    optimizer: Optimizer
    average: AveragedModel | None  # The average of the trained weights.
    evaluated: BoundedModule  # The network that is evaluated and saved: the average, or else the trained one.

    @property
    def device(self) -> torch.device:
        return next(self.objective.parameters()).device

    def micro_batches(self, samples: int) -> int:
        """In how many parts each process takes a batch of ``samples`` samples of all processes."""
        return _micro_batches(self.settings, self.objective.model, samples)


def build_run(settings: Settings, device: torch.device) -> Run:
    """Build the run that ``settings`` describe, with freshly drawn weights."""
    models.find_factory(settings.model)  # Before anything is downloaded.
    with rank_zero_first():  # Rank 0 downloads and unpacks.
        dataset = data.load(settings.dataset, settings.data_dir, settings.input_range)
    train, held_out = dataset.train, None
    if settings.data_limit is not None:
        train = data.limited(train, settings.data_limit, seed=settings.seed)
    if settings.validation:
        train, held_out = data.held_out(train, settings.validation, seed=settings.seed)
    input_range = tree_map_only(torch.Tensor, lambda end: end.to(device), dataset.input_range)
    architecture = {name: getattr(settings, name) for name in ("model", "width", "hidden", "batchnorm")}
    architecture |= {"in_shape": list(dataset.in_shape), "classes": dataset.classes}
    architecture |= {"mean": dataset.mean, "std": dataset.std}
    # All random numbers depend on the seed; the caller's random state is restored.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        bounded = _bounded(settings, build_network(architecture).to(device), dataset.in_shape)
        initialization.initialize_(bounded, settings.init)
    train_batches = _training_batches(settings, bounded.wrapped, data.place(train, device), device)
    if settings.sync_batchnorm and world().size > 1:
        bounded.join_ranks()
    objective = _objective(settings, bounded, input_range, train_batches)
    objective.compiled_phases = losses.PHASES if settings.compile else settings.compiled_phases
    kind: Any = partial(SGD, momentum=settings.momentum) if settings.optimizer == "sgd" else Adam
    average = _average(settings, bounded.wrapped)
    return Run(
        settings=settings,
        architecture=architecture,
        dataset_name=dataset.name,
        input_range=input_range,
        train_batches=train_batches,
        validation_batches=None if held_out is None else _evaluation_batches(held_out, device),
        test_batches=_evaluation_batches(dataset.test, device),
        inspected=data.spread(dataset.test, _INSPECTED).inputs.to(device),
        objective=objective,
        trained=objective,
        optimizer=kind(objective.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True),
        average=average,
        evaluated=bounded if average is None else _bounded(settings, average.module.eval(), dataset.in_shape),
    )


def _trains_batchnorm(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def _micro_batches(settings: Settings, network: nn.Module, samples: int) -> int:
    own = samples // world().size
    return max(1, min(settings.accumulate, own // 2 if _trains_batchnorm(network) else own))  # Which needs two samples.


def _training_batches(settings: Settings, network: nn.Module, split: data.Split, device: torch.device) -> data.Batches:
    augment = None
    if settings.flip or settings.crop_padding:
        if split.images.ndim != 4:
            text = f"inputs of shape {tuple(split.images.shape[1:])} are no images, which --flip and --crop-padding"
            raise ValueError(f"{text} augment: add --no-flip --crop-padding 0, or start from the preset custom")
        generator = torch.Generator().manual_seed(seed_of(settings.seed, _AUGMENTATION))
        augment = data.Augmentation(flip=settings.flip, crop_padding=settings.crop_padding, generator=generator)
    order = torch.Generator().manual_seed(settings.seed)
    given: dict[str, Any] = {"generator": order, "drop_single": _trains_batchnorm(network), "augment": augment}
    return data.Batches(split, settings.batch_size, device=device, shard=(world().rank, world().size), **given)


def _evaluation_batches(samples: data.Split, device: torch.device) -> data.Batches:
    return data.Batches(data.place(samples, device), _EVALUATION_BATCH, device=device)


def _bounded(settings: Settings, model: nn.Module, in_shape: tuple[int, ...]) -> BoundedModule:
    example = torch.zeros(2, *in_shape, device=next(model.parameters()).device)
    return BoundedModule(model, example, allow_untested=settings.allow_untested)


def _objective(
    settings: Settings, bounded: BoundedModule, input_range: InputRange | None, batches: data.Batches
) -> ShortWarmup:
    eps = settings.eps * settings.train_eps_factor
    penalties = {"relu_stability": settings.stability_weight, "weight_l1": settings.l1_weight}
    penalties["volume"] = settings.volume_weight
    return ShortWarmup(
        bounded,
        SCHEDULES[settings.schedule](eps, settings.ramp_start, settings.ramp_length, len(batches)),
        input_range=input_range,
        loss=_loss(settings),
        **{name: getattr(settings, name) for name in ("kappa", "reg_weight", "tol")},
        regularizers=("tightness", "relu_balance") if settings.regularizers else (),
        penalties={name: weight for name, weight in penalties.items() if weight},
        # The last batch of an epoch runs eagerly: few steps would not repay another compilation.
        compile_batch_size=micro_batch_size(settings, bounded.wrapped, batches),
        generator=torch.Generator(next(bounded.wrapped.parameters()).device),
    )


def micro_batch_size(settings: Settings, network: nn.Module, batches: data.Batches) -> int:
    """The size of a process's largest micro-batch."""
    largest = batches.samples_in(0)
    return math.ceil(largest / (world().size * _micro_batches(settings, network, largest)))


def _loss(settings: Settings) -> losses.Loss:
    kind = losses.LOSSES[settings.loss]
    if settings.loss not in NEEDED:
        return kind()
    plan: dict[str, Any] = {"scale": settings.attack_scale, "return_best": settings.attack_best}
    attack = PGD(settings.attack_steps, settings.attack_step_size, settings.attack_restarts, **plan)
    own: dict[str, Any] = {"alpha": settings.alpha}
    if settings.loss == "sabr":
        own = {"ratio": settings.ratio, "relu_shrinkage": settings.relu_shrinkage}
    return kind(**own, attack=attack, batchnorm=settings.batchnorm_policy)


def _average(settings: Settings, model: nn.Module) -> AveragedModel | None:
    if settings.swa_start is not None:
        return AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    if settings.average_decay is None:
        return None
    decayed = get_ema_multi_avg_fn(settings.average_decay)

    def update(means: Any, values: Any, steps: Any) -> None:
        if means[0].is_floating_point():  # All are of one type; integers have no mean.
            decayed(means, values, steps)
        else:
            torch._foreach_copy_(means, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
