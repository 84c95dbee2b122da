"""CIFAR-10 from its python batches."""

import math
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split, check_labels
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source, extracted_folder
from lirpa_fastwarmup.storage import file_sum

_ORIGINALS = {  # MD5 sums.
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_ARCHIVE = "cifar-10-python.tar.gz"
SOURCE = Source(_ARCHIVE, f"https://www.cs.toronto.edu/~kriz/{_ARCHIVE}", "md5:c58f30108f718f92721af3b95e74349a")


def load(data_dir: Path | None = None) -> Dataset:
    """CIFAR-10, 50,000 and 10,000 images of 32×32; the name says if the files are not the original ones.

    ``data_dir`` is the folder of the batches, or contains the folder ``cifar-10-batches-py`` or the archive.
    """
    folder = extracted_folder("CIFAR-10", "cifar10", data_dir, SOURCE, "cifar-10-batches-py", list(_ORIGINALS))
    original = all(file_sum(folder / name, "md5") == f"md5:{md5}" for name, md5 in _ORIGINALS.items())
    *batches, test = (_read_batch(folder / name) for name in _ORIGINALS)
    name = "CIFAR-10" if original else "CIFAR-10 (not the original files)"
    train = Split(torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches]))
    return Dataset(name, 10, train, test, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


class _Bytes:
    """Replaces a uint8 array while a pickle is read, so that no function of numpy is called."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: Any) -> None:
        *_, shape, dtype, column_major, content = state
        if column_major or not isinstance(dtype, _Type) or dtype.name not in ("u1", "|u1"):
            raise pickle.UnpicklingError("it contains an array that is not of bytes in row-major order")
        shape = tuple(int(size) for size in shape)
        if not isinstance(content, bytes | bytearray) or math.prod(shape) != len(content):
            raise pickle.UnpicklingError(f"it contains an array of shape {shape} with too few or too many bytes")
        self.array = np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _Type:
    """Replaces a numpy.dtype while a pickle is read: its name."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else str(name)

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and alignment, which bytes do not have."""


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Bytes:
    """Replaces the function by which numpy pickles arrays in protocol 5."""
    result = _Bytes()
    result.__setstate__((shape, dtype, order not in ("C", b"C"), content))
    return result


class _ArrayUnpickler(pickle.Unpickler):
    """Reads uint8 arrays and plain values, and refuses any other function or class that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # Its name in numpy 2.
        # Functions of numpy are replaced, too: they crash the process on invalid array states.
        allowed = {
            # Python 3 pickles bytes so in the protocols of Python 2, and in no other encoding.
            ("_codecs", "encode"): lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
            ("numpy", "dtype"): _Type,
            ("numpy", "ndarray"): _Bytes,
            ("numpy.core.multiarray", "_reconstruct"): _Bytes,
            ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a CIFAR-10 batch")
        return allowed[module, name]


def _read_batch(path: Path) -> Split:
    content = BytesIO(path.read_bytes())
    try:
        batch = _ArrayUnpickler(content, encoding="bytes").load()
        labels, pixels = np.array(batch[b"labels"]), batch[b"data"].array
    except Exception as error:  # pickle fails in many ways on damaged files.
        raise CorruptFileError(f"{path} cannot be read as a CIFAR-10 batch ({error!r}): download it again") from error
    expected = (labels.size, 3 * 32 * 32)
    if pixels.shape != expected:
        raise CorruptFileError(f"{path} should contain pixels of shape {expected}; found {pixels.shape}")
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return Split(images, check_labels(labels, len(images), 10, path))
