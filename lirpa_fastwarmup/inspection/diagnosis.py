"""Findings: what is wrong with a network according to the statistics of its layers, each with the recipe's remedy.

Networks that this recipe trained well cause no finding: bounds of the CNN-7 on MNIST and CIFAR-10 grow 1.0 to 1.3 times
per layer, 40 to 64 % of a layer is always inactive, and the ratios ρ and s lie between 0.49 and 2.0.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

from lirpa_fastwarmup.inspection.statistics import AffineStatistics, Finding, Inspection, ReluStatistics

_GROWTH = 2.0  # Per layer.
_TOTAL_GROWTH = 10.0  # A single layer may widen bounds, after normalisation by a small deviation.
# Total growth with the IBP initialisation in training mode, 32×32 inputs, ε = 8/255: at width 64, CNN-7 3e8,
# Wide-ResNet 3e10, ResNeXt 2e13; at width 8, a ResNet-18 8e14, and the ResNeXt for 64×64 inputs 1e15.
_TOO_DEEP = 1e14
_ONE_STATE, _DEAD, _UNSTABLE, _BALANCE = 0.9, 0.5, 0.9, 0.1
_STABLE_ENOUGH = 0.25  # With fewer stable neurons, the ratios mean little.
_SPREAD, _SPREAD_TO_GAP = 1e-4, 1e-3


def findings(found: Inspection) -> tuple[Finding, ...]:
    """The problems of a network, the most serious first; only "not finite" if some numbers are not."""
    checks = (_exploded, _inactive, _active, _constant, _imbalanced, _unstable, _without_batchnorm)
    return tuple(_not_finite(found)) or tuple(finding for check in checks for finding in check(found))


def _not_finite(found: Inspection) -> Iterator[Finding]:
    if weights := _names(layer for layer in found.affine if not math.isfinite(layer.weight_std or 0.0)):
        text = f"weights of {_listed(weights)} are NaN or infinite: return to an earlier checkpoint, and lower the "
        yield Finding("not finite", weights, text + "learning rate or clip gradients")
    elif layers := [layer for layer in found.relus if not math.isfinite(layer.half_width)]:
        text = f"bounds of layer {layers[0].name} have half-width {layers[0].half_width}, outside the floating-point "
        text += "range: call ibp_init_ before training, use fewer layers, or reduce eps"
        yield Finding("not finite", _names(layers), text)
    elif found.output is not None and not math.isfinite(found.output.spread + found.output.gap):
        yield Finding("not finite", (), "outputs are NaN or infinite: return to an earlier checkpoint")


def _constant(found: Inspection) -> Iterator[Finding]:
    output = found.output
    if output is None or found.samples < 2 or output.spread > max(_SPREAD, _SPREAD_TO_GAP * output.gap):
        return
    text = f"outputs differ by {output.spread:.2g} between the samples; the predicted class leads by {output.gap:.2g}: "
    text += "the network is constant. After training, it has collapsed: retrain from ibp_init_ with full BatchNorm and "
    text += "a longer ramp of ε (ramp_length). Before training, IBP-initialised weights need BatchNorm in training mode"
    yield Finding("constant outputs", (), text)


def _exploded(found: Inspection) -> Iterator[Finding]:
    growth = found.growth_per_layer
    if not (growth > _GROWTH and found.relus[-1].growth > _TOTAL_GROWTH):
        return
    kind, last = "exploded bounds", found.relus[-1]
    hidden = [layer for layer in found.affine if not layer.classification and layer.expected_gain]
    gains = [layer.expected_gain or 1.0 for layer in hidden]
    expected = math.exp(math.fsum(map(math.log, gains)) / max(1, len(gains)))
    text = f"bounds grow {growth:.3g}× per layer, {last.growth:.3g}× from the input to layer {last.name}; "
    text += f"the weights alone account for {expected:.3g}× per layer"
    if expected > _GROWTH:
        widest = max(hidden, key=lambda layer: layer.ratio or 0.0)
        text += f" (weights of {widest.name or 'the network'} have {widest.ratio:.3g}× the deviation of the IBP "
        text += "initialisation): call ibp_init_ before training"
    elif last.growth > _TOO_DEEP:
        text += f". The network is too deep ({len(found.relus)} ReLU layers): the tightness regulariser does not "
        text += "reduce such growth. Use fewer layers, a larger reg_weight with a longer ramp, or a smaller eps"
    elif found.training:
        kind = "wide bounds"
        text += ", and BatchNorm, which divides by the deviation of the batch, for the rest. This is expected before "
        text += "the warmup; the tightness regulariser reduces it. If it lasts, raise reg_weight or ramp_length"
    else:
        text += ": train with the tightness regulariser (ShortWarmup), with a larger reg_weight if it was already on"
    yield Finding(kind, _names(layer for layer in found.relus if layer.gain > _GROWTH), text)


def _inactive(found: Inspection) -> Iterator[Finding]:
    if layers := [layer for layer in found.relus if layer.always_inactive >= _ONE_STATE or layer.dead >= _DEAD]:
        worst = max(layers, key=lambda layer: (layer.dead, layer.always_inactive))
        longer_ramp = "raise reg_weight, or let ε grow over more epochs (ramp_length)"
        remedy = "insert_batchnorm, or raise reg_weight" if _lacks_batchnorm(found, layers) else longer_ramp
        text = f"{worst.always_inactive:.0%} of layer {worst.name} is always inactive, and {worst.dead:.0%} of its "
        text += f"units are in every sample{_and_others(layers)}: {remedy}; also look for large negative biases"
        yield Finding("inactive ReLUs", _names(layers), text)


def _active(found: Inspection) -> Iterator[Finding]:
    if layers := [layer for layer in found.relus if layer.always_active >= _ONE_STATE]:
        worst = max(layers, key=lambda layer: layer.always_active)
        remedy = "insert_batchnorm" if _lacks_batchnorm(found, layers) else "raise reg_weight"
        text = f"{worst.always_active:.0%} of layer {worst.name} is always active{_and_others(layers)} and therefore "
        text += f"linear on these inputs: look for large positive biases, or {remedy}"
        yield Finding("active ReLUs", _names(layers), text)


def _imbalanced(found: Inspection) -> Iterator[Finding]:
    stable = [layer for layer in found.relus if layer.always_active + layer.always_inactive >= _STABLE_ENOUGH]
    # Layers in one state are reported by other checks.
    mixed = [layer for layer in stable if max(layer.always_active, layer.always_inactive) < _ONE_STATE]
    if layers := [layer for layer in mixed if layer.balance < _BALANCE]:
        worst = min(layers, key=lambda layer: layer.balance)
        remedy = "insert_batchnorm, or raise" if _lacks_batchnorm(found, layers) else "raise"
        text = f"active and inactive neurons of layer {worst.name} are out of balance{_and_others(layers)}: ρ = "
        text += f"{worst.mean_ratio:.2g} and s = {worst.variance_ratio:.2g}; the regulariser aims at 0.5 to 2: "
        yield Finding("imbalanced ReLUs", _names(layers), f"{text}{remedy} reg_weight")


def _unstable(found: Inspection) -> Iterator[Finding]:
    layers = [layer for layer in found.relus if layer.unstable >= _UNSTABLE]
    if not layers or any(_exploded(found)):  # That finding names the cause.
        return
    worst = max(layers, key=lambda layer: layer.half_width / max(layer.distance, 1e-300))
    remedy = "This is expected before training; after it, train with this eps, or reduce it"
    if _lacks_batchnorm(found, layers):
        remedy = "Without BatchNorm the signal shrinks from layer to layer: insert_batchnorm before training"
    text = f"{worst.unstable:.0%} of layer {worst.name} is unstable{_and_others(layers)}: its bounds have half-width "
    text += f"{worst.half_width:.3g}, and their centres lie {worst.distance:.3g} from 0 on average. {remedy}"
    yield Finding("unstable ReLUs", _names(layers), text)


def _without_batchnorm(found: Inspection) -> Iterator[Finding]:
    hidden = [layer for layer in found.affine if not layer.classification]
    if lacking := _names(layer for layer in hidden if not layer.batchnorm):
        text = f"{len(lacking)} of {len(hidden)} hidden layers lack BatchNorm ({_listed(lacking)}), which keeps ReLUs "
        yield Finding("no BatchNorm", lacking, text + "balanced: insert_batchnorm before training")


def _lacks_batchnorm(found: Inspection, layers: Sequence[ReluStatistics]) -> bool:
    fed = [layer for layer in found.affine if not layer.batchnorm]  # A ReLU of a sum is named after its block.
    return any(layer.name == name or layer.name.startswith(f"{name}.") for name in _names(layers) for layer in fed)


def _and_others(layers: Sequence[ReluStatistics]) -> str:
    others = len(layers) - 1
    return f" (and {others} more layer{'s' * (others > 1)})" if others else ""


def _names(layers: Iterable[ReluStatistics | AffineStatistics]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
