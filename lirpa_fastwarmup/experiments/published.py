"""Settings that others published for SABR, MTL-, CC- and EXP-IBP, by dataset and radius, with their sources."""

from typing import Any, NamedTuple

CTBENCH = "CTBench, commit 0f18162, scripts/examples"
EXPRESSIVE = "expressive-losses, commit 3df64fa, README"


class Published(NamedTuple):
    """Settings by name, and their source."""

    settings: dict[str, Any]
    source: str


Problem = tuple[str, float]  # Dataset and radius.
_MNIST_01, _MNIST_03 = ("mnist", 0.1), ("mnist", 0.3)
_CIFAR_2, _CIFAR_8 = ("cifar10", 2 / 255), ("cifar10", 8 / 255)
_TINY = ("tiny-imagenet", 1 / 255)
PROBLEMS = (_MNIST_01, _MNIST_03, _CIFAR_2, _CIFAR_8, _TINY)
_SAME = 1e-3  # Radii that differ relatively by less are equal: some write 0.00784 for 2/255.


def _ctbench(robust: float = 1.0, l1: float = 0.0, steps: int = 1, **more: Any) -> Published:
    """An attack of 3 restarts whose best point counts; the clean loss has the constant weight 1 − ``robust``."""
    attack = {"attack_steps": steps, "attack_step_size": max(0.25, 2 / steps), "attack_restarts": 3}
    clean = round(1 - robust, 6)
    shared = {**attack, "attack_best": True, "kappa": (clean, clean), "l1_weight": l1}
    return Published({**shared, **more}, CTBENCH)


def _ctbench_sabr(ratio: float, robust: float = 1.0, l1: float = 0.0, steps: int = 5, **more: Any) -> Published:
    return _ctbench(robust, l1, steps, ratio=ratio, attack_step_size=0.2, **more)


def _expressive(alpha: float, l1: float = 0.0, **more: Any) -> Published:
    """An attack of one step, from a random point to a corner; statistics of the adversarial batch."""
    attack = {"attack_steps": 1, "attack_step_size": 10.0, "attack_restarts": 1, "attack_best": False}
    shared = {**attack, "batchnorm_policy": "adversarial", "kappa": (0.0, 0.0), "l1_weight": l1, "alpha": alpha}
    return Published({**shared, **more}, EXPRESSIVE)


_AT_02: dict[str, Any] = {"robust": 0.7, "steps": 10, "train_eps_factor": 2.0}
_LONGER: dict[str, Any] = {"attack_steps": 8, "attack_step_size": 0.25, "attack_scale": 2.1}
_LOSSES: dict[str, dict[Problem, Published]] = {
    "sabr": {
        _MNIST_01: _ctbench_sabr(0.4, l1=1e-6, **_AT_02),
        _MNIST_03: _ctbench_sabr(0.9, l1=2e-6),
        _CIFAR_2: _ctbench_sabr(0.1, l1=1e-6, relu_shrinkage=0.8, train_eps_factor=1.5),
        _CIFAR_8: _ctbench_sabr(0.9),
        _TINY: _ctbench_sabr(0.4, l1=5e-5, steps=1),
    },
    "mtl-ibp": {
        _MNIST_01: _ctbench(alpha=0.02, l1=1e-5, **_AT_02),
        _MNIST_03: _ctbench(alpha=0.5, l1=1e-6),
        _CIFAR_2: _ctbench(0.9, 3e-6, alpha=0.01, attack_scale=2.0),
        _CIFAR_8: _ctbench(alpha=0.6),
        _TINY: _ctbench(0.7, 5e-5, alpha=0.05, attack_scale=1.5),
    },
    "cc-ibp": {
        _MNIST_01: _ctbench(alpha=0.02, l1=1e-5, **_AT_02),
        _MNIST_03: _expressive(0.3, 3e-6, train_eps_factor=1.334),
        _CIFAR_2: _expressive(0.01, 3e-6, **_LONGER),
        _CIFAR_8: _expressive(0.5),
        _TINY: _ctbench(0.7, 5e-5, alpha=0.05),
    },
    "exp-ibp": {
        _MNIST_01: _ctbench(alpha=0.02, l1=1e-5, **_AT_02),
        _CIFAR_2: _expressive(0.095, 4e-6, **_LONGER),
        _CIFAR_8: _expressive(0.5),
        _TINY: _ctbench(l1=1e-6, alpha=0.4, attack_restarts=1),
    },
}
_SCHEDULES: dict[Problem, tuple[int, tuple[int, int], int, int]] = {  # Epochs, milestones, ramp, start of the average.
    _MNIST_01: (70, (50, 60), 20, 65),
    _MNIST_03: (70, (50, 60), 20, 65),
    _CIFAR_2: (160, (120, 140), 80, 150),
    _CIFAR_8: (240, (200, 220), 120, 225),
    _TINY: (160, (120, 140), 80, 150),
}


def _problem(dataset: str, eps: float) -> Problem | None:
    return next((one for one in PROBLEMS if one[0] == dataset and abs(one[1] - eps) <= _SAME * eps), None)


def loss_settings(method: str, dataset: str, eps: float) -> Published | None:
    """The settings of ``method``'s loss, its attack and its penalty; ``None`` where nobody published any."""
    problem = _problem(dataset, eps)
    return None if problem is None else _LOSSES.get(method, {}).get(problem)


def known_problems(method: str) -> str:
    """The datasets and radii for which settings of ``method`` were published, as text."""
    return ", ".join(f"{dataset} at {_radius(eps)}" for dataset, eps in _LOSSES.get(method, PROBLEMS))


def ctbench_schedule(method: str, dataset: str, eps: float) -> Published:
    """CTBench's epochs, ramp, learning rate and averages for a problem; raises ValueError if it has none."""
    problem = _problem(dataset, eps)
    if problem is None:
        known = ", ".join(f"{name} at {_radius(radius)}" for name, radius in PROBLEMS)
        raise ValueError(
            f"CTBench has no schedule for {dataset} at ε = {_radius(eps)}, only for {known}: leave --schedule ctbench "
            "out, and set --epochs, --ramp-length and --lr-milestones where the preset's do not suit you"
        )
    epochs, milestones, ramp, swa = _SCHEDULES[problem]
    found = {
        "epochs": epochs,
        "lr_milestones": milestones,
        "ramp_start": 1 if dataset == "mnist" else 2,
        "ramp_length": ramp,
        "batch_size": 256 if dataset == "mnist" else 128,
        "reg_weight": 0.2 if dataset == "tiny-imagenet" else 0.5,
        "precise_bn": True,
        "schedule": "smoothed",
        "swa_start": swa if method in ("mtl-ibp", "cc-ibp", "exp-ibp") else None,
    }
    return Published(found, CTBENCH)


def _radius(eps: float) -> str:
    pixels = round(eps * 255)
    return f"{pixels}/255" if abs(eps * 255 - pixels) < 1e-2 and eps < 0.05 else f"{eps:g}"
