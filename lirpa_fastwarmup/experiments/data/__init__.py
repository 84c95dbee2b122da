"""Datasets as tensors of bytes, and batches made from them. Nothing here knows of bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lirpa_fastwarmup.experiments.data import cifar10, imagenet64, mnist, mnist5k, npz, tiny_imagenet
from lirpa_fastwarmup.experiments.data.augmentation import Augmentation
from lirpa_fastwarmup.experiments.data.batches import Batches
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
    "mnist5k": mnist5k.load,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "tiny-imagenet": tiny_imagenet.load,
    "imagenet64": imagenet64.load,
    "npz": npz.load,
}


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset called ``name``, from files in ``data_dir`` where it is made of files.

    Without ``data_dir``, files come from the user's cache; what is missing there is downloaded, where it can be.

    Raises:
        ValueError: no dataset has that name, and the text lists those there are; or a file is damaged.
        OSError: files are missing; the text names them.
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
