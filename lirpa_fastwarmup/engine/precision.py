"""Context managers that change settings temporarily.

Settings of the whole process are guarded by a lock, so that only one thread bounds networks at a time.
"""

import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

# Rounding errors of bounds, relative to the size of the values.
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}
_LOCK = threading.RLock()
_backends: Any = torch.backends  # Its type stubs are incomplete.


class _Products(NamedTuple):
    """A setting that lets float32 products be rounded to TF32 or bfloat16, with its values for exact ones and TF32."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    exact: Any = "ieee"
    tf32: Any = "tf32"


def _attribute(holder: Any, name: str, *values: Any) -> _Products:
    return _Products(functools.partial(getattr, holder, name), functools.partial(setattr, holder, name), *values)


# The settings of products on the GPU, and of all products.
if hasattr(_backends.cudnn, "conv"):  # Since PyTorch 2.9, which rejects a mixture with the older settings.
    _ON_GPU = [_attribute(one, "fp32_precision") for one in (_backends.cuda.matmul, _backends.cudnn.conv)]
    _others = (_backends.cudnn.rnn, _backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn)
    _COARSE = [*_ON_GPU, *(_attribute(one, "fp32_precision") for one in _others)]
else:
    _matmul = _Products(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high")
    _ON_GPU = [_matmul, _attribute(_backends.cudnn, "allow_tf32", False, True)]
    _COARSE = list(_ON_GPU)
    if getattr(_backends.mkldnn, "allow_tf32", None) is not None:  # Of Intel GPUs.
        _COARSE.append(_attribute(_backends.mkldnn, "allow_tf32", False, True))


@contextmanager
def temporarily(holders: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Set the attribute ``name`` of all ``holders`` to ``value``, and restore it on exit."""
    with ExitStack() as stack:
        for holder in holders:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        yield


@contextmanager
def _float32_products(settings: Sequence[_Products], tf32: bool) -> Iterator[None]:
    with _LOCK, ExitStack() as stack:
        for setting in settings:
            stack.callback(setting.write, setting.read())
            setting.write(setting.tf32 if tf32 else setting.exact)
        yield


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """Before PyTorch 2.6, keep compiled functions from installing their compiler, which they do at every call."""
    eval_frame: Any = importlib.import_module("torch._dynamo.eval_frame")
    install = eval_frame.set_eval_frame
    with ExitStack() as stack, temporarily([eval_frame], "set_eval_frame", lambda _: install(None)):
        stack.callback(install, install(None))
        yield


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Run eagerly, without autocast, TF32 or bfloat16 products, and restore the process's settings on exit."""
    on_cpu, on_device = torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False)
    with _float32_products(_COARSE, tf32=False):  # It holds a lock, and a stance changes when it is made.
        set_stance = getattr(torch.compiler, "set_stance", None)
        with set_stance("force_eager") if set_stance else _without_dynamo(), on_cpu, on_device:
            yield


def products_in_tf32(allowed: bool) -> AbstractContextManager[None]:
    """Round the inputs of float32 products on a GPU to TF32, or not, and restore the process's settings on exit."""
    return _float32_products(_ON_GPU, allowed)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create tensors without a given dtype in ``dtype``, if that is a floating-point dtype."""
    with _LOCK, ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        if dtype.is_floating_point:
            torch.set_default_dtype(dtype)
        yield
