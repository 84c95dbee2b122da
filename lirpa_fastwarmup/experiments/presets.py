"""Runs by name: the paper's, and two of our own (``mnist5k``, ``imagenet64``)."""

from __future__ import annotations

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

PRESETS: dict[str, Settings] = {
    # Ours: a small network on digits that a package ships, for a first look and for tests.
    "mnist5k": Settings(
        preset="mnist5k",
        dataset="mnist5k",
        eps=0.1,
        batch_size=64,
        epochs=20,
        ramp_start=1,
        ramp_length=10,
        lr_milestones=(15, 18),
        width=8,
        hidden=64,
    ),
    # Shi et al. (NeurIPS 2021).
    "mnist": Settings(
        preset="mnist",
        dataset="mnist",
        eps=0.4,
        batch_size=256,
        epochs=70,
        ramp_start=1,
        ramp_length=20,
        lr_milestones=(50, 60),
    ),
    "cifar10": _CIFAR10,
    "cifar10-70": _CIFAR10.replace(preset="cifar10-70", epochs=70, ramp_length=20, lr_milestones=(50, 60)),
    "tiny-imagenet": Settings(
        preset="tiny-imagenet",
        dataset="tiny-imagenet",
        eps=1 / 255,
        batch_size=128,
        accumulate=2,
        epochs=80,
        ramp_start=2,
        ramp_length=20,
        lr_milestones=(61, 71),
        reg_weight=0.2,
        flip=True,
        crop_padding=4,
    ),
    # Ours: the settings of Tiny-ImageNet on twelve times as many images, in a quarter of the epochs.
    "imagenet64": Settings(
        preset="imagenet64",
        dataset="imagenet64",
        eps=1 / 255,
        batch_size=128,
        accumulate=2,
        epochs=20,
        ramp_start=2,
        ramp_length=10,
        lr_milestones=(15, 18),
        reg_weight=0.2,
        flip=True,
        crop_padding=4,
    ),
}


def preset(name: str) -> Settings:
    """The settings called ``name``.

    Raises:
        ValueError: there are none of that name; the text lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
