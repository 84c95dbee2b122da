"""Datasets of the user's own: arrays in .npz, .pt and .csv files, and what a factory makes."""

import csv
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lirpa_fastwarmup import boxes, storage
from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split, check_labels, held_out
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, missing_files
from lirpa_fastwarmup.models import find_factory

_CHANNELS = (1, 3, 4)
_MAX_CLASSES = 1_000_000
_TEST_PART = 5  # A fifth of the samples of a single file.
_KEYS = ("inputs", "images", "labels", "low", "high")


def load(data_dir: Path | None = None) -> Dataset:
    """The dataset in a folder's ``train`` and ``test`` files of one format, or in a single file.

    The test set is a fifth of a single file, always the same. ``docs/howto/own-data.md`` describes the files.
    """
    if data_dir is None:
        raise ValueError("the dataset npz needs a folder with train.npz and test.npz: pass it as --data-dir")
    path = Path(data_dir)
    if path.suffix in READERS and not path.is_dir():
        if not path.is_file():
            raise missing_files("the dataset", [path.name], path.parent)
        found = READERS[path.suffix](path)
        whole = _split(found, path)
        if len(whole) < 2:
            raise ValueError(f"{path} holds {len(whole)} sample, and a training and a test set need one each")
        train, test = held_out(whole, -(-len(whole) // _TEST_PART), seed=0)
        return _dataset(path.stem, train, test, _range(found))
    pairs = [[path / f"{name}{suffix}" for name in ("train", "test")] for suffix in READERS]
    files = next((pair for pair in pairs if any(file.is_file() for file in pair)), pairs[0])
    if missing := [file.name for file in files if not file.is_file()]:
        raise missing_files(f"a dataset of {', '.join(READERS)} files", missing, path)
    found, other = (READERS[file.suffix](file) for file in files)
    if found.get("columns") != other.get("columns"):
        raise ValueError(f"{files[0]} has the columns {found['columns']}, and {files[1]} {other['columns']}, in order")
    return _dataset(path.resolve().name, _split(found, files[0]), _split(other, files[1]), _range(found))


def from_factory(name: str) -> Dataset:
    """The dataset that the factory ``module:function`` or ``file.py:function`` returns, called without arguments."""
    made = find_factory(name, "dataset")()
    if isinstance(made, Dataset):
        return made
    if not isinstance(made, tuple | list) or len(made) != 2:
        wanted = "(train, test), each a torch Dataset of (input, label) or a pair (inputs, labels)"
        raise TypeError(f"the factory {name!r} returned an object of type {type(made).__name__}: return {wanted}")
    train, test = (_split(_arrays_of(part), name) for part in made)
    return _dataset(name.rpartition(":")[2], train, test, None)


def _arrays_of(part: Any) -> dict[str, np.ndarray]:
    """The samples of a torch Dataset or a pair (inputs, labels); bytes are images."""
    if isinstance(part, tuple | list):
        inputs, labels = (np.asarray(one) for one in part)
    else:
        pairs = [part[place] for place in range(len(part))]
        inputs = np.stack([np.asarray(x) for x, _ in pairs])
        labels = np.stack([torch.as_tensor(y).detach().cpu().squeeze().numpy() for _, y in pairs]) + 0  # Not booleans.
    return {"images" if inputs.dtype == np.uint8 else "inputs": inputs, "labels": labels}


def _dataset(name: str, train: Split, test: Split, input_range: boxes.InputRange | None) -> Dataset:
    if first := min(int(train.labels.min()), int(test.labels.min())):
        raise ValueError(f"the labels of {name} begin at {first}, and classes are numbered from 0: subtract {first}")
    classes = 1 + max(int(train.labels.max()), int(test.labels.max()))
    channels = (Split.as_inputs(channel).double() for channel in train.images.unbind(1))  # In turn, to save memory.
    std, mean = torch.tensor([torch.std_mean(channel, correction=0) for channel in channels]).unbind(1)
    std = torch.where(std > 1e-9 * mean.abs(), std, torch.ones_like(std))  # A constant channel is not scaled.
    return Dataset(name, classes, train, test, tuple(mean.tolist()), tuple(std.tolist()), input_range)


def _read_npz(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _known(arrays)
        except Exception as error:  # numpy and zipfile fail in many ways on damaged files.
            hint = "it contains pickled objects, or is not an npz file" if "allow_pickle" in str(error) else str(error)
            raise CorruptFileError(f"{path} is not a valid npz file ({hint}): use numpy.savez on arrays") from error


def _read_pt(path: Path) -> dict[str, Any]:
    how = "write a dictionary of tensors with torch.save"
    content = storage.read_tensors(path, f"cannot be read as tensors: {how}")
    try:
        return _known({name: torch.as_tensor(one).detach().numpy() for name, one in content.items()})
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # numpy has no bfloat16, for example.
        raise CorruptFileError(f"{path} holds no dictionary of tensors of a dataset ({error}): {how}") from error


def _known(arrays: Mapping[str, Any]) -> dict[str, Any]:
    one_kind, whole_range = ("inputs" in arrays) != ("images" in arrays), ("low" in arrays) == ("high" in arrays)
    if "labels" not in arrays or not one_kind or not whole_range:
        needed = "'inputs' (a sample per row) or 'images' (uint8), 'labels', and both 'low' and 'high' or neither"
        raise ValueError(f"it must hold {needed}; it holds {', '.join(map(repr, arrays)) or 'nothing'}")
    return {name: arrays[name] for name in _KEYS if name in arrays}


def _read_csv(path: Path) -> dict[str, Any]:
    """The columns of a table: ``label``, and the others as inputs; errors name the line and the column."""
    problem, rows = f"{path} is not a table of text in UTF-8", list[list[float]]()
    with path.open(newline="", encoding="utf-8-sig") as file, storage.refused(problem, UnicodeDecodeError, csv.Error):
        reader = csv.reader(file, strict=True)
        columns = next(reader, [])
        if columns.count("label") != 1 or len(set(columns)) != len(columns):
            needed = "must name the columns, each once, and the one of the class numbers 'label'"
            raise ValueError(f"the first line of {path} {needed}; found {', '.join(map(repr, columns)) or 'none'}")
        for row in filter(None, reader):
            place = f"{path}, line {reader.line_num}"
            if len(row) != len(columns):
                raise CorruptFileError(f"{place}: {len(row)} cells, and the first line has {len(columns)}")
            rows.append([_cell(place, name, text) for name, text in zip(columns, row, strict=True)])
    table, label = np.array(rows).reshape(-1, len(columns)), columns.index("label")
    labels = table[:, label].astype(np.int64)
    return {"inputs": np.delete(table, label, axis=1), "labels": labels, "columns": columns}


def _cell(place: str, column: str, text: str) -> float:
    with suppress(ValueError):
        number = float(text)
        if math.isfinite(number) and (column != "label" or number.is_integer()):
            return number
    hint = "number the classes from 0" if column == "label" else "write a finite number, or leave the row out"
    raise CorruptFileError(f"{place}, column {column!r}: found {text!r}; {hint}")


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {".npz": _read_npz, ".pt": _read_pt, ".csv": _read_csv}


def _split(found: Mapping[str, Any], source: Path | str) -> Split:
    inputs = _images(found["images"], source) if "images" in found else _inputs(found["inputs"], source)
    return Split(inputs, check_labels(found["labels"], len(inputs), _MAX_CLASSES, source))


def _inputs(inputs: np.ndarray, source: Path | str) -> Tensor:
    if inputs.dtype.kind not in "fiu" or inputs.dtype == np.uint8 or inputs.ndim < 2 or inputs.size == 0:
        wanted = "numbers (samples, features) or (samples, channels, …), and pixels from 0 to 255 as the array 'images'"
        raise ValueError(f"inputs of {source} are {inputs.dtype} of shape {inputs.shape}: expected {wanted}")
    with np.errstate(over="ignore"):  # Numbers beyond float32 become infinite, and are refused.
        return torch.from_numpy(np.array(inputs, dtype=np.float32, order="C"))


def _images(images: np.ndarray, source: Path | str) -> Tensor:
    """Bytes of shape (n, height, width), or with 1, 3 or 4 channels in second or last place, with channels second."""
    found = f"images of {source} are {images.dtype} of shape {images.shape}"
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in _CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in _CHANNELS or len(images) == 0:
        advice = "store pixels as uint8 of shape (n, height, width), or with 1, 3 or 4 channels in second or last place"
        raise ValueError(f"{found}: {advice}; store numbers as 'inputs'")
    return torch.from_numpy(np.ascontiguousarray(images))


def _range(found: Mapping[str, Any]) -> boxes.InputRange | None:
    if "low" not in found:
        return None
    low, high = (torch.as_tensor(found[name], dtype=torch.float32) for name in ("low", "high"))
    return (low, high) if low.ndim or high.ndim else (float(low), float(high))
