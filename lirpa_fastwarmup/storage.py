"""Atomic writes, checksums, and locks on folders."""

import csv
import hashlib
import io
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout  # A dependency of torch.
from torch import Tensor

logger = logging.getLogger(__name__)

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)
_NESTED = 50
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
    write_atomically(path, (json.dumps({**values, _CHECKSUM: _json_sum(values)}, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file. Raises ValueError if its checksum does not match."""
    with refused(f"{path} cannot be read as JSON", ValueError):  # Also raised for text in another encoding.
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds no object; found {type(content).__name__}")
    expected = content.pop(_CHECKSUM, None)  # Files of earlier versions have none.
    if expected not in (None, _json_sum(content)):
        raise ValueError(f"{path} was changed after it was written: its checksum differs. Restore it or write it again")
    return content


@contextmanager
def refused(problem: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Raise ValueError, "problem: reason" and ``advice``, for errors of ``kinds`` in the block."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{problem}: {error}{advice}") from error


def parse_json(text: str) -> Any:
    """Parse JSON. Rejects deep nesting, which would crash the parser: auto_LiRPA raises Python's recursion limit."""
    brackets = re.findall(r"[\[\]{}]", _STRING.sub("", text))
    if max(accumulate(1 if one in "[{" else -1 for one in brackets), default=0) > _NESTED:
        raise ValueError("its brackets are nested too deep")
    return json.loads(text)


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


def read_csv(path: Path, columns: Sequence[str], what: str) -> list[dict[str, str]]:
    """The rows of a CSV file; raises ValueError if it is not ``what``, a table with ``columns``."""
    with refused(f"{path} cannot be read as {what}", ValueError, csv.Error):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[dict[str, str]] = list(reader)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"it has no column {', '.join(map(repr, missing))}")
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("its lines are not of one length")
    return rows


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values with ``torch.save``, followed by a checksum."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    whole = buffer.getvalue()
    write_atomically(path, whole + f"\nsha256:{hashlib.sha256(whole).hexdigest()}\n".encode())


def read_tensors(path: Path, otherwise: str) -> Any:
    """Tensors and plain values of ``torch.save``, on the CPU; raises ValueError, "path otherwise", if damaged."""
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
    return _TRAILER.search(path.read_bytes()[-_TRAILER_LENGTH:]) is not None


def file_sum(path: Path, algorithm: str = "sha256") -> str:
    """The checksum of a file, such as "sha256:9fb6…"."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


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
    elif isinstance(value, Mapping | list | tuple):
        kind, items = ("mapping", value.items()) if isinstance(value, Mapping) else (type(value).__name__, value)
        hashed.update(f"{kind} {len(value)} ".encode())
        for item in items:
            add_to_hash(hashed, item)
    else:
        text = value if isinstance(value, bytes) else repr(value).encode()
        hashed.update(f"{type(value).__name__} {len(text)} ".encode() + text)


@contextmanager
def make_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for the files that the block writes; if the block fails, remove it again while it is empty."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error) from error
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def _not_writable(folder: Path, error: OSError) -> OSError:
    reason = f"{folder} is a file" if folder.is_file() else error.strerror or error
    return type(error)(f"cannot write to {folder}: {reason}. Name another folder")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock ``folder`` against other processes of this package during the block; the system unlocks it after a kill."""
    path, holder = folder / LOCK, "another process"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError):  # Windows lets nobody else read a locked file.
            holder = path.read_text() or holder
        if not wait:
            raise FolderInUseError(f"{folder} is being written to by {holder}: wait, or name another folder") from None
        logger.warning("waiting for %s, which is writing to %s", holder, folder)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and not os.access(path, os.W_OK):
            raise _not_writable(folder, error) from error
        logger.info("%s cannot be locked: %s", folder, error)
    try:
        if isinstance(lock, FileLock):  # Not the kind that it becomes on file systems without locks.
            with suppress(OSError):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # Before the release, so that waiting processes notice, and make a new one.
        lock.release()
