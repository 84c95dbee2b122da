"""The files of a dataset: in a folder of the user's, or downloaded into the cache and unpacked."""

import http.client
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import appdirs
from tqdm import tqdm

from lirpa_fastwarmup.storage import file_sum, locked

_DAMAGED = (shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, ValueError)
_TIMEOUT = 30.0  # Seconds.


class CorruptFileError(ValueError):
    """A data file does not match its format or its checksum."""


@dataclass(frozen=True)
class Source:
    """A file that can be downloaded: its name, its address, and algorithm and digest, such as "md5:9fb6…"."""

    name: str
    url: str
    checksum: str


def dataset_folder(dataset: str, data_dir: Path | None = None) -> Path:
    """``data_dir`` or, by default, the folder of ``dataset`` in the user's cache."""
    return Path(appdirs.user_cache_dir("lirpa_fastwarmup")) / dataset if data_dir is None else Path(data_dir)


def missing_files(title: str, names: Sequence[str], folder: Path) -> FileNotFoundError:
    """The error for a dataset ``title`` whose files ``names`` are not in ``folder``."""
    return FileNotFoundError(f"{title} needs {', '.join(names)} in {folder}: put them there, or pass --data-dir DIR")


def download(title: str, sources: Sequence[Source], folder: Path) -> None:
    """Download the files of the dataset ``title`` that ``folder`` lacks; a file gets its name once it is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):  # Another process may be downloading the same files.
            for source in sources:
                if not (folder / source.name).is_file():
                    _download(source, folder)
    except (OSError, http.client.HTTPException) as error:
        addresses = ", ".join(source.url for source in sources)
        advice = f"Try again, or put {addresses} into {folder} by hand, or pass the files' folder as --data-dir"
        raise OSError(f"{title} could not be downloaded ({error}). {advice}") from error


def _download(source: Source, folder: Path) -> None:
    unchecked = folder / f"{source.name}.part"
    request = urllib.request.Request(source.url, headers={"User-Agent": "lirpa_fastwarmup"})
    try:
        with (
            urllib.request.urlopen(request, timeout=_TIMEOUT) as response,
            unchecked.open("wb") as file,
            tqdm.wrapattr(file, "write", response.length, desc=source.name, disable=None) as shown,
        ):
            shutil.copyfileobj(response, shown)
        # urllib does not notice when a connection ends early: only the checksum shows that the file is incomplete.
        found = file_sum(unchecked, source.checksum.partition(":")[0])
        if found != source.checksum:
            problem = f"{source.url} was downloaded with checksum {found} instead of {source.checksum}, and removed"
            raise CorruptFileError(f"{problem}: try again, or download the file from another site")
        unchecked.replace(folder / source.name)
    finally:
        unchecked.unlink(missing_ok=True)


def extracted_folder(
    title: str, dataset: str, data_dir: Path | None, source: Source, inside: str, required: Sequence[str]
) -> Path:
    """The folder ``inside`` of the archive ``source``, with its files ``required``, downloaded and unpacked if needed.

    ``data_dir`` may be that folder, or contain it or the archive; nothing is downloaded into it.
    """
    folder = dataset_folder(dataset, data_dir)
    archive, names = folder / source.name, ", ".join(required)

    def find() -> Path | None:
        candidates = (folder, folder / inside)
        return next((place for place in candidates if all((place / name).is_file() for name in required)), None)

    if not find():
        if data_dir is None:
            download(title, [source], folder)
        if not archive.is_file():
            raise missing_files(title, [f"{inside} with {names}", f"or the archive {source.name}"], folder)
        with locked(folder, wait=True):
            if not find():
                _extract(archive, folder)
    if found := find():
        return found
    raise CorruptFileError(f"{archive} has no {inside} with {names}: download it again")


def _extract(archive: Path, folder: Path) -> None:
    safely: Any = {} if archive.suffix == ".zip" else {"filter": "data"}  # Of zip files, paths outside are skipped.
    try:
        shutil.unpack_archive(archive, folder, **safely)
    except _DAMAGED as error:
        raise CorruptFileError(f"{archive} is a damaged archive ({error}): remove it and download it again") from error
