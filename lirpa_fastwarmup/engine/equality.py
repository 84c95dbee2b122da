"""Checks that a bounded network computes the same function as its model, by their outputs on random inputs.

The engine converts a network through ONNX, which drops some attributes, and its operator classes have gaps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lirpa_fastwarmup.engine import compat, tracing
from lirpa_fastwarmup.engine.observation import Recorder

_ROUNDING = 1e-5, 1e-10  # Rounding errors in float32 and float64, relative to the largest output.
_MARGIN = 100  # Outputs may differ by this multiple of the model's own rounding error.
# Scales of normal samples; 0 stands for a sample uniform on [0, 1]. Large ones reach kinks far from 0.
_SCALES = (0.0, 1.0, 10.0, 0.0, 100.0)
_MORE = 4  # Samples of the second batch beyond the first's, so that it covers all scales.
_NOT_COMPUTED = ("__get__", "__set__", "size", "dim", "detach", "clone", "requires_grad_", "_to_copy", "type", "to")


def check_same_function(bounded: Any, model: nn.Module, example: Sequence[Tensor]) -> bool:
    """Compare ``bounded`` with ``model``, in evaluation mode and exact arithmetic, on random inputs of two batch sizes.

    Also checks that the model does not change its inputs, and that the output for a sample does not depend on the rest
    of its batch. Returns whether ``model`` supports batches of another size than the example's, or raises
    NotImplementedError with the first operation of ``model`` whose result the bounded network does not have.
    """
    size = len(example[0])
    for samples in (size, size + _MORE):
        try:
            inputs, expected = _trial(model, example, samples)
        except Exception as error:
            if samples == size or isinstance(error, NotImplementedError):
                raise
            return False
        _compare(bounded, model, inputs, expected)
        _require_independence(model, inputs, expected)
    return True


def same_outputs(found: Tensor, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Whether ``found`` are the outputs of ``model`` for each sample, up to rounding."""
    return _close(found, _outputs(model, inputs), model, inputs)


def _trial(model: nn.Module, example: Sequence[Tensor], size: int) -> tuple[list[Tensor], Tensor]:
    """``size`` random samples and the model's outputs; the example and its outputs if the model rejects these."""
    generator = torch.Generator().manual_seed(0)
    inputs = [_random_like(x, size, generator) for x in example]
    try:
        return inputs, _outputs(model, inputs)
    except Exception as error:
        if isinstance(error, NotImplementedError):
            raise
        inputs = [_repeated(x, size) for x in example]
        return inputs, _outputs(model, inputs)


def _random_like(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Samples uniform on [0, 1] and normal samples of growing scale, by turns; integers repeat ``x``."""
    if not x.is_floating_point():
        return _repeated(x, size)
    values = torch.rand((size, *x.shape[1:]), generator=generator)
    for place in range(size):
        if scale := _SCALES[place % len(_SCALES)]:
            values[place] = scale * torch.randn(values[place].shape, generator=generator)
    return values.to(x)


def _repeated(x: Tensor, size: int) -> Tensor:
    return x[torch.arange(size, device=x.device) % len(x)]


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    given = [x.clone() for x in inputs]
    outputs: Tensor = model(*given)
    if not all(torch.equal(x, before) for x, before in zip(given, inputs, strict=True)):
        text = "the network changes its input in place, so a box around the input would change too: remove "
        raise NotImplementedError(text + "inplace=True from its first operation")
    return outputs


def _require_independence(model: nn.Module, inputs: list[Tensor], expected: Tensor) -> None:
    """Check that the outputs of the first and the last sample stay the same when all other samples change."""
    size = len(expected)
    if inputs and len(inputs[0]) != size:
        problem = f"the network returns {size} outputs for a batch of {len(inputs[0])}"
        raise NotImplementedError(f"{problem}: its first dimension must be the batch")
    for kept in {0, size - 1} if size > 1 else ():
        mixed = [_others_changed(x, kept) for x in inputs]
        found = _outputs(model, mixed)
        if found.shape != expected.shape or not bool(_close(found, expected, model, mixed)[kept]):
            text = "even in evaluation, the output for one sample depends on the other samples of its batch, as would "
            raise NotImplementedError(text + "its certificate: remove flips, sums and means over the first dimension")


def _others_changed(x: Tensor, kept: int) -> Tensor:
    # A permutation alone would leave means of the batch unchanged.
    mixed = x.roll(1, 0) / 2 if x.is_floating_point() else x.roll(1, 0)
    mixed[kept] = x[kept]
    return mixed


def _compare(bounded: Any, model: nn.Module, inputs: list[Tensor], expected: Tensor) -> None:
    try:
        found = bounded.forward(*inputs)
    except Exception as error:
        text = f"auto_LiRPA {compat.ENGINE_VERSION} fails on a batch of {len(inputs[0])}, unlike the network itself "
        raise NotImplementedError(f"{text}({error!r}). {_first_difference(bounded, model, inputs)}") from error
    if bool(_close(found, expected, model, inputs).all()):
        return
    apart = f"by up to {(found - expected).abs().max():.2g}" if found.shape == expected.shape else "in shape"
    text = "the bounded network computes another function than the model: on random inputs their outputs differ "
    raise NotImplementedError(text + f"{apart}. {_first_difference(bounded, model, inputs)}")


def _close(found: Tensor, expected: Tensor, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Whether outputs agree in shape, and up to rounding, which is relative to each sample's largest output."""
    if found.shape != expected.shape:
        return torch.zeros(len(expected), dtype=torch.bool, device=expected.device)
    defined = expected.isfinite()
    difference = _largest(found - expected, defined)
    close = difference <= _ROUNDING[expected.dtype == torch.float64] * (1 + _largest(expected, defined))
    if not bool(close.all()):
        close |= difference <= _MARGIN * _rounding_error(model, inputs)
    return close & (defined == found.isfinite()).reshape(len(found), -1).all(1)


def _largest(values: Tensor, where: Tensor) -> Tensor:
    values = torch.where(where, values, torch.zeros_like(values))
    return values.reshape(len(values), -1).abs().amax(1) if values.numel() else values.new_zeros(len(values))


def _rounding_error(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The difference of each sample's outputs from double precision; 0 if the network does not run in it."""
    outputs = model(*(x.clone() for x in inputs))
    if outputs.dtype == torch.float64:
        return torch.zeros(())
    try:
        exact = tracing.copy_of(model).double()(*(x.double() if x.is_floating_point() else x.clone() for x in inputs))
    except (RuntimeError, TypeError, NotImplementedError):
        return torch.zeros(())
    error = _largest(exact - outputs, outputs.isfinite() & exact.isfinite())
    return torch.maximum(error, error.median())  # Of one sample, it may vanish by chance.


def _first_difference(bounded: Any, model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """A sentence that names the first operation of ``model`` whose result no node of ``bounded`` has."""
    nodes = [getattr(node, "forward_value", None) for node in bounded._modules.values()]
    values = [value.flatten() for value in nodes if isinstance(value, Tensor) and value.is_floating_point()]
    missing: list[str] = []

    def look(name: str, args: Any, kwargs: Any, result: Any) -> None:
        if missing or name in _NOT_COMPUTED or not (isinstance(result, Tensor) and result.is_floating_point()):
            return
        candidates = [value for value in values if value.numel() == result.numel()]
        if not any(torch.allclose(value, result.flatten().to(value), 1e-4, 1e-5, True) for value in candidates):
            missing.append(f"{name} in module {recorder.running[-1] if recorder.running else repr('')}")

    recorder = Recorder(look)
    recorder.run(model, inputs)
    first = f"They first differ at {missing[0]}: write it" if missing else "Write the network"
    return f"{first} with other operators"
