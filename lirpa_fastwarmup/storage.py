"""Files that are, at every moment, either the old ones or the new ones, whole, and checked when they are read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there.
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".lirpa_fastwarmup.lock"
_PARTIAL = ".partial"
_CHECKSUM = "checksum"
# What ends a file of tensors, and is left out of the sum. torch.load and zip programs skip it.
_TRAILER = re.compile(rb"\nsha256:([0-9a-f]{64})\n\Z")
_TRAILER_LENGTH = 73


class FolderInUseError(OSError):
    """Another process is writing to a folder."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is, at every moment, either the old one or the new one, whole.

    Raises:
        OSError: it cannot be written; the text names it.
    """
    temporary = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is what a killed process left behind, and no result: a lock, or a file that is not whole."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(_PARTIAL))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as indented JSON, with a checksum that :func:`read_json` looks at."""
    content = {**values, _CHECKSUM: _json_sum(values)}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its checksum.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no object, or one that was changed after :func:`write_json` wrote it.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # Text of another encoding is one, too.
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object, but a {type(content).__name__}")
    expected = content.pop(_CHECKSUM, None)  # Files of earlier versions have none.
    if expected is not None and expected != _json_sum(content):
        raise ValueError(f"{path} was changed after it was written: its checksum is another. {_RESTORE}")
    return content


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or its brackets are nested so deep that Python's parser might end the process.
    """
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _NESTED:
        raise ValueError(f"its brackets are nested {deepest} deep")
    return json.loads(text)


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)
_NESTED = 50
_RESTORE = "Restore it from a copy, or write it anew"


def _json_sum(values: Mapping[str, Any]) -> str:
    # Through text, in which 1 and 1.0 differ and tuples are lists.
    return f"sha256:{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row, under a line of all rows' names; what a row has not is left blank."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write :func:`csv_text`."""
    write_atomically(path, csv_text(rows).encode())


def read_csv(path: Path, columns: Sequence[str], what: str) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Args:
        path: the file.
        columns: names that it must have.
        what: what it should be, for the message.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such table: no text, a column is missing, or lines are of another length.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[dict[str, str]] = list(reader)
            there = reader.fieldnames or ()
        missing = [name for name in columns if name not in there]
        if missing:
            raise ValueError(f"it has no column {', '.join(map(repr, missing))}")
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("its lines are not of one length")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}") from error
    return rows


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values with ``torch.save``, and a checksum behind them."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    whole = buffer.getvalue()
    write_atomically(path, whole + f"\nsha256:{hashlib.sha256(whole).hexdigest()}\n".encode())


def read_tensors(path: Path, otherwise: str) -> Any:
    """What ``torch.save`` wrote to ``path``, tensors and plain values, on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of torch's, or damaged; ``otherwise`` says what that means and what to do.
    """
    whole = path.read_bytes()
    trailer = _TRAILER.search(whole, max(0, len(whole) - _TRAILER_LENGTH))
    if trailer and hashlib.sha256(whole[: trailer.start()]).hexdigest().encode() != trailer[1]:
        raise ValueError(f"{path} {otherwise} (its checksum is another)")
    try:
        return torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on what is none of its files.
        raise ValueError(f"{path} {otherwise}") from error


def has_checksum(path: Path) -> bool:
    """Whether a file of tensors ends with its checksum, as all have that :func:`write_tensors` wrote."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TRAILER_LENGTH))
        return _TRAILER.search(file.read()) is not None


def file_sum(path: Path) -> str:
    """The checksum of a file, as it is named in others."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def weights_sum(state_dict: Mapping[str, Any]) -> str:
    """A digest of weights: of each entry's name, dtype, shape and bytes, in the order of the names."""
    hashed = hashlib.sha256()
    for name in sorted(state_dict):
        add_to_hash(hashed, (name, state_dict[name]))
    return f"sha256:{hashed.hexdigest()}"


def add_to_hash(hashed: Any, value: Any) -> None:
    """Add ``value`` to a hash: tensors by dtype, shape and bytes, collections by what they hold, others by ``repr``."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        hashed.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        hashed.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, Mapping):
        hashed.update(f"mapping {len(value)} ".encode())
        for item in value.items():
            add_to_hash(hashed, item)
    elif isinstance(value, list | tuple):
        hashed.update(f"{type(value).__name__} {len(value)} ".encode())
        for item in value:
            add_to_hash(hashed, item)
    else:
        text = value if isinstance(value, bytes) else repr(value).encode()
        hashed.update(f"{type(value).__name__} {len(text)} ".encode() + text)


def make_folder(folder: Path) -> None:
    """Make ``folder`` if absent, and see that it can be written to.

    Raises:
        OSError: it cannot be made or written to; the text says why.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"cannot write to {folder}: {error.strerror or error}. Name another folder") from error


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only one that writes to ``folder``, among the programs that ask, for as long as the block lasts.

    The lock is the operating system's (``flock``), and ends with the process, however that ends. On Windows, and on
    file systems without locks, there is none.

    Args:
        folder: it must exist.
        wait: wait for the other process instead of raising.

    Raises:
        FolderInUseError: another process has it; the text names that.
    """
    if fcntl is None:
        yield
        return
    with _taken(folder, wait) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()  # While it is locked: see below.


def _taken(folder: Path, wait: bool) -> Any:
    """The lock file, open and locked."""
    while True:
        file = (folder / LOCK).open("a+")
        try:
            _lock(file, folder, wait)
            # Whoever had it may have removed the file since it was opened here, and another may have made it anew.
            if os.fstat(file.fileno()).st_ino == (folder / LOCK).stat().st_ino:
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: Any, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        if not wait:
            raise FolderInUseError(
                f"{folder} is being written to by {holder}: wait until that has ended, or name another folder"
            ) from None
        logger.warning("waiting for %s, which is writing to %s", holder, folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # A file system without locks.
        logger.info("%s cannot be locked: %s", folder, error)
