"""The training objective: robust cross-entropy over bounds, with the warmup regularisers, as an nn.Module."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lirpa_fastwarmup.boxes import (
    Epsilon,
    InputRange,
    check_eps,
    check_input_shapes,
    check_shapes,
    inputs_error,
    inputs_fit,
    labels_error,
    labels_fit,
)
from lirpa_fastwarmup.engine.bounds import class_count, input_box
from lirpa_fastwarmup.engine.graph import StructureError, read_graph
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.recipe.checks import ValueChecks
from lirpa_fastwarmup.recipe.compiled import CompiledSteps, scalar_like
from lirpa_fastwarmup.recipe.losses import LOSSES
from lirpa_fastwarmup.recipe.regularizers import BUILT_IN, Regularizer, relu_balance, tightness
from lirpa_fastwarmup.recipe.schedule import Schedule
from lirpa_fastwarmup.recipe.step import Phase, StepValues, Terms, compute_step

_STEP = "step"
_WITH_TOLERANCE = (tightness, relu_balance)


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class StepLoss:
    """What one step computed: 0-dim tensors on the inputs' device; NaN for what was not computed.

    Attributes:
        loss: the objective, to be differentiated.
        clean_loss: cross-entropy of the clean batch.
        robust_loss: upper bound on the cross-entropy over the box.
        tightness: the tightness regulariser, before its weight.
        relu_balance: the ReLU-balance regulariser, before its weight.
        eps: radius of the step, in units of the input (the largest, where it varies).
        clean_error: share of the batch misclassified.
        verified_error: share of the batch not verified over the step's box.
        terms: every regulariser and penalty by name, before its weight, the user's own included.
    """

    loss: Tensor
    clean_loss: Tensor
    robust_loss: Tensor
    tightness: Tensor
    relu_balance: Tensor
    eps: Tensor
    clean_error: Tensor
    verified_error: Tensor
    terms: Mapping[str, Tensor]


class ShortWarmup(nn.Module):
    """The short-warmup objective on a bounded network: ``(x, y) -> StepLoss``.

    In training mode the radius is the schedule's at the present step, which :meth:`step` advances; in
    evaluation mode it is the schedule's ``max_eps``, and the loss is the robust loss alone. ``train``
    and ``eval`` switch the wrapped model and its bounded view too.

    The state dict is the step count, under ``step``, and the wrapped model's own keys, whatever engine
    is installed.

    Args:
        bounded: the network, a :class:`lirpa_fastwarmup.BoundedModule` of a classifier.
        schedule: the radius over the steps, such as :class:`lirpa_fastwarmup.SmoothedEpsilon`.
        bound: what bounds the loss: "ibp", "crown-ibp" (CROWN-IBP and IBP margins mixed with weights 1 − ε/ε_max and
            ε/ε_max), or "crown-ibp-fused" (the same with loss fusion: a step costs the same for any number of
            classes).
        kappa: weight of the clean loss at the end of the ramp, κ·clean + (1 − κ)·robust with κ falling from 1 by
            ε/ε_max (Gowal et al., 2018); ``None`` for the robust loss alone.
        reg_weight: λ, the weight of the regularisers while ε is below its maximum.
        tol: τ of "tightness" and "relu_balance".
        regularizers: terms of the warmup, weighted λ·(1 − ε/ε_max): names of functions of
            :mod:`lirpa_fastwarmup.regularizers`, and functions of one's own that make a 0-dim tensor from the
            BoundedModule after an IBP pass.
        penalties: terms like those, each with a weight of its own that stays the same throughout training.
        input_range: lowest and highest valid input, numbers or tensors, to which the box is clipped;
            ``None`` for data without bounds.
        min_eps: the smallest radius of the box while regularisers or penalties are on. A smaller box is below
            the resolution of float32.
        compile: record and compile the training step when a shape first comes in a phase (before the ramp, in it,
            after it), which takes a minute or so each time, and replay it from then on. The loss alone has a gradient
            then; functions of one's own must be made of tensor operations that do not depend on tensors' values.
            Where that fails, steps are eager, after one :class:`CompilationWarning`.
        compile_batch_size: compile for batches of this many samples only, and take others eagerly.

    Raises:
        TypeError: ``bounded`` is no :class:`lirpa_fastwarmup.BoundedModule`.
        StructureError: regularisers are asked for and the network has no ReLU.
        ValueError: an argument out of its range; a largest radius wider than the input range; the output is no
            (batch, classes); or the network has a parameter called ``step``.
    """

    def __init__(
        self,
        bounded: BoundedModule,
        schedule: Schedule,
        *,
        bound: str = "ibp",
        kappa: float | None = None,
        reg_weight: float = 0.5,
        tol: float = 0.5,
        regularizers: Sequence[str | Regularizer] = ("tightness", "relu_balance"),
        penalties: Mapping[str | Regularizer, float] | None = None,
        input_range: InputRange | None = (0.0, 1.0),
        min_eps: float = 1e-6,
        compile: bool = False,  # noqa: A002 (as PyTorch calls it)
        compile_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bounded, BoundedModule):
            raise TypeError(
                f"expected a lirpa_fastwarmup.BoundedModule, found {type(bounded).__name__}. Build it from your "
                "network: bounded = lirpa_fastwarmup.BoundedModule(model, example_inputs)"
            )
        _check_weights(reg_weight, tol, min_eps, kappa, penalties or {})
        if bound not in LOSSES:
            raise ValueError(f"unknown bound {bound!r}; known are {', '.join(LOSSES)}")
        if not callable(getattr(schedule, "fraction", None)):
            raise TypeError(
                "expected a schedule such as SmoothedEpsilon(max_eps, start, length, steps_per_epoch), or "
                f"ConstantEpsilon(eps) for a radius that stays the same; found {schedule!r}"
            )
        check_eps(schedule.max_eps, input_range)
        self.classes = class_count(bounded)
        # Kept out of the registered modules: it is a view of `model`, which is registered.
        object.__setattr__(self, "bounded", bounded)
        self.model = bounded.wrapped
        if _STEP in self.model.state_dict():
            raise ValueError(f"the network has an entry called {_STEP!r}, the key of the step count: rename it")
        self.schedule = schedule
        self.kappa = kappa
        self.reg_weight = reg_weight
        self.min_eps = min_eps
        self.input_range = input_range
        penalties = penalties or {}
        fading = _named(regularizers, tol)
        constant = _named(list(penalties), tol, taken=fading)
        self.regularizers = fading if reg_weight > 0 else {}
        self.penalties = dict(zip(constant, zip(constant.values(), penalties.values(), strict=True), strict=True))
        self._robust_loss = LOSSES[bound]
        built_in = [name for name in (*self.regularizers, *self.penalties) if name in BUILT_IN and name != "weight_l1"]
        if built_in and not read_graph(bounded).relus:
            raise StructureError(
                f"the network has no ReLU, whose bounds {' and '.join(built_in)} are computed from: pass "
                "regularizers=() to train it without"
            )
        self.steps_done = 0
        self._checks = ValueChecks()
        self._compiled = CompiledSteps(bounded, input_range, batch_size=compile_batch_size) if compile else None
        self.register_load_state_dict_pre_hook(_to_own_keys)
        self.training = self.model.training

    bounded: BoundedModule

    def step(self) -> None:
        """Advance the schedule by one batch."""
        self.steps_done += 1

    @property
    def fraction(self) -> float:
        """ε/ε_max of the next call: the schedule's at this step, 1 in evaluation mode."""
        return self.schedule.fraction(self.steps_done) if self.training else 1.0

    def forward(self, x: Tensor, y: Tensor) -> StepLoss:
        """The objective on one batch.

        Args:
            x: clean inputs ``(batch, *input)``, within ``input_range``.
            y: labels (batch,), int64.

        Raises:
            TypeError: labels are not int64.
            ValueError: ``x`` outside its range, labels outside the classes, shapes that do not match, or
                a batch of one while BatchNorm is in training mode. Nothing has changed then.
            NonFiniteLossError: the loss is NaN or infinite; step and ε are in the text.

        Off the CPU, errors about values are kept for :meth:`raise_pending_errors`.
        """
        self._check_batch(x, y)
        if y.device.type != "cpu":
            y = y.clamp(0, self.classes - 1)  # A wrong label would kill the device's context before it is told.
        fraction = self.fraction
        terms = self._terms(fraction)
        eps = self._radius(fraction, at_least=self.min_eps if terms.fading or terms.constant else 0.0)
        values = self._compiled.take(terms, x, y, eps, fraction) if self._compiled else None
        if values is None:
            box = partial(input_box, x, eps, self.input_range)
            values = compute_step(terms, self.bounded, x, y, box, fraction)
        self._check_loss(values.loss, eps)
        return self._step_loss(values, eps)

    def _terms(self, fraction: float) -> Terms:
        return Terms(
            phase=Phase.at(fraction),
            robust_loss=self._robust_loss,
            kappa=self.kappa if self.training else None,
            reg_weight=self.reg_weight,
            fading=self.regularizers if fraction < 1 else {},
            constant=self.penalties if self.training else {},
        )

    def _step_loss(self, values: StepValues, eps: Epsilon) -> StepLoss:
        nan = torch.full_like(values.clean_loss, torch.nan, requires_grad=False)
        terms = {**dict.fromkeys((*self.regularizers, *self.penalties), nan), **values.terms}
        return StepLoss(
            loss=values.loss,
            clean_loss=values.clean_loss,
            robust_loss=nan if values.robust_loss is None else values.robust_loss,
            tightness=terms.get("tightness", nan),
            relu_balance=terms.get("relu_balance", nan),
            eps=scalar_like(nan, eps).max(),
            clean_error=values.clean_error,
            verified_error=nan if values.verified_error is None else values.verified_error,
            terms=terms,
        )

    def raise_pending_errors(self) -> None:
        """Raise what the checks of values found off the CPU since the last call; this waits for the device."""
        self._checks.raise_pending()

    def _radius(self, fraction: float, *, at_least: float) -> Epsilon:
        largest = self.schedule.max_eps
        eps = largest if fraction == 1.0 else largest * fraction
        return eps.clamp(min=at_least) if isinstance(eps, Tensor) else max(eps, at_least)

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        check_shapes(x, y)
        check_input_shapes([x], self.bounded.example)
        if len(x) == 1 and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            raise ValueError(
                "a batch of one sample cannot train BatchNorm, whose statistics it would determine alone: drop it, or "
                "use larger batches"
            )
        self._checks.require("labels", labels_fit(y, self.classes), [y], partial(labels_error, classes=self.classes))
        self._checks.require(
            "inputs", inputs_fit(x, self.input_range), [x], partial(inputs_error, input_range=self.input_range)
        )

    def _check_loss(self, loss: Tensor, eps: Epsilon) -> None:
        step = torch.full_like(loss.detach(), self.steps_done)
        radius = scalar_like(loss.detach(), eps).max()
        self._checks.require("loss", loss.detach().isfinite(), [loss.detach(), step, radius], _not_finite)

    # One mode and one state dict with the wrapped model.

    def train(self, mode: bool = True) -> Self:
        """Put the objective, the wrapped model and its bounded view in training (or evaluation) mode."""
        super().train(mode)
        self.bounded.train(mode)
        return self

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The step count, under ``step``, and the wrapped model's state dict."""
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        destination[prefix + _STEP] = torch.tensor(self.steps_done)
        return self.model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a step count and a state dict of the wrapped model; where that fails, the step stays."""
        before = self.steps_done
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except Exception:
            self.steps_done = before
            raise

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.bounded._apply(fn, recurse)
        return self


def _not_finite(loss: Tensor, step: Tensor, eps: Tensor) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the loss is {float(loss.amax())} at step {int(step.amax())}, eps {float(eps.amax()):.6g}. Lower the learning "
        "rate or clip gradients; if it is so from the first step, the bounds explode: initialise with ibp_init_"
    )


def _to_own_keys(module: ShortWarmup, state_dict: Any, prefix: str, *rest: Any) -> None:
    """Undo, before loading, what :meth:`ShortWarmup.state_dict` did to the keys."""
    missing = rest[2]
    own = [key for key in state_dict if key.startswith(prefix)]
    if prefix + _STEP in state_dict:
        module.steps_done = int(state_dict.pop(prefix + _STEP))
        own.remove(prefix + _STEP)
    else:
        missing.append(prefix + _STEP)
    for key in own:
        state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)


def _check_weights(
    reg_weight: float, tol: float, min_eps: float, kappa: float | None, penalties: Mapping[Any, float]
) -> None:
    if not (reg_weight >= 0 and tol > 0 and min_eps >= 0):
        raise ValueError(f"expected reg_weight ≥ 0, tol > 0 and min_eps ≥ 0; found {reg_weight}, {tol} and {min_eps}")
    if kappa is not None and not 0 <= kappa <= 1:
        raise ValueError(f"kappa, the clean loss's weight at the end of the ramp, must be from 0 to 1; found {kappa}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in penalties.values()):
        raise ValueError(f"weights of penalties must be finite and at least 0; found {list(penalties.values())}")


def _named(terms: Sequence[str | Regularizer], tol: float, taken: Collection[str] = ()) -> dict[str, Regularizer]:
    named: dict[str, Regularizer] = {}
    for item in terms:
        if isinstance(item, str) and item not in BUILT_IN:
            raise ValueError(f"unknown regulariser {item!r}; known are {', '.join(BUILT_IN)}, or pass a function")
        name = item if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)
        if name in named or name in taken:
            raise ValueError(f"two regularisers are called {name!r}, under which the step would report both")
        function = BUILT_IN[item] if isinstance(item, str) else item
        named[name] = partial(function, tol=tol) if isinstance(item, str) and function in _WITH_TOLERANCE else function
    return named
