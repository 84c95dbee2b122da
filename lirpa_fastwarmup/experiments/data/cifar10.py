"""CIFAR-10 from its python batches."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source, checksum
from lirpa_fastwarmup.experiments.data.files import archived_folder, cache_folder

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


class _Bytes:
    """What stands for an array of bytes while a pickle is read: its content, and no function of numpy's."""

    def __init__(self, *_: Any) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.content = b""

    def __setstate__(self, state: Any) -> None:
        *_, shape, dtype, fortran, content = state
        self._take(content, dtype, shape, "F" if fortran else "C")

    def _take(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, _Type) or dtype.name not in ("u1", "|u1") or order not in ("C", b"C"):
            raise pickle.UnpicklingError("it holds an array of something else than bytes, row by row")
        self.content, self.shape = bytes(content), tuple(int(size) for size in shape)
        if math.prod(self.shape) != len(self.content):
            raise pickle.UnpicklingError(f"{len(self.content)} bytes are no array of shape {self.shape}")

    @classmethod
    def from_buffer(cls, content: Any, dtype: Any, shape: Any, order: Any) -> _Bytes:
        """As numpy writes arrays since its version 1.16."""
        made = cls()
        made._take(content, dtype, shape, order)
        return made

    def array(self) -> np.ndarray:
        """The array, read-only."""
        return np.frombuffer(self.content, dtype=np.uint8).reshape(self.shape)


class _Type:
    """What stands for a numpy.dtype while a pickle is read: its name."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else str(name)

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have not."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays of bytes and plain values, and refuses to call anything else that a pickle names.

    Of numpy nothing is called either: its functions end the process on states that no array has.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # As numpy 2 calls it.
        allowed = {
            ("_codecs", "encode"): _encoded,
            ("numpy", "dtype"): _Type,
            ("numpy", "ndarray"): _Bytes,
            ("numpy.core.multiarray", "_reconstruct"): _Bytes,
            ("numpy.core.numeric", "_frombuffer"): _Bytes.from_buffer,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 does")
        return allowed[module, name]


def _is_class(label: object) -> bool:
    return isinstance(label, int) and 0 <= label < _CLASSES


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 pickles them in Python 2's protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes encoded as {encoding!r}")
    return text.encode(encoding)


def _read_batch(path: Path) -> Split:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # pickle fails in many ways on what is damaged.
        raise CorruptFileError(f"{path} cannot be read as a batch of CIFAR-10 ({error}): fetch it again") from error
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    pixels = pixels.array() if isinstance(pixels, _Bytes) else pixels
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    size = int(np.prod(_SHAPE))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (size,):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise CorruptFileError(f"{path} should hold uint8 data of shape (n, {size}); found {found}")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(map(_is_class, labels)):
        raise CorruptFileError(f"{path} should hold {len(pixels)} labels from 0 to {_CLASSES - 1}, as a list")
    return Split(torch.from_numpy(pixels.reshape(-1, *_SHAPE).copy()), torch.tensor(labels, dtype=torch.int64))
