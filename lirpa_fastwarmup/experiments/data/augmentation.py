"""Augmentation of whole batches by tensor operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.dataset import moved


@dataclass(frozen=True)
class Augmentation:
    """Random mirroring and random windows of a batch of images.

    Random numbers are drawn on the CPU, first the mirrorings of the batch, then its vertical, then its horizontal
    offsets, so that the same images come out on every device.

    Attributes:
        flip: mirror each image left to right with probability 1/2.
        crop_padding: repeat the edge this many pixels outward, and cut a window of the old size at a place drawn
            uniformly for each image; 0 for none.
        generator: source of the random numbers, on the CPU; by default torch's own.
    """

    flip: bool = False
    crop_padding: int = 0
    generator: torch.Generator | None = None

    def __call__(self, images: Tensor, whole: int | None = None, shard: slice = slice(None)) -> Tensor:
        """The images, augmented; pixels are moved, never mixed.

        Args:
            images: (batch, channels, height, width), uint8.
            whole: the size of a batch that they are a part of, for which random numbers are drawn.
            shard: their places in it.
        """

        def draw(end: int) -> Tensor:
            """Integers from 0 to ``end`` − 1, one for each image."""
            count = len(images) if whole is None else whole
            return moved(torch.randint(end, (count,), generator=self.generator)[shard], images.device)

        if self.flip:
            images = torch.where(draw(2).bool().view(-1, 1, 1, 1), images.flip(3), images)
        if self.crop_padding:
            ends = 2 * self.crop_padding + 1
            images = self._cropped(images, draw(ends), draw(ends))
        return images

    def _cropped(self, images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        # Padding by the edge is reading the edge again: indices are clamped, and nothing is copied twice.
        rows = self._window(vertical, height)
        columns = self._window(horizontal, width)
        index = rows.view(count, height, 1) * width + columns.view(count, 1, width)
        index = index.view(count, 1, height * width).expand(-1, channels, -1)
        return images.flatten(2).gather(2, index).view_as(images)

    def _window(self, offsets: Tensor, size: int) -> Tensor:
        """The rows (or columns) that each window reads, shape (batch, size)."""
        positions = torch.arange(size, device=offsets.device)
        return (offsets.unsqueeze(1) + positions - self.crop_padding).clamp(0, size - 1)
