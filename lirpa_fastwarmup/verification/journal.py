"""Finished batches in a file, from which an interrupted verification is resumed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lirpa_fastwarmup.storage import add_to_hash, parse_json, write_atomically


class Journal:
    """Results by what they were computed from; one line of JSON each, on the disk as soon as it is known.

    Args:
        path: the file. What it and the journals of other processes beside it hold is known at once; lines that are torn
            or damaged are left out.

    Attributes:
        used: the keys that were asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: set[str] = set()
        self._known: dict[str, Any] = {}
        for other in journals_beside(path):
            self._known |= _read(other)

    def get(self, key: str) -> Any:
        """What was put under ``key``; ``None`` if nothing was."""
        self.used.add(key)
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Write a result down."""
        self._known[key] = value
        with self.path.open("a") as file:
            # A line that was torn off is ended first.
            file.write("" if self._ends_whole() else "\n")
            file.write(_line(key, value))
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read(1) in (b"", b"\n")

    def forget(self, keys: Collection[str]) -> None:
        """Take out the results of ``keys``; the file goes with its last line."""
        left = {key: value for key, value in _read(self.path).items() if key not in keys}
        if left:
            write_atomically(self.path, "".join(_line(key, value) for key, value in left.items()).encode())
        else:
            self.path.unlink(missing_ok=True)


def journals_beside(path: Path) -> list[Path]:
    """The journals of all processes that wrote or write one beside ``path``, that one included."""
    name = path.name.removesuffix(path.suffix) if path.suffix[1:].isdigit() else path.name
    return sorted({path, *path.parent.glob(f"{glob.escape(name)}*")})


def _line(key: str, value: Any) -> str:
    return json.dumps({"key": key, "value": value, "checksum": digest({key: value})}) + "\n"


def _read(path: Path) -> dict[str, Any]:
    known = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                entry = parse_json(line)
                key, value = entry["key"], entry["value"]
                if entry["checksum"] == digest({key: value}):
                    known[key] = value
            except (ValueError, TypeError, KeyError):
                continue
    return known


def digest(values: Mapping[str, Any]) -> str:
    """A key that differs where ``values`` differ, tensors in them by every element."""
    hashed = hashlib.sha256()
    add_to_hash(hashed, values)
    return hashed.hexdigest()
