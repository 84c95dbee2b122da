"""CIFAR-10 from its python batches."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lirpa_fastwarmup.data.dataset import Dataset, Split
from lirpa_fastwarmup.data.download import CorruptFileError, Source, checksum
from lirpa_fastwarmup.data.files import archived_folder, cache_folder

_ORIGINALS = {  # Their MD5 sums.
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
*_TRAIN, _TEST = _ORIGINALS
_SHAPE = (3, 32, 32)
_CLASSES = 10
SOURCE = Source(
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "md5:c58f30108f718f92721af3b95e74349a",
)


def load(data_dir: Path | None = None) -> Dataset:
    """CIFAR-10, 50,000 and 10,000 images of 32×32.

    Files other than the original ones, whose pixels may be other ones too, are read alike, and the dataset's name says
    so.

    Args:
        data_dir: folder of the batches, or of the folder ``cifar-10-batches-py`` with them, or of the archive; by
            default the user's cache, where it is downloaded to.

    Raises:
        OSError: files are missing, or cannot be downloaded; the text names them and the folder.
        CorruptFileError: a file is damaged, or no batch of CIFAR-10.
    """
    place = archived_folder(
        "CIFAR-10", data_dir, cache_folder("cifar10"), SOURCE, "cifar-10-batches-py", [*_TRAIN, _TEST]
    )
    parts = [_read_batch(place / name) for name in _TRAIN]
    return Dataset(
        name=_name(place),
        classes=_CLASSES,
        train=Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])),
        test=_read_batch(place / _TEST),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    )


def _name(place: Path) -> str:
    """The name that results are reported under: only the original files bear it alone."""
    original = all(checksum(place / name, "md5") == f"md5:{expected}" for name, expected in _ORIGINALS.items())
    return "CIFAR-10" if original else "CIFAR-10 (not the original files)"


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and plain values, and refuses to call anything else that a pickle names."""

    _ALLOWED = frozenset(
        {
            ("_codecs", "encode"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy.core.numeric", "_frombuffer"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 does")
        # numpy 1 calls the package numpy.core, numpy 2 numpy._core, and files may come from either.
        core = "numpy._core" if hasattr(np, "_core") else "numpy.core"
        return super().find_class(module.replace("numpy._core", "numpy.core").replace("numpy.core", core), name)


def _read_batch(path: Path) -> Split:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # pickle fails in many ways on what is damaged.
        raise CorruptFileError(f"{path} cannot be read as a batch of CIFAR-10 ({error}): fetch it again") from error
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    size = int(np.prod(_SHAPE))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (size,):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise CorruptFileError(f"{path} should hold uint8 data of shape (n, {size}); found {found}")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not set(labels) <= set(range(_CLASSES)):
        raise CorruptFileError(f"{path} should hold {len(pixels)} labels from 0 to {_CLASSES - 1}, as a list")
    return Split(torch.from_numpy(pixels.reshape(-1, *_SHAPE).copy()), torch.tensor(labels, dtype=torch.int64))
