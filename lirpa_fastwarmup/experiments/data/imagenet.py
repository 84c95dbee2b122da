"""The two versions of ImageNet with 64×64 pixels: Tiny-ImageNet from JPEG files, ImageNet64 from npz batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.arrays import open_npz
from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split, check_labels, unflatten
from lirpa_fastwarmup.experiments.data.download import (
    CorruptFileError,
    Source,
    dataset_folder,
    extracted_folder,
    missing_files,
)
from lirpa_fastwarmup.storage import locked, read_json, write_json

logger = logging.getLogger(__name__)

_SHAPE = (3, 64, 64)
TINY_SOURCE = Source(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "md5:90528d7ca1a48142e341f4ef8d21d0de",
)
_WNIDS, _ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"
_THREADS = 8  # Pillow releases the GIL while it decodes.
_BATCHES = {"train": [f"train_data_batch_{number}.npz" for number in range(1, 11)], "test": ["val_data.npz"]}
_CLASSES = 1000


def load_tiny(data_dir: Path | None = None) -> Dataset:
    """Tiny-ImageNet, 100,000 training images in 200 classes; its 10,000 validation images are the test set.

    ``data_dir`` is the folder ``tiny-imagenet-200``, or contains it or its archive.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("Tiny-ImageNet needs Pillow: pip install 'lirpa_fastwarmup[images]'") from error
    required = [_WNIDS, _ANNOTATIONS]
    folder = extracted_folder("Tiny-ImageNet", "tiny-imagenet", data_dir, TINY_SOURCE, "tiny-imagenet-200", required)
    classes = {name: number for number, name in enumerate(sorted((folder / _WNIDS).read_text().split()))}
    train, test = _decode(_training_files(folder, classes)), _decode(_validation_files(folder, classes))
    mean, std = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
    return Dataset(name="Tiny-ImageNet", classes=len(classes), train=train, test=test, mean=mean, std=std)


def _training_files(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    files: list[tuple[Path, int]] = []
    for name, number in classes.items():
        images = folder / "train" / name / "images"
        found = sorted(images.glob("*.JPEG"))
        if not found:
            raise missing_files("Tiny-ImageNet", [f"JPEG files of the class {name}"], images)
        files += [(path, number) for path in found]
    return files


def _validation_files(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    files, annotations = [], folder / _ANNOTATIONS
    for line in annotations.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in classes:
            raise CorruptFileError(
                f"{annotations} has the line {line!r}, which is not a file and a class of {_WNIDS}: download the "
                "dataset again"
            )
        files.append((folder / "val" / "images" / fields[0], classes[fields[1]]))
    if not files:
        raise CorruptFileError(f"{annotations} is empty: download the dataset again")
    return files


def _decode(files: Sequence[tuple[Path, int]]) -> Split:
    images = torch.empty(len(files), *_SHAPE, dtype=torch.uint8)

    def decode(position: int) -> None:
        images[position] = torch.from_numpy(_read_jpeg(files[position][0])).permute(2, 0, 1)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(decode, range(len(files))))  # Raises the first error of a thread.
    return Split(images, torch.tensor([number for _, number in files]))


def _read_jpeg(path: Path) -> np.ndarray:
    """The image in ``path``, uint8 of shape (height, width, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise missing_files("Tiny-ImageNet", [path.name], path.parent) from None
    except Exception as error:  # Pillow fails in many ways on damaged files.
        raise CorruptFileError(f"{path} cannot be decoded ({error}): download the dataset again") from error
    if pixels.shape != (64, 64, 3):
        raise CorruptFileError(f"{path} is an image of {pixels.shape[1]}×{pixels.shape[0]} pixels, not 64×64")
    return pixels


def load_64(data_dir: Path | None = None) -> Dataset:
    """ImageNet64, 1,281,167 training images in 1,000 classes; its 50,000 validation images are the test set.

    The batches in ``data_dir`` are unpacked once, into one file of pixels for each split (15.7 GB and 0.6 GB), which is
    memory-mapped. These files are in the same folder, or in the user's cache if that folder is read-only.
    """
    folder = dataset_folder("imagenet64", data_dir)
    missing = [name for names in _BATCHES.values() for name in names if not (folder / name).is_file()]
    if missing:
        hint = ". To download them, register at image-net.org: Downsampled image data, 64×64, npz format"
        raise missing_files("ImageNet64", missing, folder, hint)
    train, test = (_map_split(split, [folder / name for name in names]) for split, names in _BATCHES.items())
    mean, std = (0.4810, 0.4574, 0.4078), (0.2605, 0.2533, 0.2683)
    return Dataset(name="ImageNet64", classes=_CLASSES, train=train, test=test, mean=mean, std=std)


def _map_split(split: str, batches: Sequence[Path]) -> Split:
    folder = batches[0].parent
    if not os.access(folder, os.W_OK):
        folder = dataset_folder("imagenet64")
        folder.mkdir(parents=True, exist_ok=True)
    pixels, index_path = folder / f"{split}_pixels.npy", folder / f"{split}_index.json"
    origin = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in batches]
    index: dict[str, Any] = {}
    with locked(folder, wait=True):  # Another process may be unpacking the same batches.
        with suppress(OSError, ValueError):
            index = read_json(index_path)
        if not pixels.is_file() or index.keys() != {"origin", "labels"} or index["origin"] != origin:
            index = {"origin": origin, "labels": _unpack(batches, pixels).tolist()}
            write_json(index_path, index)  # Last: pixels without a matching index are unpacked again.
    # Copy-on-write, because torch warns of read-only arrays.
    images = torch.from_numpy(np.load(pixels, mmap_mode="c"))
    return Split(images, torch.tensor(index["labels"], dtype=torch.int64))


def _unpack(batches: Sequence[Path], pixels: Path) -> Tensor:
    """Write the pixels of all batches to ``pixels``, and return the labels."""
    logger.info("unpacking %d batches into %s", len(batches), pixels)
    labels = []
    for path in batches:
        with open_npz(path, "an ImageNet64 batch") as arrays:
            numbers = arrays["labels"]
        labels.append(check_labels(numbers, numbers.size, range(1, _CLASSES + 1), path))
    partial = pixels.with_name(f"{pixels.name}.part")
    try:
        shape = (sum(map(len, labels)), *_SHAPE)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        start = 0
        for path, count in zip(batches, map(len, labels), strict=True):
            with open_npz(path, "an ImageNet64 batch") as arrays:
                data = arrays["data"]
            array[start : start + count] = unflatten(data, count, _SHAPE, path)
            start += count
        array.flush()
        partial.replace(pixels)
    finally:
        partial.unlink(missing_ok=True)
    return torch.cat(labels)
