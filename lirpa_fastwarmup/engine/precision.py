"""Arithmetic as its dtype promises: what is gained in speed by rounding coarser is switched off.

What is set here is the whole process's, also that of its other threads. It is set and restored under one lock, so that
threads that bound networks at the same time take turns, and leave everything as they found it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Rounding that bounds may be off by, relative to the size of what is bounded.
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}
_backends: Any = torch.backends  # Their types leave parts out.
# Whatever may do float32 products in TF32 or bfloat16, on the GPU and on the CPU.
_COARSE: tuple[Any, ...] = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.cudnn.rnn,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
    _backends.mkldnn.rnn,
)
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Eager, without autocast, TF32 or bfloat16 products, whatever the process was set to; restored afterwards.

    What is left is the rounding of the tensors' own dtype.
    """
    with _ONE_AT_A_TIME, ExitStack() as stack:
        before = [backend.fp32_precision for backend in _COARSE]
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for backend in _COARSE:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(_COARSE, before, strict=True):
                backend.fp32_precision = precision


@contextmanager
def products_in_tf32(allowed: bool) -> Iterator[None]:
    """Float32 products on a GPU with their inputs rounded to TF32, or not, whatever the process was set to."""
    on_gpu = [_backends.cuda.matmul, _backends.cudnn.conv]
    with _ONE_AT_A_TIME:
        before = [backend.fp32_precision for backend in on_gpu]
        try:
            for backend in on_gpu:
                backend.fp32_precision = "tf32" if allowed else "ieee"
            yield
        finally:
            for backend, precision in zip(on_gpu, before, strict=True):
                backend.fp32_precision = precision


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let tensors that are made without a dtype be of ``dtype``, if that is one of floating-point numbers."""
    if not dtype.is_floating_point:
        yield
        return
    with _ONE_AT_A_TIME:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
