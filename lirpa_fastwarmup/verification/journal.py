"""Finished batches in a file, from which an interrupted verification resumes."""

import glob
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from lirpa_fastwarmup.distributed import all_gather, world
from lirpa_fastwarmup.storage import add_to_hash, parse_json, write_atomically

PART = "part:"  # Begins the key of a result that is part of another.


class Journal:
    """Results by a digest of their inputs, one line of JSON each; reads the journals of other processes beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: set[str] = set()  # The keys that were looked up.
        self._known: dict[str, Any] = {}
        for other in _journals_beside(path):
            self._known |= _read(other)

    @classmethod
    def of_rank(cls, path: Path) -> Self:
        """The journal of this process: ``path`` on rank 0, ``path`` with its rank as suffix on the others."""
        ranks = world()
        return cls(path if ranks.is_rank_zero else path.with_name(f"{path.name}.{ranks.rank}"))

    def get(self, key: str) -> Any:
        """The value stored under ``key``; ``None`` without one."""
        self.used.add(key)
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Store a result."""
        self._known[key] = value
        with self.path.open("a") as file:
            file.write(_line(key, value))
            file.flush()
            os.fsync(file.fileno())

    def forget(self, keys: Collection[str]) -> None:
        """Remove ``keys``, and results that are parts of others, from all processes' journals, and empty journals."""
        for path in _journals_beside(self.path):
            known = {key: value for key, value in _read(path).items() if not key.startswith(PART)}
            left = [_line(key, value) for key, value in known.items() if key not in keys]
            if left:
                write_atomically(path, "".join(left).encode())
            else:
                path.unlink(missing_ok=True)

    def used_by_all(self) -> set[str]:
        """The keys that any process asked for. Every process must call this."""
        return set().union(*all_gather(self.used))


def _journals_beside(path: Path) -> list[Path]:
    """``path`` and the journals of other processes in its folder."""
    name = path.name.removesuffix(path.suffix) if path.suffix[1:].isdigit() else path.name
    return sorted({path, *path.parent.glob(f"{glob.escape(name)}*")})


def _line(key: str, value: Any) -> str:
    # The first end of line ends a torn line.
    return "\n" + json.dumps({"key": key, "value": value, "checksum": digest({key: value})}) + "\n"


def _read(path: Path) -> dict[str, Any]:
    known = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            entry = parse_json(line)
            key, value = entry["key"], entry["value"]
            if entry["checksum"] == digest({key: value}):
                known[key] = value
    return known


def digest(values: Mapping[str, Any]) -> str:
    """A key that differs if ``values`` differ, or any element of a tensor in them."""
    hashed = hashlib.sha256()
    add_to_hash(hashed, values)
    return hashed.hexdigest()
