"""Atomic writes, checksums, and locks on folders."""

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
# The end of a file of tensors, not part of the checksum. torch.load and zip programs skip it.
_TRAILER = re.compile(rb"\nsha256:([0-9a-f]{64})\n\Z")
_TRAILER_LENGTH = 73


class FolderInUseError(OSError):
    """Another process is writing to a folder."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by a complete new one, or raise an OSError that names it."""
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
    """Whether a killed process left ``path`` behind: a lock, or an incomplete file."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(_PARTIAL))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as indented JSON, with a checksum for :func:`read_json`."""
    content = {**values, _CHECKSUM: _json_sum(values)}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its checksum.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object, or was changed after :func:`write_json` wrote it.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # Also for text in another encoding.
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object; found {type(content).__name__}")
    expected = content.pop(_CHECKSUM, None)  # Files of earlier versions have none.
    if expected is not None and expected != _json_sum(content):
        raise ValueError(
            f"{path} was changed after it was written: its checksum differs. Restore it from a copy, or write it again"
        )
    return content


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError if brackets are nested so deep that Python's parser might crash the process."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _NESTED:
        raise ValueError(f"its brackets are nested {deepest} deep")
    return json.loads(text)


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)
_NESTED = 50


def _json_sum(values: Mapping[str, Any]) -> str:
    # Of the text, where 1 and 1.0 differ and tuples are lists.
    return f"sha256:{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV, under a line with the names of all columns; missing values are blank."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write :func:`csv_text`."""
    write_atomically(path, csv_text(rows).encode())


def read_csv(path: Path, columns: Sequence[str], what: str) -> list[dict[str, str]]:
    """The rows of a CSV file that must have ``columns``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table of text, a column is missing, or lines differ in length; the message names the
            file and ``what`` it should be.
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
    """Write tensors and plain values with ``torch.save``, followed by a checksum."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    whole = buffer.getvalue()
    write_atomically(path, whole + f"\nsha256:{hashlib.sha256(whole).hexdigest()}\n".encode())


def read_tensors(path: Path, otherwise: str) -> Any:
    """Tensors and plain values that ``torch.save`` wrote to ``path``, on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: torch did not write it, or it is damaged; the message is the path and ``otherwise``.
    """
    whole = path.read_bytes()
    trailer = _TRAILER.search(whole, max(0, len(whole) - _TRAILER_LENGTH))
    if trailer and hashlib.sha256(whole[: trailer.start()]).hexdigest().encode() != trailer[1]:
        raise ValueError(f"{path} {otherwise} (its checksum differs)")
    try:
        return torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors on other files.
        raise ValueError(f"{path} {otherwise}") from error


def has_checksum(path: Path) -> bool:
    """Whether a file of tensors ends with a checksum, as :func:`write_tensors` writes it."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TRAILER_LENGTH))
        return _TRAILER.search(file.read()) is not None


def file_sum(path: Path) -> str:
    """The checksum of a file, as other files record it."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def weights_sum(state_dict: Mapping[str, Any]) -> str:
    """A digest of the name, dtype, shape and bytes of each entry, sorted by name."""
    hashed = hashlib.sha256()
    for name in sorted(state_dict):
        add_to_hash(hashed, (name, state_dict[name]))
    return f"sha256:{hashed.hexdigest()}"


def add_to_hash(hashed: Any, value: Any) -> None:
    """Add ``value`` to a hash: tensors by dtype, shape and bytes, collections by item, other values by ``repr``."""
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


@contextmanager
def make_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for the files that the block writes; if the block fails, remove it again while it is empty.

    Raises:
        OSError: it cannot be made or written to; the message gives the reason.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        _make_writable(folder)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def _make_writable(folder: Path) -> None:
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
    """Lock ``folder`` against other processes of this package during the block.

    The operating system releases the lock (``flock``) when the process ends. Windows and some file systems have no such
    locks.

    Args:
        folder: an existing folder.
        wait: wait for the other process instead of raising.

    Raises:
        FolderInUseError: another process holds the lock; the message names it.
    """
    if fcntl is None:
        yield
        return
    with _open_locked(folder, wait) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()  # Before the lock is released, for the check below.


def _open_locked(folder: Path, wait: bool) -> Any:
    """The lock file, open and locked."""
    while True:
        file = (folder / LOCK).open("a+")
        try:
            _lock(file, folder, wait)
            # The previous holder may have removed the file after it was opened here, and another made a new one.
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
                f"{folder} is being written to by {holder}: wait until it ends, or name another folder"
            ) from None
        logger.warning("waiting for %s, which is writing to %s", holder, folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # A file system without locks.
        logger.info("%s cannot be locked: %s", folder, error)
