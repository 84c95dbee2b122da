"""Datasets as tensors, and batches made from them; independent of bounds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lirpa_fastwarmup.boxes import InputRange
from lirpa_fastwarmup.experiments.data import arrays, cifar10, imagenet, mnist
from lirpa_fastwarmup.experiments.data.batches import Augmentation, Batches
from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split, held_out, limited, place, spread, spread_indices
from lirpa_fastwarmup.experiments.data.download import CorruptFileError

LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    "mnist5k": mnist.load_5k,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "tiny-imagenet": imagenet.load,
    "npz": arrays.load,
}


def is_factory(name: str) -> bool:
    """Whether ``name`` names a function to import, as `package.module:factory` or `path/to/file.py:factory`."""
    return ":" in name and Path(name).suffix not in arrays.READERS


def load(name: str, data_dir: Path | None = None, input_range: InputRange | None = None) -> Dataset:
    """Load a dataset.

    Args:
        name: one of :data:`LOADERS`; an ``.npz``, ``.pt`` or ``.csv`` file; a folder of such files; or a factory,
            `package.module:factory` or `path/to/file.py:factory`, whose code is run.
        data_dir: folder of the files; by default, the one in ``name``, or the user's cache, for downloads.
        input_range: lowest and highest valid input, in place of the dataset's own.

    Raises:
        ValueError: the name is unknown; the data is no dataset; or, as :class:`CorruptFileError`, a file is damaged.
        OSError: files are missing or cannot be downloaded; the message names them and the folder.
        ImportError: the dataset needs a package that is not installed, or there is no such factory.
        TypeError: a factory returns no dataset.
    """
    path = Path(name)
    if name in LOADERS:
        dataset = LOADERS[name](data_dir)
    elif is_factory(name):
        dataset = arrays.from_factory(name)
    elif path.suffix in arrays.READERS or path.is_dir():
        dataset = arrays.load(path if data_dir is None else Path(data_dir) / path.name)
    else:
        own = "FILE.npz, FILE.pt, FILE.csv, a folder of such files, package.module:factory or path/to/file.py:factory"
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(LOADERS)}, or name your own: {own}")
    return dataset if input_range is None else dataclasses.replace(dataset, input_range=input_range)


__all__ = ["LOADERS", "Augmentation", "Batches", "CorruptFileError", "Dataset", "Split", "held_out", "is_factory"]
__all__ += ["limited", "load", "place", "spread", "spread_indices"]
