"""The engine's BoundedModule, as a view of the nn.Module that it wraps.

Parameters, buffers, mode and state dict are the wrapped model's own. Bounds in training mode are
always taken with the BatchNorm statistics of their own clean batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine import sharing
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.operators import CUSTOM_OPERATORS
from lirpa_fastwarmup.engine.tracing import (
    DataDependentControlFlowWarning,
    quiet_conversion,
    unchanged,
    value_reads,
)

BoundConstant: Any = engine.bound_general.BoundConstant


def _version(tensor: Tensor) -> int:
    # Inference tensors keep no version; -1 never equals a real one, nor vouches for the content.
    return -1 if tensor.is_inference() else tensor._version


class BoundedModule(engine.BoundedModule):
    """``auto_LiRPA.BoundedModule``, with one state for the wrapped model and its bounded view.

    Building it leaves the model as it was, and prints nothing. Afterwards ``state_dict``,
    ``parameters`` and ``training`` are those of the wrapped model; BatchNorm in training mode updates
    the model's own running statistics; moving one to a device or dtype moves both.

    In training mode, :meth:`compute_bounds` makes a clean forward pass of its batch first, unless the
    last forward pass was on that batch with these weights. Like every training forward pass it moves
    the running statistics.

    Args:
        model: the network, any nn.Module that returns one tensor and whose operators the engine bounds.
        global_input: example input, a tensor or a tuple of tensors, batch first. Only shapes matter.
        bound_opts, device, verbose, custom_ops: as in the engine.

    Raises:
        TypeError: ``model`` is a BoundedModule already.
        NotImplementedError: the engine has no bounds for an operator; the text names it.

    Warns:
        DataDependentControlFlowWarning: the network's Python code reads values of tensors.
    """

    wrapped: nn.Module
    _example: tuple[Tensor, ...]
    _arguments: tuple[Any, ...]
    _built = False

    def __init__(
        self,
        model: nn.Module,
        global_input: Tensor | tuple[Tensor, ...],
        bound_opts: dict[str, Any] | None = None,
        device: str | torch.device = "auto",
        verbose: bool = False,
        custom_ops: Mapping[str, Any] | None = None,
    ) -> None:
        example = (global_input,) if isinstance(global_input, Tensor) else tuple(global_input)
        self.__dict__["_example"] = example
        self.__dict__["_arguments"] = (dict(bound_opts or {}), device, verbose, dict(custom_ops or {}))
        if isinstance(model, engine.BoundedModule):
            raise TypeError(
                "expected a plain nn.Module, found a BoundedModule. Wrap the network itself; for a plain "
                "auto_LiRPA.BoundedModule, lirpa_fastwarmup.share_batchnorm_state(bounded, model) joins its "
                "BatchNorm statistics with the model's"
            )
        with unchanged(model):
            # In evaluation mode a trace holds one node per BatchNorm and moves no statistics.
            model.eval()
            self._warn_about_control_flow(model, example)
            with quiet_conversion():
                super().__init__(
                    model,
                    global_input,
                    bound_opts=bound_opts,
                    device=device,
                    verbose=verbose,
                    custom_ops={**CUSTOM_OPERATORS, **(custom_ops or {})},
                )
        object.__setattr__(self, "wrapped", model)
        sharing.adopt_batchnorm(self, model)
        sharing.adopt_parameters(self)
        sharing.adopt_matmul(self)
        self._links = sharing.state_links(self, model)
        self._clean_inputs: tuple[tuple[Tensor, int], ...] = ()
        self._clean_weights: tuple[Any, ...] = ()
        self._built = True
        self._follow_wrapped()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles are built anew from their copy of the model: nodes hold graphs of the last pass.
        like = next(self.wrapped.parameters(), torch.empty(0))
        example = tuple(x.to(like) if x.is_floating_point() else x.to(like.device) for x in self._example)
        return type(self), (self.wrapped, example, *self._arguments)

    def check_incompatible_nodes(self, model: nn.Module) -> None:
        """Choose the mode to trace in: the engine can only see Dropout in a training-mode trace."""
        self.ori_training = any(isinstance(module, nn.Dropout) for module in model.modules())

    @staticmethod
    def _warn_about_control_flow(model: nn.Module, example: tuple[Tensor, ...]) -> None:
        places = value_reads(model, example)
        if places:
            warnings.warn(
                f"the network reads the value of a tensor at {', '.join(places)}. Its bounds are those of the "
                "path that the example input took; if the path depends on the data, they are wrong for others. "
                "Use tensor operations (torch.where) instead",
                DataDependentControlFlowWarning,
                stacklevel=3,
            )

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
        sharing.follow_mode(self, mode)
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
        first = next(self.wrapped.parameters(), None)
        if first is not None:
            self.device = first.device
        self._follow_wrapped()
        return self

    def _follow_wrapped(self) -> None:
        """Take over what happened to the wrapped model since: its mode, and tensors that were replaced."""
        for link in self._links:
            link.refresh()
        sharing.follow_mode(self, self.wrapped.training)

    # Bounds in training mode: the statistics of their own clean batch.

    def forward(self, *x: Any, **kwargs: Any) -> Any:
        """The network's output; arguments as in the engine."""
        if not self._built:
            return super().forward(*x, **kwargs)
        self._follow_wrapped()
        output = super().forward(*x, **kwargs)
        if kwargs.get("final_node_name") is None:
            self._clean_inputs = tuple((value, _version(value)) for value in x)
            self._clean_weights = self._weights_state()
        return output

    def compute_bounds(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Bounds on the output, by any of the engine's methods; arguments as in the engine.

        ``x`` is a BoundedTensor, or a tuple of inputs of which at least one is a BoundedTensor; ``None``
        takes the inputs of the last forward pass.
        """
        self._follow_wrapped()
        if x is not None:
            x = (x,) if isinstance(x, Tensor) else tuple(x)
            if self._uses_batch_statistics() and not self._is_clean_batch(x):
                self.forward(*x)
        return super().compute_bounds(x, *args, **kwargs)

    def _uses_batch_statistics(self) -> bool:
        return any(
            node.training and node.bn_mode == "forward"
            for node in self._modules.values()
            if isinstance(node, sharing.BoundBatchNormalization)
        )

    def _is_clean_batch(self, x: tuple[Any, ...]) -> bool:
        """Whether the last forward pass was on the very tensors ``x``, with the present weights."""
        return (
            len(x) == len(self._clean_inputs)
            and all(
                new.data_ptr() == old.data_ptr()
                and new.shape == old.shape
                and new.stride() == old.stride()
                and -1 != _version(old) == version
                for new, (old, version) in zip(x, self._clean_inputs, strict=True)
            )
            and self._clean_weights == self._weights_state()
        )

    def _weights_state(self) -> tuple[Any, ...]:
        # Statistics taken without gradient are of no use to a bound that is to be differentiated.
        return (
            torch.is_grad_enabled(),
            *((p.data_ptr(), _version(p)) for p in self.wrapped.parameters()),
        )
