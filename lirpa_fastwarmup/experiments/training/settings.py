"""The settings of a training run, each stated once. This module imports neither PyTorch nor the engine."""

# ruff: noqa: RUF009 (fields are made by a function)

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lirpa_fastwarmup.experiments import published

Method = Literal["fast", "ibp", "gowal", "crown-ibp", "xiao", "colt", "sabr", "mtl-ibp", "cc-ibp", "exp-ibp"]
# The names in the registries of datasets, models, initialisations, losses and schedules, whose modules import PyTorch.
Dataset = Literal["mnist5k", "mnist", "cifar10", "tiny-imagenet", "npz"]
_PIXELS = frozenset(get_args(Dataset)) - {"npz"}  # Those that are certainly images.
Model = Literal["cnn7", "wide-resnet8", "resnext"]
Init = Literal["default", "kaiming", "xavier", "orthogonal", "ibp"]
Loss = Literal["ibp", "crown-ibp", "crown-ibp-fused", "sabr", "mtl-ibp", "cc-ibp", "exp-ibp"]
BatchNormPolicy = Literal["clean", "running", "adversarial"]
Schedule = Literal["smoothed", "linear"]
Select = Literal["last", "validation", "test"]
Precision = Literal["float32", "tf32", "bf16", "auto"]

_PLAIN: dict[str, Any] = {"init": "default", "regularizers": False}  # Plain interval bound propagation.
# What each method changes in the defaults of the objective's settings; full BatchNorm stays with all methods.
METHODS: dict[str, dict[str, Any]] = {
    "fast": {},  # The remedies of Shi et al. (NeurIPS 2021).
    "ibp": _PLAIN,
    "gowal": {**_PLAIN, "kappa": (1.0, 0.5), "schedule": "linear"},  # Gowal et al. (2018).
    "crown-ibp": {**_PLAIN, "loss": "crown-ibp-fused"},  # Zhang et al. (ICLR 2020); fused by Xu et al. (NeurIPS 2020).
    "xiao": {**_PLAIN, "stability_weight": 1e-5, "l1_weight": 1e-5},  # Xiao et al. (ICLR 2019).
    "colt": {**_PLAIN, "volume_weight": 1e-3},  # Balunović and Vechev (ICLR 2020); the weight is our choice.
    # Müller et al. (ICLR 2023) and De Palma et al. (ICLR 2024), on the remedies of Shi et al., with published settings.
    **{name: {"loss": name} for name in ("sabr", "mtl-ibp", "cc-ibp", "exp-ibp")},
}
# What each loss cannot do without, and what it is. A loss that is not here has no attack.
NEEDED = {"sabr": ("ratio", "the small box's size relative to the box")}
NEEDED |= dict.fromkeys(("mtl-ibp", "cc-ibp", "exp-ibp"), ("alpha", "the weight of IBP against the attack"))
_OF_LOSSES: tuple[str, ...] = ("alpha", "ratio", "relu_shrinkage", "batchnorm_policy", "train_eps_factor")
_OF_LOSSES += ("attack_steps", "attack_step_size", "attack_restarts", "attack_scale", "attack_best")

# Settings, the condition on their values, and its check.
_RANGES: list[tuple[str, str, Callable[[Any], bool]]] = [
    ("eps", "above 0 and finite", lambda value: 0 < value < math.inf),
    ("batch_size accumulate epochs hidden ramp_start width swa_start", "at least 1", lambda value: value >= 1),
    ("attack_steps attack_restarts", "at least 1", lambda value: value >= 1),
    ("attack_scale train_eps_factor", "finite and at least 1", lambda value: 1 <= value < math.inf),
    ("ramp_length validation crop_padding pgd_steps pgd_restarts", "at least 0", lambda value: value >= 0),
    ("reg_weight stability_weight l1_weight", "finite and at least 0", lambda value: 0 <= value < math.inf),
    ("volume_weight grad_clip momentum weight_decay", "finite and at least 0", lambda value: 0 <= value < math.inf),
    ("lr lr_factor tol attack_step_size", "finite and above 0", lambda value: 0 < value < math.inf),
    ("average_decay alpha", "from 0 to 1", lambda value: 0 <= value <= 1),
    ("ratio relu_shrinkage", "above 0 and at most 1", lambda value: 0 < value <= 1),
    ("kappa", "two weights from 0 to 1", lambda value: len(value) == 2 and all(0 <= one <= 1 for one in value)),
    ("input_range", "the lowest and the highest valid input", lambda value: len(value) == 2 and value[0] < value[1]),
    ("seed", "from 0 to 2^63 − 1", lambda value: 0 <= value < 2**63),
]

_DATASETS, _FACTORY = ", ".join(get_args(Dataset)), "package.module:factory or file.py:factory"


def _setting(group: str, text: str, default: Any = MISSING, metavar: str | None = None, flag: str | None = None) -> Any:
    """A field, with the group, description, metavar and name (by default the field's) of its command-line option."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "metavar": metavar, "flag": flag})


def _is_a(value: object, kind: Any) -> bool:
    """Whether ``value`` has a field's type; an int is also a float, a bool is not a number."""
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
    """The settings of a run."""

    preset: str = dataclasses.field(metadata={"help": "preset that the settings started from"})

    method: Method = _setting("method", "training method; sets the objective, which other options change", "fast")
    init: Init = _setting("method", "initialisation of the weights", "ibp")
    batchnorm: bool = _setting("method", "full BatchNorm", True, flag="bn")
    regularizers: bool = _setting("method", "the paper's two regularisers, in the warmup", True, flag="reg")

    dataset: str = _setting("data", f"{_DATASETS}, FILE.npz, FILE.pt, FILE.csv, a folder, {_FACTORY}", metavar="NAME")
    data_dir: Path | None = _setting("data", "folder of the dataset's files; if unset, the user's cache", None, "DIR")
    input_range: tuple[float, float] | None = _setting(
        "data", "lowest and highest valid input, to which boxes are clipped; if unset, the dataset's", None, "X"
    )
    data_limit: int | None = _setting("data", "train on N samples, drawn by the seed", None, "N")
    validation: int = _setting("data", "hold out N training samples, to select the best epoch on", 0, "N")
    select: Select = _setting("data", "keep the last epoch, or the best one on held-out or on test samples", "last")
    evaluate_test: Literal["every-epoch", "end"] = _setting("data", "when to compute test errors", "every-epoch")
    flip: bool = _setting("data", "augmentation: mirror images at random", False)
    crop_padding: int = _setting("data", "augmentation: random crops after padding by P pixels", 0, "P")

    model: str = _setting("network", f"{', '.join(get_args(Model))}, {_FACTORY}", "cnn7", "NAME")
    width: int | None = _setting("network", "channels of the first stage (ResNeXt: bottleneck width)", None, "N")
    hidden: int = _setting("network", "features of the hidden linear layer", 512, "N")
    allow_untested: bool = _setting("network", "accept operators whose bounds have not been tested", False)
    sync_batchnorm: bool = _setting("network", "compute batch statistics over all processes, under torchrun", False)
    precise_bn: bool = _setting("network", "recompute running statistics over the training set, every epoch", False)

    eps: float = _setting("objective", "target radius: a number or fraction (8/255), in inputs' units (pixels: 0 to 1)")
    schedule: Schedule = _setting("objective", "how the radius grows", "smoothed")
    ramp_start: int = _setting("objective", "epoch, counted from 1, at which the radius starts to grow", metavar="N")
    ramp_length: int = _setting("objective", "epochs over which the radius grows", metavar="N")
    train_eps_factor: float = _setting("objective", "radius in training, as a multiple of the target radius", 1.0, "F")
    loss: Loss = _setting("objective", "robust loss", "ibp")
    kappa: tuple[float, float] = _setting("objective", "weights of the clean loss at the ramp's ends", (0.0, 0.0), "κ")
    alpha: float | None = _setting("objective", "weight of IBP in MTL-, CC- and EXP-IBP, from 0 to 1", None, "α")
    ratio: float | None = _setting("objective", "size of SABR's small box relative to the box", None, "R")
    relu_shrinkage: float = _setting("objective", "SABR: factor of unstable ReLUs' upper bounds", 1.0, "F")
    batchnorm_policy: BatchNormPolicy = _setting(
        "objective", "BatchNorm statistics of the attack and the bounds", "clean", flag="bn-policy"
    )
    attack_steps: int = _setting("objective", "steps of the loss's attack", 1, "N")
    attack_step_size: float = _setting("objective", "size of the attack's steps, in half-widths of the box", 10.0, "F")
    attack_restarts: int = _setting("objective", "random starts of the loss's attack", 1, "N")
    attack_scale: float = _setting("objective", "radius of the attack relative to that of the bounds", 1.0, "F")
    attack_best: bool = _setting("objective", "take the attack's best point instead of its last", False)
    reg_weight: float = _setting("objective", "weight λ of the paper's regularisers", 0.5, "λ")
    tol: float = _setting("objective", "tolerance τ of the paper's regularisers", 0.5, "τ")
    stability_weight: float = _setting("objective", "weight of the ReLU stability (Xiao et al.)", 0.0, "W")
    l1_weight: float = _setting("objective", "weight of the L1 norm of the weights", 0.0, "W")
    volume_weight: float = _setting("objective", "weight of the relaxation volume (Balunović and Vechev)", 0.0, "W")

    epochs: int = _setting("optimisation", "passes over the training set", metavar="N")
    batch_size: int = _setting("optimisation", "samples in a step, of all processes together", metavar="N")
    accumulate: int = _setting("optimisation", "compute a batch in N micro-batches", 1, "N")
    optimizer: Literal["adam", "sgd"] = _setting("optimisation", "optimiser", "adam")
    lr: float = _setting("optimisation", "learning rate", 5e-4)
    lr_milestones: tuple[int, ...] = _setting("optimisation", "epochs after which the learning rate falls", metavar="N")
    lr_factor: float = _setting("optimisation", "factor of the learning rate at a milestone", 0.2, "F")
    momentum: float = _setting("optimisation", "momentum of SGD", 0.9, "M")
    weight_decay: float = _setting("optimisation", "weight decay of the optimiser", 0.0, "W")
    grad_clip: float = _setting("optimisation", "largest norm of the gradient; 0 for no limit", 10.0, "NORM")
    average_decay: float | None = _setting("optimisation", "keep an exponential average of the weights", None, "DECAY")
    swa_start: int | None = _setting("optimisation", "keep the mean of the weights from epoch N on", None, "N")
    compile: bool | None = _setting("optimisation", "compile the steps; if unset, in phases that repay it", None)
    precision: Precision = _setting("optimisation", "precision of training (errors are in float32)", "tf32")
    seed: int = _setting("optimisation", "seed of weights, sample order, augmentation and attack", 0, "N")

    pgd_steps: int = _setting("attack after training", "steps of PGD", 50, "N")
    pgd_restarts: int = _setting("attack after training", "random starts of PGD; 0 for no attack", 3, "N")
    compiled_phases: tuple[str, ...] = dataclasses.field(default=(), metadata={"help": "chosen by the run itself"})

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is_a(value, kind):
                raise TypeError(f"{name} must be of type {getattr(kind, '__name__', kind)}; found {value!r}")
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"unknown {name} {value!r}; known are {', '.join(get_args(kind))}")
        for names, condition, holds in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name} must be {condition}; found {value}")
        self._check_combinations()
        self._check_loss()

    def _check_combinations(self) -> None:
        if self.eps > 1 and self.input_range is None and self.dataset in _PIXELS:
            raise ValueError(f"eps must be at most 1, the width of the range of pixels, [0, 1]; found {self.eps}")
        if self.select == "validation" and not self.validation:
            raise ValueError("select='validation' needs held-out samples: set validation to their number")
        if self.select == "test" and self.evaluate_test == "end":
            raise ValueError("choosing the best epoch on the test set needs its errors after every epoch")
        if self.average_decay is not None and self.swa_start is not None:
            raise ValueError("average_decay and swa_start are two averages of the weights, of which one can be kept")
        if self.swa_start is not None and self.swa_start > self.epochs:
            raise ValueError(f"no weights are averaged: swa_start is {self.swa_start}, of {self.epochs} epochs")

    def _check_loss(self) -> None:
        needed, text = NEEDED.get(self.loss, (None, ""))
        if needed is not None and getattr(self, needed) is None:
            problem = f"nobody published one for {self.dataset} at ε = {self.eps:g}: give --{needed}"
            known = f"Published settings exist for {published.known_problems('published', method=self.loss)}"
            hint = "large radii went with values near 0.5 to 0.9, small ones with 0.01 to 0.1"
            raise ValueError(f"the loss {self.loss} needs {needed}, {text}, and {problem}. {known}; {hint}")
        if given := [name for name in ("alpha", "ratio") if name != needed and getattr(self, name) is not None]:
            raise ValueError(f"the loss {self.loss} has no {' and no '.join(given)}: choose one that has, with --loss")

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def with_method(self, method: str, **changes: Any) -> Settings:
        """Return a copy whose objective is that of ``method``, with published settings of its loss where it needs any.

        ``changes`` take precedence. Raises ValueError if ``method`` is unknown, or they lack what nobody published.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
        objective = {name for one in METHODS.values() for name in one} | set(_OF_LOSSES)
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in objective}
        found = published.loss_settings(method, changes.get("dataset", self.dataset), changes.get("eps", self.eps))
        values = {**defaults, **METHODS[method], **(found.settings if found else {}), "method": method}
        return self.replace(**{**values, **changes})

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON and checkpoints."""
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, tuple)}
        return {**vars(self), **lists, "data_dir": None if self.data_dir is None else str(self.data_dir)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of :meth:`as_dict`; raises TypeError if a setting is unknown or missing."""
        data_dir = None if values.get("data_dir") is None else Path(values["data_dir"])
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples, "data_dir": data_dir})


_ATTRIBUTES = (f"    {one.name}: {one.metadata['help']}" for one in dataclasses.fields(Settings))
Settings.__doc__ = "\n".join([f"{Settings.__doc__}\n\nAttributes:", *_ATTRIBUTES])
