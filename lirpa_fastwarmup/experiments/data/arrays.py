"""Datasets of the user's own: arrays in .npz, .pt and .csv files, and what a factory makes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup.boxes import InputRange
from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split, check_labels, held_out
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, missing_files
from lirpa_fastwarmup.models import find_factory
from lirpa_fastwarmup.storage import read_tensors

_CHANNELS = (1, 3, 4)
_MAX_CLASSES = 1_000_000
_TEST_PART = 5  # A fifth of the samples of a single file.
_KEYS = ("inputs", "images", "labels", "low", "high")
_NEEDED = (
    "'inputs' (numbers, a sample per row) or 'images' (uint8), and 'labels'; 'low' and 'high', the range of the "
    "inputs, are optional"
)
_NUMBERED = "number the classes from 0, as integers"


def load(data_dir: Path | None = None) -> Dataset:
    """The dataset in a folder's ``train`` and ``test`` files of one format, or in a single file.

    A fifth of the samples of a single file, always the same ones, are the test set. ``docs/howto/own-data.md``
    describes the files.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the files do not hold such arrays; the message names what they must hold, and what was found.
    """
    if data_dir is None:
        raise ValueError("the dataset npz needs a folder with train.npz and test.npz: pass it as --data-dir")
    path = Path(data_dir)
    if path.suffix in READERS and not path.is_dir():
        found = READERS[path.suffix](path)
        whole = _split(found, path)
        if len(whole) < 2:
            raise ValueError(f"{path} holds {len(whole)} sample, and a training and a test set need one each")
        train, test = held_out(whole, -(-len(whole) // _TEST_PART), seed=0)
        return _dataset(path.stem, train, test, _range(found, path))
    suffixes = [one for one in READERS if (path / f"train{one}").is_file() or (path / f"test{one}").is_file()]
    files = [path / f"{name}{(suffixes or ['.npz'])[0]}" for name in ("train", "test")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise missing_files(f"a dataset of {', '.join(READERS)} files", missing, path)
    found, other = (READERS[file.suffix](file) for file in files)
    if found.get("columns") != other.get("columns"):
        raise ValueError(f"{files[0]} has the columns {found['columns']}, and {files[1]} {other['columns']}, in order")
    train, test = _split(found, files[0]), _split(other, files[1])
    return _dataset(path.resolve().name, train, test, _range(found, files[0]))


def from_factory(name: str) -> Dataset:
    """The dataset that the factory ``module:function`` or ``file.py:function`` returns, called without arguments.

    It is a :class:`Dataset`, or (train, test), each a torch Dataset of (input, label) or a pair (inputs, labels).

    Raises:
        ImportError, TypeError, ValueError: there is no such factory, or it returns something else.
    """
    made = find_factory(name, "dataset")()
    if isinstance(made, Dataset):
        return made
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise TypeError(
            f"the factory {name!r} returned an object of type {type(made).__name__}: return (train, test), each a "
            "torch Dataset of (input, label) or a pair (inputs, labels)"
        )
    train, test = (_split(_arrays_of(part), name) for part in made)
    return _dataset(name.rpartition(":")[2], train, test, None)


def _arrays_of(part: Any) -> dict[str, np.ndarray]:
    """The samples of a torch Dataset or a pair (inputs, labels); bytes are images."""
    if isinstance(part, tuple | list):
        inputs, labels = (np.asarray(one) for one in part)
    else:
        pairs = [part[place] for place in range(len(part))]
        inputs, labels = np.stack([np.asarray(x) for x, _ in pairs]), np.asarray([int(y) for _, y in pairs])
    return {"images" if inputs.dtype == np.uint8 else "inputs": inputs, "labels": labels}


def _dataset(name: str, train: Split, test: Split, input_range: InputRange | None) -> Dataset:
    mean, std = _mean_and_std(train)
    classes = 1 + max(int(train.labels.max()), int(test.labels.max()))
    return Dataset(name, classes, train, test, mean, std, input_range)


@contextmanager
def open_npz(path: Path, content: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an npz file, read when asked for; messages describe its content as ``content``."""
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                yield arrays
        except Exception as error:  # numpy and zipfile fail in many ways on damaged files.
            hint = "it contains pickled objects, or is not an npz file" if "allow_pickle" in str(error) else str(error)
            raise CorruptFileError(
                f"{path} is not a valid npz file of {content} ({hint}): write plain arrays with numpy.savez"
            ) from error


def _read_npz(path: Path) -> dict[str, Any]:
    with open_npz(path, "inputs and labels") as arrays:
        return _known(arrays)


def _read_pt(path: Path) -> dict[str, Any]:
    how = "write a dictionary of tensors with torch.save"
    content = read_tensors(path, f"cannot be read as tensors: {how}")
    if not isinstance(content, dict) or not all(isinstance(one, Tensor | int | float) for one in content.values()):
        raise CorruptFileError(f"{path} holds no dictionary of tensors: {how}, with {_NEEDED}")
    try:
        return _known({name: torch.as_tensor(one).detach().numpy() for name, one in content.items()})
    except (TypeError, ValueError) as error:  # numpy has no bfloat16, for example.
        raise CorruptFileError(f"{path} does not hold such tensors ({error}): {how}") from error


def _known(arrays: Mapping[str, Any]) -> dict[str, Any]:
    if "labels" not in arrays or ("inputs" in arrays) is ("images" in arrays):
        raise ValueError(f"it must hold {_NEEDED}; it holds {', '.join(map(repr, arrays)) or 'nothing'}")
    return {name: arrays[name] for name in _KEYS if name in arrays}


def _read_csv(path: Path) -> dict[str, Any]:
    """The columns of a table: ``label``, and the others as inputs; errors name the line and the column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            columns = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorruptFileError(f"{path} is not a table of text in UTF-8: {error}") from error
    if columns.count("label") != 1 or len(set(columns)) != len(columns):
        found = ", ".join(map(repr, columns)) or "none"
        raise ValueError(
            f"the first line of {path} must name the columns, each once, and the one of the class numbers 'label'; "
            f"found {found}"
        )
    table, label = np.empty((len(rows), len(columns))), columns.index("label")
    for place, (line, row) in enumerate(rows):
        if len(row) != len(columns):
            raise CorruptFileError(f"{path}, line {line}: {len(row)} cells, and the first line has {len(columns)}")
        for column, text in enumerate(row):
            try:
                table[place, column] = float(text)
            except ValueError:
                table[place, column] = np.nan
        valid = np.isfinite(table[place])
        valid[label] &= table[place, label].is_integer()
        if not valid.all():
            column = int(valid.argmin())
            hint = _NUMBERED if column == label else "write a finite number, or leave the row out"
            raise CorruptFileError(f"{path}, line {line}, column {columns[column]!r}: found {row[column]!r}; {hint}")
    labels = table[:, label].astype(np.int64)
    return {"inputs": np.delete(table, label, axis=1), "labels": labels, "columns": columns}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {".npz": _read_npz, ".pt": _read_pt, ".csv": _read_csv}


def _split(found: Mapping[str, Any], source: Path | str) -> Split:
    inputs = _images(found["images"], source) if "images" in found else _inputs(found["inputs"], source)
    if found["labels"].dtype.kind not in "iu":
        raise CorruptFileError(f"labels of {source} are {found['labels'].dtype}: {_NUMBERED}")
    return Split(inputs, check_labels(found["labels"], len(inputs), range(_MAX_CLASSES), source))


def _inputs(inputs: np.ndarray, source: Path | str) -> Tensor:
    if inputs.dtype.kind not in "fiu" or inputs.dtype == np.uint8 or inputs.ndim < 2 or inputs.size == 0:
        raise ValueError(
            f"inputs of {source} are {inputs.dtype} of shape {inputs.shape}: expected numbers of shape (samples, "
            "features) or (samples, channels, …), and pixels from 0 to 255 as the array 'images'"
        )
    with np.errstate(over="ignore"):  # Numbers beyond float32 become infinite, and are refused.
        return torch.from_numpy(np.array(inputs, dtype=np.float32, order="C"))


def _images(images: np.ndarray, source: Path | str) -> Tensor:
    """Bytes of shape (n, height, width), or with 1, 3 or 4 channels in second or last place, with channels second."""
    if images.dtype != np.uint8:
        raise ValueError(
            f"images of {source} are {images.dtype}: store pixels as uint8 from 0 to 255, or numbers as 'inputs'"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in _CHANNELS and images.shape[3] in _CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in _CHANNELS or len(images) == 0:
        raise ValueError(
            f"images of {source} have shape {images.shape}: expected (n, height, width), or four dimensions with 1, 3 "
            "or 4 channels in second or last place"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _range(found: Mapping[str, Any], path: Path) -> InputRange | None:
    if "low" not in found and "high" not in found:
        return None
    if "low" not in found or "high" not in found:
        raise ValueError(f"{path} must hold both 'low' and 'high', or neither")
    low, high = (torch.as_tensor(found[name], dtype=torch.float32) for name in ("low", "high"))
    return (low, high) if low.ndim or high.ndim else (float(low), float(high))


def _mean_and_std(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel or feature, as the network sees them."""
    chunks = split.images.split(4096)

    def mean_of(term: Callable[[Tensor], Tensor]) -> Tensor:
        sums = [term(Split.as_inputs(chunk).double().transpose(0, 1).flatten(1)).sum(1) for chunk in chunks]
        return torch.stack(sums).sum(0) * split.images.shape[1] / split.images.numel()

    mean = mean_of(lambda x: x)
    std = mean_of(lambda x: (x - mean.unsqueeze(1)).square()).sqrt()  # Two passes: no large squares cancel.
    std = torch.where(std > 1e-9 * mean.abs(), std, torch.ones_like(std))  # A constant channel is not scaled.
    return tuple(mean.tolist()), tuple(std.tolist())
