"""The training objective: robust cross-entropy over bounds, with the warmup regularisers, as an nn.Module.

loss = L_robust + λ·(1 − ε/ε_max)·(L_tight + L_relu)    (Shi et al., NeurIPS 2021, section 3.3)

Before the ramp, at ε = 0, the clean cross-entropy replaces L_robust.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lirpa_fastwarmup import boxes
from lirpa_fastwarmup.boxes import Epsilon
from lirpa_fastwarmup.engine import batchnorm, bounds, graph, inputs, plain
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.engine.precision import temporarily
from lirpa_fastwarmup.recipe import losses
from lirpa_fastwarmup.recipe.compiled import CompiledSteps, scalar_like
from lirpa_fastwarmup.recipe.losses import CCIBP, EXPIBP, FULL, IBP, MTLIBP, PHASES, RAMP, SABR, START, Loss, LossStep
from lirpa_fastwarmup.recipe.regularizers import BUILT_IN, Regularizer, relu_balance, tightness, undefined
from lirpa_fastwarmup.recipe.schedule import Schedule

_STEP = "step"
_REPORTED = ("robust_loss", "adversarial_loss", "adversarial_error")  # By the loss.


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class StepLoss:
    """The values of one step: 0-dim tensors on the inputs' device; NaN for what the step did not compute.

    Attributes:
        loss: the objective, to be differentiated.
        clean_loss: cross-entropy of the clean batch.
        robust_loss: upper bound on the cross-entropy over the box.
        adversarial_loss, adversarial_error: cross-entropy and fraction misclassified at the loss's attack.
        tightness, relu_balance: the two regularisers of the warmup, before their weight.
        eps: radius of the step, in units of the input (the largest, where it varies).
        clean_error: fraction of the batch misclassified.
        verified_error: fraction of the batch not certified over the step's box.
        terms: every regulariser and penalty by name, before its weight, the user's own included.
    """

    loss: Tensor
    clean_loss: Tensor
    robust_loss: Tensor
    adversarial_loss: Tensor
    adversarial_error: Tensor
    tightness: Tensor
    relu_balance: Tensor
    eps: Tensor
    clean_error: Tensor
    verified_error: Tensor
    terms: Mapping[str, Tensor]


class Terms(NamedTuple):
    """The terms of the loss in one phase of training, throughout which every step does the same computation.

    ``fading`` regularisers have the weight λ·(1 − ε/ε_max), ``constant`` penalties their own, ``mixed`` a clean loss.
    """

    phase: str
    loss: Loss
    mixed: bool
    reg_weight: float
    fading: Mapping[str, Regularizer]
    constant: Mapping[str, tuple[Regularizer, float]]

    @property
    def key(self) -> tuple[Any, ...]:
        """The phase, and everything else in which the terms of one objective may differ."""
        weights = tuple((name, weight) for name, (_, weight) in self.constant.items())
        return self.phase, self.loss, self.mixed, self.reg_weight, tuple(self.fading), weights


class ValueChecks:
    """Checks of tensors' values: raised at once on the CPU, and on request elsewhere, where reading a value waits."""

    def __init__(self) -> None:
        self._pending: dict[str, tuple[Tensor, list[Tensor], Callable[..., Exception]]] = {}

    def require(self, kind: str, holds: Tensor, values: Sequence[Tensor], error: Callable[..., Exception]) -> None:
        """Raise ``error(*values)`` unless the 0-dim ``holds`` is true; off the CPU, defer that."""
        if holds.device.type != "cpu":
            self.defer(kind, holds, values, error)
        elif not bool(holds):
            raise error(*values)

    def defer(self, kind: str, holds: Tensor, values: Sequence[Tensor], error: Callable[..., Exception]) -> None:
        """Keep a check for :meth:`raise_pending`, without a wait for the device.

        Of each ``kind`` the first violation is kept, as the extremes of each of its values: its batch may be gone then.
        """
        ends = [torch.stack([value.amin(), value.amax()]) for value in values]
        if kind in self._pending:
            so_far, first, _ = self._pending[kind]
            ends = [torch.where(so_far, new, old) for new, old in zip(ends, first, strict=True)]
            holds = holds & so_far
        self._pending[kind] = (holds, ends, error)

    def raise_pending(self) -> None:
        """Wait for the device and raise the error of a violated check, if there is one."""
        pending, self._pending = self._pending, {}
        for holds, ends, error in pending.values():
            if not bool(holds):
                raise error(*ends)


class ShortWarmup(nn.Module):
    """The short-warmup objective on a bounded network: ``(x, y) -> StepLoss``.

    In training mode the radius is the schedule's at the current step, which :meth:`step` advances; in evaluation mode
    it is ``max_eps``, and the loss is the robust loss alone. ``train`` and ``eval`` also switch the wrapped model and
    its bounded view. The state dict holds the step count, under ``step``, and the wrapped model's own keys.

    Args:
        bounded: the network, a BoundedModule of a classifier, this package's or the engine's own.
        schedule: the radius over the steps, such as :class:`lirpa_fastwarmup.SmoothedEpsilon`. For a network of several
            inputs, its ``max_eps`` may be a tuple, one radius per input; 0 for an unperturbed one.
        loss: the robust loss, by default IBP: any of :mod:`lirpa_fastwarmup.losses`, or your own function from a
            :class:`~lirpa_fastwarmup.losses.LossStep` to a :class:`~lirpa_fastwarmup.losses.LossValue`.
        kappa: weights κ of the clean loss at the start and at the end of the ramp, in κ·clean + (1 − κ)·robust: it
            changes with ε/ε_max. (1, 0.5) as Gowal et al. (2018), equal weights as CTBench.
        reg_weight: λ, the weight of the regularisers while ε is below its maximum.
        tol: τ of "tightness" and "relu_balance".
        regularizers: terms weighted λ·(1 − ε/ε_max): names from :mod:`lirpa_fastwarmup.regularizers`, or your own
            functions from the BoundedModule after an IBP pass to a 0-dim tensor.
        penalties: terms of the same kind, each with its own weight, constant throughout training.
        input_range: lowest and highest valid input, numbers or tensors, to which the box is clipped; ``None`` for
            unclipped data. For several inputs it may be a tuple of these.
        min_eps: the smallest radius while regularisers or penalties are on; float32 resolves no smaller box.
        compile: compile the training step, which takes about a minute for each batch shape. With this package's own
            losses and regularisers, the phases (before, in and after the ramp) share recordings; assign some of them to
            ``compiled_phases`` to compile these only. Only the loss has a gradient then, and your own functions must
            be tensor operations that depend neither on values nor on attributes that change. If it fails, steps run
            eagerly, after one :class:`CompilationWarning`.
        compile_batch_size: compile for batches of this many samples only, and run others eagerly.
        generator: source of the attack's random starts, on the inputs' device; by default that device's own.

    Raises:
        TypeError: ``bounded`` is not a BoundedModule.
        NotImplementedError: an engine module with bounds that are not proved.
        StructureError: a built-in regulariser uses activations (ReLUs) that the network does not have.
        ValueError: an argument out of its range; a largest radius wider than the input range; the output is not
            (batch, classes); or the network has a parameter called ``step``.

    Example:
        >>> schedule = fw.SmoothedEpsilon(8 / 255, start=2, length=80, steps_per_epoch=len(loader))
        >>> warmup = fw.ShortWarmup(bounded, schedule)
        >>> for x, y in loader:
        ...     warmup(x, y).loss.backward()
        ...     optimizer.step(); optimizer.zero_grad(); warmup.step()
    """

    bounded: BoundedModule

    def __init__(
        self,
        bounded: Any,
        schedule: Schedule,
        *,
        loss: Loss | None = None,
        kappa: tuple[float, float] = (0.0, 0.0),
        reg_weight: float = 0.5,
        tol: float = 0.5,
        regularizers: Sequence[str | Regularizer] = ("tightness", "relu_balance"),
        penalties: Mapping[str | Regularizer, float] | None = None,
        input_range: Any = (0.0, 1.0),
        min_eps: float = 1e-6,
        compile: bool = False,  # noqa: A002 (as PyTorch calls it)
        compile_batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        bounded = plain.view_of(bounded)
        penalties = penalties or {}
        _check_weights(reg_weight, tol, min_eps, kappa, penalties.values())
        loss = IBP() if loss is None else loss
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(f"expected a loss such as losses.IBP(), or a function of a LossStep; found {loss!r}")
        if not callable(getattr(schedule, "fraction", None)):
            raise TypeError(f"expected a schedule such as SmoothedEpsilon or ConstantEpsilon(eps); found {schedule!r}")
        bounded.layout.pack_eps(schedule.max_eps, input_range)  # Checks it.
        self.classes = bounds.class_count(bounded)
        # Not a registered module: it is a view of `model`, which is registered.
        object.__setattr__(self, "bounded", bounded)
        self.model = bounded.wrapped
        if _STEP in self.model.state_dict():
            raise ValueError(f"the network has an entry called {_STEP!r}, the key of the step count: rename it")
        self.schedule, self.kappa = schedule, (float(kappa[0]), float(kappa[1]))
        self.reg_weight, self.min_eps, self.input_range = reg_weight, min_eps, input_range
        self._range = bounded.layout.pack_range(input_range)
        if dropout := [name for name, part in self.model.named_modules() if isinstance(part, _DropoutNd) and part.p]:
            text = f"Dropout ({', '.join(dropout)}) is off in certified training: bounds for one random mask would not "
            warnings.warn(text + "hold for the next. Remove it, or set its p to 0, to silence this", stacklevel=2)
        fading = _named(regularizers, tol)
        constant = _named(list(penalties), tol, used=fading)
        self.regularizers = fading if reg_weight > 0 else {}
        self.penalties = dict(zip(constant, zip(constant.values(), penalties.values(), strict=True), strict=True))
        self.loss, self.generator = loss, generator
        if missing := undefined(bounded, [*self.regularizers, *self.penalties]):
            left = tuple(name for name in self.regularizers if name not in missing)
            what = "activation" if "tightness" in missing else "ReLU"
            text = f"the network has no {what}, and {' and '.join(missing)} use the bounds of {what}s: pass "
            raise graph.StructureError(text + f"regularizers={left} to train without them")
        self.steps_done, self._checks = 0, ValueChecks()
        self.compiled_phases: Collection[str] = PHASES if compile else ()
        self._compiled = CompiledSteps(bounded, self._range, compile_batch_size)
        # Public without the underscore since PyTorch 2.5.
        self._register_load_state_dict_pre_hook(_to_registered_keys, with_module=True)
        self.training = self.model.training

    def step(self) -> None:
        """Advance the schedule by one batch."""
        self.steps_done += 1

    @property
    def fraction(self) -> float:
        """ε/ε_max of the next call: the schedule's at this step, 1 in evaluation mode."""
        return self.schedule.fraction(self.steps_done) if self.training else 1.0

    def forward(self, x: inputs.Inputs, y: Tensor, max_eps: Any = None) -> StepLoss:
        """The objective on one batch.

        Off the CPU, errors about values are kept for :meth:`raise_pending_errors`.

        Args:
            x: clean inputs ``(batch, *input)``, within ``input_range``; or a tuple of the network's inputs.
            y: labels (batch,), int64.
            max_eps: the schedule's largest radius for this batch, such as one per sample, (batch, 1, …).

        Raises:
            TypeError: labels are not int64.
            ValueError: ``x`` outside its range, labels outside the classes, shapes that do not match, or a batch of
                one while BatchNorm is in training mode. The network and its running statistics are then unchanged.
            NonFiniteLossError: the loss is NaN or infinite; the message names the step and ε.
        """
        x = self.bounded.layout.pack(x)
        self._check_batch(x, y)
        if y.device.type != "cpu":
            y = y.clamp(0, self.classes - 1)  # A wrong label would kill the device's context before it is reported.
        fraction = self.fraction
        phase = START if fraction == 0 else RAMP if fraction < 1 else FULL
        fading = self.regularizers if fraction < 1 else {}
        terms = Terms(phase, self.loss, self.kappa != (0.0, 0.0), self.reg_weight, fading, self.penalties)
        if not self.training:
            terms = terms._replace(loss=IBP(), mixed=False, constant={})
        smallest = self.min_eps if terms.fading or terms.constant else 0.0
        layout, own = self.bounded.layout, self.schedule.max_eps if max_eps is None else max_eps
        is_checked = max_eps is None and layout.is_single and not isinstance(own, tuple)
        largest: Any = own if is_checked else layout.pack_eps(own, self.input_range)
        if isinstance(largest, Tensor):  # What is never perturbed stays so.
            eps: Epsilon = torch.where(largest > 0, (largest * fraction).clamp(min=smallest), largest)
        else:
            eps = max(largest * fraction, smallest)
        first, last = self.kappa if self.training else (0.0, 0.0)
        clean_weight = 1.0 if phase == START else first + (last - first) * fraction
        attack: Any = getattr(terms.loss, "attack", None)
        starts = (attack.starts(x, self.generator),) if hasattr(attack, "starts") and phase != START else ()
        given = x, y, eps, fraction, clean_weight, *starts
        values = self._recorded(terms, *given) if phase in self.compiled_phases else None
        if values is None:
            values = self._compute(terms, bounds.input_box(x, eps, self._range), *given)
        step_loss = self._step_loss(values, eps)
        loss = step_loss.loss.detach()
        facts = [loss, torch.full_like(loss, self.steps_done), step_loss.eps]
        self._checks.require("loss", loss.isfinite(), facts, _not_finite)
        return step_loss

    def phases_recorded_with(self, phase: str) -> tuple[str, ...]:
        """The phases whose steps one compiled step computes, ``phase`` among them.

        Terms that a phase lacks have the weight 0 in it, so they must be cheap, and the loss the same in each.
        """
        phases: tuple[str, ...] = ()
        if BUILT_IN.keys() >= self.regularizers.keys() and type(self.loss) in (IBP, SABR, MTLIBP, CCIBP, EXPIBP):
            # Without regularisers, steps before the ramp propagate no bounds; and they never attack.
            phases = PHASES if self.regularizers and type(self.loss) is IBP else (RAMP, FULL)
        return phases if phase in phases else (phase,)

    def _recorded(self, terms: Terms, x: Tensor, y: Tensor, eps: Epsilon, *rest: Any) -> dict[str, Tensor] | None:
        """What :meth:`_compute` returns, compiled; ``None`` where it must run eagerly."""
        recorded, phases = terms, self.phases_recorded_with(terms.phase)
        if len(phases) > 1:
            recorded = terms._replace(phase=RAMP, fading=self.regularizers, mixed=terms.mixed or START in phases)
        step, key = partial(self._compute, recorded), (" and ".join(phases), *recorded.key)
        values = self._compiled.run(step, key, x, y, eps, *rest[:2], starts=rest[2:])
        if values is None:
            return None
        # Where a term that the phase lacks is infinite, its weight of 0 makes the loss NaN.
        if x.device.type == "cpu" and len(phases) > 1 and not values["loss"].isfinite():
            with batchnorm.frozen_running_stats(self.bounded):  # The compiled step has moved them.
                return self._compute(terms, bounds.input_box(x, eps, self._range), x, y, eps, *rest)
        absent = {f"terms.{name}" for name in recorded.fading.keys() - terms.fading.keys()}
        return {name: value for name, value in values.items() if name not in absent}

    def _compute(self, terms: Terms, box: Any, x: Tensor, y: Tensor, eps: Epsilon, *rest: Any) -> dict[str, Tensor]:
        """The loss of one step and its components, 0-dim; regularisers and penalties as "terms.name".

        ``eps`` is the radius of the unclipped box; ``rest`` are ε/ε_max, the clean loss's weight, attack starts.
        """
        fraction, clean_weight, *starts = rest
        logits = self.bounded(x)
        loss = F.cross_entropy(logits, y)
        values = {"clean_loss": loss, "clean_error": (logits.detach().argmax(1) != y).to(loss.dtype).mean()}
        regularizers = {**terms.fading, **{name: term for name, (term, _) in terms.constant.items()}}
        # Autocast would round centres more coarsely than the gap between bounds. Radii are sums of positive terms.
        coarse = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16
        radius_dtype = torch.bfloat16 if coarse else self.bounded.radius_dtype
        with torch.autocast(x.device.type, enabled=False), temporarily([self.bounded], "radius_dtype", radius_dtype):
            if regularizers or terms.phase != START:
                step = LossStep(self.bounded, x, y, logits, box, eps, self._range, fraction, terms.phase, *starts)
                found = (IBP() if terms.phase == START else terms.loss)(step)
                if not isinstance(found, losses.LossValue) or found.loss.ndim:
                    raise TypeError(f"a loss must return a LossValue with a 0-dim loss, its mean; found {found!r:.100}")
                values |= {name: value for name in _REPORTED if (value := getattr(found, name)) is not None}
                if found.certified is not None:
                    values["verified_error"] = 1 - found.certified.to(loss.dtype).mean()
            computed = {name: term(self.bounded) for name, term in regularizers.items()}
        if terms.phase != START:
            loss = found.loss
            if terms.mixed:
                loss = clean_weight * values["clean_loss"] + (1 - clean_weight) * loss
        if terms.fading:
            loss = loss + terms.reg_weight * (1 - fraction) * sum(computed[name] for name in terms.fading)
        for name, (_, weight) in terms.constant.items():
            loss = loss + weight * computed[name]
        return {"loss": loss, **values, **{f"terms.{name}": value for name, value in computed.items()}}

    def _step_loss(self, values: Mapping[str, Tensor], eps: Epsilon) -> StepLoss:
        nan = torch.full_like(values["clean_loss"], torch.nan, requires_grad=False)
        terms = {name: values.get(f"terms.{name}", nan) for name in (*self.regularizers, *self.penalties)}
        names = ("loss", "clean_loss", "clean_error", "verified_error", *_REPORTED)
        return StepLoss(
            **{name: values.get(name, nan) for name in names},
            **{name: terms.get(name, nan) for name in ("tightness", "relu_balance")},
            eps=scalar_like(nan, eps).max(),
            terms=terms,
        )

    def raise_pending_errors(self) -> None:
        """Raise what the checks of values found off the CPU since the last call; this waits for the device."""
        self._checks.raise_pending()

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        boxes.check_shapes(x, y)
        if len(x) == 1 and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            raise ValueError("one sample cannot train BatchNorm (it has no variance): drop it, or use larger batches")
        labels_error = partial(boxes.labels_error, classes=self.classes)
        self._checks.require("labels", boxes.labels_fit(y, self.classes), [y], labels_error)
        inputs_error = partial(boxes.inputs_error, input_range=self._range)
        self._checks.require("inputs", boxes.inputs_fit(x, self._range), [x], inputs_error)

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

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a step count and a state dict of the wrapped model; if that fails, the step count stays."""
        state: Any = OrderedDict(state_dict)
        state._metadata = getattr(state_dict, "_metadata", {})  # The versions of its modules.
        step = state.pop(_STEP, None)
        if step is None and strict:
            raise RuntimeError(f"the state has no entry {_STEP!r}, the step count: add it, or pass strict=False")
        found: Any = self.model.load_state_dict(state, strict, **({"assign": True} if assign else {}))
        if step is None:
            found.missing_keys.append(_STEP)
        else:
            self.steps_done = int(step)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.bounded._apply(fn, recurse)
        return self


def _not_finite(loss: Tensor, step: Tensor, eps: Tensor) -> NonFiniteLossError:
    text = f"the loss is {float(loss.amax())} at step {int(step.amax())}, eps {float(eps.amax()):.6g}: lower the "
    return NonFiniteLossError(text + "learning rate or clip gradients; at the first step, initialise with ibp_init_")


def _to_registered_keys(module: ShortWarmup, state_dict: Any, prefix: str, *rest: Any) -> None:
    """Undo, before loading as a part of a module, what :meth:`ShortWarmup.state_dict` did to the keys."""
    if prefix + _STEP in state_dict:
        module.steps_done = int(state_dict.pop(prefix + _STEP))
    else:
        rest[2].append(prefix + _STEP)  # The missing keys.
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)


def _check_weights(reg_weight: float, tol: float, min_eps: float, kappa: Any, penalties: Collection[float]) -> None:
    if not (reg_weight >= 0 and tol > 0 and min_eps >= 0):
        raise ValueError(f"expected reg_weight ≥ 0, tol > 0 and min_eps ≥ 0; found {reg_weight}, {tol} and {min_eps}")
    if not (isinstance(kappa, tuple | list) and len(kappa) == 2 and all(0 <= one <= 1 for one in kappa)):
        raise ValueError(f"kappa must be a pair, two weights of the clean loss, each from 0 to 1; found {kappa!r}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in penalties):
        raise ValueError(f"weights of penalties must be finite and at least 0; found {list(penalties)}")


def _named(terms: Sequence[str | Regularizer], tol: float, used: Collection[str] = ()) -> dict[str, Regularizer]:
    known = BUILT_IN | {term.__name__: partial(term, tol=tol) for term in (tightness, relu_balance)}
    named: dict[str, Regularizer] = {}
    for item in terms:
        if isinstance(item, str) and item not in known:
            raise ValueError(f"unknown regulariser {item!r}; known are {', '.join(known)}, or pass a function")
        name = item if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)
        if name in named or name in used:
            raise ValueError(f"two regularisers are called {name!r}, under which the step would report both")
        named[name] = known[item] if isinstance(item, str) else item
    return named
