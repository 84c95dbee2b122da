"""Datasets as tensors in memory. Nothing here knows of bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lirpa_fastwarmup.data import mnist, mnist5k
from lirpa_fastwarmup.data.augmentation import Augmentation
from lirpa_fastwarmup.data.dataset import Batches, Dataset, Split, generator_of, held_out, limited, place
from lirpa_fastwarmup.data.mnist import CorruptFileError

LOADERS: dict[str, Callable[[Path | None], Dataset]] = {"mnist5k": mnist5k.load, "mnist": mnist.load}


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset called ``name``, from files in ``data_dir`` where it is made of files.

    Raises:
        ValueError: no dataset has that name; the text lists those there are.
        FileNotFoundError: files are missing; the text names them.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(LOADERS)}")
    return LOADERS[name](data_dir)


__all__ = [
    "LOADERS",
    "Augmentation",
    "Batches",
    "CorruptFileError",
    "Dataset",
    "Split",
    "generator_of",
    "held_out",
    "limited",
    "load",
    "place",
]
