"""The engine's BoundedModule, as a view of the nn.Module that it wraps: one state, one mode, the same function."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lirpa_fastwarmup.boxes import check_input_shapes
from lirpa_fastwarmup.engine import batchnorm, tracing
from lirpa_fastwarmup.engine.affine import affine_interval
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine
from lirpa_fastwarmup.engine.equality import check_same_function
from lirpa_fastwarmup.engine.graph import read_graph
from lirpa_fastwarmup.engine.inputs import Layout, Unpacked
from lirpa_fastwarmup.engine.margins import is_recorded, margin_interval
from lirpa_fastwarmup.engine.nodes import CUSTOM_OPERATORS, adopt
from lirpa_fastwarmup.engine.observation import untraceable
from lirpa_fastwarmup.engine.operators import review
from lirpa_fastwarmup.engine.precision import default_dtype, exact_arithmetic, temporarily

_bound: Any = engine.bound_general


def _like(model: nn.Module) -> Tensor:
    return next(model.parameters(), next(model.buffers(), torch.empty(0)))


def _require_plain(model: nn.Module) -> None:
    if isinstance(model, engine.BoundedModule):
        text = "expected a plain nn.Module, found a BoundedModule: wrap the network itself, or join the statistics of "
        raise TypeError(text + "a plain engine module by lirpa_fastwarmup.share_batchnorm_state(bounded, model)")
    if perturbed := [name for name, value in model.named_parameters() if isinstance(value, engine.BoundedParameter)]:
        text = f"perturbed weights ({', '.join(perturbed)}): bounds over them have not been tested. Use nn.Parameters"
        raise NotImplementedError(text)


def _check_structure(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Warn of what a trace cannot follow; return the buffers that it holds as constants."""
    observed, reasons = untraceable(model, example)
    if not isinstance(observed.output, Tensor):
        text = f"the network returns a {type(observed.output).__name__}, but bounds need one tensor: wrap it in a "
        raise TypeError(text + "module that returns the logits alone")
    if reasons:
        text = f"the network's path is not fixed: {'; '.join(reasons)}. Bounds hold on the example's path in "
        text += "evaluation mode, and are wrong on any other. Use tensor operations (torch.where) instead"
        warnings.warn(text, tracing.TracedPathWarning, stacklevel=3)
    return observed.constants


class BoundedModule(engine.BoundedModule):
    """``auto_LiRPA.BoundedModule``, with one state for the wrapped model and its bounded view.

    Building it leaves the model unchanged. ``state_dict``, ``parameters`` and ``training`` are the wrapped model's own;
    moving one to a device or dtype moves both. Modules that are added to the model or replaced later have no effect,
    nor do new values of attributes that are neither parameters nor buffers.

    In training mode, forward passes update BatchNorm's running statistics, as in any nn.Module; :meth:`compute_bounds`
    uses the statistics of its own clean batch without updating them. Dropout is off in both, in either mode: bounds for
    one random mask would not hold for the next, and certificates are about the network without masks.

    Args:
        model: the network, any nn.Module that returns one tensor and whose operators the engine bounds.
        global_input: example input, a tensor or a tuple of tensors, batch first. Only shapes matter.
        bound_opts, device, verbose, custom_ops: as in the engine. CROWN's coefficients are matrices, whatever
            ``conv_mode`` says, if the network has an operator for which patches are wrong.
        allow_untested: accept operators and attributes whose bounds have not been tested, ``custom_ops`` among them.
            Certificates and summaries name them.

    Attributes:
        wrapped, example, given_options: the model, the example inputs and ``bound_opts``, as passed.
        any_batch: whether the model supports batches of another size than the example's.
        untested: operators and attributes, with their places, whose bounds have not been tested.
        over_ranks: whether :meth:`join_ranks` was called.
        radius_dtype: to which IBP in training mode rounds radii and absolute weights before it multiplies them.

    Raises:
        TypeError: ``model`` is a BoundedModule already, or does not return one tensor.
        NotImplementedError: the engine has no bounds for an operator, or these have not been tested; weights are
            perturbed; or the bounded network computes another function than the model. The message names the place.

    Warns:
        TracedPathWarning: the network reads values of tensors in Python, or computes another function in training mode.
            Bounds hold for the traced path, in evaluation mode.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> bounded = fw.BoundedModule(net, torch.rand(1, 1, 28, 28))
        >>> lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 0.1),), method="IBP")
    """

    wrapped: nn.Module
    over_ranks = False
    radius_dtype: torch.dtype | None = None
    _arguments: dict[str, Any]
    within_optimization: Mapping[str, Any] = {}  # Arguments of the engine's own calls of `compute_bounds`.
    _built, _bounding = False, False

    def __init__(
        self,
        model: nn.Module,
        global_input: Tensor | tuple[Tensor, ...],
        bound_opts: dict[str, Any] | None = None,
        device: str | torch.device = "auto",
        verbose: bool = False,
        custom_ops: Mapping[str, Any] | None = None,
        *,
        allow_untested: bool = False,
    ) -> None:
        _require_plain(model)
        like = _like(model)
        example = (global_input,) if isinstance(global_input, Tensor) else tuple(global_input)
        self.example = tuple(x.to(like.device) for x in example)
        self.layout = Layout(self.example)
        self._options, operators = dict(bound_opts or {}), dict(custom_ops or {})
        # Copies are built with these, on the device that the model has then.
        self._arguments = {"verbose": verbose, "custom_ops": operators, "allow_untested": allow_untested}
        device = like.device if device == "auto" else device  # The engine's own choice fails without parameters.
        exact = functools.partial(exact_arithmetic, like.device)
        # A trace would record autocast's conversions, and fails under a dispatch mode (see `memory`).
        with _disable_current_modes(), tracing.unchanged(model), exact(), default_dtype(like.dtype):
            self._constants = _check_structure(model, self.example)
            self._build_engine(model, global_input, device)
            if self._reviewed.needs_matrices and self.conv_mode == "patches":
                self._build_engine(model, global_input, device, conv_mode="matrix")
        if self.untested and not allow_untested:
            text = f"the bounds of auto_LiRPA {ENGINE_VERSION} have not been tested for {'; '.join(self.untested)}."
            text += f"{self._reviewed.advice} Write the network with tested operators (docs/operators.md), or pass "
            raise NotImplementedError(text + "allow_untested=True: certificates then report the untested bounds")
        object.__setattr__(self, "wrapped", model)
        self._links = batchnorm.state_links(self, model)
        self._built = True
        with tracing.unchanged(model), exact(), torch.no_grad():
            self.any_batch = check_same_function(self.eval(), model, self.example)
        self._follow_wrapped()

    def _build_engine(self, model: nn.Module, global_input: Any, device: Any, **options: Any) -> None:
        """Build the engine's graph in evaluation mode, where BatchNorm is one node; replace and review its nodes."""
        options = {**self._options, **options}
        verbose, ops = self._arguments["verbose"], {**CUSTOM_OPERATORS, **self._arguments["custom_ops"]}
        with tracing.quiet_conversion(model, self.example):
            super().__init__(model, global_input, bound_opts=options, device=device, verbose=verbose, custom_ops=ops)
            adopt(self, model)
        self._reviewed = review(self, model)

    def __reduce__(self) -> tuple[Any, ...]:
        # Nodes hold the graphs of the last pass, so copies and pickles are rebuilt from their copy of the model.
        like = _like(self.wrapped)
        example = tuple(x.to(like) if x.is_floating_point() else x.to(like.device) for x in self.example)
        state = {"radius_dtype": self.radius_dtype, "over_ranks": self.over_ranks}
        return functools.partial(type(self), **self._arguments), (self.wrapped, example, self._options), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.radius_dtype = state["radius_dtype"]
        if state["over_ranks"]:
            self.join_ranks()

    @property
    def given_options(self) -> dict[str, Any]:
        """The ``bound_opts`` that were passed."""
        return dict(self._options)

    @property
    def plain(self) -> nn.Module:
        """The wrapped model, as a function of packed inputs (:class:`Layout`) if there are several."""
        return self.wrapped if self.layout.is_single else Unpacked(self.wrapped, self.layout)

    @property
    def untested(self) -> tuple[str, ...]:
        """Operators and attributes, with their places, whose bounds have not been tested."""
        return self._reviewed.untested

    def rebuilt(self, dtype: torch.dtype, **changes: Any) -> Self:
        """A BoundedModule of a copy of the model in ``dtype``, in evaluation mode, that supports every bounding method.

        The copy's parameters require no gradient; ``changes`` apply to the engine's ``bound_opts``.
        """
        options = {**self._options, **changes}
        nodes = [node for node in self._modules.values() if isinstance(node, _bound.BoundOptimizableActivation)]
        # 0.3's sparse slopes fail where neurons are stable over the whole batch, 0.7's beyond vectors and images.
        if ENGINE_VERSION.startswith("0.3"):
            options["sparse_features_alpha"] = False
        elif any(len(node.output_shape) not in (2, 4) for node in nodes if node.output_shape is not None):
            options |= {"sparse_features_alpha": False, "sparse_spec_alpha": False}
        model = tracing.copy_of(self.wrapped).to(dtype).eval().requires_grad_(False)
        example = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.example)
        return type(self)(model, example, options, **self._arguments)

    def check_incompatible_nodes(self, model: nn.Module) -> None:
        """Do nothing: the engine's own method would choose the mode to trace in, and print."""

    def join_ranks(self) -> Self:
        """In training mode, treat a batch as the batches of all processes (torch.distributed) together.

        BatchNorm (as nn.SyncBatchNorm) and the paper's regularisers, which are not linear in the batch, then use the
        statistics of all of them. Every process must make every pass, and compute every regulariser.
        """
        for node in self._modules.values():  # Of which only those of BatchNorm read it.
            node.over_ranks = True
        self.over_ranks = True
        return self

    @property
    def training(self) -> bool:
        """The wrapped model's mode."""
        return self.wrapped.training

    @training.setter
    def training(self, mode: bool) -> None:
        if self._built:  # The constructor of nn.Module sets it before.
            self.wrapped.training = mode

    def train(self, mode: bool = True) -> Self:
        """Put the wrapped model and every node in training (or evaluation) mode."""
        self.wrapped.train(mode)
        batchnorm.follow_modules(self, mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's state dict, under its own keys."""
        return self.wrapped.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state dict of the wrapped model (or of another BoundedModule of it)."""
        if not self._built:
            return super().load_state_dict(state_dict, *args, **kwargs)
        result = self.wrapped.load_state_dict(state_dict, *args, **kwargs)
        self._follow_wrapped()
        return result

    def _named_members(self, get_members_fn: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        return self.wrapped._named_members(get_members_fn, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.wrapped._apply(fn, recurse)
        for node in self._modules.values():
            if isinstance(node, _bound.BoundConstant) and isinstance(node.value, Tensor):
                node.value = fn(node.value)
        self._constants = {name: fn(value) for name, value in self._constants.items()}
        self.device = _like(self.wrapped).device
        self.example = tuple(x.to(self.device) for x in self.example)
        self._follow_wrapped()
        return self

    def _follow_wrapped(self) -> None:
        """Adopt the wrapped model's mode and replaced tensors; raise ValueError if the trace does not fit them."""
        for link in self._links:
            link.refresh()
        current = dict(self.wrapped.named_buffers()) if self._constants and not is_recorded() else {}
        for name in current.keys() & self._constants.keys():
            if not torch.allclose(current[name], self._constants[name], 0, 0, equal_nan=True):
                text = f"the network reads its buffer {name!r} in Python, and it has changed since it was wrapped: "
                raise ValueError(text + "build a BoundedModule again, or compute with the tensor itself")
        batchnorm.follow_modules(self, self.wrapped.training)

    def forward(self, *x: Any, **kwargs: Any) -> Any:
        """The network's output; arguments as in the engine. Raises ValueError as :meth:`compute_bounds`."""
        if not self._built:
            return super().forward(*x, **kwargs)
        self._follow_wrapped()
        return super().forward(*self._unpacked(x), **kwargs)

    def _unpacked(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        """The network's inputs, also from one tensor that packs them, with checked shapes."""
        x = self.layout.unpack(x[0]) if len(x) == 1 < len(self.example) else x
        check_input_shapes(x, self.example)
        return x

    def compute_bounds(self, x: Any = None, *args: Any, reuse_statistics: bool = False, **kwargs: Any) -> Any:
        """Bounds on the output, by the engine's methods but those that go forward; other arguments as in the engine.

        A clean pass of the batch comes first in training mode, for BatchNorm's statistics, and where the network reads
        its input's shape (``x.view(x.shape[0], -1)``), which the engine otherwise remembers from the last pass.

        Args:
            x: a BoundedTensor, or a tuple of inputs of which at least one is a BoundedTensor; ``None`` continues from
                the last pass, with its inputs, statistics and intermediate bounds.
            reuse_statistics: skip the clean pass, because the last pass was a forward pass of this very batch with
                these weights. Bounds of any other batch are wrong then.

        Returns:
            Lower and upper bounds, each of the output's shape.

        Raises:
            NotImplementedError: the engine has no such bounds for an operator, or fails; the message names method and
                place. Or the box is a ball of another norm than l∞.
            ValueError: inputs have another shape than the example's, batch aside; or the network was changed since.

        Example:
            >>> lower, upper = bounded.compute_bounds(x=(fw.input_box(x, 8 / 255),), method="CROWN-IBP")
        """
        if self._bounding:  # The engine optimises bounds by calling this repeatedly.
            return super().compute_bounds(x, *args, **{**kwargs, **self.within_optimization})
        if x is not None:
            x = self._unpacked((x,) if isinstance(x, Tensor) else tuple(x))
            for ptb in (getattr(one, "ptb", None) for one in x):
                if ptb is not None and getattr(ptb, "norm", None) != math.inf:
                    text = f"bounds over {ptb} have not been tested, and some would be of radius 0: use input_box, or "
                    raise NotImplementedError(text + "PerturbationLpNorm with norm=float('inf')")
        method = kwargs.get("method", args[2] if len(args) > 2 else None) or "backward"
        if "forward" in method.lower() and not self._arguments["allow_untested"]:  # 0.7's is wrong for LeakyReLU.
            text = f"bounds by the engine's method {method!r} have not been tested: use IBP, CROWN-IBP, CROWN or "
            raise NotImplementedError(text + "alpha-CROWN, or build the BoundedModule with allow_untested=True")
        if self._reviewed.interval_only and method.lower() not in ("ibp", "interval"):
            text = f"auto_LiRPA {ENGINE_VERSION} has only IBP bounds for {'; '.join(self._reviewed.interval_only)}: "
            raise NotImplementedError(f"{text}use method='IBP', or other operators.{self._reviewed.advice}")
        self._follow_wrapped()
        like = _like(self.wrapped)
        # Both releases create some tensors without a dtype.
        with (
            temporarily([self], "_bounding", True),
            temporarily([self], "final_shape", self.final_shape),  # alpha-CROWN overwrites it by the shape of C.
            batchnorm.frozen_running_stats(self),
            tracing.named_failures(self, method),
            default_dtype(like.dtype),
            # Bounds must not be rounded to half the precision; in training mode they may be.
            nullcontext() if self.training else torch.autocast(like.device.type, enabled=False),
        ):
            modes = (node.training and getattr(node, "bn_mode", "") == "forward" for node in self._modules.values())
            keeps_batch = any(modes) or any(isinstance(node, _bound.BoundShape) for node in self._modules.values())
            if x is not None and not reuse_statistics and keeps_batch:
                super().forward(*x)
            return super().compute_bounds(x, *args, **kwargs)

    def IBP_general(self, node: Any = None, C: Any = None, **kwargs: Any) -> Any:  # noqa: N802 (the engine's)
        """IBP of one node, as in the engine; in training mode, by :mod:`.affine`, and without 0.7's checks for NaN."""
        if hasattr(C, "labels"):
            return margin_interval(node, C.labels, self._interval)
        walks = self.training and node.perturbed and C is None and not any(map(kwargs.get, kwargs))
        if walks and not hasattr(node, "interval") and not self._options.get("loss_fusion"):
            first = read_graph(self).first_sources
            ends = affine_interval(node, self._interval, first, self.radius_dtype)
            if ends is None:
                ends = node.interval_propagate(*map(self._interval, node.inputs))
            node.lower, node.upper = node.interval = ends
        return super().IBP_general(node, C=C, **kwargs)

    def _interval(self, node: Any) -> Any:
        return getattr(node, "interval", None) or self.IBP_general(node)
