"""A dataset of the user's own: ``train.npz`` and ``test.npz``, each with ``images`` and ``labels``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split
from lirpa_fastwarmup.experiments.data.files import missing_files, read_npz

_FILES = ("train.npz", "test.npz")
_CHANNELS = (1, 3, 4)
_CHUNK = 4096
_MOST_CLASSES = 1_000_000


def load(data_dir: Path | None = None) -> Dataset:
    """The dataset in ``data_dir``, named after that folder, with the mean and std of its training pixels.

    ``images`` is uint8 of shape (n, height, width), (n, channels, height, width) or (n, height, width, channels) with
    1, 3 or 4 channels; ``labels`` is integers (n,) from 0.

    Raises:
        ValueError: no folder is named, or an array has another type or shape.
        FileNotFoundError: a file is missing.
        CorruptFileError: a file is damaged, or no npz.
    """
    if data_dir is None:
        raise ValueError(
            f"the dataset npz is a folder of your own with {' and '.join(_FILES)}: name it with --data-dir"
        )
    folder = Path(data_dir)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise missing_files("the dataset npz", missing, folder)
    train, test = (_read_split(folder / name) for name in _FILES)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"images of {folder / _FILES[0]} are of shape {tuple(train.images.shape[1:])}, and those of {_FILES[1]} of "
            f"shape {tuple(test.images.shape[1:])}: a network takes one shape"
        )
    mean, std = _statistics(train.images)
    classes = 1 + max(int(train.labels.max()), int(test.labels.max()))
    return Dataset(name=folder.resolve().name, classes=classes, train=train, test=test, mean=mean, std=std)


def _read_split(path: Path) -> Split:
    arrays = read_npz(path, ("images", "labels"), "images and labels")
    return Split(_images(arrays["images"], path), _labels(arrays["labels"], len(arrays["images"]), path))


def _images(images: np.ndarray, path: Path) -> Tensor:
    if images.dtype != np.uint8:
        raise ValueError(f"images of {path} are {images.dtype}: store pixels as uint8 from 0 to 255")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in _CHANNELS and images.shape[3] in _CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in _CHANNELS or len(images) == 0:
        raise ValueError(
            f"images of {path} are of shape {images.shape}: expected (n, height, width), or four dimensions with 1, 3 "
            "or 4 channels in second or last place"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _labels(labels: np.ndarray, count: int, path: Path) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,) or count == 0 or labels.min() < 0:
        raise ValueError(
            f"labels of {path} must be class numbers from 0, one for each of {count} images; found {labels.dtype} of "
            f"shape {labels.shape}{f', the least {labels.min()}' if labels.size else ''}"
        )
    if labels.max() >= _MOST_CLASSES:
        raise ValueError(f"{path} has the label {labels.max()}: number the classes from 0, without gaps")
    return torch.from_numpy(labels.astype(np.int64))


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in images.split(_CHUNK):
        pixels = part.double().transpose(0, 1).flatten(1) / 255
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
    count = images.numel() / images.shape[1]
    mean = total / count
    # A channel of one value has no width to divide by.
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return tuple(mean.tolist()), tuple(std.tolist())
