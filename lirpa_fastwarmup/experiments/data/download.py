"""The files of a dataset: in a folder of the user's, or downloaded into the cache and unpacked."""

from __future__ import annotations

import hashlib
import http.client
import logging
import socket
import sys
import tarfile
import threading
import time
import urllib.error
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import appdirs
import torch

from lirpa_fastwarmup.storage import locked

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_TIMEOUT = 30.0  # Seconds.
_ONE_AT_A_TIME = threading.Lock()  # The default time-out of sockets is the whole process's.


class CorruptFileError(ValueError):
    """A data file does not match its format or its checksum."""


@dataclass(frozen=True)
class Source:
    """A file that can be downloaded: its name, its address, and algorithm and digest, such as "md5:9fb6…"."""

    name: str
    url: str
    checksum: str


def checksum(path: Path, algorithm: str) -> str:
    """The checksum of a file, in the form of :class:`Source`."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def dataset_folder(dataset: str, data_dir: Path | None = None) -> Path:
    """``data_dir`` or, by default, the folder of ``dataset`` in the user's cache."""
    return Path(appdirs.user_cache_dir("lirpa_fastwarmup")) / dataset if data_dir is None else Path(data_dir)


def missing_files(title: str, names: Sequence[str], folder: Path, hint: str = "") -> FileNotFoundError:
    """The error for a dataset ``title`` whose files ``names`` are not in ``folder``."""
    return FileNotFoundError(
        f"{title} needs {', '.join(names)} in {folder}: put the missing files there, or pass their folder as "
        f"--data-dir{hint}"
    )


def download(title: str, sources: Sequence[Source], folder: Path, *, pause: float = 1.0) -> None:
    """Download the files of the dataset ``title`` that ``folder`` lacks.

    A file gets its name once it is complete and its checksum matches. After a failure it is downloaded again, up to
    four times in total; the pause, in seconds, doubles with each attempt. HTTP errors such as 404 are final.

    Raises:
        OSError: a file cannot be downloaded or written; the message lists the addresses and the folder.
        CorruptFileError: a file was downloaded with another checksum, and removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):  # Another process may be downloading the same files.
            for source in sources:
                if not (folder / source.name).is_file():
                    _download(source, folder, pause)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{title} could not be downloaded ({error}). Download {', '.join(source.url for source in sources)} on a "
            f"machine with a network and put the files into {folder}, or pass their folder as --data-dir"
        ) from error


def _download(source: Source, folder: Path, pause: float) -> None:
    unchecked = folder / f"{source.name}.part"
    for leftover in folder.glob(f"{unchecked.name}*"):  # From a process that was killed.
        leftover.unlink()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _fetch(source, unchecked)
            unchecked.replace(folder / source.name)
            return
        except (OSError, http.client.HTTPException, CorruptFileError) as error:
            if isinstance(error, urllib.error.HTTPError) or attempt == _ATTEMPTS:
                raise
            logger.warning("attempt %d to download %s failed (%s): trying again", attempt, source.url, error)
            time.sleep(pause * 2 ** (attempt - 1))


def _fetch(source: Source, path: Path) -> None:
    with _ONE_AT_A_TIME:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT)  # torch sets none, and would wait for a stalled connection forever.
        try:
            torch.hub.download_url_to_file(source.url, str(path), progress=sys.stderr.isatty())
        finally:
            socket.setdefaulttimeout(timeout)
    # torch does not notice when a connection ends early: only the checksum shows that the file is incomplete.
    found = checksum(path, source.checksum.partition(":")[0])
    if found != source.checksum:
        path.unlink()
        raise CorruptFileError(
            f"{source.url} was downloaded with checksum {found} instead of {source.checksum}, and removed: try again, "
            "or download the file from another site"
        )


def extracted_folder(
    title: str, dataset: str, data_dir: Path | None, source: Source, inside: str, required: Sequence[str]
) -> Path:
    """The folder ``inside`` of the archive ``source``, downloaded into the cache and unpacked if needed.

    ``data_dir`` may be that folder, or contain it or the archive; nothing is downloaded into it. The folder is
    recognised by its files ``required``.
    """
    folder = dataset_folder(dataset, data_dir)
    archive = folder / source.name

    def find() -> Path | None:
        candidates = (folder, folder / inside)
        return next((place for place in candidates if all((place / name).is_file() for name in required)), None)

    if (found := find()) is not None:
        return found
    if data_dir is None:
        download(title, [source], folder)
    if not archive.is_file():
        raise missing_files(title, [f"{inside} with {', '.join(required)}", f"or the archive {source.name}"], folder)
    with locked(folder, wait=True):
        if (found := find()) is None:
            _extract(archive, folder)
            found = find()
    if found is None:
        raise CorruptFileError(f"{archive} has no {inside} with {', '.join(required)}: download it again")
    return found


def _extract(archive: Path, folder: Path) -> None:
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as content:
                content.extractall(folder)  # Ignores "..", and makes absolute paths relative.
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, ValueError) as error:
        raise CorruptFileError(f"{archive} is a damaged archive ({error}): remove it and download it again") from error
