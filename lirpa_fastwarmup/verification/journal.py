"""Finished batches in a file, so that an interrupted verification goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lirpa_fastwarmup.storage import write_atomically


class Journal:
    """Results by what they were computed from; one line of JSON each, on the disk as soon as it is known.

    Args:
        path: the file; what it holds from before is known at once, a torn last line left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._read()
        self._used: set[str] = set()

    def _read(self) -> dict[str, Any]:
        known = {}
        if self.path.is_file():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    known[entry["key"]] = entry["value"]
                except (ValueError, TypeError, KeyError):
                    continue
        return known

    def get(self, key: str) -> Any:
        """What was put under ``key``; ``None`` if nothing was."""
        self._used.add(key)
        return self._known.get(key)

    def used(self) -> dict[str, Any]:
        """What was asked for since this object was made, as far as it is known."""
        return {key: self._known[key] for key in self._used if key in self._known}

    def put(self, key: str, value: Any) -> None:
        """Write a result down."""
        self._known[key] = value
        with self.path.open("a") as file:
            # A line that was torn off is ended first.
            file.write("" if self._ends_whole() else "\n")
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read(1) in (b"", b"\n")

    def forget(self) -> None:
        """Take out what was asked for since this object was made; the file goes with its last line."""
        left = {key: value for key, value in self._read().items() if key not in self._used}
        lines = [json.dumps({"key": key, "value": value}) + "\n" for key, value in left.items()]
        if lines:
            write_atomically(self.path, "".join(lines).encode())
        else:
            self.path.unlink(missing_ok=True)
        self._known = left


def digest(values: Mapping[str, Any]) -> str:
    """A key that differs where ``values`` differ: tensors by dtype, shape and content, others by their text."""
    hashed = hashlib.sha256()
    for name, value in values.items():
        hashed.update(f"{name}=".encode())
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
            hashed.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            hashed.update(repr(value).encode())
    return hashed.hexdigest()
