from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest

from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.data import LOADERS
from lirpa_fastwarmup.experiments.presets import DESCRIPTIONS, PRESETS, preset
from lirpa_fastwarmup.experiments.training import METHODS, Settings
from lirpa_fastwarmup.experiments.training.settings import Dataset, Init, Loss, Method, Model, Schedule
from lirpa_fastwarmup.models import MODELS
from lirpa_fastwarmup.recipe.initialization import INITIALIZATIONS
from lirpa_fastwarmup.recipe.losses import LOSSES
from lirpa_fastwarmup.recipe.schedule import SCHEDULES

COMMON = {
    "method": "fast",
    "data_dir": None,
    "input_range": None,
    "data_limit": None,
    "validation": 0,
    "select": "last",
    "flip": False,
    "crop_padding": 0,
    "model": "cnn7",
    "width": None,
    "hidden": 512,
    "accumulate": 1,
    "schedule": "smoothed",
    "ramp_start": 1,
    "optimizer": "adam",
    "lr": 5e-4,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "lr_factor": 0.2,
    "grad_clip": 10.0,
    "average_decay": None,
    "evaluate_test": "every-epoch",
    "precise_bn": False,
    "allow_untested": False,
    "sync_batchnorm": False,
    "compile": None,
    "compiled_phases": [],
    "precision": "tf32",
    "init": "ibp",
    "batchnorm": True,
    "regularizers": True,
    "reg_weight": 0.5,
    "tol": 0.5,
    "train_eps_factor": 1.0,
    "loss": "ibp",
    "kappa": [0.0, 0.0],
    "alpha": None,
    "ratio": None,
    "relu_shrinkage": 1.0,
    "batchnorm_policy": "clean",
    "attack_steps": 1,
    "attack_step_size": 10.0,
    "attack_restarts": 1,
    "attack_scale": 1.0,
    "attack_best": False,
    "swa_start": None,
    "stability_weight": 0.0,
    "l1_weight": 0.0,
    "volume_weight": 0.0,
    "pgd_steps": 50,
    "pgd_restarts": 3,
    "seed": 0,
}
CIFAR10 = {
    "dataset": "cifar10",
    "eps": 8 / 255,
    "batch_size": 128,
    "ramp_start": 2,
    "flip": True,
    "crop_padding": 2,
}
IMAGENET = {
    "eps": 1 / 255,
    "batch_size": 128,
    "accumulate": 2,
    "ramp_start": 2,
    "reg_weight": 0.2,
    "flip": True,
    "crop_padding": 4,
}
# The paper's settings, and our own for mnist5k.
DOCUMENTED = {
    "mnist5k": {
        "dataset": "mnist5k",
        "eps": 0.1,
        "batch_size": 64,
        "epochs": 20,
        "ramp_length": 10,
        "lr_milestones": [15, 18],
        "width": 8,
        "hidden": 64,
    },
    "mnist": {
        "dataset": "mnist",
        "eps": 0.4,
        "batch_size": 256,
        "epochs": 70,
        "ramp_length": 20,
        "lr_milestones": [50, 60],
    },
    "cifar10": {**CIFAR10, "epochs": 160, "ramp_length": 80, "lr_milestones": [120, 140]},
    "cifar10-70": {**CIFAR10, "epochs": 70, "ramp_length": 20, "lr_milestones": [50, 60]},
    "tiny-imagenet": {
        **IMAGENET,
        "dataset": "tiny-imagenet",
        "epochs": 80,
        "ramp_length": 20,
        "lr_milestones": [61, 71],
    },
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_presets_are_as_documented(name):
    assert PRESETS[name].as_dict() == {**COMMON, "preset": name, **DOCUMENTED[name]}


def test_every_preset_is_documented():
    assert [*PRESETS, "custom"] == list(DESCRIPTIONS)
    assert PRESETS.keys() == DOCUMENTED.keys()
    with pytest.raises(ValueError, match=r"unknown preset 'cifar11'; known are mnist5k, mnist, cifar10"):
        preset("cifar11")


def test_custom_has_neither_data_nor_radius():
    settings = preset("custom", dataset="mine.csv", eps=3)
    neutral = {"epochs": 100, "batch_size": 128, "ramp_start": 2, "ramp_length": 50, "lr_milestones": [80, 90]}
    assert settings.as_dict() == {**COMMON, **neutral, "preset": "custom", "dataset": "mine.csv", "eps": 3}
    assert Settings.from_dict(settings.replace(input_range=(0.0, 2.5)).as_dict()).input_range == (0.0, 2.5)
    with pytest.raises(ValueError, match="has no data of its own"):
        preset("custom", eps=3)
    with pytest.raises(ValueError, match="has no radius, because it depends on your data"):
        preset("custom", dataset="mine.csv")


METHODS_CHANGE = {
    "fast": {},
    "ibp": {"init": "default", "regularizers": False},
    "gowal": {"init": "default", "regularizers": False, "kappa": [1.0, 0.5], "schedule": "linear"},
    "crown-ibp": {"init": "default", "regularizers": False, "loss": "crown-ibp-fused"},
    "xiao": {"init": "default", "regularizers": False, "stability_weight": 1e-5, "l1_weight": 1e-5},
    "colt": {"init": "default", "regularizers": False, "volume_weight": 1e-3},
}
LATER = ("sabr", "mtl-ibp", "cc-ibp", "exp-ibp")


@pytest.mark.parametrize("method", METHODS_CHANGE)
def test_a_method_changes_the_objective_and_nothing_else(method):
    base = preset("cifar10")
    # From whatever method the settings had before.
    for earlier in METHODS_CHANGE:
        settings = base.with_method(earlier).with_method(method)
        assert settings.as_dict() == {**base.as_dict(), **METHODS_CHANGE[method], "method": method}


def test_methods_are_those_that_the_type_names():
    assert tuple(METHODS) == get_args(Method) == (*METHODS_CHANGE, *LATER)
    with pytest.raises(ValueError, match="unknown method 'fastest'; known are fast, ibp"):
        preset("mnist").with_method("fastest")


def test_choices_are_the_names_in_the_registries():
    registries = {Dataset: LOADERS, Model: MODELS, Init: INITIALIZATIONS, Loss: LOSSES, Schedule: SCHEDULES}
    for literal, registry in registries.items():
        assert get_args(literal) == tuple(registry)


def test_every_setting_is_described():
    for field in dataclasses.fields(Settings):
        assert f"    {field.name}: {field.metadata['help']}" in Settings.__doc__


def test_presets_need_neither_torch_nor_the_engine():
    code = "import sys; sys.modules['torch'] = sys.modules['auto_LiRPA'] = None; import lirpa_fastwarmup.experiments."
    subprocess.run([sys.executable, "-c", f"{code}presets"], check=True)


def test_settings_in_files_of_today_are_read():
    for name, changes in DOCUMENTED.items():
        assert Settings.from_dict({**COMMON, "preset": name, **changes}) == PRESETS[name]


def test_settings_survive_json():
    settings = preset("cifar10").replace(lr_milestones=(3, 4), kappa=(0.25, 0.5), validation=5, select="validation")
    assert Settings.from_dict(settings.as_dict()) == settings


IMPOSSIBLE = [
    ({"eps": -0.1}, "eps must be above 0"),
    ({"eps": float("nan")}, "eps must be above 0"),
    ({"eps": 2.0}, "at most 1"),
    ({"input_range": (1.0, 1.0)}, "the lowest and the highest valid input"),
    ({"epochs": 0}, "epochs must be at least 1; found 0"),
    ({"accumulate": 0}, "accumulate must be at least 1"),
    ({"width": 0}, "width must be at least 1"),
    ({"reg_weight": float("nan")}, "reg_weight must be finite and at least 0"),
    ({"volume_weight": -1.0}, "volume_weight must be finite and at least 0"),
    ({"lr": 0.0}, "lr must be finite and above 0"),
    ({"lr": float("inf")}, "lr must be finite"),
    ({"kappa": (1.0, 1.5)}, "kappa must be two weights from 0 to 1"),
    ({"alpha": 1.5, "loss": "mtl-ibp"}, "alpha must be from 0 to 1"),
    ({"ratio": 0.0, "loss": "sabr"}, "ratio must be above 0 and at most 1"),
    ({"attack_steps": 0}, "attack_steps must be at least 1"),
    ({"attack_scale": 0.5}, "attack_scale must be finite and at least 1"),
    ({"average_decay": 0.9, "swa_start": 3}, "two averages of the weights, of which one can be kept"),
    ({"loss": "mtl-ibp"}, "the loss mtl-ibp needs alpha.*nobody published one for mnist at ε = 0.4: give --alpha"),
    ({"alpha": 0.5}, "the loss ibp has no alpha: choose one that has, with --loss"),
    ({"loss": "sabr", "alpha": 0.5, "ratio": 0.5}, "the loss sabr has no alpha"),
    ({"average_decay": -0.1}, "average_decay must be from 0 to 1"),
    ({"seed": 10**23}, "seed must be from 0"),
    ({"method": "fastest"}, "unknown method 'fastest'; known are fast"),
    ({"loss": "crown"}, "unknown loss 'crown'; known are ibp, crown-ibp, crown-ibp-fused"),
    ({"init": "he"}, "unknown init 'he'; known are default, kaiming"),
    ({"schedule": "cosine"}, "unknown schedule 'cosine'; known are smoothed, linear"),
    ({"optimizer": "lion"}, "unknown optimizer 'lion'; known are adam, sgd"),
    ({"select": "best"}, "unknown select 'best'; known are last, validation, test"),
    ({"select": "validation"}, "needs held-out samples"),
    ({"select": "test", "evaluate_test": "end"}, "needs its errors after every epoch"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        preset("mnist").replace(**change)


def test_datasets_can_be_registered(monkeypatch):
    monkeypatch.setitem(data.LOADERS, "mine", data.LOADERS["mnist5k"])
    assert preset("mnist5k").replace(dataset="mine").dataset == "mine"
    with pytest.raises(ValueError, match="unknown dataset 'yours'"):
        data.load(preset("mnist5k").replace(dataset="yours").dataset)
