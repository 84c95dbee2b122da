"""Settings of the process's arithmetic, changed under one lock, so threads that bound networks take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

# Rounding errors of bounds, relative to the size of the values.
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}
_backends: Any = torch.backends  # Its type stubs are incomplete.
_ON_GPU: tuple[Any, ...] = (_backends.cuda.matmul, _backends.cudnn.conv)
# The backends that may compute float32 products in TF32 or bfloat16, on the GPU and on the CPU.
_ON_CPU = (_backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn)
_COARSE = (*_ON_GPU, _backends.cudnn.rnn, *_ON_CPU)
_LOCK = threading.RLock()


@contextmanager
def _float32_products(backends: Sequence[Any], precision: str) -> Iterator[None]:
    with _LOCK:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = precision
            yield
        finally:
            for backend, setting in zip(backends, before, strict=True):
                backend.fp32_precision = setting


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Run eagerly, without autocast, TF32 or bfloat16 products, and restore the process's settings on exit."""
    on_cpu, on_device = torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False)
    with _float32_products(_COARSE, "ieee"), torch.compiler.set_stance("force_eager"), on_cpu, on_device:
        yield


def products_in_tf32(allowed: bool) -> AbstractContextManager[None]:
    """Round the inputs of float32 products on a GPU to TF32, or not, and restore the process's settings on exit."""
    return _float32_products(_ON_GPU, "tf32" if allowed else "ieee")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create tensors without a given dtype in ``dtype``, if that is a floating-point dtype."""
    with _LOCK:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype if dtype.is_floating_point else before)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
