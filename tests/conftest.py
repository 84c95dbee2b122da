from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from lirpa_fastwarmup import data

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    """Eight 1×8×8 images."""
    return torch.rand(8, 1, 8, 8)


@pytest.fixture
def y() -> Tensor:
    """Their labels, of three classes."""
    return torch.arange(8) % 3


@pytest.fixture(scope="session", autouse=True)
def _digits_read_once() -> Iterator[None]:
    # Reading the 5,000 digits takes seconds, and a dozen tests train on some of them.
    read = data.LOADERS["mnist5k"]
    data.LOADERS["mnist5k"] = functools.cache(read)
    yield
    data.LOADERS["mnist5k"] = read
