"""Datasets as uint8 tensors, and batches made from them; independent of bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lirpa_fastwarmup.experiments.data import cifar10, imagenet, mnist, npz
from lirpa_fastwarmup.experiments.data.batches import Augmentation, Batches
from lirpa_fastwarmup.experiments.data.dataset import (
    Dataset,
    Split,
    generator_of,
    held_out,
    limited,
    place,
    spread,
    spread_indices,
)
from lirpa_fastwarmup.experiments.data.download import CorruptFileError

LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    "mnist5k": mnist.load_5k,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "tiny-imagenet": imagenet.load_tiny,
    "imagenet64": imagenet.load_64,
    "npz": npz.load,
}


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load the dataset ``name`` from ``data_dir`` or, by default, from the user's cache, downloading it if needed.

    Raises:
        ValueError: the name is unknown; or, as :class:`CorruptFileError`, a file is damaged.
        OSError: files are missing or cannot be downloaded; the message names them and the folder.
        ImportError: the dataset needs a package that is not installed.
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
    "spread",
    "spread_indices",
]
