"""The engine's BoundedModule, as a view of the nn.Module that it wraps.

Parameters, buffers, mode and state dict are the wrapped model's own. Bounds in training mode are
taken with the BatchNorm statistics of their own clean batch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lirpa_fastwarmup.boxes import check_input_shapes
from lirpa_fastwarmup.engine import batchnorm
from lirpa_fastwarmup.engine.arithmetic import simplify_arithmetic
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine
from lirpa_fastwarmup.engine.equality import check_same_function
from lirpa_fastwarmup.engine.failures import named_failures
from lirpa_fastwarmup.engine.nodes import CUSTOM_OPERATORS, adopt_operators
from lirpa_fastwarmup.engine.operators import Acceptance, review, untested_error
from lirpa_fastwarmup.engine.precision import default_dtype, exact_arithmetic
from lirpa_fastwarmup.engine.tracing import (
    TracedPathWarning,
    active_dropout,
    copy_of,
    quiet_conversion,
    unchanged,
    untraceable,
)

BoundShape: Any = engine.bound_general.BoundShape
BoundConstant: Any = engine.bound_general.BoundConstant
BoundOptimizable: Any = engine.bound_general.BoundOptimizableActivation


def _like(model: nn.Module) -> Tensor:
    """A tensor of the device and dtype that ``model`` works on."""
    return next(model.parameters(), next(model.buffers(), torch.empty(0)))


def _refuse_perturbed_weights(model: nn.Module) -> None:
    perturbed = [name for name, value in model.named_parameters() if isinstance(value, engine.BoundedParameter)]
    if perturbed:
        raise NotImplementedError(
            f"perturbed weights ({', '.join(perturbed)}): bounds over them have not been tested. Use nn.Parameters"
        )


class BoundedModule(engine.BoundedModule):
    """``auto_LiRPA.BoundedModule``, with one state for the wrapped model and its bounded view.

    Building it leaves the model as it was, and prints nothing. Afterwards ``state_dict``,
    ``parameters`` and ``training`` are those of the wrapped model; BatchNorm in training mode updates
    the model's own running statistics; moving one to a device or dtype moves both. Modules that are
    added to the model or replaced later are not followed.

    In training mode :meth:`compute_bounds` takes the BatchNorm statistics of its own clean batch.
    Forward passes move the running statistics, as they do for any nn.Module; bounds never do.

    Args:
        model: the network, any nn.Module that returns one tensor and whose operators the engine bounds.
        global_input: example input, a tensor or a tuple of tensors, batch first. Only shapes matter.
        bound_opts, device, verbose, custom_ops: as in the engine. CROWN's coefficients are matrices, whatever
            ``conv_mode`` says, where the network has an operator that patches are not right for.
        allow_untested: accept operators and attributes whose bounds have not been tested, ``custom_ops`` among them.
            Everything then runs; :attr:`untested` names them, and so do certificates and summaries.

    Raises:
        TypeError: ``model`` is a BoundedModule already, or returns something else than one tensor.
        NotImplementedError: the engine has no bounds for an operator, or these have not been tested, or weights are
            perturbed; or the bounded network computes another function than the model. The text names the place.

    Warns:
        TracedPathWarning: the network reads values of tensors in Python, or computes something else in
            training mode than in evaluation; bounds are those of the path that was traced, in
            evaluation mode.
    """

    wrapped: nn.Module
    example: tuple[Tensor, ...]
    any_batch: bool
    _arguments: tuple[Any, ...]
    _reviewed: Acceptance
    _built = False
    _bounding = False
    _over_ranks = False

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
        example = (global_input,) if isinstance(global_input, Tensor) else tuple(global_input)
        example = tuple(x.to(_like(model).device) for x in example)
        self.__dict__["example"] = example
        # Copies are built on the device of the model, wherever it has been moved to.
        options, operators = dict(bound_opts or {}), dict(custom_ops or {})
        self.__dict__["_arguments"] = (options, "auto", verbose, operators, allow_untested)
        if isinstance(model, engine.BoundedModule):
            raise TypeError(
                "expected a plain nn.Module, found a BoundedModule. Wrap the network itself; for a plain "
                "auto_LiRPA.BoundedModule, lirpa_fastwarmup.share_batchnorm_state(bounded, model) joins its "
                "BatchNorm statistics with the model's"
            )
        _refuse_perturbed_weights(model)
        if device == "auto":  # As the engine has it, and also where there are no parameters.
            device = _like(model).device
        # A trace would take autocast's conversions with it, and fails where operators are watched (see `memory`).
        like = _like(model)
        with _disable_current_modes(), unchanged(model), exact_arithmetic(like.device), default_dtype(like.dtype):
            self._check_structure(model, example)
            self._build_engine(model, global_input, options, device, verbose, operators)
            if self._reviewed.needs_matrices and self.conv_mode == "patches":
                self._build_engine(model, global_input, {**options, "conv_mode": "matrix"}, device, verbose, operators)
        if self._reviewed.untested and not allow_untested:
            raise untested_error(self._reviewed.untested)
        object.__setattr__(self, "wrapped", model)
        batchnorm.adopt_batchnorm(self, model, batchnorm.ViewedBatchNorm)
        self._links = batchnorm.state_links(self, model)
        self._built = True
        self._follow_wrapped()
        self._check_function()

    def _build_engine(
        self, model: nn.Module, global_input: Any, options: Any, device: Any, verbose: Any, ops: Any
    ) -> None:
        """Build the engine's graph, in evaluation mode, put our nodes in it, and review its operators.

        In that mode a trace holds one node per BatchNorm and moves no statistics.
        """
        with quiet_conversion():
            super().__init__(
                model,
                global_input,
                bound_opts=options,
                device=device,
                verbose=verbose,
                custom_ops={**CUSTOM_OPERATORS, **ops},
            )
        batchnorm.adopt_parameters(self)
        adopt_operators(self)
        simplify_arithmetic(self)
        self.__dict__["_reviewed"] = review(self, len(self.example[0]))

    def _check_function(self) -> None:
        model = self.wrapped
        with unchanged(model), exact_arithmetic(_like(model).device), torch.no_grad():
            self.eval()
            self.__dict__["any_batch"] = check_same_function(self, model, self.example)
        self._follow_wrapped()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles are built anew from their copy of the model: nodes hold graphs of the last pass.
        like = _like(self.wrapped)
        example = tuple(x.to(like) if x.is_floating_point() else x.to(like.device) for x in self.example)
        *positional, allow_untested = self._arguments
        build = functools.partial(type(self), allow_untested=allow_untested)
        return build, (self.wrapped, example, *positional)

    def rebuilt(self, dtype: torch.dtype, **changes: Any) -> BoundedModule:
        """One of a copy of the wrapped model in ``dtype``, in evaluation mode, that takes every bounding method.

        The copy's parameters ask for no gradient; ``changes`` are made to the engine's ``bound_opts``.
        """
        options, device, verbose, operators, allow_untested = self._arguments
        options = {**options, **changes}
        # 0.3's sparse slopes fail where neurons are stable over the whole batch, 0.7's outside of vectors and images.
        if ENGINE_VERSION.startswith("0.3"):
            options = {**options, "sparse_features_alpha": False}
        elif not self._holds_vectors_and_images():
            options = {**options, "sparse_features_alpha": False, "sparse_spec_alpha": False}
        model = copy_of(self.wrapped).to(dtype).eval().requires_grad_(False)
        example = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.example)
        return type(self)(model, example, options, device, verbose, operators, allow_untested=allow_untested)

    def _holds_vectors_and_images(self) -> bool:
        nodes = (node for node in self._modules.values() if isinstance(node, BoundOptimizable))
        return all(len(node.output_shape) in (2, 4) for node in nodes if node.output_shape is not None)

    def check_incompatible_nodes(self, model: nn.Module) -> None:
        """Let the engine trace in evaluation mode, whatever modules there are; it would choose and print."""

    @staticmethod
    def _check_structure(model: nn.Module, example: tuple[Tensor, ...]) -> None:
        observed, reasons = untraceable(model, example)
        if not isinstance(observed.output, Tensor):
            raise TypeError(
                f"the network returns a {type(observed.output).__name__}, and bounds are taken on one tensor: wrap it "
                "in a module that returns the logits alone"
            )
        if reasons:
            warnings.warn(
                f"the network's path is not fixed: {'; '.join(reasons)}. Bounds are those of the path that the "
                "example input takes in evaluation mode, and wrong on any other. Use tensor operations "
                "(torch.where) instead",
                TracedPathWarning,
                stacklevel=3,
            )

    @property
    def untested(self) -> tuple[str, ...]:
        """Operators and attributes of the network, with their places, whose bounds have not been tested."""
        return self._reviewed.untested

    @property
    def given_options(self) -> dict[str, Any]:
        """The ``bound_opts`` that it was built with, without what the engine adds."""
        return dict(self._arguments[0])

    @property
    def over_ranks(self) -> bool:
        """Whether a batch, in training mode, is the batches of all processes together; see :meth:`join_ranks`."""
        return self._over_ranks

    def join_ranks(self) -> Self:
        """In training mode, take a batch to be the batches of all processes (torch.distributed) together.

        BatchNorm's statistics are then of all of them, in clean passes and hence in bounds, as nn.SyncBatchNorm does
        it; and so are the figures that the paper's regularisers are made of, which are not linear in the batch. Every
        process must make every pass, and compute every regulariser.
        """
        batchnorm.batchnorm_over_ranks(self)
        self._over_ranks = True
        return self

    # One state and one mode with the wrapped model.

    @property
    def training(self) -> bool:
        """The wrapped model's mode."""
        return self.wrapped.training if self._built else self.__dict__.get("_training", True)

    @training.setter
    def training(self, mode: bool) -> None:
        if self._built:
            self.wrapped.training = mode
        else:
            self.__dict__["_training"] = mode

    def train(self, mode: bool = True) -> Self:
        """Put the wrapped model and every node in training (or evaluation) mode."""
        if not self._built:
            super().train(mode)
            return self
        self.wrapped.train(mode)
        batchnorm.follow_modules(self, mode)
        return self

    def eval(self) -> Self:
        """Put the wrapped model and every node in evaluation mode."""
        return self.train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's state dict, under its own keys."""
        return self.wrapped.state_dict(*args, **kwargs) if self._built else super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state dict of the wrapped model (or of another BoundedModule of it)."""
        if not self._built:
            return super().load_state_dict(state_dict, *args, **kwargs)
        result = self.wrapped.load_state_dict(state_dict, *args, **kwargs)
        self._follow_wrapped()
        return result

    def _named_members(self, get_members_fn: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        if self._built:
            return self.wrapped._named_members(get_members_fn, *args, **kwargs)
        return super()._named_members(get_members_fn, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.wrapped._apply(fn, recurse)
        for node in self._modules.values():
            if isinstance(node, BoundConstant) and isinstance(node.value, Tensor):
                node.value = fn(node.value)
        self.device = _like(self.wrapped).device
        self._follow_wrapped()
        return self

    def _follow_wrapped(self) -> None:
        """Take over what happened to the wrapped model since: its mode, and tensors that were replaced."""
        for link in self._links:
            link.refresh()
        batchnorm.follow_modules(self, self.wrapped.training)

    # Passes.

    def forward(self, *x: Any, **kwargs: Any) -> Any:
        """The network's output; arguments as in the engine.

        Raises:
            NotImplementedError: a Dropout module is in training mode.
            ValueError: inputs of another shape than the example's, batch aside.
        """
        if not self._built:
            return super().forward(*x, **kwargs)
        self._follow_wrapped()
        self._refuse_dropout()
        check_input_shapes(x, self.example)
        return super().forward(*x, **kwargs)

    def compute_bounds(self, x: Any = None, *args: Any, reuse_statistics: bool = False, **kwargs: Any) -> Any:
        """Bounds on the output, by any of the engine's methods; other arguments as in the engine.

        In training mode a clean pass of the batch comes first, for BatchNorm's statistics; also where the network
        reads its input's shape, as ``x.view(x.shape[0], -1)`` does, which the engine leaves as it was in the last pass.

        Args:
            x: a BoundedTensor, or a tuple of inputs of which at least one is a BoundedTensor; ``None`` goes on
                from the last pass, with its inputs, statistics and intermediate bounds.
            *args: as in the engine.
            reuse_statistics: leave the clean pass out, because the last pass was a forward pass of this very
                batch with these weights. Bounds of any other batch are wrong then.
            **kwargs: as in the engine.

        Raises:
            NotImplementedError: a Dropout module is in training mode; the engine has no such bounds for an operator, or
                fails, and the text names method and place.
            ValueError: inputs of another shape than the example's, batch aside.
        """
        if self._bounding:  # The engine optimises bounds by calling this again and again.
            return super().compute_bounds(x, *args, **kwargs)
        if x is not None:
            x = (x,) if isinstance(x, Tensor) else tuple(x)
            check_input_shapes(x, self.example)
        method = kwargs.get("method", args[2] if len(args) > 2 else None) or "backward"
        self._refuse_crown(method)
        self._follow_wrapped()
        self._refuse_dropout()
        self._bounding = True
        try:
            with (
                batchnorm.frozen_running_stats(self),
                named_failures(self, method),
                default_dtype(_like(self.wrapped).dtype),  # Both releases make some of their tensors without a dtype.
            ):
                anew = x is not None and not reuse_statistics
                if anew and (self._uses_batch_statistics() or self._reads_shapes()):
                    super().forward(*x)
                return super().compute_bounds(x, *args, **kwargs)
        finally:
            self._bounding = False

    def _refuse_crown(self, method: str) -> None:
        if method.lower() not in ("ibp", "interval") and self._reviewed.interval_only:
            raise NotImplementedError(
                f"auto_LiRPA {ENGINE_VERSION} has IBP bounds alone for {'; '.join(self._reviewed.interval_only)}: use "
                "method='IBP', or write the network with other operators"
            )

    def _refuse_dropout(self) -> None:
        names = active_dropout(self.wrapped)
        if names:
            raise NotImplementedError(
                f"Dropout draws a new mask at every pass ({', '.join(names)}), and bounds of one mask say nothing of "
                "the next: put these modules in evaluation mode, or take them out"
            )

    def _reads_shapes(self) -> bool:
        return any(isinstance(node, BoundShape) for node in self._modules.values())

    def _uses_batch_statistics(self) -> bool:
        return any(
            node.training and node.bn_mode == "forward"
            for node in self._modules.values()
            if isinstance(node, batchnorm.BoundBatchNormalization)
        )
