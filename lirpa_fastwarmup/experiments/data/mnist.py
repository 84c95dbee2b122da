"""MNIST from its four IDX files, compressed or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source
from lirpa_fastwarmup.experiments.data.files import cache_folder, fetched, missing_files

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_CHECKSUMS = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
SOURCES = [Source(f"{name}.gz", f"{_ADDRESS}{name}.gz", f"md5:{md5}") for name, md5 in _CHECKSUMS.items()]
_UNSIGNED_BYTE = 0x08


def load(data_dir: Path | None = None) -> Dataset:
    """MNIST, 60,000 and 10,000 digits of 28×28.

    Args:
        data_dir: folder of the four files, ``.gz`` or unpacked; by default the user's cache, where they are downloaded
            to.

    Raises:
        OSError: files are missing, or cannot be downloaded; the text names them and the folder.
        CorruptFileError: a file is damaged, or not in IDX format.
    """
    folder = Path(data_dir) if data_dir is not None else cache_folder("mnist")
    missing = _missing(folder)
    if missing and data_dir is not None:
        raise missing_files("MNIST", [f"{name} (or {name}.gz)" for name in missing], folder)
    fetched("MNIST", [source for source in SOURCES if source.name.removesuffix(".gz") in missing], folder)
    splits = {part: _read_split(folder, *names) for part, names in _FILES.items()}
    return Dataset(name="MNIST", classes=10, train=splits["train"], test=splits["test"])


def _missing(folder: Path) -> list[str]:
    return [name for names in _FILES.values() for name in names if not _find(folder, name).is_file()]


def _find(folder: Path, name: str) -> Path:
    unpacked = folder / name
    return unpacked if unpacked.is_file() else folder / f"{name}.gz"


def _read_split(folder: Path, images_name: str, labels_name: str) -> Split:
    images_path, labels_path = _find(folder, images_name), _find(folder, labels_name)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise CorruptFileError(
            f"expected as many images as labels; found images of shape {tuple(images.shape)} in {images_path} and "
            f"labels of shape {tuple(labels.shape)} in {labels_path}"
        )
    return Split(images.unsqueeze(1), labels.long())


def read_idx(path: Path) -> Tensor:
    """The array of unsigned bytes in an IDX file, gzipped if its name ends in ``.gz``.

    Raises:
        CorruptFileError: the file is truncated, damaged, or of another format.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptFileError(f"{path} is no intact gzip file ({error}): fetch it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise CorruptFileError(
            f"{path} does not begin like an IDX file of unsigned bytes (00 00 08); found {content[:4].hex(' ')!r}"
        )
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise CorruptFileError(f"{path} ends within its header: fetch it again")
    shape = [int(size) for size in np.frombuffer(content[4:start], dtype=">u4")]
    if len(content) - start != math.prod(shape):
        raise CorruptFileError(
            f"{path} promises an array of shape {shape} but holds {len(content) - start} bytes of data: fetch it again"
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())
