"""A dataset as tensors: its splits, what is drawn from them, and where they are."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_HELD_OUT = 1  # The stream of random numbers beside the one that `limited` draws from.


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width), uint8 from 0 to 255, and labels (n,), int64.

    Images may be memory-mapped: batches then read what they need from the file.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"expected uint8 images (n, c, h, w), found {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"expected int64 labels, one for each of {len(self.images)} images; found {self.labels.dtype} "
                f"{tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> Tensor:
        """The images as networks read them: (samples, channels, height, width), from 0 to 1."""
        return self.images.float() / 255

    def to(self, device: torch.device | str) -> Split:
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Split:
        """The samples at ``indices``, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and the name that results on them are reported under.

    ``mean`` and ``std`` are those that its pixels, from 0 to 1, are usually normalised by, one per channel; ``None``
    where they are usually left as they are.
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def limited(split: Split, count: int, *, seed: int) -> Split:
    """``count`` samples of ``split``, drawn without replacement by ``seed``.

    Raises:
        ValueError: ``count`` is less than 1 or more than there are.
    """
    if not 1 <= count <= len(split):
        raise ValueError(f"the training set has {len(split)} samples; cannot limit it to {count}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[:count].to(split.labels.device))


def spread(split: Split, count: int) -> Split:
    """``count`` samples at even distances over ``split``, which may be sorted by class; all, if it has fewer."""
    return split.take(spread_indices(len(split), count).to(split.labels.device))


def spread_indices(length: int, count: int) -> Tensor:
    """``count`` indices at even distances from 0 to below ``length``; all, if there are fewer."""
    count = min(count, length)
    return torch.arange(count) * length // count


def held_out(split: Split, count: int, *, seed: int) -> tuple[Split, Split]:
    """``split`` without ``count`` of its samples, drawn by ``seed``, and these.

    Raises:
        ValueError: ``count`` is less than 1, or nothing would be left.
    """
    if not 1 <= count < len(split):
        raise ValueError(f"the training set has {len(split)} samples; cannot hold out {count} of them")
    order = torch.randperm(len(split), generator=generator_of(seed, _HELD_OUT)).to(split.labels.device)
    return split.take(order[count:]), split.take(order[:count])


def generator_of(seed: int, stream: int) -> torch.Generator:
    """A generator on the CPU, independent of those of the same seed and other streams."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; on its way to a GPU, nothing waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # From other memory, copies block.
    return tensor.to(device)


def place(split: Split, device: torch.device) -> Split:
    """``split`` on ``device``, if its images take less than half of the memory that is free there.

    Otherwise it stays where it is, and its batches travel.
    """
    if device.type == "cuda" and split.images.device.type != "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = split.images.numel()
        if size > free / 2:
            logger.info("images take %.1f GB, and %.1f GB are free on %s: they stay", size / 1e9, free / 1e9, device)
            return split
        return split.to(device)
    return split
