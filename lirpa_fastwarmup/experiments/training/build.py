"""From settings to what a run is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lirpa_fastwarmup.distributed import World, rank_zero_first, world
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training.network import architecture_of, build_network
from lirpa_fastwarmup.experiments.training.settings import Settings
from lirpa_fastwarmup.recipe.initialization import initialize_
from lirpa_fastwarmup.recipe.objective import ShortWarmup
from lirpa_fastwarmup.recipe.schedule import SCHEDULES

_EVALUATION_BATCH = 250
_CALIBRATION_SAMPLES = 128
_INSPECTED = 250
_AUGMENTATION = 2  # The stream of random numbers beside the one that shuffles.


@dataclass
class Run:
    """What a run is made of, on its device.

    Attributes:
        settings: what to run.
        architecture: what the network is built from.
        dataset_name: the name that results are reported under.
        train: the training samples, those held out excepted.
        train_batches, validation_batches, test_batches: of these, of the samples held out, of the test set.
        inspected: inputs, from all over the test set, that the network is looked at with.
        objective: the loss on the trained network.
        trained: what computes the loss: the objective, or DistributedDataParallel around it, by which gradients are
            averaged over all processes.
        world: the processes that train.
        optimizer: of its weights.
        average: the average of its weights, where one is kept.
        evaluated: the network whose errors are taken and whose weights are kept: the average, or the trained one.
    """

    settings: Settings
    architecture: dict[str, Any]
    dataset_name: str
    train: data.Split
    train_batches: data.Batches
    validation_batches: data.Batches | None
    test_batches: data.Batches
    inspected: torch.Tensor
    objective: ShortWarmup
    trained: nn.Module
    world: World
    optimizer: Optimizer
    average: AveragedModel | None
    evaluated: BoundedModule

    @property
    def device(self) -> torch.device:
        return next(self.objective.parameters()).device


def build_run(settings: Settings, device: torch.device) -> Run:
    """Everything that ``settings`` stand for, with freshly drawn weights.

    Raises:
        OSError: data files are missing or cannot be read.
        ValueError, TypeError, ImportError, NotImplementedError: what the settings name does not fit together; the
            text says what.
    """
    with rank_zero_first():  # Which downloads and unpacks, if need be.
        dataset = data.load(settings.dataset, settings.data_dir)
    processes = world()
    train, held_out = _training_samples(settings, dataset)
    train_batches = _training_batches(settings, data.place(train, device), device, processes)
    architecture = architecture_of(settings, dataset)
    # Everything random depends on the seed, and the caller's random state stays as it is.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        bounded = _bounded(settings, build_network(architecture).to(device), dataset.in_shape)
        initialize_(bounded, settings.init, calibrate=_calibration_images(settings, train, device), eps=settings.eps)
    if settings.sync_batchnorm:
        bounded.join_ranks()
    objective = _objective(settings, bounded, len(train_batches), processes)
    average = None
    if settings.average_decay is not None:
        average = AveragedModel(
            bounded.wrapped, multi_avg_fn=get_ema_multi_avg_fn(settings.average_decay), use_buffers=True
        )
    return Run(
        settings=settings,
        architecture=architecture,
        dataset_name=dataset.name,
        train=train_batches.split,
        train_batches=train_batches,
        validation_batches=None if held_out is None else _evaluation_batches(held_out, device),
        test_batches=_evaluation_batches(dataset.test, device),
        inspected=data.spread(dataset.test, _INSPECTED).inputs.to(device),
        objective=objective,
        trained=objective,
        world=processes,
        optimizer=_optimizer(settings, objective),
        average=average,
        evaluated=bounded if average is None else _bounded(settings, average.module.eval(), dataset.in_shape),
    )


def _training_samples(settings: Settings, dataset: data.Dataset) -> tuple[data.Split, data.Split | None]:
    samples = dataset.train
    if settings.data_limit is not None:
        samples = data.limited(samples, settings.data_limit, seed=settings.seed)
    return data.held_out(samples, settings.validation, seed=settings.seed) if settings.validation else (samples, None)


def _training_batches(settings: Settings, samples: data.Split, device: torch.device, processes: World) -> data.Batches:
    augmentation = None
    if settings.flip or settings.crop_padding:
        augmentation = data.Augmentation(
            flip=settings.flip,
            crop_padding=settings.crop_padding,
            generator=data.generator_of(settings.seed, _AUGMENTATION),
        )
    return data.Batches(
        samples,
        settings.batch_size,
        generator=torch.Generator().manual_seed(settings.seed),
        drop_single=settings.batchnorm,
        augment=augmentation,
        device=device,
        shard=(processes.rank, processes.size),
    )


def _calibration_images(settings: Settings, samples: data.Split, device: torch.device) -> torch.Tensor | None:
    if settings.init != "ibp-calibrated":
        return None
    some = data.limited(samples, min(_CALIBRATION_SAMPLES, len(samples)), seed=settings.seed)
    return some.to(device).inputs


def _evaluation_batches(samples: data.Split, device: torch.device) -> data.Batches:
    return data.Batches(data.place(samples, device), _EVALUATION_BATCH, device=device)


def _bounded(settings: Settings, model: nn.Module, in_shape: tuple[int, int, int]) -> BoundedModule:
    example = torch.zeros(2, *in_shape, device=next(model.parameters()).device)
    return BoundedModule(model, example, allow_untested=settings.allow_untested)


def _objective(settings: Settings, bounded: BoundedModule, steps_per_epoch: int, processes: World) -> ShortWarmup:
    weights = {
        "relu_stability": settings.stability_weight,
        "weight_l1": settings.l1_weight,
        "volume": settings.volume_weight,
    }
    return ShortWarmup(
        bounded,
        SCHEDULES[settings.schedule](settings.eps, settings.ramp_start, settings.ramp_length, steps_per_epoch),
        bound=settings.bound,
        kappa=settings.kappa,
        reg_weight=settings.reg_weight,
        tol=settings.tol,
        regularizers=("tightness", "relu_balance") if settings.regularizers else (),
        penalties={name: weight for name, weight in weights.items() if weight},
        compile=settings.compile,
        # The last batch of an epoch is taken eagerly: few steps would not repay another compilation.
        compile_batch_size=math.ceil(math.ceil(settings.batch_size / processes.size) / settings.accumulate),
    )


def _optimizer(settings: Settings, objective: ShortWarmup) -> Optimizer:
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "sgd":
        return SGD(objective.parameters(), momentum=settings.momentum, **shared)
    return Adam(objective.parameters(), **shared)
