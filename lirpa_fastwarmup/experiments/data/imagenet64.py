"""Downscaled ImageNet of 64×64 pixels, from its npz batches, memory-mapped."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split
from lirpa_fastwarmup.experiments.data.download import CorruptFileError
from lirpa_fastwarmup.experiments.data.files import cache_folder, missing_files, read_npz
from lirpa_fastwarmup.storage import locked, read_json, write_json

logger = logging.getLogger(__name__)

_PARTS = {"train": [f"train_data_batch_{number}.npz" for number in range(1, 11)], "test": ["val_data.npz"]}
_SHAPE = (3, 64, 64)
_CLASSES = 1000


def load(data_dir: Path | None = None) -> Dataset:
    """ImageNet64, 1,281,167 training and 50,000 validation images (the test set) in 1,000 classes.

    The batches are unpacked once, into one file of pixels for each split (15.7 GB and 0.6 GB), from which images are
    read as they are needed: beside the batches, or in the user's cache where that folder cannot be written to.

    Args:
        data_dir: folder of the batches; by default the user's cache.

    Raises:
        FileNotFoundError: batches are missing; the text names them, the folder, and where they come from.
        OSError: there is no room to unpack them.
        CorruptFileError: a batch is damaged, or not as in ImageNet64.
    """
    folder = Path(data_dir) if data_dir is not None else cache_folder("imagenet64")
    missing = [name for names in _PARTS.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise missing_files(
            "ImageNet64",
            missing,
            folder,
            ". They cannot be downloaded freely: register at image-net.org, and take "
            "Downsampled image data, 64×64, npz format",
        )
    splits = {part: _split(part, [folder / name for name in names]) for part, names in _PARTS.items()}
    return Dataset(
        name="ImageNet64",
        classes=_CLASSES,
        train=splits["train"],
        test=splits["test"],
        mean=(0.4810, 0.4574, 0.4078),
        std=(0.2605, 0.2533, 0.2683),
    )


def _split(part: str, batches: Sequence[Path]) -> Split:
    folder = batches[0].parent
    if not os.access(folder, os.W_OK):
        folder = cache_folder("imagenet64")
        folder.mkdir(parents=True, exist_ok=True)
    pixels, index = folder / f"{part}_pixels.npy", folder / f"{part}_index.json"
    origin = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in batches]
    with locked(folder, wait=True):  # Another program may be unpacking the same.
        known = _read_index(index)
        if not pixels.is_file() or known is None or known["origin"] != origin:
            known = {"origin": origin, "labels": _unpack(batches, pixels)}
            # Written last: without it, or with another, the pixels are unpacked again.
            write_json(index, known)
    # Private to this process when written to, which nobody does; torch warns of arrays that cannot be written to.
    images = torch.from_numpy(np.load(pixels, mmap_mode="c"))
    return Split(images, torch.tensor(known["labels"], dtype=torch.int64))


def _read_index(path: Path) -> dict[str, Any] | None:
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return None
    return known if known.keys() == {"origin", "labels"} else None


def _unpack(batches: Sequence[Path], pixels: Path) -> list[int]:
    """Write the pixels of all batches to ``pixels``, and return the labels, from 0."""
    logger.info("unpacking %d batches into %s", len(batches), pixels)
    labels = [_labels(path) for path in batches]
    partial = pixels.with_name(f"{pixels.name}.part")
    try:
        count = sum(map(len, labels))
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, *_SHAPE))
        start = 0
        for path, here in zip(batches, labels, strict=True):
            array[start : start + len(here)] = _pixels(path, len(here))
            start += len(here)
        array.flush()
        partial.replace(pixels)
    finally:
        partial.unlink(missing_ok=True)
    return [label for here in labels for label in here]


def _array(path: Path, name: str) -> np.ndarray:
    return read_npz(path, (name,), "a batch of ImageNet64")[name]


def _labels(path: Path) -> list[int]:
    labels = _array(path, "labels")
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not bool(((labels >= 1) & (labels <= _CLASSES)).all()):
        raise CorruptFileError(f"{path} should hold labels from 1 to {_CLASSES}; found {labels.dtype} {labels.shape}")
    return [int(label) - 1 for label in labels]


def _pixels(path: Path, count: int) -> np.ndarray:
    data = _array(path, "data")
    if data.dtype != np.uint8 or data.shape != (count, int(np.prod(_SHAPE))):
        raise CorruptFileError(
            f"{path} should hold uint8 data of shape ({count}, {int(np.prod(_SHAPE))}); found {data.dtype} {data.shape}"
        )
    return data.reshape(count, *_SHAPE)
