"""Checks that a bounded network computes the function of the network that it was built from.

The engine converts a network through ONNX, which drops what it has no place for (``divisor_override``) and
leaves the rest to operator classes with gaps of their own. Bounds of another function certify nothing, so the two
are compared once, after building, on random inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.tracing import copy_of

# Largest difference by rounding, relative to the largest output. Beyond it, double precision decides.
_ROUNDING = {torch.float64: 1e-10}
_ROUNDING_OTHERWISE = 1e-5
# How many times its own rounding error an output may be off.
_MARGIN = 100
# Of normal samples; 0 stands for one that is uniform on [0, 1]. Large ones reach kinks far from 0.
_SCALES = (0.0, 1.0, 10.0, 0.0, 100.0)
_MORE = 3  # Samples of the second batch beyond the first's: together they see all scales.
_NOT_COMPUTED = ("__get__", "__set__", "size", "dim", "detach", "clone", "requires_grad_", "_to_copy", "type", "to")


def check_same_function(bounded: Any, model: nn.Module, example: Sequence[Tensor]) -> bool:
    """Compare the outputs of ``bounded`` with those of ``model`` on random inputs, at two batch sizes.

    Both must be in evaluation mode, and arithmetic exact. It is also seen that the model leaves its inputs as they are,
    and that the output for a sample does not depend on the other samples of its batch.

    Args:
        bounded: the engine's view of ``model``.
        model: the network.
        example: its inputs, batch first; the random ones have their shapes, dtypes and devices.

    Returns:
        Whether ``model`` takes batches of another size than the example's.

    Raises:
        NotImplementedError: the outputs differ, or ``bounded`` fails on a batch size that ``model`` supports. The
            text names the first operation of ``model`` whose result the bounded network does not have.
    """
    size = len(example[0])
    for samples in (size, size + _MORE):
        try:
            trial = _trial(model, example, samples)
        except NotImplementedError:
            raise
        except Exception:
            if samples == size:
                raise
            return False  # The network takes batches of the example's size only.
        _compare(bounded, model, *trial)
        _require_independence(model, *trial)
    return True


def _trial(model: nn.Module, example: Sequence[Tensor], size: int) -> tuple[list[Tensor], Tensor]:
    """``size`` random samples and the model's outputs; of the example's own where the network refuses random ones."""
    generator = torch.Generator().manual_seed(0)
    inputs = [_random_like(x, size, generator) for x in example]
    try:
        return inputs, _outputs(model, inputs)
    except NotImplementedError:
        raise
    except Exception:
        inputs = [_repeated(x, size) for x in example]
        return inputs, _outputs(model, inputs)


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    given = [x.clone() for x in inputs]
    outputs: Tensor = model(*given)
    if not all(torch.equal(x, before) for x, before in zip(given, inputs, strict=True)):
        raise NotImplementedError(
            "the network changes its input in place, and a box around the input would be another one afterwards: leave "
            "inplace=True out of its first operation"
        )
    return outputs


def _repeated(x: Tensor, size: int) -> Tensor:
    return x[torch.arange(size, device=x.device) % len(x)]


def _require_independence(model: nn.Module, inputs: list[Tensor], expected: Tensor) -> None:
    """See that the outputs of the first and of the last sample stay when all others are exchanged."""
    size = len(expected)
    if inputs and len(inputs[0]) != size:
        raise NotImplementedError(
            f"the network returns {size} outputs for a batch of {len(inputs[0])}: its first dimension must be the batch"
        )
    for kept in {0, size - 1} if size > 1 else ():
        mixed = [_others_exchanged(x, kept) for x in inputs]
        found = _outputs(model, mixed)
        if found.shape != expected.shape or not _close(found[kept : kept + 1], expected[kept : kept + 1], model, mixed):
            raise NotImplementedError(
                "the output for one sample depends on the other samples of its batch, in evaluation mode as well: a "
                "certificate would hold beside these alone. Leave out what mixes a batch (flips, sums, means and "
                "products over the first dimension)"
            )


def _others_exchanged(x: Tensor, kept: int) -> Tensor:
    mixed = x.roll(1, 0)
    if x.is_floating_point():
        mixed = mixed / 2  # Other values, and not the same in another order, of which a mean stays what it is.
    mixed[kept] = x[kept]
    return mixed


def _compare(bounded: Any, model: nn.Module, inputs: list[Tensor], expected: Tensor) -> None:
    try:
        found = bounded.forward(*inputs)
    except Exception as error:
        raise NotImplementedError(
            f"auto_LiRPA {ENGINE_VERSION} fails on a batch of {len(inputs[0])}, which the network itself supports "
            f"({type(error).__name__}: {error}). {_first_difference(bounded, model, inputs)}"
        ) from error
    if found.shape == expected.shape and _close(found, expected, model, inputs):
        return
    apart = f"by up to {(found - expected).abs().max():.2g}" if found.shape == expected.shape else "in shape"
    raise NotImplementedError(
        f"the bounded network computes another function than the model: on random inputs their outputs differ {apart}. "
        f"{_first_difference(bounded, model, inputs)}"
    )


def _random_like(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """By turns uniform on [0, 1], and normal samples of growing size; integers are drawn from those of ``x``."""
    if not x.is_floating_point():
        return _repeated(x, size)
    values = torch.rand((size, *x.shape[1:]), generator=generator)
    for place in range(size):
        if scale := _SCALES[place % len(_SCALES)]:
            values[place] = scale * torch.randn(values[place].shape, generator=generator)
    return values.to(x)


def _close(found: Tensor, expected: Tensor, model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether outputs agree up to rounding, which is relative to each sample's largest output."""
    defined = expected.isfinite()
    if not torch.equal(defined, found.isfinite()):
        return False
    difference = _largest(torch.where(defined, found - expected, torch.zeros_like(expected)))
    scale = 1 + _largest(torch.where(defined, expected, torch.zeros_like(expected)))
    if bool((difference <= _ROUNDING.get(expected.dtype, _ROUNDING_OTHERWISE) * scale).all()):
        return True
    return bool((difference <= _MARGIN * _rounding_error(model, inputs)).all())


def _largest(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).abs().amax(1) if values.numel() else values.new_zeros(len(values))


def _rounding_error(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """How far the outputs for ``inputs`` are from those in double precision; 0 if the network does not run in it."""
    outputs = model(*(x.clone() for x in inputs))
    if outputs.dtype == torch.float64:
        return torch.zeros(())
    try:
        exact = copy_of(model).double()(*(x.double() if x.is_floating_point() else x.clone() for x in inputs))
    except (RuntimeError, TypeError, NotImplementedError):
        return torch.zeros(())
    defined = outputs.isfinite() & exact.isfinite()
    return _largest(torch.where(defined, exact - outputs, torch.zeros_like(exact))).amax()


@dataclass(frozen=True)
class _Operation:
    """A call of a torch function: its name, the module that made it, and its result."""

    function: str
    module: str
    result: Tensor

    def __str__(self) -> str:
        return f"{self.function} in module {self.module}"


class _Recorder(TorchFunctionMode):
    """Records the results of torch functions, with the innermost module that is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self._running: list[str] = []
        self._names = {id(module): name for name, module in model.named_modules()}

    def watch(self, model: nn.Module) -> list[Any]:
        """Hooks that follow which module runs."""
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave))
        return handles

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._running.append(f"{self._names[id(module)]!r} ({type(module).__name__})")

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if isinstance(result, Tensor) and result.is_floating_point() and name not in _NOT_COMPUTED:
            where = self._running[-1] if self._running else "''"
            self.operations.append(_Operation(name, where, result.detach().clone()))
        return result


def _first_difference(bounded: Any, model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """A sentence that names the first operation of ``model`` whose result no node of ``bounded`` has."""
    recorder = _Recorder(model)
    handles = recorder.watch(model)
    try:
        with recorder:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    values = list(_values(bounded))
    missing = next((op for op in recorder.operations if not _among(op.result, values)), None)
    if missing is None:
        return "Write the network with other operators"
    return f"They part at {missing}: write that with other operators"


def _values(bounded: Any) -> Iterator[Tensor]:
    for node in bounded._modules.values():
        value = getattr(node, "forward_value", None)
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value


def _among(result: Tensor, values: list[Tensor]) -> bool:
    return any(
        value.numel() == result.numel()
        and torch.allclose(value.flatten(), result.flatten().to(value), rtol=1e-4, atol=1e-5, equal_nan=True)
        for value in values
    )
