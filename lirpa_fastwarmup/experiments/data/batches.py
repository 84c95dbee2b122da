"""Batches made from a split by indexing, which can be left off and taken up again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.augmentation import Augmentation
from lirpa_fastwarmup.experiments.data.dataset import Split, moved


class Batches:
    """An epoch's batches of a split, as ``(x, y)`` with x float in [0, 1].

    The last, shorter batch is kept, unless ``drop_single`` and it is of one sample (which BatchNorm
    cannot be trained on). Going through them can be left off in the middle of an epoch and taken up again from
    :meth:`state_dict`, with the same batches as if it had not been.

    Args:
        split: the samples.
        batch_size: samples in a batch.
        generator: shuffles every epoch anew; without one, batches come in the split's order.
        drop_single: leave out a last batch of one sample.
        augment: applied to each batch.
        device: where batches are wanted; by default where the split is.
        shard: (rank, size): of each batch, every size-th sample is given out, from that of number ``rank`` on. Together
            the shards of all ranks are the batch, augmented as it would be in one piece.

    Raises:
        ValueError: ``batch_size`` is less than 1, or no batch would be left, in which each rank has a sample (two, with
            ``drop_single``).
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
        if batch_size < 1:
            raise ValueError(f"batch size must be at least 1, found {batch_size}")
        if size > 1 and batch_size < least:
            raise ValueError(
                f"a batch of {batch_size} over {size} processes leaves some of them less than the {least // size} "
                "sample(s) that they need: the batch size is that of all processes together; use larger batches, or "
                "fewer processes"
            )
        self.split = split
        self.batch_size = batch_size
        self.generator = generator
        self.augment = augment
        self.device = split.labels.device if device is None else device
        whole, rest = divmod(len(split), batch_size)
        self._count = whole + (rest >= least)
        self._shard = slice(rank, None, size)
        if self._count == 0 or (drop_single and batch_size == 1):
            raise ValueError(
                f"{len(split)} sample(s) in batches of {batch_size} leave no batch of two, which BatchNorm needs to be "
                "trained: use more samples or larger batches"
            )
        self._position = 0  # Batches given out of the present epoch.
        self._first = 0  # Where the next pass begins, after a state was loaded.
        self._order_state: Tensor | None = None  # The generator's, before it shuffled the present epoch.

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a new epoch; right after :meth:`load_state_dict`, those left of the one that was left off."""
        first, self._first = self._first, 0
        order = self._order()
        for batch in range(first, self._count):
            together = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            chosen = together[self._shard]
            images, labels = self.split.images[chosen], self.split.labels[chosen]
            images, labels = moved(images, self.device), moved(labels, self.device)
            if self.augment is not None:
                images = self.augment(images, len(together), self._shard)
            self._position = batch + 1
            yield images.float() / 255, labels

    def samples_in(self, batch: int) -> int:
        """The samples of batch number ``batch``, counted from 0, in all shards together."""
        return min(self.batch_size, len(self.split) - batch * self.batch_size)

    def _order(self) -> Tensor:
        count, device = len(self.split), self.split.labels.device
        if self.generator is None:
            return torch.arange(count, device=device)
        self._order_state = self.generator.get_state()
        return torch.randperm(count, generator=self.generator).to(device)

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch the batches stand, as plain values and tensors."""
        within = 0 < self._position < self._count
        order = self._order_state if within else _state_of(self.generator)
        augmentation = None if self.augment is None else _state_of(self.augment.generator)
        return {"position": self._position if within else 0, "order": order, "augmentation": augmentation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on from where :meth:`state_dict` was taken: bit for bit, with the same samples.

        Raises:
            ValueError: the state is of batches with other sources of random numbers.
        """
        sources = {"order": self.generator, "augmentation": None if self.augment is None else self.augment.generator}
        for name, generator in sources.items():
            if (state[name] is None) is not (generator is None):
                raise ValueError(f"the state of these batches does not fit: they differ in their random {name}")
        for name, generator in sources.items():
            if generator is not None:
                generator.set_state(state[name])
        self._first = self._position = int(state["position"])


def _state_of(generator: torch.Generator | None) -> Tensor | None:
    return None if generator is None else generator.get_state()
