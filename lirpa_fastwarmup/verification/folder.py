"""The files of a verification: its tables, verification.json, and the journal that an interrupted one resumes from."""

import glob
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch

from lirpa_fastwarmup import storage
from lirpa_fastwarmup.distributed import world
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.module import BoundedModule
from lirpa_fastwarmup.verification.result import Radius, Verification, radii_entry
from lirpa_fastwarmup.version import __version__

CERTIFICATES, SUMMARY, RADII, JOURNAL = "certificates.csv", "verification.json", "radii.csv", "verification.partial"
WRITTEN = (CERTIFICATES, SUMMARY, RADII)
PART = "part:"  # Begins the key of a result that is part of another.


@contextmanager
def results_folder(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Make and lock ``folder`` for a verification; raises FileExistsError if it holds one, without ``overwrite``."""
    present = [name for name in WRITTEN if (folder / name).exists()]
    if present and not overwrite:
        text = f"{folder} holds a verification already ({', '.join(present)}); nothing in it was changed. Name another "
        raise FileExistsError(text + "folder with --out, or replace the verification with --overwrite")
    with storage.make_folder(folder), storage.locked(folder):
        yield


def write_results(
    folder: Path,
    bounded: BoundedModule,
    verifications: Sequence[Verification],
    radii: Sequence[Radius] | None,
    tolerance: float,
    about: Mapping[str, Any],
) -> None:
    """Replace the verification in ``folder``; ``about`` are entries of ``verification.json``, such as the dataset."""
    device, weights = bounded.example[0].device, storage.weights_sum(bounded.wrapped.state_dict())
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    content: dict[str, Any] = {
        **about,
        "precision": "float32 (float64 networks: float64), eager, without TF32 and autocast; rounding is not bounded",
        "engine": f"auto_LiRPA {ENGINE_VERSION}",
        "torch": torch.__version__,
        "package": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": world().size,
        "untested": list(bounded.untested),
        "weights": weights,
    }
    if verifications:
        rows = [row for one in verifications for row in one.rows(weights)]
        storage.write_atomically(folder / CERTIFICATES, storage.csv_text(rows).encode())
        content["results"] = [one.as_dict() for one in verifications]
    if radii is not None:
        storage.write_atomically(folder / RADII, storage.csv_text([one.row(weights) for one in radii]).encode())
        content["certified_radius"] = radii_entry(radii, tolerance)
    tables = (folder / CERTIFICATES, folder / RADII)
    content["files"] = {path.name: storage.file_sum(path) for path in tables if path.exists()}
    storage.write_json(folder / SUMMARY, content)


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
                storage.write_atomically(path, "".join(left).encode())
            else:
                path.unlink(missing_ok=True)


def _journals_beside(path: Path) -> list[Path]:
    name = path.name.removesuffix(path.suffix) if path.suffix[1:].isdigit() else path.name
    return sorted({path, *path.parent.glob(f"{glob.escape(name)}*")})


def _line(key: str, value: Any) -> str:
    # The first end of line ends a torn line.
    return "\n" + json.dumps({"key": key, "value": value, "checksum": digest({key: value})}) + "\n"


def _read(path: Path) -> dict[str, Any]:
    known = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            entry = storage.parse_json(line)
            key, value = entry["key"], entry["value"]
            if entry["checksum"] == digest({key: value}):
                known[key] = value
    return known


def digest(values: Mapping[str, Any]) -> str:
    """A key that differs if ``values`` differ, or any element of a tensor in them."""
    hashed = hashlib.sha256()
    storage.add_to_hash(hashed, values)
    return hashed.hexdigest()
