"""Datasets as tensors of bytes or floats, and subsets of them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import InputRange, inputs_error, inputs_fit
from lirpa_fastwarmup.experiments.data.download import CorruptFileError
from lirpa_fastwarmup.storage import add_to_hash

logger = logging.getLogger(__name__)

_HASHED = 100  # Samples.
_HELD_OUT = 1  # Stream of random numbers, independent of the one that `limited` draws from.


@dataclass(frozen=True)
class Split:
    """Samples and their labels (n,), int64.

    Samples are pixels (n, channels, height, width), uint8 from 0 to 255, or inputs of any shape (n, …), float32. They
    may be memory-mapped: batches then read what they need from the file.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        pixels = images.dtype == torch.uint8 and images.ndim == 4
        if not pixels and (images.dtype != torch.float32 or images.ndim < 2):
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"expected uint8 images (n, c, h, w), or float32 inputs (n, …); found {found}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"expected {len(images)} int64 labels; found {labels.dtype} {tuple(labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def as_inputs(images: Tensor) -> Tensor:
        """Samples as input of a network: pixels from 0 to 1, and floats as they are."""
        return images.float() / 255 if images.dtype == torch.uint8 else images

    @property
    def inputs(self) -> Tensor:
        """The samples as input of a network, float (samples, …)."""
        return self.as_inputs(self.images)

    @property
    def digest(self) -> str:
        """A short hash of the labels and of some samples."""
        hashed = hashlib.sha256()
        add_to_hash(hashed, (self.labels, spread(self, _HASHED).images))
        return hashed.hexdigest()[:12]

    def take(self, indices: Tensor) -> Split:
        """The samples at ``indices``, on the CPU or the samples' device, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and the name of the dataset in reports.

    ``mean`` and ``std``, one per channel or feature, are usually used to normalise its inputs; ``None`` for no
    normalisation. ``input_range`` is the lowest and highest valid input, numbers or tensors: from 0 to 1 for pixels,
    and ``None``, no range, by default for floats. Raises ValueError if shapes of the splits differ, a label is not a
    class, or a float is not finite or out of range.
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_range: InputRange | None = None

    def __post_init__(self) -> None:
        train, test = (f"{tuple(split.images.shape[1:])} ({split.images.dtype})" for split in (self.train, self.test))
        if train != test:
            raise ValueError(f"{self.name} has training samples {train} and test samples {test}: a network accepts one")
        if self.train.images.dtype == torch.uint8:
            low, high = (0.0, 1.0) if self.input_range is None else self.input_range
            object.__setattr__(self, "input_range", (low, high))
            if bool((torch.as_tensor(low) < 0).any()) or bool((torch.as_tensor(high) > 1).any()):
                text = f"pixels of {self.name} reach the network from 0 to 1, bytes over 255, and the input range is "
                raise ValueError(text + f"from {low} to {high}: give the range, and eps, in these units")
        for title, split in (("training", self.train), ("test", self.test)):
            self._check(title, split)

    def _check(self, title: str, split: Split) -> None:
        images, labels = split.images, split.labels
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            found = f"labels from {int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"the {title} set of {self.name} has {self.classes} classes, but {found}")
        if images.dtype == torch.uint8 or bool(inputs_fit(images, self.input_range)):
            return
        if bad := (~images.isfinite()).nonzero().tolist():
            row, *columns = bad[0]
            found = f"{float(images[row, *columns])} in row {row}, column {', '.join(map(str, columns))} (from 0)"
            raise ValueError(f"the {title} set of {self.name} holds {found}: replace it, or leave the sample out")
        raise inputs_error(images, self.input_range)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of a sample: (channels, height, width) of an image."""
        return tuple(self.train.images.shape[1:])


def check_labels(labels: np.ndarray, count: int, classes: int, path: Path | str) -> Tensor:
    """The labels of ``count`` samples, read from ``path``, checked."""
    whole = labels.dtype.kind in "iu" and labels.shape == (count,) and count > 0
    if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        expected = f"integer labels from 0 to {classes - 1}, one for each of {count} samples"
        ends = f" from {labels.min()} to {labels.max()}" if whole else ""
        raise CorruptFileError(f"{path} should contain {expected}; found {labels.dtype} {labels.shape}{ends}")
    return torch.from_numpy(labels.astype(np.int64))


def limited(split: Split, count: int, *, seed: int) -> Split:
    """``count`` samples of ``split``, drawn without replacement."""
    if not 1 <= count <= len(split):
        raise ValueError(f"the training set has {len(split)} samples; cannot limit it to {count}")
    return split.take(torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count])


def held_out(split: Split, count: int, *, seed: int) -> tuple[Split, Split]:
    """``split`` without ``count`` samples drawn at random, and these samples."""
    if not 1 <= count < len(split):
        raise ValueError(f"the training set has {len(split)} samples; cannot hold out {count} of them")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed_of(seed, _HELD_OUT)))
    return split.take(order[count:]), split.take(order[:count])


def spread(split: Split, count: int) -> Split:
    """``count`` evenly spaced samples of ``split``, which may be sorted by class; all samples if it has fewer."""
    return split.take(spread_indices(len(split), count))


def spread_indices(length: int, count: int) -> Tensor:
    """``count`` evenly spaced indices from 0 to below ``length``; all indices if there are fewer."""
    count = min(count, length)
    return torch.arange(count) * length // count


def seed_of(seed: int, *stream: int) -> int:
    """The seed of a stream of random numbers, independent of the other streams of ``seed``."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]) >> 1


def place(split: Split, device: torch.device) -> Split:
    """``split`` on ``device``, if its samples take less than half of the free memory there; else ``split`` itself."""
    if device.type != "cuda" or split.images.device.type == "cuda":
        return split
    free, size = torch.cuda.mem_get_info(device)[0], split.images.nbytes
    if size <= free / 2:
        return Split(split.images.to(device), split.labels.to(device))
    logger.info("samples take %.1f GB of %.1f GB free on %s: batches are copied", size / 1e9, free / 1e9, device)
    return split
