"""Everything that determines a training run, in one typed, printable object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lirpa_fastwarmup.experiments.training.methods import Method, settings_of
from lirpa_fastwarmup.recipe.initialization import INITIALIZATIONS
from lirpa_fastwarmup.recipe.losses import LOSSES
from lirpa_fastwarmup.recipe.schedule import SCHEDULES

Optimizer = Literal["adam", "sgd"]
Select = Literal["last", "validation", "test"]
Precision = Literal["float32", "tf32", "bf16"]
EvaluateTest = Literal["every-epoch", "end"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "bound": tuple(LOSSES),
    "init": INITIALIZATIONS,
    "schedule": tuple(SCHEDULES),
    "optimizer": get_args(Optimizer),
    "select": get_args(Select),
    "precision": get_args(Precision),
    "evaluate_test": get_args(EvaluateTest),
}
# Names, what their values must be, and whether a value is that.
_RULES: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    (("eps",), "above 0 and at most 1, the width of the input range [0, 1]", lambda value: 0 < value <= 1),
    (
        ("batch_size", "accumulate", "epochs", "hidden", "ramp_start", "width"),
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        (
            *("ramp_length", "pgd_steps", "pgd_restarts", "reg_weight", "grad_clip", "momentum", "weight_decay"),
            *("stability_weight", "l1_weight", "volume_weight", "validation", "crop_padding"),
        ),
        "finite and at least 0",
        lambda value: 0 <= value < math.inf,
    ),
    (("lr", "lr_factor", "tol"), "finite and above 0", lambda value: 0 < value < math.inf),
    (("kappa", "average_decay"), "from 0 to 1", lambda value: 0 <= value <= 1),
    (("seed",), "from 0 to 2^63 − 1", lambda value: 0 <= value < 2**63),
]

_ABLATIONS = ("bn_mean", "bn_var", "bn_affine")  # Settings of earlier versions.


def _is_a(value: object, kind: Any) -> bool:
    """Whether ``value`` is of a field's type; whole numbers are floats, truth values are no numbers."""
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_is_a(value, one) for one in get_args(kind))
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run.

    Attributes:
        preset: name of the preset that the others were taken from.
        method: name of the method that the objective's settings were taken from; see :meth:`with_method`.
        dataset: name of the dataset.
        data_dir: folder of its files; ``None`` for the default.
        data_limit: samples drawn from the training set; ``None`` for all.
        validation: samples of these held out for choosing the best epoch.
        select: whose weights are kept: those of the last epoch, or of the best by verified error on the held-out
            samples, or on the test set (which makes the reported error optimistic).
        evaluate_test: when errors on the test set are taken: after every epoch, or once at the end.
        flip, crop_padding: augmentation: random mirroring; random windows of the image padded by so many pixels.
        model: name of the network, or ``package.module:factory``.
        width, hidden: its size; ``width=None`` for the paper's.
        eps: target radius, in units of the input (pixels from 0 to 1).
        batch_size: samples in an optimiser's step, of all processes together.
        accumulate: parts that a batch is computed in, each with BatchNorm statistics of its own.
        epochs: passes over the training set.
        schedule, ramp_start, ramp_length: how ε grows, from the start of which epoch (counted from 1), for how many.
        optimizer, lr, momentum, weight_decay: "adam" or "sgd" (which alone has momentum), and its learning rate.
        lr_milestones, lr_factor: the rate is multiplied after so many finished epochs.
        grad_clip: largest norm of the gradient; 0 for no limit.
        average_decay: decay of the exponential average of weights that is evaluated and kept; ``None`` for none.
        compile: compile the training step; see :class:`lirpa_fastwarmup.ShortWarmup`.
        precision: of the products in training alone: float32 as it is, its inputs rounded to TF32 where a GPU does
            that, or autocast to bfloat16. Errors are always taken in float32.
        sync_batchnorm: where several processes train, take BatchNorm's statistics, and the figures of the paper's
            regularisers, over all of them; see :meth:`lirpa_fastwarmup.BoundedModule.join_ranks`.
        precise_bn: recompute BatchNorm's population statistics over the training set before the last evaluation.
        allow_untested: train a network with operators whose bounds have not been tested; see
            :class:`lirpa_fastwarmup.BoundedModule`.
        init: initialisation; see :func:`lirpa_fastwarmup.recipe.initialization.initialize_`.
        batchnorm: full BatchNorm.
        regularizers: the paper's two regularisers, in the warmup.
        reg_weight, tol: their λ and τ.
        bound: what bounds the loss; see :class:`lirpa_fastwarmup.ShortWarmup`.
        kappa: weight of the clean loss at the end of the ramp; ``None`` for none.
        stability_weight, l1_weight, volume_weight: of the literature's regularisers, throughout training.
        pgd_steps, pgd_restarts: the attack after training.
        seed: of weights, order of samples, augmentation and attack.
    """

    preset: str
    dataset: str
    eps: float
    batch_size: int
    epochs: int
    ramp_start: int
    ramp_length: int
    lr_milestones: tuple[int, ...]
    method: Method = "fast"
    data_dir: Path | None = None
    data_limit: int | None = None
    validation: int = 0
    select: Select = "last"
    evaluate_test: EvaluateTest = "every-epoch"
    flip: bool = False
    crop_padding: int = 0
    model: str = "cnn7"
    width: int | None = None
    hidden: int = 512
    accumulate: int = 1
    schedule: str = "smoothed"
    optimizer: Optimizer = "adam"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_factor: float = 0.2
    grad_clip: float = 10.0
    average_decay: float | None = None
    compile: bool = False
    precision: Precision = "tf32"
    sync_batchnorm: bool = False
    precise_bn: bool = False
    allow_untested: bool = False
    init: str = "ibp"
    batchnorm: bool = True
    regularizers: bool = True
    reg_weight: float = 0.5
    tol: float = 0.5
    bound: str = "ibp"
    kappa: float | None = None
    stability_weight: float = 0.0
    l1_weight: float = 0.0
    volume_weight: float = 0.0
    pgd_steps: int = 50
    pgd_restarts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        if self.select == "validation" and not self.validation:
            raise ValueError("choosing the best epoch on held-out samples needs some: give their number as validation")
        if self.select == "test" and self.evaluate_test == "end":
            raise ValueError("choosing the best epoch on the test set needs its errors after every epoch")

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is_a(value, kind):
                expected = getattr(kind, "__name__", str(kind))
                raise TypeError(f"{name} must be of type {expected}; found {value!r}")

    def _check_ranges(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known are {', '.join(known)}")
        for names, rule, holds in _RULES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name} must be {rule}; found {value}")

    def replace(self, **changes: Any) -> Settings:
        """The same with some values changed."""
        return dataclasses.replace(self, **changes)

    def with_method(self, method: str) -> Settings:
        """The same with the objective's settings as ``method`` has them.

        Raises:
            ValueError: no method has that name.
        """
        return self.replace(**settings_of(method))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON and for checkpoints."""
        values = dataclasses.asdict(self)
        values["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        values["lr_milestones"] = list(self.lr_milestones)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """What :meth:`as_dict` was made from.

        Raises:
            TypeError: names that this version does not know, or missing ones.
            ValueError: a value out of its range.
        """
        values = dict(values)
        left_out = [name for name in _ABLATIONS if not values.pop(name, True)]
        if left_out:
            raise ValueError(f"{', '.join(left_out)} off: this version trains no network with a part of BatchNorm only")
        data_dir = None if values.get("data_dir") is None else Path(values["data_dir"])
        return cls(**{**values, "data_dir": data_dir, "lr_milestones": tuple(values.get("lr_milestones", ()))})

    def __str__(self) -> str:
        values = self.as_dict()
        width = max(map(len, values))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())
