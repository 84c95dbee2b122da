"""A dataset as two tensors, and batches made from it by indexing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width), uint8 from 0 to 255, and labels (n,), int64."""

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

    def to(self, device: torch.device | str) -> Split:
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Split:
        """The samples at ``indices``, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and the name that results on them are reported under."""

    name: str
    classes: int
    train: Split
    test: Split

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


class Batches:
    """An epoch's batches of a split, as ``(x, y)`` with x float in [0, 1].

    The last, shorter batch is kept, unless ``drop_single`` and it is of one sample (which BatchNorm
    cannot be trained on).

    Args:
        split: the samples, on the device that batches are wanted on.
        batch_size: samples in a batch.
        generator: shuffles every epoch anew; without one, batches come in the split's order.
        drop_single: leave out a last batch of one sample.

    Raises:
        ValueError: ``batch_size`` is less than 1, or no batch would be left.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        drop_single: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size must be at least 1, found {batch_size}")
        self.split = split
        self.batch_size = batch_size
        self.generator = generator
        whole, rest = divmod(len(split), batch_size)
        keep_rest = rest > 1 or (rest == 1 and not drop_single)
        self._count = whole + keep_rest
        if self._count == 0 or (drop_single and batch_size == 1):
            raise ValueError(
                f"{len(split)} sample(s) in batches of {batch_size} leave no batch of two, which BatchNorm needs to be "
                "trained: use more samples or larger batches"
            )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.split), self.split.labels.device
        if self.generator is None:
            order = torch.arange(count, device=device)
        else:
            order = torch.randperm(count, generator=self.generator).to(device)
        for batch in range(self._count):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.split.images[chosen].float() / 255, self.split.labels[chosen]
