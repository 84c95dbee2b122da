"""Batches of a split, made by indexing and augmented as a whole; they can be resumed within an epoch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.dataset import Split


@dataclass(frozen=True)
class Augmentation:
    """Random horizontal flips, and random crops after padding by pixels of the edge, of a batch of images.

    Drawn on the CPU (flips, then vertical, then horizontal offsets), so that every device yields the same images.
    """

    flip: bool = False
    crop_padding: int = 0
    generator: torch.Generator | None = None  # On the CPU; by default torch's own.

    def __call__(self, images: Tensor, whole: int | None = None, shard: slice = slice(None)) -> Tensor:
        """Augment images (batch, channels, height, width), the ``shard`` of a batch of ``whole`` images."""

        def draw(end: int) -> Tensor:
            drawn = torch.randint(end, (whole or len(images),), generator=self.generator)
            return _move(drawn[shard], images.device)

        if self.flip:
            images = torch.where(draw(2).bool().view(-1, 1, 1, 1), images.flip(3), images)
        if self.crop_padding:
            (channels, height, width), offsets = images.shape[1:], 2 * self.crop_padding + 1
            rows, columns = self._window(draw(offsets), height), self._window(draw(offsets), width)
            index = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1)  # Of the pixels, row by row.
            images = images.flatten(2).gather(2, index.unsqueeze(1).expand(-1, channels, -1)).view_as(images)
        return images

    def _window(self, offsets: Tensor, size: int) -> Tensor:
        """The rows (or columns) that each window reads, shape (batch, size); clamping them pads by the edge."""
        positions = torch.arange(size, device=offsets.device)
        return (offsets.unsqueeze(1) + positions - self.crop_padding).clamp(0, size - 1)


class Batches:
    """The batches of an epoch, as ``(x, y)`` with x float, pixels from 0 to 1.

    The last batch may be shorter; ``drop_single`` drops one of a single sample, which BatchNorm cannot be trained on.
    An epoch can be interrupted and resumed from :meth:`state_dict`, with the same batches. With ``shard``, (rank,
    size), each batch is every size-th sample, from sample ``rank`` on, of the batch of a single process.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        drop_single: bool = False,
        augment: Augmentation | None = None,
        device: torch.device | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        rank, size = shard
        least = size * (2 if drop_single else 1)
        self.split, self.batch_size = split, batch_size
        self.generator, self.augment = generator, augment
        self.device = split.labels.device if device is None else device
        self._shard = slice(rank, None, size)
        if min(batch_size, len(split)) < least:
            needed = "two samples (BatchNorm cannot be trained on one)" if drop_single else "a sample"
            problem = f"{len(split)} sample(s) in batches of {batch_size} leave no batch with {needed} for each"
            raise ValueError(f"{problem} of {size} process(es): use more samples, larger batches, or fewer processes")
        complete, rest = divmod(len(split), batch_size)
        self._count = complete + (rest >= least)
        self._generators = {"order": generator, "augmentation": None if augment is None else augment.generator}
        self._position = 0  # Batches of the current epoch that were yielded.
        self._first = 0  # First batch of the next iteration, after a state was loaded.
        self._order_state: Tensor | None = None  # State of the generator before it shuffled the current epoch.

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a new epoch or, right after :meth:`load_state_dict`, the rest of the interrupted one."""
        first, self._first = self._first, 0
        order = torch.arange(len(self.split))
        if self.generator is not None:
            self._order_state = self.generator.get_state()
            order = torch.randperm(len(self.split), generator=self.generator)
        order = order.to(self.split.labels.device)
        for batch in range(first, self._count):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            local = indices[self._shard]
            images, labels = (_move(whole[local], self.device) for whole in (self.split.images, self.split.labels))
            if self.augment is not None:
                images = self.augment(images, len(indices), self._shard)
            self._position = batch + 1
            yield Split.as_inputs(images), labels

    def samples_in(self, batch: int) -> int:
        """Number of samples of batch ``batch`` (from 0) in all shards together."""
        return min(self.batch_size, len(self.split) - batch * self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, and the states of the generators."""
        states = {name: None if source is None else source.get_state() for name, source in self._generators.items()}
        if 0 < self._position < self._count:
            return {"position": self._position, **states, "order": self._order_state}
        return {"position": 0, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume with the next iteration where :meth:`state_dict` was taken, with identical batches."""
        for name, generator in self._generators.items():
            if (state[name] is None) is not (generator is None):
                raise ValueError(f"the state does not fit these batches: they differ in their random {name}")
            if generator is not None:
                generator.set_state(state[name])
        self._first = self._position = int(state["position"])
        self._order_state = state["order"]


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
