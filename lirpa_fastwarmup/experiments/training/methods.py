"""The compared methods, as the settings of the objective that each stands for."""

from __future__ import annotations

from typing import Any, Literal

Method = Literal["fast", "ibp", "gowal", "crown-ibp", "xiao", "colt"]

# Plain interval bound propagation: the network's own initialisation and nothing added to the loss.
_PLAIN: dict[str, Any] = {
    "init": "default",
    "regularizers": False,
    "bound": "ibp",
    "kappa": None,
    "schedule": "smoothed",
    "stability_weight": 0.0,
    "l1_weight": 0.0,
    "volume_weight": 0.0,
}

METHODS: dict[str, dict[str, Any]] = {
    # The three remedies of Shi et al. (NeurIPS 2021); full BatchNorm stays with all methods.
    "fast": {**_PLAIN, "init": "ibp", "regularizers": True},
    "ibp": _PLAIN,
    # Gowal et al. (2018): κ·clean + (1 − κ)·robust with κ from 1 to 1/2, and ε growing linearly.
    "gowal": {**_PLAIN, "kappa": 0.5, "schedule": "linear"},
    # Zhang et al. (ICLR 2020), with the loss fusion of Xu et al. (NeurIPS 2020).
    "crown-ibp": {**_PLAIN, "bound": "crown-ibp-fused"},
    # Xiao et al. (ICLR 2019).
    "xiao": {**_PLAIN, "stability_weight": 1e-5, "l1_weight": 1e-5},
    # Balunović and Vechev (ICLR 2020); the weight is a choice of ours.
    "colt": {**_PLAIN, "volume_weight": 1e-3},
}


def settings_of(method: str) -> dict[str, Any]:
    """What ``method`` sets.

    Raises:
        ValueError: no method has that name; the text lists those there are.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    return {"method": method, **METHODS[method]}
