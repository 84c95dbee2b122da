"""What is wrong with a network, told from the figures of its layers, each with the remedy that the recipe has for it.

The limits leave networks in peace that this recipe trained well: CNN-7 on MNIST and CIFAR-10 ends with bounds that grow
1.0 to 1.3 times per layer, 40 to 64 % of a layer always inactive, and ratios ρ and s of 0.49 to 2.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lirpa_fastwarmup.inspection.statistics import Finding, Inspection, ReluStatistics

_GROWTH = 2.0  # Times per layer.
_TOTAL_GROWTH = 10.0  # A single layer may widen, after normalisation by a small deviation.
_ONE_STATE = 0.9
_DEAD = 0.5
_UNSTABLE = 0.9
_BALANCE = 0.1
_STABLE_ENOUGH = 0.25  # Of fewer stable neurons, ratios say little.
_SPREAD = 1e-4
_SPREAD_TO_GAP = 1e-3


def findings(found: Inspection) -> tuple[Finding, ...]:
    """What is wrong, the gravest first; where numbers are not finite, that alone."""
    broken = _not_finite(found)
    if broken:
        return (broken,)
    checks: Sequence[Callable[[Inspection], Finding | None]] = (
        *(_exploded, _inactive, _active, _constant, _imbalanced, _unstable, _without_batchnorm),
    )
    return tuple(verdict for verdict in (check(found) for check in checks) if verdict)


def _not_finite(found: Inspection) -> Finding | None:
    weights = [layer.name for layer in found.affine if not math.isfinite(layer.weight_std or 0.0)]
    if weights:
        return Finding(
            "not finite",
            tuple(weights),
            f"weights of {_names(weights)} are NaN or infinite: go back to an earlier checkpoint, and lower the "
            "learning rate or clip gradients",
        )
    layers = [layer for layer in found.relus if not math.isfinite(layer.half_width)]
    if not layers:
        return None
    return Finding(
        "not finite",
        tuple(layer.name for layer in layers),
        f"bounds at layer {layers[0].name} have half-width {layers[0].half_width}, beyond what floating-point numbers "
        "hold: call ibp_init_ before training, or take a smaller eps",
    )


def _constant(found: Inspection) -> Finding | None:
    output = found.output
    if output is None or found.samples < 2 or output.spread > max(_SPREAD, _SPREAD_TO_GAP * output.gap):
        return None
    return Finding(
        "constant outputs",
        (),
        f"outputs differ by {output.spread:.2g} between the samples, where the predicted class leads by "
        f"{output.gap:.2g}: the network is constant. After training it has collapsed: train anew from ibp_init_, with "
        "full BatchNorm, and let ε grow over more epochs (ramp_length). Before training, a signal passes "
        "IBP-initialised weights with BatchNorm in training mode only",
    )


def _exploded(found: Inspection) -> Finding | None:
    growth = found.growth_per_layer
    if not (growth > _GROWTH and found.relus[-1].growth > _TOTAL_GROWTH):
        return None
    kind, last = "exploded bounds", found.relus[-1]
    text = f"bounds grow {growth:.3g}× per layer, {last.growth:.3g}× from the input to layer {last.name}"
    hidden = [layer for layer in found.affine if not layer.classification and layer.expected_gain]
    gains = [layer.expected_gain or 1.0 for layer in hidden]
    expected = math.exp(math.fsum(map(math.log, gains)) / max(1, len(gains)))
    text += f"; the weights alone account for {expected:.3g}× per layer"
    if expected > _GROWTH:
        widest = max(hidden, key=lambda layer: layer.ratio or 0.0)
        text += (
            f" (those of {widest.name or 'the network'} have {widest.ratio:.3g}× the deviation of the IBP "
            "initialisation): call ibp_init_ before training"
        )
    elif found.training:
        kind = "wide bounds"
        text = (
            f"before the warmup as it should be. The weights alone widen bounds {expected:.3g}× per layer; BatchNorm, "
            f"which divides by the deviation of the batch, makes that {growth:.3g}×, {last.growth:.3g}× from the input "
            f"to layer {last.name}. The tightness regulariser brings it down; if it lasts, raise reg_weight or let ε "
            "grow over more epochs (ramp_length)"
        )
    else:
        text += ": train with the tightness regulariser (ShortWarmup), with a larger reg_weight if that was so already"
    return Finding(kind, tuple(layer.name for layer in found.relus if layer.gain > _GROWTH), text)


def _inactive(found: Inspection) -> Finding | None:
    layers = [layer for layer in found.relus if layer.always_inactive >= _ONE_STATE or layer.dead >= _DEAD]
    if not layers:
        return None
    worst = max(layers, key=lambda layer: (layer.dead, layer.always_inactive))
    remedy = "raise reg_weight, or let ε grow over more epochs (ramp_length)"
    if _lacks_batchnorm(found, layers):
        remedy = "insert_batchnorm, or raise reg_weight"
    return Finding(
        "inactive ReLUs",
        tuple(layer.name for layer in layers),
        f"{worst.always_inactive:.0%} of layer {worst.name} is always inactive, and {worst.dead:.0%} of its units in "
        f"every sample{_and_others(layers)}: {remedy}; large negative biases do the same",
    )


def _active(found: Inspection) -> Finding | None:
    layers = [layer for layer in found.relus if layer.always_active >= _ONE_STATE]
    if not layers:
        return None
    worst = max(layers, key=lambda layer: layer.always_active)
    return Finding(
        "active ReLUs",
        tuple(layer.name for layer in layers),
        f"{worst.always_active:.0%} of layer {worst.name} is always active{_and_others(layers)}, so that it is linear "
        "on these inputs: look for large positive biases, or "
        + ("insert_batchnorm" if _lacks_batchnorm(found, layers) else "raise reg_weight"),
    )


def _imbalanced(found: Inspection) -> Finding | None:
    layers = [
        layer
        for layer in found.relus
        if layer.balance < _BALANCE
        and layer.always_active + layer.always_inactive >= _STABLE_ENOUGH
        and max(layer.always_active, layer.always_inactive) < _ONE_STATE  # That has a verdict of its own.
    ]
    if not layers:
        return None
    worst = min(layers, key=lambda layer: layer.balance)
    remedy = "insert_batchnorm, or raise" if _lacks_batchnorm(found, layers) else "raise"
    return Finding(
        "imbalanced ReLUs",
        tuple(layer.name for layer in layers),
        f"active and inactive neurons of layer {worst.name} are out of balance{_and_others(layers)}: ρ = "
        f"{worst.mean_ratio:.2g} and s = {worst.variance_ratio:.2g}, where the regulariser asks for 0.5 to 2: {remedy} "
        "reg_weight",
    )


def _unstable(found: Inspection) -> Finding | None:
    layers = [layer for layer in found.relus if layer.unstable >= _UNSTABLE]
    if not layers or _exploded(found):  # Which says why.
        return None
    worst = max(layers, key=lambda layer: layer.half_width / max(layer.distance, 1e-300))
    remedy = "Before training that is to be expected; after it, train with this eps, or take a smaller one"
    if _lacks_batchnorm(found, layers):
        remedy = "Without BatchNorm the signal shrinks from layer to layer: insert_batchnorm before training"
    return Finding(
        "unstable ReLUs",
        tuple(layer.name for layer in layers),
        f"{worst.unstable:.0%} of layer {worst.name} is unstable{_and_others(layers)}: bounds have half-width "
        f"{worst.half_width:.3g}, and their centres a distance of {worst.distance:.3g} from 0. {remedy}",
    )


def _without_batchnorm(found: Inspection) -> Finding | None:
    hidden = [layer for layer in found.affine if not layer.classification]
    lacking = [layer.name for layer in hidden if not layer.batchnorm]
    if not lacking:
        return None
    return Finding(
        "no BatchNorm",
        tuple(lacking),
        f"{len(lacking)} of {len(hidden)} hidden layers have no BatchNorm ({_names(lacking)}), which keeps ReLUs "
        "balanced: insert_batchnorm before training",
    )


def _lacks_batchnorm(found: Inspection, layers: Sequence[ReluStatistics]) -> bool:
    names = {layer.name for layer in layers}
    return any(layer.name in names and not layer.batchnorm for layer in found.affine)


def _and_others(layers: Sequence[ReluStatistics]) -> str:
    others = len(layers) - 1
    return f" (and {others} more layer{'s' * (others > 1)} like it)" if others else ""


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
