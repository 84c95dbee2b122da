"""A user's own dataset: ``train.npz`` and ``test.npz``, each with ``images`` and ``labels``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split, check_labels
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, missing_files

_FILES = ("train.npz", "test.npz")
_CHANNELS = (1, 3, 4)
_CHUNK = 4096
_MAX_CLASSES = 1_000_000


def load(data_dir: Path | None = None) -> Dataset:
    """The dataset in ``data_dir``, named after that folder, with the mean and std of its training pixels.

    ``images`` is uint8 of shape (n, height, width), (n, channels, height, width) or (n, height, width, channels) with
    1, 3 or 4 channels; ``labels`` is integers (n,) from 0.
    """
    if data_dir is None:
        raise ValueError(f"the dataset npz needs a folder with {' and '.join(_FILES)}: pass it as --data-dir")
    folder = Path(data_dir)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise missing_files("the dataset npz", missing, folder)
    train, test = (_read_split(folder / name) for name in _FILES)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"images have shape {tuple(train.images.shape[1:])} in {folder / _FILES[0]}, but "
            f"{tuple(test.images.shape[1:])} in {_FILES[1]}: a network accepts one shape"
        )
    mean, std = _mean_and_std(train.images)
    classes = 1 + max(int(train.labels.max()), int(test.labels.max()))
    return Dataset(name=folder.resolve().name, classes=classes, train=train, test=test, mean=mean, std=std)


def read_npz(path: Path, content: str, *names: str) -> list[np.ndarray]:
    """The arrays ``names`` of an npz file; messages describe its content as ``content``."""
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                missing = [name for name in names if name not in arrays]
                if missing:
                    raise ValueError(f"it has no array {missing[0]!r}; it has {', '.join(arrays.files) or 'none'}")
                return [arrays[name] for name in names]
        except Exception as error:  # numpy and zipfile fail in many ways on damaged files.
            hint = "it contains pickled objects, or is not an npz file" if "allow_pickle" in str(error) else str(error)
            raise CorruptFileError(
                f"{path} is not a valid npz file of {content} ({hint}): write plain arrays with numpy.savez"
            ) from error


def _read_split(path: Path) -> Split:
    images, labels = read_npz(path, "images and labels", "images", "labels")
    return Split(_to_channels_first(images, path), check_labels(labels, len(images), range(_MAX_CLASSES), path))


def _to_channels_first(images: np.ndarray, path: Path) -> Tensor:
    if images.dtype != np.uint8:
        raise ValueError(f"images of {path} are {images.dtype}: store pixels as uint8 from 0 to 255")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in _CHANNELS and images.shape[3] in _CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in _CHANNELS or len(images) == 0:
        raise ValueError(
            f"images of {path} have shape {images.shape}: expected (n, height, width), or four dimensions with 1, 3 or "
            "4 channels in second or last place"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in images.split(_CHUNK):
        pixels = chunk.double().transpose(0, 1).flatten(1) / 255
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # A constant channel is not scaled.
    return tuple(mean.tolist()), tuple(std.tolist())
