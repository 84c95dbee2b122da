"""Losses of certified training, for :class:`lirpa_fastwarmup.ShortWarmup`.

L_IBP is the cross-entropy of the scores −l, with l_j the IBP lower bounds on z_y − z_j over the box and l_y = 0: an
upper bound on the cross-entropy in the box. L_adv is the cross-entropy at a point of the box that an attack found.

A loss is a callable from a :class:`LossStep` to a :class:`LossValue`. It runs after the clean forward pass of the
batch, whose BatchNorm statistics it uses, and the warmup's regularisers read the bounds that it leaves.

Losses with an attack name their BatchNorm policy. "clean": attack and bounds use the statistics of the clean batch
(CTBench). "running": the attack uses the running statistics (SABR's authors). "adversarial": it does too, and a forward
pass of its points, which moves the running statistics, provides those of the bounds (expressive-losses, CTRAIN).

Example:
    >>> warmup = fw.ShortWarmup(bounded, schedule, loss=fw.losses.MTLIBP(alpha=0.5, attack=fw.attacks.PGD(steps=1)))
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lirpa_fastwarmup.attacks import PGD
from lirpa_fastwarmup.boxes import Epsilon, InputRange, box_ends, broadcast_to_batch
from lirpa_fastwarmup.engine import bounds, inputs
from lirpa_fastwarmup.engine.batchnorm import normalized_by

BatchNormPolicy = Literal["clean", "running", "adversarial"]
PHASES = START, RAMP, FULL = "before the ramp", "in the ramp", "at full ε"


@dataclass(frozen=True)
class LossStep:
    """What a loss is computed from.

    Attributes:
        bounded: the BoundedModule, after a clean forward pass of the batch.
        x: the batch ``(batch, *input)``; several inputs are packed into one tensor.
        y: labels (batch,).
        logits: of the clean pass, (batch, classes).
        box: the box around ``x``, a BoundedTensor.
        eps: its radius, before it is clipped to ``input_range``.
        input_range: lowest and highest valid input.
        fraction: ε/ε_max.
        phase: ``START``, ``RAMP`` or ``FULL``.
        starts: starting points of the loss's attack, from :meth:`lirpa_fastwarmup.attacks.PGD.starts`.
    """

    bounded: Any
    x: Tensor
    y: Tensor
    logits: Tensor
    box: Any
    eps: Epsilon
    input_range: InputRange | None = None
    fraction: float | Tensor = 1.0
    phase: str = FULL
    starts: Tensor | None = None

    @property
    def classes(self) -> int:
        return self.logits.shape[1]

    def ibp_margins(self, box: Any = None) -> Tensor:
        """IBP lower bounds on z_y − z_j for j ≠ y over ``box``, by default the step's: (batch, classes − 1)."""
        where = self.bounded, self.box if box is None else box
        return bounds.ibp_margin_bounds(*where, self.y, self.classes, reuse_statistics=True)[0]

    def attacked(self, attack: PGD, batchnorm: BatchNormPolicy) -> Tensor:
        """The points that ``attack`` finds in the box of radius ``attack.scale``·ε."""
        ends = box_ends(self.x, self.eps * attack.scale, self.input_range)
        starts = attack.starts(self.x) if self.starts is None else self.starts
        with normalized_by(self.bounded, "last" if batchnorm == "clean" else "running"):
            return attack.points(self.bounded, self.y, *ends, starts)

    def logits_at(self, points: Tensor, batchnorm: BatchNormPolicy = "clean") -> Tensor:
        """The logits at ``points``; with the policy "adversarial", later passes use their statistics."""
        with normalized_by(self.bounded, "batch" if batchnorm == "adversarial" else "last"):
            return self.bounded(points)


@dataclass(frozen=True)
class LossValue:
    """A loss, 0-dim, and what was computed with it; ``None`` for what was not.

    Attributes:
        loss: the mean over the batch, to be differentiated.
        robust_loss: an upper bound on the cross-entropy over the box, 0-dim.
        certified: which samples are certified, (batch,).
        adversarial_loss, adversarial_error: cross-entropy and fraction misclassified at the attack's points, 0-dim.
    """

    loss: Tensor
    robust_loss: Tensor | None = None
    certified: Tensor | None = None
    adversarial_loss: Tensor | None = None
    adversarial_error: Tensor | None = None


Loss = Callable[[LossStep], LossValue]


@dataclass(frozen=True)
class IBP:
    """L_IBP (Gowal et al., 2018)."""

    def __call__(self, step: LossStep) -> LossValue:
        lower = step.ibp_margins()
        loss = bounds.log_sum_exp(-lower).mean()
        return LossValue(loss, loss, bounds.proved(lower))


@dataclass(frozen=True)
class CrownIBP:
    """CROWN-IBP (Zhang et al., ICLR 2020): w·CROWN-IBP + (1 − w)·IBP with w = 1 − ε/ε_max; IBP after the ramp.

    Attributes:
        fused: use loss fusion (Xu et al., NeurIPS 2020): bounds on Σ_j exp(z_j − z_y) are mixed, and CROWN's backward
            pass has one row instead of classes − 1. Samples are certified by their IBP margins alone then.
    """

    fused: bool = False

    def __call__(self, step: LossStep) -> LossValue:
        if step.phase == FULL:
            return IBP()(step)
        lower, upper = bounds.ibp_margin_bounds(step.bounded, step.box, step.y, step.classes, reuse_statistics=True)
        if self.fused:
            losses = bounds.fused_crown_loss(step.bounded, -upper, -lower, step.y, step.classes)
            loss = bounds.mixed_log(losses, bounds.log_sum_exp(-lower), 1 - step.fraction).mean()
            return LossValue(loss, loss, bounds.proved(lower))
        crown = bounds.crown_lower(step.bounded, bounds.margin_matrix(step.y, step.classes, lower.dtype))
        mixed = (1 - step.fraction) * crown + step.fraction * lower
        loss = bounds.log_sum_exp(-mixed).mean()
        return LossValue(loss, loss, bounds.proved(torch.maximum(crown, lower)))


@dataclass(frozen=True)
class SABR:
    """The IBP loss over a small box around an adversarial point (Müller et al., ICLR 2023).

    The small box has ``ratio`` times the half-width of the clipped box at each coordinate, and lies within that box. It
    does not bound the loss over the whole box, so no sample counts as certified.

    Attributes:
        ratio: its size relative to the box, above 0 and at most 1.
        attack: finds the adversarial point; no gradient passes through it.
        batchnorm: the BatchNorm policy.
        scalar: use ``ratio``·ε at every coordinate, clipped to the input range, instead (the authors' code).
        relu_shrinkage: factor of the upper bounds of unstable ReLUs, 1 for none; 0.8 for CIFAR-10 at ε = 2/255.
    """

    ratio: float = 0.4
    attack: PGD = field(default_factory=lambda: PGD(steps=8, step_size=0.5, decay=(0.1, (4, 7)), return_best=True))
    batchnorm: BatchNormPolicy = "clean"
    scalar: bool = False
    relu_shrinkage: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            text = f"ratio is the small box's size over the box's, above 0 and at most 1; found {self.ratio}: "
            raise ValueError(text + "1 is the IBP loss; for a point instead of a box, use losses.MTLIBP(alpha=0)")
        if not 0 < self.relu_shrinkage <= 1:
            raise ValueError(f"relu_shrinkage must be above 0 and at most 1; found {self.relu_shrinkage}")
        _check_policy(self.batchnorm)

    def __call__(self, step: LossStep) -> LossValue:
        points = step.attacked(self.attack, self.batchnorm)
        if self.batchnorm == "adversarial":
            step.logits_at(points, self.batchnorm)  # For their statistics.
        box = inputs.with_ends(step.box, *self.small_box(step, points))
        with bounds.shrunk_relus(step.bounded, self.relu_shrinkage):
            lower = step.ibp_margins(box)
        return LossValue(bounds.log_sum_exp(-lower).mean())

    def small_box(self, step: LossStep, points: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the small box around ``points``."""
        lower, upper = step.box.ptb.x_L, step.box.ptb.x_U
        half = self.ratio * (broadcast_to_batch(step.eps, lower, "eps") if self.scalar else (upper - lower) / 2)
        centre = torch.min(torch.max(points, lower + half), upper - half)
        return box_ends(centre, half, step.input_range if self.scalar else None)


@dataclass(frozen=True)
class MTLIBP:
    """α·L_IBP + (1 − α)·L_adv (De Palma et al., ICLR 2024).

    Attributes:
        alpha: weight of IBP, from 0 (adversarial training) to 1 (IBP).
        attack: finds the adversarial point, whose box has the radius ``attack.scale``·ε.
        batchnorm: the BatchNorm policy.
    """

    alpha: float = 0.5
    attack: PGD = field(default_factory=PGD)
    batchnorm: BatchNormPolicy = "clean"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 (adversarial loss alone) to 1 (IBP loss alone); found {self.alpha}")
        _check_policy(self.batchnorm)

    def __call__(self, step: LossStep) -> LossValue:
        logits = step.logits_at(step.attacked(self.attack, self.batchnorm), self.batchnorm)
        lower = step.ibp_margins()
        adversarial = F.cross_entropy(logits, step.y)
        robust = bounds.log_sum_exp(-lower).mean()
        error = (logits.detach().argmax(1) != step.y).to(robust.dtype).mean()
        loss = self._combined(step, logits, lower, adversarial, robust)
        return LossValue(loss, robust, bounds.proved(lower), adversarial, error)

    def _combined(self, step: LossStep, logits: Tensor, lower: Tensor, adversarial: Tensor, robust: Tensor) -> Tensor:
        return self.alpha * robust + (1 - self.alpha) * adversarial


@dataclass(frozen=True)
class EXPIBP(MTLIBP):
    """L_IBP^α · L_adv^(1 − α), of the means over the batch (De Palma et al., ICLR 2024); attributes as MTLIBP."""

    def _combined(self, step: LossStep, logits: Tensor, lower: Tensor, adversarial: Tensor, robust: Tensor) -> Tensor:
        # The gradient of a power below 1 is infinite at 0.
        smallest = torch.finfo(robust.dtype).eps
        return robust.clamp(min=smallest) ** self.alpha * adversarial.clamp(min=smallest) ** (1 - self.alpha)


@dataclass(frozen=True)
class CCIBP(MTLIBP):
    """Cross-entropy of α·l + (1 − α)·m, m the attacked margins (De Palma et al., ICLR 2024); attributes as MTLIBP."""

    def _combined(self, step: LossStep, logits: Tensor, lower: Tensor, adversarial: Tensor, robust: Tensor) -> Tensor:
        margins = logits.gather(1, step.y.unsqueeze(1)) - logits
        margins = margins.gather(1, bounds.other_classes(step.y, step.classes))
        return bounds.log_sum_exp(-(self.alpha * lower + (1 - self.alpha) * margins)).mean()


def _check_policy(batchnorm: str) -> None:
    if batchnorm not in ("clean", "running", "adversarial"):
        raise ValueError(f"unknown BatchNorm policy {batchnorm!r}; known are clean, running and adversarial")


LOSSES: dict[str, Callable[..., Loss]] = {
    "ibp": IBP,
    "crown-ibp": CrownIBP,
    "crown-ibp-fused": partial(CrownIBP, fused=True),
    "sabr": SABR,
    "mtl-ibp": MTLIBP,
    "cc-ibp": CCIBP,
    "exp-ibp": EXPIBP,
}
